"""The gate on llama.cpp itself: what is right passes, and each seeded fault is caught and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import checkpoint
from layout_models import adapter

from qlora_phi3.errors import InputError
from qlora_phi3.export import gguf, gguf_lora, parity
from qlora_phi3.export.consumers import Live, llama_cpp, transformers_folder
from qlora_phi3.layouts import AdapterConfig, Tensors, write_adapter
from qlora_phi3.phi3 import Geometry, geometry_from_config
from qlora_phi3.recipe import Model
from qlora_phi3.weights import locate, read_config

pytest.importorskip("xllamacpp")

PROMPTS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "I would like 3 pizzas"}],
    [{"role": "system", "content": "Count."}, {"role": "user", "content": " 12 beers\n"}],
    [{"role": "user", "content": "hello to the other one"}],
]


@dataclass
class Trained:
    """A base, an adapter on it, and the live model of both."""

    base: Path
    folder: Path
    tensors: Tensors
    config: AdapterConfig
    sizes: Geometry
    live: Live

    def merged(self) -> dict[str, torch.Tensor]:
        from copy import deepcopy

        return deepcopy(self.live.model).merge_and_unload().state_dict()

    def gguf(self, path: Path, tensors: dict[str, torch.Tensor] | None = None, kind: str = "f16") -> Path:
        weights = (self.merged() if tensors is None else tensors).items()
        gguf.write(path, weights, read_config(self.base), self.base, kind, name="tiny")
        return path

    def gate(self, program: Any, target: str = "gguf:f16") -> parity.Parity:
        return parity.gate(target, self.reference, program, stops=self.live.stops)

    @cached_property
    def reference(self) -> parity.Reference:
        return parity.Reference.of(self.live, self.live.control(), PROMPTS, max_new_tokens=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    from peft import PeftModel

    made: dict[str, Trained] = {}

    def get(kind: str = "medium") -> Trained:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            base = checkpoint(folder / "base", kind, eager_end=3.0)
            sizes = geometry_from_config(read_config(base))
            tensors, config = adapter(sizes, rank=4, alpha=8)
            tensors = {key: 0.05 * tensor for key, tensor in tensors.items()}
            write_adapter(folder / "adapter", tensors, config)
            model = transformers_folder(base)
            tuned = PeftModel.from_pretrained(model.model, folder / "adapter")
            live = Live.of("transformers + PEFT", tuned, model.tokenizer)
            made[kind] = Trained(base, folder, tensors, config, sizes, live)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["mini", "mini-128k", "medium", "phi-4-mini"])
def test_merged_and_lora_files_of_every_geometry_pass(
    trained: Callable[[str], Trained], tmp_path: Path, kind: str
) -> None:
    run = trained(kind)
    base = transformers_folder(run.base).model.state_dict()
    with llama_cpp(run.gguf(tmp_path / "merged.gguf"), context=256) as program:
        merged = run.gate(program)
    gguf_lora.write(tmp_path / "lora.gguf", run.tensors, run.config, run.sizes, name="tiny")
    plain = run.gguf(tmp_path / "base.gguf", base)
    with llama_cpp(plain, tmp_path / "lora.gguf", context=256) as program:
        lora = run.gate(program, "gguf-lora")
    for found in (merged, lora):
        assert found.passed and found.stops, found
        assert found.kl_mean is not None and found.kl_mean < 1e-4


def swap_q_and_k(run: Trained, weights: dict[str, torch.Tensor]) -> None:
    slices, weight = run.sizes.slices("qkv_proj"), weights["model.layers.0.self_attn.qkv_proj.weight"]
    q, k = (weight[slice(*slices[name])].clone() for name in ("q", "k"))
    weight[slice(*slices["q"])], weight[slice(*slices["k"])] = k, q


def never_end(run: Trained, weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"][run.live.stops] = 0


@pytest.mark.parametrize("fault", [swap_q_and_k, never_end])
def test_faulty_weights_are_caught(
    trained: Callable[[str], Trained], tmp_path: Path, fault: Callable[..., None]
) -> None:
    run = trained("mini")
    weights = {key: tensor.clone() for key, tensor in run.merged().items()}
    fault(run, weights)
    with llama_cpp(run.gguf(tmp_path / "merged.gguf", weights), context=256) as program:
        found = run.gate(program)
    assert found.drifted and found.token_ids_equal
    assert found.kl_mean is not None and found.kl_mean > 0.01
    assert found.first_difference is not None and found.first_difference.kind == "greedy"
    assert found.first_difference.expected != found.first_difference.found
    assert found.first_difference.prompt in [messages[-1]["content"] for messages in PROMPTS]
    assert found.stops is not True or fault is swap_q_and_k


def test_a_wrong_alpha_is_caught(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("mini")
    wrong = replace(run.config, alpha=2 * run.config.alpha)
    gguf_lora.write(tmp_path / "lora.gguf", run.tensors, wrong, run.sizes, name="tiny")
    plain = run.gguf(tmp_path / "base.gguf", transformers_folder(run.base).model.state_dict())
    with llama_cpp(plain, tmp_path / "lora.gguf", context=256) as program:
        found = run.gate(program, "gguf-lora")
    assert found.drifted and found.kl_mean is not None and found.kl_mean > 1e-2


def test_a_missing_adapter_is_caught(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("mini")
    plain = run.gguf(tmp_path / "base.gguf", transformers_folder(run.base).model.state_dict())
    with llama_cpp(plain, context=256) as program:
        found = run.gate(program, "gguf-lora")
    assert found.drifted and found.kl_mean == pytest.approx(found.control_kl, rel=1e-2)


def test_a_broken_template_is_caught(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("mini")
    broken = run.live.tokenizer.chat_template.replace(
        "message['content'] + '<|end|>", "message['content'] + '"
    )
    assert broken != run.live.tokenizer.chat_template
    with llama_cpp(run.gguf(tmp_path / "merged.gguf"), context=256, template=broken) as program:
        found = run.gate(program)
    assert found.drifted and found.token_ids_equal is False
    assert found.first_difference is not None and found.first_difference.kind == "template"
    assert (found.first_difference.expected, found.first_difference.found) == ("<|end|>", "\n")


def test_a_name_without_phi_3_is_caught_by_its_newline(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("mini")
    monkeypatch.setattr("qlora_phi3.export.vocabulary.Vocabulary.name", lambda self, wished: wished)
    with llama_cpp(run.gguf(tmp_path / "merged.gguf"), context=256) as program:
        found = run.gate(program)
    assert found.drifted and found.first_difference is not None
    assert (found.first_difference.kind, found.first_difference.found) == ("template", "\u2581")


def test_a_lost_stop_is_caught(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    run = trained("mini")
    with llama_cpp(run.gguf(tmp_path / "merged.gguf"), context=256, request={"ignore_eos": True}) as program:
        found = run.gate(program)
    assert found.drifted and found.stops is False
    assert found.first_difference is not None and found.first_difference.kind == "stop"
    assert found.first_difference.expected == "<|end|>"


def test_an_adapter_that_changes_nothing_cannot_be_told(trained: Callable[[str], Trained]) -> None:
    run = trained("mini")

    def against(control: Any) -> parity.Parity:
        reference = parity.Reference.of(run.live, control, PROMPTS, max_new_tokens=8)
        return parity.gate("adapter", reference, run.live, stops=run.live.stops)

    same, alone = against(run.live), against(None)
    assert same.verdict == "cannot tell" and not same.passed and not same.drifted
    assert alone.verdict == "cannot tell" and "no base" in alone.reasons[0]


def test_results_are_json(trained: Callable[[str], Trained]) -> None:
    import json

    run = trained("mini")
    found = run.gate(run.live, "adapter")
    assert found.passed and found.kl_mean == pytest.approx(0, abs=1e-6)
    assert json.loads(json.dumps(found.to_json()))["thresholds"]["reason"]
    assert parity.skipped("mlx", "mlx-lm", "not here").to_json()["verdict"] == "skipped"


def test_targets_have_thresholds() -> None:
    assert parity.thresholds_of("ollama") == parity.THRESHOLDS["gguf:q8_0"]
    assert parity.thresholds_of("ollama:q4_0") == parity.THRESHOLDS["gguf:q4_0"]
    assert {f"gguf:{kind}" for kind in gguf.KINDS} <= parity.THRESHOLDS.keys()
    with pytest.raises(InputError, match="no thresholds"):
        parity.thresholds_of("gguf:q4_k_m")


def test_an_nf4_base_is_compared_with_what_it_was_trained_as(tmp_path: Path) -> None:
    """Merged into the dequantized base it passes; merged into the original one it shows NF4's error."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel
    from safetensors.torch import load_file

    base = checkpoint(tmp_path / "base", "mini", eager_end=3.0)
    located = locate(Model(base=str(base)))
    tensors, config = adapter(located.geometry, rank=4, alpha=8)
    write_adapter(tmp_path / "adapter", {key: 0.05 * tensor for key, tensor in tensors.items()}, config)
    live = Live.load(located, Model(base=str(base)), tmp_path / "adapter", torch.device("cpu"))
    run = Trained(base, tmp_path, tensors, config, located.geometry, live)
    original = load_file(base / "model.safetensors")
    trained_on = dict(original)
    for name, linear in live.model.get_base_model().named_modules():
        state = getattr(getattr(linear, "weight", None), "quant_state", None)
        if state is not None:
            path = name.removesuffix(".base_layer")
            trained_on[f"{path}.weight"] = dequantize_4bit(linear.weight.data, state).float()
    found = {}
    for name, weights in (("dequant", trained_on), ("original", original)):
        plain = transformers_folder(base).model
        plain.load_state_dict(weights)
        merged = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
        with llama_cpp(run.gguf(tmp_path / f"{name}.gguf", merged), context=256) as program:
            found[name] = run.gate(program)
    assert found["dequant"].passed, found["dequant"]
    assert found["original"].drifted
    assert found["original"].kl_mean > 10 * found["dequant"].kl_mean
