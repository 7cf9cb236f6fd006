"""speeds.py: what trainings here reached, beside the plan of a recipe that is trained alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import write_chats

from qlora_phi3 import builtin, pipeline, speeds
from qlora_phi3.recipe import Recipe

CARD = {"device": "cuda", "gpu": "NVIDIA GeForce RTX 3060", "cpu_cores": 8}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(builtin.CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe(base: str = "here", **train: Any) -> Recipe:
    parts = {"model": {"base": base}, "data": {"train": {"path": "x.jsonl"}}, "train": train}
    return Recipe.model_validate({"version": 1, "name": "x", **parts})


def speed(tokens_per_second: float = 900.0, machine: Any = CARD, base: str = "here", **train: Any) -> Any:
    settled = {"engine": "native", "activations": "recompute", "kept_layers": 0, "micro_batch": 2} | train
    found = recipe(base, **settled)
    return speeds.Speed.of(found, machine, tokens_per_second, 512, "2026-01-02T03:04:05+00:00")


def test_the_newest_of_each_way_and_the_fastest_first() -> None:
    slow, newer, keeping = speed(900), speed(800), speed(1234.5, activations="keep")
    other = speed(100, machine={"cpu_cores": 2})
    for one in (slow, newer, keeping, other, speed(1.0, micro_batch=1), speed(5000, base="there")):
        speeds.note(one)
    assert speeds.alike(recipe()) == [keeping, newer, other]


def test_only_what_the_recipe_leaves_open() -> None:
    kept = speed(700, activations="recompute", kept_layers=3)
    for one in (kept, speed(600, engine="reference"), speed(500, micro_batch=1)):
        speeds.note(one)
    assert speeds.alike(recipe(micro_batch=2, engine="native")) == [kept]
    assert speeds.alike(recipe(activations="keep")) == []
    full = recipe().model_copy(update={"model": recipe().model.model_copy(update={"quantization": "none"})})
    assert speeds.alike(full) == []


def test_words() -> None:
    way = "native engine, recompute but 3 layers, micro batch 2"
    where = "NVIDIA GeForce RTX 3060, 2026-01-02"
    assert speed(1234.5, kept_layers=3).words == f"1,234 tokens/s: {way}, rows of 512 tokens; {where}"
    assert "CPU, 2 cores, 2026" in speed(machine={"cpu_cores": 2}).words


@pytest.mark.parametrize("line", ["{", "[]", '{"tokens_per_second": 1}', '"x"', "\x00\udcff", "null"])
def test_lines_of_something_else_say_nothing(cache: Path, line: str) -> None:
    speeds.note(speed())
    with (cache / "speeds.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
        file.write(json.dumps(speed().to_json() | {"tokens_per_second": "fast"}) + "\n")
    assert speeds.alike(recipe()) == [speed()]


def test_the_older_half_makes_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "MAX_BYTES", 2000)
    for number in range(40):
        speeds.note(replace(speed(), machine=f"card {number}"))
    assert (cache / "speeds.jsonl").stat().st_size < 3000
    assert speeds.alike(recipe())[0].machine.startswith("card ")
    assert "card 39" in (cache / "speeds.jsonl").read_text()


def test_nothing_was_trained_here() -> None:
    assert speeds.alike(recipe()) == []


def test_a_run_and_then_its_plan(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """Through the command line: nothing is known, then a line and its JSON."""
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "tiny.yaml").write_text(
        f"version: 1\nname: tiny\nmodel: {{base: {checkpoints('gqa')}}}\nadapter: {{rank: 4}}\n"
        "data: {train: {path: chats.jsonl}, max_length: 128}\n"
        f"train: {{max_steps: {speeds.LEAST_STEPS}, effective_batch: 2}}\n"
    )

    def command(*arguments: str) -> str:
        line = (sys.executable, "-m", "qlora_phi3", *arguments)
        environment = os.environ | {"COLUMNS": "200"}
        return subprocess.run(
            line, cwd=tmp_path, env=environment, check=True, text=True, capture_output=True
        ).stdout

    assert json.loads(command("plan", "tiny.yaml", "--json"))["measured"] == []
    command("recipe", "tiny.yaml", "--out", "run")
    training = json.loads((tmp_path / "run" / "report.json").read_text())["training"]
    (found,) = json.loads(command("plan", "tiny.yaml", "--json"))["measured"]
    assert found["tokens_per_second"] == training["tokens_per_second"] > 0
    assert (found["engine"], found["activations"], found["micro_batch"]) == ("native", "keep", 2)
    assert found["row_tokens"] == training["num_tokens"] // (2 * speeds.LEAST_STEPS)
    words = f"measured here: {found['tokens_per_second']:,.0f} tokens/s: native engine, keep, micro batch 2, "
    assert words in command("plan", "tiny.yaml")
    assert "measured here" not in command("plan", "tiny.yaml", "model.quantization=none")


class Done:
    """What `_note_speed` reads of a report."""

    training: ClassVar[dict[str, float]] = {
        "num_tokens": 100,
        "num_rows": 10,
        "num_steps": 10,
        "tokens_per_second": 5.0,
    }
    machine = CARD
    finished_utc = "2026-01-02T03:04:05+00:00"


def noting(done: Any) -> list[str]:
    """What is said while a training is noted."""
    said: list[str] = []
    display: Any = type("Display", (), {"say": staticmethod(said.append)})()
    settled = recipe(engine="native", activations="keep", kept_layers=0, micro_batch=1)
    pipeline._note_speed(done, settled, display)
    return said


def test_a_few_steps_say_little() -> None:
    few = type("Few", (Done,), {"training": Done.training | {"num_steps": speeds.LEAST_STEPS - 1}})
    assert noting(few()) == [] and speeds.alike(recipe()) == []
    assert noting(Done()) == [] and [one.tokens_per_second for one in speeds.alike(recipe())] == [5.0]


@pytest.mark.parametrize("there", ["link", "dangling", "pipe"])
def test_speeds_go_into_no_other_file(cache: Path, tmp_path: Path, there: str) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    victim = tmp_path / "victim"
    if there == "pipe":
        os.mkfifo(cache / "speeds.jsonl")
    else:
        (cache / "speeds.jsonl").symlink_to(victim)
    if there == "link":
        victim.write_text("mine")
    with pytest.raises(OSError, match=r"symbolic links|No such device"):
        speeds.note(speed())
    assert victim.read_text() == "mine" if there == "link" else not victim.exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(builtin.CACHE_ENV, str(tmp_path / "file"))
    (said,) = noting(Done())
    assert "not noted for later plans" in said
