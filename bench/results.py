"""Where results go, and what stands in each of them: commit, versions, hardware."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def machine() -> str:
    """A name for this hardware: processor and number of cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8"))
        model = found[1] if found else model
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{model} {os.cpu_count()} cores").strip("-").lower()


def commit() -> str:
    """Of this checkout; with a + where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def ask(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=False).stdout.strip()

    return (ask("rev-parse", "--short=12", "HEAD") or "unknown") + "+" * bool(
        ask("diff", "HEAD", "--name-only")
    )


def read(case: str) -> list[dict[str, Any]]:
    """Rows of the case on this machine, oldest first."""
    return read_file(FOLDER / machine() / f"{case}.jsonl")


def read_file(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def append(case: str, row: dict[str, Any], libraries: tuple[str, ...]) -> Path:
    """Add `row` to the case's file of this machine."""
    about = {
        "case": case,
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
    }
    path = FOLDER / machine() / f"{case}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(about | row) + "\n")
    return path
