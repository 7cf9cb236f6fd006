"""A finding as terminal and report say it: its grade once, its place whole, no folder of the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_phi3.findings import Finding, Grade, graded, without_folders

NAMES = st.text("ab .()-_é#:,[]'", min_size=1, max_size=9).filter(
    lambda name: name.strip(". ") and ": " not in name and not name.endswith(":")
)
WHERE = st.sampled_from([":151", ": row 7", ":3: messages[0]", ":4: '</s>'", ": row 2: user after user", ""])


@pytest.mark.parametrize("grade", ["error", "warning", "note"])
@pytest.mark.parametrize("more", [0, 7])
def test_the_grade_stands_once_and_the_place_is_whole(grade: Grade, more: int) -> None:
    finding = Finding(
        grade, "x", "It repeats.", ("/home/me/my data (2)/train.jsonl:151",), "Remove it.", more
    )
    rest = " and 7 more" if more else ""
    assert str(finding) == f"{grade}: It repeats. (/home/me/my data (2)/train.jsonl:151{rest}) Remove it."
    shown = f"It repeats. (train.jsonl:151{rest}) Remove it."
    assert finding.note == (shown if grade == "note" else f"{grade}: {shown}")
    assert graded(finding.note) == f"{grade}: {shown}"


def test_without_places_or_a_remedy() -> None:
    assert Finding("warning", "x", "It is odd.", (), "").note == "warning: It is odd."
    assert graded("only 4 held-out rows") == "note: only 4 held-out rows"


@given(st.lists(NAMES, min_size=1, max_size=4), NAMES, WHERE, st.sampled_from(["/", "C:\\", "\\\\host\\"]))
def test_folders_go_whatever_they_are_called(folders: list[str], name: str, where: str, root: str) -> None:
    slash = "/" if root == "/" else "\\"
    place = root + slash.join([*folders, f"{name}.jsonl"]) + where
    assert without_folders(place) == f"{name}.jsonl{where}"
    first = f"{place.removesuffix(where)}:12"
    if where in (":151", ": row 7"):
        assert without_folders(f"{place} (as {first})") == f"{name}.jsonl{where} (as {name}.jsonl:12)"


@pytest.mark.parametrize(
    "place", ["org/name[train]: row 3", "data.train", "data.eval.fraction: 0.1", "torch 2.1", "chats.jsonl:3"]
)
def test_other_places_stay(place: str) -> None:
    assert without_folders(place) == place
