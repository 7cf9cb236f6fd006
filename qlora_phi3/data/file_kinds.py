"""What a file is by its first bytes, where it is not what its name says, and what is no file at all.

Owns the signs of archives, web pages, pointers and other programs' files, and the way on from each.
"""

from __future__ import annotations

import re
from pathlib import Path
from stat import S_ISBLK, S_ISCHR, S_ISFIFO, S_ISSOCK
from typing import Final

from ..errors import DataError
from .provenance import SourceFile

_UNPACK: Final = "Unpack it, and give what was in it."
_AS_CSV: Final = "Save it as CSV (UTF-8) in its program."
_AS_JSONL: Final = "Write it as JSONL or Parquet with the program that made it."
_AS_PARQUET: Final = "Write it as Parquet: Dataset.to_parquet(path)."
_RAW: Final = "Download the raw file: this is the page that shows it, or asks to log in."
_SIGNS: Final = (
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),
    (rb"BZh[1-9]1AY", "a bzip2 archive", _UNPACK),
    (rb"\xfd7zXZ", "an xz archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (rb"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (
        rb"PK\x03\x04",
        "a zip archive, or a spreadsheet (.xlsx)",
        "Unpack it; a spreadsheet: save it as CSV (UTF-8) in its program.",
    ),
    (rb"\xd0\xcf\x11\xe0", "a spreadsheet (.xls)", _AS_CSV),
    (rb"PAR1", "a Parquet file", "Name it .parquet."),
    (rb"ARROW1|\xff\xff\xff\xff.\x00", "an Arrow file", _AS_PARQUET),
    (rb"SQLite format 3", "an SQLite database", _AS_JSONL),
    (rb"\x89HDF|\x93NUMPY|\x80[\x03-\x05]", "a file of arrays or pickled objects", _AS_JSONL),
    (
        rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|ID3|OggS|\x7fELF",
        "a picture, a sound or a program",
        "Give a file of rows.",
    ),
    (rb"%PDF-", "a PDF", "Give its text as .txt or JSONL."),
    (rb"version https://git-lfs", "a pointer of Git LFS", "Run `git lfs pull`, or download the file itself."),
)
_KINDS: Final = tuple((re.compile(sign, re.DOTALL), what, remedy) for sign, what, remedy in _SIGNS)
_PAGE: Final = re.compile(rb"\s*<(?:!doctype html|html|head)\b", re.IGNORECASE)
_PACKED: Final = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz")
_SHEETS: Final = (".xlsx", ".xls", ".ods")


def check_kind(file: SourceFile) -> None:
    """Refuse a file whose first bytes say that it is something else than its name.

    Raises:
        DataError: it is.
    """
    head = file.head()
    for sign, what, remedy in _KINDS:
        if sign.match(head) and not (what == "a Parquet file" and file.path.suffix.lower() == ".parquet"):
            raise DataError(str(file), f"is {what}, whatever its name says.", remedy)
    if _PAGE.match(head) and file.path.suffix.lower() != ".txt":
        raise DataError(str(file), "is a web page (HTML), whatever its name says.", _RAW)


def packed(suffix: str) -> str:
    """What to do with a file that has to be unpacked or exported first; nothing for other suffixes."""
    if suffix.lower() in _SHEETS:
        return _AS_CSV
    if suffix.lower() == ".arrow":
        return _AS_PARQUET
    return _UNPACK if suffix.lower() in _PACKED else ""


def special_kind(path: Path) -> str:
    """What a path names that is neither file nor folder; nothing where there is none, or it is one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""
    kinds = ((S_ISFIFO, "a pipe"), (S_ISSOCK, "a socket"), (S_ISCHR, "a device"), (S_ISBLK, "a device"))
    return next((what for test, what in kinds if test(mode)), "")
