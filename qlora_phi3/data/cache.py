"""Tokenized files that are kept from run to run, in `rows/` of the package's cache folder.

Owns when an entry is the same data, and which data is kept at all. A wrong or damaged entry never changes a
result: it is removed and made again. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from .. import builtin, entries
from ..errors import DataError, OutputError
from ..files import sha256
from ..recipe import Fraction
from .parts import Part, Reading, build
from .provenance import read_whole
from .read import check_source

MIN_BYTES: Final = 16 * 2**20
"""Fewer bytes are tokenized anew, in seconds: less than a model takes to load, and nothing is left."""
MAX_BYTES: Final = 8 * 2**30
"""All entries together; those used least recently go first. A million chats of 150 tokens are 0.7 GB."""

_LIBRARIES: Final = ("transformers", "tokenizers", "jinja2", "pyarrow")


def root() -> Path:
    """Where the entries are."""
    return builtin.cache_root() / "rows"


def key(reading: Reading) -> str | None:
    """Name of the entry for what is read; None for data that is not cached.

    `reading.read` gets what the files are. Their bytes are hashed, 1 s for a million chats: their times may
    lie after a copy or a checkout.
    All settings of `data` count, also those that come later, and so does the code of this folder. Data sets
    on the hub are not cached: nothing here tells whether they changed.
    """
    data, tokenizer = reading.data, reading.tokenizer
    files = _files(reading)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    large = sum(path.stat().st_size for path in files) >= MIN_BYTES
    if backend is None or not large or any(source.is_hub for source in reading.sources):
        return None
    reading.read[:] = [read_whole(path) for path in files]
    parts = {
        "sources": [source.model_dump(mode="json") for source in reading.sources],
        "splits": reading.splits,
        "lots": _lots(reading),
        "files": [[str(path), one.sha256] for path, one in zip(files, reading.read, strict=True)],
        "data": data.model_dump(mode="json", exclude={"train", "eval", "packing"}),
        "used for": [reading.train.task, *reading.evaluate.metrics],  # `read` refuses rows without use
        "num_kept": reading.num_kept,
        "tokenizer": [type(tokenizer).__name__, backend.to_str(), tokenizer.chat_template],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "code": [sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fetch(key: str, reading: Reading) -> dict[str, Part]:
    """The entry `key`, made where it is not there, or not whole.

    Two runs may make the same at once; the first to finish keeps it.

    Raises:
        DataError: a source is missing.
        ModelError: as `parts.build`.
    """
    entry = root() / key
    found = _load(entry, reading.splits)
    if found is not None:
        return found
    keyed = [one.sha256 for one in reading.read]
    with _unfinished() as folder:
        try:
            made = build(reading, folder)
        except (OSError, OutputError):  # a full disk: nothing is kept, four bytes a token are in memory
            return build(reading)
        sound = not any(part.problems.first for part in made.values())
        if sound and [one.sha256 for one in reading.read] == keyed:  # else they were changed meanwhile
            _publish(made, folder, entry)
    return made


def _lots(reading: Reading) -> list[float] | None:
    """The held-out share and the seed; None where nothing is drawn, whatever the seed."""
    held_out = reading.data.eval
    share = held_out.fraction if isinstance(held_out, Fraction) and "eval" in reading.splits else 0.0
    drawn = share or any(source.weight % 1 for source in reading.sources)
    return [share, reading.train.seed] if drawn else None


def _files(reading: Reading) -> list[Path]:
    try:
        return [path for source in reading.sources for path in check_source(source)]
    except DataError:  # it is told when it is read
        return []


def _load(entry: Path, splits: tuple[str, ...]) -> dict[str, Part] | None:
    """None where the entry is missing or damaged; a damaged one is removed."""
    try:
        entries.check(entry)
        return {name: Part.open(entry / name) for name in splits}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile):
        shutil.rmtree(entry, ignore_errors=True)
        return None


@contextmanager
def _unfinished() -> Iterator[Path]:
    """A folder to make an entry in; where the cache cannot be written, among the temporary files.

    Arrays that are mapped from it stay readable when it is gone.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(entries.unfinished(root()))
        except OSError:
            folder = stack.enter_context(entries.unfinished(Path(tempfile.gettempdir())))
        yield folder


def _publish(made: Mapping[str, Part], folder: Path, entry: Path) -> None:
    with suppress(OSError):  # no room, or no permission: the next run tokenizes again
        for name, part in made.items():
            part.save(folder / name)
        entries.publish(folder, entry, MAX_BYTES)
