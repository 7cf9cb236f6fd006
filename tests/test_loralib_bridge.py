"""loralib_bridge.py against loralib itself: the same updates, the same helpers, the same files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from layout_models import FAMILY, adapter, geometry, geometry_of, logits, phi3_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlora_phi3.errors import ModelError
from qlora_phi3.layouts import AdapterConfig, Layout, Tensors, convert, read_adapter, write_adapter
from qlora_phi3.layouts.blocks import same_bits
from qlora_phi3.loralib_bridge import (
    adapter_of,
    attach_adapter,
    delta_conv2d,
    delta_embedding,
    delta_linear,
    delta_merged_linear,
    lora_state_dict,
    loralib_config,
    mark_only_lora_as_trainable,
)

PATTERNS = [
    list(pattern)
    for num_blocks in (2, 3)
    for pattern in itertools.product([False, True], repeat=num_blocks)
    if any(pattern)
]
BIASES = ["none", "all", "lora_only"]


def randomize(layer: nn.Module) -> nn.Module:
    """Weights as after training: neither A nor B is zero."""
    torch.manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer.double()


def merged(layer: Any) -> Any:
    """In eval mode loralib adds the update to the weight itself; its `eval()` returns nothing."""
    layer.eval()
    return layer


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# --- the updates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("num_in", "num_out", "r", "alpha"), [(5, 7, 3, 4), (7, 1, 1, 1), (1, 9, 2, 16)])
def test_linear(num_in: int, num_out: int, r: int, alpha: int, transposed: bool) -> None:
    layer: Any = randomize(loralib.Linear(num_in, num_out, r, alpha, fan_in_fan_out=transposed))
    delta = delta_linear(layer.lora_A, layer.lora_B, alpha / r, fan_in_fan_out=transposed)
    x, weight = torch.randn(2, 3, num_in).double(), layer.weight + delta
    close(layer(x), nn.functional.linear(x, weight.T if transposed else weight, layer.bias))
    close(merged(layer).weight, weight)


@pytest.mark.parametrize(("num", "dim", "r", "alpha"), [(11, 5, 3, 4), (3, 7, 2, 1), (1, 1, 1, 9)])
def test_embedding(num: int, dim: int, r: int, alpha: int) -> None:
    layer: Any = randomize(loralib.Embedding(num, dim, r, alpha))
    weight = layer.weight + delta_embedding(layer.lora_A, layer.lora_B, alpha / r)
    x = torch.randint(num, (2, 5))
    close(layer(x), nn.functional.embedding(x, weight))
    close(merged(layer).weight, weight)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("num_in", "num_out", "kernel", "r", "alpha"), [(4, 6, 3, 2, 5), (2, 8, 1, 3, 1)])
def test_conv2d(num_in: int, num_out: int, kernel: int, r: int, alpha: int, groups: int) -> None:
    layer: Any = randomize(
        loralib.Conv2d(num_in, num_out, kernel, r=r, lora_alpha=alpha, groups=groups, padding=1)
    )
    delta = delta_conv2d(layer.lora_A, layer.lora_B, alpha / r, layer.conv.weight.shape)
    x, weight = torch.randn(2, num_in, 5, 7).double(), layer.conv.weight + delta
    close(layer(x), nn.functional.conv2d(x, weight, layer.conv.bias, padding=1, groups=groups))
    close(merged(layer).conv.weight, weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("num_in", "rows", "r", "alpha"), [(5, 7, 3, 4), (3, 1, 1, 1), (1, 2, 2, 16)])
@pytest.mark.parametrize("enabled", PATTERNS, ids=str)
def test_merged_linear(
    enabled: list[bool], num_in: int, rows: int, r: int, alpha: int, transposed: bool
) -> None:
    made = loralib.MergedLinear(
        num_in, rows * len(enabled), r, alpha, enable_lora=enabled, fan_in_fan_out=transposed
    )
    layer: Any = randomize(made)
    delta = delta_merged_linear(layer.lora_A, layer.lora_B, alpha / r, enabled, fan_in_fan_out=transposed)
    x, weight = torch.randn(2, 3, num_in).double(), layer.weight + delta
    close(layer(x), nn.functional.linear(x, weight.T if transposed else weight, layer.bias))
    close(merged(layer).weight, weight)
    blocks = (delta.T if transposed else delta).view(len(enabled), rows, num_in)
    assert [bool(block.any()) for block in blocks] == enabled


# --- the two helpers ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """Some linears get LoRA, some do not, all have biases; a norm has one too."""

    def __init__(self, with_loralib: bool) -> None:
        super().__init__()
        self.embed = loralib.Embedding(6, 5, 2, 4) if with_loralib else nn.Embedding(6, 5)
        self.inner = nn.ModuleDict({"up": loralib.Linear(5, 7, 2, 4) if with_loralib else nn.Linear(5, 7)})
        self.norm = nn.LayerNorm(7)
        self.plain = nn.Linear(7, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.plain(self.norm(self.inner["up"](self.embed(ids))))


def peft_net() -> Any:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["embed", "up"], bias="none")
    return randomize(get_peft_model(Net(with_loralib=False), config)).eval()


def loralib_net() -> Any:
    return randomize(Net(with_loralib=True)).train()


@pytest.mark.parametrize("bias", BIASES)
def test_trained_is_what_loralib_trains(bias: Any) -> None:
    ours, theirs = peft_net(), loralib_net()
    mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    expected = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {plain_name(name) for name in trained} == expected


def plain_name(name: str) -> str:
    for part in ("base_model.model.", "base_layer.", ".default", "embedding_"):
        name = name.replace(part, "")
    return name.removesuffix(".weight") if "lora_" in name else name


@pytest.mark.parametrize("bias", BIASES)
def test_state_dict_is_what_loralib_saves(bias: Any) -> None:
    """The state of ours goes into loralib's model with its own strict=False, and back out the same."""
    ours, theirs = peft_net(), loralib_net()
    state = lora_state_dict(ours, bias)
    assert set(state) == set(loralib.lora_state_dict(theirs, bias))
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    saved = loralib.lora_state_dict(theirs, bias)
    assert all(torch.equal(saved[name], state[name]) for name in state)


@pytest.mark.parametrize("bias", BIASES)
def test_helpers_read_loralib_models_too(bias: Any) -> None:
    ours, theirs = loralib_net(), loralib_net()
    mark_only_lora_as_trainable(ours, bias)
    loralib.mark_only_lora_as_trainable(theirs, bias)
    found = [parameter.requires_grad for parameter in ours.parameters()]
    assert found == [parameter.requires_grad for parameter in theirs.parameters()]
    assert set(lora_state_dict(ours, bias)) == set(loralib.lora_state_dict(theirs, bias))


def test_the_same_forward() -> None:
    ours, theirs = peft_net(), loralib_net()
    base = {plain_name(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(base)
    ids = torch.arange(6).view(2, 3)
    close(ours(ids), theirs(ids))
    close(ours(ids), theirs.eval()(ids))


def test_other_adapters_are_left_out() -> None:
    model = peft_net()
    model.add_adapter("second", LoraConfig(r=1, target_modules=["up"]))
    assert set(lora_state_dict(model)) == {
        "embed.lora_A", "embed.lora_B", "inner.up.lora_A", "inner.up.lora_B",
    }  # fmt: skip
    assert lora_state_dict(model, adapter="second")["inner.up.lora_A"].shape == (1, 5)


@pytest.mark.parametrize("helper", [mark_only_lora_as_trainable, lora_state_dict])
def test_other_words_for_bias(helper: Any) -> None:
    with pytest.raises(ValueError, match=r"'lora'.*lora_only"):
        helper(peft_net(), "lora")


@pytest.mark.parametrize("bias", BIASES)
def test_phi3_has_no_biases(bias: Any) -> None:
    model = attach_adapter(phi3_model("mini"), *adapter(geometry("mini")), geometry("mini"))
    mark_only_lora_as_trainable(model, bias)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert set(lora_state_dict(model, bias)) == set(convert(*ADAPTER, "loralib", geometry("mini"))[0])


ADAPTER = adapter(geometry("mini"))


# --- Phi-3 of loralib's layers -----------------------------------------------------------------------------


def loralib_phi3(kind: str, tensors: Tensors, config: AdapterConfig) -> Any:
    """The base with loralib's own layers in the place of each linear that the adapter is for."""
    model = phi3_model(kind)
    for name in {key.rsplit(".", 1)[0] for key in tensors}:
        parent, _, child = name.rpartition(".")
        old, rank, alpha = model.get_submodule(name), config.rank_of(name), config.alpha_of(name)
        blocks = list(config.blocks_of(name))
        if isinstance(old, nn.Embedding):
            new: nn.Module = loralib.Embedding(*old.weight.shape, rank, alpha)
        elif blocks:
            new = loralib.MergedLinear(
                old.in_features, old.out_features, rank, alpha, enable_lora=blocks, bias=False
            )
        else:
            new = loralib.Linear(old.in_features, old.out_features, rank, alpha, bias=False)
        new.weight = old.weight
        setattr(model.get_submodule(parent), child, new)
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert not [key for key in missing.missing_keys if "lora_" in key]
    return model


@pytest.mark.parametrize(
    ("kind", "layout"), [*((kind, "loralib") for kind in FAMILY), ("mini", "loralib_merged")]
)
def test_loralib_computes_the_same_logits(tmp_path: Path, kind: str, layout: Layout) -> None:
    """PEFT -> our .pt -> loralib's layers; and its own saved file -> PEFT."""
    sizes = geometry(kind)
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] + ["embed_tokens"] * (
        not sizes.tied_embeddings
    )
    tensors, config = adapter(sizes, *names, rank_pattern={"qkv_proj": 6})
    tensors = {key: tensor / 20 for key, tensor in tensors.items()}
    live = attach_adapter(phi3_model(kind), tensors, config, sizes)
    write_adapter(tmp_path / "out", *convert(tensors, config, layout, sizes))
    written, found = read_adapter(tmp_path / "out", sizes)
    theirs = loralib_phi3(kind, written, found)
    assert (logits(live) - logits(phi3_model(kind))).abs().max() > 0.01
    torch.testing.assert_close(logits(theirs), logits(live), rtol=1e-6, atol=1e-6)
    torch.save(loralib.lora_state_dict(theirs.train()), tmp_path / "theirs.pt")
    again, theirs_config = read_adapter(tmp_path / "theirs.pt", sizes, config=found)
    back, _ = convert(again, theirs_config, "fused", sizes)
    assert all(same_bits(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("enabled", [pattern for pattern in PATTERNS if len(pattern) == 3], ids=str)
def test_any_enabled_blocks_onto_phi3(tmp_path: Path, enabled: list[bool]) -> None:
    sizes, pattern = geometry("mini"), {"qkv_proj": tuple(enabled)}
    rank, generator = 2, torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(sizes.num_layers):
        key = f"model.layers.{layer}.self_attn.qkv_proj.lora_"
        tensors[f"{key}A"] = torch.randn(rank * sum(enabled), 64, generator=generator) / 10
        tensors[f"{key}B"] = torch.randn(64 * sum(enabled), rank, generator=generator) / 10
    torch.save(tensors, tmp_path / "qkv.pt")
    theirs = loralib_phi3("mini", tensors, AdapterConfig(rank, 4, (), enable_lora=pattern))
    read, config = read_adapter(tmp_path / "qkv.pt", sizes, config=loralib_config(4, rank, pattern))
    ours = attach_adapter(phi3_model("mini"), read, config, sizes)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    assert isinstance(ours, PeftModel)
    back, found = convert(*convert(read, config, "split", sizes), "loralib_merged", sizes)
    assert found.enable_lora == pattern
    assert all(same_bits(back[key], tensors[key]) for key in tensors)


# --- onto a live model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["fused", "split", "unfused", "loralib", "mlx"])
@pytest.mark.parametrize("kind", FAMILY)
def test_attached_and_taken_off_again(kind: str, layout: Layout) -> None:
    model = phi3_model(kind)
    sizes = geometry_of(model)
    tensors, config = adapter(sizes, rank_pattern={"model.layers.1.mlp.down_proj": 3}, use_rslora=True)
    wrapped = attach_adapter(model, *convert(tensors, config, layout, sizes), sizes)
    taken, found = adapter_of(wrapped, sizes)
    assert all(same_bits(taken[key], tensors[key]) for key in tensors)
    assert found.scale_of("model.layers.1.mlp.down_proj") == pytest.approx(8 / 3**0.5, rel=1e-12)


def test_training_on_does_not_reach_what_was_taken() -> None:
    sizes = geometry("mini")
    model = attach_adapter(phi3_model("mini"), *ADAPTER, sizes)
    taken, _ = adapter_of(model, sizes)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    assert all(same_bits(taken[key], ADAPTER[0][key]) for key in taken)


def test_a_refused_adapter_leaves_the_model_alone() -> None:
    model, (tensors, config) = phi3_model("mini"), adapter(geometry("mini"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors.popitem()
    with pytest.raises(ModelError, match="missing beside its other half"):
        attach_adapter(model, tensors, config, geometry("mini"))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
