"""What a check found out: how grave it is, what it means, where, and the way to mend it.

Owns the shape of a finding. Knows nothing of what is checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal

from .errors import printable

Grade = Literal["error", "warning", "note"]
GRADES: Final[tuple[Grade, ...]] = ("error", "warning", "note")
"""error: a run refuses it or would train something wrong; warning: the result is doubtful; note: to know."""

SHOWN_PLACES: Final = 5

_FOLDERS: Final = re.compile(r"(?:^|(?<=[\s(]))/(?:[^/\n]+/)*")
"""Of an absolute path, all but its last part."""


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
        rest = f" and {self.num_places - 1} more" if self.num_places > 1 else ""
        where = f" ({self.places[0]}{rest})" if self.places else ""
        return printable(f"{self.grade}: {self.what}{where} {self.fix}")

    @property
    def note(self) -> str:
        """The same for a report that others read: files without the folders of this machine."""
        return _FOLDERS.sub("", str(self))

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
