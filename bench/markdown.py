"""Pieces of Markdown tables of results, and the line under each that says where its figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import results

Row = dict[str, Any]

NONE = "Not measured yet.\n"
"""What stands in place of a table without rows."""

NAMED = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries whose versions stand under a table."""


def by_machine(case: str) -> dict[str, list[Row]]:
    """Machine -> rows of the case there, oldest first."""
    paths = sorted(results.FOLDER.glob(f"*/{case}.jsonl"))
    return {path.parent.name: results.read_file(path) for path in paths}


def table(columns: Sequence[str], lines: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Each of the `notes` is a paragraph behind it."""
    head = [line(columns), "|" + "---|" * len(columns)]
    return "\n".join([*head, *map(line, lines), *(f"\n{note}" for note in notes)]) + "\n"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def origin(what: str, rows: Sequence[Row], named: Sequence[str] = NAMED) -> str:
    """Where the figures of a table come from: `what`, commits, versions."""
    commits = {row["commit"] for row in rows}
    versions = {
        ", ".join(f"{name} {row['versions'][name]}" for name in named if name in row["versions"])
        for row in rows
    }
    return f"{what}; commit {join(commits)}; {join(versions)}."


def join(found: Iterable[str]) -> str:
    return " and ".join(sorted(found))


def newest(rows: Iterable[Row], *keys: str) -> list[Row]:
    """The last row of each combination of the keys' values, in the order of their first."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[tuple(row.get(key) for key in keys)] = row
    return list(found.values())
