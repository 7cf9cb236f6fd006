"""Bytes of weights, adapters, gradients and optimizer states: exact, by arithmetic alone. No torch."""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import Final

from . import phi3
from .phi3 import Geometry
from .recipe import Recipe

ADAPTER_BYTES: Final = 4
"""Of an element of adapters and their gradients: float32, always.

The trainer's autocast computes with them in the compute dtype; outside of it, as while evaluating, PEFT casts
what goes in and out of them to float32.
"""

MERGE_CHUNK: Final = 2**23
"""Elements of a matrix that are in float32 at once while an adapter is added to it: 32 MiB."""

_DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


def compute_dtype_bytes(recipe: Recipe) -> int:
    """Bytes of an element of activations, norms, embeddings and unquantized linears."""
    return _DTYPE_BYTES[recipe.model.compute_dtype]


def nf4_bytes(num_weights: int, double_quant: bool) -> int:
    """Bytes of one NF4 matrix: 4 bits a weight, a scale per 64 of them, code books.

    Source: bitsandbytes 0.50 functional.py, quantize_4bit. Scales are float32, or with double quantization
    uint8 with a float32 per 256 of them, their float32 mean and a code book of 256 float32 of its own.
    """
    num_scales = ceil(num_weights / 64)
    scales = num_scales + 4 * ceil(num_scales / 256) + 4 + 4 * 256 if double_quant else 4 * num_scales
    return ceil(num_weights / 2) + scales + 4 * 16


def linear_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of all decoder linears, as NF4 or in the compute dtype."""
    if recipe.model.quantization == "none":
        return geometry.num_linear_parameters * compute_dtype_bytes(recipe)
    sizes = [rows * columns for rows, columns in map(geometry.linear_shape, phi3.LINEARS)]
    return geometry.num_layers * sum(nf4_bytes(size, recipe.model.double_quant) for size in sizes)


def dequantized_bytes(recipe: Recipe, geometry: Geometry, linear: str) -> int:
    """Scratch of one NF4 product: the whole weight in the compute dtype, and its scales as float32.

    CUDA has kernels without it for few tokens; they are not counted on.
    Source: bitsandbytes 0.50 backends/default/ops.py, _gemm_4bit_default_impl.
    """
    if recipe.model.quantization == "none":
        return 0
    rows, columns = geometry.linear_shape(linear)
    scales = 4 * ceil(rows * columns / 64) if recipe.model.double_quant else 0
    return rows * columns * compute_dtype_bytes(recipe) + scales


def quantizing_bytes(recipe: Recipe, geometry: Geometry, linear: str, device: str) -> int:
    """What quantizing one linear takes beside its result: the weight before, scales that are quantized too.

    A CPU has no kernel for it: two float32 copies, of float32 itself one, an int32 and a uint8 index and half
    a byte besides.
    Source: bitsandbytes 0.50 backends/default/ops.py, quantize_4bit.
    """
    rows, columns = geometry.linear_shape(linear)
    if recipe.model.quantization == "none":
        return 0
    copies = 8 if compute_dtype_bytes(recipe) == 2 else 4
    intermediates = rows * columns * (2 * copies + 11) // 2 if device == "cpu" else 0
    return dequantized_bytes(recipe, geometry, linear) + intermediates


def saved_adapter_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of the adapter's file: a fused linear's own pairs as one, whose A lie one above the other."""
    ranks = {name: recipe.adapter.rank for name in recipe.adapter.embeddings}
    elements = geometry.lora_parameters(tuple(ranks), recipe.adapter.rank)
    for linear in recipe.adapter.trained:
        parts = sum(owner == linear for owner, _ in recipe.adapter.pairs)
        elements += geometry.lora_parameters((linear,), recipe.adapter.rank * parts)
    return ADAPTER_BYTES * elements


def merging_bytes(recipe: Recipe, geometry: Geometry, name: str, device: str) -> int:
    """What a matrix of a merged checkpoint in bf16 takes of a computer's memory at its fullest moment.

    `name`: a linear, the embedding or the head, read from a checkpoint in bf16. What was trained in NF4 is
    cast, and a linear quantized and back, on the device.
    Source: export/merge.py, Merger.tensor.
    """
    rows, columns = geometry.pair_shape(name)
    num, quantized = rows * columns, recipe.model.quantization == "nf4"
    width = compute_dtype_bytes(recipe) if quantized else 2
    adapted = name in recipe.adapter.trained or name in recipe.adapter.embeddings
    each = 8 if adapted and width == 2 else 5  # the part and the sum in float32; what isfinite makes
    chunk = each * min(num, max(MERGE_CHUNK // columns, 1) * columns)
    merging = width * num + 2 * num + chunk
    if not quantized or name not in phi3.LINEARS:
        return merging
    read = 2 * num if width != 2 else 0  # else it is the weight itself
    if device == "cpu":
        packed = nf4_bytes(num, recipe.model.double_quant)
        return max(read + quantizing_bytes(recipe, geometry, name, device) + packed, merging)
    return max(read + 2 * width * num, merging)


def target_linears(recipe: Recipe) -> tuple[str, ...]:
    """The linears that get adapters, in the order of the forward pass."""
    return tuple(recipe.adapter.trained)


def adapter_sizes(recipe: Recipe, geometry: Geometry) -> Counter[int]:
    """How many A (rank x in), B (out x rank) and lengths of DoRA (out) have so many elements."""
    settings, found = recipe.adapter, Counter[int]()
    for part in settings.parts:
        for features in geometry.pair_shape(part):
            found[settings.rank * features] += geometry.num_modules(part)
    if settings.method == "dora":
        for linear in settings.trained:
            found[geometry.linear_shape(linear)[0]] += geometry.num_layers
    return found


def adapter_elements(recipe: Recipe, geometry: Geometry) -> int:
    """Elements of all that is trained."""
    return sum(size * times for size, times in adapter_sizes(recipe, geometry).items())


def optimizer_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of both Adam states, paged ones counted as on the device.

    Source: bitsandbytes 0.50 optim/optimizer.py, Optimizer2State.init_state: 8-bit states have a float32
    scale per 256 elements and share two code books of 256 float32; tensors below 4096 elements stay float32.
    torch's AdamW keeps states in the parameter's dtype (its step counters live on the host).
    """
    sizes = adapter_sizes(recipe, geometry)
    if recipe.train.optimizer in ("adamw_torch", "paged_adamw_32bit"):
        element = ADAPTER_BYTES if recipe.train.optimizer == "adamw_torch" else 4
        return 2 * element * adapter_elements(recipe, geometry)
    each = {n: 4 * n if n < 4096 else n + 4 * ceil(n / 256) for n in sizes}
    states = 2 * sum(each[n] * times for n, times in sizes.items())
    return states + (2 * 4 * 256 if any(n >= 4096 for n in sizes) else 0)
