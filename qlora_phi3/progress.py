"""What a run says while it runs: a live bar on a terminal, plain lines elsewhere; always on stderr.

Owns the look of progress. Knows nothing of training.
"""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import Self

PLAIN_SECONDS: Final = 5.0
"""Time between plain lines, so that a log file of a long run stays readable."""


class Steps:
    """Progress over a known number of steps, each with a short text of figures."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = -math.inf  # never; 0.0 on this clock is the moment the machine was started
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, figures: str) -> None:
        """Show that `step` of the total is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if step == self._total or step <= 1 or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            left = (now - self._start) / max(step, 1) * (self._total - step)
            line = f"{self._title} {step}/{self._total}  {figures}  {left:.0f} s left"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Display:
    """Where a run talks to: sentences and progress, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """One sentence about what happens now."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def steps(self, title: str, total: int) -> Steps:
        """Progress over `total` steps, to be used with `with`."""
        return Steps(self.console, title, total)
