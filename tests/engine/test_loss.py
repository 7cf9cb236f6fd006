"""The chunked loss against torch's cross-entropy, values and gradients, at odd shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qlora_phi3.case import LOGIT_TOKENS
from qlora_phi3.engine.loss import IGNORE, HeadLora, supervised_nll


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
    assert torch.autograd.gradcheck(lambda t: supervised_nll(t, labels, head, None, logit_tokens), (x,))


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


# An adapter on the head


def peft_head(hidden: int, vocabulary: int, dtype: torch.dtype, **settings: Any) -> Any:
    """A frozen head in PEFT's own layer, with an adapter as after training."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(hidden)
    model = nn.ModuleDict({"lm_head": nn.Linear(hidden, vocabulary, bias=False)}).requires_grad_(False)
    config = LoraConfig(target_modules=["lm_head"], **{"r": 3, "lora_alpha": 5, **settings})
    head = inject_adapter_in_model(config, model)["lm_head"].to(dtype)
    nn.init.normal_(head.lora_B["default"].weight)
    return head


def stock_nll(x: torch.Tensor, labels: torch.Tensor, head: Any) -> torch.Tensor:
    """PEFT's forward of all supervised positions and torch's cross-entropy."""
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    return functional.cross_entropy(head(x[:, :-1][chosen]), targets[chosen], reduction="sum")


def our_nll(x: torch.Tensor, labels: torch.Tensor, head: Any) -> torch.Tensor:
    return supervised_nll(x, labels, head.weight, HeadLora.of(head))


def gradients(nll: Any, x: torch.Tensor, labels: torch.Tensor, head: Any) -> list[torch.Tensor]:
    """The loss, and the gradients of the states, A and B."""
    torch.manual_seed(1)  # of dropout
    loss = nll(x, labels, head)
    trained = [x, head.lora_A["default"].weight, head.lora_B["default"].weight]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}, {"r": 1}], ids=str)
@pytest.mark.parametrize(
    ("rows", "length", "hidden", "vocabulary"),
    [(1, 2, 3, 5), (3, 17, 8, 31), (2, 700, 16, 101), (1, LOGIT_TOKENS + 2, 4, 7)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_an_adapted_head_equals_stock_peft(
    rows: int, length: int, hidden: int, vocabulary: int, settings: Any, dtype: torch.dtype, tolerance: float
) -> None:
    x, labels, _ = case(rows, length, hidden, vocabulary, dtype, share=1.0 if length < 3 else 0.6)
    head = peft_head(hidden, vocabulary, dtype, **settings)
    ours, theirs = (gradients(nll, x, labels, head) for nll in (our_nll, stock_nll))
    for one, other in zip(ours, theirs, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=tolerance, check_dtype=False)


def test_an_adapted_head_under_autocast_is_as_near_to_float64_as_stock_peft() -> None:
    x, labels, _ = case(2, 700, 64, 101, torch.bfloat16)
    head = peft_head(64, 101, torch.float32, r=8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (gradients(nll, x, labels, head) for nll in (our_nll, stock_nll))
    wide = gradients(stock_nll, x.detach().double().requires_grad_(), labels, head.double())
    for one, other, exact in zip(ours, theirs, wide, strict=True):
        ours_off, theirs_off = ((t.double() - exact).norm() / exact.norm() for t in (one, other))
        assert ours_off < 0.02
        assert ours_off < 1.5 * theirs_off + 1e-3


def test_gradcheck_of_an_adapted_head_across_chunks() -> None:
    x, labels, head = case(2, 9, 5, 11, torch.float64)
    a, b = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 5), (11, 2)))

    def nll(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return supervised_nll(x, labels, head, HeadLora(lambda t: t @ a.T, b), logit_tokens=3)

    assert torch.autograd.gradcheck(nll, (x, a, b))
    assert torch.autograd.gradcheck(lambda a, b: nll(x.detach(), a, b), (a, b))  # the head alone is trained


def test_an_adapted_head_keeps_no_logits() -> None:
    x, labels, _ = case(2, 64, 8, 501, torch.float32, share=0.25)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        our_nll(x, labels, peft_head(8, 501, torch.float32))
    assert max(saved) < int((labels[:, 1:] != IGNORE).sum()) * 501
    assert 501 * 3 in saved  # B's gradient


def test_no_adapter_where_there_is_none_or_it_is_off() -> None:
    head = peft_head(4, 7, torch.float32)
    assert HeadLora.of(head.base_layer) is None
    head.enable_adapters(False)
    assert HeadLora.of(head) is None
