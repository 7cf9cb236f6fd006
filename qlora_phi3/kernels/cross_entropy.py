"""Cross-entropy of a chunk of logits, and what it has for a gradient, in the same memory."""

from __future__ import annotations

import torch


def nll_and_error_(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log softmax[wanted], and softmax - onehot, written over the logits.

    Shape: logits (tokens, vocabulary), wanted (tokens, 1) int64; returns a scalar and one like logits.
    """
    log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
    nll = (log_sum - logits.gather(1, wanted)).sum()
    error = logits.sub_(log_sum).exp_()
    return nll, error.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=logits.dtype))
