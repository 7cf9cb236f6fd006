"""Adapters of every layout, ours and other tools' own, to every target: each passes its gate, and computes
what it computed in the tool that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_lab import make_base, make_run
from safetensors.torch import load_file

from qlora_phi3 import export
from qlora_phi3.export import consumers

pytest.importorskip("xllamacpp")
pytest.importorskip("mlx_lm")
lora = pytest.importorskip("loralib")

IDS = torch.arange(3, 43).view(1, 40)
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_TARGETS = ["adapter", "loralib", "mlx", "vllm", "merged", "gguf:f16", "gguf-lora", "ollama"]


def phi3(base: Path) -> Any:
    from transformers import Phi3ForCausalLM

    return Phi3ForCausalLM.from_pretrained(base, dtype=torch.float32)


def fill(model: Any) -> Any:
    """Random Bs, as training leaves them."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def llama_copy(base: Path) -> Any:
    """The base as other tools keep it: Llama's names, a matrix for each projection."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = json.loads((base / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    model = LlamaForCausalLM(LlamaConfig(**{key: theirs[key] for key in kept}, tie_word_embeddings=False))
    parts = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        names = [name]
        if "qkv_proj" in name:
            names = [name.replace("qkv_proj", one) for one in ("q_proj", "k_proj", "v_proj")]
        if "gate_up_proj" in name:
            names = [name.replace("gate_up_proj", one) for one in ("gate_proj", "up_proj")]
        parts |= dict(zip(names, tensor.float().chunk(len(names)), strict=True))
    model.load_state_dict(parts)
    return model


def by_peft(base: Path, folder: Path, targets: list[str], **settings: Any) -> torch.Tensor:
    """PEFT's own save, on Phi-3 or on a copy with Llama's names."""
    from peft import LoraConfig, get_peft_model

    model = llama_copy(base) if "q_proj" in targets else phi3(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    tuned = fill(get_peft_model(model, config))
    tuned.save_pretrained(folder)
    path = folder / "adapter_config.json"  # which names the copy, if any; a user has to say the Phi-3 base
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return logits(tuned)


def by_mlx_lm(base: Path, folder: Path) -> torch.Tensor:
    """As `mlx_lm.lora` trains the last layer and saves it."""
    consumers.own_mlx_folder()
    import mlx.core
    from mlx.utils import tree_flatten
    from mlx_lm.lora import CONFIG_DEFAULTS
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, save_config

    model, _ = load_model(base)
    settings = {**CONFIG_DEFAULTS, "model": str(base), "num_layers": 1, "train": True}
    settings["lora_parameters"] = {"rank": 4, "dropout": 0.0, "scale": 2.0}
    model.set_dtype(mlx.core.float32)
    model.freeze()
    linear_to_lora_layers(model, 1, settings["lora_parameters"])
    mlx.core.random.seed(3)
    trained = [
        (name, mlx.core.random.normal(value.shape) * 0.1)
        for name, value in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(trained, strict=False)
    folder.mkdir(parents=True)
    mlx.core.save_safetensors(str(folder / "adapters.safetensors"), dict(trained))
    save_config(settings, folder / "adapter_config.json")
    return torch.tensor(model(mlx.core.array(IDS.tolist())).tolist())


def by_loralib(base: Path, folder: Path) -> torch.Tensor:
    """loralib's MergedLinear with k left out, in the place of qkv_proj."""
    model = phi3(base)
    for layer in model.model.layers:
        old = layer.self_attn.qkv_proj
        new = lora.MergedLinear(
            *(old.in_features, old.out_features), 4, 8, enable_lora=[True, False, True],
            fan_in_fan_out=False, merge_weights=False, bias=False,
        )  # fmt: skip
        new.weight = old.weight
        layer.self_attn.qkv_proj = new
    folder.mkdir(parents=True)
    torch.save(lora.lora_state_dict(fill(model)), folder / "lora.pt")
    about = {"layout": "loralib_merged", "rank": 4, "alpha": 8, "base": str(base)}
    about["enable_lora"] = {"qkv_proj": [True, False, True]}
    (folder / "loralib_config.json").write_text(json.dumps(about))
    return logits(model)


def ours(run: Path, base: Path, folder: Path, target: str, **options: Any) -> torch.Tensor:
    """An export of ours, taken away from its run; its base told, since it is on no hub."""
    from peft import PeftModel

    done = export.export(run, target, out=folder, options=export.Options(gate=False, **options))
    assert done.folder == folder
    note = folder / "base_provenance.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"base": str(base)}))
    return logits(PeftModel.from_pretrained(phi3(base), run / "adapter").eval())


SOURCES: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any], list[str]]] = {
    "our fused": (ours, {"target": "adapter", "layout": "fused", "split": False}, ["vllm", "mlx"]),
    "our split": (ours, {"target": "adapter", "layout": "split"}, ["loralib", "gguf-lora"]),
    "our unfused": (ours, {"target": "adapter", "layout": "unfused"}, ALL_TARGETS),
    "our mlx": (ours, {"target": "mlx"}, ["merged", "gguf-lora"]),
    "our loralib": (ours, {"target": "loralib"}, ["mlx", "ollama"]),
    "our vllm": (ours, {"target": "vllm"}, ["loralib", "merged"]),
    "peft": (by_peft, {"targets": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}, ["vllm", "gguf:f16"]),
    "peft, llama's names": (by_peft, {"targets": LLAMA}, ["merged", "gguf-lora", "mlx"]),
    "peft, q and v": (by_peft, {"targets": ["q_proj", "v_proj"], "use_rslora": True}, ALL_TARGETS),
    "peft, q of a higher rank": (
        by_peft,
        {"targets": LLAMA, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.1\.mlp\..*up_proj": 3}},
        ["merged", "adapter", "mlx", "gguf-lora"],
    ),
    "peft, with the head's weight": (by_peft, {"targets": ["o_proj", "lm_head"]}, ["merged", "loralib"]),
    "mlx-lm": (by_mlx_lm, {}, ALL_TARGETS),
    "loralib": (by_loralib, {}, ALL_TARGETS),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("layouts")
    base = make_base(place / "base", "mini")
    weak = {"model": {"quantization": "none"}}
    fused = make_run(place / "fused", base, **weak, adapter={"split_fused": False})
    return {"base": base, "fused": fused, "split": make_run(place / "split", base, **weak)}


@pytest.mark.parametrize("name", SOURCES)
def test_it_passes_and_computes_what_its_own_tool_does(
    lab: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from peft import PeftModel

    make, settings, targets = SOURCES[name]
    settings, folder = dict(settings), tmp_path / "adapter"
    if make is ours:
        run = lab["split" if settings.pop("split", True) else "fused"]
        expected = ours(run, lab["base"], folder, **settings)
    else:
        expected = make(lab["base"], folder, **settings)
    for done in export.export_all(folder, targets, options=export.Options(merge_base="original")):
        assert done.parity is not None and done.parity["verdict"] == "passed", (done.target, done.parity)
    shutil.rmtree(tmp_path / "exports")
    done = export.export(folder, "adapter", options=export.Options(layout="fused"))
    assert done.parity is not None and done.parity["verdict"] == "passed"
    found = logits(PeftModel.from_pretrained(phi3(lab["base"]), done.folder).eval())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - logits(phi3(lab["base"]))).abs().max() > 0.1
