"""How often each row is taken, and which rows are held out, told from a row's content and a seed alone.

Owns weights and shares. No row's fate depends on another row, nor on its place: rows that are added move
none, and equal rows stay together.
"""

from __future__ import annotations

from hashlib import blake2b
from math import floor
from typing import Final

from .rows import Example

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
