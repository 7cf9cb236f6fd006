"""Loading an NF4 base: seconds and peak memory of the first load, which fills the cache, and of later ones.

Each load is a process of its own; the two kinds take turns. `random-phi3-mini` is a checkpoint of
Phi-3-mini's exact sizes with random weights, made once for the measurement and removed after it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from . import random_base, results

LIBRARIES = ("torch", "transformers", "bitsandbytes", "safetensors")
SAID: Final = {"first": ["keeping"], "later": ["reading"]}
"""Kind of load -> how what it says begins: it is what it is taken for."""
SAMPLE_SECONDS: Final = 0.01
RANDOM: Final = "random-phi3-mini"
BUILTIN: Final = random_base.BUILTIN
_CHECKOUT = Path(__file__).parent.parent


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin", help=f"builtin, {RANDOM}, or a checkpoint's folder")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of both loads")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each")
    parser.add_argument("--load", choices=SAID, help=argparse.SUPPRESS)


def run(chosen: argparse.Namespace) -> int:
    if chosen.load:
        print(json.dumps(load(chosen)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
        base = _base(chosen.model, Path(folder))
        for row in _rounds(chosen, base, Path(folder) / "cache"):
            print(json.dumps(row))
            results.append("startup", row, LIBRARIES)
    return 0


def _base(name: str, folder: Path) -> str:
    """What `model.base` is set to."""
    if name == RANDOM:
        return str(random_base.write(folder / "base", "microsoft/Phi-3-mini-4k-instruct"))
    return BUILTIN if name == "builtin" else str(Path(name).absolute())


def _rounds(chosen: argparse.Namespace, base: str, cache: Path) -> Iterator[dict[str, Any]]:
    """A row for each kind of load, with all of its loads."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in SAID}
    for _ in range(chosen.repeats):
        shutil.rmtree(cache, ignore_errors=True)
        for kind in SAID:
            found[kind].append(_in_a_process(kind, chosen, base, cache))
    first = statistics.median(one["load_seconds"] for one in found["first"])
    entry_bytes = sum(file.stat().st_size for file in (cache / "bases").rglob("*") if file.is_file())
    for kind, loads in found.items():
        median = statistics.median(one["load_seconds"] for one in loads)
        yield {
            "model": Path(chosen.model).name,
            "cold": chosen.cold,
            "entry_bytes": entry_bytes,
            "load": kind,
            "load_seconds": round(median, 3),
            "speed_against_first": round(first / median, 2),
            "peak_anonymous_bytes": max(one["peak_anonymous_bytes"] for one in loads),
            "loads": loads,
        }


def _in_a_process(kind: str, chosen: argparse.Namespace, base: str, cache: Path) -> dict[str, Any]:
    from .data import _empty

    line = [sys.executable, "-m", "bench", "startup", "--load", kind, "--model", base]
    line += ["--cold"] * chosen.cold
    environment = os.environ | {"QLORA_PHI3_CACHE": _empty(cache, base)}
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=_CHECKOUT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- one load, in a process of its own


def load(chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of `model.load`, with what a run has imported before it."""
    import bitsandbytes  # noqa: F401  # imports are no part of the load
    import torch
    from transformers.models.phi3 import modeling_phi3  # noqa: F401

    from qlora_phi3 import model, prequantized, weights
    from qlora_phi3.recipe import Model

    prequantized.MIN_BYTES = 0  # whether it gains anything for small bases is a question too
    settings = Model(base=chosen.model)
    checkpoint = weights.locate(settings)
    model.load_tokenizer(checkpoint.folder)
    if chosen.cold:
        _forget(checkpoint.folder)
        _forget(prequantized.root())
    said: list[str] = []
    before = _status_bytes("RssAnon")
    start = time.perf_counter()
    with _peak_anonymous() as peak:
        model.load(checkpoint, settings, torch.device("cpu"), say=said.append)
    seconds = time.perf_counter() - start
    assert [line.split()[0] for line in said] == SAID[chosen.load], said
    return {
        "load_seconds": round(seconds, 3),
        "anonymous_bytes_before": before,
        "anonymous_bytes_after": _status_bytes("RssAnon"),
        "peak_anonymous_bytes": max(peak),
        "peak_resident_bytes": _status_bytes("VmHWM"),
    }


def _forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _status_bytes(key: str) -> int:
    """A line of Linux's /proc/self/status; RssAnon leaves the mapped pages of files out."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@contextmanager
def _peak_anonymous() -> Iterator[list[int]]:
    """Private memory of this process by moments, until the end of the body."""
    found, done = [_status_bytes("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            found.append(_status_bytes("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(_status_bytes("RssAnon"))
