"""A preference becomes two rows with the same prompt, masked as single conversations are."""

from __future__ import annotations

from typing import Any

import pytest
from talks import ASSISTANT, END, EOS, PHI3, USER, ids

from qlora_phi3.data.formats import convert, detect
from qlora_phi3.data.pairs import Pair, tokenize_pair
from qlora_phi3.data.rows import Preference
from qlora_phi3.data.tokens import IGNORE, TokenRow, Turns, tokenize
from qlora_phi3.errors import DataError

TURNS = Turns.of(PHI3)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def preference(row: dict[str, Any]) -> Preference:
    assert detect(row, "f:1") == "preference"
    found = convert(row, "preference", "f:1")
    assert isinstance(found, Preference)
    return found


def texts(row: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    found = preference(row)
    parts = (found.prompt, found.chosen, found.rejected)
    prompt, chosen, rejected = ([f"{m.role[0]}:{m.content}" for m in part] for part in parts)
    return prompt, chosen, rejected


PLAIN = (["u:a"], ["a:b"], ["a:c"])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": "a", "chosen": "b", "rejected": "c"}, id="text"),
        pytest.param(
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, id="messages"
        ),
        pytest.param(
            {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, id="both ways"
        ),
        pytest.param(
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}, id="no prompt"
        ),
        pytest.param(
            {"prompt": None, "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            id="null prompt",
        ),
        pytest.param(
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            id="the prompt twice, as in UltraFeedback",
        ),
        pytest.param(
            {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 9.0, "text": "x"},
            id="keys beside",
        ),
    ],
)
def test_shapes(row: dict[str, Any]) -> None:
    assert texts(row) == PLAIN
    assert preference(row).place == "f:1"


def test_what_both_begin_with_is_the_prompt() -> None:
    shared = [user("a"), assistant("b"), user("c")]
    row = {"chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e"), user("f")]}
    assert texts(row) == (["u:a", "a:b", "u:c"], ["a:d"], ["a:e", "u:f"])


@pytest.mark.parametrize(
    ("row", "where", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "", "chosen and rejected are the same."),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, ": rejected", "the assistant says nothing."),
        ({"prompt": "a", "chosen": 7, "rejected": "b"}, "", "chosen is a number, not text."),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "", "rejected is missing."),
        ({"chosen": "b", "rejected": "c"}, "", "is a preference (chosen and rejected) without the question"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "", "chosen is not a list with messages."),
        (
            {"prompt": "a", "chosen": [user("x")], "rejected": "c"},
            "",
            "chosen begins with a question, and has not that of `prompt`.",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]},
            "",
            "chosen and rejected do not part at an answer.",
        ),
        (
            {
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("d")],
            },
            "",
            "chosen and rejected do not part at an answer.",
        ),
        (
            {"prompt": "a", "chosen": [{"role": "narrator", "content": "b"}], "rejected": "c"},
            ": chosen[0]",
            "role 'narrator' is unknown.",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "Be."}, "", "`system` would be left out"),
    ],
)
def test_malformed(row: dict[str, Any], where: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(row, "preference", "f:1")
    [problem] = caught.value.problems
    assert problem.place == f"f:1{where}"
    assert problem.reason.startswith(reason)
    assert problem.remedy


def test_a_table_with_messages_too_needs_a_name() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "messages": [user("a"), assistant("b")]}
    with pytest.raises(DataError, match=r"fits the formats messages and preference .*format=messages"):
        detect(row, "f:1")


def pair(row: dict[str, Any]) -> Pair:
    return tokenize_pair(preference(row), PHI3, TURNS)


def test_ids_and_labels_by_hand() -> None:
    found = pair({"prompt": "a", "chosen": "bb", "rejected": "c"})
    prompt = ids(USER, "a", END, ASSISTANT)
    assert found.chosen == TokenRow(
        prompt + ids("bb", END, EOS), [IGNORE] * 4 + ids("bb", END) + [IGNORE], "f:1"
    )
    assert found.rejected == TokenRow(
        prompt + ids("c", END, EOS), [IGNORE] * 4 + ids("c", END) + [IGNORE], "f:1"
    )


def test_only_the_last_answer_counts() -> None:
    shared = [user("a"), assistant("b"), user("c")]
    row = {"prompt": shared, "chosen": "d", "rejected": "e"}
    found = pair(row)
    assert [label for label in found.chosen.labels if label != IGNORE] == ids("d", END)
    whole = preference(row)
    assert found.rejected == tokenize(whole.conversation(whole.rejected), PHI3, TURNS, "last")


def test_special_tokens_are_refused() -> None:
    with pytest.raises(DataError, match=r"f:1: messages\[1\]: contains the special token"):
        pair({"prompt": "a", "chosen": "b", "rejected": "<|end|>"})
