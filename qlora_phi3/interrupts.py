"""Ctrl-C and its like: what stops a run, and when that takes effect.

Owns the signals that ask a process to end (SIGINT, SIGTERM, SIGHUP) while a run is under way. Where nothing
would be lost they end it at once; while it trains or saves they wait for the step or the file. Refuses to
touch a signal that is ignored already, as under nohup. No torch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")
"""SIGHUP: the terminal or the connection is gone. Windows has no SIGHUP."""

NAMES: Final = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP (the terminal was closed)"}

WAITING: Final = (
    "\n{name}: stopping after this step, then the adapter is saved as trained so far. "
    "Once more stops at once, and the adapter is lost.\n"
)


class Interrupted(KeyboardInterrupt):
    """The process was asked to end; `name` says how, in words. No `except Exception` takes it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(NAMES[signal_name])
        self.name = NAMES[signal_name]
        self.exit_code = 128 + int(getattr(signal, signal_name))


class Interrupts:
    """Whether the process was asked to end, and whether that waits."""

    def __init__(self) -> None:
        self.asked: Interrupted | None = None
        self._waits: str | None = None
        self._ignored = False

    @contextmanager
    def deferred(self, words: str = "") -> Iterator[None]:
        """Let the first signal wait for the end of the body, and say `words`; the body looks at `asked`."""
        before, self._waits = self._waits, words
        try:
            yield
        finally:
            self._waits = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have a signal end the body at once, inside of one where it waits.

        Raises:
            Interrupted: one came, now or earlier.
        """
        before, self._waits = self._waits, None
        try:
            self.check()
            yield
        finally:
            self._waits = before

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Let no signal end the body, not even a second one: half a clean-up is worse than a moment."""
        before, self._ignored = self._ignored, True
        try:
            yield
        finally:
            self._ignored = before

    def check(self) -> None:
        """End here where a library took the exception for its own.

        Raises:
            Interrupted: a signal came.
        """
        if self.asked is not None:
            raise self.asked

    def handle(self, number: int, frame: FrameType | None) -> None:
        """What `watched` has Python do at a signal.

        A closed terminal is told by the system and by the shell, so that a second SIGHUP asks for no more
        than the first.
        """
        name = signal.Signals(number).name
        first, self.asked = self.asked is None, Interrupted(name)
        if self._ignored or (self._waits is not None and not first and name == "SIGHUP"):
            return
        if self._waits is None or not first:
            raise self.asked
        with suppress(OSError):  # not through a stream: it may be in the middle of a write
            os.write(2, self._waits.format(name=self.asked.name).encode())


_watching: Interrupts | None = None


@contextmanager
def watched(*, to_the_end: bool = False) -> Iterator[Interrupts]:
    """Handle the signals in the body; inside of another body that does, with the same Interrupts.

    Outside the main thread, where Python cannot, nothing is done. `to_the_end`: after the body the process
    only ends, and nothing can interrupt that any more: it has said what it came to.
    """
    global _watching
    if _watching is not None:
        yield _watching
        return
    found, before = Interrupts(), dict[signal.Signals, Any]()
    found._waits = "" if to_the_end else None  # also when the last `deferred` in the body is over
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, found.handle)
    _watching = found if before else None
    try:
        yield found
    finally:
        found._ignored = to_the_end
        _watching = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if to_the_end else handler)
