"""How often each row is taken, which rows are held out, and which of many are looked at.

Owns weights, shares and draws. Weights and shares are told from a row's content and a seed alone: no row's
fate depends on another row, nor on its place, so rows that are added move none, and equal rows stay together.
"""

from __future__ import annotations

from hashlib import blake2b
from math import floor
from random import Random
from typing import Final, Generic, TypeVar

from .rows import Example

Item = TypeVar("Item")

_SCALE: Final = 2**64


def num_copies(row: Example, weight: float, seed: int) -> int:
    """How often an epoch takes a row of a source of this weight: its whole part, and once more by lot."""
    whole = floor(weight)
    part = weight - whole
    return whole + (part > 0 and _lot(row, "weight", seed) < part)


def is_held_out(row: Example, fraction: float, seed: int) -> bool:
    """Whether a row belongs to the held-out share."""
    return _lot(row, "held out", seed) < fraction


def _lot(row: Example, purpose: str, seed: int) -> float:
    """A number in [0, 1) that only content, purpose and seed decide."""
    key = seed.to_bytes(8, "little")
    digest = blake2b(row.canonical.encode(), digest_size=8, key=key, person=purpose.encode())
    return int.from_bytes(digest.digest(), "little") / _SCALE


def draw(num: int, limit: int, seed: int) -> list[int]:
    """Indices of `limit` out of `num`, in order; all of them where there are no more. More hold the fewer."""
    import numpy as np  # a dry run reads rows, and draws none

    lots = np.random.Philox(key=seed).random_raw(num)  # a bit generator's raw stream is the same for ever
    return sorted(np.argsort(lots, kind="stable")[:limit].tolist())


class Sampler(Generic[Item]):
    """An even draw of `size` items out of a stream of unknown length; all of them where there are no more.

    The draw is the same every time. Source: algorithm R, Vitter 1985.
    """

    def __init__(self, size: int) -> None:
        self._size, self._random = size, Random(0)
        self._num, self._kept = 0, list[tuple[int, Item]]()

    def add(self, item: Item) -> None:
        if self._num < self._size:
            self._kept.append((self._num, item))
        else:
            at = int(self._random.random() * (self._num + 1))
            if at < self._size:
                self._kept[at] = (self._num, item)
        self._num += 1

    def finish(self) -> list[Item]:
        """What was drawn, in the stream's order."""
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]
