"""Cross-entropy of a chunk of logits, and what it has for a gradient, in the same memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from .backend import block_of, launch, row_stride, takes_triton, warps_of

if TYPE_CHECKING:
    import triton.language as tl

COLUMNS: Final = 4096
"""Logits of one token that a program holds at once."""


def nll_and_error_(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log softmax[wanted], and softmax - onehot, written over the logits.

    Shape: logits (tokens, vocabulary), wanted (tokens, 1) int64; returns a scalar and one like logits.
    """
    if takes_triton(logits.device, logits.dtype):
        each = torch.empty(len(logits), dtype=logits.dtype, device=logits.device)
        block = min(COLUMNS, block_of(logits.shape[1]))
        sizes = row_stride(logits), wanted.stride(0), logits.shape[1]
        constants = {"BLOCK": block, "num_warps": warps_of(block)}
        launch(_kernel, (len(logits),), logits, wanted, each, *sizes, **constants)
        return each.sum(), logits
    highest, chosen = logits.amax(dim=1, keepdim=True), logits.gather(1, wanted)
    total = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
    nll = (total.log() + highest - chosen).sum()
    return nll, logits.div_(total).scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=logits.dtype))


def _kernel(
    logits: tl.tensor,
    wanted: tl.tensor,
    each: tl.tensor,
    row_stride: tl.tensor,
    wanted_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(wanted + row * wanted_stride)
    highest, total, chosen = -3.0e38, 0.0, 0.0  # no -inf, of which a difference is NaN
    for at in range(0, num_columns, BLOCK):
        column = at + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < num_columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        chosen += tl.sum(tl.where(column == target, x, 0.0), axis=0)
        highest = higher
    tl.store(each + row, (tl.log(total) + highest - chosen).to(each.dtype.element_ty))
    for at in range(0, num_columns, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
        error = tl.exp(x - highest) / total - tl.where(column == target, 1.0, 0.0)
        tl.store(logits + column, error.to(each.dtype.element_ty), mask=inside)
