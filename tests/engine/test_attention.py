"""Attention over documents against a float64 softmax with the mask written out, gradients too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_phi3.engine import attention

LENGTHS = [[1], [5], [1, 1, 1], [7, 3, 12], [2, 31, 1, 9]]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], window: int | None
) -> torch.Tensor:
    """Shape: q (heads, T, d), k and v (kv_heads, T, d); returns (T, heads, d)."""
    group = len(q) // len(k)
    k, v = (part.repeat_interleave(group, dim=0) for part in (k, v))
    num = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    back = torch.arange(num)[:, None] - torch.arange(num)
    seen = (owner[:, None] == owner) & (back >= 0) & (back < (window or num))
    scores = (q @ k.transpose(1, 2) * 0.3).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def tensors(num: int, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(num)
    shapes = [(heads[0], num, 8), (heads[1], num, 8), (heads[1], num, 8)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def attended(
    parts: list[torch.Tensor], lengths: list[int], window: int | None, device: str = "cpu"
) -> torch.Tensor:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    rows = [part.to(device).unsqueeze(0) for part in parts]
    out, _ = attention.attend(
        torch.nn.Module(), *rows, None, scaling=0.3, sliding_window=window, documents=bounds
    )
    return out[0]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("path", ["eager", "sdpa"])
def test_documents_see_themselves_only(
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    heads: tuple[int, int],
    window: int | None,
    path: str,
) -> None:
    monkeypatch.setattr(attention, "EAGER_TOKENS", 100 if path == "eager" else 0)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 5)
    parts = tensors(sum(lengths), heads, torch.float64)
    expected, found = reference(*parts, lengths, window), attended(parts, lengths, window)
    # the softmax of short documents is in float32, as in transformers' eager attention
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **close)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), parts) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_another_document_changes_not_a_bit() -> None:
    parts = tensors(20, (4, 2), torch.bfloat16)
    whole = attended(parts, [8, 12], None)
    alone = attended([part[:, 8:] for part in parts], [12], None)
    assert torch.equal(whole[8:], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, [700, 1, 1300]])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [None, 4, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(lengths: list[int], heads: tuple[int, int], window: int | None, dtype: torch.dtype) -> None:
    """bfloat16 takes flash attention, float32 goes document by document."""
    parts = tensors(sum(lengths), heads, dtype)
    expected = reference(*(part.double() for part in parts), lengths, window)
    found = attended(parts, lengths, window, "cuda").double().cpu()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), parts) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=5 * tolerance, atol=5 * tolerance)


def test_without_documents_it_is_the_stock_attention(checkpoints: Callable[[str], Path]) -> None:
    """Padded on the left, with a cache and with a window: what generation needs."""
    from transformers import Phi3ForCausalLM

    def logits(name: str) -> Any:
        model = Phi3ForCausalLM.from_pretrained(
            checkpoints("gqa"), dtype=torch.float32, attn_implementation=name
        )
        model.config.sliding_window = 6
        ids = torch.arange(24).view(2, 12)
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :5] = 0
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
        ).logits

    for ours, stock in zip(logits(attention.register()), logits("sdpa"), strict=True):
        assert torch.equal(ours, stock)
