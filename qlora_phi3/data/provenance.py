"""What was read of a source, recorded while it is read: the report tells of these bytes, not of later ones.

Owns hashing a file as it is read, and telling whether it was changed since. Knows nothing of rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

from typing_extensions import Self

from ..files import open_file

_BLOCK: Final = 2**20
_HEAD: Final = 512


@dataclass(frozen=True)
class SourceRead:
    """A file by what was read of it, or a data set on the hub by its commit.

    `stamp`: inode, size and time of the last write when it was read.
    """

    name: str
    sha256: str | None = None
    split: str | None = None
    revision: str | None = None
    path: str | None = None
    stamp: tuple[int, int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """As report.json has it: names and hashes, without the folders of this machine."""
        if self.path is None:
            return {"name": self.name, "split": self.split, "revision": self.revision}
        return {"name": self.name, "sha256": self.sha256}


Record = Callable[[SourceRead], None]


class SourceFile:
    """A file that is read once, opened once, and hashed on the way where anybody asks; as a text its path."""

    def __init__(self, path: Path, *, hashing: bool = True) -> None:
        self.path = path
        self._digest = hashlib.sha256() if hashing else None
        self._file = open_file(path)
        status = os.fstat(self._file.fileno())
        self.num_bytes = status.st_size
        self._stamp = (status.st_ino, status.st_size, status.st_mtime_ns)

    def __str__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def lines(self) -> Iterator[bytes]:
        """Its lines, with their ends."""
        for line in self._file:
            if self._digest is not None:
                self._digest.update(line)
            yield line

    def head(self) -> bytes:
        """Its first bytes, which are still to be read."""
        return self._file.peek(_HEAD)[:_HEAD]

    def hashed(self) -> BinaryIO:
        """The open file, hashed already, for readers that go to and fro in it."""
        if self._digest is not None:
            self._drain()
        self._file.seek(0)
        return self._file

    def record(self) -> SourceRead:
        """What it is; lines that nobody read count as well, since a hash of a part says nothing to others.

        Raises:
            OSError: its rest cannot be read.
        """
        assert self._digest is not None
        self._drain()
        name, digest = self.path.name, self._digest.hexdigest()
        return SourceRead(name, digest, path=str(self.path.absolute()), stamp=self._stamp)

    def _drain(self) -> None:
        assert self._digest is not None
        while block := self._file.read(_BLOCK):
            self._digest.update(block)


def read_whole(path: Path) -> SourceRead:
    """What a file is, read for its hash alone.

    Raises:
        OSError: it cannot be read.
    """
    with SourceFile(path) as file:
        return file.record()


def changed_since(sources: Iterable[SourceRead]) -> list[str]:
    """A sentence for each file that is not any more what was read of it."""
    return [found for one in sources if one.path is not None and (found := _change(one, Path(one.path)))]


def _change(one: SourceRead, path: Path) -> str | None:
    trained = f"what was read of it has the sha256 {one.sha256}"
    try:
        status = path.stat()
    except OSError:
        return f"{one.name} is no longer where it was read; {trained}"
    if (status.st_ino, status.st_size, status.st_mtime_ns) == one.stamp:
        return None
    return f"{one.name} was changed after it was read; {trained}"
