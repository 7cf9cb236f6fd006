"""A cached source is the same rows, and never more than that: any change or damage makes it anew."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML_TEMPLATE, chatml_tokenizer, phi3_tokenizer, write_chats

from qlora_phi3.data import Prepared, cache, parts, prepare, prompts
from qlora_phi3.recipe import Data, Source

PHI3 = phi3_tokenizer()


@pytest.fixture(autouse=True)
def _caches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PHI3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_BYTES", 0)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    rows = Source(path=str(write_chats(tmp_path / "train.jsonl", turns=3)))
    held_out = Source(path=str(write_chats(tmp_path / "eval.jsonl", rows=4)))
    return Data(train=rows, eval=held_out, max_length=60, overlong="truncate")


class Counter:
    """How often a source was tokenized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(cache, "build", self)

    def __call__(self, *arguments: Any) -> parts.Part:
        self.count += 1
        return parts.build(*arguments)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def shown(found: Prepared) -> list[Any]:
    """All that a run or the doctor reads of it."""
    splits = found.splits()
    return [
        found.findings(64),
        *([*split.rows] for split in (splits.train, splits.eval) if split is not None),
        *(split.to_json() for split in (splits.train, splits.eval) if split is not None),
        *(split.conversations for split in (splits.train, splits.eval) if split is not None),
        *((part.lengths.tolist(), part.num_supervised, part.num_read) for part in found.parts.values()),
    ]


def uncached(data: Data, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "MIN_BYTES", 1 << 40)
        return shown(prepare(data, PHI3))


def test_the_second_time_nothing_is_tokenized(
    data: Data, made: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = uncached(data, monkeypatch)
    assert shown(prepare(data, PHI3)) == expected
    assert made.count == 2
    again = prepare(data, PHI3)
    assert (shown(again), made.count) == (expected, 2)
    held_out = again.splits().eval
    assert held_out is not None and len(prompts(held_out, PHI3, 3)) == 3


def test_small_sources_are_not_cached(data: Data, made: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    uncached(data, monkeypatch)
    assert made.count == 0 and not cache.root().exists()


@pytest.mark.parametrize(
    "change", [{"max_length": 61}, {"overlong": "drop"}, {"loss_on": "last"}, {"train": {"limit": 5}}]
)
def test_other_settings_are_other_entries(data: Data, made: Counter, change: dict[str, Any]) -> None:
    prepare(data, PHI3)
    if "train" in change:
        change = {"train": data.train.model_copy(update=change["train"])}
    found = prepare(data.model_copy(update=change), PHI3)
    assert made.count == (3 if "train" in change else 4)
    assert len(found.parts["train"].rows) <= 12


def test_other_bytes_of_the_same_length_and_time(data: Data, made: Counter) -> None:
    path = Path(data.train.path)
    before, stat = prepare(data, PHI3), path.stat()
    path.write_text(path.read_text().replace("say 1", "say 7"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = prepare(data, PHI3)
    assert made.count == 3
    assert list(after.splits().train.rows) != list(before.splits().train.rows)


def test_other_tokenizers_and_templates(data: Data, made: Counter) -> None:
    other = phi3_tokenizer()
    other.chat_template = other.chat_template.replace("eos_token", "''")
    for tokenizer in (PHI3, chatml_tokenizer(), other, phi3_tokenizer()):
        prepare(data, tokenizer)
    assert made.count == 6
    assert other.chat_template != CHATML_TEMPLATE


def test_rows_with_problems_are_not_cached(data: Data, made: Counter) -> None:
    with Path(data.train.path).open("a") as file:
        file.write("{\n")
    for _ in range(2):
        assert prepare(data, PHI3).parts["train"].problems.first
    assert made.count == 3
    assert len(list(cache.root().iterdir())) == 1


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [_truncate, _flip, Path.unlink, lambda path: path.write_bytes(b"")]
FILES = ["ids.int32", "arrays.npz", "part.npz", "facts.json", "prefixes.json", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_entry_is_made_again(
    data: Data, made: Counter, monkeypatch: pytest.MonkeyPatch, name: str, damage: Any
) -> None:
    expected = uncached(data, monkeypatch)
    prepare(data, PHI3)
    for entry in cache.root().iterdir():
        assert sorted(path.name for path in entry.iterdir()) == sorted(FILES)
        damage(entry / name)
    assert shown(prepare(data, PHI3)) == expected
    assert made.count == 4
    assert shown(prepare(data, PHI3)) == expected
    assert made.count == 4


@pytest.mark.parametrize("content", ["[]", "null", '{"facts.json": 5}', "{}"])
def test_a_manifest_of_another_shape(data: Data, made: Counter, content: str) -> None:
    prepare(data, PHI3)
    for entry in cache.root().iterdir():
        (entry / "manifest.json").write_text(content)
    prepare(data, PHI3)
    assert made.count == 4


def test_two_runs_at_once(data: Data, made: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = uncached(data, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shown(prepare(data, phi3_tokenizer())), range(4)))
    assert found == [expected] * 4
    assert len(list(cache.root().iterdir())) == 2  # entries, nothing unfinished
    assert shown(prepare(data, PHI3)) == expected


def test_rows_stay_readable_when_their_entry_goes(data: Data) -> None:
    rows = prepare(data, PHI3).splits().train.rows
    before = list(rows)
    shutil.rmtree(cache.root())
    assert list(rows) == before


def test_a_file_that_changes_while_it_is_read(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(source: Source, *rest: Any) -> parts.Part:
        found = parts.build(source, *rest)
        with Path(source.path).open("a") as file:
            file.write("\n")
        return found

    monkeypatch.setattr(cache, "build", change)
    prepare(data, PHI3)
    assert list(cache.root().iterdir()) == []


def test_a_cache_that_cannot_be_written(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = uncached(data, monkeypatch)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert shown(prepare(data, PHI3)) == expected


def test_what_was_used_least_recently_goes_first(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def entries() -> set[str]:
        return {path.name for path in cache.root().iterdir()}

    def make(limit: int) -> str:
        before = entries() if cache.root().exists() else set()
        source = data.train.model_copy(update={"limit": limit})
        prepare(data.model_copy(update={"train": source, "eval": None}), PHI3)
        [name] = entries() - before or {""}
        return name

    first, second = make(1), make(2)
    size = sum(file.stat().st_size for file in (cache.root() / second).iterdir())
    monkeypatch.setattr(cache, "MAX_BYTES", int(2.5 * size))
    for name, age in ((first, 100), (second, 200)):
        os.utime(cache.root() / name, (time.time() - age,) * 2)
    make(2)  # used again, and so it stays
    dead, alive = cache.root() / "unfinished-dead", cache.root() / "unfinished-alive"
    dead.mkdir(), alive.mkdir()
    os.utime(dead, (time.time() - cache.STALE_SECONDS - 1,) * 2)
    third = make(3)
    assert entries() == {second, third, alive.name}


def test_a_newest_entry_over_the_limit_stays(
    data: Data, made: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    prepare(data.model_copy(update={"eval": None}), PHI3)
    prepare(data.model_copy(update={"eval": None}), PHI3)
    assert made.count == 1


def test_entries_hold_no_pickles(data: Data) -> None:
    prepare(data, PHI3)
    for entry in cache.root().iterdir():
        manifest = json.loads((entry / "manifest.json").read_text())
        assert {Path(name).suffix for name in manifest} == {".int32", ".npz", ".json"}
