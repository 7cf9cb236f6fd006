"""What `doctor` does: check this machine, or the rows and tokens of a recipe, before a run spends hours.

Owns the order of the checks and how they are shown. Changes nothing and trains nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import builtin, environment, memory, phi3, recipe_checks, weights
from .findings import GRADES, SHOWN_PLACES, Finding
from .recipe import Recipe
from .report import VERSIONED
from .units import format_bytes

if TYPE_CHECKING:
    from .data.figures import Piece, Summary

TRAINED_STYLES: Final = ("black on green", "black on bright_green")
OTHER_STYLES: Final = ("default", "reverse dim")
"""Two of each by turns, so that every token is seen."""

BAR_WIDTH: Final = 30
_DRIVING: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tabs and new lines, half characters, and those that turn the direction of a text."""


@dataclass(frozen=True)
class Sample:
    """A training row, token by token."""

    place: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Checkup:
    """All that was found, of the machine or of a recipe's data."""

    name: str
    findings: tuple[Finding, ...]
    machine: dict[str, Any] | None = None
    splits: Mapping[str, Summary] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    def count(self, grade: str) -> int:
        return sum(finding.grade == grade for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "machine": self.machine,
            "splits": {name: split.to_json() for name, split in self.splits.items()},
            "findings": [finding.to_json() for finding in self.findings],
            "samples": [asdict(sample) for sample in self.samples],
        }


def check_machine() -> Checkup:
    """This machine: versions, device, bitsandbytes, memory, disk."""
    folders = {"our cache": builtin.cache_root(), "working folder": Path.cwd()}
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        folders["hub cache"] = Path(HF_HUB_CACHE)
    except ImportError:  # no run works without it, but the other checks do
        pass
    found = environment.inspect(VERSIONED, folders)
    return Checkup("this machine", by_grade(found.findings), machine=found.facts)


def check_recipe(recipe: Recipe, num_samples: int, say: Callable[[str], None]) -> Checkup:
    """The recipe's rows with the base's own tokenizer, as a run would tokenize them.

    Raises:
        DataError: a source is missing.
        RecipeError: it asks for more than the base has.
        ModelError: the base or its tokenizer cannot be used.
    """
    from . import data, model
    from .data import figures

    data.check_files(recipe.data)
    folder = weights.locate_tokenizer(recipe.model, say)
    recipe_checks.check_base(recipe, _geometry(folder))
    tokenizer = model.load_tokenizer(folder)
    found = data.prepare(recipe.data, tokenizer, recipe.train, recipe.evaluate)
    known = found.parts["train"].rows.fullest_step(recipe.train.effective_batch)
    settings = (recipe.data.max_length, _micro_batch(recipe, folder, known), recipe.train.seed)
    shown = found.parts["train"].rows[:num_samples]
    return Checkup(
        recipe.name,
        by_grade(found.findings(recipe.train.effective_batch)),
        splits={name: figures.summarize(part, *settings) for name, part in found.parts.items()},
        samples=tuple(Sample(row.place, figures.pieces(row, tokenizer)) for row in shown),
    )


def by_grade(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The gravest first."""
    return tuple(sorted(findings, key=lambda finding: GRADES.index(finding.grade)))


def show(found: Checkup, console: Console) -> None:
    """Errors, samples, figures of what could be read, other findings, and a last line: how it stands."""
    errors = [finding for finding in found.findings if finding.grade == "error"]
    for finding in errors:
        _show_finding(finding, console)
    for sample in found.samples:
        _show_sample(sample, console)
    if found.machine is not None:
        console.print(_machine_table(found.machine))
    read = {name: split for name, split in found.splits.items() if split.rows}
    if read:
        console.print(_splits_table(read))
        for name, split in read.items():
            _say(console, f"{name}: rows by length in tokens")
            _say(console, "\n".join(_histogram(split)))
    for finding in found.findings[len(errors) :]:
        _show_finding(finding, console)
    counts = [(found.count(grade), grade) for grade in GRADES]
    words = ", ".join(f"{count} {grade}{'' if count == 1 else 's'}" for count, grade in counts)
    _say(console, f"{found.name}: {words}")


def _geometry(folder: Path) -> phi3.Geometry:
    return phi3.geometry_from_config(weights.read_config(folder), str(folder / "config.json"))


def _micro_batch(recipe: Recipe, folder: Path, known: memory.StepRows | None) -> int:
    """What a run would choose here and now."""
    if isinstance(recipe.train.micro_batch, int):
        return recipe.train.micro_batch
    from . import model, settle

    geometry = _geometry(folder)
    device = model.device_for_run()
    usable = memory.usable_bytes(settle.allowed_bytes(recipe, device))
    kind = settle.device_kind(device)
    return memory.Ways(recipe, geometry, known=known, device=kind).fastest(usable).micro_batch


def _say(console: Console, text: str | Text) -> None:
    console.print(_harmless(text), highlight=False, markup=False, soft_wrap=True)


def _harmless(text: str | Text) -> str | Text:
    """Without characters that would drive the terminal, which names and texts of others may hold."""
    if isinstance(text, Text):
        return Text.assemble(*((_escaped(text.plain[s.start : s.end]), s.style) for s in text.spans))
    return _escaped(text)


def _escaped(text: str) -> str:
    return _DRIVING.sub(lambda hit: hit[0].encode("unicode_escape").decode(), text)


def _show_finding(finding: Finding, console: Console) -> None:
    _say(console, f"{finding.grade}: {finding.code}: {finding.what}")
    for place in finding.places[:SHOWN_PLACES]:
        _say(console, f"  {_relative(place)}")
    if finding.num_places > SHOWN_PLACES:
        _say(console, f"  and {finding.num_places - SHOWN_PLACES} more, {finding.num_places} in all")
    _say(console, f"  -> {finding.fix}")


def _relative(place: str) -> str:
    """A place with its paths as they are from here, without the folder that one is in anyway."""
    return place.replace(f"{Path.cwd()}{os.sep}", "")


def _show_sample(sample: Sample, console: Console) -> None:
    from .data.figures import bracketed

    trained = sum(piece.trained for piece in sample.pieces)
    _say(console, f"{_relative(sample.place)}: {len(sample.pieces)} tokens, {trained} trained on")
    plain = console.no_color or not console.is_terminal
    _say(console, bracketed(sample.pieces) if plain else _coloured(sample.pieces))
    _say(console, "")


def _coloured(pieces: Sequence[Piece]) -> Text:
    """Trained tokens on green, by turns lighter, the others plain and reversed."""
    styles = {True: TRAINED_STYLES, False: OTHER_STYLES}
    return Text.assemble(*((piece.text, styles[piece.trained][i % 2]) for i, piece in enumerate(pieces)))


def _machine_table(facts: Mapping[str, Any]) -> Table:
    table = Table("what", "found", show_header=False, box=box.SIMPLE)
    for name, value in facts.items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), Text(_format_fact(name, value)))
    return table


def _format_fact(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        parts = (f"{key} {_format_fact(name, one)}" for key, one in value.items())
        return "\n".join(parts)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.2g}"
    return format_bytes(value) if name.endswith("_bytes") else str(value)


def _splits_table(splits: Mapping[str, Summary]) -> Table:
    table = Table("", *splits, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    found = list(splits.values())
    rows: dict[str, list[str]] = {
        "rows": [f"{split.rows:,}" for split in found],
        "tokens": [f"{split.tokens:,}" for split in found],
        "trained on": [f"{split.supervised_tokens:,} ({split.supervised_share:.1%})" for split in found],
        "longest row": [f"{split.longest_row_tokens:,}" for split in found],
        "over data.max_length": [f"{split.over_max_length_share:.1%}" for split in found],
        "dropped": [f"{split.dropped_share:.1%}" for split in found],
        "truncated": [f"{split.truncated_share:.1%}" for split in found],
        f"padding at micro batch {found[0].micro_batch}": [f"{split.padding_share:.1%}" for split in found],
        "padding when packed": [f"{split.packed_padding_share:.1%}" for split in found],
        "passes when packed": [f"{split.packed_rows:,}" for split in found],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _histogram(split: Summary) -> list[str]:
    most = max((one.rows for one in split.histogram), default=0)
    width = len(str(split.histogram[-1].last)) if split.histogram else 0
    bars = [(one, "#" * math.ceil(BAR_WIDTH * one.rows / most)) for one in split.histogram]
    return [f"  {one.first:>{width}}-{one.last:<{width}} {bar} {one.rows}" for one, bar in bars]
