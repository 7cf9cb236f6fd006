"""Whether rows of one group may be compared.

Owns the rule. A faster run with another loss is no faster run: where the rule refuses, there is no ranking.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any, Final

Row = Mapping[str, Any]

ROUNDING: Final = 0.02
"""Share of the loss by which honest methods on the same precision differ with the same seed: order of sums
in bf16. 1.2% were measured between ours and TRL's on 86 trained tokens of the built-in model."""
SMALL: Final = 0.005
"""Nats by which they differ where the loss is next to nothing."""
PRECISION_LEVEL: Final = 0.35
"""Share of the loss by which bases of different precision differ before training: NF4 cost the built-in
model, which is small, 24%."""
PRECISION_FALL: Final = 0.25
"""Share of the first loss by which their falls differ at a step. In bf16 the first updates of an adapter are
below half a unit of what they are added to, and vanish: on the built-in model bf16 was 16% behind fp32."""
HASH_LETTERS: Final = 12


def refusals(rows: Iterable[Row]) -> list[str]:
    """Why the rows that measured something cannot be compared; empty where they can.

    All are of one group. The rule:

    1. Every row was fed the same tokens and labels, step by step: its own record's hash says so.
    2. Methods on a base of the same precision: at every step their median losses are no further apart than
       the seeds of either spread (the narrower one, at its widest so far, so that a method which jumps about
       is not its own excuse) and rounding, 2% and 0.005 nats. At the first step nothing is trained and the
       seeds do not differ, so that another normalisation, mask or shift of labels fails there; another
       learning rate or scale, or an adapter that learns nothing, as soon as it has an effect beyond that.
    3. Methods on different precisions are other models, and only what no precision explains is refused:
       first losses more than 35% apart, or falls from the first loss, each as a share of its own, that differ
       by more than the spread of seeds and a quarter. `notes` says how far apart they are.
    """
    measured = _by_method(rows)
    streams = {row["token_stream"] for found in measured.values() for row in found}
    if len(streams) > 1:
        return [f"different token streams: {', '.join(_streams(measured))}"]
    broken = [name for name, found in measured.items() if any(_broken(row) for row in found)]
    if broken:
        return [f"{name}: not a loss for every step" for name in broken]
    pairs = combinations(measured.items(), 2)
    return [reason for one, other in pairs if (reason := _apart(one, other)) is not None]


def _by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["error"] is None:
            found.setdefault(row["method"], []).append(row)
    return found


def _streams(measured: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    for name, found in measured.items():
        yield f"{name} {' and '.join(sorted({row['token_stream'][:HASH_LETTERS] for row in found}))}"


def _broken(row: Row) -> bool:
    return len(row["losses"]) != row["steps"] or not all(map(math.isfinite, row["losses"]))


def _apart(one: tuple[str, Sequence[Row]], other: tuple[str, Sequence[Row]]) -> str | None:
    """The first step at which two methods' losses are further apart than the rule allows."""
    if one[1][0]["base"] == other[1][0]["base"]:
        return _same_apart(one, other)
    return _precisions_apart(one, other)


def _same_apart(one: tuple[str, Sequence[Row]], other: tuple[str, Sequence[Row]]) -> str | None:
    a, b, width = _median(one[1]), _median(other[1]), _width(one[1], other[1])
    for at in range(len(a)):
        gap, allowed = abs(a[at] - b[at]), width[at] + ROUNDING * max(a[at], b[at]) + SMALL
        if gap > allowed:
            losses = f"median losses of {a[at]:.4f} and {b[at]:.4f} at step {at + 1}"
            return f"{one[0]} and {other[0]}: {losses}, {gap:.4f} apart where {allowed:.4f} is the most"
    return None


def _precisions_apart(one: tuple[str, Sequence[Row]], other: tuple[str, Sequence[Row]]) -> str | None:
    a, b, width = _median(one[1]), _median(other[1]), _width(one[1], other[1])
    names = f"{one[0]} and {other[0]}, on other precisions"
    if abs(a[0] - b[0]) > PRECISION_LEVEL * max(a[0], b[0]):
        return f"{names}: first losses of {a[0]:.4f} and {b[0]:.4f}, more than {PRECISION_LEVEL:.0%} apart"
    for at in range(len(a)):
        gap, allowed = abs(a[at] / a[0] - b[at] / b[0]), PRECISION_FALL + width[at] / min(a[0], b[0])
        if gap > allowed:
            shares = f"{a[at] / a[0]:.2f} and {b[at] / b[0]:.2f} of their first losses at step {at + 1}"
            return f"{names}: {shares}, {gap:.2f} apart where {allowed:.2f} is the most"
    return None


def notes(rows: Iterable[Row]) -> list[str]:
    """How far apart methods on different precisions are, at the first step and at most."""
    found = []
    for (one, a), (other, b) in combinations(_by_method(rows).items(), 2):
        if a[0]["base"] != b[0]["base"]:
            gaps = [x - y for x, y in zip(_median(a), _median(b), strict=True)]
            most = max(gaps, key=abs)
            how = f"{gaps[0]:+.4f} nats at first, {most:+.4f} at most"
            found.append(f"{one} less {other}, on other precisions: {how}")
    return found


def _median(rows: Sequence[Row]) -> list[float]:
    return [statistics.median(step) for step in _steps(rows)]


def _width(one: Sequence[Row], other: Sequence[Row]) -> list[float]:
    """Spread of the seeds until each step: of the two methods the one whose seeds spread less."""
    widest = [accumulate((max(step) - min(step) for step in _steps(rows)), max) for rows in (one, other)]
    return [min(pair) for pair in zip(*widest, strict=True)]


def _steps(rows: Sequence[Row]) -> Iterator[tuple[float, ...]]:
    """The losses of each step, over seeds."""
    return zip(*(row["losses"] for row in rows), strict=True)


def timed(row: Row) -> list[float]:
    """Seconds of the steps that count."""
    seconds: list[float] = row["step_seconds"][row["warmup_steps"] :]
    return seconds
