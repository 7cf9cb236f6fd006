"""A row of each format becomes the conversation it means; what would be lost or misread is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_phi3.data.formats import FORMATS, convert, detect
from qlora_phi3.data.read import read
from qlora_phi3.data.rows import Conversation, Text
from qlora_phi3.errors import DataError
from qlora_phi3.recipe import Source

ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    "alpaca": {"instruction": "hi", "output": "yo"},
    "prompt-completion": {"prompt": "hi", "completion": "yo"},
}
"""Formats of conversations; `text` and `preference` have tests of their own."""
PAIR = [("user", "hi"), ("assistant", "yo")]
ASK = {"from": "human", "value": "hi"}
ANSWER = {"from": "gpt", "value": "yo"}


def talk_of(row: Any, name: str) -> Conversation:
    found = convert(row, name, "f:1")
    assert isinstance(found, Conversation)
    return found


def turns(row: Any, name: str) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in talk_of(row, name).messages]


def refusal(row: Any, name: str) -> tuple[str, str, str]:
    with pytest.raises(DataError) as caught:
        convert(row, name, "f:1")
    [problem] = caught.value.problems
    return problem.place, problem.reason, problem.remedy


def talk(*entries: Any) -> dict[str, Any]:
    return {"conversations": list(entries)}


def test_every_format_has_an_example_here() -> None:
    assert [*ROWS, "text", "preference"] == list(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_the_plain_row(name: str) -> None:
    assert detect(ROWS[name], "f:1") == name
    assert turns(ROWS[name], name) == PAIR
    assert convert(ROWS[name], name, "f:1").place == "f:1"


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("extra", [{"id": 7}, {"source": "x"}, {"text": "all of it"}, {"tools": None}])
def test_harmless_keys_beside(name: str, extra: dict[str, Any]) -> None:
    row = {**extra, **ROWS[name]}
    assert detect(row, "f:1") == name
    assert turns(row, name) == PAIR


# --- each format's own ways


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
    ],
)
def test_sharegpt_speakers(speaker: str, role: str) -> None:
    entries = [ASK, {"from": speaker, "value": "x"}, ANSWER]
    assert turns(talk(*entries), "sharegpt") == [PAIR[0], (role, "x"), PAIR[1]]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        pytest.param({"instruction": "Add.", "input": "1 2"}, "Add.\n\n1 2", id="input"),
        pytest.param({"instruction": "Add.", "input": ""}, "Add.", id="empty input"),
        pytest.param({"instruction": "Add.", "input": " \n"}, "Add.", id="blank input"),
        pytest.param({"instruction": "Add.", "input": None}, "Add.", id="null input"),
        pytest.param({"instruction": "Add."}, "Add.", id="no input"),
        pytest.param({"instruction": "", "input": "1 2"}, "1 2", id="no instruction"),
        pytest.param({"instruction": " a ", "input": " b\n"}, " a \n\n b\n", id="blanks are kept"),
        pytest.param(
            {"instruction": "a", "prompt": "### Instruction: a"}, "a", id="ready-made prompt beside"
        ),
    ],
)
def test_alpaca_question(row: dict[str, Any], asked: str) -> None:
    assert turns({**row, "output": "3"}, "alpaca") == [("user", asked), ("assistant", "3")]


def test_response_is_a_completion() -> None:
    row = {"prompt": "hi", "response": "yo"}
    assert detect(row, "f:1") == "prompt-completion"
    assert turns(row, "prompt-completion") == PAIR


# --- which format


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"a": 1, "b": 2}, "has no format that is known (found keys 'a', 'b')."),
        ({"prompt": "hi"}, "has no format that is known (found keys 'prompt')."),
        ({"k" * 99: 1}, f"has no format that is known (found keys '{'k' * 57}...')."),
        ({str(i): i for i in range(15)}, "'10', '11' and 3 more)."),
        ({}, "has no format that is known (found an object)."),
        ([], "has no format that is known (found a list)."),
        ("hi", "has no format that is known (found text)."),
        (None, "has no format that is known (found null)."),
        ({"chosen": "b"}, "has no format that is known (found keys 'chosen')."),
    ],
)
def test_unknown_format(row: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        detect(row, "f:1")
    [problem] = caught.value.problems
    assert problem.place == "f:1"
    assert reason in problem.reason
    assert all(format_.shape in problem.remedy for format_ in FORMATS.values())


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        (
            {"article": "hi", "highlights": "yo"},
            "Rename `article` to `prompt` and `highlights` to `completion`.",
        ),
        (
            {"Category": "ham", "Message": "hi"},
            "Rename `Message` to `prompt` and `Category` to `completion`.",
        ),
        (
            {"dialogue": "hi", "summary": "yo"},
            "Rename `dialogue` to `prompt` and `summary` to `completion`.",
        ),
        (
            {"problem": "p", "solution": "s", "answer": "7"},
            "Rename `problem` to `prompt` and the answer to train on (of `solution`, `answer`) to "
            "`completion`.",
        ),
        (
            {"translation": {"de": "ja", "en": "yes"}},
            "Write the text of `de` as `prompt` and that of `en` as `completion`.",
        ),
        (
            {"chat": "USER: hi\n\nASSISTANT: yo"},
            "`chat` is a conversation as one text: write its turns as "
            '{"messages": [{"role": "user", "content": "..."}, ...]}.',
        ),
        (
            {"segments": [{"label": False, "text": "<s>[INST] hi"}, {"label": True, "text": "yo</s>"}]},
            "`segments` holds text that is rendered already, with its masks: write the turns as messages, "
            "and the base's template and masks are applied for you.",
        ),
        ({"content": "a page", "url": "x"}, "If it is plain text, rename `content` to `text`."),
        ({"chat": [{"role": "user", "content": "hi"}]}, "Rename `chat` to `messages`."),
        ({"dialog": [{"from": "human", "value": "hi"}]}, "Rename `dialog` to `conversations`."),
    ],
)
def test_keys_to_rename(row: dict[str, Any], remedy: str) -> None:
    with pytest.raises(DataError, match="has no format that is known") as caught:
        detect(row, "f:1")
    assert caught.value.problems[0].remedy == remedy


@pytest.mark.parametrize(
    ("row", "name", "asked"),
    [
        ({"instruction": "hi", "response": "yo"}, "alpaca", "hi"),
        ({"instruction": "hi", "context": "c", "response": "yo", "category": "qa"}, "alpaca", "hi\n\nc"),
        ({"instruction": "hi", "input": float("nan"), "output": "yo"}, "alpaca", "hi"),
        ({"Prompt": "hi", "Completion": "yo"}, "prompt-completion", "hi"),
        ({"question": "hi", "answer": "yo"}, "prompt-completion", "hi"),
        ({"input": "hi", "output": "yo"}, "prompt-completion", "hi"),
        ({"inputs": "hi", "targets": "yo", "task": "t"}, "prompt-completion", "hi"),
        ({"user": "hi", "assistant": "yo"}, "prompt-completion", "hi"),
        ({"user": "u17", "Question": "hi", "Answer": "yo"}, "prompt-completion", "hi"),
        ({"problem": "hi", "solution": "yo"}, "prompt-completion", "hi"),
    ],
)
def test_other_names_of_the_keys_are_read(row: dict[str, Any], name: str, asked: str) -> None:
    assert detect(row, "f:1") == name
    assert turns(row, name) == [("user", asked), ("assistant", "yo")]


def test_a_key_by_another_name_is_told_by_its_own() -> None:
    row = {"question": "hi", "answer": ""}
    assert refusal(row, "prompt-completion") == (
        "f:1: answer",
        "the assistant says nothing.",
        "Write the answer, or remove the row.",
    )
    assert refusal({**row, "rationale": "x"}, "prompt-completion")[0] == "f:1: answer"
    assert "into `answer`" in refusal({**row, "answer": "y", "rationale": "x"}, "prompt-completion")[2]


def test_keys_by_the_thousand_and_deep_values_are_told_short() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert turns({**ROWS["alpaca"], "meta": deep}, "alpaca") == PAIR
    place, reason, _ = refusal({"text": "a", **{f"answer_{i}": "x" for i in range(30_000)}}, "text")
    assert place == "f:1" and len(reason) < 300 and "29,992 more" in reason


def test_a_row_of_two_formats_needs_a_name() -> None:
    row = {**ROWS["messages"], **ROWS["alpaca"]}
    with pytest.raises(DataError, match=r"fits the formats messages and alpaca .*format=messages\."):
        detect(row, "f:1")
    assert all(convert(row, name, "f:1", named=True) for name in ("messages", "alpaca"))


@pytest.mark.parametrize("other", ROWS)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_unlike_the_first(tmp_path: Path, name: str, other: str) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[name], ROWS[other], ROWS[name])))
    if other == name:
        assert len(read(Source(path=str(path)))) == 3
        return
    with pytest.raises(DataError) as caught:
        read(Source(path=str(path)))
    [problem] = caught.value.problems
    assert problem.place == f"{path}:2"
    assert problem.reason.startswith("has no `")
    assert all(repr(key) in problem.reason for key in ROWS[other])
    assert problem.remedy == f"All rows need one format: write {FORMATS[name].shape}."


@pytest.mark.parametrize("name", ROWS)
def test_the_named_format_is_held(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ROWS[other]) + "\n" for other in ROWS))
    with pytest.raises(DataError) as caught:
        read(Source(path=str(path), format=name))
    lines = [i for i, other in enumerate(ROWS, start=1) if other != name]
    assert [p.place for p in caught.value.problems] == [f"{path}:{line}" for line in lines]


def test_an_unknown_first_row_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "hi"}\n' * 50)
    with pytest.raises(DataError) as caught:
        read(Source(path=str(path)))
    assert [p.place for p in caught.value.problems] == [f"{path}:1"]


# --- rows that are not right

ROLES = "system, user, assistant, tool"
GIVE_ROW = "Give the text of the row."
GIVE_MESSAGE = "Give the text of the message."
FILL = "Write its messages, or remove the row if it has none."
TALK, EMPTY = "conversations", "is not a list with messages."

BAD = [
    pytest.param("sharegpt", talk(), "", f"{TALK} {EMPTY}", FILL, id="empty"),
    pytest.param("sharegpt", {TALK: None}, "", f"{TALK} {EMPTY}", FILL, id="null"),
    pytest.param("sharegpt", {TALK: {}}, "", f"{TALK} {EMPTY}", FILL, id="object"),
    pytest.param(
        "sharegpt", talk("hi"), "[0]", "is text, not an object.", "Give it from and value.", id="text entry"
    ),
    pytest.param(
        "sharegpt", talk([ASK]), "[0]", "is a list, not an object.", "Give it from and value.", id="nested"
    ),
    pytest.param(
        "sharegpt",
        talk(ASK, {"from": "narrator", "value": "x"}),
        "[1]",
        "from 'narrator' is unknown.",
        f"Use one of {ROLES}.",
        id="unknown speaker",
    ),
    pytest.param(
        "sharegpt",
        talk({"from": {}, "value": "hi"}),
        "[0]",
        "from {} is unknown.",
        f"Use one of {ROLES}.",
        id="speaker is an object",
    ),
    pytest.param(
        "sharegpt",
        talk(ASK, {"from": "gpt", "value": None}),
        "[1]",
        "value is missing.",
        GIVE_MESSAGE,
        id="no value",
    ),
    pytest.param(
        "sharegpt",
        talk(ASK, {**ANSWER, "weight": 0.5}),
        "[1]",
        "weight is 0.5, and a message is trained on or not.",
        "Write 1 or 0. A whole source has data.train.weight.",
        id="half a weight",
    ),
    pytest.param(
        "sharegpt",
        talk(ASK, {**ANSWER, "weight": 0}),
        "",
        "every answer has the weight 0: nothing to train on.",
        "Give the answers to train on the weight 1, or remove the row.",
        id="weight",
    ),
    pytest.param(
        "sharegpt",
        talk(ANSWER, ASK, ANSWER),
        "",
        "begins with the assistant.",
        "Are user and assistant swapped? Begin with what it answers to.",
        id="assistant first",
    ),
    pytest.param(
        "sharegpt",
        talk(ASK),
        "",
        "has no assistant turn: nothing to train on.",
        "Add the answer, or remove it.",
        id="no answer",
    ),
    pytest.param(
        "sharegpt",
        talk(ASK, {"from": "gpt", "value": " "}),
        "[1]",
        "the assistant says nothing.",
        "Write the answer, or remove the row.",
        id="blank answer",
    ),
    pytest.param(
        "alpaca",
        {"instruction": 7, "output": "yo"},
        "",
        "instruction is a number, not text.",
        GIVE_ROW,
        id="instruction",
    ),
    pytest.param(
        "alpaca",
        {"instruction": None, "output": "yo"},
        "",
        "instruction is missing.",
        GIVE_ROW,
        id="null instruction",
    ),
    pytest.param(
        "alpaca",
        {"instruction": "hi", "input": ["x"], "output": "yo"},
        "",
        "input is a list, not text.",
        GIVE_ROW,
        id="input in a list",
    ),
    pytest.param(
        "alpaca",
        {"instruction": "hi", "output": b"yo"},
        "",
        "output is bytes, not text.",
        GIVE_ROW,
        id="bytes",
    ),
    pytest.param(
        "alpaca",
        {"instruction": "hi", "output": "cut \ud83d"},
        "",
        "output has half a character: '\\ud83d'.",
        "It was cut inside an emoji: mend the text, or remove the row.",
        id="half an emoji",
    ),
    pytest.param(
        "alpaca",
        {"instruction": "hi", "output": ""},
        ": output",
        "the assistant says nothing.",
        "Write the answer, or remove the row.",
        id="empty output",
    ),
    pytest.param(
        "prompt-completion",
        {"prompt": "hi", "completion": float("nan")},
        "",
        "completion is missing.",
        GIVE_ROW,
        id="NaN of a table",
    ),
    pytest.param(
        "prompt-completion",
        {"prompt": "hi", "completion": "yo", "history": ["a", "b"]},
        "",
        "history is not a list of questions with their answers.",
        'Write [["question", "answer"], ...], or all of the row as {"messages": [...]}.',
        id="history of texts",
    ),
    pytest.param(
        "prompt-completion",
        {"prompt": "hi", "response": True},
        "",
        "response is true, not text.",
        GIVE_ROW,
        id="response true",
    ),
    pytest.param(
        "prompt-completion",
        {"prompt": "hi", "completion": "yo", "response": "ye"},
        "",
        "has both `completion` and `response`.",
        "Keep the one to train on.",
        id="two answers",
    ),
    pytest.param(
        "prompt-completion",
        {"prompt": "hi", "response": "\n"},
        ": response",
        "the assistant says nothing.",
        "Write the answer, or remove the row.",
        id="blank response",
    ),
]


@pytest.mark.parametrize(("name", "row", "where", "reason", "remedy"), BAD)
def test_malformed_row(name: str, row: Any, where: str, reason: str, remedy: str) -> None:
    where = f": conversations{where}" if where.startswith("[") else where
    assert refusal(row, name) == (f"f:1{where}", reason, remedy)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("alpaca", {"instruction": "hi"}, "has no `output` (found keys 'instruction')."),
        ("alpaca", {"a": 1}, "has no `instruction` and no `output` (found keys 'a')."),
        ("prompt-completion", {"prompt": "a"}, "has no `completion` or `response` (found keys 'prompt')."),
        ("messages", ["x"], "has no `messages` (found a list)."),
    ],
)
def test_missing_keys(name: str, row: Any, reason: str) -> None:
    assert refusal(row, name) == ("f:1", reason, f"Write {FORMATS[name].shape}.")


# --- keys that a format does not use

MISSED: dict[str, tuple[str, dict[str, Any], str]] = {
    # what it is: the formats' names, keys that say it, and a word of the reason
    "weight": ("*", {"weight": 0, "sample_weight": 0.5, "train": False}, "how much a row counts"),
    "tools": (
        "chat",
        {"available_tools": [{"name": "f"}], "chat_template_kwargs": {"x": 1}},
        "what the model is shown",
    ),
    "history": ("chat", {"history": [["a", "b"]], "chatHistory": ["a"]}, "earlier turns"),
    "context": ("pair", {"context": "x", "contexts": ["x"], "choices": ["x"]}, "belongs to the question"),
    "picture": (
        "*",
        {"image": "a.png", "images": [b"x"], "image_path": "x", "Audio": b""},
        "that is no text",
    ),
    "answer": (
        "*",
        {
            "answer": "x",
            "Answers": ["x"],
            "summary_text": "x",
            "goldAnswer": "x",
            "translation_en": "x",
            "target": 1,
        }
        | {"replies": ["x"], "solution": "x", "answerKey": "A", "highlights": "x", "answer_1": "x"},
        "looks like an answer",
    ),
    "label": (
        "*",
        {
            "label": 0,
            "labels": ["x"],
            "LABEL": "x",
            "class": 1,
            "intent": "x",
            "sentiment": "x",
            "label_id": 2,
        },
        "looks like a label",
    ),
    "label of a text": ("text", {"category": "x", "stars": 5, "ner_tags": [1], "is_spam": True}, "a label"),
    "thought": (
        "*",
        {
            "reasoning": "x",
            "rationale": "x",
            "chain_of_thought": "x",
            "CoT": "x",
            "reasoningContent": "x",
            "reasoning_steps": ["x"],
        },
        "line of thought",
    ),
    "tree": (
        "text",
        {"role": "x", "parent_id": "x", "message_id": 1, "speaker": "x"},
        "rows belong together",
    ),
    "question": ("text", {"question": "x", "prompt": "x", "instruction": "x"}, "looks like the question"),
    "passage": (
        "chat",
        {"passage": "x", "article_text": "x", "persona": ["x"]},
        "belongs to the question",
    ),
}
"""Keys that would be missed, whichever way they are written."""
GROUPS = {
    "*": [*ROWS, "text"],
    "chat": [*ROWS],
    "pair": ["alpaca", "prompt-completion"],
    "text": ["text"],
}
BASIC = {**ROWS, "text": {"text": "once"}}


@pytest.mark.parametrize("kind", MISSED)
def test_keys_that_would_be_missed(kind: str) -> None:
    group, keys, words = MISSED[kind]
    for name in GROUPS[group]:
        for key, value in keys.items():
            if key in FORMATS[name].beside or key in FORMATS[name].picked({**BASIC[name], key: value}):
                continue
            place, reason, remedy = refusal({**BASIC[name], key: value}, name)
            assert place == "f:1" and f"`{key}`" in reason and words in reason, (name, key, reason)
            assert len(remedy) > 20


def test_the_refusal_names_all_keys_of_a_kind_and_what_to_rename() -> None:
    row = {"text": "long", "summary": "short", "translation": "kurz", "title": "Act 1"}
    assert refusal(row, "text") == (
        "f:1",
        "`summary` and `translation` would be left out ('short'): that looks like an answer.",
        "To train on it, rename `text` to `prompt` and `summary` to `completion`. "
        "If only `text` is meant, write `format: text` beside its path.",
    )


@pytest.mark.parametrize("name", BASIC)
@pytest.mark.parametrize(
    ("extra", "may_go"),
    [
        ({"label": "x"}, True),
        ({"answer": "x", "reasoning": "y"}, True),
        ({"label": False}, None),
        ({"weight": 0}, None),
        ({"dialogHistory": [["a", "b"]]}, None),
        ({"image": "x"}, None),
    ],
)
def test_a_named_format_means_its_keys_alone(name: str, extra: dict[str, Any], may_go: bool | None) -> None:
    """All but what changes the meaning of a conversation may then go; text is text without anything."""
    row = {**extra, **BASIC[name]}
    if may_go or name == "text":
        found = convert(row, name, "f:1", named=True)
        assert found == convert(BASIC[name], name, "f:1") and dict(found.unused) == extra
    else:
        with pytest.raises(DataError):
            convert(row, name, "f:1", named=True)


@pytest.mark.parametrize("name", BASIC)
def test_keys_that_are_left_out_are_kept_apart(name: str) -> None:
    described = {"title": "Act 1", "num_answers": 3, "answer_id": 7, "target_language": "de", "Unnamed: 0": 5}
    empty = {"summary": " \n", "label": None, "answer": [], "reasoning": float("nan"), "history": [{"a": ""}]}
    found = convert(
        {**BASIC[name], **described, **empty, "weight": 1, "weights": [1, 1.0], "train": True}, name, "f:1"
    )
    assert dict(found.unused) == described
    assert found == convert(BASIC[name], name, "f:1")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_message_beside_a_row_comes_first(name: str, key: str) -> None:
    row = {**ROWS[name], key: "Be."}
    assert turns(row, name) == [("system", "Be."), *PAIR]
    assert turns({**row, key: " "}, name) == PAIR
    with pytest.raises(DataError, match="and another one beside it"):
        convert({**row, "system": "Be.", "system_prompt": "Be not."}, name, "f:1")


def test_a_system_message_that_stands_there_twice_is_one() -> None:
    row = {
        "messages": [{"role": "system", "content": "Be."}, *ROWS["messages"]["messages"]],
        "system": "Be. ",
    }
    assert turns(row, "messages") == [("system", "Be."), *PAIR]
    assert "another one beside it" in refusal({**row, "system": "Be not."}, "messages")[1]


@pytest.mark.parametrize("value", [None, "", [], {}, {"parameters": None}])
def test_empty_values_lose_nothing(value: Any) -> None:
    assert turns({**ROWS["messages"], "functions": value}, "messages") == PAIR


# --- plain text


@pytest.mark.parametrize("extra", [{}, {"label": None}, {"source": "x", "title": "y"}])
def test_text(extra: dict[str, Any]) -> None:
    row = {"text": " once\n", **extra}
    assert detect(row, "f:1") == "text"
    assert convert(row, "text", "f:1") == Text(" once\n", "f:1")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "text is empty: nothing to train on."),
        (" \n", "text is empty: nothing to train on."),
        (None, "text is missing."),
        (["a"], "text is a list, not text."),
        ("cut \ud83d", "text has half a character: '\\ud83d'."),
    ],
)
def test_malformed_text(text: Any, reason: str) -> None:
    assert refusal({"text": text}, "text")[1] == reason


# --- tools

SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": None}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7", "name": "f", "tool_call_id": "1"}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, *messages], **more}


YO = {"role": "assistant", "content": "yo"}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA])], ids=["list", "text"])
@pytest.mark.parametrize("name", ROWS)
def test_tools_are_kept_as_written(name: str, tools: Any) -> None:
    found = talk_of({**ROWS[name], "tools": tools}, name)
    assert found.tools == [SCHEMA]
    assert list(found.tools[0]["function"]) == ["name", "parameters"]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "Let me see."}])
def test_calls_and_results_are_kept(content: dict[str, Any]) -> None:
    found = talk_of(chat({**CALLS, **content}, RESULT, YO, tools=[SCHEMA]), "messages")
    text = content.get("content") or ""
    assert found.to_template()[1:] == [{**CALLS, "content": text}, RESULT, YO]
    assert found.messages[1].calls_tools and not found.messages[3].calls_tools


def test_arguments_as_json_text_become_what_they_hold() -> None:
    written = {**CALL, "function": {"name": "f", "arguments": '{"x": "é"}'}}
    assert talk_of(chat({**CALLS, "tool_calls": [written]}), "messages") == talk_of(chat(CALLS), "messages")
    bare = {"name": "f", "arguments": '{"x": 1}'}
    found = talk_of(chat({**CALLS, "tool_calls": [bare]}), "messages").to_template()[1]
    assert found["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]


@pytest.mark.parametrize("tools", ["[...]", [SCHEMA]])
def test_tools_of_a_system_message_are_text(tools: Any) -> None:
    messages = [{"role": "system", "content": "Be.", "tools": tools}, *ROWS["messages"]["messages"]]
    [system, *_] = talk_of({"messages": messages}, "messages").to_template()
    assert system["tools"] == (tools if isinstance(tools, str) else json.dumps(tools))


@pytest.mark.parametrize(
    ("row", "where", "reason"),
    [
        (chat(YO, tools={"name": "f"}), "", "tools is not a list of objects."),
        (chat(YO, tools=["f"]), "", "tools is not a list of objects."),
        (chat(YO, tools="f"), "", "tools is not valid JSON: "),
        (chat(YO, tools=[{"a": b"x"}]), "", "tools has a value that JSON cannot hold: "),
        (chat(YO, tools=[{"a": "\ud83d"}]), "", "tools has a value that JSON cannot hold: "),
        (chat({**CALLS, "tool_calls": {"x": 1}}), ": messages[1]", "tool_calls is an object, not a list."),
        (chat({**CALLS, "tool_calls": ["f"]}), ": messages[1]: tool_calls[0]", "has no function with a name"),
        (
            chat({**CALLS, "tool_calls": [CALL, {"function": {"name": 7}}]}),
            ": messages[1]: tool_calls[1]",
            "has no function with a name.",
        ),
        (
            chat({**CALLS, "tool_calls": [{"name": "f", "arguments": "x=1"}]}),
            ": messages[1]: tool_calls[0]",
            "arguments is not valid JSON: ",
        ),
        (
            chat({**CALLS, "tool_calls": [{"name": "f", "arguments": [1]}]}),
            ": messages[1]: tool_calls[0]",
            "arguments is a list, not an object.",
        ),
        (chat({**CALLS, "content": 7}), ": messages[1]", "content is a number, not text."),
        (chat({**CALLS, "tool_calls": []}), ": messages[1]", "content is missing."),
        (chat(RESULT, YO), ": messages[1]", "is a tool's result, but does not follow the assistant's call."),
        (chat(CALLS, {**RESULT, "content": {"x": 1}}), ": messages[2]", "content is an object, not text."),
        (chat(CALLS, {**RESULT, "audio": "x"}), ": messages[2]", "'audio' is not available yet."),
    ],
)
def test_malformed_tools(row: dict[str, Any], where: str, reason: str) -> None:
    place, found, remedy = refusal(row, "messages")
    assert place in (f"f:1{where}", f"f:1: messages{where}")
    assert found.startswith(reason)
    assert remedy
