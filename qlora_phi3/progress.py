"""What a run says while it runs: a live bar on a terminal, plain lines elsewhere; always on stderr.

Owns the look of progress, and that nobody fails because it cannot be shown: a log's full disk or a lost pipe
must not cost hours of training. Knows nothing of training.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from contextlib import suppress
from io import TextIOWrapper
from types import TracebackType
from typing import Any, Final, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import Self

from .errors import printable

PLAIN_SECONDS: Final = 5.0
"""Time between plain lines, so that a log file of a long run stays readable."""

MEASURED_UPDATES: Final = 3
"""Updates until the time left is told: a first step took three times as long as the others."""


class LossyStream:
    """A text stream for what is only told: what cannot be written to it is dropped.

    A full disk may have room again later, so each write is tried.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Output(Console):
    """Standard output, which does not end the process where nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def lossy(stream: TextIO) -> TextIO:
    """The stream itself, or around it one that never fails."""
    return stream if isinstance(stream, LossyStream) else cast(TextIO, LossyStream(stream))


def forgive(stream: TextIO | None) -> None:
    """Let a stream write what its encoding lacks as escapes: Latin-1 has no 日, and a row may."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def drop_unwritten(stream: TextIO | None) -> OSError | None:
    """Flush a standard stream before Python does at its end; what cannot be written is dropped, and why told.

    Python itself would end with exit code 120 and a traceback.
    """
    try:
        if stream is not None:
            getattr(stream, "_stream", stream).flush()
    except ValueError:  # closed: nothing is left in it
        return None
    except OSError as error:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno() if stream is not None else -1)
            os.close(nowhere)
        return error
    return None


class Steps:
    """Progress over a known number of steps, each with a short text of figures."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = -math.inf  # never; 0.0 on this clock is the moment the machine was started
        self._updates: list[tuple[float, int]] = []

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
        self._updates.append((now, step))
        if step == self._total or step <= 1 or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            line = printable(f"{self._title} {step}/{self._total}  {figures}{self._left()}")
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _left(self) -> str:
        """How long the rest takes, as fast as since the first update: what came before it is no measure."""
        (begun, first), (now, step) = self._updates[0], self._updates[-1]
        if step == self._total:
            return "  0 s left"
        if len(self._updates) < MEASURED_UPDATES or step == first:
            return ""
        return f"  {(now - begun) / (step - first) * (self._total - step):.0f} s left"


class Display:
    """Where a run talks to: sentences and progress, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _console()

    def say(self, text: str) -> None:
        """One sentence about what happens now."""
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def steps(self, title: str, total: int) -> Steps:
        """Progress over `total` steps, to be used with `with`."""
        return Steps(self.console, title, total)


def _console() -> Console:
    return Console(stderr=True) if sys.stderr is None else Console(file=lossy(sys.stderr))
