"""pairs.py: what it leaves out holds no pair of values that stays untested."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from pairs import every_pair


def pairs_of(cases: list[Any]) -> set[Any]:
    return {pair for case in cases for pair in combinations(enumerate(map(str, case.values)), 2)}


def test_a_cover_has_every_pair_that_is_allowed_in_few_cases() -> None:
    axes = [["a", "b", "c"], [1, 2, 3, 4], [{"x": 1}, {"x": 2}], [None, 0.1]]

    def allowed(*values: Any) -> bool:
        return values[:2] != ("a", 4)

    [_, cases] = every_pair("one, two, three, four", *axes, allowed=allowed).mark.args
    assert [case.values for case in cases] == [one for one in product(*axes) if allowed(*one)]
    fast = [case for case in cases if pytest.mark.grid not in case.marks]
    assert pairs_of(fast) == pairs_of(cases)
    assert len(cases) == 44 and 11 <= len(fast) <= 14
