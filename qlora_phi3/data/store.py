"""Rows of tokens in a few flat arrays: a million chats in 0.6 GB on disk instead of 10 GB of Python objects.

Owns how rows lie in memory and in a folder, and hands them out one at a time. Knows nothing of where they
come from.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError
from ..json_files import load
from ..memory import StepRows
from .tokens import Marked, TokenRow

SPILL: Final = 4 * 2**20
"""Tokens that a builder with a folder holds in memory, 16 MiB, before it writes them down."""

_IDS: Final = "ids.int32"
_ARRAYS: Final = "arrays.npz"
_PREFIXES: Final = "prefixes.json"


def _largest(numbers: NDArray[np.int64], num: int) -> tuple[int, ...]:
    return tuple(int(number) for number in np.sort(numbers)[::-1][:num])


@dataclass(frozen=True)
class Places(Sequence[str]):
    """Places of rows: `chats.jsonl:17` is a prefix that many rows share, and a number.

    Shape: `which` (rows,) int32, index into `prefixes`; `numbers` (rows,) int64, -1 for none.
    """

    prefixes: tuple[str, ...]
    which: NDArray[np.int32]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Places: ...
    def __getitem__(self, at: int | slice) -> str | Places:
        if isinstance(at, slice):
            return Places(self.prefixes, self.which[at], self.numbers[at])
        prefix, number = self.prefixes[self.which[at]], int(self.numbers[at])
        return prefix if number < 0 else f"{prefix}{number}"

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        return {f"{name}_which": self.which, f"{name}_numbers": self.numbers}


class PlacesBuilder:
    """Takes places one at a time."""

    def __init__(self) -> None:
        self._prefixes: dict[str, int] = {}
        self._which, self._numbers = array("i"), array("q")

    def add(self, place: str) -> None:
        prefix = place.rstrip("0123456789")
        digits = place[len(prefix) :]
        if not digits or len(digits) > 18 or (digits[0] == "0" and digits != "0"):
            prefix, digits = place, "-1"  # what would not be written the same way again
        self._which.append(self._prefixes.setdefault(prefix, len(self._prefixes)))
        self._numbers.append(int(digits))

    def finish(self) -> Places:
        return Places(tuple(self._prefixes), _int32(self._which), np.array(self._numbers, dtype=np.int64))


@dataclass(frozen=True)
class Rows(Sequence[TokenRow]):
    """Token rows, made when they are asked for; a slice shares the arrays.

    Shape: `ids` (tokens,) int32; `starts` (rows + 1,) int64, row i is ids[starts[i]:starts[i + 1]];
        `runs` (runs, 2) int32, [start, stop) inside the row of what is trained on; `run_starts` likewise.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    runs: NDArray[np.int32]
    run_starts: NDArray[np.int64]
    places: Places

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, at: int) -> TokenRow: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[TokenRow]: ...
    def __getitem__(self, at: int | slice) -> TokenRow | Sequence[TokenRow]:
        if isinstance(at, slice):
            return self._slice(at)
        number = range(len(self))[at]
        start, stop = self.starts[number : number + 2]
        runs = self.runs[self.run_starts[number] : self.run_starts[number + 1]].tolist()
        return Marked(self.ids[start:stop].tolist(), runs, self.places[number]).row()

    def _slice(self, at: slice) -> Sequence[TokenRow]:
        start, stop, step = at.indices(len(self))
        if step != 1:
            return [self[i] for i in range(start, stop, step)]
        stop = max(start, stop)
        bounds = slice(start, stop + 1)
        return Rows(
            self.ids, self.starts[bounds], self.runs, self.run_starts[bounds], self.places[start:stop]
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Shape: (rows,), tokens of each row."""
        return np.diff(self.starts)

    def fullest_step(self, num: int) -> StepRows | None:
        """The most that a step of so many rows can have; None without rows."""
        if not len(self):
            return None
        until = np.concatenate(([0], np.cumsum(self.runs[:, 1] - self.runs[:, 0], dtype=np.int64)))
        trained = until[self.run_starts[1:]] - until[self.run_starts[:-1]]
        return StepRows(_largest(self.lengths, num), _largest(trained, num))

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1] - self.starts[0])

    @property
    def num_supervised(self) -> int:
        runs = self.runs[self.run_starts[0] : self.run_starts[-1]]
        return int((runs[:, 1] - runs[:, 0]).sum())

    def save(self, folder: Path) -> None:
        """Write all but the ids, which a builder with a folder has written already."""
        arrays = self.places.arrays("place")
        arrays |= {"starts": self.starts, "runs": self.runs, "run_starts": self.run_starts}
        save_arrays(folder / _ARRAYS, arrays)
        (folder / _PREFIXES).write_text(json.dumps(self.places.prefixes), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Rows:
        """The rows that a builder and `save` left in `folder`; the ids stay on disk until they are read.

        Raises:
            OSError, ValueError, KeyError: a file is missing, or not what was written.
        """
        arrays = load_arrays(folder / _ARRAYS)
        prefixes = tuple(load(folder / _PREFIXES, None))
        places = Places(prefixes, arrays["place_which"], arrays["place_numbers"])
        ids = map_ids(folder)
        if len(ids) != arrays["starts"][-1]:
            raise ValueError("the tokens are not as many as the rows have")
        return cls(ids, arrays["starts"], arrays["runs"], arrays["run_starts"], places)


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # takes **arrays for its own options


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What `save_arrays` wrote.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: missing, or not what was written.
    """
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def map_ids(folder: Path) -> NDArray[np.int32]:
    """The ids in `folder`, mapped; numpy cannot map a file of no bytes."""
    path = folder / _IDS
    return np.memmap(path, np.int32, "r") if path.stat().st_size else np.zeros(0, np.int32)


class RowsBuilder:
    """Takes rows one at a time; with a `folder`, ids beyond SPILL go to a file in it."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._ids, self._lengths = array("i"), array("q")
        self._runs, self._num_runs = array("i"), array("q")
        self._places = PlacesBuilder()
        if folder is not None:
            (folder / _IDS).write_bytes(b"")

    def add(self, row: Marked) -> None:
        self._ids.extend(row.input_ids)
        self._lengths.append(len(row.input_ids))
        for run in row.trained:
            self._runs.extend(run)
        self._num_runs.append(len(row.trained))
        self._places.add(row.place)
        if len(self._ids) >= SPILL:
            self._spill()

    def finish(self) -> Rows:
        self._spill()
        return Rows(
            ids=map_ids(self._folder) if self._folder is not None else _int32(self._ids),
            starts=_starts(self._lengths),
            runs=_int32(self._runs).reshape(-1, 2),
            run_starts=_starts(self._num_runs),
            places=self._places.finish(),
        )

    def _spill(self) -> None:
        if self._folder is None:
            return
        try:
            with (self._folder / _IDS).open("ab") as file:
                self._ids.tofile(file)
        except OSError as error:
            remedy = "Make room, or set QLORA_PHI3_CACHE to a folder with more."
            raise OutputError(str(self._folder), f"cannot be written: {error.strerror}.", remedy) from None
        self._ids = array("i")


def _int32(values: array[int]) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def _starts(counts: array[int]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, dtype=np.int64))])
