"""The table of both engines' passes, of engine.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from qlora_phi3.units import format_bytes

from . import markdown
from .engine import WAYS
from .markdown import NONE, Row, by_machine, newest


def engine() -> str:
    """Each way beside the first of WAYS."""
    return "\n".join(_table(machine, rows) for machine, rows in by_machine("engine").items()) or NONE


def _table(machine: str, every: Sequence[Row]) -> str:
    known = {row["way"]: row for row in newest(every, "way")}
    rows = [known[name] for name in WAYS if name in known]
    first = statistics.median(rows[0]["seconds"])
    lines = [_line(row, first) for row in rows]
    columns = (
        "layers",
        "s a pass: median (least-most)",
        "speed",
        "tensors beside the model",
        "FLOPs a weight and token",
    )
    one = rows[-1]
    what = f"One pass of {one['rows']} chats, {one['tokens']} tokens, of the built-in model on {machine}"
    repeats = f"{len(one['seconds'])} passes each, by turns"
    return markdown.table(columns, lines, [markdown.origin(f"{what}; {repeats}", rows)])


def _line(row: Row, first: float) -> list[str]:
    seconds, flops = row["seconds"], row["linear_flops"]
    median = statistics.median(seconds)
    return [
        row["way"],
        f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
        f"{first / median:.2f}x",
        format_bytes(row["peak_bytes"]),
        f"{flops:.2f}" if flops is not None else "-",
    ]
