"""Which of an operation's two implementations computes, and how a Triton kernel is launched.

Triton is imported when the first kernel is launched and not before: the package works without it. A kernel is
a plain function beside its reference, in whose module `tl` is put then.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

if TYPE_CHECKING:
    import triton.language as tl

Backend = Literal["auto", "triton", "torch"]
"""Triton's kernels on CUDA tensors where Triton works and the reference elsewhere, or one of them always."""

DTYPES: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What kernels compute without losing anything to float32, in which they sum."""

# not a context variable: autograd runs the backward of CUDA tensors in threads of its own
_chosen: Backend = "auto"


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Compute with this implementation inside the body, in all threads of the process.

    "triton" on CPU tensors needs TRITON_INTERPRET=1 in the environment since before triton's first import.
    """
    global _chosen
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


def takes_triton(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether an operation on tensors of these dtypes there is to launch its kernel."""
    fits = len(set(dtypes)) == 1 and dtypes[0] in DTYPES
    if _chosen == "auto":
        return fits and device.type == "cuda" and _works(device, dtypes[0])
    assert fits or _chosen == "torch", f"a Triton kernel on {dtypes}"
    return _chosen == "triton"


def launch(kernel: Callable[..., None], programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the device of its first argument.

    The first axis may have 2^31 - 1 programs, the second 65535.
    """
    if 0 in programs:
        return
    # products are rounded before they are summed, as in the reference; Triton's own default changes in 3.10
    constants["enable_fp_fusion"] = False
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _compiled(kernel)[programs](*arguments, **constants)


def block_of(length: int) -> int:
    """The smallest power of two that holds this many: Triton's blocks have no other lengths."""
    return 1 << max(0, length - 1).bit_length()


def warps_of(block: int) -> int:
    """So many that a thread has 16 elements of a block; a doubt: computed, not yet measured on a card."""
    return max(1, min(16, block // 512))


def row_stride(x: torch.Tensor) -> int:
    """Elements from one row of a matrix to the next, whose own elements have to lie side by side."""
    assert x.stride(-1) == 1 or x.shape[-1] <= 1, "a kernel on columns that do not lie side by side"
    return x.stride(0)


@cache
def _compiled(kernel: Callable[..., None]) -> Any:
    import triton
    import triton.language

    kernel.__globals__["tl"] = triton.language
    return triton.jit(kernel)


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a first kernel runs. Beside triton that takes a C compiler, Python's headers and a card and a
    driver that it knows, bfloat16 a newer card; without them training goes on with the reference."""
    if importlib.util.find_spec("triton") is None:
        return False
    x = torch.zeros(1, dtype=dtype, device=device)
    try:
        launch(_probe, (1,), x)
        found = x.item() == 1
    except Exception as error:  # whatever a compiler or driver raises
        reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
        warnings.warn(
            f"Triton's kernels are off on {device} in {dtype}, plain torch is slower: "
            f"{type(error).__name__}: {reason}. They need a C compiler and Python's "
            "headers (Debian: gcc python3-dev) and a card that this Triton knows.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    assert found, f"Triton miscomputes on {device} in {dtype}"
    return True


def _probe(x: tl.tensor) -> None:
    tl.store(x, (tl.load(x).to(tl.float32) + 1).to(x.dtype.element_ty))
