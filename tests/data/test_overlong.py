"""What is left of rows longer than data.max_length: nothing is lost uncounted, and every answer ends."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import (
    ASSISTANT,
    END,
    EOS,
    MEDIUM,
    PHI3,
    SYSTEM,
    TOKENIZERS,
    USER,
    conversations,
    ids,
    talk,
    template_ids,
)

from qlora_phi3.data.overlong import Fitted, Fitter, exchanges
from qlora_phi3.data.read import Conversation
from qlora_phi3.data.tokens import IGNORE, LossOn, Marked, Turns, mark
from qlora_phi3.errors import DataError
from qlora_phi3.recipe import Data, Source


def fit(
    conversation: Conversation, limit: int, overlong: str, loss_on: str = "assistant", tokenizer: Any = PHI3
) -> Fitted:
    data = Data(train=Source(path="x"), max_length=limit, overlong=overlong, loss_on=loss_on)
    turns = Turns.of(tokenizer)
    return Fitter(data, tokenizer, turns).fit(
        conversation, mark(conversation, tokenizer, turns, data.loss_on)
    )


def counts(found: Fitted) -> dict[str, int]:
    named = {"dropped": found.num_dropped, "truncated": found.num_truncated, "split": found.num_split}
    return {"rows": len(found.rows)} | {name: count for name, count in named.items() if count}


def shown(row: Marked) -> list[int | str]:
    """Token ids of a row, its supervised ones as text `+id`."""
    labels = row.row().labels
    assert all(label in (token, IGNORE) for token, label in zip(row.input_ids, labels, strict=True))
    return [
        token if label == IGNORE else f"+{label}" for token, label in zip(row.input_ids, labels, strict=True)
    ]


def plus(*pieces: int | str) -> list[str]:
    return [f"+{token}" for token in ids(*pieces)]


# --- by hand: every letter is a token

SINGLE = talk("user: abc", "assistant: defg")  # USER a b c END ASSISTANT d e f g END EOS: 12 tokens
DOUBLE = talk("user: a", "assistant: b", "user: ccc", "assistant: dd")  # 6 + 1 + 3 + 2 + 3 + EOS: 16
ASKS = ids(USER, "abc", END, ASSISTANT)
BEFORE = ids(USER, "a", END, ASSISTANT)

TRUNCATED = [
    pytest.param(SINGLE, 12, "assistant", [*ASKS, *plus("defg", END), EOS], id="fits"),
    pytest.param(SINGLE, 11, "assistant", [*ASKS, *plus("defg", END)], id="only the eos is lost"),
    pytest.param(SINGLE, 10, "assistant", [*ASKS, *plus("def", END)], id="inside the answer"),
    pytest.param(SINGLE, 8, "assistant", [*ASKS, *plus("d", END)], id="one token and the end"),
    pytest.param(SINGLE, 10, "last", [*ASKS, *plus("def", END)], id="last"),
    pytest.param(SINGLE, 10, "all", [USER, *plus("abc", END, ASSISTANT, "def", END)], id="all"),
    pytest.param(talk("user: abcd", "assistant: efg"), 8, "assistant", None, id="only the end would fit"),
    pytest.param(talk("user: abcd", "assistant: efg"), 8, "all", None, id="all: only the end would fit"),
    pytest.param(talk("user: abcdefghij", "assistant: k"), 8, "assistant", None, id="the question is long"),
    pytest.param(DOUBLE, 12, "assistant", [*BEFORE, *plus("b", END)], id="the second header stands last"),
    pytest.param(DOUBLE, 13, "assistant", [*BEFORE, *plus("b", END)], id="only its end would fit"),
    pytest.param(
        DOUBLE,
        14,
        "assistant",
        [*BEFORE, *plus("b", END), *ids(USER, "ccc", END, ASSISTANT), *plus("d", END)],
        id="one token of the second answer",
    ),
    pytest.param(DOUBLE, 13, "last", None, id="the last answer is lost"),
    pytest.param(DOUBLE, 13, "all", [USER, *plus("a", END, ASSISTANT, "b", END)], id="all: a turn is lost"),
]


@pytest.mark.parametrize(("conversation", "limit", "loss_on", "expected"), TRUNCATED)
def test_truncated(
    conversation: Conversation, limit: int, loss_on: str, expected: list[int | str] | None
) -> None:
    found = fit(conversation, limit, "truncate", loss_on)
    if expected is None:
        assert counts(found) == {"rows": 0, "dropped": 1}
        return
    [(_, row)] = found.rows
    assert shown(row) == expected
    assert row.place == conversation.place
    whole = len(template_ids(PHI3, conversation.to_template())) <= limit
    assert counts(found) == ({"rows": 1} if whole else {"rows": 1, "truncated": 1})


@pytest.mark.parametrize(("limit", "messages"), [(13, 2), (14, 4)])
def test_truncated_rows_keep_the_messages_they_show(limit: int, messages: int) -> None:
    """The prompt of a held-out row asks for the answer that its loss is measured on."""
    [(kept, _)] = fit(DOUBLE, limit, "truncate").rows
    assert kept.messages == DOUBLE.messages[:messages]


TRIPLE = talk(
    "system: S", "user: a", "assistant: b", "user: c", "assistant: d", "user: e", "assistant: f"
)  # 3 + 6 an exchange + EOS


def exchange(question: str, answer: str) -> list[int | str]:
    return [*ids(SYSTEM, "S", END, USER, question, END, ASSISTANT), *plus(answer, END)]


AB, CD, EF = exchange("a", "b"), exchange("c", "d"), exchange("e", "f")
SPLIT = [
    pytest.param(22, [[*AB, *CD[3:], *EF[3:], EOS]], {}, id="fits"),
    pytest.param(21, [[*AB, *CD[3:], EOS], [*EF, EOS]], {"split": 1}, id="two and one"),
    pytest.param(16, [[*AB, *CD[3:], EOS], [*EF, EOS]], {"split": 1}, id="two fit exactly"),
    pytest.param(15, [[*AB, EOS], [*CD, EOS], [*EF, EOS]], {"split": 1}, id="one each"),
    pytest.param(9, [AB, CD, EF], {"split": 1, "truncated": 3}, id="one each, less the eos"),
    pytest.param(8, [], {"split": 1, "dropped": 3}, id="no room for an answer"),
]


@pytest.mark.parametrize(("limit", "rows", "lost"), SPLIT)
def test_split(limit: int, rows: list[list[int | str]], lost: dict[str, int]) -> None:
    found = fit(TRIPLE, limit, "split")
    assert [shown(row) for _, row in found.rows] == rows
    assert counts(found) == {"rows": len(rows)} | lost
    assert {row.place for _, row in found.rows} <= {TRIPLE.place}


def test_split_counts_what_is_dropped_among_what_is_kept() -> None:
    conversation = talk(
        "user: a", "assistant: b", "user: ccccccc", "assistant: d", "user: e", "assistant: fff"
    )
    found = fit(conversation, 8, "split")
    e = ids(USER, "e", END, ASSISTANT)
    assert [shown(row) for _, row in found.rows] == [[*BEFORE, *plus("b", END), EOS], [*e, *plus("fff", END)]]
    assert counts(found) == {"rows": 2, "dropped": 1, "truncated": 1, "split": 1}


def test_a_single_exchange_is_truncated_not_split() -> None:
    found = fit(SINGLE, 10, "split")
    assert found == fit(SINGLE, 10, "truncate")
    assert counts(found) == {"rows": 1, "truncated": 1}


def test_split_trains_on_the_last_answer_of_each_row() -> None:
    found = fit(TRIPLE, 16, "split", "last")
    first = [*exchange("a", "b")[:7], *ids("b", END), *CD[3:], EOS]
    assert [shown(row) for _, row in found.rows] == [first, [*EF, EOS]]


EXCHANGES = [
    pytest.param(["user", "assistant", "user", "assistant"], [0, 2], id="plain"),
    pytest.param(["system", "user", "assistant", "user", "assistant"], [0, 3], id="system"),
    pytest.param(["user", "user", "assistant", "assistant", "user", "assistant"], [0, 4], id="doubled"),
    pytest.param(["user", "assistant", "user"], [0], id="nothing answers the last question"),
    pytest.param(["user", "assistant", "system", "user", "assistant"], [0, 2], id="later system"),
    pytest.param(["system", "assistant", "user", "assistant"], [0, 2], id="no question"),
]


@pytest.mark.parametrize(("roles", "starts"), EXCHANGES)
def test_exchanges(roles: list[str], starts: list[int]) -> None:
    assert exchanges(talk(*(f"{role}: x" for role in roles)).messages) == starts


def test_later_system_messages_stay_with_what_follows_them() -> None:
    conversation = talk("system: S", "user: a", "assistant: b", "system: T", "user: c", "assistant: d")
    conversation = Conversation((*conversation.messages, *talk("user: e", "assistant: f").messages), "x:1")
    found = fit(conversation, 13, "split")
    assert [[message.content for message in kept.messages] for kept, _ in found.rows] == [
        ["S", "a", "b"],
        ["S", "T", "c", "d"],
        ["S", "T", "e", "f"],
    ]


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_rows_that_are_not_kept(overlong: str) -> None:
    assert counts(fit(SINGLE, 12, overlong)) == {"rows": 1}
    if overlong == "drop":
        assert counts(fit(SINGLE, 11, overlong)) == {"rows": 0, "dropped": 1}
        return
    with pytest.raises(DataError) as caught:
        fit(SINGLE, 11, overlong)
    [problem] = caught.value.problems
    assert (problem.place, problem.reason) == (
        "chats.jsonl:7",
        "has 12 tokens, data.max_length is 11.",
    )


def test_split_where_the_template_opens_answers_by_itself() -> None:
    conversation = talk("user: a", "assistant: b", "user: c", "assistant: d", "user: e")
    found = fit(conversation, 12, "split", tokenizer=MEDIUM)
    assert [kept.messages for kept, _ in found.rows] == [conversation.messages[:2], conversation.messages[2:]]
    assert [row.input_ids for _, row in found.rows] == [
        template_ids(MEDIUM, kept.to_template()) for kept, _ in found.rows
    ]


# --- random conversations


def runs(row: Marked) -> list[int]:
    """The last token of every run of supervised tokens."""
    labels = row.row().labels
    following = [*labels[1:], IGNORE]
    return [label for label, after in zip(labels, following, strict=True) if label != IGNORE == after]


@st.composite
def cases(draw: st.DrawFn, tokenizer: Any, system: bool) -> tuple[Conversation, int, str]:
    conversation = draw(conversations(system))
    length = len(template_ids(tokenizer, conversation.to_template()))
    return conversation, draw(st.integers(8, max(8, length))), draw(st.sampled_from(get_args(LossOn)))


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
@pytest.mark.parametrize(("tokenizer", "system", "tail"), TOKENIZERS)
@settings(max_examples=100, deadline=None, database=None)
@given(data=st.data())
def test_rows_fit_and_their_answers_end(
    tokenizer: Any, system: bool, tail: int, overlong: str, data: st.DataObject
) -> None:
    conversation, limit, loss_on = data.draw(cases(tokenizer, system))
    found, end, num_cut = fit(conversation, limit, overlong, loss_on, tokenizer), Turns.of(tokenizer).end, 0
    for kept, row in found.rows:
        assert len(row.input_ids) <= limit
        starts = [start for start, _ in row.trained[1:]]
        assert all(stop < start for (_, stop), start in zip(row.trained, starts, strict=False))
        whole = template_ids(tokenizer, kept.to_template())
        messages_lost = overlong == "truncate" and kept != conversation
        num_cut += messages_lost or row.input_ids != whole
        if row.input_ids != whole:
            assert overlong != "drop"
            assert row.input_ids[:-1] == whole[: len(row.input_ids) - 1]
            assert row.input_ids[-1] == row.row().labels[-1] == end
        ends = runs(row)
        assert ends
        if loss_on != "all":
            assert set(ends) == {end}
            assert loss_on == "assistant" or len(ends) == 1
    assert num_cut == found.num_truncated


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
@pytest.mark.parametrize(("tokenizer", "system", "tail"), TOKENIZERS)
@settings(max_examples=100, deadline=None, database=None)
@given(data=st.data())
def test_what_is_kept_and_what_is_dropped_is_all(
    tokenizer: Any, system: bool, tail: int, overlong: str, data: st.DataObject
) -> None:
    conversation, limit, loss_on = data.draw(cases(tokenizer, system))
    length = len(template_ids(tokenizer, conversation.to_template()))
    found = fit(conversation, limit, overlong, loss_on, tokenizer)
    if overlong != "split" or length <= limit:
        assert len(found.rows) + found.num_dropped == 1
        assert found.num_split == 0
        return
    answers = [sum(m.role == "assistant" for m in kept.messages) for kept, _ in found.rows]
    num_answers = sum(m.role == "assistant" for m in conversation.messages)
    assert sum(answers) + found.num_dropped == num_answers
    assert found.num_split == int(num_answers > 1)
    head = [m for m in conversation.messages if m.role == "system"]
    said = []
    for kept, _ in found.rows:
        assert list(kept.messages[: len(head)]) == head
        said += kept.messages[len(head) :]
        assert kept.messages[len(head)].role == "user"
    if not found.num_dropped:
        assert head + said == list(conversation.messages)


@pytest.mark.parametrize(("tokenizer", "system", "tail"), TOKENIZERS)
@settings(max_examples=100, deadline=None, database=None)
@given(data=st.data())
def test_split_rows_hold_as_much_as_fits(
    tokenizer: Any, system: bool, tail: int, data: st.DataObject
) -> None:
    conversation, limit, _ = data.draw(cases(tokenizer, system))
    found = fit(conversation, limit, "split", tokenizer=tokenizer)
    if found.num_dropped:
        return
    for (kept, _), (after, _) in zip(found.rows, found.rows[1:], strict=False):
        joined = Conversation((*kept.messages, *after.messages[-2:]), "joined:1")
        if len(after.messages) <= 3:  # one exchange, with or without a system message
            assert len(template_ids(tokenizer, joined.to_template())) > limit
