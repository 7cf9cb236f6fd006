"""Files written whole or not at all, read without waiting, and hashes of what is in them.

Owns the one way to put a text under its name, so that a full disk or a kill leaves the old one, and the one
way to open what others have put there. No torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, Final

from .units import format_bytes

_BLOCK: Final = 2**20


def open_file(path: Path) -> BufferedReader:
    """A regular file to read. A pipe in its place would have the reader wait, a device never end.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    opener = _without_waiting if os.name == "posix" else None
    file = open(path, "rb", opener=opener)  # noqa: SIM115  # it is the caller's to close
    mode = os.fstat(file.fileno()).st_mode
    if not S_ISREG(mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """All of a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `most` bytes.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(f"larger than {format_bytes(most)}")
        return file.read(size)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under `path`: all of it, or nothing new. A link there is replaced, not followed.

    Half a surrogate pair, which UTF-8 has no bytes for, is written as in JSON: backslash, u, four digits.

    Raises:
        OSError: it cannot be written, of which nothing is left.
    """
    content = text.encode("utf-8", "backslashreplace")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("xb") as file:  # its mode is the user's umask, as tempfile's would not be
            file.write(content)
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file, and nobody knows the unfinished one
        raise


def write_json(path: Path, content: Any) -> None:
    """Write one JSON document, readable for people; errors as `write_text`."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """One JSON document as our files have it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def lock(file: IO[Any]) -> bool | None:
    """Hold an open file until it is closed or the process ends, in whatever way.

    False: another process holds it, and so lives; None: this system or its disk cannot tell.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_abandoned(path: Path) -> bool | None:
    """Whether a file that its process held by `lock` has outlived it; None where that cannot be told."""
    try:
        with open_file(path) as file:
            return lock(file)
    except OSError:
        return None
