"""JSON that others wrote, read strictly: of a file one answer, or one reason in words.

Owns every way in which a file or a text can fail to be JSON: no regular file, too large, not UTF-8, nested
too deeply, a key twice, endless numbers. Knows nothing of what the values mean, nor of torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from .errors import InputError, shown
from .files import read_bytes

MAX_BYTES: Final = 100 * 2**20
"""Of a file that people or programs write by hand; the largest tokenizer.json of the family has 16 MB."""

_BEGINNINGS: Final = (
    (b"\xef\xbb\xbf", "it begins with a byte order mark"),
    (b"\xff\xfe", "it is UTF-16, not UTF-8"),
    (b"\xfe\xff", "it is UTF-16, not UTF-8"),
    (b"version https://git-lfs", "it is Git LFS's note of a file, not the file (`git lfs pull` fetches it)"),
    (b"<", "it is a web page"),
)
"""How a file begins that is something else -> what that is."""
_LONGEST: Final = 4096
"""Bytes in which a file begins, blanks included."""


class NotJson(ValueError):
    """A text is not JSON; says why."""


class RepeatedKey(NotJson):
    """An object names a key twice; says the key."""

    def __str__(self) -> str:
        return f"it names the key {shown(self.args[0])} twice in one object"


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these names and values.

    Raises:
        RepeatedKey: a name stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKey(first_repeated([name for name, _ in pairs]))
    return found


def first_repeated(names: list[Any]) -> Any:
    """The first name that stands in the list before; None where all differ."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _constant(name: str) -> float:
    raise NotJson(f"it holds {name}, which is no number of JSON")


DECODER: Final = json.JSONDecoder(object_pairs_hook=unique_object)
"""Made once: `json.loads` with a hook makes one at every call."""
_STRICT: Final = json.JSONDecoder(object_pairs_hook=unique_object, parse_constant=_constant)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: str, *, strict: bool = False) -> Any:
    """What a text says; `strict`: without what Python alone writes, NaN, Infinity, half of a surrogate pair.

    Raises:
        NotJson: it is not JSON, or names a key twice.
    """
    try:
        found = (_STRICT if strict else DECODER).decode(text)
        if strict and _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except NotJson:
        raise
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise NotJson(f"it is not JSON: {error.msg.removesuffix(' at')} at {where}") from None
    except UnicodeEncodeError:
        raise NotJson("it holds half of a character (one of the two \\u codes of a pair)") from None
    except RecursionError:
        raise NotJson("it is nested too deeply") from None
    except ValueError:  # Python reads 4300 digits at most
        raise NotJson("a number in it has too many digits") from None


def read_text(path: Path, most: int | None = MAX_BYTES) -> str:
    """A UTF-8 text of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        NotJson: it is too large, or not UTF-8.
    """
    return _decoded(_content(path, most))


def load(path: Path, most: int | None = MAX_BYTES, *, strict: bool = False) -> Any:
    """What a file says, for those who make it anew where it cannot be read.

    Raises:
        OSError: it cannot be read.
        NotJson: as `parse` and `read_text`.
    """
    content = _content(path, most)
    if not content.strip():
        raise NotJson("it is empty")
    what = other_format(content[:_LONGEST])
    if what is not None:
        raise NotJson(what)
    return parse(_decoded(content), strict=strict)


def _content(path: Path, most: int | None) -> bytes:
    try:
        return read_bytes(path, most)
    except ValueError as error:
        raise NotJson(f"it is {error}") from None


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise NotJson("it is not UTF-8") from None


def other_format(content: bytes) -> str | None:
    """What a file is that begins so, where that is known not to be what was asked for."""
    begins = content.lstrip()
    return next((what for beginning, what in _BEGINNINGS if begins.startswith(beginning)), None)


def read(path: Path, error: type[InputError], remedy: str, *, missing: str = "", strict: bool = False) -> Any:
    """What a file says; `missing`: the remedy where there is no such file.

    Raises:
        InputError, of the kind given: it is missing, cannot be read or is not JSON.
    """
    try:
        return load(path, strict=strict)
    except FileNotFoundError:
        lost = "is a link to a file that is not there." if path.is_symlink() else "is missing."
        raise error(str(path), lost, missing or remedy) from None
    except (OSError, ValueError) as failure:
        raise error(str(path), f"cannot be read: {said(failure)}.", way_on(failure, remedy)) from None


def read_object(
    path: Path, error: type[InputError], remedy: str, *, missing: str = "", strict: bool = False
) -> dict[str, Any]:
    """As `read`, of a file that holds one object.

    Raises:
        InputError, of the kind given: as `read`, or it holds something else.
    """
    found = read(path, error, remedy, missing=missing, strict=strict)
    if not isinstance(found, dict):
        raise error(str(path), "is not a JSON object.", remedy)
    return found


def said(failure: OSError | ValueError) -> str:
    """What kept a file from being read, without the path that stands before it anyway."""
    return (getattr(failure, "strerror", None) or str(failure)).rstrip(".")


def way_on(failure: OSError | ValueError, remedy: str) -> str:
    """`remedy`, but for a file that its owner keeps to himself, which is whole."""
    return "Check who may read it." if isinstance(failure, PermissionError) else remedy
