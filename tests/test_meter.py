"""A phase's peak sees what was made and freed inside it; phases stand beside each other, never inside."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from qlora_phi3.meter import Meter, PhaseUse, card_bytes, process_bytes

MB = 1_000_000


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def make_and_free(num_bytes: int) -> None:
    block = bytearray(b"x") * num_bytes
    time.sleep(0.3)  # many readings, even on a busy machine
    del block


def test_peak_sees_what_was_freed_again() -> None:
    meter = Meter("cpu")
    before = resident()
    with meter.phase("large"):
        make_and_free(200 * MB)
    after = resident()
    with meter.phase("small"):
        pass
    peak = meter.phases["large"].peak_bytes
    assert peak - before > 190 * MB
    assert peak - after > 150 * MB, "it was given back: only a reading in between can have seen it"
    assert peak - meter.phases["small"].peak_bytes > 150 * MB, "each phase has a peak of its own"


def test_seconds() -> None:
    meter = Meter("cpu")
    start = time.perf_counter()
    with meter.phase("sleep"):
        time.sleep(0.1)
    assert 0.1 <= meter.phases["sleep"].seconds <= time.perf_counter() - start


def test_peak_inside_a_phase() -> None:
    meter = Meter("cpu")
    assert meter.peak_bytes() == 0
    with meter.phase("train"):
        first = meter.peak_bytes()
        make_and_free(100 * MB)
        second = meter.peak_bytes()
    assert first > 0
    assert second - first > 50 * MB
    assert meter.phases["train"].peak_bytes >= second
    assert meter.peak_bytes() == 0


def test_phases_keep_their_order() -> None:
    meter = Meter("cpu")
    for name in ("load", "train", "save"):
        with meter.phase(name):
            pass
    found = meter.to_json()
    assert found["kind"] == "resident"
    assert list(found["phases"]) == ["load", "train", "save"]
    assert found["phases"]["train"] == {
        "seconds": meter.phases["train"].seconds,
        "peak_bytes": meter.phases["train"].peak_bytes,
        "process_bytes": None,
    }


def test_exception_inside_still_records() -> None:
    meter = Meter("cpu")
    with pytest.raises(KeyError, match="mine"), meter.phase("fails"):
        raise KeyError("mine")
    use = meter.phases["fails"]
    assert isinstance(use, PhaseUse)
    assert use.peak_bytes > 0
    with meter.phase("next"):
        pass
    assert list(meter.phases) == ["fails", "next"]


def test_phases_do_not_nest() -> None:
    meter = Meter("cpu")
    with pytest.raises(AssertionError, match="do not nest"), meter.phase("outer"), meter.phase("inner"):
        pytest.fail("the inner phase began")
    assert list(meter.phases) == ["outer"]


def test_bytes_at_this_moment() -> None:
    before = Meter("cpu").now()
    block = bytearray(b"x") * (100 * MB)
    now = Meter("cpu").now()
    assert before["rss_bytes"] is not None and now["rss_bytes"] is not None
    assert now["rss_bytes"] - before["rss_bytes"] > 90 * MB
    assert now["allocated_bytes"] is None, "there is no GPU"
    del block


class NVMLError(Exception):
    """As pynvml's."""


def driver(processes: list[tuple[int, int | None]], *, fails: bool = False) -> Any:
    """What nvidia-ml-py looks like from here; no hardware has been asked."""

    def handle(uuid: bytes) -> str:
        if fails:
            raise NVMLError("not found")
        return {b"GPU-1234": "card"}[uuid]

    running = [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetComputeRunningProcesses=lambda card: {"card": running}[card],
        nvmlDeviceGetHandleByIndex=lambda index: handle(b"GPU-1234") if index == 0 else None,
        nvmlDeviceGetMemoryInfo=lambda card: {"card": SimpleNamespace(total=24 * 1024**3)}[card],
    )


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (driver([(1, 5), (os.getpid(), 700 * MB)]), 700 * MB),
        (driver([(os.getpid(), None)]), None),
        (driver([(1, 5)]), None),
        (driver([(os.getpid(), 5)], fails=True), None),
        (None, None),
    ],
    ids=["ours", "Windows", "a container", "no such card", "not installed"],
)
def test_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, module: Any, expected: int | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert process_bytes("1234") == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [(driver([]), 24 * 1024**3), (driver([], fails=True), None), (None, None)],
    ids=["a card", "none", "not installed"],
)
def test_how_large_the_card_is(monkeypatch: pytest.MonkeyPatch, module: Any, expected: int | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert card_bytes() == expected


def test_no_thread_stays() -> None:
    meter = Meter("cpu")
    with meter.phase("one"):
        assert "meter" in [thread.name for thread in threading.enumerate()]
    assert "meter" not in [thread.name for thread in threading.enumerate()]
