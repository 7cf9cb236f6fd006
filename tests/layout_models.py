"""Tiny Phi-3 models of three geometries and random adapters on them, for the tests of layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_phi3.layouts import AdapterConfig, Layout, Tensors
from qlora_phi3.layouts.names import key_of, linear_shapes, style_of, unfused_shapes
from qlora_phi3.phi3 import Geometry, geometry_from_config

VOCAB = 40
IDS = torch.arange(VOCAB).view(4, 10)

FAMILY: dict[str, dict[str, Any]] = {
    "mini": {"num_key_value_heads": 4},
    "medium": {"num_key_value_heads": 2},
    "phi-4-mini": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
}


def phi3_model(kind: str, seed: int = 0) -> Any:
    """A random float32 `Phi3ForCausalLM`; the same for the same seed."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        sliding_window=None,
        attn_implementation="eager",
        **FAMILY[kind],
    )
    return Phi3ForCausalLM(config).eval()


def geometry_of(model: Any) -> Geometry:
    return geometry_from_config(model.config.to_dict())


def geometry(kind: str) -> Geometry:
    kv_heads = FAMILY[kind]["num_key_value_heads"]
    tied = FAMILY[kind].get("tie_word_embeddings", False)
    return Geometry(2, 64, 96, 4, kv_heads, VOCAB, tied_embeddings=tied)


def tensors_of(config: AdapterConfig, modules: Mapping[str, tuple[int, int]], seed: int = 0) -> Tensors:
    """Random As and Bs of these modules (path -> (out, in)), ranks as the config says."""
    generator = torch.Generator().manual_seed(seed)
    style, tensors = style_of(config.layout), {}
    for module, (num_out, num_in) in modules.items():
        rank = config.rank_of(module)
        a, b = ((rank, num_in), (num_out, rank)) if style != "mlx" else ((num_in, rank), (rank, num_out))
        tensors[key_of(module, "A", style)] = torch.randn(a, generator=generator)
        tensors[key_of(module, "B", style)] = torch.randn(b, generator=generator)
    return tensors


def adapter(
    sizes: Geometry, *names: str, rank: int = 4, alpha: float = 8, layout: Layout = "fused", **settings: Any
) -> tuple[Tensors, AdapterConfig]:
    """A random adapter on the linears of these names in every layer; on all linears where none is named."""
    shapes = unfused_shapes(sizes) if layout == "unfused" else linear_shapes(sizes)
    chosen = {
        module: shape
        for module, shape in shapes.items()
        if (module.rsplit(".", 1)[-1] in names if names else ".layers." in module)
    }
    targets = tuple(dict.fromkeys(module.rsplit(".", 1)[-1] for module in chosen))
    config = AdapterConfig(rank, alpha, targets, layout=layout, **settings)
    return tensors_of(config, chosen), config


def deltas(tensors: Tensors, config: AdapterConfig, sizes: Geometry) -> dict[str, torch.Tensor]:
    """The update of every linear of the base in float64, worked out by the layouts' definitions alone."""
    layers = {**unfused_shapes(sizes), **linear_shapes(sizes)}
    style, found = style_of(config.layout), {}
    for module, shape in layers.items():
        if key_of(module, "A", style) not in tensors:
            continue
        a, b = (tensors[key_of(module, side, style)].double() for side in "AB")
        if style == "mlx":
            a, b = a.T, b.T
        found[module] = _grouped(a, b, config.blocks_of(module), shape) * config.scale_of(module)
    return fuse_deltas(found, sizes) if config.layout == "unfused" else found


def _grouped(
    a: torch.Tensor, b: torch.Tensor, enabled: tuple[bool, ...], shape: tuple[int, int]
) -> torch.Tensor:
    if not enabled:
        return b @ a
    delta, rank = torch.zeros(shape, dtype=torch.float64), b.shape[1]
    rows, place = shape[0] // len(enabled), 0
    for block, on in enumerate(enabled):
        if on:
            part = b[place * rows : (place + 1) * rows] @ a[place * rank : (place + 1) * rank]
            delta[block * rows : (block + 1) * rows] = part
            place += 1
    return delta


def fuse_deltas(found: dict[str, torch.Tensor], sizes: Geometry) -> dict[str, torch.Tensor]:
    """The updates of q, k, v and gate, up written under one another."""
    fused = {}
    for module, shape in linear_shapes(sizes).items():
        parent, _, linear = module.rpartition(".")
        slices = sizes.slices(linear) if ".layers." in module else {}
        parts = {f"{parent}.{name}_proj": span for name, span in slices.items()}
        if module in found:
            fused[module] = found[module]
        elif parts.keys() & found.keys():
            fused[module] = torch.zeros(shape, dtype=torch.float64)
            for name, (start, stop) in parts.items():
                if name in found:
                    fused[module][start:stop] = found[name]
    return fused


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@torch.no_grad()
def merged_logits(kind: str, updates: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base with the updates added to its weights by hand; untied first, as PEFT computes."""
    model = phi3_model(kind)
    for module, delta in updates.items():
        linear = model.get_submodule(module)
        delta = delta.T if module.endswith("embed_tokens") else delta
        linear.weight = torch.nn.Parameter(linear.weight + delta.float())
    return logits(model)
