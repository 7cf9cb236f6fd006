"""What a run came to, for people and for programs: terminal table, report.json, report.html, model card.

Owns the shape of the report. Every view is made from the same RunReport, and only from it.
"""

from __future__ import annotations

import json
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

from .errors import InputError
from .memory import format_bytes

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
    format_version: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    rebuild(folder)
    card = _template("card.md.j2").render(report=report.to_json())
    (folder / "adapter" / "README.md").write_text(card, encoding="utf-8")


def rebuild(folder: Path) -> Path:
    """Make report.html anew from what the run folder holds.

    Raises:
        InputError: the folder holds no readable report.json.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(folder), "holds no report.json.", "Give the folder of a finished run.") from None
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"cannot be read: {error}.", "Run the recipe again.") from None
    if not isinstance(report, dict) or report.get("format_version") != 1:
        raise InputError(str(path), "is no report of this version.", "Run the recipe again.")
    lines = _json_lines(folder / "metrics.jsonl")
    samples = _samples(folder / "eval.json")
    html = _template("report.html.j2").render(
        report=report, lines=[line for line in lines if "loss" in line], samples=samples
    )
    target = folder / "report.html"
    target.write_text(html, encoding="utf-8")
    return target


def show(report: RunReport, folder: Path, console: Console) -> None:
    """The closing tables: before and after, and what it took."""
    if report.metrics:
        console.print(_metrics_table(report))
    console.print(_run_table(report))
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"adapter  {folder / 'adapter'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report   {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _metrics_table(report: RunReport) -> Table:
    rows = report.data["eval_samples"]
    table = Table(title=f"{report.name}: {rows} held-out rows", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    for which in report.metrics:
        table.add_column(which, justify="right")
    for name in next(iter(report.metrics.values())):
        table.add_row(name, *(f"{values[name]:.4g}" for values in report.metrics.values()))
    return table


def _run_table(report: RunReport) -> Table:
    table = Table(title="what it took", title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column("what")
    table.add_column("how much", justify="right")
    training, measured = report.training, report.memory["measured"]
    table.add_row("steps", f"{training['num_steps']}")
    table.add_row("loss, first and last step", f"{training['first_loss']:.4f} -> {training['last_loss']:.4f}")
    table.add_row(
        "tokens (supervised)", f"{training['num_tokens']:,} ({training['num_supervised_tokens']:,})"
    )
    table.add_row("tokens per second", f"{training['tokens_per_second']:.0f}")
    parameters = report.parameters
    share = parameters["trainable"] / parameters["total"]
    table.add_row(
        "trained parameters", f"{parameters['trainable']:,} ({share:.2%} of {parameters['total']:,})"
    )
    peak = max(use["peak_bytes"] for use in measured["phases"].values())
    table.add_row(f"peak memory ({measured['kind']})", format_bytes(peak))
    for name, use in measured["phases"].items():
        table.add_row(f"time: {name}", f"{use['seconds']:.1f} s")
    return table


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = format_bytes
    return environment.get_template(name)


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
