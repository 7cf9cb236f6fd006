"""The folder of a run: claimed before anything is written, and cleaned of this run's own files only.

Owns which folder a run has, that no other run has it too, room on its disk for what must not be lost, and
what becomes of it when a run ends early: before training began nothing is left, afterwards nothing is
removed. No torch.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from . import files
from .errors import ModelError, OutputError, RunError
from .units import format_bytes

REMEDY: Final = "Choose another folder with --out."
CLAIM: Final = ".claim.json"
"""Made before anything else and gone at the end; who makes it, O_EXCL, has the folder."""
RESERVE: Final = ".reserve"
"""Holds disk space for what is written at the end."""

_BEFORE: Final = {CLAIM, RESERVE, "recipe.yaml", "plan.json"}
"""All that a run writes before it trains."""
_UNFINISHED: Final = re.compile(r"\.(recipe\.yaml|plan\.json)\.\d+")
_WRITTEN: Final = b'"run": '
"""In every claim that is more than just made."""
_TRIES: Final = 100
_LISTED: Final = 5
_LINK: Final = "is a link that leads nowhere."


def default(name: str) -> Path:
    """runs/<name>/<UTC time>; `claim` adds -2, -3, ... where another run has it."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return Path("runs") / name / now.strftime("%Y-%m-%dT%H-%M-%SZ")


class RunFolder:
    """A claimed folder; what is written through it is this run's own. `plan`: the content of plan.json."""

    def __init__(self, path: Path, made: list[Path]) -> None:
        self.path = path
        self.training_began = False
        self.plan: dict[str, Any] | None = None
        self._claimed, self._made = path, made
        self._token = secrets.token_hex(8)
        self._held: IO[str] | None = None
        self._texts: dict[str, str] = {}
        self._unwritten: set[str] = set()
        self._reserved: os.stat_result | None = None

    def write_text(self, name: str, text: str) -> None:
        """Write a file of this run, whole or not at all.

        Raises:
            RunError: it cannot be written -> the file, and why.
        """
        self._texts[name] = text
        try:
            files.write_text(self.path / name, text)
        except OSError as error:
            raise self.cannot_write(name, error) from None

    def keep_text(self, name: str, text: str) -> None:
        """Write a file while training; where that fails it is written by `restore`, at the end."""
        self._texts[name] = text
        self._unwritten.add(name)
        with contextlib.suppress(OSError):
            if self.is_ours():
                files.write_text(self.path / name, text)
                self._unwritten.discard(name)

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON document of this run; errors as `write_text`."""
        self.write_text(name, files.json_text(content))

    def cannot_write(self, name: str, error: OSError) -> RunError:
        """The error in words, with what is safe and what is not."""
        reason = f"cannot be written: {error.strerror or error}."
        if not self.training_began:
            remedy = "Free some space or choose another folder with --out; nothing was trained yet."
        elif (self.path / "adapter").is_dir():
            remedy = f"The training is not lost: the adapter is in {self.path / 'adapter'}."
        else:
            remedy = "Free some space, or look at the disk."
        return RunError(str(self.path / name), reason, remedy)

    def reserve(self, num_bytes: int) -> None:
        """Take disk space for what is written at the end, so that a disk filling up meanwhile costs nothing.

        Raises:
            RunError: there is not so much.
        """
        path = self._claimed / RESERVE
        try:
            with path.open("wb") as file:
                self._reserved = os.fstat(file.fileno())
                _allocate(file.fileno(), num_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise self.cannot_write(RESERVE, error) from None
            free = format_bytes(shutil.disk_usage(self.path).free)
            reason = f"{format_bytes(num_bytes)} are needed for the adapter and the report ({error.strerror})"
            remedy = "Free some space or choose another folder with --out; nothing was trained yet."
            if error.errno == errno.EFBIG:
                remedy = "Raise the limit on the size of a file (`ulimit -f`); nothing was trained yet."
            raise RunError(str(self.path), f"{reason}; {free} are free on its disk.", remedy) from None

    def release(self) -> None:
        """Give the reserved space back, right before it is used; also in a folder that lost its claim."""
        path = self._claimed / RESERVE
        with contextlib.suppress(OSError):
            if self._reserved is not None and os.path.samestat(self._reserved, path.lstat()):
                path.unlink()

    def sign(self) -> None:
        """Make the claim.

        Raises:
            FileExistsError: another run has it.
            OSError: it cannot be written.
        """
        path = self.path / CLAIM
        file = path.open("x", encoding="utf-8")
        try:
            while files.lock(file) is False:  # another run looks whether anybody holds it: a moment
                time.sleep(0.001)
            json.dump({"process": os.getpid(), "host": platform.node(), "run": self._token}, file)
            file.flush()
        except OSError:
            file.close()
            path.unlink(missing_ok=True)
            raise
        self._held = file

    def _end_claim(self) -> None:
        """The file first, then its lock: one that nobody holds is a dead run's."""
        held, self._held = self._held, None
        if os.name == "nt" and held is not None:  # which removes no open file, and has no lock
            held.close()
        with contextlib.suppress(OSError):
            (self._claimed / CLAIM).unlink()
        if held is not None:
            with contextlib.suppress(OSError):
                held.close()

    def is_ours(self) -> bool:
        """Whether the folder is the one that was claimed, not another in its place."""
        try:
            return self._token.encode() in files.read_bytes(self._claimed / CLAIM)
        except (OSError, ValueError):
            return False

    def restore(self) -> None:
        """Make the folder again where somebody removed it, with the texts that it had.

        Raises:
            OSError: it cannot be made, or is another's now.
        """
        if not self.path.exists():
            self.path.mkdir(parents=True)
            self.sign()
        if not self.is_ours():
            raise OSError(errno.EEXIST, "the folder was replaced by another")
        for name, text in self._texts.items():
            if name in self._unwritten or not (self.path / name).is_file():
                files.write_text(self.path / name, text)
                self._unwritten.discard(name)

    def move(self) -> Path:
        """Go on in a folder elsewhere, since this one can no longer be written; returns that.

        Raises:
            OSError: there is no place that can be.
        """
        left, problem = self.path, OSError(errno.EIO, "no other folder can be written")
        for parent in (Path.cwd(), Path(tempfile.gettempdir()), Path.home()):
            try:
                found = Path(tempfile.mkdtemp(prefix=f"{left.name}-", dir=parent))
                found.chmod(0o777 & ~_umask())
                self.path = self._claimed = found
                self.sign()
                self.restore()
                return self.path
            except OSError as error:
                self.path, self._claimed, problem = left, left, error
        raise problem

    def remove(self) -> None:
        """Undo all that this run made, and nothing else."""
        if self.is_ours():
            for name in (*self._texts, RESERVE):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            self._end_claim()
        for folder in self._made:
            with contextlib.suppress(OSError):  # not ours alone any more
                folder.rmdir()

    def close(self) -> None:
        """End the claim; what the run wrote stays."""
        if self.is_ours():
            with contextlib.suppress(OSError):
                (self._claimed / RESERVE).unlink()
            self._end_claim()


@contextlib.contextmanager
def claim(
    wanted: Path | None,
    name: str,
    undisturbed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[RunFolder]:
    """The folder `wanted`, or runs/`name`/<UTC time>, for one run alone.

    However the body ends, before `training_began` all that the run made is removed, afterwards nothing is;
    `undisturbed` is around that.

    Raises:
        OutputError: `wanted` holds something already, another run has it, or it cannot be written to.
    """
    run = _claim(wanted) if wanted is not None else _claim_default(default(name))
    try:
        yield run
    except BaseException:
        with undisturbed():
            run.close() if run.training_began else run.remove()
        raise
    with undisturbed():
        run.close()


def _claim_default(folder: Path) -> RunFolder:
    for number in range(1, _TRIES):
        with contextlib.suppress(_Taken):
            run = _claim(folder if number == 1 else folder.with_name(f"{folder.name}-{number}"))
            if run.path.absolute() not in run._made:  # a run that came too late made it for us
                run._made.insert(0, run.path.absolute())
            return run
    raise OutputError(str(folder), f"and {_TRIES - 2} more like it are there already.", REMEDY)


class _Taken(OutputError):
    """The folder is another's."""


def _claim(folder: Path) -> RunFolder:
    check_folder(folder)
    made: list[Path] = []
    try:
        _clear_dead(folder)
        _make(folder.absolute(), made)
        run = RunFolder(folder, made)
        run.sign()
    except FileExistsError:
        _unmake(made)
        raise _Taken(str(folder), "another run writes into it.", REMEDY) from None
    except OSError as error:
        _unmake(made)
        raise OutputError(str(folder), f"cannot be written to: {error.strerror}.", REMEDY) from None
    try:
        check_folder(folder, but=CLAIM)  # again: it was another's a moment ago, perhaps
    except OutputError:
        run.remove()
        raise
    return run


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and its parents; `made` gets those that were not there, the innermost first."""
    if folder.is_dir():
        return
    for _ in range(_TRIES):
        _make(folder.parent, made)
        try:
            folder.mkdir()
        except FileNotFoundError:  # another run removed the parent in between: it was its own, and empty
            continue
        except FileExistsError:
            if folder.is_dir():
                return
            raise
        made.insert(0, folder)
        return


def _unmake(made: list[Path]) -> None:
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_folder(folder: Path, but: str = "") -> None:
    """Refuse a folder that holds anything `but` one file or cannot be made; whether it can be written, the
    run tries.

    Raises:
        OutputError: another run, other files, or no folder at all.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        reason = "its whole path is not UTF-8, and the libraries that save the adapter take no other."
        raise OutputError(str(folder.absolute()), reason, REMEDY) from None
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
        if not there.is_dir():
            what = "is a file." if there.exists() else _LINK
            reason = what if there == folder else f"cannot be made: {there} {what}"
            raise OutputError(str(folder), reason, REMEDY)
        found = {path.name for path in folder.iterdir()} - {but} if there == folder else set()
        if found and not _is_dead(folder):
            run = found & {"recipe.yaml", CLAIM}
            raise _Taken(str(folder), "holds another run." if run else "is not empty.", REMEDY)
    except OSError as error:
        raise OutputError(str(folder), f"cannot be used: {error.strerror}.", REMEDY) from None


def check_run(folder: Path) -> None:
    """Refuse a folder that holds runs and is none itself.

    Raises:
        ModelError: which runs are in it, the newest first.
    """
    try:
        inside = [path.parent for path in folder.glob("*/recipe.yaml")]
        inside += [path.parent for path in folder.glob("*/*/recipe.yaml")]
        inside.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:  # it is told when it is read
        return
    if inside and not (folder / "recipe.yaml").exists() and not (folder / "adapter_config.json").exists():
        more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
        remedy = f"Give one of them: {', '.join(map(str, inside[:_LISTED]))}{more}."
        raise ModelError(str(folder), "is a folder of runs, no run itself.", remedy)


def _is_dead(folder: Path) -> bool:
    """Whether it holds only what a run that was killed before it trained has left.

    A claim is written under its lock: an empty one is a run's that is just making it.
    """
    names = {path.name for path in folder.iterdir()}
    unfinished = {name for name in names if _UNFINISHED.fullmatch(name)}
    if CLAIM not in names or not names - unfinished <= _BEFORE or not files.is_abandoned(folder / CLAIM):
        return False
    try:
        return _WRITTEN in files.read_bytes(folder / CLAIM)
    except OSError:
        return False


def _clear_dead(folder: Path) -> None:
    """Remove what such a run has left, the claim last, under its lock: two runs may find it at once.

    Raises:
        OSError: it cannot be removed.
    """
    if not folder.is_dir() or not _is_dead(folder):
        return
    with contextlib.suppress(FileNotFoundError), files.open_file(folder / CLAIM) as claim:
        same = files.lock(claim) and os.path.samestat(os.fstat(claim.fileno()), (folder / CLAIM).stat())
        if not same or _WRITTEN not in claim.read():  # another's by now, which is just making it
            return
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CLAIM):
            path.unlink()


def _is_there(path: Path) -> bool:
    """Whether anything has this name, a link that leads nowhere too.

    Raises:
        OSError: it cannot be told, as of a name that is too long.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _allocate(descriptor: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
        return
    block = b"\0" * 2**20
    for at in range(0, num_bytes, len(block)):
        os.write(descriptor, block[: num_bytes - at])


def _umask() -> int:
    before = os.umask(0o077)
    os.umask(before)
    return before
