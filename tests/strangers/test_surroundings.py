"""What a stranger types, has in the environment, or stands in: a sentence, and nothing left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from attempts import attempt, check_refused, check_told
from warm import Moment, run

from qlora_phi3.recipe_file import MAX_BYTES


@pytest.fixture
def place(write_recipe: Callable[..., Path], checkpoints: Callable[[], Path], tmp_path: Path) -> Path:
    write_recipe()
    for name in ("one", "two"):
        (tmp_path / "runs" / "tiny" / name).mkdir(parents=True)
        (tmp_path / "runs" / "tiny" / name / "recipe.yaml").touch()
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").touch()
    (tmp_path / "large.yaml").write_text("".join(f"key{i}: 1\n" for i in range(MAX_BYTES // 8)))
    return tmp_path


WORDS = {
    "data for a recipe": ("recipe chats.jsonl", ["chats.jsonl: is a file of data", "`doctor NAME`"]),
    "data for a plan": ("plan chats.jsonl", ["chats.jsonl: is a file of data"]),
    "runs for a run": ("export runs/tiny --to merged", ["runs/tiny: is a folder of runs", "runs/tiny/one"]),
    "runs of runs": ("report runs", ["runs: is a folder of runs", "runs/tiny/two"]),
    "a run for an adapter": ("recipe tiny.yaml adapter.init=run --dry-run", ["is a run; ", "run/adapter."]),
    "no adapter": ("recipe tiny.yaml adapter.init=runs --dry-run", ["runs: holds no adapter."]),
    "a file for an adapter": ("recipe tiny.yaml adapter.init=tiny.yaml --dry-run", ["is no adapter."]),
    "a recipe of megabytes": ("recipe large.yaml --dry-run", ["too much for a recipe"]),
}


@pytest.mark.parametrize("case", WORDS)
def test_words(place: Path, case: str) -> None:
    typed, words = WORDS[case]
    check_refused(attempt(*typed.split(), cwd=place), *words)


ENDLESS = [
    "data.train.limit",
    "train.warmup",
    "train.lora_plus_ratio",
    "evaluate.max_new_tokens",
    "train.epochs",
]


@pytest.mark.parametrize("key", ENDLESS)
def test_numbers_that_no_run_can_have(place: Path, key: str) -> None:
    ended = attempt("recipe", "tiny.yaml", f"{key}=1{'0' * 25}", "--dry-run", cwd=place)
    check_refused(ended, f"{key}: found 1", "must be")


def test_a_run_that_is_all_warm_up_says_so(place: Path) -> None:
    ended = attempt(
        "recipe", "tiny.yaml", "train.warmup=5", "data.eval=", "evaluate.metrics=[loss]", cwd=place
    )
    assert ended.returncode == 0
    assert (
        "warning: all 3 steps are warm-up (train.warmup): the learning rate is never reached" in ended.stderr
    )


def test_what_a_recipe_holds_does_not_move_the_terminal(place: Path) -> None:
    name, text = "a\x1b]0;x\x07\u202e.yaml", "\x1b[31m\u202e\u65e5"
    attempt("recipe", "tiny.yaml", "--copy-to", name, cwd=place)
    assert (place / name).is_file()
    escaped = text.encode("unicode_escape").decode()
    shown = attempt("recipe", "tiny.yaml", "--show", f'description="{escaped}"', cwd=place)
    assert shown.returncode == 0, shown.stderr
    assert yaml.safe_load(shown.stdout)["description"] == text


def _fill_stdout() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_help_that_cannot_be_printed(place: Path, option: str) -> None:
    ended = run(option, cwd=place, moment=Moment("qlora_phi3.cli:_end"), act=_fill_stdout)
    check_told(ended)
    assert ended.returncode == 1 and "No space left on device." in ended.stderr


ENVIRONMENTS: dict[str, tuple[str, str, int, str]] = {
    "processes in letters": ("WORLD_SIZE", "x", 2, "WORLD_SIZE: 'x' is no number of processes. Unset it."),
    "processes in other digits": ("WORLD_SIZE", "\u0662", 2, "WORLD_SIZE: "),
    "too many digits": ("WORLD_SIZE", "9" * 5000, 2, "several processes are not available yet"),
    "no processes": ("WORLD_SIZE", "", 0, ""),
    "a rank": ("LOCAL_RANK", "0", 0, ""),
    "no rank": ("RANK", "x", 0, ""),
    "a launcher's way": ("ACCELERATE_USE_DEEPSPEED", "true", 0, ""),
    "a cache that is a file": ("QLORA_PHI3_CACHE", "tiny.yaml", 0, ""),
}


def _set(name: str, value: str) -> None:
    os.environ[name] = value


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(place: Path, case: str) -> None:
    name, value, code, words = ENVIRONMENTS[case]
    accident = {"moment": Moment("qlora_phi3.cli:main"), "act": _set, "given": (name, value)}
    few = ("train.max_steps=1", "evaluate.metrics=[loss]", "--out", "out")
    ended = run("recipe", "tiny.yaml", *few, cwd=place, **accident)
    check_told(ended)
    assert ended.returncode == code and words in ended.stderr, ended
    assert (place / "out" / "adapter").is_dir() == (code == 0)


def test_a_cache_folder_of_nobody(place: Path) -> None:
    given = ("QLORA_PHI3_CACHE", "~nobody-at-all/x")
    ended = run("plan", "tiny.yaml", cwd=place, moment=Moment("qlora_phi3.cli:main"), act=_set, given=given)
    check_refused(ended, "QLORA_PHI3_CACHE: '~nobody-at-all/x' names no user's home.")


def _leave(folder: str) -> None:
    Path(folder).mkdir()
    os.chdir(folder)
    Path(folder).rmdir()


@pytest.mark.parametrize("command", ["recipe quickstart", "plan quickstart --parts", "doctor quickstart"])
def test_a_working_folder_that_is_gone(tmp_path: Path, command: str) -> None:
    accident = {"moment": Moment("qlora_phi3.cli:main"), "act": _leave, "given": (str(tmp_path / "gone"),)}
    ended = run(*command.split(), "model.base=./base", cwd=tmp_path, **accident)
    check_told(ended)
    check_refused(ended, "the working folder: was removed. Go to another one")
