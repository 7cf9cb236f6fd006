"""Make tables and plots of what is in bench/results, and of nothing else, for README and docs/."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from . import compare_table, engine_table, pages, plots, quality_table, tables

_ROOT = Path(__file__).parent.parent
PAGES = (
    _ROOT / "README.md",
    *(_ROOT / "docs" / f"{name}.md" for name in ("adapters", "memory", "bench", "engine", "recipe")),
)
TABLES: Final = {
    "adapters": quality_table.adapters,
    "precision": quality_table.precision,
    "compare": compare_table.compare,
    "compare_brief": compare_table.brief,
    "context": tables.context,
    "engine": engine_table.engine,
    "data": tables.data,
    "startup": tables.startup,
    "kernels": tables.kernels,
    "quickstart": tables.quickstart,
    "quickstart_answers": tables.quickstart_answers,
    "calibration": tables.calibration,
    "plots": plots.plots,
}
"""Generated part of a page -> what makes it."""


def options(parser: argparse.ArgumentParser) -> None:
    """None: it reads what was measured."""


def run(chosen: argparse.Namespace) -> int:
    plots.write()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(pages.fill(text, TABLES, partly=True), encoding="utf-8")
    print(f"wrote {', '.join(page.name for page in PAGES)} and the plots")
    return 0
