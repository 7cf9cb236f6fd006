"""Metrics of a model on held-out conversations, and what it answers to some of them.

Owns the definitions: `loss` is the mean negative log-likelihood in nats per supervised token of all
held-out rows; `perplexity` is exp(loss); `exact_match` is the share of answers equal to the expected text
(outer whitespace aside); `json_match` is the share of answers that are valid JSON of the expected shape: an
object with exactly the expected keys, or a value of the expected type. Answers are those to
`evaluate.samples` rows, drawn by the seed. Owns too what limits such a figure, whatever the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

from . import generate
from .case import LOGIT_TOKENS
from .data import Prompt, Split, TokenRow, draw, prompts
from .data.store import Rows
from .engine.documents import Documents, hidden_states, original_context, passes
from .engine.loss import IGNORE
from .errors import QloraError
from .ladder import Halving
from .recipe import SCORED_ROWS, Evaluate, Train

SEED: Final = Train().seed

PLAIN_TEXT: Final = "the held-out rows are plain text, which asks nothing"


@dataclass(frozen=True)
class Sample:
    """One held-out question, the expected answer and the one that was given.

    `stopped`: it ended itself; else it was cut at evaluate.max_new_tokens.
    Units: `num_tokens` of the answer with the token that ends it, `expected_tokens` without.
    """

    place: str
    prompt: str
    expected: str
    answer: str
    stopped: bool
    exact_match: bool
    json_match: bool
    num_tokens: int
    expected_tokens: int


@dataclass(frozen=True)
class Measured:
    """Metrics of one model, by name, and the samples they came from; `no_samples`: why there are none."""

    metrics: dict[str, float]
    samples: tuple[Sample, ...]
    no_samples: str = ""

    def to_json(self) -> dict[str, Any]:
        """As eval.json has it; a number that is not finite is null there."""
        found: dict[str, Any] = {
            "metrics": {name: one if math.isfinite(one) else None for name, one in self.metrics.items()},
            "samples": [asdict(sample) for sample in self.samples],
        }
        return found | ({"no_samples": self.no_samples} if self.no_samples else {})


def measure(
    model: Any,
    tokenizer: Any,
    split: Split,
    settings: Evaluate,
    end: int,
    *,
    batch_rows: int | Halving,
    batch_tokens: int | Halving,
    seed: int = SEED,
    scored: Callable[[int], None] = lambda _: None,
    done: Callable[[int], None] = lambda _: None,
) -> Measured:
    """The recipe's metrics: loss of all held-out rows, answers to those that `seed` draws; `end` closes one.

    `batch_rows` rows pass at once where the loss is measured: the micro batch, so that evaluating takes
    no more memory than training. `batch_tokens` of prompts and answers are generated at once. `scored` and
    `done` hear how many rows were scored and answered.
    """
    metrics: dict[str, float] = {}
    if {"loss", "perplexity"} & set(settings.metrics):
        loss = mean_loss(model, split.rows, batch_rows, scored)
        metrics |= {"loss": loss, "perplexity": _exp(loss)}
    answers = partial(_samples, model, tokenizer, split, settings, end, batch_tokens, seed, done)
    if not settings.compares_answers:
        samples, why = _to_look_at(split, answers)
        return Measured({name: metrics[name] for name in settings.metrics}, samples, why)
    samples = answers()
    metrics |= {
        "exact_match": sum(s.exact_match for s in samples) / len(samples),
        "json_match": sum(s.json_match for s in samples) / len(samples),
    }
    return Measured({name: metrics[name] for name in settings.metrics}, samples)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _to_look_at(split: Split, answers: Callable[[], tuple[Sample, ...]]) -> tuple[tuple[Sample, ...], str]:
    """Answers that no metric needs, or why there are none: a run does not fail for want of them."""
    if not split.conversations:
        return (), PLAIN_TEXT
    try:
        found = answers()
    except QloraError as error:
        return (), f"it failed: {error.problems[0].reason}"
    return (
        found,
        "" if found else "no prompt that was drawn leaves room for an answer of evaluate.max_new_tokens",
    )


def reservations(found: Measured, settings: Evaluate) -> list[str]:
    """What limits these metrics, whatever the model: answers that are too long, or not JSON."""
    notes = []
    if not math.isfinite(found.metrics.get("loss", 0.0)):
        notes.append("the tuned model computes no loss: its update is too large; lower train.learning_rate")
    if math.isinf(found.metrics.get("perplexity", 0.0)):
        notes.append("perplexity is more than a number can hold: the loss is too high for exp(loss)")
    if not settings.compares_answers:
        return notes
    most, total = settings.max_new_tokens, len(found.samples)
    longer = [one.expected_tokens for one in found.samples if one.expected_tokens > most]
    if longer:
        reach = _reach("exact_match", total - len(longer), total)
        if "exact_match" not in settings.metrics:
            reach = "json_match is hard to reach"
        elif "json_match" in settings.metrics:
            reach += " and json_match hardly more"
        long = f"longer than evaluate.max_new_tokens {most}: the longest has {max(longer)} tokens"
        notes.append(f"{reach}: {_of(len(longer), total)} {long}. Raise it to {max(longer) + 1}.")
    no_json = sum(json_shape(one.expected) is None for one in found.samples)
    if no_json and "json_match" in settings.metrics:
        notes.append(f"{_reach('json_match', total - no_json, total)}: {_of(no_json, total)} not JSON")
    cut = sum(not one.stopped for one in found.samples)
    if cut:
        notes.append(
            f"{cut} of {total} answers of the tuned model were cut at evaluate.max_new_tokens {most}"
        )
    return notes


def _reach(metric: str, possible: int, total: int) -> str:
    return f"{metric} can be {possible / total:.1%} at most" if possible else f"{metric} can only be 0%"


def _of(num: int, total: int) -> str:
    if num == total:
        return f"all {total} expected answers are" if total > 1 else "the expected answer is"
    return f"{num} of {total} expected answers {'is' if num == 1 else 'are'}"


def scored_rows(split: Split, seed: int) -> Sequence[TokenRow]:
    """The held-out rows whose loss is measured in the middle of a training: all, or SCORED_ROWS of them."""
    if len(split.rows) <= SCORED_ROWS:
        return split.rows
    return [split.rows[number] for number in draw(len(split.rows), SCORED_ROWS, seed)]


@torch.inference_mode()
def mean_loss(
    model: Any,
    rows: Sequence[TokenRow],
    batch_rows: int | Halving,
    done: Callable[[int], None] = lambda _: None,
) -> float:
    """Mean negative log-likelihood per supervised token, over all rows together; `done` hears how many.

    Units: nats. Logits exist only for supervised positions.
    """
    was_training = model.training
    model.eval()
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    context, total, count, num_rows = original_context(causal), 0.0, 0, 0
    lengths = rows.lengths.tolist() if isinstance(rows, Rows) else [len(row.input_ids) for row in rows]
    ordered = sorted(range(len(rows)), key=lambda number: lengths[number])

    def cut(rest: Sequence[int], size: int) -> Iterator[list[int]]:
        for group in passes([lengths[number] for number in rest], size, context=context):
            yield [rest[i] for i in group]

    def take(group: Sequence[int]) -> tuple[float, int, int]:
        return *_nll(causal, [rows[number] for number in group]), len(group)

    try:
        for nll, num, taken in Halving.of(batch_rows).each(ordered, cut, take):
            total, count, num_rows = total + nll, count + num, num_rows + taken
            done(num_rows)
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
    seed: int,
    done: Callable[[int], None],
) -> tuple[Sample, ...]:
    if settings.compares_answers:
        asked = prompts(split, tokenizer, settings.samples, seed)
    else:
        asked = _short_prompts(split, tokenizer, settings, Halving.of(batch_tokens).size, seed)
    answers = generate.answer(
        model,
        tokenizer,
        [prompt.input_ids for prompt in asked],
        stops=generate.stop_ids(tokenizer, model, end),
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=batch_tokens,
        done=done,
    )
    return tuple(_sample(prompt, given, tokenizer) for prompt, given in zip(asked, answers, strict=True))


def _short_prompts(
    split: Split, tokenizer: Any, settings: Evaluate, most_tokens: int, seed: int
) -> list[Prompt]:
    """Prompts that fit with their answer into so many tokens, out of some more than are answered."""
    asked = prompts(split, tokenizer, 4 * settings.num_answered, seed)
    short = [one for one in asked if len(one.input_ids) + settings.max_new_tokens <= most_tokens]
    return [short[number] for number in draw(len(short), settings.num_answered, seed)]


def _sample(prompt: Prompt, given: generate.Answer, tokenizer: Any) -> Sample:
    return Sample(
        place=prompt.place,
        prompt=prompt.text,
        expected=prompt.expected,
        answer=given.text,
        stopped=given.stopped,
        exact_match=given.text.strip() == prompt.expected.strip(),
        json_match=json_shape(given.text) is not None
        and json_shape(given.text) == json_shape(prompt.expected),
        num_tokens=given.num_tokens,
        expected_tokens=len(tokenizer(prompt.expected.strip(), add_special_tokens=False)["input_ids"]),
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
