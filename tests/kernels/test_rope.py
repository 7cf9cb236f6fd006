"""Rotary positions: the reference against autograd in float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from kernel_lab import SAME, TOLERANCE, devices, draw, dtypes, precisions, triton_on, twin_of

from qlora_phi3 import kernels
from qlora_phi3.kernels import rope

# tokens, turning heads, their dimensions, how many of them turn
SHAPES = [(1, 1, 2, 2), (1, 3, 16, 16), (5, 4, 96, 96), (7, 33, 24, 18), (3, 40, 128, 96)]
shapes = pytest.mark.parametrize(("tokens", "num", "width", "rotary"), SHAPES)


def formula(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers writes it."""
    rotary = cos.shape[-1]
    turning, rest = heads[..., :rotary], heads[..., rotary:]
    first, second = turning.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    return torch.cat((turning * cos[:, None] + half * sin[:, None], rest), dim=-1)


def case(tokens, num, width, rotary, dtype, device="cpu"):
    """Heads as a view of qkv_proj's output, and LongRoPE's cosines and sines, which have a factor."""
    qkv = draw(tokens, (num + 3) * width, dtype=dtype, device=device)
    angles = draw(tokens, rotary // 2, dtype=torch.float64, seed=4).repeat(1, 2)
    cos, sin = ((1.19 * part(angles)).to(device, dtype) for part in (torch.cos, torch.sin))
    return qkv, qkv[:, : num * width].view(tokens, num, width), cos, sin


@precisions
@shapes
def test_reference_is_the_formula_and_its_gradient(tokens, num, width, rotary, dtype) -> None:
    qkv, heads, cos, sin = case(tokens, num, width, rotary, dtype)
    others = qkv[:, num * width :].clone()
    grad = draw(tokens, num, width, dtype=dtype, seed=5)
    twin = twin_of(heads)
    wanted = formula(twin, cos.double(), sin.double())
    wanted.backward(grad.double())
    rope.rotate_(heads, cos, sin)
    rope.rotate_(grad, cos, sin, back=True)
    torch.testing.assert_close(heads.double(), wanted.detach(), **TOLERANCE[dtype])
    torch.testing.assert_close(grad.double(), twin.grad, **TOLERANCE[dtype])
    assert torch.equal(qkv[:, num * width :], others)


@devices
@dtypes
@pytest.mark.parametrize("back", [False, True])
@shapes
def test_kernel_is_the_reference(tokens, num, width, rotary, back, dtype, device) -> None:
    """In all of qkv, so that nothing beside the turning dimensions is written."""
    found = []
    for how in (kernels.using("torch"), triton_on(device)):
        qkv, heads, cos, sin = case(tokens, num, width, rotary, dtype, device)
        with how:
            rope.rotate_(heads, cos, sin, back=back)
        found.append(qkv)
    torch.testing.assert_close(found[1], found[0], **SAME[dtype])
    rest = slice(rotary, None)
    views = [each[:, : num * width].view(tokens, num, width)[..., rest] for each in found]
    assert torch.equal(*views) and torch.equal(found[0][:, num * width :], found[1][:, num * width :])


@devices
def test_one_row_of_cosines_for_all(device: str) -> None:
    """Expanded ones have a stride of 0."""
    found = []
    for how in (kernels.using("torch"), triton_on(device)):
        _, heads, cos, sin = case(4, 2, 8, 8, torch.float32, device)
        with how:
            rope.rotate_(heads, cos[:1].expand(4, 8), sin[:1].expand(4, 8))
        found.append(heads)
    torch.testing.assert_close(found[1], found[0])
