"""The chunked loss against torch's cross-entropy, values and gradients, at odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qlora_phi3.case import LOGIT_TOKENS
from qlora_phi3.engine.loss import IGNORE, supervised_nll


def case(rows: int, length: int, hidden: int, vocabulary: int, dtype: torch.dtype, share: float = 0.5):
    generator = torch.Generator().manual_seed(rows * length + hidden)
    x = torch.randn(rows, length, hidden, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) > share] = IGNORE
    return x.requires_grad_(), labels, head


def reference(x: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    logits = x.double() @ head.double().T
    flat = logits[:, :-1].reshape(-1, len(head)), labels[:, 1:].reshape(-1)
    return functional.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize(
    ("rows", "length", "hidden", "vocabulary"),
    [(1, 2, 3, 5), (3, 17, 8, 31), (2, 700, 16, 101), (1, LOGIT_TOKENS + 2, 4, 7)],
)
def test_value_and_gradient_equal_cross_entropy(rows, length, hidden, vocabulary, dtype, tolerance) -> None:
    x, labels, head = case(rows, length, hidden, vocabulary, dtype, share=1.0 if length < 3 else 0.6)
    twin = x.detach().double().requires_grad_()
    ours, theirs = supervised_nll(x, labels, head) / 3, reference(twin, labels, head) / 3
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    scale = twin.grad.abs().max()
    torch.testing.assert_close(x.grad.double() / scale, twin.grad / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("logit_tokens", [1, 3, 100])
def test_gradcheck_across_chunks(logit_tokens: int) -> None:
    x, labels, head = case(2, 9, 5, 11, torch.float64)
    assert torch.autograd.gradcheck(lambda t: supervised_nll(t, labels, head, logit_tokens), (x,))


def test_nothing_supervised_is_zero_with_zero_gradient() -> None:
    x, labels, head = case(2, 5, 4, 7, torch.float32)
    loss = supervised_nll(x, torch.full_like(labels, IGNORE), head)
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert not x.grad.any()


def test_large_logits_do_not_overflow() -> None:
    x, labels, head = case(1, 6, 4, 9, torch.float32)
    loss = supervised_nll(x * 1e4, labels, head * 1e2)
    assert loss.isfinite()


def test_saves_only_the_gradient_of_the_supervised_rows() -> None:
    x, labels, head = case(2, 64, 8, 501, torch.float32, share=0.25)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        supervised_nll(x, labels, head)
    supervised = int((labels[:, 1:] != IGNORE).sum())
    assert max(saved) < supervised * 501  # no logits
    assert supervised * 8 in saved


def test_a_trainable_head_is_refused() -> None:
    x, labels, head = case(1, 4, 4, 7, torch.float32)
    with pytest.raises(AssertionError, match="frozen"):
        supervised_nll(x, labels, head.requires_grad_())
