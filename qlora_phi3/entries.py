"""Folders in the package's cache that are there whole or not at all: tokenized rows, quantized bases.

Owns how an entry gets its name, whether it is what was written, and how much of the disk entries take. Knows
nothing of what is in them; any may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import xxhash

from . import files, json_files

STALE_SECONDS: Final = 24 * 3600
"""Age of an unfinished entry after which the run that was writing it is taken for dead."""

_MANIFEST: Final = "manifest.json"
_UNFINISHED: Final = "unfinished-"
_LOCK: Final = ".lock"
_BLOCK: Final = 2**20


def check(entry: Path) -> None:
    """Compare every file with the hash it was written with, and count the entry as used just now.

    What dead processes left beside it goes.

    Raises:
        OSError: it is missing, or a file cannot be read.
        ValueError: a file is not what was written.
    """
    if json_files.load(entry / _MANIFEST) != _hashes(entry):
        raise ValueError("a file is not what was written")
    os.utime(entry)
    remove_dead(entry.parent)


@contextmanager
def unfinished(root: Path) -> Iterator[Path]:
    """A folder to make an entry in; what is still in it goes at the end, or when the cache is used next.

    Raises:
        OSError: `root` cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    remove_dead(root)
    folder = root / f"{_UNFINISHED}{secrets.token_hex(8)}"
    held = _lock_of(folder)
    try:
        with held.open("xb") as file:
            files.lock(file)
            folder.mkdir(mode=0o700)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        held.unlink(missing_ok=True)


def remove_dead(root: Path) -> None:
    """Remove what processes that ended without a chance to were making: nobody holds its lock any more."""
    for held in root.glob(f"{_UNFINISHED}*{_LOCK}"):
        folder = held.with_name(held.name.removesuffix(_LOCK))
        if folder.is_dir() and files.is_abandoned(held):
            shutil.rmtree(folder, ignore_errors=True)
            held.unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    """Beside it: the folder itself becomes the entry."""
    return folder.with_name(f"{folder.name}{_LOCK}")


def publish(folder: Path, entry: Path, max_bytes: int) -> None:
    """Complete an unfinished folder and give it its name at once; another run's of that name is as good.

    Then the entries used least recently beyond `max_bytes` go, and what dead runs left.

    Raises:
        OSError: no room, or no permission.
    """
    (folder / _MANIFEST).write_text(json.dumps(_hashes(folder)), encoding="utf-8")
    try:
        folder.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
    _prune(entry, max_bytes)


def _hashes(entry: Path) -> dict[str, str]:
    """By path inside the entry, of all files but the manifest."""
    found = [path for path in sorted(entry.rglob("*")) if path.is_file() and path != entry / _MANIFEST]
    return {path.relative_to(entry).as_posix(): _hash(path) for path in found}


def _hash(path: Path) -> str:
    """Of a file's bytes. Not cryptographic: it is against damage, and who can write here can write the
    manifest too. 5 GB a second on a busy core, sha256 0.8: half a second of a load instead of three."""
    digest = xxhash.xxh3_128()
    with files.open_file(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _size(entry: Path) -> int:
    """Bytes; of one that another process fills or removes at this moment, about."""
    total = 0
    for file in entry.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _prune(newest: Path, max_bytes: int) -> None:
    found: dict[Path, float] = {}
    for path in newest.parent.iterdir():
        with suppress(FileNotFoundError):  # another process is done with it
            found[path] = path.stat().st_mtime
    room = max_bytes
    for path in sorted(found, key=lambda path: (path == newest, found[path]), reverse=True):
        is_unfinished = path.name.startswith(_UNFINISHED)
        if is_unfinished and time.time() - found[path] > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
            continue
        room -= _size(path)
        if room < 0 and path != newest and not is_unfinished:
            shutil.rmtree(path, ignore_errors=True)
