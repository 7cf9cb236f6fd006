"""Rows that are there twice, found by hashes: the texts of a million chats need not be kept for it.

Owns what makes two rows the same, or the same question. 16 bytes a hash: among a million rows the chance
that any two differing ones share theirs is below 1e-26.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import Row, Text
from .store import Places, PlacesBuilder


@dataclass(frozen=True)
class Fingerprints:
    """What every row of a split says and asks; a row that its weight repeats counts once.

    Shape: `whole`, `asked` (rows, 2) uint64.
    """

    whole: NDArray[np.uint64]
    asked: NDArray[np.uint64]
    places: Places

    def repeated(self) -> Iterator[str]:
        """Each row that an earlier one says too, and the first that does."""
        first = _first(self.whole)
        for row in np.flatnonzero(first != np.arange(len(first))).tolist():
            place, earlier = self.places[row], self.places[int(first[row])]
            if place != earlier:
                yield f"{place} (as {_from(place, earlier)})"

    def num_copied(self, train: Fingerprints) -> int:
        """Rows that are rows of `train`, answers included."""
        num = len(train.whole)
        return int((_first(np.concatenate([train.whole, self.whole]))[num:] < num).sum())

    def shared(self, train: Fingerprints) -> Iterator[str]:
        """Each row that asks what a row of `train` asks, and the first that does."""
        num = len(train.asked)
        first = _first(np.concatenate([train.asked, self.asked]))[num:]
        for row in np.flatnonzero(first < num).tolist():
            place = self.places[row]
            yield f"{place} (as {_from(place, train.places[int(first[row])])})"


class FingerprintsBuilder:
    """Takes rows one at a time."""

    def __init__(self) -> None:
        self._whole, self._asked, self._places = bytearray(), bytearray(), PlacesBuilder()

    def add(self, row: Row) -> None:
        self._whole += _hash(_said(row))
        asked = [row.text] if isinstance(row, Text) else [m.content for m in row.messages if m.role == "user"]
        self._asked += _hash([" ".join(content.casefold().split()) for content in asked])
        self._places.add(row.place)

    def finish(self) -> Fingerprints:
        whole, asked = (np.frombuffer(bytes(one), np.uint64) for one in (self._whole, self._asked))
        return Fingerprints(whole.reshape(-1, 2), asked.reshape(-1, 2), self._places.finish())


def _from(place: str, other: str) -> str:
    """`other` without the folder that it shares with `place`."""
    folder = place.rpartition("/")[0]
    return other.removeprefix(f"{folder}/") if folder else other


def _said(row: Row) -> list[str]:
    """Equal for two rows where their `canonical` is, which takes four times as long for plain messages."""
    if isinstance(row, Text) or row.has_tools:
        return [row.canonical]
    return [part for m in row.messages for part in (m.role if m.trained else f"{m.role} 0", m.content)]


def _hash(parts: list[str]) -> bytes:
    """Of the parts and where they end: each has its length in front."""
    text = "".join([f"{len(part)} {part}" for part in parts])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _first(hashes: NDArray[Any]) -> NDArray[np.int64]:
    """Index of the first row with the same hash, for every row."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows stay in their order
    ordered = hashes[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first
