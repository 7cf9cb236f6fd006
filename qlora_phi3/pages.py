"""Templates of what people read, and the words that they share. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import jinja2

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
    made.filters["bytes"] = format_bytes
    made.globals |= {"format_metric": format_metric, "meanings": MEANINGS, "memory_of": MEMORY}
    return made
