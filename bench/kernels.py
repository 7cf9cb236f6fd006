"""Operations of a layer, one at a time: milliseconds and GB/s of plain torch and, on CUDA, of Triton's.

At Phi-3-mini's sizes in bfloat16, logits in float32. Both take turns on fresh copies of the same inputs, in
one process: an operation keeps nothing. On a card the L2 cache is emptied before each. Bytes are those that
have to be read and written at least once, so that a second pass over them shows as fewer GB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from qlora_phi3 import phi3
from qlora_phi3.case import LOGIT_TOKENS

from . import results

if TYPE_CHECKING:
    import torch

LIBRARIES: Final = ("torch", "bitsandbytes")
MODEL: Final = "microsoft/Phi-3-mini-4k-instruct"
SLICE: Final = 2048
"""Intermediate columns that the sliced layer dequantizes at once."""
CACHE_BYTES: Final = 2**28
"""Written between two calls on a card: more than any L2 cache has."""

Work = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """What is timed: `work` on copies of `inputs`. Units: moved_bytes, read and written at least."""

    name: str
    shape: tuple[int, ...]
    work: Work
    inputs: tuple[torch.Tensor, ...]
    moved_bytes: int


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=_counts, default=(512, 4096), help="rows, as in 512,4096")
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed calls of each, after three that warm up"
    )
    parser.add_argument("--only", default="", help="operations whose name has this in it")


def run(chosen: argparse.Namespace) -> int:
    backends = ["torch", "triton"] if chosen.device == "cuda" and find_spec("triton") else ["torch"]
    libraries = (*LIBRARIES, "triton") if "triton" in backends else LIBRARIES
    for operation in operations(chosen.tokens, chosen.device, chosen.only):
        seconds = measure(operation, backends, chosen.device, chosen.repeats)
        for backend in backends:
            row = _row(operation, backend, seconds[backend]) | {
                "model": MODEL,
                "device": _device(chosen.device),
            }
            print(json.dumps(row))
            results.append("kernels", row, libraries)
    return 0


def operations(tokens: tuple[int, ...], device: str, only: str = "") -> Iterator[Operation]:
    """Each with its inputs, made when it is its turn."""
    kinds = (_rms_norm, _rope, _swiglu, _cross_entropy)
    for kind in kinds:
        for count in tokens:
            yield from (one for one in kind(count, phi3.VARIANTS[MODEL], device) if only in one.name)
    if only in "nf4.dequantize":
        yield from _nf4(phi3.VARIANTS[MODEL], device)


def measure(
    operation: Operation, backends: list[str], device: str, repeats: int, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call by backend, by turns."""
    from qlora_phi3 import kernels

    found: dict[str, list[float]] = {backend: [] for backend in backends}
    time_one = _on_card if device == "cuda" else _on_cpu
    for number in range(repeats + warm_up):
        for backend in backends:
            inputs = [one.clone() for one in operation.inputs]
            with kernels.using(backend):
                seconds = time_one(operation.work, inputs)
            if number >= warm_up:
                found[backend].append(seconds)
    return found


def _on_cpu(work: Work, inputs: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    work(*inputs)
    return time.perf_counter() - start


def _on_card(work: Work, inputs: list[torch.Tensor]) -> float:
    import torch

    torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work(*inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _row(operation: Operation, backend: str, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    low, *_, high = (
        statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 2
    )
    return {
        "operation": operation.name,
        "shape": operation.shape,
        "backend": backend,
        "milliseconds": round(1000 * median, 4),
        "p10_milliseconds": round(1000 * low, 4),
        "p90_milliseconds": round(1000 * high, 4),
        "gigabytes_per_second": round(operation.moved_bytes / median / 1e9, 2),
        "moved_bytes": operation.moved_bytes,
        "repeats": len(seconds),
    }


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(","))


def _device(kind: str) -> str:
    import torch

    return torch.cuda.get_device_name() if kind == "cuda" else "cpu"


# --- the operations


def _draw(*shape: int, device: str, dtype: str = "bfloat16") -> torch.Tensor:
    import torch

    return torch.randn(*shape, device=device, dtype=getattr(torch, dtype))


def _rms_norm(tokens: int, geometry: phi3.Geometry, device: str) -> Iterator[Operation]:
    from qlora_phi3.kernels import rms_norm

    shape = tokens, geometry.hidden_size
    x, grad, weight = (_draw(*one, device=device) for one in (shape, shape, shape[1:]))
    one = 2 * x.numel()

    def forward(x: torch.Tensor) -> Any:
        return rms_norm.forward(x, weight, 1e-5)

    def backward(grad: torch.Tensor, x: torch.Tensor) -> Any:
        return rms_norm.backward(grad, x, weight, 1e-5)

    yield Operation("rms_norm.forward", shape, forward, (x,), 2 * one)
    yield Operation("rms_norm.backward", shape, backward, (grad, x), 3 * one)


def _rope(tokens: int, geometry: phi3.Geometry, device: str) -> Iterator[Operation]:
    from qlora_phi3.kernels import rope

    width, num = geometry.head_dim, geometry.num_heads + geometry.num_kv_heads
    rotary = int(width * geometry.rotary_fraction)
    qkv = _draw(tokens, (num + geometry.num_kv_heads) * width, device=device)
    angles = _draw(tokens, rotary // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def rotate(qkv: torch.Tensor) -> None:
        rope.rotate_(qkv[:, : num * width].view(tokens, num, width), cos, sin)

    moved = 2 * (2 * tokens * num * rotary + cos.numel())  # halves of cosines and sines
    yield Operation("rope.rotate_", (tokens, num, width), rotate, (qkv,), moved)


def _swiglu(tokens: int, geometry: phi3.Geometry, device: str) -> Iterator[Operation]:
    from qlora_phi3.kernels import swiglu

    for columns in (geometry.intermediate_size, min(SLICE, geometry.intermediate_size)):
        gate_up, grad = (_draw(tokens, size, device=device) for size in (2 * columns, columns))
        one = 2 * grad.numel()

        def forward(gate_up: torch.Tensor) -> Any:
            return swiglu.forward(*gate_up.chunk(2, dim=1))

        def backward(grad: torch.Tensor, gate_up: torch.Tensor) -> Any:
            return swiglu.backward_(grad, *gate_up.chunk(2, dim=1), product=True)

        yield Operation("swiglu.forward", (tokens, columns), forward, (gate_up,), 3 * one)
        yield Operation("swiglu.backward_", (tokens, columns), backward, (grad, gate_up), 6 * one)


def _cross_entropy(tokens: int, geometry: phi3.Geometry, device: str) -> Iterator[Operation]:
    from qlora_phi3.kernels.cross_entropy import nll_and_error_

    shape = min(tokens, LOGIT_TOKENS), geometry.vocab_size
    logits = _draw(*shape, device=device, dtype="float32")
    wanted = logits.argmin(dim=1, keepdim=True)
    yield Operation(
        "cross_entropy.nll_and_error_",
        shape,
        lambda x: nll_and_error_(x, wanted),
        (logits,),
        8 * logits.numel(),
    )


def _nf4(geometry: phi3.Geometry, device: str) -> Iterator[Operation]:
    """gate_up_proj whole and the rows of a slice of intermediate columns, down_proj's columns of one."""
    import bitsandbytes.functional as bnb

    from qlora_phi3.kernels import nf4

    ffn = geometry.intermediate_size
    size = min(SLICE, ffn)
    for linear, slices in {
        "gate_up_proj": ({}, {"rows": [(0, size), (ffn, ffn + size)]}),
        "down_proj": ({"columns": (0, size)},),
    }.items():
        weight = _draw(*geometry.linear_shape(linear), device=device)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        for how in slices:

            def dequantize(packed: torch.Tensor, state: Any = state, how: Any = how) -> Any:
                return nf4.dequantize(packed, state, **how)

            shape = tuple(dequantize(packed).shape)
            num = shape[0] * shape[1]
            moved = 2 * num + num // 2 + num // 64 + 4 * (num // 64 // 256)  # weights, codes, both scales
            yield Operation("nf4.dequantize", shape, dequantize, (packed,), moved)
