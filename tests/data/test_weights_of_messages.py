"""What each way of writing a conversation is trained on, id by id, against transformers' own masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import chatml_tokenizer, phi3_tokenizer
from test_tools import FULL

from qlora_phi3.data import load
from qlora_phi3.data.read import read
from qlora_phi3.data.rows import Conversation, Message
from qlora_phi3.data.tokens import IGNORE, LossOn, TokenRow
from qlora_phi3.errors import DataError
from qlora_phi3.recipe import Data, Source

U, A = "user", "assistant"
ASK, YO = {"role": U, "content": "hi"}, {"role": A, "content": "yo"}
MORE, YES = {"role": U, "content": "more"}, {"role": A, "content": "yes"}
FOUR = [ASK, YO, MORE, YES]
"""The conversation that all rows below are."""
BOTH, SECOND, FIRST = (1, 3), (3,), (1,)

ROWS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # way of writing it: the row, and which of its messages are trained on
    "messages": ({"messages": FOUR}, BOTH),
    "JSON text": ({"messages": json.dumps(FOUR)}, BOTH),
    "Python's text": ({"messages": str(FOUR)}, BOTH),
    "an object of lists": (
        {"messages": {"role": [U, A, U, A], "content": ["hi", "yo", "more", "yes"], "weight": [None] * 4}},
        BOTH,
    ),
    "parts of text": (
        {"messages": [ASK, {"role": A, "content": [{"type": "text", "text": "yo"}]}, MORE, YES]},
        BOTH,
    ),
    "weights": ({"messages": [ASK, {**YO, "weight": 0}, MORE, {**YES, "weight": 1}]}, SECOND),
    "weights as text": ({"messages": [ASK, {**YO, "weight": "1.0"}, MORE, {**YES, "weight": "0"}]}, FIRST),
    "weights of ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "hi", "weight": 0},
                {"from": "gpt", "value": "yo", "weight": 0.0},
                {"from": "human", "value": "more", "weight": None},
                {"from": "gpt", "value": "yes", "weight": 1.0},
            ]
        },
        SECOND,
    ),
    "train false": ({"messages": [ASK, {**YO, "train": False}, MORE, {**YES, "train": True}]}, SECOND),
    "loss false": ({"messages": [ASK, {**YO, "loss": False}, MORE, {**YES, "loss": True}]}, SECOND),
    "loss measured": ({"messages": [ASK, {**YO, "loss": 0.53}, MORE, {**YES, "loss": 1.7}]}, BOTH),
    "Gemini": (
        {
            "contents": [
                {"role": role, "parts": [{"text": text}]}
                for role, text in ((U, "hi"), ("model", "yo"), (U, "more"), ("model", "yes"))
            ]
        },
        BOTH,
    ),
    "Cohere": (
        {"messages": [{"role": "User", "content": "hi"}, {"role": "Chatbot", "content": "yo"}, MORE, YES]},
        BOTH,
    ),
    "Capybara": (
        {"conversation": [{"input": "hi", "output": "yo"}, {"input": "more", "output": "yes"}]},
        BOTH,
    ),
    "LLaMA-Factory": ({"instruction": "more", "input": "", "output": "yes", "history": [["hi", "yo"]]}, BOTH),
    "history as text": ({"prompt": "more", "response": "yes", "history": '[["hi", "yo"]]'}, BOTH),
    "TRL": ({"prompt": FOUR[:3], "completion": FOUR[3:]}, SECOND),
    "TRL with text": ({"prompt": FOUR[:3], "completion": "yes"}, SECOND),
    "TRL as text": ({"prompt": json.dumps(FOUR[:3]), "completion": json.dumps(FOUR[3:])}, SECOND),
    "a bare list": (FOUR, BOTH),  # type: ignore[dict-item]
}


def masked(tokenizer: Any, messages: list[dict[str, str]], trained: tuple[int, ...]) -> TokenRow:
    """Ids and labels by transformers' own templates: an answer begins where its prompt ends."""
    end = tokenizer.convert_tokens_to_ids("<|end|>" if "<|end|>" in tokenizer.get_vocab() else "<|im_end|>")
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    labels = [IGNORE] * len(whole)
    for at in trained:
        before = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, return_dict=True)
        start = len(before["input_ids"])
        after = tokenizer.apply_chat_template(messages[: at + 1], return_dict=True)["input_ids"]
        stop = after.index(end, start) + 1
        labels[start:stop] = whole[start:stop]
    return TokenRow(whole, labels, "")


@pytest.mark.parametrize("make", [phi3_tokenizer, chatml_tokenizer])
@pytest.mark.parametrize("way", ROWS)
def test_ids_and_labels_are_those_of_transformers(tmp_path: Path, make: Any, way: str) -> None:
    row, trained = ROWS[way]
    tokenizer = make()
    [found] = rows_of(tmp_path, [row], tokenizer)
    expected = masked(tokenizer, FOUR, trained)
    assert (found.input_ids, found.labels) == (expected.input_ids, expected.labels)


def rows_of(tmp_path: Path, rows: list[Any], tokenizer: Any, **settings: Any) -> list[TokenRow]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=Source(path=str(path)), **{"max_length": 200, **settings})
    return list(load(data, tokenizer).train.rows)


WEIGHTED = {"messages": [ASK, {**YO, "weight": 0}, MORE, YES, ASK, {**YES, "content": "x" * 40}]}


def trained_text(row: TokenRow) -> str:
    return phi3_tokenizer().decode([label for label in row.labels if label != IGNORE])


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"loss_on": "assistant"}, ["yes<|end|>" + "x" * 40 + "<|end|>"]),
        ({"loss_on": "last"}, ["x" * 40 + "<|end|>"]),
        ({"max_length": 25, "overlong": "truncate"}, ["yes<|end|>"]),
        ({"max_length": 24, "overlong": "split"}, ["yes<|end|>", "x" * 18 + "<|end|>"]),
    ],
)
def test_weights_hold_where_rows_are_cut(tmp_path: Path, settings: dict[str, Any], texts: list[str]) -> None:
    found = rows_of(tmp_path, [WEIGHTED], phi3_tokenizer(), **settings)
    assert [trained_text(row) for row in found] == texts


@pytest.mark.parametrize("key", ["mask", "ignore", "skip", "masked", "ignore_loss", "excluded", "no_train"])
def test_another_word_for_a_weight_is_refused(tmp_path: Path, key: str) -> None:
    row = {"messages": [ASK, {**YO, key: True}, MORE, YES]}
    with pytest.raises(DataError, match=rf"messages\[1\]: '{key}' is not available yet.*Write weight: 0"):
        rows_of(tmp_path, [row], phi3_tokenizer())


def test_a_cut_leaves_no_answer_that_is_only_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none has room for an answer to train on"):
        rows_of(tmp_path, [WEIGHTED], phi3_tokenizer(), max_length=12, overlong="truncate")


def test_what_is_only_shown_cannot_be_trained_on_with_the_rest(tmp_path: Path) -> None:
    loss_on: LossOn = "all"
    with pytest.raises(DataError, match=r"messages\[1\]: is only shown .*Set data.loss_on to assistant"):
        rows_of(tmp_path, [WEIGHTED], phi3_tokenizer(), loss_on=loss_on)


def test_a_weight_makes_another_row_and_the_same_question() -> None:
    plain = Conversation((Message(U, "hi"), Message(A, "yo"), Message(U, "a"), Message(A, "b")), "f:1")
    first, *rest = plain.messages
    shown = Conversation((first, Message(A, "yo", trained=False), *rest[1:]), "f:2")
    assert plain.canonical != shown.canonical and shown.to_template() == plain.to_template()


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [
    ASK,
    {"role": A, "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7"},
    YO,
]
CALLS = {
    "OpenAI's first": [
        ASK,
        {"role": A, "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ],
    "LLaMA-Factory": [ASK, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}],
    "arguments as text": [
        ASK,
        {"role": A, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
    ],
}
RESULTS = [
    {"role": "function", "content": "7"},
    {"from": "observation", "value": "7"},
    {"role": "tool", "content": "7"},
]


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("result", RESULTS)
def test_calls_are_what_a_template_takes(tmp_path: Path, way: str, result: dict[str, str]) -> None:
    [row] = rows_of(tmp_path, [{"messages": [*CALLS[way], result, YO]}], FULL)
    assert row.input_ids == FULL.apply_chat_template(CALLED, return_dict=True)["input_ids"]


def test_anthropic_s_parts_become_calls_and_results(tmp_path: Path) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]}
    row = {
        "system": [{"type": "text", "text": "Be."}],
        "messages": [
            ASK,
            {"role": A, "content": [{"type": "text", "text": "Let me see."}, use]},
            {"role": U, "content": [result, {"type": "text", "text": "So?"}]},
            YO,
        ],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    [found] = read(Source(path=str(path)))
    assert isinstance(found, Conversation)
    assert found.to_template() == [
        {"role": "system", "content": "Be."},
        ASK,
        {"role": A, "content": "Let me see.", "tool_calls": [{"id": "t1", **CALL}]},
        {"role": "tool", "content": "7", "tool_call_id": "t1"},
        {"role": U, "content": "So?"},
        YO,
    ]
