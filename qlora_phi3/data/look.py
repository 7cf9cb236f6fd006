"""A look at the rows of local files before a run: what it would refuse of them, told within seconds.

Owns how many rows are looked at. Needs no tokenizer: what only tokens tell is the doctor's. Data sets on the
hub stay unread, and so do large files that can only be read whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any, Final

from ..errors import DataError, Problem, printable
from ..recipe import Data, Evaluate, Fraction, Source, Train
from .read import MAX_PROBLEMS, check_source, name_of, stream_training, useful

MAX_ROWS: Final = 20_000
"""Rows of a source that are looked at."""
MAX_SECONDS: Final = 2.0
"""Of the processor, for all sources."""
MAX_WHOLE_BYTES: Final = 64 * 2**20
"""Of a file that has to be read whole for its first row: a list in JSON, or a text."""
_WHOLE: Final = (".json", ".txt")
_HUB: Final = "on the hub"


@dataclass(frozen=True)
class Look:
    """What was looked at of a source of data.`use`; `whole`: all its rows. `why`: it was not read."""

    use: str
    path: str
    num_rows: int = 0
    whole: bool = False
    why: str = ""

    def __str__(self) -> str:
        name = printable(f"data.{self.use}: {self.path if self.why.endswith(_HUB) else Path(self.path).name}")
        if self.why:
            return f"{name}: not read, {self.why}"
        rows = f"{self.num_rows:,} row{'' if self.num_rows == 1 else 's'}"
        return f"{name}: {'all' if self.whole else 'only the first'} {rows} looked at"

    def to_json(self) -> dict[str, Any]:
        return {"used_for": self.use, "path": self.path, "rows": self.num_rows, "all": self.whole}


def look(data: Data, train: Train, evaluate: Evaluate) -> list[Look]:
    """Read the rows of local files, within bounds.

    Raises:
        DataError: rows that a run would refuse for what they are in their file.
    """
    problems: list[Problem] = []
    found: list[Look] = []
    until = process_time() + MAX_SECONDS
    for use, sources, name in (
        ("train", data.train_sources, name_of(data.train)),
        ("eval", data.eval_sources, name_of(data.eval_sources)),
    ):
        told = _Told([])
        found += [_look(source, use, data, train, evaluate, told, until) for source in sources]
        problems += told.shortened(name)
    if not problems and all(one.whole for one in found):
        problems += _of_all(data, train, evaluate)
    if problems:
        raise DataError.of(problems)
    return found


def lines(looked: list[Look]) -> str:
    """What a dry run says of the rows."""
    rest = "what only tokens tell is the doctor's: `doctor NAME` reads the rows as a run does"
    return "\n".join([*map(str, looked), rest])


@dataclass
class _Told:
    first: list[Problem]
    more: int = 0

    def add(self, problem: Problem) -> None:
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(problem)
        else:
            self.more += 1

    def shortened(self, name: str) -> list[Problem]:
        rest = [Problem(name, f"and {self.more} more rows with problems.")] if self.more else []
        return [*self.first, *rest]


def _look(
    source: Source, use: str, data: Data, train: Train, evaluate: Evaluate, told: _Told, until: float
) -> Look:
    if source.is_hub:
        return Look(use, source.path, why=f"it is {_HUB}")
    if any(_large(path) for path in check_source(source)):
        return Look(use, source.path, why="it is large, and would have to be read whole")
    number = 0
    for row in useful(source, data, train, evaluate, use):
        if number == MAX_ROWS:
            return Look(use, source.path, number)
        number += 1
        if isinstance(row, Problem):
            told.add(row)
        if number % 16 == 1 and process_time() > until:
            return Look(use, source.path, number)
    return Look(use, source.path, number, whole=True)


def _large(path: Path) -> bool:
    return path.suffix.lower() in _WHOLE and path.stat().st_size > MAX_WHOLE_BYTES


def _of_all(data: Data, train: Train, evaluate: Evaluate) -> Iterator[Problem]:
    """What only all rows together tell: a weight or a share that takes none of them."""
    drawn = isinstance(data.eval, Fraction) or any(source.weight != 1 for source in data.train_sources)
    if drawn:
        rows = stream_training(data, train, evaluate)
        yield from (row for _, row in rows if isinstance(row, Problem))
