"""layouts/pairs.py, names.py, config.py: what is an adapter of this base, and what its config means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from layout_models import FAMILY, adapter, geometry

from qlora_phi3.errors import ModelError
from qlora_phi3.layouts import LAYOUTS, AdapterConfig, Layout, Tensors, check, convert, detect
from qlora_phi3.layouts.config import alpha_for, compress, match

QKV = "model.layers.0.self_attn.qkv_proj"
PEFT_QKV = f"base_model.model.{QKV}"


@pytest.mark.parametrize("names", [(), ("qkv_proj",), ("o_proj", "gate_up_proj", "lm_head")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FAMILY)
def test_detected_is_what_was_made(kind: str, layout: Layout, names: tuple[str, ...]) -> None:
    sizes = geometry(kind)
    if layout == "loralib_merged" and kind != "mini":
        names = ("gate_up_proj",)
    if kind == "phi-4-mini":
        names = tuple(name for name in names if name != "lm_head")
    tensors, config = convert(*adapter(sizes, *names), layout, sizes)
    assert detect(tensors, sizes) == layout
    check(tensors, config, sizes)


@pytest.mark.parametrize(("layout", "name"), [("unfused", "q_proj"), ("mlx", "o_proj"), ("fused", "o_proj")])
def test_one_linear_is_enough(layout: Layout, name: str) -> None:
    sizes = geometry("mini")
    tensors, _ = adapter(sizes, name, layout=layout)
    assert detect(tensors, sizes) == layout


def test_an_untrained_adapter_is_not_split() -> None:
    sizes = geometry("mini")
    tensors, config = adapter(sizes, rank=6)
    for key in tensors:
        if "lora_B" in key:
            tensors[key].zero_()
    assert detect(tensors, sizes) == "fused"
    back, _ = convert(*convert(tensors, config, "unfused", sizes), "fused", sizes)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


# --- what is refused ---------------------------------------------------------------------------------------


def drop_a(tensors: Tensors) -> None:
    del tensors[f"{PEFT_QKV}.lora_A.weight"]


def drop_b(tensors: Tensors) -> None:
    del tensors[f"{PEFT_QKV}.lora_B.weight"]


def narrow_a(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_A.weight"] = torch.zeros(4, 63)


def tall_b(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_B.weight"] = torch.zeros(193, 4)


def uneven(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_B.weight"] = torch.zeros(192, 3)


def huge_rank(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_A.weight"] = torch.ones(65, 64)
    tensors[f"{PEFT_QKV}.lora_B.weight"] = torch.ones(192, 65)


def no_rank(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_A.weight"] = torch.zeros(0, 64)
    tensors[f"{PEFT_QKV}.lora_B.weight"] = torch.zeros(192, 0)


def other_rank(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_A.weight"] = torch.ones(5, 64)
    tensors[f"{PEFT_QKV}.lora_B.weight"] = torch.ones(192, 5)


def vector(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_B.weight"] = torch.zeros(192)


def not_a_number(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_B.weight"][-1, -1] = float("nan")


def infinite(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_A.weight"][0, 0] = float("-inf")


def whole_numbers(tensors: Tensors) -> None:
    for key in tensors:
        tensors[key] = tensors[key].to(torch.int8)


def two_kinds(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_A.weight"] = tensors[f"{PEFT_QKV}.lora_A.weight"].half()


def far_layer(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.31.self_attn.o_proj.lora_A.weight"] = torch.zeros(4, 64)


def whole_embedding(tensors: Tensors) -> None:
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = torch.zeros(40, 64)


def bias(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.base_layer.bias".replace("base_layer.", "")] = torch.zeros(192)


def dora(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_magnitude_vector"] = torch.zeros(192)


def stranger(tensors: Tensors) -> None:
    tensors["transformer.h.0.attn.c_attn.lora_A.weight"] = torch.zeros(4, 64)


def raw_state_dict(tensors: Tensors) -> None:
    tensors[f"{PEFT_QKV}.lora_A.default.weight"] = torch.zeros(4, 64)


def nothing(tensors: Tensors) -> None:
    tensors.clear()


FAULTS: list[tuple[Callable[[Tensors], None], str]] = [
    (drop_a, "lora_A.weight: is missing beside its other half"),
    (drop_b, "lora_B.weight: is missing beside its other half"),
    (narrow_a, r"A \(4, 63\) and B \(192, 4\) do not fit a linear of 64 to 192"),
    (tall_b, "do not fit a linear of 64 to 192"),
    (uneven, "do not fit a linear"),
    (huge_rank, "rank 65 is above 64"),
    (no_rank, "do not fit a linear"),
    (other_rank, "rank 5, but the config says 4"),
    (vector, "is not a matrix"),
    (not_a_number, "NaN or infinity"),
    (infinite, "NaN or infinity"),
    (whole_numbers, "its tensors are of int8"),
    (two_kinds, "float16, float32; one floating type"),
    (far_layer, "layer 31 of a base with 2 layers"),
    (whole_embedding, "whole weight of the base"),
    (bias, "Phi-3 has no biases"),
    (dora, "DoRA"),
    (stranger, "no A or B of a linear of this base"),
    (raw_state_dict, "no A or B of a linear of this base"),
    (nothing, "holds no tensors"),
]


@pytest.mark.parametrize(("spoil", "match"), FAULTS, ids=lambda fault: getattr(fault, "__name__", ""))
def test_no_whole_adapter(spoil: Callable[[Tensors], None], match: str) -> None:
    sizes = geometry("mini")
    tensors, config = adapter(sizes)
    spoil(tensors)
    for layout in LAYOUTS:
        with pytest.raises(ModelError, match=match) as caught:
            convert(tensors, config, layout, sizes, "my/adapter")
        for problem in caught.value.problems[:8]:
            assert problem.place.startswith("my/adapter")
            assert problem.remedy


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_for_another_base(layout: Layout, kind: str) -> None:
    """Wider, and with GQA where this one has none."""
    sizes = replace(geometry("mini"), hidden_size=128, intermediate_size=200)
    tensors, config = convert(*adapter(sizes), layout, sizes)
    with pytest.raises(ModelError):
        check(tensors, config, geometry(kind))


def test_two_layouts_in_one() -> None:
    sizes = geometry("mini")
    fused, config = adapter(sizes, "qkv_proj")
    unfused, _ = adapter(sizes, "gate_proj", layout="unfused")
    with pytest.raises(ModelError, match="does not belong"):
        check(fused | unfused, config, sizes)
    with pytest.raises(ModelError, match="does not belong"):
        detect(fused | unfused, sizes)
    with pytest.raises(ModelError):
        detect(fused | adapter(sizes, "o_proj", layout="loralib")[0], sizes)


@pytest.mark.parametrize("claimed", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_under_another_name(layout: Layout, claimed: Layout) -> None:
    """Only what is the same may pass: a split adapter is a fused one, MergedLinear is an option."""
    sizes = geometry("mini")
    tensors, config = convert(*adapter(sizes), layout, sizes)
    harmless = {("split", "fused"), ("loralib", "loralib_merged")}
    if layout == claimed or (layout, claimed) in harmless:
        check(tensors, replace(config, layout=claimed), sizes)
    else:
        with pytest.raises(ModelError):
            check(tensors, replace(config, layout=claimed, enable_lora={}), sizes)


def test_many_problems_are_cut_short() -> None:
    sizes = replace(geometry("mini"), num_layers=20)
    tensors, config = adapter(sizes)
    with pytest.raises(ModelError) as caught:
        check(tensors, config, replace(sizes, hidden_size=128))
    assert len(caught.value.problems) == 9
    assert "72 more" in str(caught.value)


@pytest.mark.parametrize(
    ("enable_lora", "match"),
    [
        ({}, "3 of true and false are needed"),
        ({"qkv_proj": (True, True)}, "3 of true and false are needed"),
        ({"qkv_proj": (False, False, False)}, "one true"),
        ({"qkv_proj": (True, False, True)}, r"not the \(8, 64\) and \(128, 4\)"),
    ],
)
def test_grouped_shapes(enable_lora: Any, match: str) -> None:
    sizes = geometry("mini")
    tensors, config = convert(*adapter(sizes, "qkv_proj"), "loralib_merged", sizes)
    with pytest.raises(ModelError, match=match):
        check(tensors, replace(config, enable_lora=enable_lora), sizes)


def test_grouped_blocks_of_gqa() -> None:
    """Sizes that a third divides, as MergedLinear itself would take them, and get k and v wrong."""
    sizes = replace(geometry("mini"), num_kv_heads=1)
    tensors = {f"{QKV}.lora_A": torch.ones(6, 64), f"{QKV}.lora_B": torch.ones(96, 2)}
    config = AdapterConfig(2, 4, (), layout="loralib_merged", enable_lora={"qkv_proj": (True, True, True)})
    assert sizes.linear_shape("qkv_proj") == (96, 64)
    with pytest.raises(ModelError, match=r"of 64, 16, 16 rows \(GQA\)"):
        check(tensors, config, sizes)


@pytest.mark.parametrize("layout", ["split", "unfused", "loralib_merged"])
def test_the_rank_of_a_block_is_bounded(layout: Layout) -> None:
    """A fused linear of 64 to 192 can use rank 64, so can each of its blocks; not one more."""
    for rank in (64, 65):
        wide = replace(geometry("mini"), hidden_size=64 if rank == 64 else 128)
        tensors, config = convert(*adapter(wide, "gate_up_proj", rank=rank), layout, wide)
        cut = {key: t[:, :64] if "lora_A" in key else t for key, t in tensors.items()}
        if rank == 64:
            check(cut, config, geometry("mini"))
        else:
            with pytest.raises(ModelError, match="is above"):
                check(cut, config, geometry("mini"))


def test_grouped_on_one_projection() -> None:
    sizes = geometry("mini")
    tensors, config = adapter(sizes, "o_proj", layout="loralib_merged")
    with pytest.raises(ModelError, match="one projection"):
        check(tensors, replace(config, enable_lora={"o_proj": (True,)}), sizes)


def test_loralib_may_mix_its_layers() -> None:
    """A Linear for the GQA matrix beside a MergedLinear for gate and up."""
    sizes = geometry("medium")
    grouped, config = convert(*adapter(sizes, "gate_up_proj"), "loralib_merged", sizes)
    plain, _ = adapter(sizes, "qkv_proj", layout="loralib")
    fused, found = convert(grouped | plain, config, "fused", sizes)
    assert found.targets == ("qkv_proj", "gate_up_proj")
    assert torch.equal(fused[f"{PEFT_QKV}.lora_A.weight"], plain[f"{QKV}.lora_A"])


# --- config ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rank": 0}, "rank 0 is not"),
        ({"rank": 4.0}, "rank 4.0 is not"),
        ({"rank": True}, "rank True is not"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"alpha": "8"}, "alpha '8'"),
        ({"layout": "peft"}, "Choose out of fused, split"),
        ({"rank_pattern": {"qkv_proj": -1}}, "qkv_proj: rank -1"),
        ({"alpha_pattern": {"qkv_proj": None}}, "qkv_proj: alpha None"),
        ({"rank_pattern": {"(a+)+$": 4}}, "regular expression"),
        ({"alpha_pattern": {"": 4}}, "regular expression"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], match: str) -> None:
    sizes = geometry("mini")
    tensors, good = adapter(sizes)
    with pytest.raises(ModelError, match=match):
        check(tensors, replace(good, **config), sizes)


@pytest.mark.parametrize(
    ("keys", "module"),
    [
        (["qkv_proj"], QKV),
        (["v_proj", "kv_proj", "self_attn.qkv_proj", "qkv_proj"], QKV),
        (["^qkv_proj", "qkv_proj"], QKV),
        ([f"^{QKV}", "qkv_proj"], QKV),
        (["layers.1.self_attn.qkv_proj", "qkv_proj"], "model.layers.11.self_attn.qkv_proj"),
        (["head", "lm_head"], "lm_head"),
        (["embed"], "model.embed_tokens"),
    ],
)
def test_patterns_match_as_in_peft(keys: list[str], module: str) -> None:
    from peft.utils.other import get_pattern_key

    pattern = {key: i for i, key in enumerate(keys)}
    assert match(pattern, module, -1) == pattern.get(get_pattern_key(keys, module), -1)


def test_compress_names_linears_before_layers() -> None:
    modules = [f"model.layers.{i}.{name}" for i in range(3) for name in ("q", "o", "d")]
    values = {module: 4 for module in modules} | {f"model.layers.{i}.q": 8 for i in range(3)}
    values["model.layers.1.o"] = 2
    default, pattern = compress(values)
    assert (default, pattern) == (4, {"q": 8, "model.layers.1.o": 2})
    assert all(match(pattern, module, default) == value for module, value in values.items())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_for_undoes_scale_of(use_rslora: bool) -> None:
    for rank in (1, 3, 7, 49, 64):
        for alpha in (1, 16, 0.1, 33.3, 1e-3):
            config = AdapterConfig(rank, alpha, (), use_rslora=use_rslora)
            found = alpha_for(config.scale_of("x"), rank, use_rslora)
            assert found == alpha
            assert isinstance(found, int) == float(alpha).is_integer()
