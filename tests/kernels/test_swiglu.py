"""SwiGLU: the reference against autograd in float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from kernel_lab import SAME, TOLERANCE, devices, draw, dtypes, precisions, triton_on, twin_of
from torch.nn import functional

from qlora_phi3 import kernels
from qlora_phi3.kernels import swiglu

SHAPES = [(1, 1), (1, 64), (5, 130), (3, 1024), (2, 2500)]
shapes = pytest.mark.parametrize(("tokens", "columns"), SHAPES)


def case(tokens: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """gate_up_proj's output with a spread that saturates some gates, and a gradient."""
    wide = draw(tokens, 2 * columns, dtype=torch.float64).mul(4)
    return wide.to(device, dtype), draw(tokens, columns, dtype=dtype, device=device, seed=6)


@precisions
@shapes
def test_reference_is_the_formula_and_its_gradient(tokens: int, columns: int, dtype: torch.dtype) -> None:
    gate_up, grad = case(tokens, columns, dtype)
    twin = twin_of(gate_up)
    gate, up = twin.chunk(2, dim=1)
    wanted = functional.silu(gate) * up
    wanted.backward(grad.double())
    assert twin.grad is not None
    found = swiglu.forward(*gate_up.chunk(2, dim=1))
    product = swiglu.backward_(grad, *gate_up.chunk(2, dim=1), product=True)
    torch.testing.assert_close(found.double(), wanted.detach(), **TOLERANCE[dtype])
    torch.testing.assert_close(gate_up.double(), twin.grad, **TOLERANCE[dtype])
    assert product is not None and torch.equal(product, found)


@devices
@dtypes
@pytest.mark.parametrize("product", [False, True])
@shapes
def test_kernel_is_the_reference(tokens, columns, product, dtype, device) -> None:
    found = []
    for how in (kernels.using("torch"), triton_on(device)):
        gate_up, grad = case(tokens, columns, dtype, device)
        given = grad.clone()
        with how:
            made = swiglu.forward(*gate_up.chunk(2, dim=1))
            again = swiglu.backward_(grad, *gate_up.chunk(2, dim=1), product=product)
        assert made.is_contiguous() and torch.equal(grad, given)
        assert (again is None) == (not product)
        found.append((made, gate_up) if again is None else (made, gate_up, again))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, **SAME[dtype])


@devices
@dtypes
def test_gates_far_out_stay_finite(dtype: torch.dtype, device: str) -> None:
    """exp(1000) is inf, of which silu makes 0 and its gradient 0."""
    gate = torch.tensor([[-1000.0, -100.0, 0.0, 100.0, 1000.0]], dtype=dtype, device=device)
    up, grad = torch.ones_like(gate), torch.ones_like(gate)
    with triton_on(device):
        found = swiglu.forward(gate, up)
        swiglu.backward_(grad, gate, up, product=False)
    assert found.tolist() == [[0, 0, 0, 100, 1000]]
    assert gate.tolist() == [[0, 0, 0.5, 1, 1]] and up.tolist() == [[0, 0, 0, 100, 1000]]


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    """131073 tokens of Phi-3-mini's 16384 columns: 4 GiB, whose last rows an int32 would miss."""
    gate_up = torch.empty(131073, 16384, dtype=torch.bfloat16, device="cuda")
    gate_up[-2:] = draw(2, 16384, dtype=torch.bfloat16, device="cuda")
    last = gate_up[-2:].clone()
    with kernels.using("torch"):
        wanted = swiglu.forward(*last.chunk(2, dim=1))
    with triton_on("cuda"):
        found = swiglu.forward(*gate_up.chunk(2, dim=1))[-2:]
    torch.testing.assert_close(found, wanted, **SAME[torch.bfloat16])
