"""Pushing an export to the hub: what may go there, and the one call that sends it.

Owns which files are fit for others. Refuses pickles, absolute paths and what looks like a token. The token
comes from the environment's HF_TOKEN alone. The upload is huggingface_hub's: its client is tested against a
hub of the tests' own, not against huggingface.co.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import files
from ..errors import InputError, OutputError, Problem, RunError, shown
from ..recipe_values import is_hub_id
from ..units import format_bytes
from ..weights import first_line
from . import destination
from .options import Options, Say

if TYPE_CHECKING:
    from . import Exported
    from .source import Source

TOKEN: Final = "HF_TOKEN"
PICKLES: Final = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_TEXTS: Final = (".json", ".md", ".txt", ".jinja", ".yaml", "")
_MAX_TEXT_BYTES: Final = 2**20
"""Larger ones are tokenizers, whose words would look like anything."""

_SECRET: Final = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
)
_PATH: Final = re.compile(
    r"(?<![\w.:/<>~-])(/(?:home|Users|root|mnt|tmp|data|var|opt|workspace|content)/[\w.~/-]+|[A-Z]:\\\\?[\w.\\-]+)"
)
_LOCAL_FILES: Final = (destination.ABOUT, destination.PARITY)
"""Stay here: they are about this export and for --force."""


def push(source: Source, folder: Path | None, options: Options, say: Say) -> Exported:
    """Upload the export `options.what` with its model card; with `dry_run` only list what would be sent.

    Raises:
        InputError: there is no such export, or a file is not fit for others, or no token, or no such id.
        RunError: the hub refused it.
    """
    from . import Exported

    folder = folder or destination.folder_of(source.run, source.folder, options.what)
    repo = options.repo or ""
    files = check(folder, options.what, repo)
    for name, size in files.items():
        say(f"{name}  {format_bytes(size)}")
    if options.dry_run:
        say(f"{len(files)} files, {format_bytes(sum(files.values()))} for {repo}; nothing was sent")
        return Exported("hub", folder, files, {"repo": repo, "sent": False})
    address = _upload(folder, repo, sorted(files), _token())
    say(f"sent to {address}")
    return Exported("hub", folder, files, {"repo": repo, "sent": True, "address": address})


def check_first(source: Source, written: Path | None, options: Options) -> None:
    """What can be refused before anything is written; `written`: where what is pushed will come from.

    Raises:
        InputError: as `push`.
    """
    repo = options.repo or ""
    if written is None:
        check(destination.folder_of(source.run, source.folder, options.what), options.what, repo)
    _check_repo(repo)
    if not options.dry_run:
        _token()


def _check_repo(repo: str) -> None:
    if not is_hub_id(repo):
        raise InputError("--repo", f"{shown(repo)} is no org/name.", "Write --repo you/name.")


def _token() -> str:
    found = os.environ.get(TOKEN)
    if not found:
        raise InputError(TOKEN, "is not set.", "Export a token of yours that may write, or give --dry-run.")
    return found


def check(folder: Path, what: str, repo: str) -> dict[str, int]:
    """Bytes by name of the files that would be sent, each fit for others.

    Raises:
        InputError: as `push`.
    """
    _check_repo(repo)
    if not (folder / destination.ABOUT).is_file():
        remedy = f"Export it first: --to {what} --to hub."
        raise OutputError(str(folder), f"there is no export of {what} here.", remedy)
    files = {n: size for n, size in destination.files_of(folder).items() if n not in _LOCAL_FILES}
    problems = [problem for name in files if (problem := _unfit(folder / name)) is not None]
    if problems:
        raise OutputError.of(problems)
    return files


def _unfit(path: Path) -> Problem | None:
    """Why a file must not leave this machine; None where it may."""
    if path.is_symlink():
        return Problem(str(path), "is a link.", "Export it again.")
    if path.suffix in PICKLES:
        return Problem(str(path), "is a pickle, which can run code.", "Push a target in safetensors.")
    if path.suffix not in _TEXTS or path.stat().st_size > _MAX_TEXT_BYTES:
        return None
    text = files.read_bytes(path).decode("utf-8", "replace")
    if _SECRET.search(text):
        return Problem(
            str(path), "holds what looks like an access token.", "Remove it, and revoke the token."
        )
    found = _PATH.search(text)
    here = next(
        (p for p in (str(path.absolute().parent), str(Path.home())) if len(p) > 1 and p in text), None
    )
    if found or here:
        there = here or (found[0] if found else "")
        return Problem(
            str(path), f"holds a path of this machine, {shown(there)}.", "Remove it, then push again."
        )
    return None


def _upload(folder: Path, repo: str, files: list[str], token: str) -> str:
    from huggingface_hub import HfApi

    api: Any = HfApi(token=token)
    try:
        api.create_repo(repo, exist_ok=True, private=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files)
    except Exception as error:  # its HTTP library's errors are no OSError
        reason = f"the hub refused it: {first_line(error).replace(token, '***').rstrip(' .')}."
        raise RunError(f"--repo {repo}", reason, "Check the name and what the token may do.") from None
    return f"{api.endpoint}/{repo}"
