"""Longest row that can be trained on cards of several sizes: predicted, and on a GPU measured.

`--device cpu` asks the memory prediction for a CUDA card. `--device cuda` tries lengths, each in a fresh
process whose allocator gets a smaller card's share before it allocates anything: that proves fit, not speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from qlora_phi3 import memory, phi3
from qlora_phi3.weights import known_geometry

from . import random_base, results
from .context_probe import GIB, METHODS, probe, recipe_of

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
MINI: Final = "microsoft/Phi-3-mini-128k-instruct"
MADE: Final = "microsoft/Phi-3-mini-4k-instruct"
"""What phi3-mini means here, and whose random weights are made: of the same sizes, for shorter rows."""

STEP: Final = 128
"""Lengths are multiples of so many tokens."""

_CHECKOUT = Path(__file__).parent.parent

Row = dict[str, Any]


def options(parser: argparse.ArgumentParser) -> None:
    cards = "GiB of the cards, as in 8,24"
    parser.add_argument("--vram", type=_cards, default=(6, 8, 12, 16, 24), help=cards)
    parser.add_argument("--model", default="phi3-mini", help="phi3-mini, builtin, or a checkpoint's folder")
    known = f"some of {','.join(METHODS)}; default all"
    parser.add_argument("--methods", type=_methods, default=tuple(METHODS), help=known)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu: predict; cuda: measure"
    )
    close = "measured: stop where the answer is known to this share of itself"
    parser.add_argument("--tolerance", type=float, default=0.01, help=close)
    parser.add_argument("--minutes", type=float, help="measured: stop after so many")
    kept = "measured: where phi3-mini's random weights are kept, or found"
    parser.add_argument("--random-base", type=Path, metavar="FOLDER", help=kept)
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)


def run(chosen: argparse.Namespace) -> int:
    if chosen.probe:
        print(json.dumps(probe(chosen.base, chosen.methods[0], chosen.probe, chosen.vram[0], chosen.device)))
        return 0
    if chosen.device == "cuda" and not _has_cuda():
        print("No CUDA device here: --device cpu predicts it.", file=sys.stderr)
        return 2
    for row in predicted(chosen) if chosen.device == "cpu" else measured(chosen):
        print(json.dumps(row), flush=True)
        results.append("context", row, LIBRARIES)
    return 0


@dataclass
class Search:
    """Binary search for the largest number from 1 to `most` that fits; what is larger takes more.

    It begins at `guess`, goes from there in growing steps until it has a bound on both sides, then halves.
    """

    fits: Callable[[int], bool]
    most: int
    tolerance: float = 0.0
    goes_on: Callable[[], bool] = lambda: True
    low: int = 0
    """Largest that is known to fit; 0: none."""
    high: int = field(init=False)
    """Smallest that is known not to fit; `most` + 1: none."""

    def __post_init__(self) -> None:
        self.high = self.most + 1

    def run(self, guess: int) -> None:
        at, stride = min(max(guess, 1), self.most), max(guess // 16, 1)
        while self.high - self.low > max(1, int(self.tolerance * self.low)) and self.goes_on():
            if self.fits(at):
                self.low = at
            else:
                self.high = at
            at, stride = self._next(stride), 2 * stride

    def _next(self, stride: int) -> int:
        if self.high > self.most:
            return min(self.low + stride, self.most)
        if self.low == 0:
            return max(self.high - stride, 1)
        return (self.low + self.high) // 2


# --- predicted


def predicted(chosen: argparse.Namespace) -> Iterator[Row]:
    """A row for each method and card."""
    base, _ = _base_name(chosen.model)
    for method in chosen.methods:
        for gib in chosen.vram:
            search = _predict(base, method, gib)
            yield _row(chosen, method, gib, "predicted") | _answer(search)


def _predict(base: str, method: str, gib: int) -> Search:
    geometry = _geometry(base)

    def fits(steps: int) -> bool:
        recipe = recipe_of(base, method, steps * STEP)
        return memory.predict(recipe, geometry, micro_batch=1).needed_bytes <= gib * GIB

    search = Search(fits, geometry.max_positions // STEP)
    search.run(search.most)
    return search


def _geometry(base: str) -> phi3.Geometry:
    found = known_geometry(recipe_of(base, "qlora", STEP).model)
    if found is None:
        raise SystemExit(f"{base} has no sizes that are known here.")
    return found


def _row(chosen: argparse.Namespace, method: str, gib: int, how: str) -> Row:
    base, weights = _base_name(chosen.model)
    train = recipe_of(base, method, STEP).train
    return {
        "method": method,
        "model": Path(chosen.model).name,
        "weights": weights,
        "device": "cuda",
        "how": how,
        "vram_gib": gib,
        "rank": 16,
        "optimizer": train.optimizer,
        "activations": train.activations,
        "micro_batch": 1,
        "limit": _geometry(base).max_positions,
        "error": None,
    }


def _answer(search: Search) -> Row:
    """Units: tokens. `max_length` null: not even the shortest fits; `too_long` null: the limit fits."""
    too_long = search.high * STEP if search.high <= search.most else None
    return {"max_length": search.low * STEP or None, "too_long": too_long}


def _base_name(name: str) -> tuple[str, str]:
    """`model.base`, and whether its weights are pretrained or random."""
    if name == "phi3-mini":
        return MINI, "random"
    return (random_base.BUILTIN if name == "builtin" else str(Path(name).absolute())), "pretrained"


# --- measured


class ProbeError(Exception):
    """A try that failed for another reason than memory."""


def measured(chosen: argparse.Namespace) -> Iterator[Row]:
    """A row for each method and card, the methods by turns; without time left none for the rest."""
    deadline = time.monotonic() + 60 * chosen.minutes if chosen.minutes else float("inf")
    with _made_base(chosen) as (base, environment):
        for gib in chosen.vram:
            for method in chosen.methods:
                if time.monotonic() >= deadline:
                    return

                def attempt(length: int, method: str = method, gib: int = gib) -> Row:
                    return _in_a_process(base, method, length, gib, environment, deadline)

                row = _row(chosen, method, gib, "measured")
                yield row | measure(
                    attempt, _predict(_base_name(chosen.model)[0], method, gib), deadline, chosen.tolerance
                )


def measure(attempt: Callable[[int], Row], prediction: Search, deadline: float, tolerance: float) -> Row:
    """Search with real tries of a length in tokens; all of them are kept.

    `stopped`: time was over first, and the answer lies between `max_length` and `too_long`.
    """
    tries: list[Row] = []

    def fits(steps: int) -> bool:
        tries.append({"length": steps * STEP} | attempt(steps * STEP))
        return bool(tries[-1]["fits"])

    search = Search(fits, prediction.most, tolerance, lambda: time.monotonic() < deadline)
    error, stopped = None, False
    try:
        search.run(prediction.low)
        stopped = time.monotonic() >= deadline
    except subprocess.TimeoutExpired:
        stopped = True
    except ProbeError as failed:
        error = str(failed)
    found = {"predicted_max_length": prediction.low * STEP or None, "tries": tries}
    return found | _answer(search) | {"stopped": stopped, "error": error}


@contextmanager
def _made_base(chosen: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """The checkpoint, and an environment in which its quantized weights are kept from try to try."""
    from .data import _empty

    with tempfile.TemporaryDirectory(prefix="bench-context-") as name:
        folder, base = Path(name), _base_name(chosen.model)[0]
        if chosen.model == "phi3-mini":
            made = chosen.random_base or folder / "made"
            if not (made / "config.json").is_file():
                random_base.write(made, MADE)
            base = str(lengthened(made, folder / "base", phi3.VARIANTS[MINI].max_positions))
        yield base, os.environ | {"QLORA_PHI3_CACHE": _empty(folder / "cache", base)}


def lengthened(made: Path, folder: Path, positions: int) -> Path:
    """The checkpoint `made` for rows of so many tokens: another config.json beside links to its files."""
    folder.mkdir()
    for file in made.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.absolute())
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), positions)
    config["sliding_window"] = phi3.VARIANTS[MINI].sliding_window
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _in_a_process(
    base: str, method: str, length: int, gib: int, environment: dict[str, str], deadline: float
) -> Row:
    """What a try gives.

    Raises:
        ProbeError: it ended without an answer -> the last line it said.
        TimeoutExpired: time is over.
    """
    line = [sys.executable, "-m", "bench", "context", f"--probe={length}", "--device=cuda"]
    line += [f"--base={base}", f"--methods={method}", f"--vram={gib}"]
    left = None if deadline == float("inf") else max(1.0, deadline - time.monotonic())
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=environment, cwd=_CHECKOUT, timeout=left
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        raise ProbeError(said[-1].replace(base, "BASE"))
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _cards(text: str) -> tuple[int, ...]:
    return tuple(int(gib) for gib in text.split(","))


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METHODS)}")
    return names
