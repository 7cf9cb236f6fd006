"""Repeated and shared rows by hash are those by comparison."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_phi3.data.read import Conversation, Message
from qlora_phi3.data.repeats import Fingerprints, FingerprintsBuilder

WORDS = st.sampled_from(["", "a", "A ", " a  b", "a b", "1 a", "é", "\ud800"])
MESSAGES = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), WORDS), max_size=3).map(tuple)
TALKS = st.lists(MESSAGES, max_size=8)


def talks(rows: list[tuple[Message, ...]], file: str) -> list[Conversation]:
    return [Conversation(row, f"{file}:{number}") for number, row in enumerate(rows, start=1)]


def prints(rows: list[Conversation]) -> Fingerprints:
    builder = FingerprintsBuilder()
    for row in rows:
        builder.add(row)
    return builder.finish()


def asked(row: Conversation) -> tuple[str, ...]:
    return tuple(" ".join(m.content.casefold().split()) for m in row.messages if m.role == "user")


@settings(max_examples=300, deadline=None, database=None)
@given(train=TALKS, held_out=TALKS)
def test_hashes_find_what_a_comparison_finds(
    train: list[tuple[Message, ...]], held_out: list[tuple[Message, ...]]
) -> None:
    rows, others = talks(train, "t"), talks(held_out, "e")
    first: dict[object, str] = {}
    earlier = [(row.place, first.setdefault(row.messages, row.place)) for row in rows]
    assert list(prints(rows).repeated()) == [f"{a} (as {b})" for a, b in earlier if a != b]
    asks: dict[object, str] = {}
    for row in rows:
        asks.setdefault(asked(row), row.place)
    expected = [f"{row.place} (as {asks[asked(row)]})" for row in others if asked(row) in asks]
    assert list(prints(others).shared(prints(rows))) == expected


def test_a_row_that_stands_twice_at_one_place_is_not_repeated() -> None:
    row = Conversation((Message("user", "a"),), "t:1")
    assert list(prints([row, row]).repeated()) == []
