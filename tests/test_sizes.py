"""sizes.py against the known numbers of Phi-3 and what bitsandbytes, PEFT and torch allocate, on CPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from memory_lab import adapt, allocated_bytes, optimizer_of, quantize, recipe, step, tiny, trained

from qlora_phi3 import memory, phi3, sizes
from qlora_phi3.tracked import model_tensors, optimizer_tensors

MINI = phi3.VARIANTS["microsoft/Phi-3-mini-4k-instruct"]
GIB, MIB = 1024**3, 1024**2

SHAPES = {
    "untied": dict(hidden_size=200, intermediate_size=300, num_attention_heads=4),
    "tied": dict(hidden_size=192, intermediate_size=320, num_attention_heads=6, tie_word_embeddings=True),
    "gqa": dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=2),
}


def part(phase: memory.Phase, name: str) -> int:
    return next(part.num_bytes for part in phase.parts if part.name == name)


def loaded(settings: Any, geometry: Any) -> memory.Phase:
    return memory.predict(settings, geometry, micro_batch=1).phases[0]


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind tensors, shared ones once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(("double_quant", "gib", "bits"), [(True, 1.741, 4.127), (False, 1.898, 4.5)])
def test_nf4_linears_of_phi_3_mini(double_quant: bool, gib: float, bits: float) -> None:
    size = sizes.linear_bytes(recipe(model__double_quant=double_quant), MINI)
    assert size / GIB == pytest.approx(gib, abs=5e-4)
    assert 8 * size / MINI.num_linear_parameters == pytest.approx(bits, abs=1e-3)


def test_rank_16_on_all_linears_of_phi_3_mini() -> None:
    assert sizes.adapter_elements(recipe(), MINI) == 25_165_824


@pytest.mark.parametrize(
    ("optimizer", "mib"),
    [("adamw_torch", 192), ("paged_adamw_32bit", 192), ("paged_adamw_8bit", 48.75), ("adamw_8bit", 48.75)],
)
def test_adam_states_of_phi_3_mini(optimizer: str, mib: float) -> None:
    size = sizes.optimizer_bytes(recipe(train__optimizer=optimizer), MINI)
    assert size / MIB == pytest.approx(mib, abs=0.01)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_byte_exact(shape: str, double_quant: bool) -> None:
    model, geometry = tiny(**SHAPES[shape])
    quantize(model, double_quant)
    load = loaded(recipe(model__double_quant=double_quant), geometry)
    linears = [m for m in model.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    packed = storage_bytes(t for m in linears for t in model_tensors(m))
    rest = storage_bytes(p for p in model.parameters() if not hasattr(p, "quant_state"))
    assert packed == part(load, "linears")
    assert rest == sum(p.num_bytes for p in load.parts if p.name in ("embedding", "head", "norms"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(256, 128), (200, 64), (1000, 2112)])
def test_quantizing_on_a_cpu(shape: tuple[int, int], double_quant: bool, dtype: str) -> None:
    """bitsandbytes makes its copies inside one operation: torch's own profiler counts what it allocates."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, dtype=getattr(torch, dtype))
    options = {"blocksize": 64, "compress_statistics": double_quant, "quant_type": "nf4"}
    made = allocated_bytes(lambda: quantize_4bit(weight, **options))
    rows, columns = shape
    geometry = replace(MINI, hidden_size=rows, intermediate_size=columns)
    assert geometry.linear_shape("down_proj") == shape
    settings = recipe(model__double_quant=double_quant, model__compute_dtype=dtype)
    predicted = sizes.quantizing_bytes(settings, geometry, "down_proj", "cpu")
    result = rows * columns // 2 + (0 if double_quant else 4 * rows * columns // 64)
    assert made + weight.nbytes == predicted + result


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_unquantized_weights_are_byte_exact(dtype: str) -> None:
    model, geometry = tiny(dtype=getattr(torch, dtype), **SHAPES["gqa"])
    settings = recipe(model__quantization="none", model__compute_dtype=dtype)
    assert loaded(settings, geometry).peak_bytes == storage_bytes(model.parameters())


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["o_proj"], ["down", "qkv_proj"], ["lm_head"], ["embed_tokens", "qkv_proj", "lm_head"]],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_are_byte_exact(shape: str, targets: Any, split: bool) -> None:
    model, geometry = tiny(**SHAPES[shape])
    quantize(model)
    settings = recipe(adapter__targets=targets, adapter__rank=8, adapter__split_fused=split)
    assert storage_bytes(trained(adapt(model, settings))) == 4 * sizes.adapter_elements(settings, geometry)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
@pytest.mark.parametrize("rank", [1, 8])  # at 1 every tensor is too small for 8-bit states, at 8 some are
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "o", "lm_head"]])
def test_optimizer_states_are_byte_exact(name: str, rank: int, targets: Any) -> None:
    base, geometry = tiny(**SHAPES["untied"], vocab_size=1024)
    settings = recipe(adapter__rank=rank, adapter__targets=targets, train__optimizer=name)
    parameters = trained(adapt(base, settings))
    optimizer = optimizer_of(name, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    step(optimizer)
    assert storage_bytes(optimizer_tensors(optimizer)) == sizes.optimizer_bytes(settings, geometry)
