"""A cached source is the same rows, and never more than that: any change or damage makes it anew."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML_TEMPLATE, chatml_tokenizer, phi3_tokenizer, write_chats

from qlora_phi3 import entries
from qlora_phi3.data import Prepared, cache, parts, prepare, prompts, store
from qlora_phi3.data.tokens import Turns
from qlora_phi3.files import sha256
from qlora_phi3.recipe import Data, Evaluate, Fraction, Source, Train

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

    def __call__(self, *arguments: Any) -> dict[str, parts.Part]:
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
        *(split.system_prompt for split in (splits.train, splits.eval) if split is not None),
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


@pytest.mark.parametrize("limit", [0, 300], ids=["from the start", "on the way"])
def test_a_full_disk_costs_the_entry_alone(
    data: Data, made: Counter, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    expected = uncached(data, monkeypatch)
    monkeypatch.setattr(store, "SPILL", 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        found = prepare(data, PHI3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert shown(found) == expected
    assert made.count > 2  # once more
    assert [path.name for path in cache.root().iterdir()] == []


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
        assert sorted(path.name for path in entry.rglob("*") if path.is_file()) == sorted(FILES)
        [file] = entry.rglob(name)
        damage(file)
    assert shown(prepare(data, PHI3)) == expected
    assert made.count == 4
    assert shown(prepare(data, PHI3)) == expected
    assert made.count == 4


@pytest.mark.parametrize("content", ["[]", "null", '{"facts.json": 5}', "{}", "[" * 100_000])
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
    """It is hashed for the entry's name, and once more while its rows are taken: what is kept and what is
    recorded are the rows'."""

    def change(reading: parts.Reading, *rest: Any) -> dict[str, parts.Part]:
        with Path(reading.sources[-1].path).open("a") as file:
            file.write("\n")
        return parts.build(reading, *rest)

    monkeypatch.setattr(cache, "build", change)
    found = prepare(data, PHI3)
    assert list(cache.root().iterdir()) == []
    for _, source in found.sources:
        assert source.path is not None
        assert source.sha256 == sha256(Path(source.path))


def test_a_cache_that_cannot_be_written(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = uncached(data, monkeypatch)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert shown(prepare(data, PHI3)) == expected


def test_what_was_used_least_recently_goes_first(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> set[str]:
        return {path.name for path in cache.root().iterdir()}

    def make(limit: int) -> str:
        before = names() if cache.root().exists() else set()
        source = data.train.model_copy(update={"limit": limit})
        prepare(data.model_copy(update={"train": source, "eval": None}), PHI3)
        [name] = names() - before or {""}
        return name

    first, second = make(1), make(2)
    size = sum(file.stat().st_size for file in (cache.root() / second).rglob("*") if file.is_file())
    monkeypatch.setattr(cache, "MAX_BYTES", int(2.5 * size))
    for name, age in ((first, 100), (second, 200)):
        os.utime(cache.root() / name, (time.time() - age,) * 2)
    make(2)  # used again, and so it stays
    dead, alive = cache.root() / "unfinished-dead", cache.root() / "unfinished-alive"
    dead.mkdir(), alive.mkdir()
    os.utime(dead, (time.time() - entries.STALE_SECONDS - 1,) * 2)
    third = make(3)
    assert names() == {second, third, alive.name}


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


# --- several sources, and a share of one


@pytest.fixture
def mixed(tmp_path: Path) -> Data:
    paths = [write_chats(tmp_path / f"{i}.jsonl", rows=20 + i, turns=1 + i) for i in range(2)]
    return Data(train=[Source(path=str(path)) for path in paths], eval=Fraction(fraction=0.25))


def test_a_mix_with_a_share_is_one_entry(mixed: Data, made: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = uncached(mixed, monkeypatch)
    assert shown(prepare(mixed, PHI3)) == shown(prepare(mixed, PHI3)) == expected
    assert made.count == 1
    assert set(prepare(mixed, PHI3).parts) == {"train", "eval"}


CHANGES: dict[str, Any] = {
    "weight": lambda s: s.model_copy(update={"weight": 2.0}),
    "limit": lambda s: s.model_copy(update={"limit": 3}),
    "format": lambda s: s.model_copy(update={"format": "messages"}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1])
def test_each_source_counts(mixed: Data, made: Counter, change: str, which: int) -> None:
    prepare(mixed, PHI3)
    sources = list(mixed.train_sources)
    sources[which] = CHANGES[change](sources[which])
    prepare(mixed.model_copy(update={"train": tuple(sources)}), PHI3)
    assert made.count == 2


def test_the_bytes_order_and_share_of_all_sources_count(mixed: Data, made: Counter) -> None:
    prepare(mixed, PHI3)
    prepare(mixed.model_copy(update={"train": mixed.train_sources[::-1]}), PHI3)
    prepare(mixed.model_copy(update={"eval": Fraction(fraction=0.5)}), PHI3)
    prepare(mixed.model_copy(update={"eval": None}), PHI3)
    assert made.count == 4
    with Path(mixed.train_sources[1].path).open("a") as file:
        file.write("\n")
    prepare(mixed, PHI3)
    assert made.count == 5


def test_the_seed_counts_where_it_draws(data: Data, mixed: Data, made: Counter) -> None:
    def count(data: Data) -> int:
        before = made.count
        for seed in (1, 2):
            prepare(data, PHI3, Train(seed=seed))
        return made.count - before

    half = data.train_sources[0].model_copy(update={"weight": 1.5})
    assert count(mixed) == 2
    assert count(data) == 2  # one of each source
    assert count(data.model_copy(update={"train": half, "eval": None})) == 2


def test_what_rows_are_for_counts(tmp_path: Path, made: Counter) -> None:
    """Text is refused where answers are asked for, also when it is in the cache."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    data = Data(train=Source(path=str(path)), eval=Fraction(fraction=0.5))
    assert not any(part.problems.first for part in prepare(data, PHI3).parts.values())
    found = prepare(data, PHI3, evaluate=Evaluate(metrics=("exact_match",)))
    assert "evaluate.metrics" in found.parts["train"].problems.first[0].reason


def test_rows_with_tools_and_text_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_tools import FULL, SCHEMAS

    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    path, other = tmp_path / "a.jsonl", tmp_path / "b.txt"
    path.write_text(json.dumps({"messages": [user, answer], "tools": SCHEMAS}))
    other.write_text("a document")
    data = Data(train=[Source(path=str(path)), Source(path=str(other))])
    first, again = (prepare(data, FULL).splits().train for _ in range(2))
    assert list(first.rows) == list(again.rows)
    assert [talk.tools for talk in again.conversations] == [SCHEMAS]
    assert again.conversations == first.conversations


def test_hub_data_sets_are_not_cached(data: Data, tmp_path: Path) -> None:
    hub = Data(train=[*data.train_sources, Source(path="org/name")])
    assert cache.key(parts.Reading("train", hub, Train(), Evaluate(), PHI3, Turns.of(PHI3), 9)) is None
    assert cache.key(parts.Reading("train", data, Train(), Evaluate(), PHI3, Turns.of(PHI3), 9)) is not None


def test_the_shared_system_message_comes_back(tmp_path: Path, made: Counter) -> None:
    talk = [{"role": role, "content": "Be."} for role in ("system", "user", "assistant")]
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps({"messages": talk, "id": i}) + "\n" for i in range(3)))
    found = [prepare(Data(train=Source(path=str(path))), PHI3) for _ in range(2)]
    assert [one.splits().train.system_prompt for one in found] == ["Be.", "Be."]
    assert found[0].findings(2) == found[1].findings(2) and made.count == 1
