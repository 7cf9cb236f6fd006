"""What a dry run looks at: within its bounds, and never past what it has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_phi3.data import look as module
from qlora_phi3.data.look import lines, look
from qlora_phi3.errors import DataError
from qlora_phi3.recipe import Data, Evaluate, Train

ROW = '{"prompt": "a", "completion": "b"}\n'


def looked(*paths: Path, **data: Any) -> list[module.Look]:
    settings = Data.model_validate({"train": [{"path": str(path)} for path in paths], **data})
    return look(settings, Train(), Evaluate())


def test_rows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW * 3)
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    [all_of_them] = looked(path)
    assert (all_of_them.num_rows, all_of_them.whole) == (3, True)
    path.write_text(ROW * 3 + "broken")
    [first] = looked(path)
    assert (first.num_rows, first.whole) == (3, False)
    assert lines([first]).startswith("data.train: rows.jsonl: only the first 3 rows looked at\n")


def test_what_was_found_before_the_time_was_up_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("broken\n" + ROW * 40)
    monkeypatch.setattr(module, "MAX_SECONDS", -1.0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not valid JSON"):
        looked(path)
    path.write_text(ROW * 40 + "broken")
    [found] = looked(path)
    assert (found.num_rows, found.whole) == (1, False)


def test_a_large_file_that_has_to_be_read_whole_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[broken")
    monkeypatch.setattr(module, "MAX_WHOLE_BYTES", 4)
    [found] = looked(path)
    assert str(found) == "data.train: rows.json: not read, it is large, and would have to be read whole"


def test_nothing_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of gigabytes would be read to its end for its hash alone."""
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW)
    monkeypatch.setattr("hashlib.sha256", None)
    assert looked(path)[0].whole


def test_problems_of_all_sources_are_told_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    paths[0].write_text("broken\n" * 30)
    paths[1].write_text("broken\n")
    with pytest.raises(DataError) as caught:
        looked(paths[0], eval={"path": str(paths[1])})
    places = [problem.place for problem in caught.value.problems]
    assert places == [*(f"{paths[0]}:{i}" for i in range(1, 21)), str(paths[0]), f"{paths[1]}:1"]
    assert caught.value.problems[20].reason == "and 10 more rows with problems."
