"""How a run ended before its time, in words: what happened, what is saved where, and how to go on.

Owns the messages of stopped and failed runs, and the plan that an out-of-memory error shows. No torch.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import traceback
from pathlib import Path
from typing import Any, Final, TypeVar

from . import installed
from .errors import FitError, InputError, Problem, QloraError, RunError, StopError
from .interrupts import Interrupted
from .run_folder import RunFolder
from .units import format_bytes

Failed = TypeVar("Failed", bound=QloraError)


def is_saved(place: RunFolder) -> bool:
    """Whether the adapter is there under its name: it is written whole or not at all."""
    return (place.path / "adapter").is_dir()


def kept(place: RunFolder) -> Problem:
    """What a run that had begun to train leaves."""
    adapter = place.path / "adapter"
    if is_saved(place):
        return Problem(
            str(adapter), "is the trained adapter, saved whole.", f"Use it, or `export {place.path}`."
        )
    left = [name for name in ("metrics.jsonl", "plan.json", "recipe.yaml") if (place.path / name).is_file()]
    what = f"{', '.join(left)} were kept" if left else "nothing was kept"
    return Problem(str(place.path), f"{what}; no adapter was saved.")


def with_bearings(error: Failed, place: RunFolder | None) -> Failed:
    """The error, the part of the plan that it is about, and what the run leaves."""
    if place is None:
        return error
    more = [_planned(place)] if isinstance(error, FitError) and place.plan is not None else []
    more += [kept(place)] if place.training_began else []
    return type(error).of((*error.problems, *more))


def _planned(place: RunFolder) -> Problem:
    assert place.plan is not None
    fullest = max(place.plan["phases"], key=lambda phase: phase["peak_bytes"])
    parts = ", ".join(f"{part['name']} {format_bytes(part['bytes'])}" for part in fullest["parts"])
    reason = f"predicted {format_bytes(fullest['peak_bytes'])} of tensors in {fullest['name']}: {parts}."
    path = place.path / "plan.json"
    return Problem(str(path) if path.is_file() and place.training_began else "memory plan", reason)


def failed(error: OSError, what: str) -> QloraError:
    """An error of the operating system in words; `what` stands where it names no file."""
    if isinstance(error, FileNotFoundError) and not _is_somewhere():
        return InputError("the working folder", "was removed.", "Go to another one: `cd`.")
    place = os.fsdecode(error.filename) if error.filename is not None else what
    return RunError(place, f"{error.strerror or error}.")


_LACKS: Final = ("can't allocate memory", "out of memory")
"""What torch says on a CPU and on CUDA."""


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, a library, or where one is loaded."""
    return installed.lacks_memory(error) or any(said in str(error) for said in _LACKS)


def no_memory(error: BaseException, what: str) -> FitError:
    """Memory that ran out anywhere but in a training, in words."""
    said = str(error).strip().splitlines()
    reason = f"out of memory{f': {said[0]}' if said else ''}."
    remedy = "Close other programs, or raise the limit on this one's memory (`ulimit -v`, the container's)."
    return FitError(what, reason, remedy)


def explained(error: Exception, what: str) -> QloraError:
    """An exception that was not turned into words where it came from; `what` was being done.

    Raises:
        ImportError: a package that is missing, which `installed` explains.
    """
    if lacks_memory(error):
        return no_memory(error, what)
    if isinstance(error, OSError):
        return failed(error, what)
    if isinstance(error, ImportError):
        raise error
    return fault(error, what)


def fault(error: Exception, what: str) -> RunError:
    """What nothing here expected, and so a fault of this program: in one line, its traceback in a file.

    A library's line alone would say neither what is saved nor whom to tell.
    """
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last)
    said = (str(error).strip().splitlines() or [""])[0]
    reason = f"{FAULT}: {type(error).__name__}{f': {said}' if said else ''}{where}."
    try:
        file, path = tempfile.mkstemp(prefix="qlora-phi3-fault-", suffix=".txt")
        with os.fdopen(file, "w", encoding="utf-8", errors="backslashreplace") as details:
            details.writelines(traceback.format_exception(error))
    except OSError as lost:
        return RunError(what, reason, f"Its details cannot be written: {lost.strerror or lost}.")
    return RunError(what, reason, f"Please report it together with {path}.")


FAULT: Final = "a fault of this program, not of your files"


def ended(stop: KeyboardInterrupt, what: str) -> StopError:
    """A command that was asked to end and has nothing to save; its exit code is the shell's for that."""
    asked = stop if isinstance(stop, Interrupted) else Interrupted("SIGINT")
    error = StopError(what, f"stopped by {asked.name}.")
    error.exit_code = asked.exit_code
    return error


def whole(asked: Interrupted, folder: Path, when: str) -> StopError:
    """A run that was asked to end when all of it was there already."""
    reason = f"stopped by {asked.name} {when}; the run itself is whole."
    return StopError(str(folder), reason, f"See {folder / 'report.html'}.")


def _is_somewhere() -> bool:
    try:
        return bool(Path.cwd())
    except OSError:
        return False


def stopped(asked: Interrupted, place: RunFolder | None) -> StopError:
    """A run that was ended at once; its exit code is the shell's for such a signal."""
    where = str(place.path) if place is not None else "the run"
    if place is None or not place.training_began:
        error = StopError(where, f"stopped by {asked.name} before training began: nothing is left of it.")
    else:
        error = StopError.of((Problem(where, f"stopped at once by {asked.name}."), kept(place)))
    if place is None or not is_saved(place):
        error.exit_code = asked.exit_code
    return error


def saved(asked: Interrupted, place: RunFolder, trained: int, planned: int, during: str) -> StopError:
    """A run that was ended and has saved what it had trained: how far it was, and how to go on."""
    adapter, recipe = place.path / "adapter", place.path / "recipe.yaml"
    if trained < planned:
        how_far, what = f"after step {trained} of {planned}", "is the adapter as trained so far."
        keys = shlex.join([f"adapter.init={adapter}", f"train.max_steps={planned - trained}"])
        command = f"`python -m qlora_phi3 recipe {shlex.quote(str(recipe))} {keys}`"
        remedy = f"Go on from it: {command}; the learning rate and the order of rows begin anew."
    else:
        how_far, what = f"while {during}, after all {planned} steps", "is the trained adapter, saved whole."
        remedy = f"Use it, or `export {shlex.quote(str(place.path))}`."
    stop = Problem(str(place.path), f"stopped by {asked.name} {how_far}.")
    return StopError.of((stop, Problem(str(adapter), what, remedy)))


def elsewhere(wanted: Path, place: RunFolder, error: Any) -> RunError:
    """A run whose folder could not be written at its end, and which went on in another."""
    reason = f"could not be written at the end of the training: {getattr(error, 'strerror', None) or error}."
    return RunError(str(wanted), reason, f"The whole run, adapter included, is in {place.path.absolute()}.")


def untold(error: OSError, folder: Path) -> RunError:
    """A run that is whole, whose closing words could not be printed."""
    reason = f"cannot be written: {error.strerror or error}."
    return RunError("standard output", reason, f"The run itself is whole, in {folder}; see its report.html.")
