"""Read the conversations of a source, every problem at once and with its place.

Owns the way from a recipe's source to conversations. Files are `sources`' matter, a row's shape `formats`'.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from ..errors import DataError, Problem
from ..recipe import Data, Source
from .formats import Conversation, Message, convert, detect
from .sources import files_of, rows_of

__all__ = [
    "MAX_PROBLEMS",
    "Conversation",
    "Message",
    "check_files",
    "check_source",
    "read",
    "shortened",
    "stream",
]

MAX_PROBLEMS: Final = 20
"""Problems listed before the rest is only counted; a wrong export is wrong in every row."""


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


def check_source(source: Source) -> list[Path]:
    """The files of a source, checked to exist and be readable, without reading them.

    Raises:
        DataError: missing, unreadable, or of a kind that is not available.
    """
    return files_of(Path(source.path))


def stream(source: Source) -> Iterator[Conversation | Problem]:
    """Conversations of a source in file order, one at a time; a malformed row comes as the Problem it has.

    All rows have the format of the first, or the named one.
    """
    name: str | None = None if source.format == "auto" else source.format
    for place, row in islice(rows_of(check_source(source)), source.limit):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            name = name or detect(row, place)
            yield convert(row, name, place)
        except DataError as error:
            yield from error.problems
            if name is None:  # what the first row is decides what the others should be
                return


def read(source: Source) -> list[Conversation]:
    """All conversations of a source, in file order.

    Raises:
        DataError: every malformed row with its place (the first 20), or no rows at all.
    """
    rows = list(stream(source))
    problems = [row for row in rows if isinstance(row, Problem)]
    if problems:
        raise DataError.of(shortened(problems, source.path))
    return [row for row in rows if isinstance(row, Conversation)]


def shortened(problems: list[Problem], path: Path | str) -> list[Problem]:
    """The first MAX_PROBLEMS, and how many more there are."""
    surplus = len(problems) - MAX_PROBLEMS
    if surplus <= 0:
        return problems
    return [*problems[:MAX_PROBLEMS], Problem(str(path), f"and {surplus} more rows with problems.")]
