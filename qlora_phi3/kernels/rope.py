"""Rotary positions, in place on heads that lie in qkv_proj's output.

Source: transformers 5.23 modeling_phi3.py, apply_rotary_pos_emb. Its cosines and sines have two equal halves,
of which the first is used. The first `rotary` of a head's dimensions turn, the others pass (partial rotary).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from .backend import block_of, launch, row_stride, takes_triton

if TYPE_CHECKING:
    import triton.language as tl

HEADS: Final = 16
"""Heads that a program turns by the cosines it has loaded."""


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> None:
    """Turn every head by its token's position; `back`: a gradient, by the transposed.

    LongRoPE's factor is in cosines and sines alike, so the transposed is not the inverse.

    Shape: heads (tokens, n, head_dim), strided as it comes, written over; cos and sin (tokens, rotary).
    """
    half = cos.shape[-1] // 2
    if takes_triton(heads.device, heads.dtype, cos.dtype, sin.dtype):
        assert heads.stride(2) == 1, "a kernel on a head whose dimensions do not lie side by side"
        num_tokens, num_heads, _ = heads.shape
        strides = heads.stride(0), heads.stride(1), row_stride(cos), row_stride(sin)
        constants = {"BACK": back, "HEADS": min(HEADS, block_of(num_heads)), "HALF": block_of(half)}
        programs = num_tokens, -(-num_heads // HEADS)
        launch(_kernel, programs, heads, cos, sin, *strides, num_heads, half, **constants)
        return
    c, s = cos[:, None, :half], sin[:, None, :half]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    sign = -1 if back else 1
    turned = first.mul(c).addcmul_(second, s, value=-sign)
    second.mul_(c).addcmul_(first, s, value=sign)
    first.copy_(turned)


def _kernel(
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    num_heads: tl.tensor,
    half: tl.tensor,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    turns = column < half
    c = tl.load(cos + token * cos_stride + column, mask=turns, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + column, mask=turns, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    inside = (head < num_heads)[:, None] & turns[None, :]
    place = heads + token * token_stride + head[:, None] * head_stride + column[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    of_first = (first * c).to(heads.dtype.element_ty).to(tl.float32) - second * s
    of_second = (second * c).to(heads.dtype.element_ty).to(tl.float32) + first * s
    tl.store(place, of_first.to(heads.dtype.element_ty), mask=inside)
    tl.store(place + half, of_second.to(heads.dtype.element_ty), mask=inside)
