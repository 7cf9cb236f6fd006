"""Where an export is written: beside its place first, under a hidden name, and renamed when it is whole.

Owns what may be replaced, whether the disk has room, and leaving nothing behind. Refuses to replace what is
no export. Knows nothing of torch.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from .. import files
from ..errors import OutputError
from ..units import format_bytes

ABOUT: Final = "export.json"
"""What an exported folder says of itself, and what makes it one that --force may replace."""
PARITY: Final = "parity.json"
UNFINISHED: Final = "unfinished"
REPLACED: Final = "replaced"
_LONGEST: Final = "..{}.unfinished-4194304.partial"
"""Of all names that a folder's own becomes while it is written."""
_OTHER: Final = "Name another with --out."
SPARE: Final = 0.02
"""Share of the predicted bytes that must be free beside them: configs, tokenizers, the file system's own."""


def folder_of(run: Path | None, adapter: Path, target: str) -> Path:
    """`exports/<target>` of the run, or beside an adapter that belongs to none."""
    return (run or adapter.absolute().parent) / "exports" / target.replace(":", "-")


def real(folder: Path) -> Path:
    """Where a link in a target's place leads, as to a bigger disk; the link stays. `.` and `..` by name."""
    try:
        unnamed = folder.name in ("", "..")
        return folder.resolve() if unnamed or (folder.is_symlink() and folder.is_dir()) else folder
    except OSError:  # a name too long, a folder that may not be read: `check` says so
        return folder


def check(folder: Path, force: bool) -> None:
    """Refuse a place that holds something already, or cannot be made.

    Raises:
        OutputError: it exists without `force`, or is no export of ours, or no folder can be there.
    """
    try:
        lost = next((one for one in (folder, *folder.parents) if one.is_symlink() and not one.exists()), None)
        if lost is not None:
            reason = f"cannot be made: {lost} is a link that leads nowhere."
            raise OutputError(str(folder), reason, "Remove the link, or name another with --out.")
        there = _nearest(folder)
        if not there.is_dir():
            raise OutputError(str(folder), f"cannot be made: {there} is a file.", _OTHER)
        if there == folder and folder.stat().st_dev != folder.absolute().parent.stat().st_dev:
            reason = "is where a disk is mounted, which cannot be replaced as a whole."
            raise OutputError(str(folder), reason, "Name a folder inside it.")
        if there != folder or not any(folder.iterdir()):
            _check_writable(folder, there)
            return
    except OSError as error:
        raise OutputError(str(folder), f"cannot be used: {error.strerror}.", _OTHER) from None
    if not (folder / ABOUT).is_file():
        reason = (
            "holds something that is no export, which --force would delete." if force else "is not empty."
        )
        raise OutputError(str(folder), reason, "Name another with --out, or move it away.")
    if not force:
        raise OutputError(str(folder), "exists already.", "Give --force to replace it, or --out.")


def _check_writable(folder: Path, there: Path) -> None:
    """Refuse what could not be written into `there`, the nearest folder that exists, under the names needed.

    Raises:
        OSError: a name is too long for this disk, or nothing can be made here.
        OutputError: the path is no UTF-8.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        reason = "cannot be used: its path is no UTF-8, and safetensors writes to no other."
        raise OutputError(str(folder), reason, _OTHER) from None
    for name in folder.parts[len(there.parts) :] or [folder.name]:
        with contextlib.suppress(FileNotFoundError):
            (there / _LONGEST.format(name)).lstat()
    above = there.parent if there == folder else there
    Path(tempfile.mkdtemp(prefix=".", dir=above)).rmdir()


def check_apart(places: Mapping[str, Path]) -> None:
    """Refuse one folder for two targets, as links may make it.

    Raises:
        OutputError: the later of the two.
    """
    seen: dict[Path, str] = {}
    for target, folder in places.items():
        other = seen.setdefault(folder.resolve(), target)
        if other != target:
            reason = f"is the place of {other} too, by a link."
            raise OutputError(f"{target}: {folder}", reason, "Give each a folder of its own.")


def check_room(needed: Iterable[tuple[Path, int]], spare: int = 0) -> None:
    """Refuse disks without room for the bytes of all folders on them and `spare` beside them for a while.

    What is replaced goes only after the new one is whole.

    Raises:
        OutputError: there is less.
    """
    by_disk: dict[int, int] = {}
    for folder, num_bytes in needed:
        there = _nearest(folder)
        disk = there.stat().st_dev
        by_disk[disk] = by_disk.get(disk, 0) + num_bytes
        wanted = int((by_disk[disk] + spare) * (1 + SPARE)) + 2**20
        free = shutil.disk_usage(there).free
        if free < wanted:
            reason = f"needs {format_bytes(wanted)}, and the disk has {format_bytes(free)} free."
            raise OutputError(str(folder), reason, "Make room, or name a folder on another disk with --out.")


def clear(folder: Path) -> None:
    """Remove what killed exports to this place left; one that was moved aside and not replaced comes back.

    Raises:
        OutputError: another export is writing there now.
    """
    with contextlib.suppress(OSError):  # an unreadable or unwritable place, which `check` tells
        for kind in (REPLACED, UNFINISHED):
            for path in folder.parent.glob(f".{glob.escape(folder.name)}.{kind}-*"):
                if not path.name.rpartition("-")[2].isdigit():
                    continue
                held = _hold(path)
                if held is None:
                    reason = f"is being written by another export, into {path.name}."
                    raise OutputError(str(folder), reason, "Wait for it, or name another with --out.")
                try:
                    if kind == REPLACED and not folder.exists():
                        path.rename(folder)
                    else:
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(held)


@contextlib.contextmanager
def unfinished(folder: Path, *, force: bool) -> Iterator[Path]:
    """A hidden folder to write into, which takes the place of `folder` at the end; nothing else is left.

    A process that is killed leaves the hidden one; the next export to the same place removes it.

    Raises:
        OutputError: as `check`, or the place cannot be written to.
    """
    clear(folder)
    check(folder, force)
    made = [path for path in folder.absolute().parents if not path.exists()]
    partial = folder.with_name(f".{folder.name}.{UNFINISHED}-{os.getpid()}")
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
        except OSError as error:
            raise OutputError(str(folder), f"cannot be written to: {error.strerror}.", _OTHER) from None
        held = _hold(partial)
        try:
            yield partial
            _take_place(partial, folder, force)
        finally:
            if held is not None:
                os.close(held)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def keep_failed(partial: Path, folder: Path) -> Path | None:
    """Move parity.json of an export that drifted to `<folder>.failed`; the rest of it is removed.

    None where something else has that name: the message says what parity.json would.
    """
    failed = folder.with_name(f"{folder.name}.failed")
    try:
        failed.mkdir(exist_ok=True)
        (partial / PARITY).replace(failed / PARITY)
    except OSError:
        return None
    return failed / PARITY


def describe(folder: Path, content: dict[str, Any]) -> None:
    """Write what the folder is into it: the last file, so that no folder without it is whole."""
    files.write_json(folder / ABOUT, content)


def files_of(folder: Path) -> dict[str, int]:
    """Bytes of every file by its path inside the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _take_place(partial: Path, folder: Path, force: bool) -> None:
    """Rename; a replaced export goes only when the new one stands in its place.

    Raises:
        OutputError: another export has been written there meanwhile, which only `force` replaces.
    """
    check(folder, force)
    old = folder.with_name(f".{folder.name}.{REPLACED}-{os.getpid()}")
    held = _hold(folder) if folder.exists() else None
    try:
        if folder.exists() and force:
            folder.rename(old)
        elif folder.exists():
            folder.rmdir()  # it is empty, or there is another's export since the check
        partial.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            reason = "was written by another export meanwhile."
            raise OutputError(str(folder), reason, "Give --force to replace it, or --out.") from None
        raise
    finally:
        if held is not None:
            os.close(held)
    shutil.rmtree(old, ignore_errors=True)
    failed = folder.with_name(f"{folder.name}.failed")
    with contextlib.suppress(OSError):  # somebody's own folder of that name stays
        (failed / PARITY).unlink()
        failed.rmdir()


def _hold(folder: Path) -> int | None:
    """A lock on a folder that ends with this process; None where another process has it.

    Not by the process's number: it may be another's by now, and in a container says nothing to those outside.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; or it is gone
        return os.open(os.devnull, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a disk that knows no locks
        pass
    return handle
