"""Cross-entropy over supervised tokens only, without a [tokens, vocabulary] tensor that outlives a chunk.

The head is frozen, so its weight needs no gradient and the gradient of the hidden states can be computed
in the forward, chunk by chunk: no logits are kept or recomputed. On a CPU this halves a training step of
the quickstart against TRL's fused head, which there scores every position and recomputes.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from ..case import LOGIT_TOKENS

IGNORE: Final = -100


def supervised_nll(
    hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor, logit_tokens: int = LOGIT_TOKENS
) -> torch.Tensor:
    """Summed negative log-likelihood of the next tokens that are supervised.

    Shape: hidden (rows, length, hidden_size), labels (rows, length) int64 with IGNORE where nothing is
        trained, head (vocabulary, hidden_size), frozen; returns a float32 scalar. Logits of at most
        `logit_tokens` tokens exist at once.
    Units: nats, summed; the caller divides by the tokens of the whole effective batch.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    nll: torch.Tensor = _ChunkedNll.apply(  # type: ignore[no-untyped-call]
        hidden[:, :-1][chosen], targets[chosen], head, logit_tokens
    )
    return nll


class _ChunkedNll(torch.autograd.Function):
    """Sum of -log softmax(x W^T)[target]; the gradient of x, (softmax - onehot) W, comes with it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, targets: torch.Tensor, head: torch.Tensor, logit_tokens: int
    ) -> torch.Tensor:
        assert not head.requires_grad, "the head is frozen"
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=x.device)
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for at in range(0, len(x), logit_tokens):
            part = slice(at, at + logit_tokens)
            logits = (x[part] @ head.T.to(x.dtype)).to(wide)
            wanted = targets[part].unsqueeze(1)
            log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted)).sum()
            if grad is not None:
                softmax = logits.sub_(log_sum).exp_()
                softmax.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=wide))
                grad[part] = softmax.to(x.dtype) @ head.to(x.dtype)
                del softmax
            del logits  # both are one tensor, which would stay until the next chunk has its own
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * outputs[0].to(grad.dtype), None, None, None
