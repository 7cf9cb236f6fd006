"""`python -m bench quality`: a row a run, each run once, the same cost for each variant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import quality, results
from bench.__main__ import main
from qlora_phi3 import weights
from qlora_phi3.recipe_file import find_recipe, load_recipe


def rows(folder: Path) -> list[dict[str, Any]]:
    [path] = folder.glob("*/quality.jsonl")
    return results.read_file(path)


def test_a_row_for_each_run_and_none_twice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    line = ["quality", f"--recipe={write_recipe()}", "--variants=fused,split", "--steps=2"]
    assert main([*line, "--seeds=42"]) == 0
    fused, split = first = rows(tmp_path / "results")
    assert (fused["variant"], fused["rank"], split["variant"], split["rank"]) == ("fused", 12, "split", 10)
    assert fused["recipe_sha256"] == split["recipe_sha256"] and fused["overrides"] != split["overrides"]
    assert all(row["training"]["num_steps"] == row["steps"] == 2 and row["seed"] == 42 for row in first)
    # (hidden 64, intermediate 128, 4 heads of 16, 2 of them for k and v): by hand, 2 layers
    assert fused["trained_parameters"] == 2 * 12 * ((64 + 128) + (64 + 64) + (64 + 256) + (128 + 64))
    assert split["trained_parameters"] == 2 * 10 * (128 + 2 * 96 + 128 + 2 * 192 + 192)
    for row in first:
        assert set(row["eval"]) == {"loss", "exact_match", "json_match"} and row["eval_samples"] == 4
        assert row["training"]["first_loss"] > 0 < row["training"]["last_loss"]
        assert row["seconds"] > row["train_seconds"] > 0 and row["peak_bytes"] > 2**20
        assert row["commit"] and row["versions"]["peft"] and str(tmp_path) not in json.dumps(row)

    capsys.readouterr()
    assert main([*line, "--seeds=42,7"]) == 0
    assert capsys.readouterr().out.count("measured before") == 2
    second = rows(tmp_path / "results")
    assert second[:2] == first and [(row["variant"], row["seed"]) for row in second[2:]] == [
        ("fused", 7),
        ("split", 7),
    ]
    assert second[2]["training"]["first_loss"] != fused["training"]["first_loss"]


def test_the_variants_of_the_table_cost_the_same_on_the_built_in_model() -> None:
    found = {}
    for name in quality.ADAPTERS:
        recipe = load_recipe(find_recipe("quickstart"), [*quality.SHARED, *quality.VARIANTS[name]])
        geometry = weights.known_geometry(recipe.model)
        assert geometry is not None and recipe.adapter.alpha == 2 * recipe.adapter.rank
        parts = tuple(part for _, part in recipe.adapter.pairs)
        found[name] = geometry.lora_parameters(parts, recipe.adapter.rank)
    assert found == {"fused": 30 * 101_376, "split": 30 * 101_760, "qv": 30 * 101_760}


@pytest.mark.parametrize("name", [name for name in quality.VARIANTS if name != "full"])
def test_a_variant_changes_the_adapter_and_quantization_only(name: str) -> None:
    path = find_recipe("quickstart")
    changed = load_recipe(path, quality.VARIANTS[name]).model_dump(exclude={"adapter": True})
    stock = load_recipe(path).model_dump(exclude={"adapter": True})
    if name == "lora-bf16":
        assert changed["model"].pop("quantization") != stock["model"].pop("quantization")
    assert changed == stock


def test_the_fingerprint_sees_rows_and_settings_and_no_folder(tmp_path: Path) -> None:
    def written(folder: str, answer: str, train: str = "seed: 1") -> str:
        place = tmp_path / folder
        place.mkdir()
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]}
        (place / "chats.jsonl").write_text(json.dumps(row) + "\n")
        text = f"version: 1\nname: one\ndata: {{train: {{path: chats.jsonl}}}}\ntrain: {{{train}}}\n"
        (place / "one.yaml").write_text(text)
        return quality.fingerprint(load_recipe(place / "one.yaml"))

    here = written("here", "b")
    assert written("there", "b") == here
    assert written("default", "b", "seed: 1, epochs: 1") == here
    assert len({here, written("rows", "c"), written("settings", "b", "seed: 2")}) == 3


def test_an_unknown_variant_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["quality", "--variants=fused,slit"])
    assert "'slit' is none of fused, split, qv, qlora, lora-bf16, full" in capsys.readouterr().err


def test_full_fine_tuning_sees_the_same_rows_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    line = ["quality", f"--recipe={write_recipe()}", "--steps=2", "--seeds=42"]
    assert main([*line, "--variants=lora-bf16,full"]) == 0
    lora, full = rows(tmp_path / "results")
    assert full["training"]["first_loss"] == pytest.approx(lora["training"]["first_loss"], rel=0.01)
    assert full["training"]["num_steps"] == 2 and set(full["eval"]) == set(lora["eval"])
    assert full["trained_parameters"] > 10 * 2 * 64 * 64 and full["rank"] is None
    assert full["eval_samples"] == 4 and full["peak_bytes"] > 2**20
    assert full["seconds"] > full["train_seconds"]
