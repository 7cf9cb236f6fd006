"""Templates of what people read, and the words that they share. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jinja2

from .errors import printable
from .recipe import GENERATION_METRICS
from .units import format_bytes

MEANINGS: Final = {
    "loss": "per trained token; lower is better",
    "perplexity": "exp(loss); lower is better",
    "exact_match": "answers equal to the expected ones",
    "json_match": "answers in JSON with the expected keys",
}
"""Metric -> what it says, for people who meet it first here."""

MEMORY: Final = {"allocated": "on the GPU", "resident": "of the process"}
"""Kind of a measured peak -> whose memory it is."""


def format_metric(name: str, value: float | None) -> str:
    """A metric for people: a share in percent, anything else in four digits."""
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{value:.1%}" if name in GENERATION_METRICS else f"{value:.4g}"


def measured_on(report: Mapping[str, Any]) -> str:
    """On how many held-out rows each metric was measured, from the content of report.json."""
    if not report["metrics"]:
        return ""
    names = next(iter(report["metrics"].values()))
    data = report["data"]
    rows = data.get("measured_on")  # a report before there was this has one number for both
    total, answered = (rows["loss"], rows["answers"]) if rows else (data["eval_samples"],) * 2
    losses = [name for name in names if name not in GENERATION_METRICS]
    answers = [name for name in names if name in GENERATION_METRICS]
    held_out = f"{'all ' if rows else ''}{total} held-out rows"
    if answered == total or not answers:
        return f"{_joined([*losses, *answers])} on {held_out}"
    drawn = f"{answered} of {'them' if losses else held_out}, drawn by train.seed"
    found = [f"{_joined(losses)} on {held_out}"] if losses else []
    return "; ".join([*found, f"{_joined(answers)} on {drawn}"])


def _joined(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def template(name: str) -> jinja2.Template:
    """A template of the package; a name that it uses and is not given is an error."""
    return environment().get_template(name)


def environment() -> jinja2.Environment:
    """What the templates of the package share."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    made = jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.finalize = _visible
    made.filters["bytes"] = format_bytes
    made.globals |= {
        "format_metric": format_metric,
        "meanings": MEANINGS,
        "memory_of": MEMORY,
        "measured_on": measured_on,
    }
    return made


def _visible(value: Any) -> Any:
    """A text without what is not to be seen, and what turns the order of letters; markup of ours as it is."""
    return printable(value, keep="\n\t") if type(value) is str else value
