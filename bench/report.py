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
    """Rows of the variants as they are defined now, on the quickstart as it was measured last."""
    overrides = {name: [*quality.SHARED, *quality.VARIANTS[name]] for name in variants}
    found = [row for row in rows if row["recipe"] == "quickstart"]
    found = [row for row in found if row["overrides"] == overrides.get(row["variant"])]
    return [row for row in found if row["recipe_sha256"] == found[-1]["recipe_sha256"]]


def _table(rows: Sequence[Row], variants: Sequence[str]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    by_seed = f"seeds {', '.join(map(str, seeds))}"
    columns = ["variant", "rank", "trained parameters"]
    columns += [column for name in METRICS for column in (f"{name}: median", "spread", by_seed)]
    lines = [_line(columns), "|" + "---|" * len(columns)]
    for variant in variants:
        found = {row["seed"]: row for row in rows if row["variant"] == variant}
        if found:
            lines.append(_line(_cells(variant, found, seeds)))
    return "\n".join([*lines, "", _origin(rows)]) + "\n"


def _cells(variant: str, found: dict[int, Row], seeds: Sequence[int]) -> list[str]:
    """Spread is the largest less the smallest; a dash stands for a seed without a run."""
    one = next(iter(found.values()))
    cells = [f"`{variant}`", str(one["rank"]), f"{one['trained_parameters']:,}"]
    for name in METRICS:
        values = {seed: row["eval"][name] for seed, row in found.items()}
        spread = max(values.values()) - min(values.values())
        cells += [format_metric(name, statistics.median(values.values())), format_metric(name, spread)]
        cells.append(", ".join(format_metric(name, values[s]) if s in values else "-" for s in seeds))
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
