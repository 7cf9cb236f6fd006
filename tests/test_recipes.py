"""Every recipe that comes with the toolkit keeps what its name, description and comments promise."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_chats
from transformers import TrainerCallback

from qlora_phi3 import adapters, data, memory, model, trainer, weights
from qlora_phi3.engine import attention
from qlora_phi3.recipe import Recipe, Source
from qlora_phi3.recipe_file import dump_recipe, list_recipes, load_recipe
from qlora_phi3.sizes import target_linears

RECIPES = list_recipes()
CPU = torch.device("cpu")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy core make a tiny model twenty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def comments(path: Path) -> str:
    return "\n".join(re.findall(r"#(.*)", path.read_text()))


def header(path: Path) -> str:
    """The comment lines above the first key."""
    return "\n".join(line for line in path.read_text().split("version:")[0].splitlines())


def plan_of(recipe: Recipe) -> memory.Plan:
    geometry = weights.known_geometry(recipe.model)
    assert geometry is not None
    micro_batch = recipe.train.micro_batch
    return memory.predict(recipe, geometry, micro_batch=1 if micro_batch == "auto" else int(micro_batch))


def test_there_are_recipes() -> None:
    assert {"quickstart", "phi3-mini-chat-8gb", "phi3-mini-lora-bf16-24gb"} <= {p.stem for p in RECIPES}


# The file


@every_recipe
def test_it_is_named_described_and_explained(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert 10 < len(recipe.description) <= 100
    assert path.read_text().startswith("# ")
    assert len(comments(path).splitlines()) >= 3


@every_recipe
def test_it_survives_being_dumped(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(load_recipe(path)))
    assert load_recipe(again) == load_recipe(path)


@every_recipe
def test_its_data_exists(path: Path) -> None:
    recipe = load_recipe(path)
    sources = [s for s in (recipe.data.train, recipe.data.eval) if isinstance(s, Source)]
    assert all(Path(source.path).is_file() for source in sources)


@every_recipe
def test_its_paths_are_relative_to_it(path: Path) -> None:
    written = yaml.safe_load(path.read_text())["data"]
    sources = [s for s in (written["train"], written.get("eval")) if s and "path" in s]
    assert not any(Path(source["path"]).is_absolute() for source in sources)


# What it promises


@every_recipe
def test_it_fits_the_card_that_it_names(path: Path) -> None:
    command = [sys.executable, "-m", "qlora_phi3", "recipe", path.stem, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    smallest = json.loads(done.stdout)["smallest_card_gib"]
    promised = re.findall(r"(\d+) ?gb", f"{path.stem} {load_recipe(path).description}", flags=re.IGNORECASE)
    assert smallest is not None
    assert all(smallest <= int(card) for card in promised)


@every_recipe
def test_sizes_in_its_comments_are_those_of_the_plan(path: Path) -> None:
    phases = plan_of(load_recipe(path)).phases
    parts = {part.name: part.num_bytes for phase in phases for part in phase.parts}
    base = sum(parts.get(name, 0) for name in ("linears", "embedding", "head", "norms"))
    known = [*parts.values(), base, *(phase.peak_bytes for phase in phases)]
    for number, unit in re.findall(r"(\d+(?:\.\d+)?) (GiB|MiB)", comments(path)):
        digits = len(number.partition(".")[2])
        size = 1024 ** (3 if unit == "GiB" else 2)
        assert number in [f"{num_bytes / size:.{digits}f}" for num_bytes in known], f"{number} {unit}"


@every_recipe
def test_what_its_header_calls_it_is_true(path: Path) -> None:
    recipe, text = load_recipe(path), header(path)
    if "QLoRA on" in text:
        assert recipe.model.quantization == "nf4"
    if "Full-precision" in text:
        assert recipe.model.quantization == "none"
    if "no model hub" in text:
        assert recipe.model.base.startswith("builtin:")


@every_recipe
def test_the_commands_in_its_comments_can_be_typed(path: Path) -> None:
    for line in re.findall(r"python -m qlora_phi3 recipe (.*)", comments(path)):
        name, *overrides = line.split()
        assert name == path.stem
        load_recipe(path, overrides)


def test_the_yardstick_differs_from_qlora_in_the_base_alone() -> None:
    found = {path.stem: load_recipe(path) for path in RECIPES}
    qlora, full = found["phi3-mini-chat-8gb"], found["phi3-mini-lora-bf16-24gb"]
    assert "rank, targets and data are those of phi3-mini-chat-8gb" in header(
        next(path for path in RECIPES if path.stem == full.name)
    )
    assert (full.adapter, full.data, full.evaluate) == (qlora.adapter, qlora.data, qlora.evaluate)
    assert full.model == qlora.model.model_copy(update={"quantization": "none"})
    same = {"micro_batch": qlora.train.micro_batch, "optimizer": qlora.train.optimizer}
    assert full.train.model_copy(update=same) == qlora.train


# What the trainer makes of it

OPTIMIZERS = {
    "paged_adamw_8bit": ("bitsandbytes", True),
    "paged_adamw_32bit": ("bitsandbytes", True),
    "adamw_8bit": ("bitsandbytes", False),
    "adamw_torch": ("torch", None),
}
"""Recipe's optimizer -> the package it comes from, and whether its states are paged."""


class _Nothing(TrainerCallback):
    """In place of the trainer's watch."""

    def count(self, *args: Any) -> None: ...


@pytest.fixture
def built(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> Callable[..., tuple[Recipe, trainer.PhiTrainer, model.Base]]:
    """Builds the real trainer of a recipe, on a tiny base and a few chats."""
    chats = write_chats(tmp_path / "chats.jsonl")

    def build(path: Path, *overrides: str) -> tuple[Recipe, trainer.PhiTrainer, model.Base]:
        tiny = (f"model.base={checkpoints('gqa')}", f"data.train.path={chats}", "data.train.limit=8")
        recipe = load_recipe(path, [*tiny, f"data.eval.path={chats}", *overrides])
        if recipe.train.micro_batch == "auto":
            recipe = recipe.settled(micro_batch=1, activations="recompute")
        checkpoint = weights.locate(recipe.model)
        base = model.load(checkpoint, recipe.model, CPU, attention.register())
        tuned = adapters.attach(base, recipe)
        split = data.load(recipe.data, base.tokenizer).train
        return recipe, trainer.build(tuned, base, split, recipe, tmp_path / "run", _Nothing()), base

    return build


@every_recipe
def test_the_trainer_gets_its_settings(path: Path, built: Callable[..., Any]) -> None:
    recipe, tuning, _ = built(path)
    train, args = recipe.train, tuning.args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (train.effective_batch, 1)
    assert tuning.layout.micro_batch == train.micro_batch
    assert tuning.layout.pack_into == (recipe.data.max_length if recipe.data.packing else None)
    assert args.num_train_epochs == train.epochs
    assert args.max_steps == (train.max_steps or -1)
    assert args.learning_rate == train.learning_rate
    assert args.weight_decay == train.weight_decay
    assert args.max_grad_norm == train.max_grad_norm
    assert (args.seed, args.data_seed) == (train.seed, train.seed)
    assert args.logging_steps == train.log_every
    assert args.activation_checkpointing == (train.activations != "keep")
    assert (args.save_strategy, args.report_to, args.push_to_hub) == ("no", [], False)
    assert (args.max_length, args.packing) == (None, False)  # rows are made in data/
    assert (args.bf16, args.fp16) == (False, recipe.model.compute_dtype == "float16")


@every_recipe
def test_the_optimizer_and_the_schedule(path: Path, built: Callable[..., Any]) -> None:
    recipe, tuning, _ = built(path)
    num_steps = 100
    tuning.create_optimizer_and_scheduler(num_steps)
    train, optimizer = recipe.train, tuning.optimizer
    package, paged = OPTIMIZERS[train.optimizer]
    assert type(optimizer).__module__.split(".")[0] == package
    assert getattr(optimizer, "is_paged", None) == paged
    if package == "bitsandbytes":
        assert optimizer.args.optim_bits == (8 if train.optimizer.endswith("8bit") else 32)
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in tuning.model.parameters() if p.requires_grad}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {train.learning_rate}

    rates = []
    for _ in range(num_steps):
        rates.append(tuning.lr_scheduler.get_last_lr()[0])
        optimizer.step()
        tuning.lr_scheduler.step()
    warmup = round(train.warmup * num_steps if train.warmup < 1 else train.warmup)
    assert rates.index(max(rates)) == warmup and max(rates) == train.learning_rate
    middle = warmup + (num_steps - warmup) // 2
    progress = (middle - warmup) / (num_steps - warmup)
    left = {"constant": 1, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    assert rates[middle] == pytest.approx(train.learning_rate * left[train.scheduler])


@every_recipe
def test_the_dtypes_and_what_is_trained(path: Path, built: Callable[..., Any]) -> None:
    recipe, tuning, base = built(path)
    compute = model.DTYPES[recipe.model.compute_dtype]
    trained = [p for p in tuning.model.parameters() if p.requires_grad]
    packed = list(model.packed_linears(base.model))
    rest = [p for p in base.model.parameters() if not p.requires_grad and not model.is_packed(p)]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in rest} == {compute}
    assert len(packed) == (2 * 4 if recipe.model.quantization == "nf4" else 0)  # layers x linears
    for linear in packed:
        assert linear.weight.quant_state.nested == recipe.model.double_quant
        assert (linear.weight.quant_type, linear.compute_dtype) == ("nf4", compute)
    table = adapters.trained_table(tuning.model)
    assert {row.target for row in table} == set(target_linears(recipe))
    assert {(row.rank, row.num_modules) for row in table} == {(recipe.adapter.rank, 2)}
    settings = tuning.model.peft_config["default"]
    assert (settings.lora_alpha, settings.lora_dropout) == (recipe.adapter.alpha, recipe.adapter.dropout)


@every_recipe
def test_it_trains_and_recomputes_as_it_says(path: Path, built: Callable[..., Any]) -> None:
    short = (
        "train.max_steps=1",
        "train.effective_batch=4",
        "train.micro_batch=2",
        "train.warmup=0",
        "data.packing=false",
    )
    recipe, tuning, base = built(path, *short)
    calls: list[int] = []
    for number, layer in enumerate(base.model.model.layers):
        # before the module: recomputing stops inside the last one, once it has what it needs
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    trained = [p for p in tuning.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    tuning.train()
    forwards = 1 + 2  # the calibration's, and of 2 micro batches
    num_passes = forwards if recipe.train.activations == "keep" else 2 * forwards
    assert sorted(calls) == [0] * num_passes + [1] * num_passes
    assert any(not torch.equal(was, now) for was, now in zip(before, trained, strict=True))
