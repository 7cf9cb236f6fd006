"""What every command owes whoever calls it, with whatever files: checked after each attempt of a stranger.

An attempt is one command line in a child of a process that has imported torch already (`warm.py`), so that
hundreds of them cost a fraction of a second each.
"""

from __future__ import annotations

import re
from pathlib import Path

from warm import Ended, run

from qlora_phi3.endings import FAULT

EXIT_CODES = {
    0: "done",
    1: "failed while running",
    2: "input refused",
    3: "stopped, the adapter is saved",
    4: "does not fit in memory",
    129: "stopped by a closed terminal, nothing to save",
    130: "stopped by Ctrl-C, nothing to save",
    143: "stopped by SIGTERM, nothing to save",
}
"""As README documents them."""

RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What reaches a terminal as a command: control bytes, and marks that turn the order of letters."""

PROBLEM = re.compile(r"\S.*?: \S.*")
LONGEST_LINE = 5000


def attempt(*arguments: object, cwd: Path) -> Ended:
    """One command line; it is an error of ours where `check_told` finds one."""
    ended = run(*arguments, cwd=cwd)
    check_told(ended)
    return ended


def check_told(ended: Ended) -> None:
    """No traceback, no raw control byte, a documented exit code, and a refusal that says where and why."""
    told = ended.stdout + ended.stderr
    assert "Traceback (most recent call last)" not in told, told
    assert FAULT not in told, told
    assert ended.returncode in EXIT_CODES, f"exit code {ended.returncode}: {told}"
    assert not (raw := RAW.search(told)), f"{raw.group()!r} reaches the terminal: {told!r}"
    lines = ended.stderr.splitlines()
    assert all(len(line) <= LONGEST_LINE for line in lines), "a line without end"
    if ended.returncode in (1, 2, 4):
        answer = lines or ended.stdout.splitlines()  # what doctor and plan find is their answer
        assert answer, f"exit code {ended.returncode} without a word"
        assert any(PROBLEM.match(line) for line in answer), told


def check_refused(ended: Ended, *words: str) -> None:
    """Refused before anything was done, with these words."""
    assert ended.returncode == 2, ended
    assert [word for word in words if word not in ended.stderr] == [], ended.stderr
