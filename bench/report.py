"""Make the tables of docs/adapters.md from what is in bench/results, and from nothing else."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora_phi3.report import format_metric

from . import pages, quality, results

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"
METRICS = ("loss", "exact_match")
NAMED = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries whose versions stand under a table."""

Row = dict[str, Any]


def options(parser: argparse.ArgumentParser) -> None:
    """None: it reads what was measured."""


def run(chosen: argparse.Namespace) -> int:
    PAGE.write_text(pages.fill(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
    print(f"wrote {PAGE.name}")
    return 0


def adapters() -> str:
    """Variants of equal cost on the quickstart, for each machine that measured them."""
    machines = sorted(results.FOLDER.glob("*/quality.jsonl"))
    measured = [_comparable(results.read_file(path), quality.ADAPTERS) for path in machines]
    return "\n".join(_table(rows, quality.ADAPTERS) for rows in measured if rows) or "Not measured yet.\n"


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
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for variant in variants:
        lines.append(_line(_cells({row["seed"]: row for row in rows if row["variant"] == variant})))
    return "\n".join([*lines, "", _origin(rows)]) + "\n"


def _cells(by_seed: dict[int, Row]) -> list[str]:
    """Of one variant. Spread is the largest less the smallest, and one seed has none."""
    rows = [row for _, row in sorted(by_seed.items())]
    cells = [f"`{rows[0]['variant']}`", str(rows[0]["rank"]), f"{rows[0]['trained_parameters']:,}"]
    for name in METRICS:
        values = [row["eval"][name] for row in rows]
        spread = format_metric(name, max(values) - min(values)) if len(values) > 1 else "-"
        cells += [format_metric(name, statistics.median(values)), spread]
        cells.append(", ".join(format_metric(name, value) for value in values))
    return cells


def _origin(rows: Sequence[Row]) -> str:
    """Where the figures of a table come from."""
    versions = {", ".join(f"{name} {row['versions'][name]}" for name in NAMED) for row in rows}
    commits, samples = {row["commit"] for row in rows}, {str(row["eval_samples"]) for row in rows}
    runs = f"{len(rows)} runs on {rows[0]['machine']}, each measured on {_join(samples)} held-out rows"
    return f"{runs}; commit {_join(commits)}; {_join(versions)}."


def _join(found: Iterable[str]) -> str:
    return " and ".join(sorted(found))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


TABLES = {"adapters": adapters}
