"""Measured bytes and seconds, per phase of a run.

Owns what is measured and how: on CUDA the allocator's peak, on the CPU the process' resident set,
sampled in a thread. Predictions are memory.py's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import psutil

SAMPLE_SECONDS: Final = 0.02
"""Time between two readings of the resident set; one reading takes about 20 microseconds."""


@dataclass(frozen=True)
class PhaseUse:
    """What one phase took. Units: seconds; bytes at its highest point."""

    seconds: float
    peak_bytes: int


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
            self.phases[name] = PhaseUse(time.perf_counter() - start, self._end())

    def peak_bytes(self) -> int:
        """Highest use since the current phase began.

        Units: allocated bytes on CUDA, resident bytes of the process on the CPU.
        """
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated())
        return self._sampler.peak() if self._sampler is not None else 0

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
