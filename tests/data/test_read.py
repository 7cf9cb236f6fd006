"""Rows are read as they stand; whatever is wrong with one is said with its file and line, all at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_phi3.data import check_files
from qlora_phi3.data.read import MAX_PROBLEMS, Conversation, Message, check_source, read, stream
from qlora_phi3.errors import DataError, Problem
from qlora_phi3.recipe import Data, Source

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})


def write(folder: Path, *lines: str | bytes, newline: bytes = b"\n") -> Path:
    path = folder / "chats.jsonl"
    path.write_bytes(newline.join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def row(*messages: Any) -> str:
    return json.dumps({"messages": list(messages)})


def contents(rows: list[Conversation]) -> list[list[str]]:
    return [[message.content for message in talk.messages] for talk in rows]


def problems_of(path: Path, limit: int | None = None) -> list[tuple[str, str, str]]:
    with pytest.raises(DataError) as caught:
        read(Source(path=str(path), limit=limit))
    return [(p.place, p.reason, p.remedy) for p in caught.value.problems]


# --- rows that are fine


def test_row_keeps_its_messages_and_its_place(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = write(tmp_path, GOOD, row(system, USER, ASSISTANT, USER, ASSISTANT))
    first, second = read(Source(path=str(path)))
    assert first == Conversation((Message("user", "hi"), Message("assistant", "yo")), f"{path}:1")
    assert [m.role for m in second.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert second.place == f"{path}:2"
    assert second.to_template(2) == [system, USER]
    assert second.to_template() == [system, USER, ASSISTANT, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("lines", "newline", "places"),
    [
        pytest.param([GOOD, GOOD], b"\n", [1, 2], id="no newline at the end"),
        pytest.param([GOOD, GOOD, ""], b"\n", [1, 2], id="newline at the end"),
        pytest.param([GOOD, GOOD, ""], b"\r\n", [1, 2], id="CRLF"),
        pytest.param([b"\xef\xbb\xbf" + GOOD.encode(), GOOD], b"\n", [1, 2], id="BOM"),
        pytest.param([b"\xef\xbb\xbf", GOOD], b"\r\n", [2], id="BOM on a line of its own"),
        pytest.param(["", GOOD, " \t", "", GOOD, ""], b"\n", [2, 5], id="blank lines"),
        pytest.param([f"  {GOOD}\t"], b"\n", [1], id="blanks around the row"),
    ],
)
def test_lines(tmp_path: Path, lines: list[str | bytes], newline: bytes, places: list[int]) -> None:
    path = write(tmp_path, *lines, newline=newline)
    rows = read(Source(path=str(path)))
    assert [talk.place for talk in rows] == [f"{path}:{line}" for line in places]
    assert contents(rows) == [["hi", "yo"]] * len(places)


@pytest.mark.parametrize(
    "text", ["é", "日本語", "🙂", "a\u2028b\u0085c", " \n both ends \n", "\x00", "<|end|>"]
)
@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "raw"])
def test_text_is_kept_as_written(tmp_path: Path, text: str, ascii_only: bool) -> None:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"a{text}"}]
    path = write(tmp_path, json.dumps({"messages": messages}, ensure_ascii=ascii_only), GOOD)
    assert contents(read(Source(path=str(path)))) == [[text, f"a{text}"], ["hi", "yo"]]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(row({**USER, "name": "user"}, ASSISTANT), id="a name that is the role"),
        pytest.param(row(USER, {**ASSISTANT, "weight": 1, "train": True}), id="weight 1"),
        pytest.param(row(USER, {**ASSISTANT, "id": "m7", "created_at": 5}), id="keys that describe"),
        pytest.param(json.dumps({"messages": json.dumps([USER, ASSISTANT])}), id="the JSON text of a list"),
        pytest.param(
            json.dumps({"messages": {"role": ["user", "assistant"], "content": ["hi", "yo"], "name": None}}),
            id="an object of lists",
        ),
        pytest.param(
            row({**USER, "content": [{"type": "text", "text": "hi "}, {"text": "you"}]}, ASSISTANT),
            id="parts",
        ),
        pytest.param(row(USER, {**ASSISTANT, "tool_calls": None}), id="null"),
        pytest.param(row(USER, {**ASSISTANT, "tool_calls": []}), id="no tool calls"),
        pytest.param(json.dumps({"id": 7, "messages": [USER, ASSISTANT]}), id="other keys beside messages"),
        pytest.param(row({**USER, "content": ""}, ASSISTANT), id="the user says nothing"),
        pytest.param(row(USER, ASSISTANT, USER), id="the user has the last word"),
        pytest.param(row({"role": "system", "content": "Hi."}, ASSISTANT), id="no user"),
    ],
)
def test_harmless_rows(tmp_path: Path, line: str) -> None:
    assert len(read(Source(path=str(write(tmp_path, line))))) == 1


# --- rows that are not

ONE_OBJECT = "Write one JSON object a line."
SHAPE = 'Write {"messages": [{"role": "user", "content": "..."}, ...]}.'
FILL = "Write its messages, or remove the row if it has none."
FIRST = ": messages[0]"
SECOND = ": messages[1]"
GIVE_TEXT = "Give the text of the message."
INTO_CONTENT = "Put what it says into content, or remove it if the message means the same without it."
NONE_COUNTS = "Give the answers to train on the weight 1, or remove the row."
TWICE = "Keep the right one, or give the other a name of its own."

BAD_ROWS = [
    pytest.param("hello", "", "not valid JSON: Expecting value at column 1.", ONE_OBJECT, id="plain text"),
    pytest.param(
        GOOD[:-1],
        "",
        f"not valid JSON: Expecting ',' delimiter at column {len(GOOD)}.",
        ONE_OBJECT,
        id="cut off",
    ),
    pytest.param(
        GOOD + GOOD,
        "",
        f"not valid JSON: Extra data at column {len(GOOD) + 1}.",
        ONE_OBJECT,
        id="two in a line",
    ),
    pytest.param(
        '{"messages": "hi',
        "",
        "not valid JSON: Unterminated string starting at column 14.",
        ONE_OBJECT,
        id="open string",
    ),
    pytest.param(
        '{"a": "tab\there"}',
        "",
        "not valid JSON: Invalid control character at column 11.",
        ONE_OBJECT,
        id="raw tab",
    ),
    pytest.param(
        b"\x00" * 8,
        "",
        "has a NUL byte (character 1 of the line): this is not UTF-8 text.",
        "Convert the file to UTF-8, or write it again.",
        id="NUL bytes",
    ),
    pytest.param("[" * 100_000, "", "not valid JSON: nested too deeply.", ONE_OBJECT, id="deeply nested"),
    pytest.param(
        '{"messages": ' + "7" * 5000 + "}",
        "",
        "not valid JSON: a number has too many digits.",
        ONE_OBJECT,
        id="huge integer",
    ),
    pytest.param(
        b'{"messages": "\xff"}',
        "",
        "not UTF-8 text (byte 15 of the line).",
        "Convert the file to UTF-8.",
        id="not UTF-8",
    ),
    pytest.param("[]", "", "has no `messages` (found a list).", SHAPE, id="a list"),
    pytest.param('"hi"', "", "has no `messages` (found text).", SHAPE, id="a string"),
    pytest.param("7", "", "has no `messages` (found a number).", SHAPE, id="a number"),
    pytest.param("true", "", "has no `messages` (found true).", SHAPE, id="a boolean"),
    pytest.param("null", "", "has no `messages` (found null).", SHAPE, id="null"),
    pytest.param("{}", "", "has no `messages` (found an object).", SHAPE, id="an object without keys"),
    pytest.param(
        '{"prompt": "", "completion": ""}',
        "",
        "has no `messages` (found keys 'prompt', 'completion').",
        f"All rows need one format: write{SHAPE.removeprefix('Write')}",
        id="another format",
    ),
    pytest.param('{"messages": []}', "", "messages is not a list with messages.", FILL, id="empty messages"),
    pytest.param('{"messages": null}', "", "messages is not a list with messages.", FILL, id="null messages"),
    pytest.param(
        '{"messages": "hi"}',
        "",
        "messages is not valid JSON: Expecting value at column 1.",
        "Write the list itself, or as JSON.",
        id="text messages",
    ),
    pytest.param(
        '{"messages": {"role": ["user"], "content": []}}',
        "",
        "messages is not a list with messages.",
        "It is an object of lists that are not equally long: write [{...}, ...].",
        id="lists of two lengths",
    ),
    pytest.param(
        '{"messages": [], "messages": []}',
        "",
        "names the key 'messages' twice in one object: only one of the two would be read.",
        TWICE,
        id="a key twice",
    ),
    pytest.param(
        GOOD.replace('"hi"', '"hi", "content": "hi"'),
        "",
        "names the key 'content' twice in one object: only one of the two would be read.",
        TWICE,
        id="a key twice inside",
    ),
    pytest.param(
        row({**USER, "name": "Ann"}, ASSISTANT),
        FIRST,
        "'name' is not available yet.",
        'Write who speaks into content ("Ada: ..."), or remove the names if nothing refers to them.',
        id="name",
    ),
    pytest.param('{"messages": {}}', "", "messages is not a list with messages.", FILL, id="object messages"),
    pytest.param(
        row("hi", ASSISTANT), FIRST, "is text, not an object.", "Give it role and content.", id="text message"
    ),
    pytest.param(
        row(USER, None), SECOND, "is null, not an object.", "Give it role and content.", id="null message"
    ),
    pytest.param(
        row({"role": "narrator", "content": "hi"}, ASSISTANT),
        FIRST,
        "role 'narrator' is unknown.",
        "Use one of system, user, assistant, tool.",
        id="unknown role",
    ),
    pytest.param(
        row({"role": ["user"], "content": "hi"}, ASSISTANT),
        FIRST,
        "role ['user'] is unknown.",
        "Use one of system, user, assistant, tool.",
        id="role in a list",
    ),
    pytest.param(
        row({"content": "hi"}, ASSISTANT),
        FIRST,
        "role is missing.",
        "Use one of system, user, assistant, tool.",
        id="no role",
    ),
    pytest.param(row(USER, {"role": "assistant"}), SECOND, "content is missing.", GIVE_TEXT, id="no content"),
    pytest.param(
        row(USER, {**ASSISTANT, "content": None}), SECOND, "content is missing.", GIVE_TEXT, id="null content"
    ),
    pytest.param(
        row({**USER, "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}]}, ASSISTANT),
        FIRST,
        "content has a part of type 'image_url', and only parts of text can be read.",
        'Write {"type": "text", "text": "..."}, or plain text.',
        id="a picture among the parts",
    ),
    pytest.param(
        row({**USER, "content": [{"text": "hi"}, {"text": "you"}]}, ASSISTANT),
        FIRST,
        "content has several parts of text without a blank or a new line between them.",
        "Join them into one text.",
        id="parts that would run together",
    ),
    pytest.param(
        row(USER, {**ASSISTANT, "content": 7}),
        SECOND,
        "content is a number, not text.",
        GIVE_TEXT,
        id="number",
    ),
    pytest.param(
        '{"messages": [{"role": "user", "content": "cut \\ud83d"}, {"role": "assistant", "content": "yo"}]}',
        FIRST,
        "content has half a character: '\\ud83d'.",
        "It was cut inside an emoji: mend the text, or remove the row.",
        id="half an emoji",
    ),
    pytest.param(
        row(USER),
        "",
        "has no assistant turn: nothing to train on.",
        "Add the answer, or remove it.",
        id="no assistant",
    ),
    pytest.param(
        row(USER, {**ASSISTANT, "content": ""}),
        SECOND,
        "the assistant says nothing.",
        "Write the answer, or remove the row.",
        id="empty answer",
    ),
    pytest.param(
        row(USER, ASSISTANT, {**ASSISTANT, "content": " \n\t"}),
        ": messages[2]",
        "the assistant says nothing.",
        "Write the answer, or remove the row.",
        id="blank answer",
    ),
    pytest.param(
        row(ASSISTANT, USER, ASSISTANT),
        "",
        "begins with the assistant.",
        "Are user and assistant swapped? Begin with what it answers to.",
        id="assistant first",
    ),
    pytest.param(
        row({**USER, "tool_calls": [{"id": "1"}]}, ASSISTANT),
        FIRST,
        "'tool_calls' is not available yet.",
        INTO_CONTENT,
        id="the user calls a tool",
    ),
    pytest.param(
        row({**USER, "audio": None, "function_call": {"name": "f"}}, ASSISTANT),
        FIRST,
        "'function_call' is not available yet.",
        INTO_CONTENT,
        id="the user answers a call, beside an empty key",
    ),
    pytest.param(
        row(USER, {**ASSISTANT, "weight": 0}),
        "",
        "every answer has the weight 0: nothing to train on.",
        NONE_COUNTS,
        id="weight 0: do not train",
    ),
    pytest.param(
        row(USER, {**ASSISTANT, "train": False}),
        "",
        "every answer has the weight 0: nothing to train on.",
        NONE_COUNTS,
        id="train false",
    ),
]


@pytest.mark.parametrize(("line", "where", "reason", "remedy"), BAD_ROWS)
def test_malformed_row(tmp_path: Path, line: str | bytes, where: str, reason: str, remedy: str) -> None:
    path = write(tmp_path, GOOD, "", line, GOOD)
    assert problems_of(path) == [(f"{path}:3{where}", reason, remedy)]


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "hello", GOOD, b"\xff", row(USER), GOOD, "{}")
    assert [place for place, _, _ in problems_of(path)] == [f"{path}:{line}" for line in (1, 3, 4, 6)]


@pytest.mark.parametrize("num_bad", [MAX_PROBLEMS - 1, MAX_PROBLEMS, MAX_PROBLEMS + 1, MAX_PROBLEMS + 30])
def test_problems_past_the_limit_are_counted(tmp_path: Path, num_bad: int) -> None:
    path = write(tmp_path, *["{"] * num_bad)
    found = problems_of(path)
    places = [f"{path}:{line}" for line in range(1, min(num_bad, MAX_PROBLEMS) + 1)]
    assert [place for place, _, _ in found[:MAX_PROBLEMS]] == places
    surplus = num_bad - MAX_PROBLEMS
    rest = [(str(path), f"and {surplus} more rows with problems.", "")] if surplus > 0 else []
    assert found[MAX_PROBLEMS:] == rest


# --- limit


@pytest.mark.parametrize(("limit", "num_rows"), [(1, 1), (2, 2), (3, 3), (9, 3), (None, 3)])
def test_limit_takes_the_first_rows(tmp_path: Path, limit: int | None, num_rows: int) -> None:
    lines = [row({"role": "user", "content": str(i)}, ASSISTANT) for i in range(3)]
    rows = read(Source(path=str(write(tmp_path, "", lines[0], "", *lines[1:])), limit=limit))
    assert [talk.messages[0].content for talk in rows] == ["0", "1", "2"][:num_rows]


@pytest.mark.parametrize("bad", ["not JSON", b"\xff\xfe"])
def test_rows_after_the_limit_are_not_parsed(tmp_path: Path, bad: str | bytes) -> None:
    path = write(tmp_path, GOOD, GOOD, bad)
    assert len(read(Source(path=str(path), limit=2))) == 2
    assert [place for place, _, _ in problems_of(path, limit=3)] == [f"{path}:3"]


def test_a_bad_row_counts_towards_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "not JSON", GOOD, "not JSON either")
    assert [place for place, _, _ in problems_of(path, limit=2)] == [f"{path}:1"]


# --- rows of another split


@pytest.mark.parametrize(
    ("use", "key", "value", "wrong"),
    [
        ("train", "split", "test", True),
        ("train", "Split", "validation", True),
        ("train", "data_split", "dev", True),
        ("train", "subset", "TEST", True),
        ("train", "is_test", True, True),
        ("train", "is_test", False, False),
        ("train", "split", "train", False),
        ("train", "split", "train_sft", False),
        ("train", "subset", "physics", False),
        ("train", "fold", 3, False),
        ("eval", "split", "train", True),
        ("eval", "split", "test", False),
    ],
)
def test_a_row_that_names_another_split(tmp_path: Path, use: str, key: str, value: Any, wrong: bool) -> None:
    line = json.dumps({**json.loads(GOOD), key: value})
    found = list(stream(Source(path=str(write(tmp_path, GOOD, line))), use=use))
    assert isinstance(found[1], Problem) is wrong
    if isinstance(found[1], Problem):
        assert f"`{key}` says {value!r}" in found[1].reason and "data.eval.path" in found[1].remedy


# --- files


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    assert problems_of(path) == [(str(path), "holds no rows.", "Write at least one conversation into it.")]


@pytest.mark.parametrize("name", ["chats.md", "chats.jsonl.gz", "chats.xlsx", "chats"])
def test_unusable_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(GOOD)
    [(place, reason, remedy)] = problems_of(path)
    assert (place, reason) == (str(path), f"{path.suffix or 'no suffix'} is not available yet.")
    assert {".gz": "Unpack", ".xlsx": "as CSV"}.get(path.suffix, "JSONL file") in remedy


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.jsonl"
    [(place, reason, remedy)] = problems_of(path)
    assert (place, reason) == (str(path), "no such file.")
    assert remedy.startswith("Its folder holds no data file. Give a JSONL file")


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.JSONL", "chats.ndjson"])
def test_suffixes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(GOOD)
    assert check_source(Source(path=str(path))) == [path]
    assert len(read(Source(path=str(path)))) == 1


def test_check_files_reports_both_sources(tmp_path: Path) -> None:
    wrong = tmp_path / "chats.md"
    wrong.write_text("a,b")
    missing = tmp_path / "none.jsonl"
    with pytest.raises(DataError) as caught:
        check_files(Data(train=Source(path=str(missing)), eval=Source(path=str(wrong))))
    assert [p.place for p in caught.value.problems] == [
        f"data.train.path: {missing}",
        f"data.eval.path: {wrong}",
    ]


def test_check_files_names_only_the_one_that_is_wrong(tmp_path: Path) -> None:
    good, missing = write(tmp_path, GOOD), tmp_path / "none.jsonl"
    with pytest.raises(DataError) as caught:
        check_files(Data(train=Source(path=str(good)), eval=Source(path=str(missing))))
    assert [p.place for p in caught.value.problems] == [f"data.eval.path: {missing}"]


def test_a_file_that_is_not_there_is_looked_for_beside(tmp_path: Path) -> None:
    for name in ("branches.jsonl", "tickets.csv", "notes.md"):
        (tmp_path / name).write_text(GOOD)
    sources = [Source(path=str(tmp_path / name)) for name in ("branch.jsonl", "sub/a.jsonl", "x" * 300)]
    with pytest.raises(DataError) as caught:
        check_files(Data(train=tuple(sources)))
    first, second, third = caught.value.problems
    assert first.place == f"data.train[0].path: {tmp_path / 'branch.jsonl'}"
    assert first.remedy == "Did you mean branches.jsonl? In its folder: branches.jsonl, tickets.csv."
    assert f"There is no folder {tmp_path / 'sub'} either." in second.remedy
    assert third.reason == "cannot be looked up: File name too long."


@pytest.mark.parametrize("with_eval", [True, False])
def test_check_files_does_not_read(tmp_path: Path, with_eval: bool) -> None:
    source = Source(path=str(path := write(tmp_path, b"\xff not a row")))
    check_files(Data(train=source, eval=source if with_eval else None))
    assert problems_of(path), "whoever reads it is told"
