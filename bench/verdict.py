"""Whether rows of one group may be compared, and their figures side by side.

Owns the rule. A faster run with another loss is no faster run: where the rule refuses, there is no ranking.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any, Final

Row = Mapping[str, Any]

ROUNDING: Final = 0.01
"""Share of the loss by which honest methods differ with the same seed: order of sums, bf16 of one or the
other. Measured beside it: see docs of `refusals`."""
SMALL: Final = 0.005
"""Nats by which they differ where the loss is next to nothing."""
QUANTIZED: Final = 0.1
"""Share of the loss by which bases of different precision may differ before anything is trained."""
HASH_LETTERS: Final = 12


def refusals(rows: Iterable[Row]) -> list[str]:
    """Why the rows that measured something cannot be compared; empty where they can.

    All are of one group. The rule:

    1. Every row was fed the same tokens and labels, step by step: its own record's hash says so.
    2. Before anything is trained, at the first step, methods on a base of the same precision have the same
       median loss but for rounding: 1% of it and 0.005 nats. Precisions differ by at most 10%. Another
       normalisation, mask or shift of labels fails here.
    3. At every later step the medians of two methods lie no further apart than the seeds of either spread
       (the narrower one, at its widest so far, so that a method that jumps about is not its own excuse), than
       rounding, and than their bases were apart before training. Another learning rate, scale or an adapter
       that learns nothing fails here, once it has taken effect by more than that.
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
    names, found = (one[0], other[0]), (one[1], other[1])
    medians = [[statistics.median(step) for step in _steps(rows)] for rows in found]
    widest = [list(accumulate((max(step) - min(step) for step in _steps(rows)), max)) for rows in found]
    level, same = abs(medians[0][0] - medians[1][0]), found[0][0]["base"] == found[1][0]["base"]
    for at, (a, b) in enumerate(zip(*medians, strict=True)):
        allowed = ROUNDING * max(a, b) + SMALL
        if at == 0 and not same:
            allowed = max(allowed, QUANTIZED * max(a, b))
        elif at > 0:
            allowed += min(width[at] for width in widest) + (0.0 if same else level)
        if abs(a - b) > allowed:
            return (
                f"{names[0]} and {names[1]}: median losses of {a:.4f} and {b:.4f} at step {at + 1}, "
                f"{abs(a - b):.4f} apart where {allowed:.4f} is the most"
            )
    return None


def _steps(rows: Sequence[Row]) -> Iterator[tuple[float, ...]]:
    """The losses of each step, over seeds."""
    return zip(*(row["losses"] for row in rows), strict=True)


# --- figures


def timed(row: Row) -> list[float]:
    """Seconds of the steps that count."""
    seconds: list[float] = row["step_seconds"][row["warmup_steps"] :]
    return seconds


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the two nearest."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (at - math.floor(at)) * (high - low)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of one method's rows, over the timed steps of all its repeats.

    Units: seconds; tokens a second without pads; bytes at their highest over repeats, allocated ones on CUDA.
    """
    seconds = [one for row in rows for one in timed(row)]
    total = sum(seconds)
    peaks = "phases" if rows[0]["allocated"] is None else "allocated"
    return {
        "method": rows[0]["method"],
        "repeats": len(rows),
        "step_seconds": tuple(percentile(seconds, share) for share in (0.5, 0.1, 0.9)),
        **{
            f"{name}_per_second": sum(n for row in rows for n in row[name][row["warmup_steps"] :]) / total
            for name in ("tokens", "supervised_tokens")
        },
        "peak_bytes": max(row[peaks]["train"] for row in rows),
        "linear_bytes": rows[0]["linear_bytes"],
        "trained_parameters": rows[0]["trained_parameters"],
        "load_seconds": statistics.median(row["load_seconds"] for row in rows),
        "mfu": statistics.median(row["mfu"] for row in rows),
        "first_loss": statistics.median(row["losses"][0] for row in rows),
        "final_loss": statistics.median(row["losses"][-1] for row in rows),
    }


HEAD: Final = ("method", "repeats", "step s: median p10 p90", "tokens/s", "supervised/s", "peak GiB")
MORE: Final = ("linears MiB", "trained", "load s", "MFU", "loss: first final")


def table(rows: Iterable[Row], ranked: bool) -> str:
    """The summaries, a line each; the fastest first where they may be ranked."""
    found = [summary(rows) for rows in _by_method(rows).values()]
    if ranked:
        found.sort(key=lambda one: -one["tokens_per_second"])
    lines = [(*HEAD, *MORE), *(_cells(one) for one in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        one["method"],
        str(one["repeats"]),
        " ".join(f"{value:.3f}" for value in one["step_seconds"]),
        f"{one['tokens_per_second']:.1f}",
        f"{one['supervised_tokens_per_second']:.1f}",
        f"{one['peak_bytes'] / 2**30:.2f}",
        f"{one['linear_bytes'] / 2**20:.1f}",
        f"{one['trained_parameters']:,}",
        f"{one['load_seconds']:.1f}",
        f"{one['mfu']:.0%}",
        f"{one['first_loss']:.4f} {one['final_loss']:.4f}",
    )
