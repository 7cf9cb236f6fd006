"""Where an export is written: beside its place first, under a hidden name, and renamed when it is whole.

Owns what may be replaced, whether the disk has room, and leaving nothing behind. Refuses to replace what is
no export. Knows nothing of torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..errors import OutputError
from ..units import format_bytes

ABOUT: Final = "export.json"
"""What an exported folder says of itself, and what makes it one that --force may replace."""
PARITY: Final = "parity.json"
SPARE: Final = 0.02
"""Share of the predicted bytes that must be free beside them: configs, tokenizers, the file system's own."""


def folder_of(run: Path | None, adapter: Path, target: str) -> Path:
    """`exports/<target>` of the run, or beside an adapter that belongs to none."""
    return (run or adapter.absolute().parent) / "exports" / target.replace(":", "-")


def real(folder: Path) -> Path:
    """Where a link in a target's place leads, as to a bigger disk; the link stays."""
    try:
        return folder.resolve() if folder.is_symlink() and folder.is_dir() else folder
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
            raise OutputError(str(folder), f"cannot be made: {there} is a file.", "Name another with --out.")
        if there != folder or not any(folder.iterdir()):
            return
    except OSError as error:
        reason = f"cannot be used: {error.strerror}."
        raise OutputError(str(folder), reason, "Name another with --out.") from None
    if not (folder / ABOUT).is_file():
        reason = (
            "holds something that is no export, which --force would delete." if force else "is not empty."
        )
        raise OutputError(str(folder), reason, "Name another with --out, or move it away.")
    if not force:
        raise OutputError(str(folder), "exists already.", "Give --force to replace it, or --out.")


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse a disk without room for `num_bytes`; what is replaced goes only after the new one is whole.

    Raises:
        OutputError: there is less.
    """
    free, needed = shutil.disk_usage(_nearest(folder)).free, int(num_bytes * (1 + SPARE)) + 2**20
    if free < needed:
        reason = f"needs {format_bytes(needed)}, and the disk has {format_bytes(free)} free."
        raise OutputError(str(folder), reason, "Make room, or name a folder on another disk with --out.")


@contextlib.contextmanager
def unfinished(folder: Path, *, force: bool) -> Iterator[Path]:
    """A hidden folder to write into, which takes the place of `folder` at the end; nothing else is left.

    A process that is killed leaves the hidden one; the next export to the same place removes it.

    Raises:
        OutputError: as `check`, or the place cannot be written to.
    """
    check(folder, force)
    made = [path for path in folder.absolute().parents if not path.exists()]
    partial = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_dead(folder)
            partial.mkdir()
        except OSError as error:
            reason = f"cannot be written to: {error.strerror}."
            raise OutputError(str(folder), reason, "Name another with --out.") from None
        yield partial
        _take_place(partial, folder, force)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def keep_failed(partial: Path, folder: Path) -> Path:
    """Move parity.json of an export that drifted to `<folder>.failed`; the rest of it is removed."""
    failed = folder.with_name(f"{folder.name}.failed")
    failed.mkdir(exist_ok=True)
    (partial / PARITY).replace(failed / PARITY)
    return failed


def describe(folder: Path, content: dict[str, Any]) -> None:
    """Write what the folder is into it: the last file, so that no folder without it is whole."""
    write_json(folder / ABOUT, content)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder.with_name(f"{folder.name}.failed"), ignore_errors=True)


def _remove_dead(folder: Path) -> None:
    """What killed processes left of an export to the same place."""
    import psutil

    for kind in ("unfinished", "replaced"):
        for path in folder.parent.glob(f".{folder.name}.{kind}-*"):
            owner = path.name.rpartition("-")[2]
            if owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
                shutil.rmtree(path, ignore_errors=True)
