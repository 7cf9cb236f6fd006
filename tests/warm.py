"""Commands in children of a process that has imported torch already: a run takes seconds less, and may be
asked to have an accident at a moment of its own.

A moment is "module:function" or "module:Class.function" and a number: `act` happens before that call.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

PRELOADED = ["qlora_phi3.cli", "qlora_phi3.pipeline", "transformers", "peft", "trl", "datasets"]


@dataclass(frozen=True)
class Moment:
    """Before call number `number` of `where`."""

    where: str
    number: int = 1


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


class Running:
    """A command under way."""

    def __init__(
        self,
        arguments: tuple[object, ...],
        cwd: Path,
        moment: Moment | None = None,
        act: Callable[..., None] | None = None,
        given: tuple[Any, ...] = (),
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        number = len(list(cwd.glob(".out-*")))
        self._files = [cwd / f".out-{number}", cwd / f".err-{number}"]
        for file in self._files:
            file.touch()
        told = [str(file) for file in self._files]
        words = [str(one) for one in arguments]
        self.process = context.Process(target=_child, args=(words, str(cwd), told, moment, act, given))
        self.process.start()

    def wait(self) -> Ended:
        self.process.join(120)
        assert self.process.exitcode is not None, "it hangs"
        stdout, stderr = (file.read_text(encoding="utf-8", errors="replace") for file in self._files)
        return Ended(self.process.exitcode, stdout, stderr)


def run(*arguments: object, cwd: Path, **accident: Any) -> Ended:
    """One command, with an accident where one is asked for."""
    return Running(arguments, cwd, **accident).wait()


def _child(
    arguments: list[str],
    cwd: str,
    told: list[str],
    moment: Moment | None,
    act: Callable[..., None] | None,
    given: tuple[Any, ...],
) -> None:
    os.chdir(cwd)
    gc.freeze()  # of what was preloaded nothing is garbage, and a run collects it several times
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    for descriptor, path in zip((1, 2), told, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_TRUNC), descriptor)
    from qlora_phi3.__main__ import main

    if moment is not None and act is not None:
        _wait_for(moment, lambda: act(*given))
    sys.argv = ["qlora-phi3", *arguments]
    main()


def _wait_for(moment: Moment, act: Callable[[], None]) -> None:
    module, _, path = moment.where.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    original, calls = getattr(owner, name), [0]

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == moment.number:
            act()
        return original(*args, **kwargs)

    setattr(owner, name, watched)
