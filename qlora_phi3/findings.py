"""What a check found out: how grave it is, what it means, where, and the way to mend it.

Owns the shape of a finding. Knows nothing of what is checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final, Literal

Grade = Literal["error", "warning", "note"]
GRADES: Final[tuple[Grade, ...]] = ("error", "warning", "note")
"""error: a run refuses it or would train something wrong; warning: the result is doubtful; note: to know."""

SHOWN_PLACES: Final = 5

_AS: Final = re.compile(r"(.*(?::| row )\d+) \(as (.*)\)", re.DOTALL)
"""A place that repeats another one."""

_FILE: Final = re.compile(
    r"(?P<path>(?:/|[A-Za-z]:[\\/]|\\\\).*?)(?P<rest>(?::| row )\d+(?:: .*|$)|: .*|$)", re.DOTALL
)
"""An absolute path, and where in the file: a line or row, and what is there."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found; `what` says in one sentence what it means.

    `more`: places beyond `places`; a wrong export is wrong in a million rows.
    """

    grade: Grade
    code: str
    what: str
    places: tuple[str, ...]
    fix: str
    more: int = 0

    @property
    def num_places(self) -> int:
        return len(self.places) + self.more

    def __str__(self) -> str:
        """One line, for a log."""
        return f"{self.grade}: {self._sentence(self.places)}"

    @property
    def note(self) -> str:
        """The same for a report that others read: files without the folders of this machine.

        A report's notes are notes, so that only what is graver has its grade in front.
        """
        said = self._sentence(tuple(map(without_folders, self.places[:1])))
        return said if self.grade == "note" else f"{self.grade}: {said}"

    def _sentence(self, places: tuple[str, ...]) -> str:
        rest = f" and {self.num_places - 1} more" if self.num_places > 1 else ""
        where = f" ({places[0]}{rest})" if places else ""
        return f"{self.what}{where} {self.fix}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """As a program reads it: the first places, and how many there are."""
        return {
            "grade": self.grade,
            "code": self.code,
            "what": self.what,
            "places": list(self.places[:SHOWN_PLACES]),
            "num_places": self.num_places,
            "fix": self.fix,
        }


def graded(note: str) -> str:
    """A report's note for the terminal, where each line has its grade in front."""
    return note if note.startswith(tuple(f"{grade}: " for grade in GRADES)) else f"note: {note}"


def without_folders(place: str) -> str:
    """A place with its file's name instead of its absolute path, and what it repeats likewise."""
    twice = _AS.fullmatch(place)
    if twice is not None:
        return f"{without_folders(twice[1])} (as {without_folders(twice[2])})"
    found = _FILE.fullmatch(place)
    if found is None:
        return place
    path = found["path"]
    names = PurePosixPath(path) if path.startswith("/") else PureWindowsPath(path)
    return f"{names.name}{found['rest']}"
