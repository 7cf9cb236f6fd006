"""phi3.py against the published sizes of the checkpoints and against transformers' own model."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from qlora_phi3 import phi3
from qlora_phi3.errors import ModelError
from qlora_phi3.phi3 import Geometry, geometry_from_config

MINI = phi3.VARIANTS["microsoft/Phi-3-mini-4k-instruct"]
PHI_4_MINI = phi3.VARIANTS["microsoft/Phi-4-mini-instruct"]

MINI_CONFIG: dict[str, Any] = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
}
"""What counts of Phi-3-mini-4k's config.json, as published (transformers 4 spelling)."""

PHI_4_MINI_CONFIG: dict[str, Any] = {
    **MINI_CONFIG,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 200064,
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "partial_rotary_factor": 0.75,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}


def new_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 saves it: everything about RoPE in one mapping."""
    moved = ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    rope |= {key: config[key] for key in moved[2:] if key in config}
    return {key: value for key, value in config.items() if key not in moved} | {"rope_parameters": rope}


# Sizes


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("microsoft/Phi-3-mini-128k-instruct", 3_821_079_552),
        ("microsoft/Phi-3.5-mini-instruct", 3_821_079_552),
        ("microsoft/Phi-3-medium-4k-instruct", 13_960_238_080),
        ("microsoft/Phi-3-medium-128k-instruct", 13_960_238_080),
        ("microsoft/phi-4", 14_659_507_200),
        ("microsoft/Phi-4-mini-instruct", 3_836_021_760),
        ("builtin:smollm2-135m", 134_515_008),
    ],
)
def test_parameters_of_every_variant(name: str, total: int) -> None:
    assert phi3.VARIANTS[name].num_parameters == total


def test_parts_of_phi_3_mini() -> None:
    assert MINI.num_linear_parameters == 32 * 113_246_208  # 3.624 B
    assert MINI.num_embedding_parameters == 2 * 98_500_608
    assert MINI.num_norm_parameters == 65 * 3072


def test_tied_head_has_no_parameters_of_its_own() -> None:
    assert PHI_4_MINI.num_embedding_parameters == 200_064 * 3072


def test_rank_16_lora_of_phi_3_mini() -> None:
    assert MINI.lora_parameters(phi3.LINEARS, 16) == 25_165_824
    assert round(MINI.lora_parameters(("o_proj", "down_proj"), 16) / 1e6, 1) == 8.9


# Slices


def test_slices_of_phi_3_mini() -> None:
    assert MINI.slices("qkv_proj") == {"q": (0, 3072), "k": (3072, 6144), "v": (6144, 9216)}
    assert MINI.slices("gate_up_proj") == {"gate": (0, 8192), "up": (8192, 16384)}


@pytest.mark.parametrize(
    ("name", "q", "kv"),
    [
        ("microsoft/phi-4", 5120, 1280),
        ("microsoft/Phi-4-mini-instruct", 3072, 1024),
        ("builtin:smollm2-135m", 576, 192),
    ],
)
def test_blocks_of_qkv_are_unequal_with_grouped_heads(name: str, q: int, kv: int) -> None:
    geometry = phi3.VARIANTS[name]
    assert geometry.slices("qkv_proj") == {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    assert geometry.linear_shape("qkv_proj") == (q + 2 * kv, geometry.hidden_size)


@pytest.mark.parametrize("name", phi3.VARIANTS)
def test_slices_cover_every_output_once(name: str) -> None:
    geometry = phi3.VARIANTS[name]
    seen = []
    for linear in phi3.LINEARS:
        edges = sorted(geometry.slices(linear).values())
        assert edges[0][0] == 0
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(edges))
        assert edges[-1][1] == geometry.linear_shape(linear)[0]
        seen += [(part, linear) for part in geometry.slices(linear)]
    assert dict(seen) == phi3.PROJECTIONS


def test_an_unknown_linear_has_no_slices() -> None:
    with pytest.raises(KeyError):
        MINI.slices("q_proj")


# config.json


@pytest.mark.parametrize("spell", [dict, new_spelling])
def test_config_of_phi_3_mini(spell: Any) -> None:
    assert geometry_from_config(spell(MINI_CONFIG)) == MINI


@pytest.mark.parametrize("spell", [dict, new_spelling])
def test_config_of_phi_4_mini(spell: Any) -> None:
    assert geometry_from_config(spell(PHI_4_MINI_CONFIG)) == PHI_4_MINI


def test_what_a_config_may_leave_out() -> None:
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    bare = {"model_type": "phi3", **{key: MINI_CONFIG[key] for key in sizes}}
    assert geometry_from_config(bare) == dataclasses.replace(MINI, sliding_window=None)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("phi3small", "Phi-3-small"),
        ("phi3_v", "Phi-3-vision"),
        ("phimoe", "Phi-3.5-MoE"),
        ("phi4mm", "Phi-4-multimodal"),
        ("phi", "Phi-2"),
        ("llama", "only the Phi-3 architecture"),
        (None, "only the Phi-3 architecture"),
    ],
)
def test_other_architectures_are_refused_by_name(model_type: str | None, says: str) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        geometry_from_config({**MINI_CONFIG, "model_type": model_type}, place="some/config.json")
    assert str(refused.value).startswith("some/config.json: ")
    assert "microsoft/Phi-3-mini-4k-instruct" in refused.value.problems[0].remedy


def test_another_head_is_refused() -> None:
    with pytest.raises(ModelError, match="Phi3ForSequenceClassification"):
        geometry_from_config({**MINI_CONFIG, "architectures": ["Phi3ForSequenceClassification"]})


@pytest.mark.parametrize("value", [None, 0, -1, "3072", 3072.0])
def test_sizes_must_be_positive_whole_numbers(value: Any) -> None:
    with pytest.raises(ModelError, match=r"hidden_size is .*needs a positive whole number"):
        geometry_from_config({**MINI_CONFIG, "hidden_size": value})


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "num_hidden_layers": [10**9, 10**400, True],
        "vocab_size": [10**400, [1]],
        "architectures": [5, "x", {"a": 1}, [5]],
        "num_key_value_heads": ["4", -1, 1.5],
        "max_position_embeddings": [None, 0, "long", 10**400, float("inf")],
        "original_max_position_embeddings": ["x", 0.5, None],
        "sliding_window": ["x", 0],
        "rope_theta": ["abc", 0, float("nan"), 10**400],
        "partial_rotary_factor": ["x", float("nan"), 2],
        "rope_scaling": [
            "x",
            [1],
            {"short_factor": "x"},
            {"type": 5},
            {"long_factor": [None]},
            {"long_factor": [0.0]},
            {"short_factor": [-1.0]},
            {"short_factor": [float("inf")]},
            {"type": "su"},
        ],
        "rope_parameters": ["x", {"rope_theta": "abc"}, {"partial_rotary_factor": float("nan")}],
        "tie_word_embeddings": ["no", 1],
        "pad_token_id": ["x", 32064, 10**400, -40000],
        "eos_token_id": ["x", [None, "x"], {}],
        "rms_norm_eps": ["x", 0, float("nan")],
        "initializer_range": ["x", -1.0, 0],
        "hidden_act": [None, 5, "x"],
        "head_dim": [None, "x", 95],
        "torch_dtype": ["x", 5, "float8_e4m3fn"],
        "transformers_version": [5],
        "attention_dropout": [2, "x", 0.1, None, float("nan")],
    }.items(),
)
def test_values_that_no_checkpoint_has(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ModelError, match=key) as refused:
            geometry_from_config({**MINI_CONFIG, key: value}, place="some/config.json")
        assert len(str(refused.value)) < 300


def test_a_padding_token_that_is_left_out_is_the_library_s_own() -> None:
    small = {key: value for key, value in MINI_CONFIG.items() if key != "pad_token_id"} | {"vocab_size": 320}
    with pytest.raises(ModelError, match="pad_token_id is 32000 where it is left out"):
        geometry_from_config(small)


def test_every_missing_size_is_named_at_once() -> None:
    with pytest.raises(ModelError, match=r"num_hidden_layers.*hidden_size.*intermediate_size.*vocab_size"):
        geometry_from_config({"model_type": "phi3"})


# Against transformers

TINY = dict(vocab_size=320, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(hidden_size=64, intermediate_size=96, num_attention_heads=4),
        dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, tie_word_embeddings=True),
        dict(hidden_size=72, intermediate_size=160, num_attention_heads=9, num_key_value_heads=3),
    ],
    ids=["untied", "tied", "gqa"],
)
def test_geometry_of_a_real_model(sizes: dict[str, Any]) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(Phi3Config(**TINY, **sizes))
    geometry = geometry_from_config(model.config.to_dict())
    assert isinstance(geometry, Geometry)
    assert geometry.num_parameters == sum(p.numel() for p in model.parameters())
    modules = dict(model.model.layers[0].named_modules())
    for linear in phi3.LINEARS:
        parent = "self_attn" if linear in ("qkv_proj", "o_proj") else "mlp"
        assert geometry.linear_shape(linear) == tuple(modules[f"{parent}.{linear}"].weight.shape)


@pytest.mark.parametrize("name", phi3.VARIANTS)
def test_geometry_of_every_variant_on_the_meta_device(name: str) -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    g = phi3.VARIANTS[name]
    config = Phi3Config(
        num_hidden_layers=g.num_layers,
        hidden_size=g.hidden_size,
        intermediate_size=g.intermediate_size,
        num_attention_heads=g.num_heads,
        num_key_value_heads=g.num_kv_heads,
        vocab_size=g.vocab_size,
        tie_word_embeddings=g.tied_embeddings,
    )
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == g.num_parameters


def test_the_rotated_part_of_a_head() -> None:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, partial_rotary_factor=0.75)
    config = Phi3Config(**TINY, **sizes)
    geometry = geometry_from_config(config.to_dict())
    rotated = 2 * len(Phi3RotaryEmbedding(config).inv_freq)
    assert rotated == geometry.rotary_fraction * geometry.head_dim == 24
