"""Files of a source as rows, one at a time: JSONL, a JSON list, CSV, Parquet, text, or a folder of these.

Owns finding the files, their encodings, and the place of each row. A row that cannot be read comes as the
Problem it has, in its turn, so that all are told at once. Knows nothing of what a row means.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Final

from ..errors import DataError, Problem, is_file, is_folder, shown
from ..files import open_file
from ..json_files import first_repeated
from .file_kinds import check_kind, packed, special_kind
from .json_rows import rows_of_lines, rows_of_list, starts_list
from .provenance import Record, SourceFile
from .text_lines import lines_of, text_of

Row = tuple[str, Any]
"""Its place and its value, or the Problem that keeps it from having one."""

DOCUMENTS: Final = (".md", ".rst")
"""Files that may lie beside the data; anything else that cannot be read is refused, not skipped."""

_GIVE: Final = "Give a JSONL file, a .json list, a .csv, a .parquet, a .txt, or a folder of them."
_AGAIN: Final = "Write or download the file again."
MAX_LISTED: Final = 8
"""File names that a message lists."""
_SHARD: Final = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")
_SPLITS: Final = {
    name: re.compile(rf"\A({words})(?=[-_.]|\Z)|(?<=[-_.])({words})\Z")
    for name, words in (
        ("train", "train|training"),
        ("valid", "valid|validation|val|dev|eval|heldout|held[-_]out|holdout"),
        ("test", "test|testing"),
    )
}
"""Split -> what the names of its files begin or end with."""
_BATCH: Final = 256
"""Rows of Parquet that are decoded together."""


def files_of(path: Path) -> list[Path]:
    """The files that a source names, in name order, checked to be there without reading them.

    Raises:
        DataError: missing, unreadable, of an unknown kind, or a folder without data, with other files, or
            with files of several splits.
    """
    files = _in_folder(path) if is_folder(path, DataError) else [path]
    for file in files:
        if not is_file(file, DataError):
            if kind := special_kind(file):
                raise DataError(str(file), f"is {kind}, not a file.", "Write its rows into a file first.")
            if {"http:", "https:", "hf:", "s3:", "gs:"} & set(file.parts):
                remedy = "Download it, and give the file; a data set of the hub is org/name."
                raise DataError(str(file), "is an address, and only files are read.", remedy)
            raise DataError(str(file), "no such file.", _beside(file))
        if file.suffix.lower() not in READERS:
            reason = f"{file.suffix or 'no suffix'} is not available yet."
            raise DataError(str(file), reason, packed(file.suffix) or _GIVE)
        try:
            open_file(file).close()
        except OSError as error:
            raise _unreadable(file, error) from None
    return files


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(str(path), f"cannot be read: {error.strerror}.", "Check its permissions.")


def _beside(file: Path) -> str:
    """What is in the folder where a file is not."""
    folder = file.parent
    try:
        found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in READERS)
    except OSError:
        return f"There is no folder {folder} either. In a recipe, paths begin at its folder."
    if not found:
        return f"Its folder holds no data file. {_GIVE}"
    near = get_close_matches(file.name, found, 1, 0.75)
    guess = f"Did you mean {near[0]}? " if near else ""
    more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    return f"{guess}In its folder: {', '.join(found[:MAX_LISTED])}{more}."


def _in_folder(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from None
    found = [path for path in found if path.suffix.lower() not in DOCUMENTS and path.stem != "LICENSE"]
    for path in found:
        if is_folder(path, DataError):
            raise DataError(
                str(path), "is a folder inside a folder.", "Give the path of one folder of files."
            )
        if path.suffix.lower() not in READERS:
            reason = f"{path.suffix or 'no suffix'} is not available yet, and nothing is skipped silently."
            remedy = packed(path.suffix) or "Move it out of the folder, or give the path of one file."
            raise DataError(str(path), reason, remedy)
    if not found:
        raise DataError(str(folder), "is a folder without data files.", _GIVE)
    _check_one_split(folder, found)
    return found


def _check_one_split(folder: Path, files: list[Path]) -> None:
    """Refuse to mix rows to train on with rows to measure with, which only the files' names tell apart."""
    splits = {path: _split_of(path) for path in files}
    if len(set(splits.values())) == 1 or not {"valid", "test"} & set(splits.values()):
        return
    names = [path.name for path in files]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    reason = f"holds files of several splits: {', '.join(names[:MAX_LISTED])}{more}."
    by_split = {name: [path for path in files if splits[path] == name] for name in ("train", "valid", "test")}
    train = by_split["train"] or [path for path in files if splits[path] == ""]
    held_out = by_split["valid"] or by_split["test"]
    if len(train) == len(held_out) == 1:
        remedy = f"Name the files: data.train.path={train[0]} data.eval.path={held_out[0]}."
    else:
        remedy = "Put the files of each split into a folder of its own: data.train.path and data.eval.path."
    raise DataError(str(folder), reason, remedy)


def _split_of(path: Path) -> str:
    """`train`, `valid` or `test`, where the name says so: `train-00000-of-00003.parquet`; else nothing."""
    stem = _SHARD.sub("", path.stem.casefold())
    for name, pattern in _SPLITS.items():
        if pattern.fullmatch(stem) if path.suffix.lower() == ".txt" else pattern.search(stem):
            return name
    return ""


def rows_of(files: list[Path], record: Record | None = None) -> Iterator[Row]:
    """Rows of all files in turn; a file that breaks off gives a last Problem, and the next file follows.

    `record` gets what was read of each file, once it has been, or once nobody wants more rows; without it
    nothing beyond the rows is read.
    """
    for file in files:
        yield from _rows(file, record)


def _rows(path: Path, record: Record | None) -> Iterator[Row]:
    empty = True
    try:
        with SourceFile(path, hashing=record is not None) as file:
            check_kind(file)
            try:
                for row in READERS[path.suffix.lower()](file) if file.num_bytes else ():
                    empty = False
                    yield row
            finally:
                if record is not None:
                    record(file.record())
    except DataError as error:
        empty = False
        yield from ((problem.place, problem) for problem in error.problems)
    except OSError as error:
        empty = False
        yield str(path), Problem(str(path), f"cannot be read: {error.strerror or error}.", "Check the disk.")
    if empty:
        yield str(path), Problem(str(path), "holds no rows.", "Write at least one conversation into it.")


def _json(file: SourceFile) -> Iterator[Row]:
    """One JSON object a line or one list of them, whichever the file begins like: names are often wrong."""
    lines = lines_of(file)
    before, first = [], None
    for first in lines:
        if first[1].strip():
            break
        before.append(first)
    if first is None or not first[1].strip():
        return
    every = chain([first], lines)
    if starts_list(first[1], file.path.suffix.lower()):
        text = "".join(text_of(line, place) for place, line in chain(before, every))
        yield from rows_of_list(text, str(file))
    else:
        yield from rows_of_lines(every, str(file))


def _document(file: SourceFile) -> Iterator[Row]:
    """The whole file as one row of plain text, its line ends as they are."""
    text = "".join(text_of(line, place) for place, line in lines_of(file))
    yield str(file), {"text": text}


def _csv(file: SourceFile) -> Iterator[Row]:
    """Records under a header; its place is the line it begins in. After a broken quote nothing is read."""
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 131,072 characters, is for the whole process
    lines = (text_of(line, place) for place, line in lines_of(file))
    first = next(lines, "")
    if first.lstrip().startswith(("{", "[{")):
        raise DataError(str(file), "holds JSON, whatever its name says.", "Name it .jsonl.")
    separator = _separator(first, file.path.suffix)
    reader, header = csv.reader(chain([first], lines), delimiter=separator, strict=True), None
    while True:
        place = f"{file}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason, remedy = _csv_reason(error)
            raise DataError(place, f"not valid CSV: {reason}.", remedy) from None
        if header is None and any(cell.strip() for cell in cells):
            header = _checked_header(cells, place)
        elif cells and header is not None:
            yield place, _record(header, cells, place)


def _separator(header: str, suffix: str) -> str:
    """What separates columns: spreadsheets of many countries write semicolons, and some tabs."""
    if suffix.lower() == ".tsv" and "\t" in header:
        return "\t"
    return next((mark for mark in ("\t", ";") if "," not in header and mark in header), ",")


def _csv_reason(error: csv.Error) -> tuple[str, str]:
    """What is wrong in a CSV, and what mends it."""
    quoting = 'Put a cell that holds a quote, a comma or a new line into "...", and double its quotes.'
    if str(error).startswith("new-line character seen"):
        return "a line ends with a carriage return alone", "Convert its line ends to new lines."
    if str(error).startswith("unexpected end of data"):
        return "a quote is opened and not closed", quoting
    return str(error), quoting


def _checked_header(names: list[str], place: str) -> list[str]:
    repeated = first_repeated(names)
    if repeated is not None:
        raise DataError(place, f"the header names {shown(repeated)} twice.", "Rename or remove one column.")
    blank = [name for name in names if name != name.strip()]
    if blank:
        remedy = "Remove the blanks around commas: they would become part of the text."
        raise DataError(place, f"the header's name {shown(blank[0])} begins or ends with a blank.", remedy)
    return names


def _record(header: list[str], cells: list[str], place: str) -> dict[str, Any] | Problem:
    if len(cells) != len(header):
        reason = f"has {len(cells)} cells, the header names {len(header)}."
        return Problem(place, reason, 'Put a cell that holds a comma into "...".')
    return dict(zip(header, cells, strict=True))


def _parquet(file: SourceFile) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.hashed()) as table:
            repeated = first_repeated(table.schema_arrow.names)
            if repeated is not None:
                raise DataError(str(file), f"has two columns {shown(repeated)}.", "Rename or remove one.")
            for batch in table.iter_batches(batch_size=_BATCH):
                for i in range(batch.num_rows):
                    number += 1
                    place = f"{file}: row {number}"
                    yield place, _parquet_row(batch, i, place)
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError) as error:
        # OSError: a page that cannot be decoded; ValueError: a damaged name
        place = f"{file}: row {number + 1}" if number else str(file)
        if "encrypted" in str(error):
            raise DataError(place, "is encrypted.", "Write it without encryption.") from None
        reason = f"not a whole Parquet file: {first_line(error)}."
        raise DataError(place, reason, _AGAIN) from None


def first_line(error: Exception) -> str:
    """What another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _parquet_row(batch: Any, i: int, place: str) -> Any:
    try:
        return without_nulls(batch.slice(i, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return Problem(place, "has text that is not UTF-8.", "Convert the column to UTF-8.")
    except (ValueError, ArithmeticError, LookupError) as error:  # a time that Python cannot hold
        reason = f"has a value that cannot be read: {first_line(error)}."
        return Problem(place, reason, "Remove the column, or write it as text.")


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the nulls inside its values: there they stand for keys that it never had."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


READERS: Final[dict[str, Callable[[SourceFile], Iterator[Row]]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _document,
}
"""Reader by suffix, lower case."""
