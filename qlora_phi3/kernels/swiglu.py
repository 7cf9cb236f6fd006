"""SwiGLU on gate_up_proj's output: the gate in the first half of its columns, up in the second."""

from __future__ import annotations

import torch
from torch.nn import functional


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """up * silu(gate).

    Shape: gate and up (tokens, columns), strided as they come; returns a contiguous one.
    """
    return functional.silu(gate).mul_(up)


def backward_(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, product: bool
) -> torch.Tensor | None:
    """Write the gradients of gate and up over them; with `product`, return what the forward did.

    Shape: all (tokens, columns); gate and up strided as they come.
    """
    activated = functional.silu(gate)
    found = activated.mul(up) if product else None
    torch.ops.aten.silu_backward.grad_input(up.mul_(grad), gate, grad_input=gate)
    torch.mul(grad, activated, out=up)
    return found
