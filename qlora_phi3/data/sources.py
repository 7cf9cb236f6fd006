"""Files of a source as rows, one at a time: JSONL, a JSON list, CSV, Parquet, text, or a folder of these.

Owns finding the files, their encodings, and the place of each row. A row that cannot be read comes as the
Problem it has, in its turn, so that all are told at once. Knows nothing of what a row means.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..errors import DataError, Problem, shown
from .provenance import Record, SourceFile

Row = tuple[str, Any]
"""Its place and its value, or the Problem that keeps it from having one."""

LIST_COLUMNS: Final = ("messages", "conversations")
"""Columns of a CSV whose cells hold JSON: a table has no lists of its own."""

DOCUMENTS: Final = (".md", ".rst")
"""Files that may lie beside the data; anything else that cannot be read is refused, not skipped."""

_GIVE: Final = (
    "Give a JSONL file, a .json list, a .csv, a .parquet, a .txt, or a folder of them: "
    "data.train.path=chats.jsonl."
)
_ONE_OBJECT: Final = "Write one JSON object a line."
_AGAIN: Final = "Write or download the file again."
_BATCH: Final = 256
"""Rows of Parquet that are decoded together."""


def files_of(path: Path) -> list[Path]:
    """The files that a source names, in name order, checked to be there without reading them.

    Raises:
        DataError: missing, unreadable, of an unknown kind, or a folder without data or with other files.
    """
    files = _in_folder(path) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise DataError(str(file), "no such file.", _GIVE)
        if file.suffix.lower() not in READERS:
            raise DataError(str(file), f"{file.suffix or 'no suffix'} is not available yet.", _GIVE)
        try:
            file.open("rb").close()
        except OSError as error:
            raise DataError(
                str(file), f"cannot be read: {error.strerror}.", "Check its permissions."
            ) from None
    return files


def _in_folder(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(str(folder), f"cannot be read: {error.strerror}.", "Check its permissions.") from None
    found = [path for path in found if path.suffix.lower() not in DOCUMENTS and path.stem != "LICENSE"]
    for path in found:
        if path.is_dir():
            raise DataError(
                str(path), "is a folder inside a folder.", "Give the path of one folder of files."
            )
        if path.suffix.lower() not in READERS:
            reason = f"{path.suffix or 'no suffix'} is not available yet, and nothing is skipped silently."
            raise DataError(str(path), reason, "Move it out of the folder, or give the path of one file.")
    if not found:
        raise DataError(str(folder), "is a folder without data files.", _GIVE)
    return found


def rows_of(files: list[Path], record: Record = lambda read: None) -> Iterator[Row]:
    """Rows of all files in turn; a file that breaks off gives a last Problem, and the next file follows.

    `record` gets what was read of each file, once it has been, or once nobody wants more rows.
    """
    for file in files:
        yield from _rows(file, record)


def _rows(path: Path, record: Record) -> Iterator[Row]:
    empty = True
    try:
        with SourceFile(path) as file:
            try:
                for row in READERS[path.suffix.lower()](file) if file.num_bytes else ():
                    empty = False
                    yield row
            finally:
                record(file.record())
    except DataError as error:
        empty = False
        yield from ((problem.place, problem) for problem in error.problems)
    except OSError as error:
        empty = False
        yield str(path), Problem(str(path), f"cannot be read: {error.strerror or error}.", "Check the disk.")
    if empty:
        yield str(path), Problem(str(path), "holds no rows.", "Write at least one conversation into it.")


def _jsonl(file: SourceFile) -> Iterator[Row]:
    """One JSON object a line; a bad line does not stop the next."""
    for place, line in _lines(file):
        if not line.strip():
            continue
        try:  # JSON counts columns from the last newline: none may be left
            value = _json(text_of(line.rstrip(), place), place, _ONE_OBJECT)
        except DataError as error:
            value = error.problems[0]
        yield place, value


def _lines(file: SourceFile) -> Iterator[tuple[str, bytes]]:
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


def _json(text: str, place: str, remedy: str, what: str = "") -> Any:
    return _decoded(partial(json.loads, text), place, remedy, what)


def _decoded(decode: Callable[[], Any], place: str, remedy: str, what: str = "") -> Any:
    try:
        return decode()
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        reason = f"{what}not valid JSON: {error.msg.removesuffix(' at')} at {where}."
        raise DataError(place, reason, remedy) from None
    except (RecursionError, ValueError) as error:  # ValueError: Python reads 4300 digits at most
        why = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise DataError(place, f"{what}not valid JSON: {why}.", remedy) from None


def _json_list(file: SourceFile) -> Iterator[Row]:
    """The objects of one JSON list, decoded one by one; the text is held, not all its values."""
    text = "".join(text_of(line, place) for place, line in _lines(file))
    decoder, at, number = json.JSONDecoder(), _skip(text, 0), 0
    if at == len(text):
        return
    _check_list(text[at], file)
    at = _skip(text, at + 1)
    closed = text.startswith("]", at)
    while not closed:
        number += 1
        place = f"{file}: row {number}"
        value, at = _decoded(partial(decoder.raw_decode, text, at), place, _AGAIN)
        yield place, value
        at = _skip(text, at)
        closed = text.startswith("]", at)
        if not closed:
            at = _skip(text, _after(",", text, at, place))
    at = _skip(text, at + 1)
    if at < len(text):
        where = f"{file}:{text.count(chr(10), 0, at) + 1}"
        raise DataError(where, "has more text after the list's end.", "Write one list: [{...}, {...}].")


def _check_list(first: str, file: SourceFile) -> None:
    if first != "[":
        found = "a JSON object, not a list of rows" if first == "{" else "not a JSON list of rows"
        remedy = "Write [{...}, {...}]; if it has one object a line, name it .jsonl."
        raise DataError(str(file), f"is {found}.", remedy)


def _document(file: SourceFile) -> Iterator[Row]:
    """The whole file as one row of plain text, its line ends as they are."""
    text = "".join(text_of(line, place) for place, line in _lines(file))
    yield str(file), {"text": text}


def _skip(text: str, at: int) -> int:
    """Index of the first character from `at` that is not JSON's white space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _after(mark: str, text: str, at: int, place: str) -> int:
    if text.startswith(mark, at):
        return at + 1
    reason = "the file ends inside the list" if at == len(text) else f"found {text[at]!r}, expected , or ]"
    raise DataError(place, f"not valid JSON after this row: {reason}.", _AGAIN)


def _csv(file: SourceFile) -> Iterator[Row]:
    """Records under a header; its place is the line it begins in. After a broken quote nothing is read."""
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 131,072 characters, is for the whole process
    lines = (text_of(line, place) for place, line in _lines(file))
    reader, header = csv.reader(lines, strict=True), None
    while True:
        place = f"{file}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = 'Put a cell that holds a quote, a comma or a new line into "...", and double its quotes.'
            raise DataError(place, f"not valid CSV: {_csv_reason(error)}.", remedy) from None
        if cells and header is None:
            header = _checked_header(cells, place)
        elif cells and header is not None:
            yield place, _record(header, cells, place)


def _csv_reason(error: csv.Error) -> str:
    reasons = {
        "unexpected end of data": "a quote is opened and not closed",
        "new-line character seen": "a line ends with a carriage return alone",
    }
    return next((why for start, why in reasons.items() if str(error).startswith(start)), str(error))


def _checked_header(names: list[str], place: str) -> list[str]:
    repeated = _repeated(names)
    if repeated:
        raise DataError(
            place, f"the header names {shown(repeated[0])} twice.", "Rename or remove one column."
        )
    blank = [name for name in names if name != name.strip()]
    if blank:
        remedy = "Remove the blanks around commas: they would become part of the text."
        raise DataError(place, f"the header's name {shown(blank[0])} begins or ends with a blank.", remedy)
    return names


def _repeated(names: list[str]) -> list[str]:
    return [name for i, name in enumerate(names) if name in names[:i]]


def _record(header: list[str], cells: list[str], place: str) -> dict[str, Any] | Problem:
    if len(cells) != len(header):
        reason = f"has {len(cells)} cells, the header names {len(header)}."
        return Problem(place, reason, 'Put a cell that holds a comma into "...".')
    record: dict[str, Any] = dict(zip(header, cells, strict=True))
    try:
        for key in LIST_COLUMNS:
            if key in record:
                record[key] = _json(record[key], place, "Write the list as JSON, or use JSONL.", f"{key} is ")
    except DataError as error:
        return error.problems[0]
    return record


def _parquet(file: SourceFile) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.hashed()) as table:
            repeated = _repeated(table.schema_arrow.names)
            if repeated:
                raise DataError(str(file), f"has two columns {shown(repeated[0])}.", "Rename or remove one.")
            for batch in table.iter_batches(batch_size=_BATCH):
                for i in range(batch.num_rows):
                    number += 1
                    place = f"{file}: row {number}"
                    yield place, _parquet_row(batch, i, place)
    except (pa.ArrowException, OSError) as error:  # OSError: a page that cannot be decoded
        place = f"{file}: row {number + 1}" if number else str(file)
        reason = f"not a whole Parquet file: {str(error).splitlines()[0].rstrip('.')}."
        raise DataError(place, reason, _AGAIN) from None


def _parquet_row(batch: Any, i: int, place: str) -> Any:
    try:
        return without_nulls(batch.slice(i, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return Problem(place, "has text that is not UTF-8.", "Convert the column to UTF-8.")
    except (ValueError, ArithmeticError, LookupError) as error:  # a time that Python cannot hold
        reason = f"has a value that cannot be read: {str(error).splitlines()[0]}."
        return Problem(place, reason, "Remove the column, or write it as text.")


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without the nulls inside its values: there they stand for keys that it never had."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


READERS: Final[dict[str, Callable[[SourceFile], Iterator[Row]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _document,
}
"""Reader by suffix, lower case."""
