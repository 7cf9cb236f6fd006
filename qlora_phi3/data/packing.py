"""Which rows share a packed row, so that little of it is padding.

Owns the plan alone: lengths in, groups of row numbers out. How packed rows keep apart is the trainer's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: Sequence[int] | NDArray[Any], capacity: int) -> list[list[int]]:
    """Bins of row numbers, each of at most `capacity` tokens: best-fit decreasing.

    The longest rows come first, each into the fullest bin that still has room for it: never more than 11/9
    of the fewest bins possible, and one. A row longer than `capacity` gets a bin of its own. Bins stand in
    the order of their first row, and rows ascend inside a bin: the same lengths give the same plan.

    Units: `lengths` and `capacity` in tokens.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> the bins that have as many
    rooms: list[int] = []  # its keys in order; far fewer than bins, so that to insert one is cheap
    for row in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[row])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            bins.append([row])
            _put(len(bins) - 1, capacity - size, by_room, rooms)
            continue
        room = rooms[at]
        chosen = by_room[room].pop()
        if not by_room[room]:
            del by_room[room], rooms[at]
        bins[chosen].append(row)
        _put(chosen, room - size, by_room, rooms)
    for found in bins:
        found.sort()
    return sorted(bins)


def _put(number: int, room: int, by_room: dict[int, list[int]], rooms: list[int]) -> None:
    """Note that this bin has so much room, or none for any row."""
    if room <= 0:
        return
    if room not in by_room:
        by_room[room] = []
        insort(rooms, room)
    by_room[room].append(number)
