"""The quickstart as a user runs it: what it prints, what it reports, how long it takes.

README's block of output is the newest row of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from qlora_phi3.report import VERSIONED

from . import results, startup

_CHECKOUT = Path(__file__).parent.parent
WIDTH: Final = 80
"""Columns of the terminal it prints for."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, help="train.max_steps instead of the recipe's, to try it out")
    parser.add_argument("--recipe", default="quickstart", help="name or path, to try it out")


def run(chosen: argparse.Namespace) -> int:
    overrides = [] if chosen.steps is None else [f"train.max_steps={chosen.steps}"]
    row = {"recipe": Path(chosen.recipe).stem, "overrides": overrides, **measure(chosen.recipe, overrides)}
    print(json.dumps(row, ensure_ascii=False))
    results.append("quickstart", row, VERSIONED)
    return 0


def measure(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """One run from the command line. Units: seconds of the whole process."""
    with tempfile.TemporaryDirectory(prefix="bench-quickstart-") as folder:
        out = Path(folder) / "run"
        there = _built_in_is_there()
        line = [sys.executable, "-m", "qlora_phi3", "recipe", recipe, *overrides, "--out", str(out)]
        start = time.perf_counter()
        done = subprocess.run(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            check=False,
            cwd=_CHECKOUT,
            env=os.environ | {"COLUMNS": str(WIDTH), "PYTHONIOENCODING": "utf-8"},
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"the run ended with {done.returncode}:\n{done.stdout}")
        said = done.stdout.replace(str(out), "RUN").replace(f"{_CHECKOUT}/", "")
        return {
            "seconds": round(seconds, 1),
            "model_was_there": there,
            "lines": said.splitlines(),
            **_told(out),
        }


def _told(out: Path) -> dict[str, Any]:
    """What the run's files say: figures, and the first held-out message with both answers."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    answers = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    calibration = report["memory"]["calibration"]
    return {
        "training": report["training"],
        "metrics": report["metrics"],
        "eval_samples": report["data"]["eval_samples"],
        "phases": report["memory"]["measured"]["phases"],
        "calibration": {key: calibration[key] for key in ("predicted_bytes", "measured_bytes", "drift")},
        "samples": {
            name: _anywhere(found["samples"][0]) for name, found in answers.items() if found["samples"]
        },
    }


def _anywhere(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample whose place names the file alone: where the checkout stands is nobody's matter."""
    return sample | {"place": Path(sample["place"]).name}


def _built_in_is_there() -> bool:
    """Whether the model has to be fetched and converted first."""
    from qlora_phi3 import builtin

    name = startup.BUILTIN.removeprefix("builtin:")
    return (builtin.cache_root() / "builtin" / name).is_dir()
