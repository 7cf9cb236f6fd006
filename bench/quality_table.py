"""The table of `bench quality`: variants of equal cost, on the same task and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from qlora_phi3.report import format_metric

from . import markdown, quality
from .markdown import Row

METRICS = ("loss", "exact_match")
PRECISION = ("qlora", "lora-bf16")
"""Variants that differ in the base's precision alone."""
REFERENCE = "full"
"""What stands beside them where it was measured."""


def adapters() -> str:
    """Variants of equal cost on the quickstart, for each machine that measured them."""
    return _tables(quality.ADAPTERS)


def precision() -> str:
    """A quantized beside an unquantized base on the quickstart, and full fine-tuning where there is one."""
    with_reference = _tables((*PRECISION, REFERENCE))
    return _tables(PRECISION) if with_reference == markdown.NONE else with_reference


def _tables(variants: Sequence[str]) -> str:
    measured = [_comparable(rows, variants) for rows in markdown.by_machine("quality").values()]
    return "\n".join(_table(rows, variants) for rows in measured if rows) or markdown.NONE


def _comparable(rows: Iterable[Row], variants: Sequence[str]) -> list[Row]:
    """Rows of the variants as they are defined now, on the quickstart as it was measured last.

    Of seeds that all variants have: a median over others would compare seeds, not variants.
    """
    overrides = {name: [*quality.SHARED, *quality.VARIANTS[name]] for name in variants}
    found = [row for row in rows if row["recipe"] == "quickstart"]
    found = [row for row in found if row["overrides"] == overrides.get(row["variant"])]
    found = [row for row in found if row["recipe_sha256"] == found[-1]["recipe_sha256"]]
    there = {(row["variant"], row["seed"]) for row in found}
    return [row for row in found if all((name, row["seed"]) in there for name in variants)]


def _table(rows: Sequence[Row], variants: Sequence[str]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    by_seed = f"seeds {', '.join(map(str, seeds))}"
    columns = ["variant", "rank", "trained parameters"]
    columns += [column for name in METRICS for column in (f"{name}: median", "spread", by_seed)]
    lines = [_cells({row["seed"]: row for row in rows if row["variant"] == name}) for name in variants]
    samples = markdown.join({str(row["eval_samples"]) for row in rows})
    what = f"{len(rows)} runs on {rows[0]['machine']}, each measured on {samples} held-out rows"
    return markdown.table(columns, lines, [markdown.origin(what, rows)])


def _cells(by_seed: dict[int, Row]) -> list[str]:
    """Of one variant. Spread is the largest less the smallest, and one seed has none."""
    rows = [row for _, row in sorted(by_seed.items())]
    one = rows[0]
    cells = [f"`{one['variant']}`", str(one["rank"] or "-"), f"{one['trained_parameters']:,}"]
    for name in METRICS:
        values = [row["eval"][name] for row in rows]
        spread = format_metric(name, max(values) - min(values)) if len(values) > 1 else "-"
        cells += [format_metric(name, statistics.median(values)), spread]
        cells.append(", ".join(format_metric(name, value) for value in values))
    return cells
