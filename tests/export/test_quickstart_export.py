"""Every export of the quickstart in one command, each proven in its program; llama.cpp's answers beside ours.

QLORA_PHI3_QUICKSTART_RUN names the folder of a finished quickstart; without it these are skipped, since
test_quickstart.py makes one already.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_phi3 import data, model, weights
from qlora_phi3.data import prompts
from qlora_phi3.export.llama_cpp import llama_cpp
from qlora_phi3.recipe_file import load_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("QLORA_PHI3_QUICKSTART_RUN" not in os.environ, reason="no finished quickstart given"),
]
TARGETS = ("merged", "gguf:q8_0", "gguf-lora", "loralib", "mlx", "ollama")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with its six exports."""
    copy = tmp_path_factory.mktemp("quickstart") / "run"
    shutil.copytree(os.environ["QLORA_PHI3_QUICKSTART_RUN"], copy, ignore=shutil.ignore_patterns("exports"))
    asked = [word for target in TARGETS for word in ("--to", target)]
    subprocess.run(
        [sys.executable, "-m", "qlora_phi3", "export", str(copy), *asked], check=True, timeout=1800
    )
    return copy


def test_each_is_proven_in_its_program(run: Path) -> None:
    found = {path.parent.name: json.loads(path.read_text()) for path in run.glob("exports/*/parity.json")}
    assert len(found) == len(TARGETS)
    verdicts = {one["target"]: (one["verdict"], one["reasons"]) for one in found.values()}
    skipped = {target for target, (verdict, _) in verdicts.items() if verdict == "skipped"}
    assert skipped <= {"mlx"} and (not skipped or verdicts["mlx"][1] == ["mlx_lm is not installed"])
    assert all(verdict == "passed" for target, (verdict, _) in verdicts.items() if target not in skipped)


def test_llama_cpp_answers_as_the_tuned_model_did(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    tokenizer = model.load_tokenizer(weights.locate(recipe.model).folder)
    split = data.load(recipe.data, tokenizer).eval
    assert split is not None
    asked = prompts(split, tokenizer, recipe.evaluate.samples, recipe.train.seed)
    [path] = (run / "exports" / "gguf-q8_0").glob("*.gguf")
    right = 0
    with llama_cpp(path, context=1024) as program:
        for prompt in asked:
            given = program.generate(list(prompt.input_ids), recipe.evaluate.max_new_tokens)
            right += tokenizer.decode(given, skip_special_tokens=True).strip() == prompt.expected.strip()
    live = json.loads((run / "report.json").read_text())["metrics"]["tuned"]["exact_match"]
    assert abs(right / len(asked) - live) <= 0.05
