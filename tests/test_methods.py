"""Every adapter.method from recipe to stock PEFT and to every layout: on tiny models, and on the real one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_phi3 import data, evaluate, layouts, model, phi3, pipeline, weights
from qlora_phi3.engine import attention
from qlora_phi3.errors import ModelError
from qlora_phi3.phi3 import Geometry
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import find_recipe, load_recipe

METHODS = {
    "lora": [],
    "lora+": ["train.lora_plus_ratio=16", "train.learning_rate=2e-4"],
    "rslora": ["adapter.method=rslora"],
    "dora": ["adapter.method=dora"],
    "loftq": ["adapter.method=loftq"],
}
"""Name -> the overrides that make it."""


def load_base(recipe: Recipe) -> model.Base:
    return model.load(weights.locate(recipe.model), recipe.model, torch.device("cpu"), attention.register())


def measured(tuned: Any, base: model.Base, recipe: Recipe) -> dict[str, Any]:
    splits = data.load(recipe.data, base.tokenizer)
    assert splits.eval is not None
    return evaluate.measure(
        tuned,
        base.tokenizer,
        splits.eval,
        recipe.evaluate,
        splits.turns.end,
        batch_rows=int(recipe.train.micro_batch),
        batch_tokens=16384,
    ).to_json()


def check_reload(folder: Path, base: model.Base, recipe: Recipe) -> None:
    """The very answers and losses of the run: without the adapter, and with it in stock PEFT."""
    from peft import PeftModel

    evaluated = json.loads((folder / "eval.json").read_text())
    assert measured(base.model, base, recipe) == evaluated["base"]
    tuned = PeftModel.from_pretrained(base.model, folder / "adapter")
    assert measured(tuned, base, recipe) == evaluated["tuned"]
    tuned.unload()


def check_training(folder: Path, num_steps: int) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == num_steps and all(map(math.isfinite, losses))
    metrics = json.loads((folder / "report.json").read_text())["metrics"]
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]


def check_layouts(adapter: Path, geometry: Geometry, method: str) -> None:
    """The same tensors and scales after each layout's files; DoRA is refused by name."""
    if method == "dora":
        with pytest.raises(ModelError, match="DoRA"):
            layouts.read_adapter(adapter, geometry)
        return
    tensors, config = layouts.read_adapter(adapter, geometry)
    unequal = len({stop - start for start, stop in geometry.slices("qkv_proj").values()}) > 1
    for layout in layouts.LAYOUTS:
        if layout == "loralib_merged" and unequal:
            with pytest.raises(ModelError, match="equal blocks"):
                layouts.convert(tensors, config, layout, geometry)
            continue
        written = adapter.with_name(f"as-{layout}")
        layouts.write_adapter(written, *layouts.convert(tensors, config, layout, geometry))
        back, found = layouts.convert(
            *layouts.read_adapter(written, geometry), config.layout, geometry, str(written)
        )
        assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in back)
        for linear in phi3.LINEARS:
            assert found.scale_of(linear) == pytest.approx(config.scale_of(linear), rel=1e-12)


@pytest.mark.parametrize(("split_fused", "geometry"), [(True, "untied"), (False, "gqa")])
@pytest.mark.parametrize("method", METHODS)
def test_from_recipe_to_stock_peft(
    write_recipe: Callable[..., Path], tmp_path: Path, method: str, split_fused: bool, geometry: str
) -> None:
    overrides = [f"adapter.split_fused={str(split_fused).lower()}", *METHODS[method]]
    recipe = load_recipe(write_recipe(geometry=geometry), overrides)
    _, folder = pipeline.run(recipe, tmp_path / "run")
    check_training(folder, 3)
    base = load_base(recipe)
    check_reload(folder, base, recipe)
    check_layouts(folder / "adapter", base.checkpoint.geometry, method)


SHORT = [
    *("train.max_steps=4", "train.effective_batch=2", "train.micro_batch=2", "train.scheduler=constant"),
    *("evaluate.samples=4", "evaluate.max_new_tokens=8"),
]


@pytest.fixture(scope="module")
def real_base() -> model.Base:
    return load_base(load_recipe(find_recipe("quickstart")))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_on_the_built_in_model(real_base: model.Base, tmp_path: Path, method: str) -> None:
    recipe = load_recipe(find_recipe("quickstart"), [*SHORT, *METHODS[method]])
    _, folder = pipeline.run(recipe, tmp_path / "run")
    check_training(folder, 4)
    check_reload(folder, real_base, recipe)
    check_layouts(folder / "adapter", real_base.checkpoint.geometry, method)
