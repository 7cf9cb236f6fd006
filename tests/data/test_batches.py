"""Batches against the reference, row by row: the same ids, the same labels, the same refusals."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from conftest import PHI3_TEMPLATE, phi3_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import CHATML, MEDIUM, PHI3, SPECIAL_TEXT, TEXT, conversations, talk
from test_tokens import FIRST_SYSTEM_ONLY, MERGING, forgetting, with_template
from test_tools import CALLS, FULL, IN_SYSTEM, SCHEMAS

from qlora_phi3.data import batches
from qlora_phi3.data.batches import Batcher, mark_all, special_text
from qlora_phi3.data.rows import Conversation, Message, Row, Text
from qlora_phi3.data.text import mark_text
from qlora_phi3.data.tokens import LossOn, Turns, mark
from qlora_phi3.errors import DataError, ModelError, Problem

STRICT = with_template(
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + PHI3_TEMPLATE
)
KINDS = [
    pytest.param(PHI3, id="phi3"),
    pytest.param(CHATML, id="chatml"),
    pytest.param(MEDIUM, id="medium"),
    pytest.param(MERGING, id="merging"),
    pytest.param(STRICT, id="strict"),
    pytest.param(with_template(FIRST_SYSTEM_ONLY), id="first system only"),
    pytest.param(forgetting("not loop.last"), id="forgetting"),
    pytest.param(FULL, id="tools"),
    pytest.param(IN_SYSTEM, id="tools in the system message"),
]
HOSTILE = st.one_of(
    TEXT,
    st.lists(st.one_of(TEXT, st.sampled_from(SPECIAL_TEXT)), max_size=3).map("".join),
    st.sampled_from(
        ["<|end|", "<|END|>", "<|im_start|>assistant\n", "think\nb", "<|end|>" * 2, "\u2581<|end|>"]
    ),
)


@st.composite
def calling(draw: st.DrawFn) -> Conversation:
    """A conversation with tools, or some of what belongs to them."""
    system = Message("system", draw(HOSTILE), draw(st.sampled_from(["", '{"tools": "[weather]"}'])))
    calls = draw(st.sampled_from(["", CALLS, CALLS.replace("weather", "<|end|>")]))
    messages = [system, Message("user", "How?"), Message("assistant", draw(TEXT), calls)]
    if draw(st.booleans()):
        messages += [Message("tool", draw(HOSTILE), '{"name": "weather"}'), Message("assistant", "Cold.")]
    tools = draw(st.sampled_from(["", json.dumps(SCHEMAS), '[{"name": "<|user|>"}]']))
    return Conversation(tuple(messages), "random:1", tools)


@st.composite
def anything(draw: st.DrawFn) -> Row | Problem:
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return Problem("random:1", "cannot be read.")
    if kind == 1:
        return Text(draw(HOSTILE), "random:1")
    if kind == 2:
        return draw(calling())
    if kind < 6:
        return draw(conversations())
    roles = st.sampled_from(["system", "user", "user", "assistant", "assistant"])
    first = Message(draw(st.sampled_from(["system", "user"])), draw(HOSTILE))  # `formats` lets no other pass
    messages = [first, *(Message(draw(roles), draw(HOSTILE)) for _ in range(draw(st.integers(0, 3))))]
    return Conversation((*messages, Message("assistant", draw(HOSTILE))), "random:1")


def reference(row: Row | Problem, tokenizer: Any, turns: Turns, loss_on: LossOn) -> Any:
    if isinstance(row, Problem):
        return None, row
    try:
        if isinstance(row, Text):
            return row, mark_text(row, tokenizer, turns)
        return row, mark(row, tokenizer, turns, loss_on)
    except DataError as error:
        return row, error.problems


def found(rows: list[Any], tokenizer: Any, turns: Turns, loss_on: LossOn) -> list[Any]:
    outcomes = mark_all(rows, tokenizer, turns, loss_on)
    return [(row, one.problems if isinstance(one, DataError) else one) for row, one in outcomes]


@pytest.mark.parametrize("tokenizer", KINDS)
@settings(max_examples=100, deadline=None, database=None)
@given(rows=st.lists(anything(), max_size=6), loss_on=st.sampled_from(get_args(LossOn)))
def test_batches_are_the_reference(tokenizer: Any, rows: list[Any], loss_on: LossOn) -> None:
    turns = Turns.of(tokenizer)
    assert Batcher.of(tokenizer, turns, loss_on) is not None
    expected = [reference(row, tokenizer, turns, loss_on) for row in rows]
    assert found(rows, tokenizer, turns, loss_on) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_order_is_kept_over_many_batches(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(batches, "CHUNK", size)
    good = [talk(f"user: {i}", "assistant: yes", place=f"x:{i}") for i in range(7)]
    bad = [talk("user: <|end|>", "assistant: no", place="x:bad"), Problem("x:unread", "no.")]
    rows = [*good[:3], *bad, *good[3:], *bad]
    turns = Turns.of(PHI3)
    assert found(rows, PHI3, turns, "assistant") == [reference(r, PHI3, turns, "assistant") for r in rows]


def test_the_same_row_twice() -> None:
    row, turns = talk("user: a", "assistant: b"), Turns.of(PHI3)
    [(_, first), (_, second)] = mark_all([row, row], PHI3, turns, "assistant")
    assert first == second == mark(row, PHI3, turns, "assistant")


def test_plain_text_and_conversations_are_batched_and_tools_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Row] = []
    monkeypatch.setattr(batches, "reference", lambda row, *_: left.append(row))
    tools = Conversation(talk("user: a", "assistant: b").messages, "x:1", json.dumps(SCHEMAS))
    rows = [talk("user: a", "assistant: b"), Text("a", "x:2"), tools, Text("<|end|>", "x:4")]
    assert len(list(mark_all(rows, FULL, Turns.of(FULL), "assistant"))) == 4
    assert left == [tools, rows[3]]


@pytest.mark.parametrize("kind", ["batches", "one by one"])
def test_text_without_an_end_of_text(kind: str) -> None:
    tokenizer = phi3_tokenizer()
    turns = Turns.of(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        list(mark_all([Text("a", "x:1")], tokenizer if kind == "batches" else Slow(tokenizer), turns, "all"))


# --- which text is beyond suspicion


@pytest.mark.parametrize("tokenizer", KINDS[:4])
@settings(max_examples=200, deadline=None, database=None)
@given(text=HOSTILE)
def test_text_beyond_suspicion_has_no_special_token(tokenizer: Any, text: str) -> None:
    turns = Turns.of(tokenizer)
    batcher = Batcher.of(tokenizer, turns, "assistant")
    assert batcher is not None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert batcher.suspicious.search(text) or not turns.special.intersection(ids)


def backend_of(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


LLAMA = {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]}
UNSURE = [
    pytest.param({"normalizer": {"type": "Lowercase"}}, id="a normalizer that changes letters"),
    pytest.param({"model": {"type": "Unigram"}}, id="not BPE"),
    pytest.param({"model": {"continuing_subword_prefix": "##"}}, id="pieces that read otherwise"),
    pytest.param({"model": {"unk_token": "<|end|>"}}, id="unknown characters become a special token"),
    pytest.param({"normalizer": LLAMA, "normalized": True}, id="looked for after normalizing"),
    pytest.param({"content": "<0x0A>"}, id="a byte"),
    pytest.param({"content": "end of turn"}, id="a blank"),
    pytest.param({"content": "é"}, id="not ASCII"),
    pytest.param({"added_tokens": []}, id="no added token"),
]


@pytest.mark.parametrize("change", UNSURE)
def test_tokenizers_that_are_left_to_the_reference(change: dict[str, Any]) -> None:
    backend = backend_of(PHI3)
    assert special_text(backend, Turns.of(PHI3).special) is not None
    for key, value in change.items():
        if key == "model":
            backend["model"].update(value)
        elif key in backend:
            backend[key] = value
        else:
            backend["added_tokens"][3][key] = value
    backend["model"]["vocab"]["<|end|>"] = 259
    assert special_text(backend, Turns.of(PHI3).special) is None


def test_sentencepiece_bpe_with_all_bytes_is_sure() -> None:
    """Phi-3's own kind: ▁ for blanks, bytes for unknown characters."""
    backend = backend_of(PHI3) | {"normalizer": LLAMA}
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<|end|>": 259}
    backend["model"].update(byte_fallback=True, unk_token="<|end|>", vocab=vocab)
    assert special_text(backend, Turns.of(PHI3).special) is not None
    del vocab["<0x0A>"]
    assert special_text(backend, Turns.of(PHI3).special) is None


class Slow:
    """A tokenizer without a backend in Rust."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self.inner(*arguments, **settings)


class Adding(Slow):
    """A tokenizer whose class does more than its backend."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return {"input_ids": [*self.inner(*arguments, **settings)["input_ids"], 5]}


@pytest.mark.parametrize("kind", [Slow, Adding])
def test_the_reference_where_the_backend_may_not_be_used(kind: type[Slow]) -> None:
    tokenizer = kind(phi3_tokenizer())
    turns = Turns.of(PHI3)
    assert Batcher.of(tokenizer, turns, "assistant") is None
    rows = [talk("user: a", "assistant: b"), Problem("x:1", "no."), talk("user: <|end|>", "assistant: b")]
    expected = [reference(row, tokenizer, turns, "assistant") for row in rows]
    assert found(rows, tokenizer, turns, "assistant") == expected


def test_a_backend_left_to_pad_or_truncate_does_neither() -> None:
    tokenizer = phi3_tokenizer()
    tokenizer("a long text", truncation=True, max_length=3, padding="max_length")
    rows = [talk("user: abcdef", "assistant: b"), talk("user: a", "assistant: b")]
    turns = Turns.of(PHI3)
    assert found(rows, tokenizer, turns, "all") == [reference(row, PHI3, turns, "all") for row in rows]
