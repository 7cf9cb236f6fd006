"""Folders in the package's cache that are there whole or not at all: tokenized rows, quantized bases.

Owns how an entry gets its name, whether it is what was written, and how much of the disk entries take. Knows
nothing of what is in them; any may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import xxhash

from . import json_files

STALE_SECONDS: Final = 24 * 3600
"""Age of an unfinished entry after which the run that was writing it is taken for dead."""

_MANIFEST: Final = "manifest.json"
_UNFINISHED: Final = "unfinished-"
_BLOCK: Final = 2**20


def check(entry: Path) -> None:
    """Compare every file with the hash it was written with, and count the entry as used just now.

    Raises:
        OSError: it is missing, or a file cannot be read.
        ValueError: a file is not what was written.
    """
    if json_files.load(entry / _MANIFEST) != _hashes(entry):
        raise ValueError("a file is not what was written")
    os.utime(entry)


@contextmanager
def unfinished(root: Path) -> Iterator[Path]:
    """A folder to make an entry in; what is still in it goes at the end.

    Raises:
        OSError: `root` cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    files = [path for path in sorted(entry.rglob("*")) if path.is_file() and path != entry / _MANIFEST]
    return {path.relative_to(entry).as_posix(): _hash(path) for path in files}


def _hash(path: Path) -> str:
    """Of a file's bytes. Not cryptographic: it is against damage, and who can write here can write the
    manifest too. 5 GB a second on a busy core, sha256 0.8: half a second of a load instead of three."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _prune(newest: Path, max_bytes: int) -> None:
    found = {path: path.stat().st_mtime for path in newest.parent.iterdir()}
    room = max_bytes
    for path in sorted(found, key=lambda path: (path == newest, found[path]), reverse=True):
        if path.name.startswith(_UNFINISHED):
            if time.time() - found[path] > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
            continue
        room -= sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if room < 0 and path != newest:
            shutil.rmtree(path, ignore_errors=True)
