"""Files written whole or not at all, and hashes of what is in them.

Owns the one way to put a text under its name, so that a full disk or a kill leaves the old one. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

_BLOCK: Final = 2**20


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
    with path.open("rb") as file:
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
        with path.open("rb") as file:
            return lock(file)
    except OSError:
        return None
