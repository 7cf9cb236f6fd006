"""The longest row per card: the search finds it, predictions are the memory model's, errors stay visible."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import context, context_probe, results
from bench.__main__ import main
from qlora_phi3 import memory, phi3

NEVER = float("inf")


@pytest.mark.parametrize("guess", [0, 1, 7, 99, 100, 101, 5000])
@pytest.mark.parametrize("answer", [0, 1, 2, 63, 99, 100])
def test_the_search_finds_the_largest_wherever_it_begins(answer: int, guess: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= answer

    search = context.Search(fits, 100)
    search.run(guess)
    assert (search.low, search.high) == (answer, answer + 1)
    assert len(set(asked)) == len(asked) <= 20 and all(1 <= one <= 100 for one in asked)


def test_a_good_guess_and_a_tolerance_save_tries() -> None:
    def tries(guess: int, tolerance: float = 0.0) -> tuple[int, context.Search]:
        asked: list[int] = []
        search = context.Search(lambda number: asked.append(number) or number <= 700, 1000, tolerance)
        search.run(guess)
        return len(asked), search

    rough, found = tries(690, 0.05)
    assert rough <= 3 < tries(690)[0] and found.low <= 700 < found.high <= found.low * 1.05 + 1
    assert tries(1000)[0] > tries(690)[0]
    assert tries(1000, 0.0)[1].low == 700


def test_the_limit_is_tried_first_where_it_is_predicted_to_fit() -> None:
    asked: list[int] = []
    context.Search(lambda number: not asked.append(number), 64).run(64)
    assert asked == [64]


def rows(folder: Path) -> list[dict[str, Any]]:
    [path] = folder.glob("*/context.jsonl")
    return results.read_file(path)


def test_predictions_are_those_of_the_memory_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert main(["context", "--vram=6,24"]) == 0
    found = rows(tmp_path)
    assert [(row["method"], row["vram_gib"]) for row in found] == [
        (name, gib) for name in ("qlora", "lora-bf16", "qlora-native") for gib in (6, 24)
    ]
    geometry = phi3.VARIANTS[context.MINI]
    for row in found:
        assert (row["how"], row["device"], row["model"], row["error"]) == (
            "predicted",
            "cuda",
            "phi3-mini",
            None,
        )
        for key, fits in (("max_length", True), ("too_long", False)):
            if row[key] is not None:
                assert row[key] % context.STEP == 0
                recipe = context.recipe_of(context.MINI, row["method"], row[key])
                plan = memory.predict(recipe, geometry, micro_batch=1)
                assert (plan.needed_bytes <= row["vram_gib"] * 2**30) == fits
    by = {(row["method"], row["vram_gib"]): row["max_length"] for row in found}
    assert by["qlora", 24] > by["lora-bf16", 24] > by["qlora", 6] and by["lora-bf16", 6] is None


def prediction(answer: int) -> context.Search:
    search = context.Search(lambda number: number <= answer, 1024)
    search.run(1024)
    return search


def test_every_try_is_kept_and_out_of_memory_is_too_long() -> None:
    def attempt(length: int) -> dict[str, Any]:
        return {"fits": length <= 80_000, "said": None}

    row = context.measure(attempt, prediction(600), NEVER, 0.0)
    assert row["predicted_max_length"] == 600 * 128
    assert (row["max_length"], row["too_long"]) == (80_000, 80_128) and row["error"] is None
    assert row["tries"][0] == {"length": 600 * 128, "fits": True, "said": None} and not row["stopped"]


def test_another_error_is_a_row_with_it() -> None:
    def attempt(length: int) -> dict[str, Any]:
        if length > 76_800:
            raise context.ProbeError("CUDA error: misaligned address")
        return {"fits": True}

    row = context.measure(attempt, prediction(600), NEVER, 0.0)
    assert row["error"] == "CUDA error: misaligned address"
    assert (row["max_length"], row["too_long"]) == (76_800, None)


def test_without_time_the_bounds_stay() -> None:
    def attempt(length: int) -> dict[str, Any]:
        raise subprocess.TimeoutExpired("probe", 1)

    row = context.measure(attempt, prediction(600), NEVER, 0.0)
    assert row["stopped"] and row["max_length"] is None and row["error"] is None
    assert context.measure(attempt, prediction(600), 0.0, 0.0)["stopped"]


def test_a_measurement_goes_card_by_card_and_keeps_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[[str], Path]
) -> None:
    """With a fake process in place of a GPU's."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(context, "_has_cuda", lambda: True)
    lines: list[list[str]] = []
    real = subprocess.run

    def fake(line: list[str], **settings: Any) -> Any:
        if "context" not in line:
            return real(line, **settings)
        lines.append([*line, settings["env"]["QLORA_PHI3_CACHE"]])
        options = dict(word[2:].split("=") for word in line if word.startswith("--"))
        if options["methods"] == "lora-bf16":
            return subprocess.CompletedProcess(line, 1, "", "Traceback\nRuntimeError: broken\n")
        fits = int(options["probe"]) <= 16 * int(options["vram"])
        return subprocess.CompletedProcess(line, 0, json.dumps({"fits": fits}), "")

    monkeypatch.setattr(context.subprocess, "run", fake)
    assert main(["context", "--device=cuda", "--vram=8,24", f"--model={checkpoints('gqa')}"]) == 0
    found = rows(tmp_path)
    assert [(row["vram_gib"], row["method"], row["max_length"], row["error"]) for row in found] == [
        (8, "qlora", 128, None),
        (8, "lora-bf16", None, "RuntimeError: broken"),
        (8, "qlora-native", 128, None),
        (24, "qlora", 384, None),
        (24, "lora-bf16", None, "RuntimeError: broken"),
        (24, "qlora-native", 384, None),
    ]
    assert all(row["how"] == "measured" and row["model"] == "gqa" for row in found)
    assert len({line[-1] for line in lines}) == 1 and str(checkpoints("gqa")) not in json.dumps(found)


@pytest.mark.parametrize("method", context.METHODS)
def test_a_try_trains_two_steps_at_that_length(
    method: str, checkpoints: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    found = context.probe(str(checkpoints("gqa")), method, 128, 8, "cpu")
    assert found["fits"] and found["said"] is None and found["step_seconds"] > 0
    assert "train 2/2" in capfd.readouterr().err


def test_a_try_without_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(context_probe, "_train", broken)
    assert context.probe("base", "qlora", 128, 8, "cpu") == {
        "fits": False,
        "said": "CUDA out of memory. Tried to allocate 2 GiB",
    }


def test_without_cuda_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(context, "_has_cuda", lambda: False)
    assert main(["context", "--device=cuda"]) == 2
    assert "No CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_made_checkpoint_is_lengthened_without_a_copy(
    tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    from qlora_phi3 import weights

    made = checkpoints("gqa")
    folder = context.lengthened(made, tmp_path / "base", 131072)
    geometry = weights.known_geometry(context.recipe_of(str(folder), "qlora", 128).model)
    assert geometry is not None and geometry.max_positions == 131072
    assert all(file.is_symlink() for file in folder.glob("*.safetensors"))
    assert context.probe(str(folder), "lora-bf16", 640, 8, "cpu")["fits"]  # longer than what it was made for
