"""Tables and blocks of the smaller cases: context per card, data, startup, the quickstart's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from qlora_phi3.units import format_bytes

from . import markdown
from .markdown import NONE, Row, by_machine, newest

MAX_ANSWER: Final = 160
"""Characters of an answer that README shows."""


# --- context


def context_rows() -> dict[tuple[str, str], list[Row]]:
    """(machine, model) -> newest rows of each method and card, predictions before what was measured.

    A prediction is the same everywhere, so only one machine's stand there.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    predicted: dict[str, str] = {}
    for machine, rows in by_machine("context").items():
        for row in newest(rows, "model", "method", "vram_gib", "how"):
            if row["how"] == "predicted" and predicted.setdefault(row["model"], machine) != machine:
                continue
            found.setdefault((machine, row["model"]), []).append(row)
    return found


def context() -> str:
    """Longest row that can be trained, by card."""
    return "\n".join(_context_table(*key, rows) for key, rows in context_rows().items()) or NONE


def _context_table(machine: str, model: str, rows: Sequence[Row]) -> str:
    cards = sorted({row["vram_gib"] for row in rows})
    lines, notes = [], []
    for method, how in dict.fromkeys((row["method"], row["how"]) for row in rows):
        own = {row["vram_gib"]: row for row in rows if (row["method"], row["how"]) == (method, how)}
        lines.append([f"`{method}`", how, *(_tokens(own.get(card)) for card in cards)])
        notes += [
            f"`{method}` at {card} GB, {how}: {row['error']}" for card, row in own.items() if row["error"]
        ]
    columns = ["method", "how", *(f"{card} GB card" for card in cards)]
    one = rows[-1]
    settings = f"rank {one['rank']}, {one['optimizer']}, {one['micro_batch']} row a pass, no layer kept"
    weights = " (random weights of its sizes)" if any(row["how"] == "measured" for row in rows) else ""
    if one["weights"] != "random":
        weights = ""
    where = f"Tokens of {model}{weights}: {settings}"
    notes.append(markdown.origin(f"{where}; on {machine}", rows, ("torch", "bitsandbytes")))
    return markdown.table(columns, lines, notes)


def _tokens(row: Row | None) -> str:
    if row is None:
        return ""
    if row["max_length"] is None:
        return "error" if row["error"] else "none fits"
    if row.get("stopped") or row["error"]:
        return f"at least {row['max_length']:,}"
    at_limit = row["too_long"] is None
    return f"{row['max_length']:,}" + " (the model's limit)" * at_limit


# --- data and startup


def data() -> str:
    """Rows a second and memory, of the newest and largest pass of each step."""
    found = []
    for machine, rows in by_machine("data").items():
        largest = max(row["rows"] for row in rows)
        steps = newest((row for row in rows if row["rows"] == largest), "step")
        found.append(_data_table(machine, steps))
    return "\n".join(found) or NONE


def _data_table(machine: str, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row["step"] == "ratio":
            repeats = len(row["ours_seconds"])
            speed = f"{row['speed_against_raw']:.2f}x of the raw tokenizer's speed, median of {repeats}"
            lines.append(["`ratio`", f"{row['sample_rows']:,}", speed, "", ""])
            continue
        speed, peak = f"{row['rows_per_second']:,} rows/s", format_bytes(row["peak_bytes"])
        lines.append([f"`{row['step']}`", f"{row['rows']:,}", speed, f"{row['seconds']:.1f} s", peak])
    columns = ["step", "rows", "speed", "whole", "peak memory"]
    note = markdown.origin(f"On {machine}", rows, ("tokenizers", "transformers"))
    return markdown.table(columns, lines, [note])


def startup() -> str:
    """Seconds and private memory of the load that fills the cache and of one that reads it."""
    found = []
    for machine, rows in by_machine("startup").items():
        lines = newest(rows, "model", "load", "cold")
        note = markdown.origin(f"On {machine}", lines, ("torch", "transformers", "bitsandbytes"))
        found.append(markdown.table(STARTUP, map(_startup_cells, lines), [note]))
    return "\n".join(found) or NONE


STARTUP: Final = ("model", "load", "median", "loads", "faster", "peak private memory", "cache entry")


def _startup_cells(row: Row) -> list[str]:
    sizes = [format_bytes(row["peak_anonymous_bytes"]), format_bytes(row["entry_bytes"])]
    load = row["load"] + ", files not in memory" * row["cold"]
    speed = f"{row['speed_against_first']:.1f}x"
    return [row["model"], load, f"{row['load_seconds']:.2f} s", str(len(row["loads"])), speed, *sizes]


# --- kernels


def kernels() -> str:
    """Milliseconds and bandwidth of each operation, by shape and what computed it."""
    found = []
    for machine, rows in by_machine("kernels").items():
        named = [row | {"shape": " x ".join(map(str, row["shape"]))} for row in rows]
        lines = newest(named, "operation", "shape", "backend", "device")
        repeats = " or ".join(sorted({str(row["repeats"]) for row in lines}))
        sizes = f"In bfloat16, logits in float32, sizes of {lines[-1]['model']}"
        what = f"{sizes}; {repeats} calls each, on {machine}"
        note = markdown.origin(what, lines, ("torch", "bitsandbytes"))
        found.append(markdown.table(KERNELS, map(_kernel_cells, lines), [note]))
    return "\n".join(found) or NONE


KERNELS: Final = ("operation", "shape", "by", "ms: median (p10-p90)", "GB/s")


def _kernel_cells(row: Row) -> list[str]:
    spread = f"{row['p10_milliseconds']:.2f}-{row['p90_milliseconds']:.2f}"
    by = f"{row['backend']}, {row['device']}"
    speed = f"{row['gigabytes_per_second']:.1f}"
    return [f"`{row['operation']}`", row["shape"], by, f"{row['milliseconds']:.2f} ({spread})", speed]


# --- quickstart


def _quickstart_rows() -> list[Row]:
    """Of the recipe as it is, the newest last."""
    rows = [row for found in by_machine("quickstart").values() for row in found]
    mine = [row for row in rows if row["recipe"] == "quickstart" and not row["overrides"]]
    return sorted(mine, key=lambda row: str(row["utc"]))


def quickstart() -> str:
    """What it prints and how long it takes, of the newest run."""
    rows = _quickstart_rows()
    if not rows:
        return NONE
    row = rows[-1]
    model = "the model already there" if row["model_was_there"] else "fetching the model included"
    took = f"What it printed on {row['machine']}, {row['seconds'] / 60:.1f} min from start to end, {model}:"
    return "\n".join([took, "", "```", *_shown(row["lines"]), "```"]) + "\n"


def _shown(lines: Iterable[str]) -> list[str]:
    """Without the paths at the end; of the lines of training the first, one in the middle, and the last."""
    kept = [line.rstrip() for line in lines if not line.startswith(("adapter ", "report "))]
    steps = [at for at, line in enumerate(kept) if line.startswith("train ")]
    if len(steps) <= 3:
        return kept
    chosen, shown = {steps[0], steps[len(steps) // 2], steps[-1]}, []
    for at, line in enumerate(kept):
        if at not in steps or at in chosen:
            shown.append(line)
        elif shown[-1] != "...":
            shown.append("...")
    return shown


def quickstart_answers() -> str:
    """The first held-out message with both answers, of the newest run."""
    rows = _quickstart_rows()
    if not rows:
        return NONE
    samples = rows[-1]["samples"]
    lines = [["prompt", _one_line(samples["tuned"]["prompt"])]]
    lines += [[name, _one_line(samples[name]["answer"])] for name in ("base", "tuned") if name in samples]
    return markdown.table(("", ""), lines)


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    short = words if len(words) <= MAX_ANSWER else words[:MAX_ANSWER] + " ..."
    return f"`{short.replace('`', chr(39))}`"


def calibration() -> str:
    """The quickstart's full pass beside its prediction."""
    rows = _quickstart_rows()
    if not rows:
        return NONE
    found = rows[-1]["calibration"]
    measured, predicted = found["measured_bytes"], found["predicted_bytes"]
    share = f"{abs(found['drift']):.1%} {'more' if measured > predicted else 'fewer'}"
    what = f"On the quickstart, {format_bytes(measured)} of tensors were {share} than predicted"
    return f"{what} ({rows[-1]['machine']}, commit {rows[-1]['commit']}).\n"
