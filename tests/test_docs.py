"""The Python in README and docs runs as it stands there, and does what the page says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_phi3 import phi3, pipeline
from qlora_phi3.layouts import AdapterConfig, Tensors, convert, read_adapter
from qlora_phi3.recipe_file import load_recipe
from qlora_phi3.weights import known_geometry

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"
BASE = "microsoft/Phi-3-mini-4k-instruct"


def test_the_page_converts_a_run_s_adapter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = load_recipe(write_recipe(geometry="untied"), ["data.eval=", "evaluate.metrics=[loss]"])
    geometry = known_geometry(recipe.model)
    assert geometry is not None
    pipeline.run(recipe, tmp_path / "run")
    home = tmp_path / "runs" / "my-chats" / "<time>"
    home.mkdir(parents=True)
    (tmp_path / "run" / "adapter").rename(home / "adapter")
    monkeypatch.setitem(phi3.VARIANTS, BASE, geometry)
    monkeypatch.chdir(tmp_path)

    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    assert code.count(f'"{BASE}"') == 2
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(code.replace(f'from_pretrained("{BASE}"', f'from_pretrained("{recipe.model.base}"'), names)
    assert capsys.readouterr().out == "split 4 {'qkv_proj': 12, 'gate_up_proj': 8}\n"

    def fused(folder: str) -> tuple[Tensors, AdapterConfig]:
        return convert(*read_adapter(home / folder, geometry), "fused", geometry)

    saved, config = fused("adapter")
    assert any(bool(tensor.any()) for key, tensor in saved.items() if "lora_B" in key)
    for name in ("adapter-unfused", "adapter-loralib"):
        found, settings = fused(name)
        assert settings == config and all(torch.equal(found[key], saved[key]) for key in saved | found)

    ids = torch.arange(40).view(1, 40)
    stock = AutoModelForCausalLM.from_pretrained(recipe.model.base, dtype=torch.bfloat16)
    tuned = PeftModel.from_pretrained(stock, home / "adapter")
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(ids).logits, tuned(ids).logits)
        with tuned.disable_adapter():
            assert not torch.equal(names["model"](ids).logits, tuned(ids).logits)


def test_readme_s_block_answers_as_the_run_did(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the first held-out row, asked again in 4 bits with stock libraries; <|end|> is our test's too."""
    recipe = load_recipe(write_recipe(), ["train.max_steps=8", "evaluate.samples=4"])
    _, folder = pipeline.run(recipe, tmp_path / "runs" / "my-chats" / "<time>")
    tuned = json.loads((folder / "eval.json").read_text())["tuned"]["samples"]
    sample = next(one for one in tuned if one["answer"])
    page = PAGE.parent.parent / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    with Path(recipe.data.train_sources[0].path).open() as file:
        rows = [json.loads(line)["messages"] for line in file]
    asked = next(row for row in rows if row[-2]["content"] == sample["prompt"])[:-1]
    for old, new in (
        (f'"{BASE}"', f'"{recipe.model.base}"'),
        ('[{"role": "user", "content": "..."}]', repr(asked)),
        ("max_new_tokens=200", "max_new_tokens=8"),
    ):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip() == sample["answer"].strip()


def test_a_gguf_answers_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path]
) -> None:
    """What the page does in xllamacpp; a tiny random model's answer is any."""
    pytest.importorskip("xllamacpp")
    from export_models import checkpoint
    from safetensors.torch import load_file

    from qlora_phi3.export import gguf
    from qlora_phi3.weights import read_config

    page = PAGE.with_name("export.md").read_text(encoding="utf-8")
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "xllamacpp" in one)
    base, folder = checkpoint(tmp_path / "base", "mini", eager_end=3.0), tmp_path / "exports" / "gguf-q8_0"
    folder.mkdir(parents=True)
    weights = load_file(base / "model.safetensors").items()
    gguf.write(folder / "NAME-q8_0.gguf", weights, read_config(base), base, "q8_0", name="tiny")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["answer"]["choices"][0]["finish_reason"] in ("stop", "length")
