"""LoftQ: A/B pairs that begin with the best approximation of what quantization took off the weights.

Owns that start, from the base's own safetensors read slice by slice. The base stays as it is, so that what is
saved is a plain adapter of the stock NF4 base; the paper's further rounds, which would quantize it anew, are
left out. Refuses weights that are not finite.

Source: LoftQ, arXiv:2310.08659, Algorithm 1 with T = 1; PEFT 0.21 utils/loftq_utils.py,
replace_lora_weights_loftq, which leaves alpha / rank out of account.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from .errors import ModelError
from .model import Base, is_packed
from .phi3 import Geometry
from .recipe import Adapter
from .split_lora import blocks
from .weights import tensor_files

OVERSAMPLING: Final = 16
"""Directions a sketch has beside twice the rank, and the rounds that turn it to the largest ones.

What quantization lost is noise, whose singular values fall slowly: of the squared error that the best
approximation of rank 16 takes off 1536 x 576 weights, rank + 8 directions and 2 rounds take 0.88, these 0.99.
"""
ROUNDS: Final = 8


def start(model: Any, settings: Adapter, base: Base) -> None:
    """Set A and B of every pair so that scale * B @ A is what its rows of W - dequantize(NF4(W)) are most.

    Raises:
        ModelError: the checkpoint has no such weight, or one that is not finite.
    """
    files = tensor_files(base.checkpoint.folder)
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and is_packed(layer.base_layer.weight):  # embedding and head lost nothing
            rows = _rows(name.rsplit(".", 1)[-1], settings, base.checkpoint.geometry)
            _start_linear(layer, rows, *_find(f"{name}.weight", files, base.checkpoint.folder))


def _rows(linear: str, settings: Adapter, geometry: Geometry) -> Iterator[slice]:
    """Output rows of each pair of a linear."""
    whole = slice(0, geometry.linear_shape(linear)[0])
    for owner, part in settings.pairs:
        if owner == linear:
            yield whole if part == linear else slice(*geometry.slices(linear)[part])


def _find(name: str, files: dict[str, Path], folder: Path) -> tuple[str, Path]:
    """The tensor's name in its file; a checkpoint of the model without its head leaves `model.` out."""
    for key in (name, name.removeprefix("model.")):
        if key in files:
            return key, files[key]
    raise ModelError(str(folder), f"has no tensor {name}.", "Set adapter.method to lora.")


@torch.no_grad()
def _start_linear(layer: Any, rows: Iterator[slice], key: str, file: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from safetensors import safe_open

    packed = layer.base_layer.weight
    kept = dequantize_4bit(packed.data, packed.quant_state)
    pairs = zip(rows, blocks(layer.lora_A["default"]), blocks(layer.lora_B["default"]), strict=True)
    with safe_open(file, framework="pt") as tensors:
        weight = tensors.get_slice(key)
        for part, a, b in pairs:
            lost = weight[part].to(device=kept.device, dtype=torch.float32).sub_(kept[part])
            if not lost.isfinite().all():
                remedy = "Download the checkpoint again."
                raise ModelError(f"{file}: {key}", "holds NaN or infinity.", remedy)
            fill(a, b, lost, layer.scaling["default"])


@torch.no_grad()
def fill(a: torch.Tensor, b: torch.Tensor, lost: torch.Tensor, scale: float) -> None:
    """Set A and B so that scale * B @ A approximates `lost`, each with the root of the singular values.

    A direction in which nothing was lost keeps its row of A and gets a zero column of B, as any new pair has:
    with zeros in both it could never learn.

    Shape: a (rank, in), b (out, rank), lost (out, in) float32.
    """
    u, values, vt = largest_directions(lost, len(a))
    there = values > values[0] * max(lost.shape) * torch.finfo(lost.dtype).eps
    roots = torch.where(there, values / scale, 0).sqrt()
    a.copy_(torch.where(there[:, None], roots[:, None] * vt, a))
    b.copy_(u * roots)


def largest_directions(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `rank` triples of the singular value decomposition; sketched where that is much less work.

    Shape: matrix (out, in) -> (out, rank), (rank,), (rank, in).
    """
    width = 2 * rank + OVERSAMPLING
    if 2 * width >= min(matrix.shape):
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, values, v = torch.svd_lowrank(matrix, q=width, niter=ROUNDS)
        vt = v.T
    return u[:, :rank], values[:rank], vt[:rank]
