"""Read conversations from files: one JSON object a line, every problem with its file and line.

Owns sources and the check of a row's shape. Knows nothing of tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from ..errors import DataError, Problem
from ..recipe import Data, Source

Role = Literal["system", "user", "assistant"]
ROLES: Final = ("system", "user", "assistant")
MAX_PROBLEMS: Final = 20
"""Problems listed before the rest is only counted; a wrong export is wrong in every row."""


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One row: its messages and the place it came from, `file:line`."""

    messages: tuple[Message, ...]
    place: str

    @property
    def last_answer(self) -> int:
        """Index of the last assistant message."""
        return max(i for i, message in enumerate(self.messages) if message.role == "assistant")

    def to_template(self, stop: int | None = None) -> list[dict[str, str]]:
        """The first `stop` messages as a chat template takes them."""
        return [{"role": m.role, "content": m.content} for m in self.messages[:stop]]


def check_files(data: Data) -> None:
    """Check that the sources exist, without reading them.

    Raises:
        DataError: every source that is missing or unreadable.
    """
    problems: list[Problem] = []
    for source in (data.train, data.eval):
        if isinstance(source, Source):
            try:
                check_source(source)
            except DataError as error:
                problems += error.problems
    if problems:
        raise DataError.of(problems)


def check_source(source: Source) -> Path:
    """The file of a source, checked to exist and be readable, without reading it.

    Raises:
        DataError: missing, a folder, unreadable, or not JSONL by name.
    """
    path = Path(source.path)
    remedy = "Give the path of a JSONL file: data.train.path=chats.jsonl."
    if path.is_dir():
        raise DataError(str(path), "is a folder; folders are not available yet.", remedy)
    if not path.is_file():
        raise DataError(str(path), "no such file.", remedy)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise DataError(str(path), f"{path.suffix or 'no suffix'} is not available yet.", remedy)
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror}.", "Check its permissions.") from None
    return path


def read(source: Source) -> list[Conversation]:
    """All conversations of a source, in file order.

    Raises:
        DataError: every malformed row with its line (the first 20), or no rows at all.
    """
    path = check_source(source)
    rows: list[Conversation] = []
    problems: list[Problem] = []
    for place, line in islice(_lines(path), source.limit):
        try:
            rows.append(parse_row(_text(line, place), place))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError.of(shortened(problems, path))
    if not rows:
        raise DataError(str(path), "holds no rows.", "Write one conversation a line.")
    return rows


def parse_row(line: str, place: str) -> Conversation:
    """One JSONL line `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Raises:
        DataError: not JSON, not of this shape, or without an assistant turn to train on.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}."
        raise DataError(place, reason, "Write one JSON object a line.") from None
    except (RecursionError, ValueError) as error:  # ValueError: Python reads 4300 digits at most
        what = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise DataError(place, f"not valid JSON: {what}.", "Write one JSON object a line.") from None
    if not isinstance(row, dict) or "messages" not in row:
        found = f"keys {', '.join(map(repr, row))}" if row and isinstance(row, dict) else _kind(row)
        reason = f"has no `messages` (found {found})."
        raise DataError(place, reason, 'Write {"messages": [{"role": "user", "content": "..."}, ...]}.')
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(place, "messages is not a list with messages.", "Remove the row, or fill it.")
    parsed = tuple(_message(message, f"{place}: messages[{i}]") for i, message in enumerate(messages))
    _check_turns(parsed, place)
    return Conversation(parsed, place)


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(place, f"is {_kind(message)}, not an object.", "Give it role and content.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        found = "is missing" if role is None else f"{role!r} is unknown"
        raise DataError(place, f"role {found}.", f"Use one of {', '.join(ROLES)}.")
    for key in sorted(set(message) - {"role", "content", "name"}):
        if message[key] not in (None, "", [], {}):  # 0 and false mean something: do not train on it
            raise DataError(place, f"{key!r} is not available yet.", "Leave only role and content.")
    if not isinstance(content, str):
        found = "missing" if content is None else f"{_kind(content)}, not text"
        raise DataError(place, f"content is {found}.", "Give the text of the message.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        reason = f"content has half a character: {content[error.start]!r}."
        remedy = "It was cut inside an emoji: mend the text, or remove the row."
        raise DataError(place, reason, remedy) from None
    return Message(role, content)


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    words = {"dict": "an object", "list": "a list", "str": "text"}
    return words.get(type(value).__name__, "a number")


def _check_turns(messages: tuple[Message, ...], place: str) -> None:
    if not any(m.role == "assistant" for m in messages):
        raise DataError(place, "has no assistant turn: nothing to train on.", "Add the answer, or remove it.")
    for i, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise DataError(f"{place}: messages[{i}]", "the assistant says nothing.", "Remove the row.")
    if messages[0].role == "assistant":
        raise DataError(place, "begins with the assistant.", "Begin with what it answers to.")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, bytes) of every line that is not blank; a BOM is dropped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path}:{number}", line.rstrip()  # JSON counts columns from the last newline


def _text(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text (byte {error.start + 1} of the line)."
        raise DataError(place, reason, "Convert the file to UTF-8.") from None


def shortened(problems: list[Problem], path: Path | str) -> list[Problem]:
    """The first MAX_PROBLEMS, and how many more there are."""
    surplus = len(problems) - MAX_PROBLEMS
    if surplus <= 0:
        return problems
    return [*problems[:MAX_PROBLEMS], Problem(str(path), f"and {surplus} more rows with problems.")]
