"""The benchmark's generator is seeded, its rows are clean, and its cases run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import phi3_tokenizer

from bench import data, results
from bench.__main__ import main
from qlora_phi3.data import prepare
from qlora_phi3.recipe import Data, Source


def test_the_same_seed_gives_the_same_chats() -> None:
    assert list(data.chats(5)) == list(data.chats(5)) != list(data.chats(5, seed=1))
    assert list(data.chats(9))[:5] == list(data.chats(5))


def test_the_chats_have_no_error(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    data.write(path, 200)
    found = prepare(Data(train=Source(path=str(path))), phi3_tokenizer())
    assert len(found.parts["train"].rows) == 200
    assert [one.code for one in found.findings(1) if one.grade == "error"] == []
    turns = {len(json.loads(line)["messages"]) for line in path.read_text().splitlines()}
    assert len(turns) > 4


def test_every_step_leaves_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert main(["data", "--rows=40", "--sample=20", "--repeats=1", f"--base={checkpoints('gqa')}"]) == 0
    [path] = tmp_path.glob("*/data.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(data.STEPS)
    assert all(row["commit"] and row["versions"]["tokenizers"] and row["machine"] for row in rows)
    assert rows[0]["speed_against_raw"] > 0 and rows[1]["peak_bytes"] > 2**20
    assert rows[2]["tokens"] == rows[3]["tokens"]
