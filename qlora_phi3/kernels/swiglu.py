"""SwiGLU on gate_up_proj's output: the gate in the first half of its columns, up in the second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from .backend import block_of, launch, row_stride, takes_triton, warps_of

if TYPE_CHECKING:
    import triton.language as tl

COLUMNS: Final = 1024
"""Columns of one token that a program computes, at most."""


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up * silu(gate).

    Shape: gate and up (tokens, columns), strided as they come; returns a contiguous one.
    """
    if takes_triton(gate.device, gate.dtype, up.dtype):
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        programs, constants = _split(gate.shape)
        sizes = row_stride(gate), row_stride(up), gate.shape[1]
        launch(_forward_kernel, programs, gate, up, out, *sizes, **constants)
        return out
    return functional.silu(gate).mul_(up)


def backward_(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, product: bool
) -> torch.Tensor | None:
    """Write the gradients of gate and up over them; with `product`, return what the forward did.

    Shape: all (tokens, columns); gate and up strided as they come.
    """
    if takes_triton(gate.device, gate.dtype, up.dtype, grad.dtype):
        made = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if product else None
        programs, constants = _split(gate.shape)
        tensors = grad, gate, up, grad if made is None else made
        sizes = row_stride(grad), row_stride(gate), row_stride(up), gate.shape[1]
        launch(_backward_kernel, programs, *tensors, *sizes, PRODUCT=product, **constants)
        return made
    activated = functional.silu(gate)
    found = activated.mul(up) if product else None
    torch.ops.aten.silu_backward.grad_input(up.mul_(grad), gate, grad_input=gate)
    torch.mul(grad, activated, out=up)
    return found


def _split(shape: torch.Size) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs, and what they are compiled with."""
    block = min(COLUMNS, block_of(shape[1]))
    return (shape[0], -(-shape[1] // block)), {"BLOCK": block, "num_warps": warps_of(block)}


def _forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    activated = (g / (1 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + row * num_columns + column, (activated * u).to(gate.dtype.element_ty), mask=inside)


def _backward_kernel(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    made: tl.tensor,
    grad_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    num_columns: tl.tensor,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    d = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    activated = (g / (1 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    if PRODUCT:
        tl.store(made + row * num_columns + column, (activated * u).to(gate.dtype.element_ty), mask=inside)
    of_activated = (d * u).to(gate.dtype.element_ty).to(tl.float32)
    of_gate = of_activated * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(gate + row * gate_stride + column, of_gate.to(gate.dtype.element_ty), mask=inside)
    tl.store(up + row * up_stride + column, (d * activated).to(gate.dtype.element_ty), mask=inside)
