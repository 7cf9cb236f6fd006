"""Cross-entropy of a chunk: the reference against autograd in float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from kernel_lab import SAME, TOLERANCE, devices, draw, dtypes, precisions, triton_on, twin_of
from torch.nn import functional

from qlora_phi3 import kernels
from qlora_phi3.kernels.cross_entropy import COLUMNS, nll_and_error_

SHAPES = [(1, 1), (1, 5), (3, 320), (4, COLUMNS), (2, COLUMNS + 1), (3, 2 * COLUMNS + 77)]
shapes = pytest.mark.parametrize(("tokens", "vocabulary"), SHAPES)


def case(tokens: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Logits, and wanted ones with the first and the last of the vocabulary among them."""
    logits = draw(tokens, vocabulary, dtype=torch.float64).mul(3).to(device, dtype)
    wanted = torch.arange(tokens) * 997 % vocabulary
    wanted[-1] = vocabulary - 1
    return logits, wanted.unsqueeze(1).to(device)


@precisions
@shapes
def test_reference_is_the_formula_and_its_gradient(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, wanted = case(tokens, vocabulary, dtype)
    twin = twin_of(logits)
    loss = functional.cross_entropy(twin, wanted.squeeze(1), reduction="sum")
    loss.backward()
    nll, error = nll_and_error_(logits, wanted)
    assert error.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(nll.double(), loss.detach(), **TOLERANCE[dtype])
    torch.testing.assert_close(error.double(), twin.grad, **TOLERANCE[dtype])


@devices
@dtypes
@shapes
def test_kernel_is_the_reference(tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
    logits, wanted = case(tokens, vocabulary, dtype, device)
    given = logits.clone()
    with kernels.using("torch"):
        nll, error = nll_and_error_(given, wanted)
    with triton_on(device):
        found, written = nll_and_error_(logits, wanted)
    assert found.dtype == nll.dtype and written.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(found, nll, **SAME[dtype])
    torch.testing.assert_close(written, error, **SAME[dtype])


@devices
def test_rows_of_a_wider_tensor_far_and_masked_logits(device: str) -> None:
    """Logits of -inf, as a mask leaves them, of 1e4, and all alike."""
    wide = torch.zeros(3, 12, device=device)
    wide[0, 2:5], wide[1, 7] = float("-inf"), 1e4
    wanted = torch.tensor([[0], [7], [3]], device=device)
    given = wide.clone()
    with kernels.using("torch"):
        nll, error = nll_and_error_(given[:, :9], wanted)
    with triton_on(device):
        found, written = nll_and_error_(wide[:, :9], wanted)
    torch.testing.assert_close(found, nll)
    torch.testing.assert_close(written, error)
    assert torch.equal(wide[:, 9:], given[:, 9:]) and torch.isfinite(written).all()


@devices
def test_no_rows(device: str) -> None:
    with triton_on(device):
        nll, _ = nll_and_error_(
            torch.zeros(0, 8, device=device), torch.zeros(0, 1, dtype=torch.int64, device=device)
        )
    assert nll.item() == 0
