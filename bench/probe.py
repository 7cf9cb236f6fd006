"""What a measured process measures of itself, ours and every peer alike, in whatever Python it runs.

Owns seconds, bytes, what was fed to the model and the speed of a bare matmul. Standard library only; torch
is imported where it is used, and nothing of qlora_phi3: a peer's environment has none of it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

IGNORE = -100
SAMPLE_SECONDS = 0.02
GEMM_SECONDS = 0.5
"""How long matmuls are repeated; the fastest counts."""
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "output_proj")
LINEARS += ("gate_proj", "up_proj", "w1", "w2", "w3", "qkv", "proj", "fc", "fc_1", "fc_2")
"""What decoder linears are called, in Phi-3 and in the peers' own models of it."""

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids and labels of one row, without pads."""


def digest(steps: Iterable[Iterable[Row]]) -> str:
    """SHA-256 over the rows of each optimizer step.

    Rows of a step in any order, which its loss does not see; a row's first label is nobody's target, so it
    counts as ignored.
    """
    whole = hashlib.sha256()
    for rows in steps:
        whole.update(b"step")
        for one in sorted(_row_digest(ids, labels) for ids, labels in rows):
            whole.update(one)
    return whole.hexdigest()


def _row_digest(ids: Sequence[int], labels: Sequence[int]) -> bytes:
    assert len(ids) == len(labels)
    numbers = array("q", [len(ids), *ids, IGNORE, *list(labels)[1:]])
    if sys.byteorder == "big":
        numbers.byteswap()
    return hashlib.sha256(numbers.tobytes()).digest()


class Fed:
    """What went into the model, optimizer step by optimizer step, as tensors that nothing is done with until
    the end."""

    def __init__(self) -> None:
        self._steps: list[list[tuple[Any, Any, Any]]] = []

    def begin(self) -> None:
        """What comes from now on is another step's."""
        self._steps.append([])

    @property
    def begun(self) -> bool:
        """Whether there was a step."""
        return bool(self._steps)

    def padded(self, ids: Any, labels: Any, mask: Any) -> None:
        """A pass of padded rows. Shape: all (rows, length); mask 1 where a token is, None without pads."""
        self._steps[-1].append((ids, labels, mask))

    def flat(self, ids: Any, labels: Any, bounds: Any) -> None:
        """A pass of rows behind each other. Shape: ids and labels (1, T); bounds (rows + 1,)."""
        for start, stop in pairwise(bounds.tolist()):
            self.padded(ids[:, start:stop], labels[:, start:stop], None)

    def steps(self) -> list[list[Row]]:
        return [[row for one in passes for row in _rows(*one)] for passes in self._steps]

    def to_json(self) -> dict[str, Any]:
        """The keys of a result. Units: tokens a step, without pads; supervised ones are targets."""
        steps = self.steps()
        return {
            "token_stream": digest(steps),
            "tokens": [sum(len(ids) for ids, _ in rows) for rows in steps],
            "supervised_tokens": [
                sum(n != IGNORE for _, labels in rows for n in labels[1:]) for rows in steps
            ],
        }


def _rows(ids: Any, labels: Any, mask: Any) -> Iterator[Row]:
    for i in range(len(ids)):
        keep = slice(None) if mask is None else mask[i].bool()
        yield ids[i][keep].tolist(), labels[i][keep].tolist()


class Phases:
    """Bytes per phase of this process: resident ones, and on CUDA what its allocator and the driver say.

    Units: bytes at the highest point of a phase; `start` before the load, `process_bytes` at a phase's end.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.resident = {"start": resident_bytes()}
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.process: dict[str, int | None] = {}
        self.seconds: dict[str, float] = {}
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()  # the matmul before is no part of it
            self._read_cuda("start")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body; the samplers of phases do not nest."""
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with _peak_resident() as found:
            try:
                yield
            finally:
                if self._device == "cuda":
                    self._read_cuda(name)
                self.seconds[name] = time.perf_counter() - start
        self.resident[name] = max(found)

    def _read_cuda(self, name: str) -> None:
        import torch

        torch.cuda.synchronize()
        self.allocated[name] = int(torch.cuda.max_memory_allocated())
        self.reserved[name] = int(torch.cuda.max_memory_reserved())
        self.process[name] = card_bytes()

    def to_json(self) -> dict[str, Any]:
        cuda = self._device == "cuda"
        return {
            "phases": self.resident,
            "allocated": self.allocated if cuda else None,
            "reserved": self.reserved if cuda else None,
            "process_bytes": self.process if cuda else None,
            "load_seconds": round(self.seconds["load"], 3),
            "attach_seconds": round(self.seconds["attach"], 3),
        }


@contextmanager
def _peak_resident() -> Iterator[list[int]]:
    found, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            found[0] = max(found[0], resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(resident_bytes())


def resident_bytes() -> int:
    """Resident set of this process; where there is no /proc, the highest that it ever was."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def card_bytes() -> int | None:
    """What the driver counts as this process' on the card; None without nvidia-ml-py, or in silence."""
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(0).uuid
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    except Exception:  # NVML's errors have no class where it is not installed
        return None
    used = {one.pid: one.usedGpuMemory for one in processes}.get(os.getpid())
    return None if used is None else int(used)


def device_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name(0))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def matmul_flops_per_second(device: str, dtype: str) -> float:
    """Of the fastest square matmul in `dtype` that this process sees now: what MFU is a share of."""
    import torch

    side = GEMM_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    fastest, until, rounds = float("inf"), time.perf_counter() + GEMM_SECONDS, 0
    with torch.no_grad():
        while rounds < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            fastest, rounds = min(fastest, time.perf_counter() - start), rounds + 1
    del a, b
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2 * side**3 / fastest


def linear_bytes(model: Any) -> int:
    """Bytes of the base's decoder linears as they lie in memory, with scales and code books of 4-bit ones."""
    found = {}  # PEFT's layer and the linear in it have the same weight
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        parts = [part for part in name.split(".") if part != "base_layer"]
        adapter = any("lora" in part for part in parts)
        if weight is not None and not adapter and parts[-1] in LINEARS and weight.dim() == 2:
            found[id(weight)] = weight
    return sum(map(weight_bytes, found.values()))


def weight_bytes(weight: Any) -> int:
    """Of one weight, with bitsandbytes' quantization state, or the tensors that a torchao subclass holds."""
    inner = getattr(weight, "__tensor_flatten__", None)
    if inner is not None and not hasattr(weight, "quant_state"):
        return sum(_nbytes(getattr(weight, name)) for name in inner()[0])
    return _nbytes(weight) + _state_bytes(getattr(weight, "quant_state", None))


def _state_bytes(state: Any) -> int:
    """A bitsandbytes QuantState: scales, their code book, and with double quantization the scales' own."""
    if state is None:
        return 0
    tensors = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    return sum(_nbytes(one) for one in tensors if one is not None) + _state_bytes(
        getattr(state, "state2", None)
    )


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def trained_parameters(model: Any) -> int:
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def adapter_dtype(model: Any) -> str:
    """Of what is trained; several are joined."""
    return " and ".join(sorted({str(one.dtype)[6:] for one in model.parameters() if one.requires_grad}))


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of the libraries that are installed in this Python."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
