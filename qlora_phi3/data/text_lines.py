"""Lines of a file with their places, and their text.

Owns encodings: text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from ..errors import DataError
from .provenance import SourceFile


def lines_of(file: SourceFile) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) of every line; a BOM is dropped."""
    for number, line in enumerate(file.lines(), start=1):
        yield f"{file}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def text_of(line: bytes, place: str) -> str:
    """A line's text.

    Raises:
        DataError: not UTF-8, or with NUL bytes, as UTF-16 and files cut off by a crash have them.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text (byte {error.start + 1} of the line)."
        raise DataError(place, reason, "Convert the file to UTF-8.") from None
    if "\0" in text:
        reason = f"has a NUL byte (character {text.index(chr(0)) + 1} of the line): this is not UTF-8 text."
        raise DataError(place, reason, "Convert the file to UTF-8, or write it again.")
    return text
