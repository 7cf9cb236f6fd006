"""Packing loses no row, fills no bin too far, and comes near the fewest bins there can be."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_phi3.data.packing import best_fit


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([], []),
        ([10], [[0]]),
        ([11], [[0]]),
        ([5, 5, 5], [[0, 1], [2]]),
        ([2, 7, 3, 8], [[0, 3], [1, 2]]),
        ([3, 11, 7, 10], [[0, 2], [1], [3]]),
        ([6, 5, 4, 5], [[0, 2], [1, 3]]),
        ([5, 6, 4], [[0], [1, 2]]),  # the fuller bin of the two that have room
    ],
)
def test_bins_by_hand(lengths: list[int], bins: list[list[int]]) -> None:
    assert best_fit(lengths, 10) == bins


@settings(max_examples=300, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 60)), capacity=st.integers(1, 50))
def test_every_row_has_one_place_and_no_bin_overflows(lengths: list[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(row for found in bins for row in found) == list(range(len(lengths)))
    assert all(found == sorted(found) for found in bins)
    assert [found[0] for found in bins] == sorted(found[0] for found in bins)
    for found in bins:
        assert len(found) == 1 or sum(lengths[row] for row in found) <= capacity
    assert best_fit(tuple(lengths), capacity) == bins


@settings(max_examples=300, deadline=None, database=None)
@given(
    cuts=st.lists(st.lists(st.integers(1, 99), max_size=6), min_size=1, max_size=20),
    seed=st.integers(0, 9),
)
def test_near_the_fewest_bins(cuts: list[list[int]], seed: int) -> None:
    """Bins full to the last token, cut into rows and shuffled: their number is the fewest possible."""
    lengths = []
    for cut in cuts:
        edges = sorted({0, 100, *cut})
        lengths += [stop - start for start, stop in pairwise(edges)]
    random.Random(seed).shuffle(lengths)
    assert len(best_fit(lengths, 100)) <= math.floor(11 / 9 * len(cuts) + 1)
