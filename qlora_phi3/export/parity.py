"""The gate: whether a program that reads an export computes what was trained.

Owns the fixed prompts, the measures, the thresholds of each target with their reasons, and the verdict.
Refuses to call anything equal that it could not tell from the base without the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..weights import first_line
from .consumers import Consumer, Messages

Verdict = Literal["passed", "drift", "cannot tell", "skipped"]

PROBES: Final[tuple[Messages, ...]] = (
    [{"role": "user", "content": "Hello, how are you?"}],
    [{"role": "user", "content": "\n\n  Two newlines and two spaces first, one of each last \n"}],
    [{"role": "system", "content": "Answer in one line."}, {"role": "user", "content": "1 2 3, 100 tea?"}],
    [
        {"role": "user", "content": "  Größe 12\n\n\tand a tab"},
        {"role": "assistant", "content": "\nYes, it's 12."},
        {"role": "user", "content": "Thanks\u00a0— 👍!"},
    ],
)
"""Conversations whose ids must be the same: whitespace beside special tokens, a system turn, two turns,
digits, text beyond ASCII. A template that takes no system turn is not asked for one."""


@dataclass(frozen=True)
class Thresholds:
    """The most that an export may differ. Units: KL divergences in nats per token; `reason` says why."""

    kl_mean: float
    kl_max: float
    greedy_agreement: float
    reason: str


TIE_NATS: Final = 0.05
"""Where the live model holds two tokens this near, rounding decides, and another choice is no difference."""

_EXACT: Final = Thresholds(1e-3, 5e-2, 0.97, "the same weights; only rounding while computing differs")
THRESHOLDS: Final[dict[str, Thresholds]] = {
    "adapter": _EXACT,
    "loralib": _EXACT,
    "mlx": _EXACT,
    "vllm": _EXACT,
    "gguf-lora": _EXACT,
    "merged": Thresholds(2e-3, 1e-1, 0.95, "merged weights are rounded to 16 bits once more than trained"),
    "gguf:f16": _EXACT,
    "gguf:bf16": Thresholds(2e-3, 1e-1, 0.95, "bf16 keeps 8 bits of each merged weight"),
    "gguf:q8_0": Thresholds(2e-2, 5e-1, 0.90, "8 bits a weight, and of activations in llama.cpp's matmuls"),
    "gguf:q5_1": Thresholds(1e-1, 2.0, 0.75, "5 bits and a minimum for 32 weights"),
    "gguf:q5_0": Thresholds(1.5e-1, 2.0, 0.75, "5 bits for 32 weights"),
    "gguf:q4_1": Thresholds(5e-1, 5.0, 0.55, "4 bits and a minimum for 32 weights"),
    "gguf:q4_0": Thresholds(6e-1, 6.0, 0.50, "4 bits for 32 weights"),
}
"""Measured on 135M parameters, which suffer most: q8_0 5e-3, q4_0 0.3 in the mean; larger models far less."""


def thresholds_of(target: str) -> Thresholds:
    """Thresholds of a target as the command names it; "ollama" is q8_0, "ollama:q4_0" that kind.

    Raises:
        InputError: nothing known of it.
    """
    program, _, kind = target.partition(":")
    key = f"gguf:{kind or 'q8_0'}" if program == "ollama" else target
    if key not in THRESHOLDS:
        raise InputError(f"--to {target}", "has no thresholds.", f"Known: {', '.join(THRESHOLDS)}, ollama.")
    return THRESHOLDS[key]


Kind = Literal["template", "text", "greedy", "stop"]


@dataclass(frozen=True)
class Difference:
    """The first token that differs: in which prompt, where, what was expected and what was found.

    `kind`: "template" (ids of a prompt), "text" (ids of one that no rows have), "greedy" (the likeliest token
    of an answer), "stop" (how an answer ends). `position` counts from the prompt's first token in a template,
    else from the answer's. `margin`: how much likelier the live model holds its own token, in nats; near 0 it
    is a tie.
    """

    kind: Kind
    prompt: str
    position: int
    expected: str
    found: str
    margin: float | None = None

    def __str__(self) -> str:
        where = "of the prompt" if self.kind in ("template", "text") else "of the answer to"
        margin = "" if self.margin is None else f" (by {self.margin:.3g} nats the likelier)"
        return (
            f"token {self.position} {where} {self.prompt!r}: as trained it is {self.expected!r}{margin}, "
            f"in the export {self.found!r}"
        )


@dataclass(frozen=True)
class Parity:
    """What the gate found.

    `passed` means: it was compared, is within the thresholds, and could have failed. "cannot tell" is no
    drift: the adapter changes the base by less than the export may differ, or there was no control to see it
    by. `stops` is None where the live model ended none of its answers. `control_kl` is the live model's
    divergence from the base without the adapter. `other_texts`: messages beside what rows hold that become
    other ids; the card names them. `not_asked`: what was not compared, sentences.

    Units: KL in nats per token; `greedy_agreement` as a share.
    """

    target: str
    consumer: str
    verdict: Verdict
    reasons: tuple[str, ...]
    kl_mean: float | None = None
    kl_max: float | None = None
    greedy_agreement: float | None = None
    token_ids_equal: bool | None = None
    stops: bool | None = None
    control_kl: float | None = None
    thresholds: Thresholds | None = None
    num_prompts: int = 0
    num_positions: int = 0
    first_difference: Difference | None = None
    num_texts: int = 0
    other_texts: tuple[Difference, ...] = ()
    not_asked: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"

    @property
    def drifted(self) -> bool:
        return self.verdict == "drift"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def skipped(target: str, consumer: str, reason: str) -> Parity:
    """The result where the program is not here or cannot read the target."""
    return Parity(target, consumer, "skipped", (reason,))


@dataclass(frozen=True)
class _Row:
    """One prompt with the live model's whole answer, and its log-probabilities at the answer's beginning.

    Shape: `live` (positions, vocab), at most one for each token of the answer.
    """

    prompt: str
    ids: list[int]
    answer: list[int]
    live: Tensor

    @property
    def compared(self) -> list[int]:
        """The tokens that the positions of `live` follow, and those before."""
        return [*self.ids, *self.answer[: len(self.live) - 1]]


@dataclass(frozen=True)
class Reference:
    """The live model with its own answers to the prompts: what every export of a run is compared with.

    `control`: what the base without the adapter makes of the same answers; None where there is none.
    """

    live: Consumer
    prompts: Sequence[Messages]
    rows: Sequence[_Row]
    control: Sequence[Tensor] | None

    @classmethod
    def of(
        cls,
        live: Consumer,
        control: Consumer | None,
        prompts: Sequence[Messages],
        *,
        max_new_tokens: int = 96,
        max_positions: int = 24,
    ) -> Reference:
        """Ask the live model. `max_positions` of each answer are compared, for a program may need a request
        for each."""
        rows = [_row(live, messages, max_new_tokens, max_positions) for messages in prompts]
        others = None
        if control is not None:
            others = [control.log_probs(row.compared, len(row.live)) for row in rows]
        return cls(live, prompts, rows, others)

    def control_kl(self) -> float | None:
        """Mean divergence of the live model from the base without the adapter."""
        return None if self.control is None else float(self.divergence(self.control).mean())

    def divergence(self, found: Sequence[Tensor]) -> Tensor:
        """Of the live model from `found`, at every position of every answer; as `divergence`."""
        return torch.cat([divergence(row.live, other) for row, other in zip(self.rows, found, strict=True)])


def gate(
    target: str,
    reference: Reference,
    consumer: Consumer,
    *,
    stops: Iterable[int],
    texts: Sequence[str] = (),
    not_asked: Sequence[str] = (),
) -> Parity:
    """Compare a program on the export with the live model, on prompts and the live model's own answers.

    Greedy agreement counts the positions of these answers at which both find the same token likeliest (or
    the live model has a tie), so that one early choice does not spoil all that follows; the program's own
    generation is held to stop. `stops` are the ids that end an answer. Of `texts`, which no rows hold, other
    ids are no drift: they are told.

    Raises:
        InputError: no thresholds are known for the target.
    """
    limits = thresholds_of(target)
    live, rows = reference.live, reference.rows
    template = next(_templates(live, consumer, [*reference.prompts, *PROBES]), None)
    odd = [[{"role": "user", "content": text}] for text in texts]
    other_texts = tuple(replace(one, kind="text") for one in _templates(live, consumer, odd))
    found = [consumer.log_probs(row.compared, len(row.live)) for row in rows]
    kl = reference.divergence(found)
    greedy = [_disagreement(row, other, live) for row, other in zip(rows, found, strict=True)]
    agreement = 1 - sum(count for count, _ in greedy) / len(kl)
    stopped, stop = _stopping(live, consumer, rows, set(stops))
    first = template or next((other for _, other in greedy if other), None) or stop
    measured = Parity(
        target,
        consumer.name,
        "passed",
        (),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        greedy_agreement=agreement,
        token_ids_equal=template is None,
        stops=stopped,
        control_kl=reference.control_kl(),
        thresholds=limits,
        num_prompts=len(rows),
        num_positions=len(kl),
        first_difference=first,
        num_texts=len(texts),
        other_texts=other_texts,
        not_asked=tuple(not_asked),
    )
    verdict, reasons = _verdict(measured, limits, template, stop)
    return replace(measured, verdict=verdict, reasons=reasons)


def _verdict(
    found: Parity, limits: Thresholds, template: Difference | None, stop: Difference | None
) -> tuple[Verdict, tuple[str, ...]]:
    assert found.kl_mean is not None and found.kl_max is not None and found.greedy_agreement is not None
    problems = []
    if template is not None:
        problems.append(f"the token ids of a prompt differ: {template}")
    if not found.kl_mean <= limits.kl_mean:
        problems.append(f"mean KL {found.kl_mean:.2e} is above {limits.kl_mean:g}")
    if not found.kl_max <= limits.kl_max:
        problems.append(f"largest KL {found.kl_max:.2e} is above {limits.kl_max:g}")
    if found.greedy_agreement < limits.greedy_agreement:
        problems.append(f"greedy agreement {found.greedy_agreement:.3f} is below {limits.greedy_agreement:g}")
    if found.stops is False:
        problems.append(f"an answer does not end as the model as trained ended it: {stop}")
    if problems:
        return "drift", tuple(problems)
    if found.control_kl is None:
        return "cannot tell", ("there was no base without the adapter to compare with",)
    if not found.control_kl > limits.kl_mean:
        reason = (
            f"the base without the adapter differs by {found.control_kl:.2e} only, no more than an export may"
            f" ({limits.kl_mean:g}): train longer, or with a higher learning rate"
        )
        return "cannot tell", (reason,)
    return "passed", ()


def divergence(live: Tensor, found: Tensor) -> Tensor:
    """KL(live || found) at every position; infinite where the vocabularies have different sizes.

    Shape: (positions, vocab) log-probabilities -> (positions,), float64. Units: nats.
    """
    if live.shape != found.shape:
        return torch.full((len(live),), float("inf"), dtype=torch.float64)
    a, b = live.double().log_softmax(-1), found.double().log_softmax(-1)  # float32 sums to 1 within 1e-3 only
    return (a.exp() * (a - b).clamp(-1e9, 1e9)).sum(-1).clamp(min=0)


def _row(live: Consumer, messages: Messages, max_new_tokens: int, max_positions: int) -> _Row:
    ids = live.tokens(messages)
    answer = live.generate(ids, max_new_tokens)
    positions = max(1, min(len(answer), max_positions))
    log_probs = live.log_probs([*ids, *answer[: positions - 1]], positions)
    return _Row(str(messages[-1]["content"]), ids, answer, log_probs)


def _disagreement(row: _Row, found: Tensor, live: Consumer) -> tuple[int, Difference | None]:
    """At how many positions another token is likeliest, ties aside, and the first of them."""
    count, first = 0, None
    for at, (mine, theirs) in enumerate(
        zip(row.live.argmax(-1).tolist(), found.argmax(-1).tolist(), strict=True)
    ):
        known = theirs < row.live.shape[-1]
        margin = float(row.live[at, mine] - row.live[at, theirs]) if known else float("inf")
        if mine != theirs and margin > TIE_NATS:
            count += 1
            first = first or Difference(
                "greedy", row.prompt, at, live.text([mine]), live.text([theirs]), margin if known else None
            )
    return count, first


def _templates(live: Consumer, consumer: Consumer, conversations: Iterable[Messages]) -> Iterator[Difference]:
    """The prompts that become other ids; one that the live model's template refuses is left out."""
    for messages in conversations:
        try:
            expected = live.tokens(messages)
        except Exception:
            continue  # jinja's own errors and what templates raise: no such turn in this template
        prompt = str(messages[-1]["content"])
        try:
            found = consumer.tokens(messages)
        except Exception as error:
            told = f"an error: {first_line(error)}"
            yield Difference("template", prompt, 0, live.text(expected[:1]), told)
            continue
        if found != expected:
            yield _first_other("template", prompt, expected, found, live.text)


def _first_other(
    kind: Kind,
    prompt: str,
    expected: list[int],
    found: list[int],
    text: Callable[[list[int]], str],
) -> Difference:
    shorter = min(len(expected), len(found))
    at = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
    mine, theirs = (text(ids[at : at + 1]) if at < len(ids) else "(nothing)" for ids in (expected, found))
    return Difference(kind, prompt, at, mine, theirs)


def _stopping(
    live: Consumer, consumer: Consumer, rows: Sequence[_Row], stops: set[int]
) -> tuple[bool | None, Difference | None]:
    """Whether the program's own answers end where the live model ended its own; None where none tells.

    Two answers may part at a tie, which the agreement counts; how the other one then goes on is its own
    matter, unless it is over before it began.
    """
    told = False
    for row in rows:
        expected = row.answer
        if not expected or expected[-1] not in stops:
            continue
        content = expected[:-1]
        found = consumer.generate(row.ids, 2 * len(expected) + 8)
        at_once = len(found) <= 1 < len(expected)
        if found[: len(content)] != content and not at_once:
            continue
        told = True
        rest = found[len(content) :]
        if at_once or len(rest) != 1 or rest[0] not in stops:
            return False, _first_other("stop", row.prompt, expected, found, live.text)
    return (True, None) if told else (None, None)
