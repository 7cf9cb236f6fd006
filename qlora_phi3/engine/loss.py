"""Cross-entropy over supervised tokens only, without a [tokens, vocabulary] tensor that outlives a chunk.

The head's weight is frozen, so it needs no gradient and the gradient of the hidden states can be computed
in the forward, chunk by chunk: no logits are kept or recomputed. A LoRA on the head is a second, narrow
product in the same chunks. On a CPU this halves a training step of the quickstart against TRL's fused head,
which there scores every position and recomputes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from ..case import LOGIT_TOKENS
from ..kernels.cross_entropy import nll_and_error_

IGNORE: Final = -100


@dataclass(frozen=True)
class HeadLora:
    """The adapter on the head: logits are x W^T + `narrow`(x) B^T.

    `narrow` is scale * dropout(x) A^T, differentiable in x and A.

    Shape: narrow (tokens, hidden_size) -> (tokens, rank); b (vocabulary, rank).
    """

    narrow: Callable[[torch.Tensor], torch.Tensor]
    b: torch.Tensor

    @classmethod
    def of(cls, head: Any) -> HeadLora | None:
        """That of PEFT's layer, as it trains; None where the head has no adapter, or it is off."""
        if not getattr(head, "lora_A", None) or head.disable_adapters:
            return None
        assert not head.merged, "a merged adapter is in the weight already"
        a, dropout, scale = (x["default"] for x in (head.lora_A, head.lora_dropout, head.scaling))
        return cls(lambda x: a(dropout(x)) * scale, head.lora_B["default"].weight)


def supervised_nll(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: torch.Tensor,
    lora: HeadLora | None = None,
    logit_tokens: int = LOGIT_TOKENS,
) -> torch.Tensor:
    """Summed negative log-likelihood of the next tokens that are supervised.

    Shape: hidden (rows, length, hidden_size), labels (rows, length) int64 with IGNORE where nothing is
        trained, head (vocabulary, hidden_size), frozen; returns a float32 scalar. Logits of at most
        `logit_tokens` tokens exist at once.
    Units: nats, summed; the caller divides by the tokens of the whole effective batch.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    x = hidden[:, :-1][chosen]
    z, b = (None, None) if lora is None else (lora.narrow(x), lora.b)
    nll: torch.Tensor = _ChunkedNll.apply(  # type: ignore[no-untyped-call]
        x, targets[chosen], head, z, b, logit_tokens
    )
    return nll


class _ChunkedNll(torch.autograd.Function):
    """Sum of -log softmax(x W^T + z B^T)[target], with the gradients of x, z and B that belong to it.

    With E = softmax - onehot they are E W, E B and E^T z, the last summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        targets: torch.Tensor,
        head: torch.Tensor,
        z: torch.Tensor | None,
        b: torch.Tensor | None,
        logit_tokens: int,
    ) -> torch.Tensor:
        assert not head.requires_grad, "the head is frozen"
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=x.device)
        for_x, _, _, for_z, for_b, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if for_x else None
        grad_z = torch.empty_like(z) if z is not None and for_z else None
        grad_b = torch.zeros_like(b, dtype=wide) if b is not None and for_b else None
        b_cast = None if b is None else b.to(x.dtype)  # once; autocast would do it in every chunk
        for at in range(0, len(x), logit_tokens):
            part = slice(at, at + logit_tokens)
            logits = x[part] @ head.T.to(x.dtype)
            if z is not None and b_cast is not None:
                logits.addmm_(z[part], b_cast.T)
            logits = logits.to(wide)
            nll, error = nll_and_error_(logits, targets[part].unsqueeze(1))
            del logits  # the same memory as the error's, of which the cast should be all that is left
            total, error = total + nll, error.to(x.dtype)
            if grad_x is not None:
                grad_x[part] = error @ head.to(x.dtype)
            if grad_z is not None and b_cast is not None:
                grad_z[part] = error @ b_cast
            if grad_b is not None and z is not None:
                grad_b += error.T @ z[part]
            del error
        ctx.save_for_backward(grad_x, grad_z, grad_b)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_x, for_z, for_b = (
            None if grad is None else grad * outputs[0].to(grad.dtype) for grad in ctx.saved_tensors
        )
        return for_x, None, None, for_z, for_b, None
