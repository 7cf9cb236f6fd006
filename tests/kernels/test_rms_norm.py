"""RMSNorm: the reference against autograd in float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from kernel_lab import SAME, TOLERANCE, devices, draw, dtypes, precisions, triton_on, twin_of

from qlora_phi3 import kernels
from qlora_phi3.kernels import rms_norm

EPS = 1e-5
SHAPES = [(1, 1), (1, 64), (5, 96), (3, 1000), (7, 3072)]
shapes = pytest.mark.parametrize(("tokens", "hidden"), SHAPES)


def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt()


@precisions
@shapes
def test_reference_is_the_formula_and_its_gradient(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, grad = (draw(tokens, hidden, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = draw(hidden, dtype=dtype, seed=3)
    twin = twin_of(x)
    wanted = formula(twin, weight.double())
    wanted.backward(grad.double())
    assert twin.grad is not None
    found = rms_norm.forward(x, weight, EPS), rms_norm.backward(grad, x, weight, EPS)
    assert found[0].dtype == found[1].dtype == dtype
    scale = max(1.0, float(twin.grad.abs().max()))
    torch.testing.assert_close(found[0].double(), wanted.detach(), **TOLERANCE[dtype])
    torch.testing.assert_close(found[1].double() / scale, twin.grad / scale, **TOLERANCE[dtype])


@devices
@dtypes
@shapes
def test_kernel_is_the_reference(tokens: int, hidden: int, dtype: torch.dtype, device: str) -> None:
    """Rows of x lie apart, as those of a slice do."""
    x, grad = (draw(tokens, 2 * hidden, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    x, grad = x[:, :hidden], grad[:, hidden:]
    weight = draw(hidden, dtype=dtype, device=device, seed=3)
    with kernels.using("torch"):
        wanted = rms_norm.forward(x, weight, EPS), rms_norm.backward(grad, x, weight, EPS)
    with triton_on(device):
        found = rms_norm.forward(x, weight, EPS), rms_norm.backward(grad, x, weight, EPS)
    for one, other in zip(found, wanted, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, **SAME[dtype])


@devices
def test_no_rows(device: str) -> None:
    nothing, weight = torch.zeros(0, 8, device=device), torch.ones(8, device=device)
    with triton_on(device):
        assert rms_norm.forward(nothing, weight, EPS).shape == (0, 8)
        assert rms_norm.backward(nothing, nothing, weight, EPS).shape == (0, 8)


@precisions
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_some_rows_at_once_change_no_bit(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, grad = (draw(9, 40, dtype=dtype, seed=seed)[:, :20] for seed in (1, 2))
    weight = draw(20, dtype=dtype, seed=3)
    wanted = rms_norm.forward(x, weight, EPS), rms_norm.backward(grad, x, weight, EPS)
    monkeypatch.setattr(rms_norm, "NORM_ELEMENTS", 20 * rows + 5)
    found = rms_norm.forward(x, weight, EPS), rms_norm.backward(grad, x, weight, EPS)
    for one, other in zip(found, wanted, strict=True):
        assert one.is_contiguous() and torch.equal(one, other)
