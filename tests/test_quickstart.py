"""The quickstart on the real pretrained model: what the README promises, checked on a finished run.

QLORA_PHI3_QUICKSTART_RUN names the folder of a run just made (`make quickstart RUN_DIR=...`); without it
the run is made here, which takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_phi3 import builtin, data, evaluate, generate, trainer
from qlora_phi3.recipe_file import load_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("QLORA_PHI3_QUICKSTART_RUN")
    if given:
        return Path(given)
    out = tmp_path_factory.mktemp("quickstart") / "run"
    arguments = [sys.executable, "-m", "qlora_phi3", "recipe", "quickstart", "--out", str(out)]
    subprocess.run(arguments, check=True, timeout=1800)
    return out


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_before_and_after(folder: Path) -> None:
    metrics = read(folder, "report.json")["metrics"]
    assert metrics["base"]["exact_match"] < 0.1
    assert metrics["tuned"]["exact_match"] >= 0.6
    assert metrics["tuned"]["json_match"] >= 0.95
    assert metrics["tuned"]["loss"] < 0.2 * metrics["base"]["loss"]


def test_every_tuned_answer_stops_by_itself(folder: Path) -> None:
    assert all(sample["stopped"] for sample in read(folder, "eval.json")["tuned"]["samples"])


PLAIN_PEFT = """
import json, sys
import torch
from pathlib import Path
from peft import PeftModel
from qlora_phi3 import data, evaluate, model, weights
from qlora_phi3.engine import attention
from qlora_phi3.recipe_file import load_recipe

folder = Path(sys.argv[1])
recipe = load_recipe(folder / "recipe.yaml")
base = model.load(weights.locate(recipe.model), recipe.model, torch.device("cpu"), attention.register())
tuned = PeftModel.from_pretrained(base.model, folder / "adapter")
splits = data.load(recipe.data, base.tokenizer)
at_once = {"batch_rows": 8, "batch_tokens": 16384, "seed": recipe.train.seed}
found = evaluate.measure(
    tuned, base.tokenizer, splits.eval, recipe.evaluate, splits.turns.end, **at_once
)
Path(sys.argv[2]).write_text(json.dumps(found.to_json()))
"""


def as_the_run() -> dict[str, str]:
    """Its environment: products of some processors differ in the last bits with the number of threads."""
    own = os.environ["QLORA_PHI3_OWN_THREADS"]
    found = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**found, "OMP_NUM_THREADS": own} if own else found


def test_plain_peft_gives_the_same_answers(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PLAIN_PEFT, str(folder), str(tmp_path / "found.json")]
    subprocess.run(command, check=True, timeout=900, env=as_the_run())
    assert read(tmp_path, "found.json") == read(folder, "eval.json")["tuned"]


def test_a_stock_bfloat16_base_answers_alike(folder: Path) -> None:
    """The way most people will load it: no NF4, no loader of ours. Another base than it was trained on,
    so that an answer may differ, but it is the adapter that makes them JSON."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(builtin.ensure(), dtype=torch.bfloat16)
    tuned = PeftModel.from_pretrained(base, folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    splits = data.load(load_recipe(folder / "recipe.yaml").data, tokenizer)
    assert splits.eval is not None
    asked = data.prompts(splits.eval, tokenizer, 8)

    def num_right_shapes() -> int:
        ids = [prompt.input_ids for prompt in asked]
        given = generate.answer(
            tuned, tokenizer, ids, stops=[splits.turns.end], max_new_tokens=48, batch_tokens=4096
        )
        return sum(
            evaluate.json_shape(answer.text) == evaluate.json_shape(prompt.expected)
            for answer, prompt in zip(given, asked, strict=True)
        )

    assert num_right_shapes() >= 6
    with tuned.disable_adapter():
        assert num_right_shapes() == 0


def test_evaluating_first_does_not_change_what_is_learned(folder: Path, tmp_path: Path) -> None:
    """The first losses of the run, which evaluated the base before, from a run that evaluates nothing."""
    out = tmp_path / "again"
    overrides = ["train.max_steps=2", "data.eval=", "evaluate.metrics=[loss]", "train.scheduler=constant"]
    arguments = [sys.executable, "-m", "qlora_phi3", "recipe", str(folder / "recipe.yaml"), *overrides]
    subprocess.run([*arguments, "--out", str(out)], check=True, timeout=600, env=as_the_run())

    def first_loss(run: Path) -> float:
        return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"])

    assert first_loss(out) == first_loss(folder)


def test_both_engines_learn_alike(folder: Path, tmp_path: Path) -> None:
    """20 steps in float32; in bfloat16 each is as far from it as the other (tests/engine/test_native.py)."""

    def losses(engine: str) -> list[float]:
        smaller = ["train.max_steps=20", "train.effective_batch=4", "train.micro_batch=4", "data.eval="]
        overrides = [*smaller, "evaluate.metrics=[loss]", "model.compute_dtype=float32"]
        arguments = [sys.executable, "-m", "qlora_phi3", "recipe", str(folder / "recipe.yaml"), *overrides]
        out = ["--out", str(tmp_path / engine)]
        subprocess.run([*arguments, f"train.engine={engine}", *out], check=True, timeout=900)
        lines = (tmp_path / engine / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    native, reference = losses("native"), losses("reference")
    assert len(native) == 20 and native[-1] < 0.6 * native[0]
    assert native == pytest.approx(reference, abs=1e-3)


def test_recipe_trains_every_linear(folder: Path) -> None:
    trained = read(folder, "report.json")["trained"]
    assert {row["target"]: row["num_modules"] for row in trained} == {
        "qkv_proj": 30,
        "o_proj": 30,
        "gate_up_proj": 30,
        "down_proj": 30,
    }
    assert trainer.num_steps(load_recipe(folder / "recipe.yaml"), 480) == len(
        (folder / "metrics.jsonl").read_text().splitlines()
    )
