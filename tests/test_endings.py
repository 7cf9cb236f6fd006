"""What nothing expected is told in a line, with what is saved; its traceback is in a file to report."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from warm import Moment, run

from qlora_phi3.endings import FAULT


def lose_a_key(folder: str) -> None:
    """A fault as ours are: far from where it shows, with bytes in its words that a terminal obeys."""
    tempfile.tempdir = folder
    {}["\x1b[31mgone"]


@pytest.mark.parametrize(
    ("moment", "is_saved"),
    [("qlora_phi3.model:load", False), ("qlora_phi3.report:write", True)],
    ids=["before training", "at the end"],
)
def test_a_fault_of_ours_costs_no_work_and_no_bearings(
    write_recipe: Callable[..., Path], tmp_path: Path, moment: str, is_saved: bool
) -> None:
    told, out = tmp_path / "told", tmp_path / "out"
    told.mkdir()
    accident = {"moment": Moment(moment), "act": lose_a_key, "given": (str(told),)}
    ended = run("recipe", write_recipe(), "--out", out, cwd=tmp_path, **accident)

    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr and "\x1b" not in ended.stderr
    (details,) = told.glob("qlora-phi3-fault-*")
    line = next(line for line in ended.stderr.splitlines() if FAULT in line)
    assert re.match(r"tiny: .*: KeyError: .*gone.* \(test_endings\.py, line \d+\)\.", line), line
    assert str(details) in line
    assert "Traceback (most recent call last)" in details.read_text() and "lose_a_key" in details.read_text()
    if is_saved:
        assert f"{out / 'adapter'}: is the trained adapter, saved whole." in ended.stderr
        assert load_file(out / "adapter" / "adapter_model.safetensors")
    else:
        assert not out.exists()


def test_a_fault_outside_a_run_whose_details_have_no_place(tmp_path: Path) -> None:
    accident = {"moment": Moment("qlora_phi3.cli:list_recipes"), "act": lose_a_key, "given": ("/nowhere",)}
    ended = run("recipe", cwd=tmp_path, **accident)
    assert ended.returncode == 1 and ended.stderr.startswith(f"recipe: {FAULT}: KeyError")
    assert "Its details cannot be written: No such file or directory." in ended.stderr
