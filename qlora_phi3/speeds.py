"""Tokens a second of trainings on this computer, kept in `speeds.jsonl` of the package's cache folder.

Owns which of them say something about a recipe. Nothing is predicted from them. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from . import builtin, files, json_files
from .files import read_bytes
from .recipe import Recipe

MAX_BYTES: Final = 2**20
"""Of the file, some 2,500 trainings: beyond it the older half goes."""

SHOWN: Final = 3

LEAST_STEPS: Final = 5
"""Of a training worth a note: the first steps are slower."""


@dataclass(frozen=True)
class Speed:
    """What one training did, and how. Units: `tokens_per_second` without pads; `row_tokens` as a mean."""

    tokens_per_second: float
    machine: str
    finished_utc: str
    row_tokens: int
    base: str
    quantization: str
    compute_dtype: str
    method: str
    engine: str
    activations: str
    kept_layers: int | str
    micro_batch: int | str

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        machine: Mapping[str, Any],
        tokens_per_second: float,
        row_tokens: int,
        finished_utc: str,
    ) -> Speed:
        """`recipe` as it was settled, `machine` as report.machine says it."""
        where = str(machine.get("gpu") or f"CPU, {machine['cpu_cores']} cores")
        return cls(tokens_per_second, where, finished_utc, row_tokens, **_keys(recipe))

    @property
    def words(self) -> str:
        """For people.

        "215 tokens/s: native engine, keep, micro batch 8, rows of 105 tokens; CPU, 2 cores, 2026-01-02"
        """
        kept = self.kept_layers if self.activations != "keep" else 0
        but = f" but {kept} layers" if kept else ""
        way = f"{self.engine} engine, {self.activations}{but}, micro batch {self.micro_batch}"
        rows = f"rows of {self.row_tokens} tokens"
        day = self.finished_utc[:10]
        return f"{self.tokens_per_second:,.0f} tokens/s: {way}, {rows}; {self.machine}, {day}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def note(speed: Speed) -> None:
    """Add a training.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        lines = read_bytes(path).decode("utf-8", "replace").splitlines(keepends=True)
        files.write_text(path, "".join(lines[len(lines) // 2 :]))
    with open(path, "a", encoding="utf-8", opener=_itself) as file:
        file.write(json.dumps(speed.to_json()) + "\n")  # one write: runs side by side do not mix their lines


def _itself(name: str, flags: int) -> int:
    """Opened without following a link to a file of somebody's, or waiting for who reads a pipe."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def alike(recipe: Recipe) -> list[Speed]:
    """The newest training of each way to train so, the fastest first; SHOWN of them.

    The base, its precision, the method and the way are the recipe's, but for keys that it leaves to `auto`.
    """
    asked = _keys(recipe)
    newest: dict[tuple[Any, ...], Speed] = {}
    for speed in _all():
        known = asdict(speed)
        if all(value in ("auto", known[key]) for key, value in asked.items()):
            newest[(speed.machine, *(known[key] for key in asked))] = speed
    return sorted(newest.values(), key=lambda speed: speed.tokens_per_second, reverse=True)[:SHOWN]


def _keys(recipe: Recipe) -> dict[str, Any]:
    """What decides how fast a training is, but for its rows."""
    model, train = recipe.model, recipe.train
    return {
        "base": model.base,
        "quantization": model.quantization,
        "compute_dtype": model.compute_dtype,
        "method": recipe.adapter.method,
        "engine": train.engine,
        "activations": train.activations,
        "kept_layers": train.kept_layers,
        "micro_batch": train.micro_batch,
    }


def _path() -> Path:
    return builtin.cache_root() / "speeds.jsonl"


def _all() -> list[Speed]:
    """Those that can be read, the oldest first; lines of another version say nothing."""
    try:
        lines = read_bytes(_path(), 2 * MAX_BYTES).decode("utf-8", "replace").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        try:
            speed = Speed(**json_files.parse(line))
            _ = speed.words
        except (ValueError, TypeError):
            continue
        found.append(speed)
    return found
