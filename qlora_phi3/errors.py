"""What can go wrong through the user's input or while running, each with a place and a way on.

Owns the exception types and their exit codes. Refuses everything else: bugs of ours stay ordinary
exceptions, which `endings.fault` tells in a line, with their traceback in a file.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Final

from typing_extensions import Self

MAX_SHOWN: Final = 60

MAX_PART: Final = 2000
"""Characters of a place or a reason that are printed; a path may be long, a file's content longer."""


def shown(value: object) -> str:
    """A value as Python writes it, cut for a message: a broken file may have a megabyte in one place."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what was found and why it cannot be used, what to do instead."""

    place: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line, whatever names and values hold: no escape sequence of theirs reaches a terminal."""
        place, reason, remedy = (printable(part, MAX_PART) for part in (self.place, self.reason, self.remedy))
        return f"{place}: {reason} {remedy}".rstrip()


def printable(text: str, most: int | None = None, keep: str = "") -> str:
    """One line of text with control and format characters as Python writes them, cut to `most` characters.

    `keep`: which of them stay. The two joiners that emoji and some scripts need always do.
    """
    cut = text if most is None or len(text) <= most else f"{text[:most]}..."
    if cut.isprintable():
        return cut
    return "".join(one if one in keep or _is_still(one) else ascii(one)[1:-1] for one in cut)


def _is_still(one: str) -> bool:
    """Whether a character moves nothing on a terminal."""
    return one.isprintable() or one in "\u200c\u200d" or unicodedata.category(one) == "Zs"


class QloraError(Exception):
    """Base of every error that is printed as a message, without a traceback."""

    exit_code: int = 1

    def __init__(self, place: str, reason: str, remedy: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(place, reason, remedy),)
        super().__init__(str(self.problems[0]))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with all problems, so that a worker process can pass the error on."""
        return type(self).of, (self.problems,)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> Self:
        """One error that carries several problems, in the order given.

        Raises:
            ValueError: `problems` is empty.
        """
        found = tuple(problems)
        if not found:
            raise ValueError("an error needs at least one problem")
        error = cls(found[0].place, found[0].reason, found[0].remedy)
        error.problems = found
        error.args = ("\n".join(str(p) for p in found),)
        return error


class InputError(QloraError):
    """The user's input cannot be used: recipe, data, model, adapter or arguments."""

    exit_code: int = 2


class RecipeError(InputError):
    """A recipe, an override, or a combination of keys that cannot run."""


class DataError(InputError):
    """A data file, or a row of one, that cannot be trained on."""


class ModelError(InputError):
    """A base model, tokenizer or adapter that cannot be loaded safely or does not fit."""


class OutputError(InputError):
    """A place to write to that cannot be used."""


class RunError(QloraError):
    """The run itself failed, for example a loss that is not a number."""


class FitError(QloraError):
    """It does not fit into the memory there is."""

    exit_code: int = 4


class StopError(QloraError):
    """The process was asked to end, by Ctrl-C or a signal; what was trained until then is saved."""

    exit_code: int = 3


def is_file(path: Path, error: type[InputError] = InputError) -> bool:
    """Whether a file is there.

    Raises:
        InputError, of the kind given: the system does not tell, as of a name that is too long.
    """
    found = _stat(path, error)
    return found is not None and S_ISREG(found.st_mode)


def is_folder(path: Path, error: type[InputError] = InputError) -> bool:
    """Whether a folder is there; otherwise as `is_file`."""
    found = _stat(path, error)
    return found is not None and S_ISDIR(found.st_mode)


def _stat(path: Path, error: type[InputError]) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as failure:  # ValueError: a NUL byte in it
        reason = f"cannot be looked up: {getattr(failure, 'strerror', None) or failure}."
        raise error(str(path), reason, "Check the path, and who may read the folders above.") from None
