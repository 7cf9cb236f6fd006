"""What a run came to, for people and for programs: terminal table, report.json, report.html, model card.

Owns the shape of the report. Every view is made from the same RunReport, and only from it.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from .errors import InputError, OutputError
from .export import card
from .pages import MEANINGS, MEMORY, format_metric, template
from .units import format_bytes

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
    import os

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
    """Write report.json, report.html and the adapter's README.md into a run folder."""
    content = report.to_json()
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    from .export import stops  # which reads tokenizers, and torch with them

    told = {"stop_ids": stops.in_folder(folder / "adapter")}
    about = card.About("adapter", report.name, report.base["base"], told, local=True)
    (folder / "adapter" / "README.md").write_text(card.render(content, about), encoding="utf-8")
    (folder / "report.html").write_text(_html(content, folder), encoding="utf-8")


def rebuild(folder: Path) -> Path:
    """Make report.html anew from what the run folder holds.

    Raises:
        InputError: the folder holds no report.json, or its files are damaged.
        OutputError: report.html cannot be written.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if report["format_version"] != RunReport.format_version:
            raise InputError(str(folder), "holds a report of another version.", "Run the recipe again.")
        html = _html(report, folder)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(str(folder), "holds no report.json.", "Give the folder of a finished run.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        reason = f"its report.json, metrics.jsonl or eval.json is damaged: {error}."
        raise InputError(str(folder), reason, "Run the recipe again.") from None
    target = folder / "report.html"
    try:
        target.write_text(html, encoding="utf-8")
    except OSError as error:
        reason = f"cannot be written: {error.strerror}."
        raise OutputError(str(target), reason, "Check its permissions.") from None
    return target


def show(report: RunReport, folder: Path, console: Console) -> None:
    """The closing tables: before and after, and what it took."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if report.metrics:
        say(f"{report.name}: base and tuned model on {report.data['eval_samples']} held-out rows")
        console.print(_metrics_table(report))
    say("what it took")
    console.print(_run_table(report))
    for note in report.notes:
        say(f"note: {note}")
    say(f"adapter  {folder / 'adapter'}")
    for one in report.exports:
        size = format_bytes(sum(one["files"].values()))
        say(f"{one['target']}  {folder / one['folder']}  {size}")
    say(f"report   {folder / 'report.html'}")


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


def _html(report: dict[str, Any], folder: Path) -> str:
    lines = _json_lines(folder / "metrics.jsonl")
    curves = {name: _curve(lines, key) for name, key in (("training", "loss"), ("held-out", "eval_loss"))}
    return template("report.html.j2").render(
        report=report,
        curves={name: points for name, points in curves.items() if points},
        samples=_samples(folder / "eval.json"),
    )


def _curve(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, loss) of the lines that have a finite one."""
    return [
        (line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _samples(path: Path) -> list[Mapping[str, Any]]:
    """Held-out questions with the answers of each model that was measured, side by side."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    tuned = found.get("tuned", {}).get("samples", [])
    base = found.get("base", {}).get("samples", [{}] * len(tuned))
    return [{"base": b.get("answer", ""), **t} for b, t in zip(base, tuned, strict=True)]
