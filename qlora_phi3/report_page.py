"""report.html: all of a run on one page, made from what its folder holds.

Owns reading metrics.jsonl and eval.json back, and the drawing of losses. A file that is not as a run writes
it is refused by name and line. Paths of this machine become names: a page is for others too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

from . import json_files, strict_yaml
from .errors import shown
from .export import card
from .pages import template

Point = tuple[int, float]

LEFT, RIGHT, TOP, BOTTOM = 50, 790, 10, 210
"""Edges of the drawing. Units: of its view box, y downwards."""

LOG_FROM: Final = 10
"""How many times the lowest loss the highest must be for a logarithmic axis."""

MAX_TICKS: Final = 6
_UNUSUAL: Final = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    jinja2.TemplateError,
)
"""What a template raises of values of another kind."""
MAX_LOG_BYTES: Final = 2**30
"""Of metrics.jsonl, some 200 bytes a step, and of eval.json with all its answers."""


@dataclass(frozen=True)
class Answers:
    """What was asked of both models, side by side; `why_none` where there is nothing."""

    samples: list[Mapping[str, Any]]
    why_none: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """Those that answered: no base that is not compared, no tuned one of a run that was stopped."""
        return tuple(name for name in ("base", "tuned") if any(name in one for one in self.samples))

    def count(self, model: str, key: str) -> int:
        """Answers of a model that have `key`: "same" as expected, or "cut" at the limit."""
        return sum(sample[model][key] for sample in self.samples)


@dataclass(frozen=True)
class Plot:
    """Losses by step, as a drawing: the points of each curve, and (text, place) of each mark on the axes.

    `ends`: first and last (step, loss) of each curve.
    """

    curves: dict[str, str]
    ends: dict[str, tuple[Point, Point]]
    y_ticks: list[tuple[str, float]]
    x_ticks: list[tuple[str, float]]


def render(report: Mapping[str, Any], curves: Mapping[str, Sequence[Point]], answers: Answers) -> str:
    """The page of a run whose report.json has this content.

    Raises:
        ValueError: what is in it is not a run's; says at which key.
    """
    public = card.without_paths(report)
    read: list[str] = []
    try:
        return template("report.html.j2").render(
            report=_Followed(public, read),
            plot=plot(curves),
            answers=answers,
            recipe=strict_yaml.dump(public["recipe"]),
        )
    except _Lost:
        raise
    except _UNUSUAL:
        raise ValueError(f"{'.'.join(read) or 'recipe'} is not as a run writes it") from None


class _Lost(ValueError):
    """A key that the page shows is missing. No LookupError, of which jinja makes a value without a name."""


class _Followed(dict[str, Any]):
    """An object that notes in `read` the keys on the way to the value that was asked for last."""

    def __init__(self, content: Mapping[str, Any], read: list[str], above: tuple[str, ...] = ()) -> None:
        self._read, self._above = read, above
        super().__init__(
            (key, _Followed(one, read, (*above, key)) if isinstance(one, dict) else one)
            for key, one in content.items()
        )

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise _Lost(f"{'.'.join([*self._above, key])} is missing")
        self._read[:] = [*self._above, key]
        return super().__getitem__(key)


def read_curves(path: Path) -> dict[str, list[Point]]:
    """(step, loss) of training and held-out rows, of the lines with a finite one; none without the file.

    Raises:
        OSError: it is there and cannot be read.
        ValueError: a line of it is not as a run writes it.
    """
    names = {"training": "loss", "held-out": "eval_loss"}
    found: dict[str, list[Point]] = {name: [] for name in names}
    for place, line in _lines(path):
        step = _step(line.get("step"), place)
        if not any(key in line for key in names.values()):
            raise ValueError(f"{place} has neither loss nor eval_loss")
        for name, key in names.items():
            if line.get(key) is not None:
                point = (step, _number(line[key], f"{place}: {key}"))
                found[name] += [point] if math.isfinite(point[1]) else []
    return {name: points for name, points in found.items() if points}


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not os.path.lexists(path):
        return
    for number, text in enumerate(json_files.read_text(path, MAX_LOG_BYTES).splitlines(), start=1):
        place = f"line {number}"
        if not text.strip():
            continue
        try:
            line = json_files.parse(text)
        except json_files.NotJson:
            raise ValueError(f"{place} is not JSON") from None
        if not isinstance(line, dict):
            raise ValueError(f"{place} is not a JSON object")
        yield place, line


def _step(value: object, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError(f"{place} has no step")
    return value


def _number(value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{place} is not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{place} has too many digits") from None


def read_answers(path: Path) -> Answers:
    """The samples of eval.json; none without the file, as where nothing was held out.

    Raises:
        OSError: it is there and cannot be read.
        ValueError: it is not as a run writes it; says at which key.
    """
    if not os.path.lexists(path):
        return Answers([])
    found = json_files.load(path, MAX_LOG_BYTES)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    measured = {model: _value(found, model, dict) for model in ("base", "tuned") if model in found}
    if not measured:
        raise ValueError("it has neither base nor tuned")
    why = next((str(one["no_samples"]) for one in measured.values() if one.get("no_samples")), "")
    columns = {model: _samples(one, model) for model, one in measured.items()}
    if why or not any(columns.values()):
        return Answers([], why)
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("base and tuned have not equally many samples")
    rows = zip(*columns.values(), strict=True)
    return Answers([_side_by_side(dict(zip(columns, row, strict=True))) for row in rows], why)


_SAMPLE: Final = {"prompt": str, "expected": str, "answer": str, "exact_match": bool, "stopped": bool}
"""What the page shows of a sample."""


def _samples(measured: Mapping[str, Any], model: str) -> list[Mapping[str, Any]]:
    found: list[Any] = _value(measured, "samples", list, f"{model}: ")
    for number, sample in enumerate(found):
        place = f"{model}: samples[{number}]"
        if not isinstance(sample, dict):
            raise ValueError(f"{place} is not an object")
        for key, kind in _SAMPLE.items():
            _value(sample, key, kind, f"{place}: ")
    return found


def _value(content: Mapping[str, Any], key: str, kind: type, place: str = "") -> Any:
    if key not in content:
        raise ValueError(f"{place}{key} is missing")
    if not isinstance(content[key], kind):
        raise ValueError(f"{place}{key} is {shown(content[key])}, not {_KINDS[kind]}")
    return content[key]


_KINDS: Final = {str: "a text", bool: "true or false", dict: "an object", list: "a list"}


def check_keys(report: object) -> dict[str, Any]:
    """The content of a report.json, with every key that the page begins at.

    Raises:
        ValueError: one is missing, or of another kind.
    """
    if not isinstance(report, dict):
        raise ValueError("it is not a JSON object")
    for key in ("name", "description", "finished_utc"):
        _value(report, key, str)
    for key in ("machine", "base", "parameters", "data", "training", "metrics", "memory", "recipe"):
        _value(report, key, dict)
    return report


def _side_by_side(row: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One question, and of each model its answer, whether it is the expected one, whether it was cut."""
    one = next(iter(row.values()))
    answers = {
        model: {"text": given["answer"], "same": given["exact_match"], "cut": not given["stopped"]}
        for model, given in row.items()
    }
    return {"asked": one["prompt"], "expected": one["expected"], **answers}


def plot(curves: Mapping[str, Sequence[Point]]) -> Plot | None:
    """The drawing; None where there is no line to draw. Logarithmic where the losses lie far apart."""
    if not curves or max(map(len, curves.values())) < 2:
        return None
    points = [point for found in curves.values() for point in found]
    last = max(1, *(step for step, _ in points))
    lowest, highest = min(loss for _, loss in points), max(loss for _, loss in points)
    logarithmic = lowest > 0 and highest / lowest >= LOG_FROM
    bottom, top = (lowest, highest) if logarithmic else (min(0.0, lowest), max(highest, 0.0) or 1.0)

    def at(loss: float) -> float:
        if logarithmic:
            share = math.log(loss / bottom) / math.log(top / bottom)
        else:
            share = loss / (top - bottom) - bottom / (top - bottom)
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    def across(step: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / last, 1)

    lines = {
        name: " ".join(f"{across(step)},{at(loss)}" for step, loss in found) for name, found in curves.items()
    }
    ticks = _log_ticks(bottom, top) if logarithmic else [bottom, (bottom + top) / 2, top]
    steps = sorted({0, last // 2, last})
    return Plot(
        lines,
        {name: (found[0], found[-1]) for name, found in curves.items()},
        [(f"{loss:.3g}", at(loss)) for loss in ticks],
        [(f"{step:,}", across(step)) for step in steps],
    )


def _log_ticks(bottom: float, top: float) -> list[float]:
    """Round numbers between the two: 1, 2 and 5 of each power of ten, or fewer where that is many."""
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        inside = [tick for tick in ticks if bottom <= tick <= top]
        if len(inside) <= MAX_TICKS:
            return inside
    return inside[:: math.ceil(len(inside) / MAX_TICKS)]
