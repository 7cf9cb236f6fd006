"""Every kind of file gives the same rows, each with its place; a broken one gives a message, no traceback."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_phi3.data.read import check_source, read
from qlora_phi3.data.rows import Conversation, Text
from qlora_phi3.data.sources import rows_of
from qlora_phi3.errors import DataError
from qlora_phi3.recipe import Source

PAIRS = [
    ("hi", "yo"),
    ('say "a, b"', "a,\nb\r\nand 'c'"),
    ("日本語 🙂 é", " blanks at both ends "),
    ("", "the user says nothing"),
    ("x" * 200_000, '{"json": [1, null, "\\u00e9"]}'),
]
MAKE: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt-completion": lambda q, a: {"prompt": q, "completion": a},
}
Rows = list[dict[str, Any]]
ROWS: Rows = [MAKE["alpaca"](f"q{i}", f"a{i}") for i in range(4)]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


WRITE: dict[str, Callable[[Path, Rows], None]] = {
    "jsonl": write_jsonl,
    "ndjson": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def source(path: Path, **keys: Any) -> Source:
    return Source(path=str(path), **keys)


def pairs_of(path: Path, **keys: Any) -> list[tuple[str, str]]:
    conversations = read(source(path, **keys))
    assert all([m.role for m in talk.messages] == ["user", "assistant"] for talk in conversations)
    return [(talk.messages[0].content, talk.messages[1].content) for talk in conversations]


def places_of(path: Path, **keys: Any) -> list[str]:
    return [talk.place.removeprefix(f"{path}") for talk in read(source(path, **keys))]


def problems_of(path: Path, **keys: Any) -> list[tuple[str, str]]:
    with pytest.raises(DataError) as caught:
        read(source(path, **keys))
    assert all(p.remedy or p.reason.startswith("and ") for p in caught.value.problems)
    return [(p.place.removeprefix(str(path)), p.reason) for p in caught.value.problems]


# --- what comes out


@pytest.mark.parametrize("named", [False, True], ids=["detected", "named"])
@pytest.mark.parametrize("suffix", WRITE)
@pytest.mark.parametrize("name", MAKE)
def test_round_trip(tmp_path: Path, name: str, suffix: str, named: bool) -> None:
    path = tmp_path / f"chats.{suffix}"
    WRITE[suffix](path, [MAKE[name](*pair) for pair in PAIRS])
    assert pairs_of(path, format=name if named else "auto") == PAIRS


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        ("jsonl", [":1", ":2", ":3", ":4"]),
        ("csv", [":2", ":3", ":4", ":5"]),
        ("json", [": row 1", ": row 2", ": row 3", ": row 4"]),
        ("parquet", [": row 1", ": row 2", ": row 3", ": row 4"]),
    ],
)
def test_places(tmp_path: Path, suffix: str, places: list[str]) -> None:
    WRITE[suffix](tmp_path / f"a.{suffix}", ROWS)
    assert places_of(tmp_path / f"a.{suffix}") == places


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_row_has_the_line_it_begins_in(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.csv"
    lines = ["\ufeffprompt,completion", "", '"one', 'two",x', "", "c,d"]
    path.write_bytes(end.join(lines).encode())
    assert places_of(path) == [":3", ":6"]
    assert pairs_of(path) == [(f"one{end}two", "x"), ("c", "d")]


@pytest.mark.parametrize("suffix", WRITE)
@pytest.mark.parametrize(("limit", "num_rows"), [(1, 1), (3, 3), (4, 4), (9, 4), (None, 4)])
def test_limit(tmp_path: Path, suffix: str, limit: int | None, num_rows: int) -> None:
    WRITE[suffix](tmp_path / f"a.{suffix}", ROWS)
    wanted = [(row["instruction"], row["output"]) for row in ROWS]
    assert pairs_of(tmp_path / f"a.{suffix}", limit=limit) == wanted[:num_rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\nbroken'),
        ("a.json", b'[{"prompt": "a", "completion": "b"}, broken'),
        ("a.csv", b'prompt,completion\na,b\n"broken'),
    ],
)
def test_nothing_is_parsed_after_the_limit(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert pairs_of(path, limit=1) == [("a", "b")]
    assert len(problems_of(path, limit=2)) == 1


def test_a_parquet_file_is_read_in_parts(tmp_path: Path) -> None:
    """A broken page behind the first batches is not touched under a limit."""
    path = tmp_path / "a.parquet"
    rows = [MAKE["prompt-completion"](f"q{i}", f"a{i}" * 50) for i in range(2000)]
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=500, compression="none", use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert len(pairs_of(path, limit=500)) == 500
    [(place, reason)] = problems_of(path)
    assert place.startswith(": row 1")
    assert reason.startswith("not a whole Parquet file: ")


@pytest.mark.parametrize("suffix", WRITE)
def test_a_row_of_a_megabyte(tmp_path: Path, suffix: str) -> None:
    pair = ("q" * 500_000, "é," * 250_000)
    WRITE[suffix](tmp_path / f"a.{suffix}", [MAKE["messages"](*pair)])
    assert pairs_of(tmp_path / f"a.{suffix}") == [pair]


def test_parquet_types(tmp_path: Path) -> None:
    """Strings may be large or dictionary-encoded; fields that other rows have are null."""
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"], pa.large_string()),
            "completion": pa.array(["c", "d"]).dictionary_encode(),
            "tools": pa.array([None, None], pa.list_(pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert pairs_of(tmp_path / "a.parquet") == [("a", "c"), ("b", "d")]


# --- folders


def test_a_folder_is_read_in_name_order(tmp_path: Path) -> None:
    names = ["b.csv", "c.parquet", "a.json", "d.jsonl"]
    for name, row in zip(names, ROWS, strict=True):
        WRITE[name.split(".")[1]](tmp_path / name, [row])
    for beside in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / beside).write_text("not data")
    (tmp_path / ".cache").mkdir()
    assert places_of(tmp_path) == ["/a.json: row 1", "/b.csv:2", "/c.parquet: row 1", "/d.jsonl:1"]
    assert [asked for asked, _ in pairs_of(tmp_path)] == ["q2", "q0", "q1", "q3"]
    assert [path.name for path in check_source(source(tmp_path))] == sorted(names)


def test_limit_counts_over_the_files_of_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    (tmp_path / "c.jsonl").write_text("broken")
    assert places_of(tmp_path, limit=3) == ["/a.jsonl:1", "/a.jsonl:2", "/b.jsonl:1"]


def test_a_broken_file_does_not_hide_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "b.csv").write_text("prompt,completion\na\n")
    (tmp_path / "c.jsonl").touch()
    (tmp_path / "d.json").write_text("7")
    assert [place for place, _ in problems_of(tmp_path)] == ["/a.parquet", "/b.csv:2", "/c.jsonl", "/d.json"]


@pytest.mark.parametrize(
    ("beside", "place", "reason"),
    [
        (None, "", "is a folder without data files."),
        ("README.md", "", "is a folder without data files."),
        ("more.jsonl.gz", "/more.jsonl.gz", ".gz is not available yet, and nothing is skipped silently."),
        ("notes", "/notes", "no suffix is not available yet, and nothing is skipped silently."),
        ("train/", "/train", "is a folder inside a folder."),
    ],
)
def test_unusable_folder(tmp_path: Path, beside: str | None, place: str, reason: str) -> None:
    if beside is not None:
        path = tmp_path / beside
        path.mkdir() if beside.endswith("/") else path.write_text("x")
    assert problems_of(tmp_path) == [(place, reason)]


SPLITS = "holds files of several splits: "


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["test.jsonl", "train.jsonl", "valid.jsonl"], "{0}/train.jsonl data.eval.path={0}/valid.jsonl"),
        (["TRAIN.csv", "Test.csv"], "{0}/TRAIN.csv data.eval.path={0}/Test.csv"),
        (["dataset.jsonl", "dataset_test.jsonl"], "{0}/dataset.jsonl data.eval.path={0}/dataset_test.jsonl"),
        (["a-dev.json", "a-train.json"], "{0}/a-train.json data.eval.path={0}/a-dev.json"),
        (
            ["test-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            "folder",
        ),
        (["test.txt", "train.txt"], "{0}/train.txt data.eval.path={0}/test.txt"),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], None),
        (["train.jsonl", "more.jsonl"], None),
        (["test_1.jsonl", "test_2.jsonl"], None),
        (["latest.jsonl", "contest.jsonl", "evaluation.jsonl", "attest_b.jsonl"], None),
        (["brakes.txt", "test-driving.txt"], None),
    ],
)
def test_a_folder_s_splits_are_told_apart(tmp_path: Path, names: list[str], remedy: str | None) -> None:
    for name in names:
        (tmp_path / name).write_text("not read")
    if remedy is None:
        assert len(check_source(source(tmp_path))) == len(names)
        return
    with pytest.raises(DataError) as caught:
        check_source(source(tmp_path))
    [problem] = caught.value.problems
    assert (problem.place, problem.reason) == (str(tmp_path), f"{SPLITS}{', '.join(sorted(names))}.")
    assert remedy.format(tmp_path) in problem.remedy


# --- broken files

GOOD = '{"prompt": "a", "completion": "b"}'
UTF8 = "not UTF-8 text (byte 1 of the line)."
END = "not valid JSON after this row: the file ends inside the list."

BROKEN = [
    pytest.param("a.json", b"[]", "", "holds no rows.", id="empty list"),
    pytest.param("a.json", b" \n", "", "holds no rows.", id="blank"),
    pytest.param("a.json", b"\xef\xbb\xbf", "", "holds no rows.", id="BOM"),
    pytest.param("a.json", b'{"a":\n 1}', "", "is a JSON object, not a list of rows.", id="object"),
    pytest.param("a.json", b'{"data": []}', "", "is one object, with its rows under 'data'.", id="wrapped"),
    pytest.param(
        "a.jsonl",
        b'{"version": "1", "train": [{"prompt": "a"}]}',
        "",
        "is one object, with its rows under 'train'.",
        id="wrapped in a line",
    ),
    pytest.param(
        "a.json",
        b'{"prompt": {"0": "a"}, "completion": {"0": "b"}}',
        "",
        "is one object, a table as pandas writes it.",
        id="pandas by columns",
    ),
    pytest.param(
        "a.json",
        b'{"0":\n{"prompt": "a", "completion": "b"}}',
        "",
        "is one object, a table as pandas writes it.",
        id="pandas by index",
    ),
    pytest.param(
        "a.json",
        b'{"columns": ["prompt"], "index": [0], "data": [["a"]]}',
        "",
        "is one object, a table as pandas writes it.",
        id="pandas split",
    ),
    pytest.param("a.json", b'"hi"', "", "is not a JSON list of rows.", id="text"),
    pytest.param("a.json", f"[{GOOD}".encode(), ": row 1", END, id="cut after a row"),
    pytest.param(
        "a.json",
        f"[{GOOD},\n{GOOD[:9]}".encode(),
        ": row 2",
        "not valid JSON: Expecting ':' delimiter at line 2 column 10.",
        id="cut in a row",
    ),
    pytest.param(
        "a.json",
        f"[{GOOD},]".encode(),
        ": row 1",
        "not valid JSON: a comma follows the last row.",
        id="comma at the end",
    ),
    pytest.param(
        "a.json",
        f"[{GOOD} {GOOD}]".encode(),
        ": row 1",
        "not valid JSON after this row: found '{', expected , or ].",
        id="no comma",
    ),
    pytest.param(
        "a.json", f"[{GOOD}]\n[]".encode(), ":2", "has more text after the list's end.", id="two lists"
    ),
    pytest.param("a.json", b"[\n\xff]", ":2", UTF8, id="JSON not UTF-8"),
    pytest.param(
        "a.json",
        b"[" * 200_000,
        ": row 1",
        "not valid JSON: nested too deeply.",
        id="deep",
    ),
    pytest.param(
        "a.json",
        b"[" + b"7" * 5000 + b"]",
        ": row 1",
        "not valid JSON: a number has too many digits.",
        id="huge integer",
    ),
    pytest.param(
        "a.json",
        f"[{GOOD}, [{GOOD}]]".encode(),
        ": row 2",
        "has no `prompt` and no `completion` or `response` (found a list).",
        id="nested lists",
    ),
    pytest.param(
        "a.json",
        b'[{"prompt": "a", "prompt": "b", "completion": "c"}, {"prompt": "a", "completion": "b"}]',
        ": row 1",
        "names the key 'prompt' twice in one object: only one of the two would be read.",
        id="a key twice",
    ),
    pytest.param("a.csv", b"\n\n", "", "holds no rows.", id="blank CSV"),
    pytest.param("a.csv", b"prompt,completion\n", "", "holds no rows.", id="header only"),
    pytest.param("a.csv", b"prompt,prompt\na,b\n", ":1", "the header names 'prompt' twice.", id="duplicate"),
    pytest.param(
        "a.csv",
        b"prompt, completion\na, b\n",
        ":1",
        "the header's name ' completion' begins or ends with a blank.",
        id="blank in the header",
    ),
    pytest.param(
        "a.csv", b"prompt,completion\na\n", ":2", "has 1 cells, the header names 2.", id="too few cells"
    ),
    pytest.param(
        "a.csv",
        b"prompt,completion\na,b\na,b,c\n",
        ":3",
        "has 3 cells, the header names 2.",
        id="too many cells",
    ),
    pytest.param(
        "a.csv",
        b'prompt,completion\na,b\n"a,b\nc,d\n',
        ":3",
        "not valid CSV: a quote is opened and not closed.",
        id="open quote",
    ),
    pytest.param(
        "a.csv",
        b'prompt,completion\na,"b"c\n',
        ":2",
        "not valid CSV: ',' expected after '\"'.",
        id="text behind a quote",
    ),
    pytest.param(
        "a.csv",
        b"prompt,completion\ra,b\r",
        ":1",
        "not valid CSV: a line ends with a carriage return alone.",
        id="old Mac line ends",
    ),
    pytest.param("a.csv", b"prompt,completion\na,b\n\xff,b", ":3", UTF8, id="CSV not UTF-8"),
    pytest.param("a.csv", "prompt,completion".encode("utf-16"), ":1", UTF8, id="UTF-16"),
    pytest.param(
        "a.csv",
        b"prompt,completion\na,\0\n",
        ":2",
        "has a NUL byte (character 3 of the line): this is not UTF-8 text.",
        id="NUL byte",
    ),
    pytest.param(
        "a.csv",
        b"prompt,grade\na,b\na,b\n",
        ":2",
        "has no format that is known (found keys 'prompt', 'grade').",
        id="missing column",
    ),
    pytest.param(
        "a.csv",
        b"messages\n\"[{'role': 'user'}\n {'role': 'b'}]\"\n",
        ":2",
        "messages is not valid JSON: Expecting property name enclosed in double quotes at column 3.",
        id="what numpy prints instead of JSON",
    ),
    pytest.param(
        "a.csv",
        b"messages\n\"[{'role': 'user', 'role': 'b'}]\"\n",
        ":2",
        "names the key 'role' twice in one object: only one of the two would be read.",
        id="a key twice in Python's way",
    ),
    pytest.param("a.jsonl", b"\x1f\x8b\x08\0", "", "is a gzip archive, whatever its name says.", id="gzip"),
    pytest.param(
        "a.csv",
        b"PK\x03\x04\0",
        "",
        "is a zip archive, or a spreadsheet (.xlsx), whatever its name says.",
        id="spreadsheet",
    ),
    pytest.param("a.csv", f"{GOOD}\n".encode(), "", "holds JSON, whatever its name says.", id="JSON in .csv"),
    pytest.param("a.csv", b" \n\t\n", "", "holds no rows.", id="blanks in .csv"),
    pytest.param("a.json", b"PAR1\0", "", "is a Parquet file, whatever its name says.", id="Parquet"),
    pytest.param(
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "",
        "is a pointer of Git LFS, whatever its name says.",
        id="LFS",
    ),
    pytest.param(
        "a.jsonl",
        b"\n<!DOCTYPE html><html>",
        "",
        "is a web page (HTML), whatever its name says.",
        id="web page",
    ),
    pytest.param(
        "a.csv",
        b"prompt,completion,weight\na,b,0\n",
        ":2",
        "`weight` would be left out ('0'): that says how much a row counts.",
        id="a weight column",
    ),
]


@pytest.mark.parametrize(("name", "content", "where", "reason"), BROKEN)
def test_broken_file(tmp_path: Path, name: str, content: bytes, where: str, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert problems_of(path) == [(where, reason)]


PRETTY = '[\n  {\n "prompt": "a",\n "completion": "b"}\n]\n'
TALK = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
PYTHON = "[{'role': 'user', 'content': 'a'}, {'from': 'gpt', 'value': 'b'}]"


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.json", f"{GOOD}\n{GOOD}\n", [":1", ":2"]),
        ("a.json", f"\n{GOOD}", [":2"]),
        ("a.jsonl", f"[{GOOD}, {GOOD}]", [": row 1", ": row 2"]),
        ("a.jsonl", PRETTY, [": row 1"]),
        ("a.jsonl", f"[{GOOD},\n{GOOD}]", [": row 1", ": row 2"]),
        ("a.jsonl", f"{TALK}\n{TALK}", [":1", ":2"]),
        ("a.json", f"[{TALK}]", [": row 1"]),
        ("a.csv", "prompt;completion\na;b\n", [":2"]),
        ("a.csv", "\ufeffprompt\tcompletion\na\tb\n", [":2"]),
        ("a.tsv", "prompt\tcompletion\na\tb\n", [":2"]),
        ("a.csv", f'messages\n"{PYTHON}"\n', [":2"]),
        ("a.csv", 'prompt,completion\n"[{""role"": ""user"", ""content"": ""a""}]",b\n', [":2"]),
    ],
)
def test_what_a_file_holds_counts_more_than_its_name(
    tmp_path: Path, name: str, content: str, places: list[str]
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    rows = read(source(path))
    assert [row.place for row in rows] == [f"{path}{place}" for place in places]
    assert {row.texts for row in rows} == {("a", "b")}


def test_an_address_is_no_file(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "https:" / "x" / "r.jsonl") == [
        ("", "is an address, and only files are read.")
    ]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert problems_of(tmp_path / "a.jsonl") == [("", "is a pipe, not a file.")]
    assert problems_of(tmp_path) == [("/a.jsonl", "is a pipe, not a file.")]


def test_a_thousand_columns_twice_are_found_in_no_time(tmp_path: Path) -> None:
    """Each was once compared with all before it: minutes for what a spreadsheet may have."""
    path = tmp_path / "a.csv"
    path.write_text(",".join([*map(str, range(200_000)), "199999"]) + "\n1\n")
    assert problems_of(path) == [(":1", "the header names '199999' twice.")]


@pytest.mark.parametrize("suffix", WRITE)
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").touch()
    assert problems_of(tmp_path / f"a.{suffix}") == [("", "holds no rows.")]


def test_ragged_rows_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na\n"a\nb",c,d\na,b\n,\n')
    assert [place for place, _ in problems_of(path)] == [":2", ":3", ":6: completion"]


# --- plain text


def test_a_document_is_one_row_with_its_text_as_it_is(tmp_path: Path) -> None:
    text = "# é\r\n\n two  blanks \u2028 日本語 🙂\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    [row] = read(source(tmp_path / "a.txt"))
    assert row == Text(text, str(tmp_path / "a.txt"))


def test_a_folder_of_documents_in_name_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.TXT", "README.md"):
        (tmp_path / name).write_text(name)
    assert [row.text for row in read(source(tmp_path)) if isinstance(row, Text)] == ["a.TXT", "b.txt"]
    assert len(read(source(tmp_path, limit=1))) == 1


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        (b"", "", "holds no rows."),
        (b" \n", "", "text is empty: nothing to train on."),
        (b"fine\n\xe9\n", ":2", UTF8),
        ("hi".encode("utf-16"), ":1", UTF8),
        (b"a\nb\0", ":2", "has a NUL byte (character 2 of the line): this is not UTF-8 text."),
    ],
)
def test_broken_documents(tmp_path: Path, content: bytes, where: str, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    [(place, found)] = problems_of(tmp_path / "a.txt")
    assert place == where
    assert found.startswith(reason.removesuffix("."))


def test_a_document_among_chats_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("not a chat")
    [(place, reason)] = problems_of(tmp_path)
    assert (place, reason) == ("/notes.txt", "has no `instruction` and no `output` (found keys 'text').")


def test_nulls_of_a_table_are_keys_that_a_row_never_had(tmp_path: Path) -> None:
    tools = [{"name": "f", "parameters": {"x": "1"}}, {"name": "g", "parameters": {"y": "2"}}]
    rows = [{**row, "tools": tools[i : i + 1]} for i, row in enumerate([MAKE["messages"]("q", "a")] * 2)]
    write_parquet(tmp_path / "a.parquet", rows)
    found = [row for row in read(source(tmp_path / "a.parquet")) if isinstance(row, Conversation)]
    assert [row.tools for row in found] == [tools[:1], tools[1:]]


# --- broken Parquet


def parquet_problems(folder: Path, columns: dict[str, Any]) -> list[tuple[str, str]]:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return problems_of(folder / "a.parquet")


@pytest.mark.parametrize("keep", [3, 4, 12, 0.5, 0.9])
def test_truncated_parquet(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ROWS)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    [(place, reason)] = problems_of(path)
    assert place == ""
    assert reason.startswith("not a whole Parquet file: ")
    assert "\n" not in reason


def test_a_damaged_name_and_an_encrypted_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"prompt": "a", "completion": "b"}])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"prompt", b"prom\xd7t"))
    [(_, reason)] = problems_of(path)
    assert reason.startswith("not a whole Parquet file: ")
    path.write_bytes(b"PARE" + content[4:-4] + b"PARE")
    assert problems_of(path) == [("", "is encrypted.")]


@pytest.mark.parametrize("content", [b"prompt,completion\na,b\n", GOOD.encode(), b"PAR1" * 8, b"\0" * 64])
def test_not_parquet_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    [(place, reason)] = problems_of(tmp_path / "a.parquet")
    assert place == ""
    assert reason.startswith("not a whole Parquet file: ")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([7], "a number"),
        ([1.5], "a number"),
        ([True], "true"),
        ([b"x"], "bytes"),
        ([["x"]], "a list"),
        ([{"a": "x"}], "an object"),
        (pa.array([0], pa.timestamp("s")), "of type datetime"),
    ],
)
def test_parquet_column_of_another_type(tmp_path: Path, values: Any, found: str) -> None:
    columns = {"prompt": ["a"], "completion": values}
    assert parquet_problems(tmp_path, columns) == [(": row 1", f"completion is {found}, not text.")]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        pytest.param(
            {"prompt": ["a", "b"], "completion": ["c", None]},
            (": row 2", "completion is missing."),
            id="null cell",
        ),
        pytest.param(
            {"prompt": ["a"]},
            (": row 1", "has no format that is known (found keys 'prompt')."),
            id="missing column",
        ),
        pytest.param({"prompt": [], "completion": []}, ("", "holds no rows."), id="no rows"),
        pytest.param(
            {"messages": [[]]}, (": row 1", "messages is not a list with messages."), id="empty messages"
        ),
        pytest.param(
            {"messages": [[["user", "hi"]]]},
            (": row 1: messages[0]", "is a list, not an object."),
            id="messages of lists",
        ),
        pytest.param(
            {
                "prompt": ["a", "b"],
                "completion": pa.StringArray.from_buffers(
                    2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"c\xff")
                ),
            },
            (": row 2", "has text that is not UTF-8."),
            id="not UTF-8",
        ),
        pytest.param(
            {"prompt": ["a"], "completion": ["b"], "at": pa.array([2**62], pa.timestamp("us"))},
            (": row 1", "has a value that cannot be read: "),
            id="a date beyond Python's",
        ),
        pytest.param(
            {"prompt": ["a"], "completion": ["b"], "at": pa.array([0], pa.timestamp("us", "Mars/Base"))},
            (": row 1", "has a value that cannot be read: "),
            id="an unknown time zone",
        ),
    ],
)
def test_parquet_rows_of_the_wrong_shape(
    tmp_path: Path, columns: dict[str, Any], problem: tuple[str, str]
) -> None:
    [(place, reason)] = parquet_problems(tmp_path, columns)
    assert place == problem[0]
    assert reason.startswith(problem[1])


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert problems_of(tmp_path / "a.parquet") == [("", "has two columns 'prompt'.")]


# --- lightness


def test_rows_stream(tmp_path: Path) -> None:
    """A line that another process still writes is read when it is asked for, not before."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS * 5000)
    rows = rows_of([path])
    first = list(islice(rows, 2))
    with path.open("a") as file:
        file.write("broken")
    assert [value for _, value in first] == ROWS[:2]
    assert sum(1 for _ in rows) == 5000 * len(ROWS) - 2 + 1


def test_importing_stays_light() -> None:
    code = "import sys, qlora_phi3.data.read; print({'pyarrow', 'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
