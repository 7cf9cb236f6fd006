"""entries.py: an entry is there whole or not at all, and the oldest make room."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from qlora_phi3 import entries

MANY = 2**40


def make(root: Path, name: str, content: bytes = b"x" * 1000, max_bytes: int = MANY) -> Path:
    with entries.unfinished(root) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(content)
        entries.publish(folder, root / name, max_bytes)
    return root / name


@pytest.mark.parametrize("num_bytes", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_what_was_written_is_whole(tmp_path: Path, num_bytes: int) -> None:
    entry = make(tmp_path / "root", "one", os.urandom(num_bytes))
    os.utime(entry, (1000, 1000))
    entries.check(entry)
    assert entry.stat().st_mtime > time.time() - 60  # used just now
    assert [path.name for path in entry.parent.iterdir()] == ["one"]


def test_the_hash_is_the_known_one(tmp_path: Path) -> None:
    """XXH3-128 of nothing, and of a file of several blocks at once."""
    import xxhash

    content = hashlib.shake_256(b"seed").digest(2**21 + 17)
    found = [json.loads((make(tmp_path, n, c) / "manifest.json").read_text())
             for n, c in (("a", b""), ("b", content))]  # fmt: skip
    assert found[0] == {"deep/file": "99aa06d3014798d86001c324468d497f"}
    assert found[1] == {"deep/file": xxhash.xxh3_128_hexdigest(content)}


def test_damage_of_any_byte(tmp_path: Path) -> None:
    content = os.urandom(50)
    for i in range(len(content)):
        entry = make(tmp_path, str(i), content)
        damaged = bytearray(content)
        damaged[i] ^= 1
        (entry / "deep" / "file").write_bytes(damaged)
        with pytest.raises(ValueError, match="not what was written"):
            entries.check(entry)


def test_missing_entry(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        entries.check(tmp_path / "none")


def test_an_unfinished_entry_goes_when_its_making_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with entries.unfinished(tmp_path / "root") as folder:
            (folder / "file").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "root").iterdir()) == []


def test_the_first_of_two_stays(tmp_path: Path) -> None:
    make(tmp_path, "one", b"first")
    entry = make(tmp_path, "one", b"second")
    assert (entry / "deep" / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    def publish() -> None:
        with entries.unfinished(tmp_path / "root") as folder:
            shutil.rmtree(tmp_path / "root")
            entries.publish(folder, tmp_path / "root" / "one", MANY)

    with pytest.raises(OSError, match="No such file"):
        publish()


def _begin_and_die(root: str) -> None:
    with entries.unfinished(Path(root)) as folder:
        (folder / "file").write_bytes(b"x" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such lock: there a day's age decides")
@pytest.mark.parametrize("use", ["check", "unfinished"])
def test_what_a_killed_process_left_goes_at_the_next_use(tmp_path: Path, use: str) -> None:
    root = tmp_path / "root"
    entry = make(root, "one")
    child = multiprocessing.get_context("fork").Process(target=_begin_and_die, args=(str(root),))
    child.start()
    child.join()
    with entries.unfinished(root) as alive:  # removes the dead one itself
        assert {path.name for path in root.iterdir() if path.is_dir()} == {"one", alive.name}
        entries.check(entry)
        assert alive.is_dir()
    child = multiprocessing.get_context("fork").Process(target=_begin_and_die, args=(str(root),))
    child.start()
    child.join()
    assert len(list(root.iterdir())) == 3
    entries.check(entry) if use == "check" else make(root, "two")
    assert not list(root.glob("unfinished-*"))


def test_what_another_process_is_making_counts(tmp_path: Path) -> None:
    os.utime(make(tmp_path, "old"), (1000, 1000))
    with entries.unfinished(tmp_path) as folder:
        (folder / "file").write_bytes(b"x" * 5000)
        make(tmp_path, "new", max_bytes=5000)
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"new", folder.name}


def test_the_oldest_make_room(tmp_path: Path) -> None:
    for age, name in enumerate(("oldest", "older", "old")):
        os.utime(make(tmp_path, name), (1000 + age, 1000 + age))
    dead, alive = tmp_path / "unfinished-dead", tmp_path / "unfinished-alive"
    dead.mkdir(), alive.mkdir()
    os.utime(dead, (time.time() - entries.STALE_SECONDS - 1,) * 2)
    size = sum(file.stat().st_size for file in (tmp_path / "old").rglob("*") if file.is_file())
    make(tmp_path, "new", max_bytes=2 * size)
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new", alive.name}
