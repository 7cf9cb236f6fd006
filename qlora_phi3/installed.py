"""Whether this Python can run the toolkit at all, said before anything of it is imported.

Owns the message for a forgotten `activate` and for a Python that is too old. Imports nothing but the standard
library, and nothing in it is newer than Python 3.7.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

LEAST = (3, 10)


def check_python() -> None:
    """Stop with exit code 2 where Python is too old."""
    if sys.version_info < LEAST:
        found = ".".join(str(number) for number in sys.version_info[:3])
        _stop(f"Python {LEAST[0]}.{LEAST[1]} or newer is needed, this is {found} ({sys.executable}).")


def stop(error: ImportError | MemoryError) -> None:
    """Stop with exit code 2 where a package that we need is missing or cannot be used, 4 for lack of memory.

    Raises:
        ImportError: of a module of our own, which is our bug.
    """
    if lacks_memory(error):
        print(NO_MEMORY, file=sys.stderr)  # noqa: T201
        sys.exit(4)
    assert isinstance(error, ImportError)
    name = (error.name or "").partition(".")[0]
    if not name or name in (__package__, "bench"):
        raise error
    what = "is not installed in" if isinstance(error, ModuleNotFoundError) else f"cannot be used ({error}) by"
    _stop(f"the package {name} {what} this Python ({sys.executable}).")


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an import, or what went on after it, failed because there was no memory for it."""
    while error is not None:
        if isinstance(error, MemoryError) or any(said in str(error) for said in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


_NO_MEMORY = ("failed to map segment", "Cannot allocate memory", "cannot allocate memory")
"""What the loader of shared libraries says, and the system."""
NO_MEMORY = "memory: too little is left to start this program. Close others, or raise its limit (ulimit -v)."


def _stop(reason: str) -> None:
    print(f"qlora_phi3: {reason} {_remedy()}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _remedy() -> str:
    script = Path("Scripts", "activate") if os.name == "nt" else Path("bin", "activate")
    source = "" if os.name == "nt" else ". "
    checkout = Path(__file__).absolute().parent.parent
    for folder in (Path.cwd(), checkout):
        if (folder / ".venv" / script).is_file() and Path(sys.prefix) != folder / ".venv":
            return f"Activate the environment that is there: `{source}{folder / '.venv' / script}`."
    return (
        "Make the environment with `make quickstart`, or install into this one with "
        f"`pip install -c constraints.txt .`, both in {checkout}; then `{source}{Path('.venv') / script}`."
    )
