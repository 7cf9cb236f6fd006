"""What a run came to, for people and for programs: terminal table, report.json, report.html, model card.

Owns the shape of the report. Every view is made from the same RunReport, and only from it.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from errno import EDQUOT, ENOSPC
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import files, json_files, report_page
from .errors import InputError, OutputError, printable
from .export import card
from .findings import graded
from .pages import MEANINGS, MEMORY, format_metric, measured_on
from .units import format_bytes

SHOWN_SAMPLES: Final = 3
"""Answers on the terminal; all are on the page."""

LABEL_WIDTH: Final = 14
MAX_ERROR: Final = 200

T = TypeVar("T")

VERSIONED: Final = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
"""Packages whose version decides what a run computes."""


@dataclass(frozen=True)
class RunReport:
    """Everything worth knowing about one run.

    Units: seconds, bytes, tokens; losses in nats. Paths are names inside the run folder.
    """

    name: str
    description: str
    toolkit_version: str
    finished_utc: str
    engine: dict[str, str]
    machine: dict[str, Any]
    versions: dict[str, str]
    base: dict[str, Any]
    parameters: dict[str, int]
    trained: list[dict[str, Any]]
    data: dict[str, Any]
    training: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    memory: dict[str, Any]
    recipe: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = 1

    def to_json(self) -> dict[str, Any]:
        """As report.json has it; a number that is not finite is null there, since JSON has no NaN."""
        content: dict[str, Any] = _finite(asdict(self))
        return content


def versions() -> dict[str, str]:
    """Installed versions of what a run depends on."""
    return {name: version(name) for name in VERSIONED}


def machine(device: str) -> dict[str, Any]:
    """The computer in words; `device` is "cuda" or "cpu"."""
    found: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
    }
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    return found


def write(report: RunReport, folder: Path) -> None:
    """Write report.json, report.html and the adapter's README.md into a run folder.

    Raises:
        InputError: metrics.jsonl or eval.json is no longer what the run has written.
    """
    content = report.to_json()
    from .export import stops  # which reads tokenizers, and torch with them

    files.write_json(folder / "report.json", content)
    told = {"stop_ids": stops.in_folder(folder / "adapter")}
    licence = "apache-2.0" if report.base["source"] == "builtin" else None  # the others' is in their folder
    about = card.About("adapter", report.name, report.base["base"], told, licence=licence, local=True)
    files.write_text(folder / "adapter" / "README.md", card.render(content, about))
    curves = _whole(folder / "metrics.jsonl", report_page.read_curves)
    answers = _whole(folder / "eval.json", report_page.read_answers)
    files.write_text(folder / "report.html", report_page.render(content, curves, answers))


def rebuild(folder: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """Make report.html anew from what the run folder holds; `say` hears what it has to leave out.

    Raises:
        InputError: the folder holds no report.json, or its files cannot be read or are damaged.
        OutputError: report.html cannot be written.
    """
    if not os.path.lexists(folder / "report.json"):
        raise InputError(str(folder), "holds no report.json.", "Give the folder of a finished run.")
    content = _whole(folder / "report.json", lambda path: report_page.check_keys(json_files.load(path)))
    if content.get("format_version") != RunReport.format_version:
        raise InputError(str(folder), "holds a report of another version.", "Run the recipe again.")
    trained = bool(content["training"].get("num_steps"))
    curves = _whole(folder / "metrics.jsonl", lambda path: _curves(path, trained))
    answers = _whole(folder / "eval.json", report_page.read_answers)
    html = _whole(folder / "report.json", lambda _: report_page.render(content, curves, answers))
    lost = {"metrics.jsonl": "curve of losses", **({"eval.json": "answers"} if content["metrics"] else {})}
    for name, what in lost.items():
        if not os.path.lexists(folder / name):
            say(f"note: {folder / name} is missing: the page has no {what}")
    target = folder / "report.html"
    try:
        files.write_text(target, html)
    except OSError as error:
        raise OutputError(
            str(target), f"cannot be written: {error.strerror}.", _way_to_write(target, error)
        ) from None
    return target


def _curves(path: Path, trained: bool) -> dict[str, list[report_page.Point]]:
    """The losses of metrics.jsonl, which a run that trained has written lines into."""
    if trained and path.is_file() and path.stat().st_size == 0:
        raise ValueError("it is empty")
    return report_page.read_curves(path)


def _whole(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` finds in a file of the run.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    spare = "run the recipe again" if path.name == "report.json" else "move it away to do without it"
    remedy = f"Copy it again from where the run was made, or {spare}; the adapter is not concerned."
    try:
        return read(path)
    except OSError as error:
        reason = f"cannot be read: {json_files.said(error)}."
        raise InputError(str(path), reason, json_files.way_on(error, remedy)) from None
    except ValueError as error:
        raise InputError(str(path), f"is damaged: {shown_error(error)}.", remedy) from None


def _way_to_write(target: Path, error: OSError) -> str:
    if target.is_dir():
        return "Move that folder away."
    return "Make room on the disk." if error.errno in (ENOSPC, EDQUOT) else "Check its permissions."


def shown_error(error: Exception) -> str:
    """What a library says of a damaged file, in one line that is not longer than the rest."""
    text = printable(str(error)) or type(error).__name__
    return text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."


def show(report: RunReport, folder: Path, console: Console) -> None:
    """The closing tables: before and after, some answers, and what it took."""

    def say(text: str) -> None:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    if report.metrics:
        models = " and ".join(report.metrics)
        say(f"{report.name}: {models} model on held-out rows")
        console.print(_metrics_table(report))
        say(measured_on(asdict(report)))
        say("")
        _show_answers(report_page.read_answers(folder / "eval.json"), console, say)
    say("what it took")
    console.print(_run_table(report))
    for note in report.notes:
        say(graded(note))
    say(f"adapter  {folder / 'adapter'}")
    for one in report.exports:
        size = format_bytes(sum(one["files"].values()))
        say(f"{one['target']}  {folder / one['folder']}  {size}")
    say(f"report   {folder / 'report.html'}")
    say("")
    for what, how in _next_steps(report, folder):
        say(f"{what}  {how}")


def _next_steps(report: RunReport, folder: Path) -> Iterator[tuple[str, str]]:
    """What users do after a run, each with what to type or to open."""
    run, again = shlex.quote(str(folder)), shlex.quote(f"adapter.init={folder / 'adapter'}")
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    yield "next: look at it   ", f"open {folder / 'report.html'} in a browser"
    yield (
        "      use it       ",
        f"{folder / 'adapter' / 'README.md'} has Python to run in {folder}",
    )
    if not report.exports:
        yield (
            "      elsewhere    ",
            f"python -m qlora_phi3 export {run} --to gguf:q8_0   (llama.cpp; docs/export.md)",
        )
    yield "      train more   ", f"python -m qlora_phi3 recipe {recipe} {again}"


def _show_answers(answers: report_page.Answers, console: Console, say: Callable[[str], None]) -> None:
    if not answers.samples:
        if answers.why_none:
            say(f"no answers to show: {answers.why_none}")
            say("")
        return
    shown, total = answers.samples[:SHOWN_SAMPLES], len(answers.samples)
    say(
        f"answers to held-out rows, {len(shown)} of {total}" + ("; all in report.html" * (len(shown) < total))
    )
    say("")
    for sample in shown:
        console.print(_answers_table(sample, answers.models, console))
        say("")


def _answers_table(sample: Mapping[str, Any], models: Sequence[str], console: Console) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=LABEL_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    room = 2 * max(20, console.width - LABEL_WIDTH - 4)
    rows = {"asked": sample["asked"], "expected": sample["expected"]}
    for model in models:
        given = sample[model]
        label = f"{model} (same)" if given["same"] else f"{model} (cut)" if given["cut"] else model
        rows[label] = given["text"]
    for label, text in rows.items():
        table.add_row(f"  {label}", Text(_cut(text, room, console.encoding)))
    return table


def _cut(text: str, room: int, encoding: str) -> str:
    """A text for a terminal that writes in `encoding`, in so many columns at most."""
    # a column is one character at least: what is far beyond need not be looked at
    line = printable(text[: 2 * room]).encode(encoding, "backslashreplace").decode(encoding)
    if len(text) <= 2 * room and cell_len(line) <= room:
        return line
    return f"{set_cell_size(line, room - 4).rstrip()} ..."


def _metrics_table(report: RunReport) -> Table:
    table = Table("metric", box=box.SIMPLE_HEAD)
    for which in report.metrics:
        table.add_column(which, justify="right")
    table.add_column("")
    for name in next(iter(report.metrics.values())):
        values = (format_metric(name, found[name]) for found in report.metrics.values())
        table.add_row(name, *values, MEANINGS.get(name, ""))
    return table


def _run_table(report: RunReport) -> Table:
    table = Table("what", "how much", show_header=False, box=box.SIMPLE)
    table.columns[1].justify = "right"
    training, measured = report.training, report.memory["measured"]
    table.add_row("steps", f"{training['num_steps']}")
    table.add_row("loss, first and last step", f"{training['first_loss']:.4f} -> {training['last_loss']:.4f}")
    table.add_row(
        "tokens (of them trained on)", f"{training['num_tokens']:,} ({training['num_supervised_tokens']:,})"
    )
    table.add_row("tokens per second", f"{training['tokens_per_second']:,.0f}")
    parameters = report.parameters
    share = parameters["trainable"] / parameters["total"]
    table.add_row(
        "trained parameters", f"{parameters['trainable']:,} ({share:.2%} of {parameters['total']:,})"
    )
    peak = max(use["peak_bytes"] for use in measured["phases"].values())
    table.add_row(f"peak memory {MEMORY[measured['kind']]}", format_bytes(peak))
    # the process' memory holds Python and its libraries, the allocator's only tensors
    counted = "peak_bytes" if measured["kind"] == "allocated" else "needed_bytes"
    table.add_row("peak memory, predicted", format_bytes(report.memory["predicted"][counted]))
    found = report.memory["calibration"]
    sizes = (format_bytes(found[key]) for key in ("predicted_bytes", "measured_bytes"))
    table.add_row("a full pass, predicted -> measured", " -> ".join(sizes))
    for name, use in measured["phases"].items():
        table.add_row(f"time: {name}", f"{use['seconds']:.1f} s")
    return table


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
