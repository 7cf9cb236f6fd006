"""The checks themselves: what they must find is found."""

from __future__ import annotations

import pytest
from attempts import check_told
from warm import Ended

TRACEBACK = 'Traceback (most recent call last):\n  File "x"\nKeyError: 1\n'


@pytest.mark.parametrize(
    "ended",
    [
        Ended(1, "", TRACEBACK),
        Ended(1, "", "tiny: a fault of this program, not of your files: KeyError: 1 (a.py, line 3).\n"),
        Ended(0, "\x1b[31mred", ""),
        Ended(2, "", "a\u202eb: is wrong.\n"),
        Ended(2, "", ""),
        Ended(2, "", "wrong\n"),
        Ended(139, "", "a: b\n"),
        Ended(2, "", f"a: {'x' * 6000}\n"),
    ],
    ids=["traceback", "fault", "escape", "order", "silent", "no place", "crash", "endless"],
)
def test_what_a_stranger_must_not_see_is_found(ended: Ended) -> None:
    with pytest.raises(AssertionError):
        check_told(ended)


def test_a_refusal_that_says_where_and_why_passes() -> None:
    check_told(Ended(2, "", "rows.jsonl:3: has no format that is known. See docs/data.md.\n"))
