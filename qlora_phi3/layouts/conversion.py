"""From any layout to any other, through the fused one, to which each has an exact way there and back.

Owns the composition. Refuses what the target cannot express, with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import ModelError
from ..phi3 import Geometry
from .blocks import Pair, Sizes, fuse, group, same_scale, split, stack, ungroup, unstack
from .config import PEFT_LAYOUTS, AdapterConfig, Layout
from .names import Tensors, block_sizes, is_fused, linear_shapes
from .pairs import Pairs, describe, parse, render, unequal_blocks

Enabled = dict[str, tuple[bool, ...]]


def convert(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    to: Layout,
    geometry: Geometry,
    place: str = "adapter",
) -> tuple[Tensors, AdapterConfig]:
    """The same adapter in another layout: the same update of every weight, to the bit on the way back.

    The config comes back in its shortest form. Projections of one linear that are scaled differently have no
    such way back: their Bs take the difference. loralib and MLX know no rsLoRA: its scale becomes an alpha.

    Raises:
        ModelError: the adapter is not whole or not of this base, or the layout cannot express it.
    """
    fused = _to_fused(parse(tensors, config, geometry, place), config, geometry, place)
    for layout in (config.layout, to):
        _check_tied(fused, layout, geometry, place)
    pairs, enable_lora = _from_fused(fused, to, geometry, place)
    described = describe(pairs, to, geometry, use_rslora=config.use_rslora, enable_lora=enable_lora)
    return render(pairs, to), described


def _to_fused(pairs: Pairs, config: AdapterConfig, geometry: Geometry, place: str) -> Pairs:
    if config.layout == "split":
        return _each(pairs, geometry, fuse)
    if config.layout == "unfused":
        return _each(_stack_all(_of_one_scale(pairs, geometry), geometry), geometry, fuse)
    if config.layout == "loralib_merged":
        return {module: _ungrouped(module, pair, config, geometry) for module, pair in pairs.items()}
    return pairs


def _from_fused(pairs: Pairs, to: Layout, geometry: Geometry, place: str) -> tuple[Pairs, Enabled]:
    if to in ("fused", "loralib", "mlx"):
        return pairs, {}
    pairs = _each(pairs, geometry, split)
    if to == "unfused":
        return _unstack_all(pairs, geometry), {}
    return _group_all(pairs, geometry, place) if to == "loralib_merged" else (pairs, {})


def _each(pairs: Pairs, geometry: Geometry, rewrite: Callable[[Pair, Sizes], Pair]) -> Pairs:
    """A rewriting applied to every fused linear; the others stay."""
    return {
        module: rewrite(pair, list(block_sizes(module, geometry).values())) if is_fused(module) else pair
        for module, pair in pairs.items()
    }


def _stack_all(pairs: Pairs, geometry: Geometry) -> Pairs:
    """q, k, v and gate, up pairs as block-diagonal pairs of the fused linears."""
    stacked: Pairs = {}
    for module in linear_shapes(geometry):
        sizes = block_sizes(module, geometry) if is_fused(module) else {module: 0}
        present = {name: pairs[name] for name in sizes if name in pairs}
        if present and is_fused(module):
            stacked[module] = stack([present.get(name) for name in sizes], list(sizes.values()))
        elif present:
            stacked[module] = pairs[module]
    return stacked


def _of_one_scale(pairs: Pairs, geometry: Geometry) -> Pairs:
    """The same with one scale for the projections of a linear.

    PEFT's patterns may scale q and k differently, and a fused linear has one scale: it gets the commonest of
    the adapter, and B takes the rest. That is exact for a power of two; else B is rounded as float32 is, and
    all tensors become float32.
    """
    found = dict(pairs)
    scales = Counter(pair.scale for pair in pairs.values() if pair.scale)
    common = scales.most_common(1)[0][0] if scales else 1.0
    for module in filter(is_fused, linear_shapes(geometry)):
        present = {name: pairs[name] for name in block_sizes(module, geometry) if name in pairs}
        if present and not same_scale(list(present.values())):
            found |= {name: _scaled(pair, common) for name, pair in present.items()}
    if len({pair.b.dtype for pair in found.values()}) > 1:
        found = {name: Pair(pair.a.float(), pair.b.float(), pair.scale) for name, pair in found.items()}
    return found


def _scaled(pair: Pair, scale: float) -> Pair:
    factor = pair.scale / scale
    exact = math.frexp(abs(factor))[0] in (0.0, 0.5)
    wide = pair.b if exact or pair.b.dtype == torch.float64 else pair.b.float()
    return Pair(pair.a, wide * factor, scale)


def _unstack_all(pairs: Pairs, geometry: Geometry) -> Pairs:
    apart: Pairs = {}
    for module, pair in pairs.items():
        if is_fused(module):
            sizes = block_sizes(module, geometry)
            blocks = zip(sizes, unstack(pair, list(sizes.values())), strict=True)
            apart |= {name: block for name, block in blocks if block is not None}
        else:
            apart[module] = pair
    return apart


def _group_all(pairs: Pairs, geometry: Geometry, place: str) -> tuple[Pairs, Enabled]:
    grouped: Pairs = {}
    used: Enabled = {}
    for module, pair in pairs.items():
        grouped[module] = pair
        if is_fused(module):
            sizes = list(block_sizes(module, geometry).values())
            if len(set(sizes)) > 1:
                remedy = "Write it as loralib, with a Linear for the whole matrix."
                raise ModelError(f"{place}: {module}", unequal_blocks(sizes), remedy)
            grouped[module], used[module] = group(pair, sizes)
    return grouped, used


def _ungrouped(module: str, pair: Pair, config: AdapterConfig, geometry: Geometry) -> Pair:
    used = config.blocks_of(module)
    if not used:  # a loralib model may mix MergedLinear and Linear
        return pair
    sizes = list(block_sizes(module, geometry).values())
    return fuse(ungroup(pair, sizes, used), sizes)


def _check_tied(pairs: Pairs, layout: Layout, geometry: Geometry, place: str) -> None:
    """PEFT adapts the embedding or the head alone, even where they share a matrix; others cannot.

    MLX's LoRAEmbedding.as_linear adapts the head with the embedding (mlx-lm tuner/lora.py), and loralib
    merges into the one shared matrix in eval mode (loralib 0.1.2 layers.py, Embedding.train).
    """
    shared = [module for module in pairs if ".layers." not in module]
    if geometry.tied_embeddings and shared and layout not in PEFT_LAYOUTS:
        reason = f"the base ties embedding and head, and {layout} adapts both where PEFT adapts one."
        raise ModelError(
            f"{place}: {shared[0]}", reason, "Keep it in a PEFT layout, or export a merged model."
        )
