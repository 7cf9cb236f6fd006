"""RMSNorm with a frozen weight.

Source: transformers 5.23 modeling_phi3.py, Phi3RMSNorm: scaled in float32, weighted in the input's dtype.
"""

from __future__ import annotations

import torch

from .wide import wide_dtype


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps).

    Shape: x (tokens, hidden_size), weight (hidden_size,); returns one like x.
    """
    return _normed(x, eps)[0].to(x.dtype).mul_(weight)


def backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The gradient of x.

    With n = x s, s = 1 / sqrt(mean(x^2) + eps) and g = weight * grad it is s (g - n mean(g n)).

    Shape: grad and x (tokens, hidden_size), weight (hidden_size,); returns one like x.
    """
    normed, scale = _normed(x, eps)
    g = grad.mul(weight).to(normed.dtype)
    along = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-x.shape[-1])
    return normed.mul_(along).add_(g).mul_(scale).to(x.dtype)


def _normed(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """n and s, wide. Shape: x (tokens, hidden_size); returns one like x, (tokens, 1)."""
    wide = x.to(wide_dtype(x))
    squares: torch.Tensor = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
    scale = squares.div_(wide.shape[-1]).add_(eps).rsqrt_()
    return (wide.mul(scale) if wide is x else wide.mul_(scale)), scale
