"""Repeated and shared rows by hash are those by comparison."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_phi3.data.repeats import Fingerprints, FingerprintsBuilder
from qlora_phi3.data.rows import Conversation, Message, Row, Text

WORDS = st.sampled_from(["", "a", "A ", " a  b", "a b", "1 a", "é", "\ud800"])
MORE = st.sampled_from(["", "", "", '{"name": "f", "id": 1}', '{"id": 1, "name": "f"}'])
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), WORDS, MORE), max_size=3).map(
    tuple
)
TOOLS = st.sampled_from(["", "", "", "[{}]", "[ {} ]"])
"""Text of the same JSON in two ways: keys in another order, or blanks, make no other row."""
ROWS = st.lists(
    st.one_of(
        st.builds(Conversation, MESSAGES, st.just(""), TOOLS),
        st.builds(Text, WORDS.filter(bool), st.just("")),
    ),
    max_size=8,
)


def placed(rows: list[Row], file: str) -> list[Row]:
    return [replace(row, place=f"{file}:{number}") for number, row in enumerate(rows, start=1)]


def prints(rows: list[Row]) -> Fingerprints:
    builder = FingerprintsBuilder()
    for row in rows:
        builder.add(row)
    return builder.finish()


def asked(row: Row) -> tuple[str, ...]:
    if isinstance(row, Text):
        return (" ".join(row.text.casefold().split()),)
    return tuple(" ".join(m.content.casefold().split()) for m in row.messages if m.role == "user")


@settings(max_examples=300, deadline=None, database=None)
@given(train=ROWS, held_out=ROWS)
def test_hashes_find_what_a_comparison_finds(train: list[Row], held_out: list[Row]) -> None:
    rows, others = placed(train, "t"), placed(held_out, "e")
    first: dict[object, str] = {}
    earlier = [(row.place, first.setdefault(row.canonical, row.place)) for row in rows]
    assert list(prints(rows).repeated()) == [f"{a} (as {b})" for a, b in earlier if a != b]
    asks: dict[object, str] = {}
    for row in rows:
        asks.setdefault(asked(row), row.place)
    expected = [f"{row.place} (as {asks[asked(row)]})" for row in others if asked(row) in asks]
    assert list(prints(others).shared(prints(rows))) == expected


def test_a_row_that_stands_twice_at_one_place_is_not_repeated() -> None:
    row = Conversation((Message("user", "a"),), "t:1")
    assert list(prints([row, row]).repeated()) == []
