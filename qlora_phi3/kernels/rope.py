"""Rotary positions, in place on heads that lie in qkv_proj's output.

Source: transformers 5.23 modeling_phi3.py, apply_rotary_pos_emb. Its cosines and sines have two equal halves,
of which the first is used. The first `rotary` of a head's dimensions turn, the others pass (partial rotary).
"""

from __future__ import annotations

import torch


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> None:
    """Turn every head by its token's position; `back`: a gradient, by the transposed.

    LongRoPE's factor is in cosines and sines alike, so the transposed is not the inverse.

    Shape: heads (tokens, n, head_dim), strided as it comes, written over; cos and sin (tokens, rotary).
    """
    half = cos.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    sign = -1 if back else 1
    turned = first.mul(c).addcmul_(second, s, value=-sign)
    second.mul_(c).addcmul_(first, s, value=sign)
    first.copy_(turned)
