"""`metrics.jsonl`: a line as it comes, and the whole at the end where some could not be written.

Owns that a full disk or a lost folder costs neither the training nor, once there is room again, a line.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from typing_extensions import Self

from . import files


class MetricsLog:
    """A text file that keeps what it was given: a few hundred bytes a line, 40 MB for 100,000 steps.

    `ours`: whether its folder still is this run's; at the end nothing is written into another's.
    """

    def __init__(self, path: Path, ours: Callable[[], bool] = lambda: True) -> None:
        self._path, self._ours = path, ours
        self._texts: list[str] = []
        self._file: TextIO | None = None
        self.trouble: OSError | None = None

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            self.trouble = error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._ours():
            self.complete(self._path)

    def write(self, text: str) -> None:
        """Add a line; one that cannot be written now waits for `complete`."""
        self._texts.append(text)
        if self._file is None or self.trouble is not None:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self.trouble = error

    def flush(self) -> None:
        """Each line is flushed already."""

    def complete(self, path: Path) -> None:
        """Write all lines under `path` unless they are there."""
        text = "".join(self._texts)
        try:
            if not path.is_file() or path.stat().st_size != len(text.encode()):
                files.write_text(path, text)
            self.trouble = None
        except OSError as error:
            self.trouble = error
