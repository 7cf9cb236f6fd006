"""Metrics of a model on held-out conversations.

Owns the definitions: `loss` is the mean negative log-likelihood in nats per supervised token;
`perplexity` is exp(loss); `exact_match` is the share of answers equal to the expected text (outer
whitespace aside); `json_match` is the share of answers that are valid JSON of the expected shape: an
object with exactly the expected keys, or a value of the expected type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from . import generate
from .case import LOGIT_TOKENS
from .data import Prompt, Split, TokenRow, prompts
from .engine.documents import Documents, hidden_states, original_context, passes
from .engine.loss import IGNORE
from .ladder import Halving
from .recipe import GENERATION_METRICS, Evaluate


@dataclass(frozen=True)
class Sample:
    """One held-out question, the expected answer and the one that was given."""

    place: str
    prompt: str
    expected: str
    answer: str
    stopped: bool
    exact_match: bool
    json_match: bool


@dataclass(frozen=True)
class Measured:
    """Metrics of one model, by name, and the samples they came from."""

    metrics: dict[str, float]
    samples: tuple[Sample, ...]

    def to_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "samples": [asdict(sample) for sample in self.samples]}


def measure(
    model: Any,
    tokenizer: Any,
    split: Split,
    settings: Evaluate,
    end: int,
    *,
    batch_rows: int | Halving,
    batch_tokens: int | Halving,
    done: Callable[[int], None] = lambda _: None,
) -> Measured:
    """The recipe's metrics on the first `settings.samples` held-out rows; `end` closes an answer.

    `batch_rows` rows pass at once where the loss is measured: the micro batch, so that evaluating takes
    no more memory than training. `batch_tokens` of prompts and answers are generated at once.
    """
    metrics: dict[str, float] = {}
    samples: tuple[Sample, ...] = ()
    if {"loss", "perplexity"} & set(settings.metrics):
        loss = mean_loss(model, split.rows[: settings.samples], batch_rows)
        metrics |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if set(GENERATION_METRICS) & set(settings.metrics):
        samples = _samples(model, tokenizer, split, settings, end, batch_tokens, done)
        metrics |= {
            "exact_match": sum(s.exact_match for s in samples) / len(samples),
            "json_match": sum(s.json_match for s in samples) / len(samples),
        }
    return Measured({name: metrics[name] for name in settings.metrics}, samples)


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[TokenRow], batch_rows: int | Halving) -> float:
    """Mean negative log-likelihood per supervised token, over all rows together.

    Units: nats. Logits exist only for supervised positions.
    """
    was_training = model.training
    model.eval()
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    context, total, count = original_context(causal), 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.input_ids))

    def cut(rest: Sequence[TokenRow], size: int) -> Iterator[list[TokenRow]]:
        for group in passes([len(row.input_ids) for row in rest], size, context=context):
            yield [rest[i] for i in group]

    try:
        for nll, num in Halving.of(batch_rows).each(ordered, cut, lambda group: _nll(causal, group)):
            total, count = total + nll, count + num
    finally:
        model.train(was_training)
    return total / count


def _nll(causal: Any, rows: Sequence[TokenRow]) -> tuple[float, int]:
    """Summed negative log-likelihood and number of supervised tokens of one pass."""
    documents = Documents.of(rows, causal.device)
    hidden = hidden_states(causal, documents)
    targets = documents.labels[:, 1:]
    supervised = targets != IGNORE
    chosen, wanted = hidden[:, :-1][supervised], targets[supervised]
    total = 0.0
    for at in range(0, len(wanted), LOGIT_TOKENS):
        logits = causal.lm_head(chosen[at : at + LOGIT_TOKENS]).float()
        total += float(functional.cross_entropy(logits, wanted[at : at + LOGIT_TOKENS], reduction="sum"))
    return total, len(wanted)


def _samples(
    model: Any,
    tokenizer: Any,
    split: Split,
    settings: Evaluate,
    end: int,
    batch_tokens: int | Halving,
    done: Callable[[int], None],
) -> tuple[Sample, ...]:
    asked = prompts(split, tokenizer, settings.samples)
    answers = generate.answer(
        model,
        tokenizer,
        [prompt.input_ids for prompt in asked],
        stops=generate.stop_ids(tokenizer, model, end),
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=batch_tokens,
        done=done,
    )
    return tuple(_sample(prompt, given) for prompt, given in zip(asked, answers, strict=True))


def _sample(prompt: Prompt, given: generate.Answer) -> Sample:
    return Sample(
        place=prompt.place,
        prompt=prompt.text,
        expected=prompt.expected,
        answer=given.text,
        stopped=given.stopped,
        exact_match=given.text.strip() == prompt.expected.strip(),
        json_match=json_shape(given.text) is not None
        and json_shape(given.text) == json_shape(prompt.expected),
    )


def json_shape(text: str) -> tuple[str, frozenset[str]] | None:
    """Type and keys of a JSON text; None when it is not JSON (NaN and duplicate keys are not)."""
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    return type(value).__name__, frozenset(value) if isinstance(value, dict) else frozenset()


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)
