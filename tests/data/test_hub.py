"""A data set on the hub is streamed row by row; whatever the hub refuses is one message, in seconds."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from qlora_phi3.data.hub import place_of, rows_of
from qlora_phi3.data.read import check_files, read, stream
from qlora_phi3.data.rows import Conversation
from qlora_phi3.errors import DataError, Problem
from qlora_phi3.recipe import Data, Source

SOURCE = Source(path="org/name", split="train_sft")
REAL_LOAD = datasets.load_dataset
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the hub has: `file` is what a data set consists of; calls are noted."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.refusal: Exception | None = None
        self.calls: list[Any] = []

    def dataset_info(self, path: str, *, revision: str | None, timeout: float) -> Any:
        self.calls.append(("info", path, revision))
        assert timeout <= 30
        if self.refusal is not None:
            raise self.refusal
        return SimpleNamespace(sha=COMMIT)

    def load(self, path: str, subset: str | None, *, split: str, revision: str, streaming: bool) -> Any:
        """The real library on a local file, in place of the hub's."""
        self.calls.append(("load", path, subset, split, revision, streaming))
        assert self.file is not None
        kind = {".parquet": "parquet", ".jsonl": "json"}[self.file.suffix]
        files = {"train_sft": str(self.file)}
        return REAL_LOAD(kind, data_files=files, split=split, streaming=streaming)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(datasets, "load_dataset", found.load)
    monkeypatch.chdir(tmp_path)
    return found


def chat(i: int) -> dict[str, Any]:
    return {
        "id": i,
        "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}],
    }


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_rows_and_their_places(hub: Hub, tmp_path: Path, suffix: str) -> None:
    hub.file = write(tmp_path / f"data.{suffix}", [chat(i) for i in range(3)])
    rows = read(SOURCE)
    assert [row.place for row in rows] == [f"org/name[train_sft]: row {i}" for i in (1, 2, 3)]
    assert [row.messages[0].content for row in rows if isinstance(row, Conversation)] == ["q0", "q1", "q2"]
    assert hub.calls == [
        ("info", "org/name", None),
        ("load", "org/name", None, "train_sft", COMMIT, True),
    ]


def test_subset_and_revision_are_passed_on(hub: Hub, tmp_path: Path) -> None:
    hub.file = write(tmp_path / "data.parquet", [chat(0)])
    source = SOURCE.model_copy(update={"subset": "main", "revision": "v1"})
    [row] = read(source)
    assert row.place == "org/name/main[train_sft]: row 1" == f"{place_of(source)}: row 1"
    assert hub.calls == [("info", "org/name", "v1"), ("load", "org/name", "main", "train_sft", COMMIT, True)]


def test_only_what_is_asked_for_is_read(hub: Hub, tmp_path: Path) -> None:
    """The rows behind the limit are broken, and nobody notices."""
    hub.file = write(tmp_path / "data.jsonl", [chat(0), chat(1)])
    with hub.file.open("a") as file:
        file.write('{"messages": [{"role": "user"')
    assert len(list(islice(stream(SOURCE.model_copy(update={"limit": 1})), 5))) == 1


def test_malformed_rows_have_their_place(hub: Hub, tmp_path: Path) -> None:
    rows = [chat(0), {"id": 1, "messages": []}, chat(2)]
    hub.file = write(tmp_path / "data.parquet", rows)
    with pytest.raises(DataError, match=r"org/name\[train_sft\]: row 2: messages is not a list"):
        read(SOURCE)


def test_nulls_inside_a_row_are_keys_that_it_never_had(hub: Hub, tmp_path: Path) -> None:
    calls = [
        {"function": {"name": "f", "arguments": {"x": "1"}}},
        {"function": {"name": "g", "arguments": {"y": "2"}}},
    ]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    rows = [{"messages": [chat(0)["messages"][0], answer]}]
    hub.file = write(tmp_path / "data.parquet", rows)
    [row] = read(SOURCE)
    assert isinstance(row, Conversation)
    assert row.to_template()[1]["tool_calls"] == calls


class HttpError(Exception):
    """As the hub's client raises them: with the answer it got."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}\n\nmore")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (OfflineModeIsEnabled("Cannot reach: offline."), "hub cannot be reached: HF_HUB_OFFLINE is set."),
        (OSError("[Errno 111] Connection refused"), "cannot be reached: [Errno 111] Connection"),
        (TimeoutError(""), "the hub cannot be reached: TimeoutError."),
        (HttpError(404), "not on the hub, or no such revision."),
        (HttpError(401), "the hub refuses access (HTTP 401): gated, private or no such data set."),
        (HttpError(503), "the hub cannot be reached: HTTP 503."),
    ],
)
def test_what_the_hub_refuses(hub: Hub, refusal: Exception, words: str) -> None:
    hub.refusal = refusal
    with pytest.raises(DataError) as caught:
        read(SOURCE)
    [problem] = caught.value.problems
    assert problem.place == "org/name[train_sft]"
    assert words in problem.reason
    assert problem.remedy


def test_a_split_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.file = write(tmp_path / "data.parquet", [chat(0)])
    with pytest.raises(DataError) as caught:
        read(SOURCE.model_copy(update={"split": "tarin"}))
    [problem] = caught.value.problems
    assert problem.place == "org/name[tarin]"
    assert "tarin" in problem.reason and "train_sft" in problem.reason


def test_a_file_that_breaks_off_while_it_is_read(hub: Hub, tmp_path: Path) -> None:
    hub.file = write(tmp_path / "data.parquet", [chat(i) for i in range(200)])
    content = bytearray(hub.file.read_bytes())
    content[len(content) // 8 : len(content) // 8 + 400] = b"\xff" * 400  # behind the first rows
    hub.file.write_bytes(bytes(content))
    *_, (place, problem) = rows_of(SOURCE)
    assert isinstance(problem, Problem)
    assert place.startswith("org/name[train_sft]: row ")
    assert "\n" not in problem.reason


def test_a_folder_of_that_name_is_not_read_in_its_place(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(DataError, match=r"is a folder here too.*\./org/name"):
        read(SOURCE)
    assert hub.calls == []


def test_checking_files_asks_nobody(hub: Hub) -> None:
    check_files(Data(train=SOURCE, eval=[SOURCE]))
    assert hub.calls == []


def test_an_unreachable_hub_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the real client: nothing listens on that port, and nothing retries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: REAL_API(endpoint="http://127.0.0.1:9"))
    before = time.monotonic()
    [(_, problem)] = list(rows_of(SOURCE))
    assert "the hub cannot be reached: " in problem.reason
    assert time.monotonic() - before < 15


REAL_API = huggingface_hub.HfApi
