"""A whole run through the real command line: what it leaves, that it repeats, and what others can load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from warm import Ended, run

from qlora_phi3 import memory, settle
from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import load_recipe

RUN_FOLDER = {
    "recipe.yaml",
    "plan.json",
    "metrics.jsonl",
    "adapter",
    "eval.json",
    "report.json",
    "report.html",
}


KEPT = {"activations": "keep", "kept_layers": 2, "keep_attention": False, "slice_columns": "all", "host": ()}
"""What `auto` becomes on a tiny model of two layers."""


def command(*arguments: object) -> Ended:
    """One command line in a child of a process that has imported torch already; `finished` is a plain one."""
    return run(*arguments, cwd=Path(tempfile.mkdtemp()))


def step_losses(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder, recipe) of one small run, `micro_batch: auto`."""
    from conftest import make_checkpoint, write_chats

    home = tmp_path_factory.mktemp("run")
    make_checkpoint(home / "base", "gqa")
    write_chats(home / "chats.jsonl")
    recipe = home / "small.yaml"
    recipe.write_text(
        "version: 1\nname: small\nmodel: {base: ./base}\nadapter: {rank: 4, alpha: 8, dropout: 0.1}\n"
        "data: {train: {path: chats.jsonl}, eval: {path: chats.jsonl, limit: 6}, max_length: 128}\n"
        "train: {max_steps: 6, effective_batch: 4, learning_rate: 2.0e-2}\n"
        "evaluate: {metrics: [loss, perplexity, exact_match, json_match], samples: 6, max_new_tokens: 8}\n"
    )
    line = [sys.executable, "-m", "qlora_phi3", "recipe", recipe, "--out", home / "out"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return home / "out", recipe


def test_the_run_folder_is_as_promised(finished: tuple[Path, Path]) -> None:
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == RUN_FOLDER
    adapter = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= adapter
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_resolved_recipe_is_settled_and_repeats_the_run(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, original = finished
    resolved = load_recipe(folder / "recipe.yaml")
    assert resolved.train.micro_batch == 4
    assert resolved == load_recipe(original).settled(micro_batch=4, engine="native", **KEPT)
    report = json.loads((folder / "report.json").read_text())
    assert report["engine"] == {"name": "native", "reason": "it is proven on CPUs"}
    done = command("recipe", folder / "recipe.yaml", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert step_losses(tmp_path / "again") == step_losses(folder)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


def test_metrics_stand_equal_in_all_three_places(finished: tuple[Path, Path]) -> None:
    folder, _ = finished
    report, evaluated = (json.loads((folder / n).read_text()) for n in ("report.json", "eval.json"))
    for which in ("base", "tuned"):
        assert report["metrics"][which] == evaluated[which]["metrics"]
        assert len(evaluated[which]["samples"]) == 6
        exact = sum(sample["exact_match"] for sample in evaluated[which]["samples"]) / 6
        assert report["metrics"][which]["exact_match"] == exact
    assert report["metrics"]["tuned"]["loss"] < report["metrics"]["base"]["loss"]
    assert list(report["memory"]["measured"]["phases"]) == [
        "load",
        "evaluate base",
        "train",
        "save",
        "evaluate tuned",
    ]


def test_the_adapter_loads_in_plain_peft_with_the_same_loss(finished: tuple[Path, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    from qlora_phi3 import data, evaluate, model, weights
    from qlora_phi3.engine import attention

    folder, recipe_path = finished
    recipe = load_recipe(recipe_path)
    cpu = torch.device("cpu")
    base = model.load(weights.locate(recipe.model), recipe.model, cpu, attention.register())
    tuned = PeftModel.from_pretrained(base.model, folder / "adapter")
    splits = data.load(recipe.data, AutoTokenizer.from_pretrained(folder / "adapter"))
    assert splits.eval is not None
    live = json.loads((folder / "eval.json").read_text())["tuned"]["metrics"]["loss"]
    assert evaluate.mean_loss(tuned, splits.eval.rows[:6], 4) == live
    with tuned.disable_adapter():
        assert evaluate.mean_loss(tuned, splits.eval.rows[:6], 4) != live


def test_the_adapter_loads_in_a_stock_4_bit_model(finished: tuple[Path, Path]) -> None:
    """Without our loader; on a CPU bitsandbytes then repacks weights and rounds a little differently."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from qlora_phi3 import data, evaluate
    from qlora_phi3.engine import attention

    folder, recipe_path = finished
    recipe = load_recipe(recipe_path)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        recipe.model.base,
        dtype=torch.bfloat16,
        quantization_config=nf4,
        device_map="cpu",
        attn_implementation=attention.register(),
    )
    tuned = PeftModel.from_pretrained(base, folder / "adapter")
    splits = data.load(recipe.data, AutoTokenizer.from_pretrained(folder / "adapter"))
    assert splits.eval is not None
    metrics = json.loads((folder / "eval.json").read_text())
    live, untrained = (metrics[which]["metrics"]["loss"] for which in ("tuned", "base"))
    found = evaluate.mean_loss(tuned, splits.eval.rows[:6], 4)
    assert abs(found - live) < 0.02 * abs(untrained - live)


@pytest.mark.parametrize("host", ["embedding", "embedding, layers"])
def test_host_memory_changes_nothing_of_a_run(finished: tuple[Path, Path], tmp_path: Path, host: str) -> None:
    folder, recipe = finished
    done = command("recipe", recipe, f"memory.host=[{host}]", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert step_losses(tmp_path / "out") == step_losses(folder)
    for same in ("adapter/adapter_model.safetensors", "eval.json"):
        assert (tmp_path / "out" / same).read_bytes() == (folder / same).read_bytes()
    ours, theirs = (json.loads((one / "report.json").read_text()) for one in (tmp_path / "out", folder))
    assert ours["parameters"] == theirs["parameters"]
    words = f"{host.replace(', ', ' and ')} in host memory: a CPU has no other"
    assert any(words in note for note in ours["notes"])
    drifts = [one["memory"]["calibration"]["drift"] for one in (ours, theirs)]
    assert drifts[0] == pytest.approx(drifts[1], abs=0.01)


def test_a_tied_embedding_on_the_host_is_refused(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(geometry="tied", extra="memory: {host: [embedding]}\n")
    done = command("recipe", recipe, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "memory.host: 'embedding': this base's embedding is its head too" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("geometry", ["untied", "tied"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_other_geometries_run(
    write_recipe: Callable[..., Path], tmp_path: Path, geometry: str, quantization: str
) -> None:
    recipe = write_recipe(geometry=geometry)
    done = command(
        "recipe", recipe, f"model.quantization={quantization}", "--out", tmp_path / "out", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["parameters"]["quantized"] > 0) == (quantization == "nf4")


def test_offloading_is_recomputing_and_says_that_a_cpu_gains_nothing(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    keys = ["train.micro_batch=1", "adapter.dropout=0.2", "data.eval=", "evaluate.metrics=[loss]"]
    for policy in ("offload", "recompute"):
        out = tmp_path / policy
        done = command("recipe", write_recipe(), *keys, f"train.activations={policy}", "--out", out)
        assert done.returncode == 0, done.stderr
        assert ("offloading them needs CUDA" in done.stdout) == (policy == "offload")
    assert step_losses(tmp_path / "offload") == step_losses(tmp_path / "recompute")
    offloaded, recomputed = (
        (tmp_path / policy / "adapter" / "adapter_model.safetensors").read_bytes()
        for policy in ("offload", "recompute")
    )
    assert offloaded == recomputed
    report = json.loads((tmp_path / "offload" / "report.json").read_text())
    assert report["recipe"]["train"]["activations"] == "offload"
    assert "offloaded inputs" in json.dumps(report["memory"]["predicted"])
    assert abs(report["memory"]["calibration"]["drift"]) < 0.05


def test_without_held_out_rows_nothing_is_evaluated_and_said_so(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe()
    done = command("recipe", recipe, "data.eval=", "evaluate.metrics=[loss]", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "eval.json").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"] == {}
    assert any("nothing was evaluated" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], ["only 4 held-out rows for evaluate.samples 9"]),
        (["evaluate.metrics=[loss]"], []),
        (["evaluate.samples=4", "train.optimizer=adamw_torch"], []),
        (["evaluate.samples=4", "train.optimizer=paged_adamw_8bit"], ["paging needs CUDA"]),
    ],
)
def test_notes_are_of_what_was_asked_for(
    write_recipe: Callable[..., Path], overrides: list[str], told: list[str]
) -> None:
    """Not of defaults that change nothing here, nor of answers that no metric compares."""
    from qlora_phi3 import data, model, weights

    recipe = load_recipe(write_recipe(), ["evaluate.samples=9", *overrides])
    checkpoint = weights.locate(recipe.model)
    splits = data.load(recipe.data, model.load_tokenizer(checkpoint.folder))
    _, _, notes = settle.settle(recipe, checkpoint, splits, torch.device("cpu"))
    notes = notes[1:]  # the first is how it trains
    assert len(notes) == len(told), notes
    assert [word for word in told if not any(word in note for note in notes)] == []


OVERLONG = [
    pytest.param("drop", ["3 {} rows were longer than data.max_length and dropped"], id="drop"),
    pytest.param(
        "truncate",
        [
            "1 {} rows were longer than data.max_length and dropped: no room for an answer to train on",
            "2 {} rows were longer than data.max_length and truncated: their end is missing",
        ],
        id="truncate",
    ),
    pytest.param(
        "split",
        [
            "1 {} rows or exchanges were longer than data.max_length and dropped: "
            "no room for an answer to train on",
            "1 {} rows were longer than data.max_length and truncated: their end is missing",
            "1 {} rows were longer than data.max_length and split between turns",
        ],
        id="split",
    ),
]


@pytest.mark.parametrize(("overlong", "expected"), OVERLONG)
def test_notes_say_what_became_of_overlong_rows(
    write_recipe: Callable[..., Path], tmp_path: Path, overlong: str, expected: list[str]
) -> None:
    """One row each that fits, is cut, has no room for an answer, and holds two exchanges."""
    from qlora_phi3 import data, model, weights

    rows = [["hi", "yo"], ["abcd", "e" * 20], ["a" * 20, "b"], ["abcd", "efgh", "ijkl", "mnop"]]
    chats, roles = tmp_path / "long.jsonl", ("user", "assistant") * 2
    talks = [[{"role": r, "content": c} for r, c in zip(roles, row, strict=False)] for row in rows]
    chats.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    overrides = [f"data.{which}.path={chats}" for which in ("train", "eval")]
    recipe = load_recipe(write_recipe(), [*overrides, "data.max_length=16", f"data.overlong={overlong}"])
    checkpoint = weights.locate(recipe.model)
    splits = data.load(recipe.data, model.load_tokenizer(checkpoint.folder))
    _, _, notes = settle.settle(recipe, checkpoint, splits, torch.device("cpu"))
    told = [note for note in notes if "data.max_length" in note]
    assert told == [note.format(which) for which in ("training", "held-out") for note in expected]


def test_default_folder_is_named_after_recipe_and_time(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    keys = ["data.eval=", "evaluate.metrics=[loss]", "train.max_steps=1"]
    done = run("recipe", write_recipe(), *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    assert (folder / "report.json").is_file()


def test_a_failed_run_exits_1_and_keeps_what_was_measured(
    write_recipe: Callable[..., Path], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """A base whose last norm is finite, and too large for what comes behind it."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoints("gqa"), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"model.base={broken}", "data.eval=", "evaluate.metrics=[loss]"]
    done = command("recipe", write_recipe(), *overrides, "--out", tmp_path / "out")
    assert done.returncode == 1, (done.returncode, done.stderr[-500:])
    assert "Traceback" not in done.stderr
    assert "step 1: loss is nan" in done.stderr
    assert (tmp_path / "out" / "metrics.jsonl").stat().st_size > 0
    assert not (tmp_path / "out" / "adapter").exists()


def test_several_processes_are_refused(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_phi3", "recipe", str(write_recipe()), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "WORLD_SIZE": "2"},
    )
    assert done.returncode == 2
    assert "WORLD_SIZE: several processes are not available yet." in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(settle, "total_bytes", lambda device: 16 * 1024**3)
    monkeypatch.setattr(settle, "free_bytes", lambda device: 12 * 1024**3)

    def budget(text: str) -> Recipe:
        data = {"train": {"path": "rows.jsonl"}}
        return Recipe.model_validate({"version": 1, "name": "b", "data": data, "memory": {"budget": text}})

    assert settle.allowed_bytes(budget("auto"), cpu) == 12 * 1024**3
    assert settle.allowed_bytes(budget("8GiB"), cpu) == 8 * 1024**3 - memory.IMPORTS_BYTES - memory.HEAP_BYTES
    assert settle.allowed_bytes(budget("14GiB"), cpu) == 12 * 1024**3
    with pytest.raises(RecipeError, match=r"memory\.budget: 32GiB is more than the 16\.00 GiB of this cpu"):
        settle.allowed_bytes(budget("32GiB"), cpu)


def test_a_run_above_its_budget_is_refused_before_it_begins(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    done = command("recipe", finished[1], "memory.budget=300MiB", "--out", tmp_path / "out")
    assert done.returncode == 4
    assert "memory.budget: the run needs" in done.stderr and "the budget is 300MiB" in done.stderr
    done = command(
        "recipe", finished[1], "memory.budget=1GiB", "train.max_steps=1", "--out", tmp_path / "fits"
    )
    assert done.returncode == 0, done.stderr
