"""Errors say place, reason and remedy, carry several problems, and know their exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_phi3 import installed
from qlora_phi3.errors import (
    MAX_SHOWN,
    DataError,
    FitError,
    InputError,
    ModelError,
    OutputError,
    Problem,
    QloraError,
    RecipeError,
    RunError,
    is_file,
    is_folder,
    shown,
)

RANK = Problem("r.yaml:3: adapter.rank", "found 0, must be 1 or more.")
EPOCHS = Problem("r.yaml:7: train.epochs", "found 'x', needs a whole number.", "Write 1.")


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (RANK, "r.yaml:3: adapter.rank: found 0, must be 1 or more."),
        (EPOCHS, "r.yaml:7: train.epochs: found 'x', needs a whole number. Write 1."),
        (Problem("a\x1b[2J\nb.csv:2", "has \u202e."), "a\\x1b[2J\\nb.csv:2: has \\u202e."),
    ],
)
def test_a_problem_reads_place_reason_remedy(problem: Problem, text: str) -> None:
    assert str(problem) == text
    error = RecipeError(problem.place, problem.reason, problem.remedy)
    assert str(error) == text
    assert error.problems == (problem,)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("gnp\u202ejpg", r"gnp\u202ejpg"),
        ("\x9b2J\u2028\udc80", r"\x9b2J\u2028\udc80"),
        ("日本 ü\u3000😀", "日本 ü\u3000😀"),
    ],
)
def test_no_name_writes_to_the_terminal(name: str, shown: str) -> None:
    assert str(Problem(name, name, name)) == f"{shown}: {shown} {shown}"
    assert str(ModelError(name, "is bad.")) == f"{shown}: is bad."


def test_endless_names_are_cut() -> None:
    assert len(str(Problem("x" * 10**6, "y" * 10**6, "z"))) < 5000


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_file(tmp_path / "file") and not is_folder(tmp_path / "file")
    assert is_folder(tmp_path) and not is_file(tmp_path)
    assert not is_file(tmp_path / "file" / "below") and not is_folder(tmp_path / "none")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / ("x" * 300), tmp_path / "loop", Path("a\0b")):
        with pytest.raises(ModelError, match="cannot be looked up: "):
            is_file(path, ModelError)


def test_one_error_carries_all_problems_in_order() -> None:
    error = RecipeError.of(problem for problem in (EPOCHS, RANK))
    assert type(error) is RecipeError
    assert error.problems == (EPOCHS, RANK)
    assert str(error) == f"{EPOCHS}\n{RANK}"


def test_an_error_without_problems_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RecipeError.of([])


@pytest.mark.parametrize(
    ("kind", "parent", "exit_code"),
    [
        (RecipeError, InputError, 2),
        (DataError, InputError, 2),
        (ModelError, InputError, 2),
        (OutputError, InputError, 2),
        (InputError, QloraError, 2),
        (RunError, QloraError, 1),
        (FitError, QloraError, 4),
    ],
)
def test_exit_codes(kind: type[QloraError], parent: type[QloraError], exit_code: int) -> None:
    with pytest.raises(parent) as caught:
        raise kind("place", "reason.")
    assert caught.value.exit_code == exit_code


def test_a_value_is_cut_for_a_message() -> None:
    assert shown("it's") == '"it\'s"'
    assert shown("x" * 58) == f"'{'x' * 58}'"
    assert shown("x" * 59) == f"'{'x' * 56}..."
    assert len(shown("x" * 1_000_000)) == MAX_SHOWN


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 10, 0)])
def test_a_python_that_is_too_old(
    version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.version_info", version)
    if version >= installed.LEAST:
        installed.check_python()
        return
    with pytest.raises(SystemExit) as stopped:
        installed.check_python()
    assert stopped.value.code == 2
    assert "Python 3.10 or newer is needed, this is 3.9.18" in capsys.readouterr().err


def test_a_missing_module_of_our_own_is_our_bug() -> None:
    for name in ("qlora_phi3.gone", "bench", None):
        with pytest.raises(ImportError):
            installed.stop(ModuleNotFoundError("gone", name=name))
