"""RMSNorm with a frozen weight.

Source: transformers 5.23 modeling_phi3.py, Phi3RMSNorm: scaled in float32, weighted in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..case import NORM_ELEMENTS
from .backend import block_of, launch, row_stride, takes_triton, warps_of
from .wide import wide_dtype

if TYPE_CHECKING:
    import triton.language as tl


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps).

    Shape: x (tokens, hidden_size), weight (hidden_size,); returns one like x.
    """
    if takes_triton(x.device, x.dtype, weight.dtype):
        out, block = torch.empty(x.shape, dtype=x.dtype, device=x.device), block_of(x.shape[1])
        sizes = row_stride(x), x.shape[1], eps
        launch(_forward_kernel, (len(x),), x, weight, out, *sizes, BLOCK=block, num_warps=warps_of(block))
        return out
    return _by_rows(lambda part: _normed(part, eps)[0].to(x.dtype).mul_(weight), x)


def backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The gradient of x.

    With n = x s, s = 1 / sqrt(mean(x^2) + eps) and g = weight * grad it is s (g - n mean(g n)).

    Shape: grad and x (tokens, hidden_size), weight (hidden_size,); returns one like x.
    """
    if takes_triton(x.device, x.dtype, grad.dtype, weight.dtype):
        out, block = torch.empty(x.shape, dtype=x.dtype, device=x.device), block_of(x.shape[1])
        tensors, sizes = (grad, x, weight, out), (row_stride(grad), row_stride(x), x.shape[1], eps)
        launch(_backward_kernel, (len(x),), *tensors, *sizes, BLOCK=block, num_warps=warps_of(block))
        return out
    return _by_rows(lambda grads, part: _backward(grads, part, weight, eps), grad, x)


def _backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed, scale = _normed(x, eps)
    g = grad.mul(weight).to(normed.dtype)
    along = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-x.shape[-1])
    return normed.mul_(along).add_(g).mul_(scale).to(x.dtype)


def _by_rows(work: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """What `work` makes of all rows, of so many at once that its temporaries stay small."""
    step = max(1, NORM_ELEMENTS // rows[0].shape[1])
    if len(rows[0]) <= step:
        return work(*rows)
    out = torch.empty(rows[0].shape, dtype=rows[0].dtype, device=rows[0].device)
    for at in range(0, len(out), step):
        out[at : at + step] = work(*(each[at : at + step] for each in rows))
    return out


def _normed(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """n and s, wide. Shape: x (tokens, hidden_size); returns one like x, (tokens, 1)."""
    wide = x.to(wide_dtype(x))
    squares: torch.Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
    scale = squares.div_(wide.shape[-1]).add_(eps).rsqrt_()
    return (wide.mul(scale) if wide is x else wide.mul_(scale)), scale


# A program has a row, which fits into its registers: 8192 columns are 16 a thread


def _forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    num_columns: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / num_columns + eps)
    normed = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * num_columns + column, (normed * w).to(x.dtype.element_ty), mask=inside)


def _backward_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    num_columns: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / num_columns + eps)
    normed = wide * scale
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32) * w
    g = g.to(x.dtype.element_ty).to(tl.float32)
    along = tl.sum(g * normed, axis=0) / -num_columns
    found = (normed * along + g) * scale
    tl.store(out + row * num_columns + column, found.to(x.dtype.element_ty), mask=inside)
