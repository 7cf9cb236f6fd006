"""What the rows of `bench compare` come to: a block a setting, in it a summary a method, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qlora_phi3.units import format_bytes

from . import markdown, verdict
from .markdown import Row

SETTING: Final = ("model", "device", "max_length", "micro_batch", "effective_batch", "steps", "activations")
"""Runs that differ in one of these, or in the device's name, answer different questions."""

YARDSTICK: Final = "trl-qlora"
"""The method that speeds are told against."""


@dataclass(frozen=True)
class Summary:
    """A method in one setting, over its repeats.

    Units: seconds, tokens per second, bytes; losses in nats per supervised token. `phases` are those of the
    tensors on CUDA, of the resident set on a CPU.
    """

    method: str
    repeats: int
    step_seconds: tuple[float, float, float]
    """Median, p10 and p90 over all timed steps."""
    tokens_per_second: float
    supervised_per_second: float
    spread_per_second: tuple[float, float]
    """Least and most tokens per second of a repeat."""
    phases: dict[str, int]
    load_seconds: float
    linear_bytes: int | None
    mfu: float | None
    final_loss: float
    final_loss_spread: float
    losses: tuple[tuple[float, ...], ...]
    """Of each repeat, step by step."""

    @property
    def peak_bytes(self) -> int:
        return max(self.phases.values())

    @property
    def above_model_bytes(self) -> int:
        """What training takes above the loaded model with its adapters."""
        return max(0, self.phases["train"] - self.phases["attach"])


@dataclass(frozen=True)
class Block:
    """What stands in one table: one run of `bench compare`, whose methods took turns on the same tokens."""

    machine: str
    rows: tuple[Row, ...]
    summaries: tuple[Summary, ...]
    notes: tuple[str, ...]
    """What could not be measured, or not be compared."""

    @property
    def title(self) -> str:
        """Model, device and sizes in words."""
        one = self.rows[-1]
        weights = {"random": " (random weights)"}.get(one.get("weights", ""), "")
        batch = f"{one['micro_batch']} rows a pass, {one.get('effective_batch', '?')} a step"
        sizes = f"rows of at most {one['max_length']} tokens, {batch}"
        how = {"keep": "activations kept", "recompute": "activations recomputed"}
        words = (f"{one['model']}{weights}", one.get("device_name") or one["device"], sizes)
        return ", ".join([*words, how.get(str(one.get("activations")), str(one.get("activations")))])


def blocks() -> list[Block]:
    """Of every setting on every machine the run with the most methods, of such the newest."""
    best: dict[tuple[Any, ...], Block] = {}
    for machine, rows in markdown.by_machine("compare").items():
        runs: dict[Any, list[Row]] = {}
        for row in rows:
            runs.setdefault(row.get("run"), []).append(row)
        for run in runs.values():
            key, block = (machine, *_setting(run)), _block(machine, run)
            if key not in best or len(block.summaries) >= len(best[key].summaries):
                best[key] = block
    return list(best.values())


def _setting(run: Sequence[Row]) -> tuple[Any, ...]:
    names = (row["device_name"] for row in run if row.get("device_name"))
    return (next(names, None), *(run[0].get(key) for key in SETTING))


def _block(machine: str, run: Sequence[Row]) -> Block:
    good, notes = [row for row in run if not row.get("error")], []
    for name in dict.fromkeys(row["method"] for row in run):
        own = [row for row in run if row["method"] == name]
        failed = [str(row["error"]) for row in own if row.get("error")]
        if failed:
            share = "" if len(failed) == len(own) else f" {len(failed)} of {len(own)} times"
            notes.append(f"`{name}` was not measured{share}: {failed[-1]}")
    reasons = verdict.refusals(good)
    if reasons:
        return Block(machine, tuple(run), (), (*notes, f"Refused, not comparable: {'; '.join(reasons)}."))
    names = dict.fromkeys(row["method"] for row in good)
    summaries = tuple(summarise([row for row in good if row["method"] == name]) for name in names)
    return Block(machine, tuple(good or run), summaries, tuple(notes))


def summarise(rows: Sequence[Row]) -> Summary:
    """The repeats of one method in one setting."""
    timed = [_Timed.of(row) for row in rows]
    seconds = [one for repeat in timed for one in repeat.seconds]
    speeds = [repeat.speed(repeat.tokens) for repeat in timed]
    phases = [row.get("allocated") or row["phases"] for row in rows]
    names = [name for name in phases[0] if all(name in one for one in phases)]
    final = [row["losses"][-1] for row in rows]
    return Summary(
        method=rows[0]["method"],
        repeats=len(rows),
        step_seconds=(statistics.median(seconds), *_tenths(seconds)),
        tokens_per_second=statistics.median(speeds),
        supervised_per_second=statistics.median(one.speed(one.supervised) for one in timed),
        spread_per_second=(min(speeds), max(speeds)),
        phases={name: int(statistics.median(one[name] for one in phases)) for name in names},
        load_seconds=statistics.median(row["load_seconds"] for row in rows),
        linear_bytes=rows[-1].get("linear_bytes"),
        mfu=_median(row.get("mfu") for row in rows),
        final_loss=statistics.median(final),
        final_loss_spread=max(final) - min(final),
        losses=tuple(tuple(row["losses"]) for row in rows),
    )


@dataclass(frozen=True)
class _Timed:
    """The steps of one repeat behind its warm-up."""

    seconds: list[float]
    tokens: list[int]
    supervised: list[int]

    @classmethod
    def of(cls, row: Row) -> _Timed:
        keys = ("step_seconds", "tokens", "supervised_tokens")
        return cls(*(row[key][row["warmup_steps"] :] for key in keys))

    def speed(self, counts: list[int]) -> float:
        return sum(counts) / sum(self.seconds)


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    """p10 and p90; of one value itself."""
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


# --- tables

Cell = Callable[[Summary, Block], str]


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _times(summary: Summary, block: Block) -> str:
    """Tokens per second against the yardstick's."""
    other = next((one for one in block.summaries if one.method == YARDSTICK), None)
    return f"{summary.tokens_per_second / other.tokens_per_second:.2f}x" if other else "-"


def _steps(summary: Summary, block: Block) -> str:
    median, low, high = map(_seconds, summary.step_seconds)
    return f"{median} ({low}-{high})"


def _loss(summary: Summary, block: Block) -> str:
    return f"{summary.final_loss:.4f} ({summary.final_loss_spread:.4f})"


COLUMNS: Final[dict[str, Cell]] = {
    "method": lambda summary, block: f"`{summary.method}`",
    "step, s: median (p10-p90)": _steps,
    "tokens/s": lambda summary, block: f"{summary.tokens_per_second:,.0f}",
    "trained on, tokens/s": lambda summary, block: f"{summary.supervised_per_second:,.0f}",
    f"against {YARDSTICK}": _times,
    "peak above the loaded model": lambda summary, block: format_bytes(summary.above_model_bytes),
    "peak, whole": lambda summary, block: format_bytes(summary.peak_bytes),
    "load, s": lambda summary, block: _seconds(summary.load_seconds),
    "linears": lambda summary, block: format_bytes(summary.linear_bytes) if summary.linear_bytes else "-",
    "MFU": lambda summary, block: f"{summary.mfu:.1%}" if summary.mfu is not None else "-",
    "last loss (spread)": _loss,
}
BRIEF: Final = ("method", "tokens/s", f"against {YARDSTICK}", "peak, whole", "linears", "last loss (spread)")
"""README's columns."""


def compare() -> str:
    """All that was compared."""
    return _tables(blocks(), tuple(COLUMNS))


def of_run(rows: Sequence[Row]) -> str:
    """Rows of one run that may be compared, as they stand in docs/bench.md."""
    block = _block("here", rows)
    return markdown.table(tuple(COLUMNS), _lines(block, tuple(COLUMNS)), [])


def brief() -> str:
    """README's choice of it: of each machine and model the setting that most methods were measured in."""
    best: dict[tuple[Any, ...], Block] = {}
    for block in blocks():
        key = (block.machine, block.rows[-1]["model"], block.rows[-1]["device"])
        if key not in best or len(block.summaries) > len(best[key].summaries):
            best[key] = block
    return _tables(list(best.values()), BRIEF)


def _tables(found: Sequence[Block], columns: Sequence[str]) -> str:
    return "\n".join(_table(block, columns) for block in found) or markdown.NONE


def _table(block: Block, columns: Sequence[str]) -> str:
    lines = _lines(block, columns)
    notes = list(block.notes)
    if block.summaries:
        repeats = markdown.join({str(one.repeats) for one in block.summaries})
        warm = f"{block.rows[-1]['steps']} steps, the first {block.rows[-1]['warmup_steps']} not timed"
        what = f"{repeats} repeats of {warm}, on {block.machine}"
        notes.append(markdown.origin(what, block.rows))
    table = markdown.table(columns, lines, notes) if lines else "\n\n".join(notes) + "\n"
    return f"**{block.title}**\n\n{table}"


def _lines(block: Block, columns: Sequence[str]) -> list[list[str]]:
    return [[COLUMNS[name](one, block) for name in columns] for one in block.summaries]
