"""Rows of JSON files: one object a line, or one list of objects.

Owns telling the two apart, and how other tables in JSON are told. A row that cannot be read comes as its
Problem, in its turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Final

from ..errors import DataError, shown
from ..json_files import DECODER, RepeatedKey
from .json_text import decoded, parse, repeated
from .text_lines import text_of

_ONE_OBJECT: Final = "Write one JSON object a line."
_AGAIN: Final = "Write or download the file again."
_LIST: Final = "Write [{...}, {...}], or one object a line."
_BY_ROWS: Final = 'Write df.to_json("rows.jsonl", orient="records", lines=True).'
_TABLES: Final = (*("data", "rows", "records", "examples", "train", "test", "valid", "validation", "dev"),)
"""Keys under which files hold all their rows."""


def starts_list(line: bytes, suffix: str) -> bool:
    """Whether a file whose first line this is holds one value instead of one a line."""
    text = line.strip()
    if suffix == ".json":
        return not (text.startswith(b"{") and isinstance(_whole(text), dict))
    if not text.startswith(b"[") or text[1:].lstrip()[:1] not in (b"{", b""):
        return False
    found = _whole(text)
    if not isinstance(found, list):
        return True
    first = found[0] if found else None
    return isinstance(first, dict) and not {"role", "from"} & set(first)  # else one conversation a line


def _whole(text: bytes) -> Any:
    """What a line says by itself; None where it is no value."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def rows_of_lines(lines: Iterable[tuple[str, bytes]], file: str) -> Iterator[tuple[str, Any]]:
    """One JSON object a line; a bad line does not stop the next."""
    rows = (row for place, line in lines if line.strip() for row in (_row(place, line),))
    first = next(rows, None)
    if first is None:
        return
    second = next(rows, None)
    if second is None and (told := _table(first[1])):
        raise DataError(file, *told)
    yield first
    if second is not None:
        yield second
        yield from rows


def _row(place: str, line: bytes) -> tuple[str, Any]:
    remedy = _ONE_OBJECT
    if b"\r" in line.strip():
        remedy = "Its lines end with a carriage return alone: convert them to new lines."
    try:  # JSON counts columns from the last newline: none may be left
        return place, parse(text_of(line.rstrip(), place), place, remedy)
    except DataError as error:
        return place, error.problems[0]


def rows_of_list(text: str, file: str) -> Iterator[tuple[str, Any]]:
    """The objects of one JSON list, decoded one by one; the text is held, not all its values."""
    at, number = _skip(text, 0), 0
    _check_list(text, at, file)
    at = _skip(text, at + 1)
    closed = text.startswith("]", at)
    while not closed:
        number += 1
        place = f"{file}: row {number}"
        value, at = decoded(partial(_row_at, text, at, place), place, _AGAIN)
        yield place, value
        at = _skip(text, at)
        closed = text.startswith("]", at)
        if not closed:
            at = _skip(text, _after(",", text, at, place))
            if text.startswith("]", at):
                raise DataError(place, "not valid JSON: a comma follows the last row.", "Remove the comma.")
    at = _skip(text, at + 1)
    if at < len(text):
        where = f"{file}:{text.count(chr(10), 0, at) + 1}"
        raise DataError(where, "has more text after the list's end.", "Write one list: [{...}, {...}].")


def _row_at(text: str, at: int, place: str) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends; a key twice spoils this row only."""
    try:
        return DECODER.raw_decode(text, at)
    except RepeatedKey as error:
        return repeated(error, place).problems[0], json.JSONDecoder().raw_decode(text, at)[1]


def _check_list(text: str, at: int, file: str) -> None:
    """Refuse a file that holds something else than a list.

    Raises:
        DataError: one object, of a table perhaps, or anything else.
    """
    if text.startswith("[", at):
        return
    if not text.startswith("{", at):
        raise DataError(file, "is not a JSON list of rows.", _LIST)
    found = decoded(partial(DECODER.decode, text), file, _AGAIN)
    reason, remedy = _table(found) or ("is a JSON object, not a list of rows.", _LIST)
    raise DataError(file, reason, remedy)


def _table(value: Any) -> tuple[str, str] | None:
    """Why one object is no row, where it is a whole table, and the way on."""
    if not isinstance(value, dict) or not value:
        return None
    inner = [one for one in value.values() if isinstance(one, dict)]
    numbered = all(str(key).isdigit() for key in value) or all(
        one and all(str(key).isdigit() for key in one) for one in inner
    )
    if len(inner) == len(value) and numbered:
        return "is one object, a table as pandas writes it.", _BY_ROWS
    if isinstance(value.get("data"), list) and {"columns", "schema"} & set(value):
        return "is one object, a table as pandas writes it.", _BY_ROWS
    lists = [
        key for key, one in value.items() if isinstance(one, list) and (not one or isinstance(one[0], dict))
    ]
    key = next((key for key in lists if key.casefold() in _TABLES), None)
    if key is not None:
        return f"is one object, with its rows under {shown(key)}.", "Write the list alone: [{...}, {...}]."
    return None


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
