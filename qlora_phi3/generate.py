"""Greedy answers to many prompts at once.

Owns batching, stopping and decoding. Sampling and chat build on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .engine.documents import original_context
from .ladder import Halving


@dataclass(frozen=True)
class Answer:
    """A generated answer. `stopped`: it ended itself rather than at the token limit."""

    text: str
    num_tokens: int
    stopped: bool


def stop_ids(tokenizer: Any, model: Any, end: int) -> list[int]:
    """Every token that ends an answer: the template's end of turn, and what model and tokenizer name."""
    named = model.generation_config.eos_token_id
    from_model = named if isinstance(named, list) else [named]
    return sorted({token for token in (end, tokenizer.eos_token_id, *from_model) if token is not None})


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    stops: list[int],
    max_new_tokens: int,
    batch_tokens: int | Halving,
    done: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Greedy answers in the order of the prompts; `done` hears how many are finished.

    Prompts of similar length share a batch, padded on the left, of at most `batch_tokens` with the answers.
    """
    was_training = model.training
    model.eval()
    found: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def cut(rest: Sequence[int], size: int) -> Iterator[list[int]]:
        for batch in _batches([prompts[i] for i in rest], max_new_tokens, size, original_context(model)):
            yield [rest[i] for i in batch]

    def take(batch: Sequence[int]) -> dict[int, Answer]:
        texts = _answer_batch(model, tokenizer, [prompts[i] for i in batch], stops, max_new_tokens)
        return dict(zip(batch, texts, strict=True))

    def weigh(batch: Sequence[int]) -> int:
        return len(batch) * (len(prompts[batch[-1]]) + max_new_tokens)

    try:
        for answers in Halving.of(batch_tokens).each(order, cut, take, weigh):
            found |= answers
            done(len(found))
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(prompts))]


def _batches(
    prompts: Sequence[list[int]], max_new_tokens: int, batch_tokens: int, context: int | None = None
) -> Iterable[list[int]]:
    """Indices of prompts that are answered together, shortest first; at least one a batch.

    What may outgrow LongRoPE's original `context` is answered alone: the factors are those of the longest.
    """
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        width = len(prompts[i]) + max_new_tokens
        alone = context is not None and width > context
        if batch and (alone or (len(batch) + 1) * width > batch_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _answer_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], stops: list[int], max_new_tokens: int
) -> list[Answer]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with _whole_rows(model.get_output_embeddings()):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad,
            use_cache=True,
        )
    return [_decode(tokenizer, row[width:].tolist(), stops) for row in out]


@contextmanager
def _whole_rows(head: Any) -> Iterator[None]:
    """The head with its input in one piece.

    transformers 5.23 hands it a slice, each prompt's last position, and torch 2.13 on a CPU then copies the
    head once for each prompt: 1.7 GiB and 2.5 s more with 32 prompts on the built-in model.
    """
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _decode(tokenizer: Any, ids: list[int], stops: list[int]) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(text, len(ids) if end is None else end + 1, end is not None)
