"""The folder that a run is written into: where it is, whether it can be used, and leaving nothing behind.

Owns refusing folders that hold something and cleaning up after refused input. No torch.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, OutputError
from .recipe import Recipe

REMEDY = "Choose another folder with --out."


def default(recipe: Recipe) -> Path:
    """runs/<name>/<UTC time>, new."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return Path("runs") / recipe.name / now.strftime("%Y-%m-%dT%H-%M-%SZ")


@contextlib.contextmanager
def create(folder: Path) -> Iterator[Path]:
    """An empty folder to write a run into; removed again when the input turns out unusable.

    Raises:
        OutputError: it holds something already, or cannot be written to.
    """
    check_folder(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        _remove(folder, created)
        reason = f"cannot be written to: {error.strerror}."
        raise OutputError(str(folder), reason, REMEDY) from None
    try:
        yield folder
    except InputError:
        _remove(folder, created)
        raise


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything or cannot be made; whether it can be written, the run tries.

    Raises:
        OutputError: another run, other files, or no folder at all.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            reason = "is a file." if there == folder else f"cannot be made: {there} is a file."
            raise OutputError(str(folder), reason, REMEDY)
        if there == folder and any(folder.iterdir()):
            reason = "holds another run." if (folder / "recipe.yaml").exists() else "is not empty."
            raise OutputError(str(folder), reason, REMEDY)
    except OSError as error:
        raise OutputError(str(folder), f"cannot be used: {error.strerror}.", REMEDY) from None


def _remove(folder: Path, created: list[Path]) -> None:
    """Undo `create`: its contents, and the parents that it made."""
    if folder in created:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        for child in folder.iterdir():
            shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink()
    for parent in created[1:]:
        with contextlib.suppress(OSError):
            parent.rmdir()
