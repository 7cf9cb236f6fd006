"""A LoRA adapter as a GGUF file, which llama.cpp applies to a GGUF of the base.

Owns the one alpha that llama.cpp knows. Refuses what it cannot compute: several scales that no one alpha
gives, and adapters of an embedding that is the head too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from ..errors import ModelError
from ..layouts import AdapterConfig, Tensors, convert
from ..layouts.names import is_embedding, key_of, linear_shapes
from ..phi3 import Geometry
from .gguf import tensor_name

_MERGE: Final = "Export a merged GGUF instead (gguf:q8_0)."
_SAME: Final = 1e-9
"""Scales that differ by less are one: alpha * sqrt(r) / r is not exact."""


def write(
    path: Path,
    tensors: Tensors,
    config: AdapterConfig,
    geometry: Geometry,
    *,
    name: str,
    place: str = "adapter",
) -> None:
    """Write an adapter of any layout; split ones as the fused linears that llama.cpp has.

    A and B are kept in float32: they are small, and q8_0's error is for the base. rsLoRA becomes an alpha:
    llama.cpp multiplies by alpha over a tensor's own rank.

    Shape: `<name>.weight.lora_a` (rank, in), `.lora_b` (out, rank); the embedding's A is turned,
    (vocab, rank).

    Raises:
        ModelError: the adapter is not whole, has several scales, or adapts a tied embedding or head.
    """
    import gguf

    fused, found = convert(tensors, config, "fused", geometry, place)
    modules = [module for module in linear_shapes(geometry) if key_of(module, "A", "peft") in fused]
    check_tied(modules, geometry, place)
    alpha, factors = _one_alpha(modules, found, place)
    writer = gguf.GGUFWriter(path, "phi3")
    try:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for module in modules:
            for side, array in _arrays(module, fused, factors[module]).items():
                writer.add_tensor(f"{tensor_name(module)}.weight.lora_{side}", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _arrays(module: str, tensors: Tensors, factor: float) -> dict[str, Any]:
    """A and B in float32, B times `factor`."""
    a, b = (tensors[key_of(module, side, "peft")].detach().float().cpu() for side in "AB")
    a = a.T if is_embedding(module) else a
    return {"a": a.contiguous().numpy(), "b": (b * factor).contiguous().numpy()}


def _one_alpha(modules: list[str], config: AdapterConfig, place: str) -> tuple[float, dict[str, float]]:
    """The alpha of the file, and what each B is multiplied with so that it gives the module's scale.

    Ranks may differ under one alpha, as llama.cpp divides by each tensor's own. They differ under one scale
    too where a split adapter became block-diagonal (3r for q, k, v): then B takes the whole number between.

    Raises:
        ModelError: neither alpha nor scale is the same everywhere.
    """
    scales = {module: config.scale_of(module) for module in modules}
    alphas = {module: scale * config.rank_of(module) for module, scale in scales.items()}
    first = modules[0]
    if all(math.isclose(alpha, alphas[first], rel_tol=_SAME) for alpha in alphas.values()):
        return alphas[first], dict.fromkeys(modules, 1.0)
    if all(math.isclose(scale, scales[first], rel_tol=_SAME) for scale in scales.values()):
        alpha = min(alphas.values())
        return alpha, {module: own / alpha for module, own in alphas.items()}
    other = next(m for m in modules if not math.isclose(scales[m], scales[first], rel_tol=_SAME))
    reason = (
        f"{first} is scaled by {scales[first]:g} and {other} by {scales[other]:g}; llama.cpp has one alpha "
        "for all (alpha_pattern, or rank_pattern under rsLoRA)."
    )
    raise ModelError(place, reason, _MERGE)


def check_tied(modules: list[str], geometry: Geometry, place: str) -> None:
    """Refuse an adapter on a matrix that is embedding and head.

    Raises:
        ModelError: there is one.
    """
    # llama.cpp finds adapters by tensor name, and a tied head has that of the embedding, of another shape
    shared = [module for module in modules if ".layers." not in module]
    if shared and geometry.tied_embeddings:
        reason = "the base ties embedding and head, and llama.cpp cannot adapt one of them alone."
        raise ModelError(f"{place}: {shared[0]}", reason, _MERGE)
