"""Causal attention over documents that lie one behind the other, none seeing another.

Registered with transformers under NAME, so that its Phi-3 layers call it; without `documents` it is
transformers' own SDPA, with transformers' own masks. With them there is no [S, S] mask at all: CUDA's
variable-length flash attention takes the sliding window itself, and elsewhere the documents are gone through
one by one, long ones in blocks of queries.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from ..case import EAGER_TOKENS, QUERY_BLOCK

NAME: Final = "qlora_phi3"
"""What transformers calls `attend` by."""


def register() -> str:
    """Make `attend` known to transformers, which looks attention up by name; returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, with bounds of `documents` where the row holds several.

    Shape: query (rows, heads, S, head_dim), key and value (rows, kv_heads, S, head_dim); with `documents`,
        int32 on the CPU, 0 and where each one ends, rows is 1. Returns (rows, S, heads, head_dim).
    """
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return out, None
    assert dropout == 0.0, "Phi-3 has no attention dropout"
    q, k, v = (part[0] for part in (query, key, value))
    if flash_takes(query):
        return _flash(q, k, v, documents, scaling, sliding_window).unsqueeze(0), None
    lengths = documents.diff().tolist()
    # split, not slices: the backward of each slice would fill a gradient of the whole row
    each = zip(*(torch.split(part, lengths, dim=1) for part in (q, k, v)), strict=True)
    parts = [one_document(q, k, v, scaling, sliding_window) for q, k, v in each]
    return torch.cat(parts, dim=1).transpose(0, 1).unsqueeze(0), None


def flash_takes(query: torch.Tensor) -> bool:
    """Whether CUDA's flash attention can: half precision, Ampere or newer, a torch that has windows in it."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return (
        query.is_cuda and half and _has_windows() and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


@lru_cache(maxsize=1)
def _has_windows() -> bool:
    """torch 2.13 has; the first versions of varlen_attn had no `window_size`."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Shape: q (heads, S, head_dim), k and v (kv_heads, S, head_dim); returns (S, heads, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = documents.to(q.device, non_blocking=True)
    longest = int(documents.diff().max())
    out = varlen_attn(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        # transformers' window of W keys counts the query's own, flash's is how many it reaches back
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=len(q) != len(k),
    )
    assert isinstance(out, torch.Tensor)
    return out


def one_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Causal attention within one document.

    Shape: q (heads, S, head_dim), k and v (kv_heads, S, head_dim); returns (heads, S, head_dim).
    """
    num = q.shape[1]
    if q.device.type == "cpu" and num <= EAGER_TOKENS:
        return _eager(q, k, v, scaling, window)
    if window is None or num <= window:
        return _sdpa(q, k, v, scaling)
    blocks = []
    for at in range(0, num, QUERY_BLOCK):
        stop, first = min(at + QUERY_BLOCK, num), max(0, at - window + 1)
        mask = _seen(at - first, stop - at, window, q.device)
        blocks.append(_sdpa(q[:, at:stop], k[:, first:stop], v[:, first:stop], scaling, mask))
    return torch.cat(blocks, dim=1)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """SDPA over one document, causal where no mask says more."""
    if len(q) != len(k):  # with GQA enabled, only some of torch's kernels take it
        k, v = (part.repeat_interleave(len(q) // len(k), dim=0) for part in (k, v))
    q, k, v = (part.unsqueeze(0) for part in (q, k, v))
    found = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return found[0]


def _eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Plain products and a float32 softmax; the heads that share keys are one longer matrix."""
    heads, num, width = q.shape
    scores = q.reshape(len(k), -1, width) @ k.transpose(1, 2)
    scores = scores.view(heads, num, num).float() * scaling
    seen = _seen(0, num, num if window is None else window, q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(v.dtype)
    return (weights.view(len(k), -1, num) @ v).view(heads, num, width)


@lru_cache(maxsize=64)
def _seen(before: int, num: int, window: int, device: torch.device) -> torch.Tensor:
    """Which keys a query sees: none behind it, and of those before it the last `window`, its own included.

    Shape: (num, before + num), bool; the first `before` keys stand in front of the first query.
    """
    back = torch.arange(before, before + num, device=device)[:, None]
    back = back - torch.arange(before + num, device=device)
    return (back >= 0) & (back < window)
