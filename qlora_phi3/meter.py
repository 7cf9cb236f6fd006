"""Measured bytes and seconds, per phase of a run.

Owns what is measured and how: on CUDA the allocator's peak, and what the driver says that the process has
where nvidia-ml-py is installed; on the CPU the process' resident set, sampled in a thread. Predictions are
memory.py's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import psutil

SAMPLE_SECONDS: Final = 0.02
"""Time between two readings of the resident set; one reading takes about 20 microseconds."""


@dataclass(frozen=True)
class PhaseUse:
    """What one phase took. Units: seconds; bytes at its highest point.

    `process_bytes`: of the card when the phase ended, with context and caches; None where no driver says it.
    """

    seconds: float
    peak_bytes: int
    process_bytes: int | None = None


@dataclass
class Meter:
    """Measures phases of a run on one device, `"cuda"` or `"cpu"`."""

    device: str
    phases: dict[str, PhaseUse] = field(default_factory=dict)
    _sampler: _Sampler | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body under `name`; phases do not nest."""
        self._begin()
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds, peak = time.perf_counter() - start, self._end()
            self.phases[name] = PhaseUse(seconds, peak, self._process_bytes())

    def peak_bytes(self) -> int:
        """Highest use since the current phase began.

        Units: allocated bytes on CUDA, resident bytes of the process on the CPU.
        """
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated())
        return self._sampler.peak() if self._sampler is not None else 0

    def now(self) -> dict[str, int | None]:
        """Bytes at this moment: resident in the computer's memory, and allocated on the GPU."""
        allocated = None
        if self.device == "cuda":
            import torch

            allocated = int(torch.cuda.memory_allocated())
        return {"rss_bytes": psutil.Process().memory_info().rss, "allocated_bytes": allocated}

    def _process_bytes(self) -> int | None:
        if self.device != "cuda":
            return None
        import torch

        return process_bytes(str(torch.cuda.get_device_properties(0).uuid))

    def to_json(self) -> dict[str, Any]:
        kind = "allocated" if self.device == "cuda" else "resident"
        return {"kind": kind, "phases": {name: asdict(use) for name, use in self.phases.items()}}

    def _begin(self) -> None:
        assert self._sampler is None, "phases do not nest"
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._sampler = _Sampler()

    def _end(self) -> int:
        peak = self.peak_bytes()
        assert self._sampler is not None
        self._sampler.stop()
        self._sampler = None
        return peak


def process_bytes(uuid: str) -> int | None:
    """Memory of the card `uuid` that the driver counts as this process', context and caches with it.

    The caching allocator gives nothing back by itself, so the end of a phase is close to its highest point.
    None without nvidia-ml-py, or where the driver does not tell: on Windows, and in a container that has
    process ids of its own. Untested on hardware.
    """
    return _ask_driver(
        lambda nvml: {
            one.pid: one.usedGpuMemory
            for one in nvml.nvmlDeviceGetComputeRunningProcesses(
                nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            )
        }.get(os.getpid())
    )


def card_bytes() -> int | None:
    """All memory of the first card, asked without torch; None without nvidia-ml-py or a card.

    Untested on hardware.
    """
    return _ask_driver(lambda nvml: nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).total)


def _ask_driver(question: Callable[[Any], int | None]) -> int | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        found = question(pynvml)
    except pynvml.NVMLError:
        return None
    return int(found) if found is not None else None


class _Sampler:
    """Reads the resident set of this process until stopped."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def peak(self) -> int:
        self._peak = max(self._peak, self._process.memory_info().rss)
        return self._peak

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak()
