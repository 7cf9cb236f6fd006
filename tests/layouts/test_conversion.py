"""layouts/conversion.py: an adapter says the same in every layout, and comes back as it was."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_models import (
    FAMILY,
    IDS,
    adapter,
    deltas,
    geometry,
    geometry_of,
    logits,
    merged_logits,
    phi3_model,
    tensors_of,
)

from qlora_phi3.errors import ModelError
from qlora_phi3.layouts import LAYOUTS, AdapterConfig, Layout, Tensors, convert, read_adapter, write_adapter
from qlora_phi3.layouts.blocks import same_bits
from qlora_phi3.layouts.names import linear_shapes, unfused_shapes
from qlora_phi3.loralib_bridge import adapter_of, attach_adapter
from qlora_phi3.phi3 import Geometry

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
EMBEDDINGS = ["embed_tokens", "lm_head"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "embeddings": {"target_modules": [*ALL, *EMBEDDINGS]},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"qkv_proj": 6, "model.layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"qkv_proj": 12, "model.layers.1.mlp.down_proj": 4, "gate_up_proj": 5},
    },
}


def stock_peft(kind: str, **config: Any) -> Any:
    """A Phi-3 with PEFT's own LoRA, as after training: B is not zero."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(phi3_model(kind), LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def possible(kind: str, case: str, layout: Layout) -> bool:
    """What no layout but PEFT's can say: tied embeddings apart; loralib's equal blocks under GQA."""
    tied = case == "embeddings" and kind == "phi-4-mini"
    foreign = layout in ("loralib", "loralib_merged", "mlx")
    return not (tied and foreign) and not (layout == "loralib_merged" and kind != "mini")


CASES = [
    pytest.param(kind, case, layout, id=f"{kind}-{case}-{layout}")
    for kind, case, layout in itertools.product(FAMILY, SETTINGS, LAYOUTS)
    if possible(kind, case, layout)
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("kind", "case", "layout"), CASES)
def test_logits_stay(kind: str, case: str, layout: Layout) -> None:
    """What stock PEFT computes is what the converted tensors say, read by the layout's definition."""
    live = stock_peft(kind, **SETTINGS[case])
    sizes = geometry_of(live.base_model.model)
    tensors, config = adapter_of(live, sizes)
    expected = logits(live)
    assert (expected - logits(phi3_model(kind))).abs().max() > 0.01
    converted, found = convert(tensors, config, layout, sizes)
    updates = deltas(converted, found, sizes)
    # PEFT adapts a tied head or embedding alone; adding to the shared matrix would change both
    if not (kind == "phi-4-mini" and case == "embeddings"):
        close(merged_logits(kind, updates), expected)
    back, _ = convert(converted, found, "fused", sizes)
    assert same(back, tensors)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("kind", FAMILY)
def test_stock_peft_loads_it(tmp_path: Path, kind: str, layout: Layout, case: str) -> None:
    from peft import PeftModel

    live = stock_peft(kind, **SETTINGS[case])
    sizes = geometry_of(live.base_model.model)
    tensors, config = adapter_of(live, sizes)
    write_adapter(tmp_path / "adapter", *convert(tensors, config, layout, sizes))
    loaded = PeftModel.from_pretrained(phi3_model(kind), str(tmp_path / "adapter"))
    close(logits(loaded), logits(live))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("case", [*SETTINGS, "all-linear", "some layers", "a rule", "Llama's names"])
@pytest.mark.parametrize("kind", FAMILY)
def test_what_stock_peft_saves_is_read(tmp_path: Path, kind: str, case: str) -> None:
    more = {
        "all-linear": {"target_modules": "all-linear"},
        "some layers": {"target_modules": ALL, "layers_to_transform": [1]},
        "a rule": {"target_modules": r".*\.1\..*_proj"},
        "Llama's names": {"target_modules": ["q_proj", "o_proj", "down_proj"]},
    }
    live = stock_peft(kind, **(SETTINGS | more)[case])
    sizes = geometry_of(live.base_model.model)
    live.save_pretrained(tmp_path, save_embedding_layers=False)
    tensors, config = read_adapter(tmp_path, sizes)
    assert same(tensors, adapter_of(live, sizes)[0])
    fresh = attach_adapter(phi3_model(kind), tensors, config, sizes)
    assert torch.equal(logits(fresh), logits(live))


def llama_of(model: Any) -> Any:
    """The same base as a Llama, its fused matrices cut."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters")
    copied = {name: getattr(model.config, name) for name in (*known, *more)}
    llama = LlamaForCausalLM(LlamaConfig(**copied, max_position_embeddings=64, attn_implementation="eager"))
    sizes, state = geometry_of(model), {}
    for key, weight in model.state_dict().items():
        parent, _, linear = key.removesuffix(".weight").rpartition(".")
        if linear in ("qkv_proj", "gate_up_proj"):
            for name, (start, stop) in sizes.slices(linear).items():
                state[f"{parent}.{name}_proj.weight"] = weight[start:stop]
        else:
            state[key] = weight
    llama.load_state_dict(state)
    return llama.eval()


@pytest.mark.parametrize("case", ["plain", "rslora", "patterns", "embeddings"])
@pytest.mark.parametrize("kind", ["mini", "medium"])
def test_llama_consumers_load_unfused(tmp_path: Path, kind: str, case: str) -> None:
    from peft import PeftModel

    live = stock_peft(kind, **SETTINGS[case])
    sizes = geometry_of(live.base_model.model)
    llama = llama_of(phi3_model(kind))
    close(logits(llama), logits(phi3_model(kind)))
    tensors, config = adapter_of(live, sizes)
    write_adapter(tmp_path / "adapter", *convert(tensors, config, "unfused", sizes))
    close(logits(PeftModel.from_pretrained(llama, str(tmp_path / "adapter"))), logits(live))


# --- composition over random adapters ----------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    kv_heads, groups, half = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Geometry(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=kv_heads * groups * 2 * half,
        intermediate_size=draw(st.integers(2, 9)),
        num_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        vocab_size=draw(st.integers(4, 11)),
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def adapters(draw: st.DrawFn) -> tuple[Tensors, AdapterConfig, Geometry]:
    """An adapter on some linears of some layers, of any ranks and alphas, fused or unfused."""
    sizes, layout = draw(geometries()), draw(st.sampled_from(["fused", "unfused"]))
    shapes = unfused_shapes(sizes) if layout == "unfused" else linear_shapes(sizes)
    chosen = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
    limits = {m: min(min(shapes[m]), sizes.hidden_size, sizes.intermediate_size) for m in chosen}
    ranks = {m: draw(st.integers(1, limits[m])) for m in chosen}
    # unfused projections of one matrix need one scale, so alpha follows the rank there
    factor = draw(st.sampled_from([0.5, 1.0, 2.0, 0.3]))
    rslora = draw(st.booleans())
    alphas = {m: factor * (r**0.5 if rslora else r) for m, r in ranks.items()}
    if layout == "fused":
        alphas = {m: draw(st.sampled_from([1, 8, 16.5, 0.1])) for m in chosen}
    config = AdapterConfig(
        rank=1,
        alpha=1,
        targets=(),
        rank_pattern={f"^{m}": r for m, r in ranks.items()},
        alpha_pattern={f"^{m}": a for m, a in alphas.items()},
        use_rslora=rslora,
        layout=layout,
    )
    return tensors_of(config, {m: shapes[m] for m in chosen}, draw(st.integers(0, 9))), config, sizes


@settings(deadline=None, max_examples=150)
@given(adapters(), st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4))
def test_any_chain_of_layouts(case: tuple[Tensors, AdapterConfig, Geometry], chain: list[Layout]) -> None:
    """Every step keeps every update; the way back gives the first tensors, bit by bit."""
    tensors, config, sizes = case
    expected = deltas(tensors, config, sizes)
    now, settings_now = tensors, config
    for layout in chain:
        try:
            now, settings_now = convert(now, settings_now, layout, sizes)
        except ModelError as error:
            assert_refusal(error, layout, sizes)
            continue
        assert settings_now.layout == layout
        found = deltas(now, settings_now, sizes)
        assert found.keys() == expected.keys()
        for module, delta in expected.items():
            torch.testing.assert_close(found[module], delta, rtol=1e-9, atol=1e-9)
    back, settings_back = convert(now, settings_now, config.layout, sizes)
    assert same(back, tensors)
    for module in (key.removeprefix("^") for key in config.rank_pattern):
        assert settings_back.rank_of(module) == config.rank_of(module)
        if settings_back.use_rslora == config.use_rslora:
            assert settings_back.alpha_of(module) == pytest.approx(config.alpha_of(module), rel=1e-12)


def assert_refusal(error: ModelError, layout: Layout, sizes: Geometry) -> None:
    if "GQA" in str(error):
        assert layout == "loralib_merged"
        assert sizes.num_heads != sizes.num_kv_heads
    else:
        assert "ties embedding and head" in str(error)
        assert sizes.tied_embeddings


@settings(deadline=None, max_examples=60)
@given(adapters(), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_two_steps_are_one(
    case: tuple[Tensors, AdapterConfig, Geometry], first: Layout, second: Layout
) -> None:
    tensors, config, sizes = case
    try:
        through = convert(*convert(tensors, config, first, sizes), second, sizes)
    except ModelError as error:
        assert_refusal(error, first if "GQA" not in str(error) else "loralib_merged", sizes)
        return
    direct = convert(tensors, config, second, sizes)
    assert same(through[0], direct[0])
    assert through[1].targets == direct[1].targets


# --- what the converted tensors look like ------------------------------------------------------------------


def test_split_shapes() -> None:
    sizes = geometry("medium")
    tensors, config = convert(*adapter(sizes), "split", sizes)
    assert (config.rank_of("x.qkv_proj"), config.alpha_of("x.qkv_proj")) == (12, 24)
    assert (config.rank_of("x.gate_up_proj"), config.alpha_of("x.gate_up_proj")) == (8, 16)
    assert (config.rank_of("x.o_proj"), config.alpha_of("x.o_proj")) == (4, 8)
    b = tensors["base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"]
    assert b.shape == (128, 12)
    assert not b[:64, 4:].any()
    assert not b[64:, :4].any()


def test_merged_shapes() -> None:
    sizes = geometry("mini")
    tensors, config = convert(*adapter(sizes), "loralib_merged", sizes)
    assert tensors["model.layers.0.self_attn.qkv_proj.lora_A"].shape == (12, 64)
    assert tensors["model.layers.0.self_attn.qkv_proj.lora_B"].shape == (192, 4)
    assert config.enable_lora == {"qkv_proj": (True, True, True), "gate_up_proj": (True, True)}
    assert (config.rank, config.rank_pattern) == (4, {})


def test_missing_projections_are_zero_blocks() -> None:
    sizes = geometry("mini")
    tensors, config = adapter(sizes, "q_proj", "v_proj", layout="unfused")
    merged, found = convert(tensors, config, "loralib_merged", sizes)
    assert found.enable_lora == {"qkv_proj": (True, False, True)}
    assert merged["model.layers.0.self_attn.qkv_proj.lora_B"].shape == (128, 4)
    fused, _ = convert(merged, found, "fused", sizes)
    assert not fused["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"][64:128].any()
    back, _ = convert(fused, convert(merged, found, "fused", sizes)[1], "unfused", sizes)
    assert same(back, tensors)


def test_mlx_is_transposed() -> None:
    sizes = geometry("medium")
    tensors, config = adapter(sizes, use_rslora=True, alpha=8)
    turned, found = convert(tensors, config, "mlx", sizes)
    key = "model.layers.0.self_attn.o_proj"
    assert torch.equal(turned[f"{key}.lora_a"].T, tensors[f"base_model.model.{key}.lora_A.weight"])
    assert turned[f"{key}.lora_a"].is_contiguous()
    assert (found.use_rslora, found.alpha, found.scale_of(key)) == (False, 16, 4)


def test_alphas_come_back() -> None:
    sizes = geometry("medium")
    for alpha, rank, rslora in itertools.product([1, 16, 0.1, 12.75], [1, 3, 7], [False, True]):
        tensors, config = adapter(sizes, alpha=alpha, rank=rank, use_rslora=rslora)
        _, back = convert(*convert(tensors, config, "split", sizes), "fused", sizes)
        assert (back.alpha, back.rank, back.use_rslora, back.targets) == (
            alpha, rank, rslora, config.targets,
        )  # fmt: skip


@pytest.mark.parametrize("to", LAYOUTS)
def test_input_is_left_alone(to: Layout) -> None:
    sizes = geometry("mini")
    tensors, config = adapter(sizes)
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    converted, _ = convert(tensors, config, to, sizes)
    for tensor in converted.values():
        tensor.fill_(7)
    assert same(tensors, copies)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    sizes = geometry("mini")
    tensors, config = adapter(sizes)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    for layout in LAYOUTS:
        there = convert(tensors, config, layout, sizes)
        assert {tensor.dtype for tensor in there[0].values()} == {dtype}
        assert same(convert(*there, "fused", sizes)[0], tensors)


# --- what cannot be said -----------------------------------------------------------------------------------


def test_gqa_is_no_merged_linear() -> None:
    sizes = geometry("medium")
    with pytest.raises(ModelError, match=r"equal blocks.*64, 32, 32 rows \(GQA\)"):
        convert(*adapter(sizes), "loralib_merged", sizes)
    tensors, config = convert(*adapter(sizes, "gate_up_proj", "o_proj"), "loralib_merged", sizes)
    assert config.enable_lora == {"gate_up_proj": (True, True)}
    assert tensors["model.layers.0.mlp.gate_up_proj.lora_B"].shape == (192, 4)


@pytest.mark.parametrize("to", ["loralib", "loralib_merged", "mlx"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_tied_embeddings(name: str, to: Layout) -> None:
    sizes = geometry("phi-4-mini")
    tensors, config = adapter(sizes, name, "o_proj")
    with pytest.raises(ModelError, match="ties embedding and head"):
        convert(tensors, config, to, sizes)
    for layout in ("split", "unfused"):
        assert same(convert(*convert(tensors, config, layout, sizes), "fused", sizes)[0], tensors)


@pytest.mark.parametrize("layout", ["loralib", "mlx"])
def test_tied_embeddings_of_others(layout: Layout) -> None:
    sizes = geometry("phi-4-mini")
    tensors, config = adapter(sizes, "embed_tokens", layout=layout)
    with pytest.raises(ModelError, match="ties embedding and head"):
        convert(tensors, config, "fused", sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "alphas", [{"v_proj": 4}, {"v_proj": 3, "o_proj": 5}, {"q_proj": 0}, {"k_proj": -2.5}]
)
@pytest.mark.parametrize("layout", ["fused", "loralib", "unfused"])
def test_projections_of_different_scales(
    layout: Layout, alphas: dict[str, float], dtype: torch.dtype
) -> None:
    """Their Bs take the difference, exactly where it is a power of two."""
    sizes = geometry("mini")
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    tensors, config = adapter(sizes, *names, layout="unfused", alpha_pattern=alphas)
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    found, settings = convert(tensors, config, layout, sizes)
    exact = alphas == {"v_proj": 4} or (alphas == {"q_proj": 0})
    assert {tensor.dtype for tensor in found.values()} == {dtype if exact else torch.float32}
    expected, got = deltas(tensors, config, sizes), deltas(found, settings, sizes)
    near = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    for module in linear_shapes(sizes):
        if module in expected:
            torch.testing.assert_close(got[module], expected[module], **near)


def test_projections_of_one_scale_stay_as_they_are() -> None:
    sizes = geometry("mini")
    assert same(convert(*adapter(sizes, "q_proj", layout="unfused"), "unfused", sizes)[0],
                adapter(sizes, "q_proj", layout="unfused")[0])  # fmt: skip


def test_a_split_that_is_none() -> None:
    sizes = geometry("medium")
    tensors, config = adapter(sizes, rank=6, layout="split")
    with pytest.raises(ModelError, match="not block-diagonal") as caught:
        convert(tensors, config, "fused", sizes)
    assert len(caught.value.problems) == 4


def test_ids_are_all_used() -> None:
    assert IDS.numel() == geometry("mini").vocab_size
