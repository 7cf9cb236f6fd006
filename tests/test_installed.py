"""Too little memory for the libraries, of a machine or by a limit: told in a line, not as their absence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_chats

from qlora_phi3 import installed

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no limit of its addresses")
def test_libraries_that_find_no_room(tmp_path: Path) -> None:
    import resource

    write_chats(tmp_path / "c.jsonl", 1)
    (tmp_path / "r.yaml").write_text("version: 1\nname: t\ndata: {train: {path: c.jsonl}}\n")
    room = 800_000_000  # torch's own libraries take more
    done = subprocess.run(
        [sys.executable, "-m", "qlora_phi3", "recipe", "r.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (room, room)),
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 4, done.stderr
    assert last == installed.NO_MEMORY or last.startswith("recipe: out of memory: "), last
    assert "Traceback" not in done.stderr


def test_the_reason_may_be_deep_inside() -> None:
    error = ImportError("numpy cannot be imported")
    error.__cause__ = ImportError("libx.so: failed to map segment from shared object")
    assert installed.lacks_memory(error) and installed.lacks_memory(MemoryError())
    assert not installed.lacks_memory(ImportError("no such module"))
