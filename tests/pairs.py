"""Grids in which every value and every pair of values is tested at once; the other cases are marked `grid`.

Faults that two settings make together are found by pairs; those that need three are left to the full grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def cover(cases: Sequence[Sequence[object]]) -> set[int]:
    """The places of a few cases that hold, between them, every pair of values that any of the cases holds."""
    held = [set(combinations(enumerate(map(repr, case)), 2)) for case in cases]
    missing, chosen = set().union(*held), set()
    while missing:
        best = max(range(len(cases)), key=lambda place: len(held[place] & missing))
        chosen.add(best)
        missing -= held[best]
    return chosen


def thinned(cases: Sequence[Any], values: Callable[..., Sequence[object]]) -> list[Any]:
    """The same `pytest.param`s, marked but for a cover; `values` makes one value an axis of a case's."""
    chosen = cover([values(*case.values) for case in cases])
    return [
        case
        if place in chosen
        else pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.grid])
        for place, case in enumerate(cases)
    ]


def every_pair(
    names: str, *axes: Sequence[Any], allowed: Callable[..., bool] = lambda *_: True
) -> pytest.MarkDecorator:
    """Parametrizes over the product of the axes, thinned, without the combinations that are not allowed."""
    cases = [pytest.param(*values) for values in product(*axes) if allowed(*values)]
    return pytest.mark.parametrize(names, thinned(cases, lambda *values: values))
