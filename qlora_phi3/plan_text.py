"""How a plan is told: the answer first, in a few lines, and its parts where they are asked for.

Owns words and tables, for people and as JSON. Computes nothing: figures are fit's and memory's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from . import fit, memory, speeds
from .phi3 import Geometry
from .recipe import Recipe
from .units import format_bytes, parse_bytes

NO_BFLOAT16: Final = (
    "T4, V100, RTX 20 and GTX cards have no bfloat16: there set model.compute_dtype=float16, as large as that"
)


def show_cards(recipe: Recipe, geometry: Geometry, cards: Sequence[fit.Card]) -> None:
    """Card by card: whether it fits, how it would be trained there, and how far it could grow."""
    table = Table(title=f"{recipe.name} on cards, predicted", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("card", justify="right", no_wrap=True)
    table.add_column("how")
    for column in ("a pass", "needs", "tokens*", "rows*"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in cards:
        name = f"{one.gib} GB" if one.gib in fit.SHOWN_GIB else "here"
        largest = [f"{number}" if number is not None else "-" for number in (one.max_length, one.micro_batch)]
        how = _how(one.way, geometry) if one.fits else "does not fit"
        if one.fits and one.needed_bytes > one.num_bytes:
            how = "only as the least below"
        rows = _rows(one.way.micro_batch) if one.fits else ""
        table.add_row(name, how, rows, format_bytes(one.needed_bytes), *largest)
    console = Console()
    console.print(table)
    say = _say(console)
    for one in cards:
        if one.gib not in fit.SHOWN_GIB:
            say(f"here: this computer's card, {one.gib:.1f} GiB in all")
    say("* how long a row, or how many a pass, could be there with everything else as in the recipe")


def show_least(recipe: Recipe, geometry: Geometry, plan: memory.Plan) -> None:
    """The least that a card must have, what else is needed, and what nobody has measured."""
    say = _say(Console())
    least = fit.least(recipe, geometry)
    way = f"{_how_keys(least, geometry)}, {_rows(plan.micro_batch)} a pass"
    say(f"the least it can do with: {format_bytes(plan.needed_bytes)}: {way}, {plan.row_tokens} tokens a row")
    host = ", ".join(f"{part.name} {format_bytes(part.num_bytes)}" for part in plan.host)
    if host:
        say(f"on the host, the computer's own memory, then: {host}, and the data")
    budget = recipe.memory.budget
    if budget != "auto" and parse_bytes(budget) < plan.needed_bytes:
        say(f"memory.budget {budget} is less: on a card the run would stop with exit code 4")
    if recipe.model.compute_dtype == "bfloat16":
        say(NO_BFLOAT16)


def show_merge(plan: memory.Plan) -> None:
    """What an export that merges takes, which is no card's memory."""
    merging = format_bytes(plan.merge.peak_bytes + memory.IMPORTS_BYTES)
    _say(Console())(f"merging the adapter, where an export does: {merging} of the computer's memory")


def show_times(recipe: Recipe) -> None:
    """What was measured here; a card's time is never guessed."""
    say = _say(Console())
    measured = speeds.alike(recipe)
    if all(speed.machine.startswith("CPU") for speed in measured):
        say("time on a card: not measured, and not guessed")
    for speed in measured:
        say(f"measured here: {speed.words}")


def show_answer(
    vram: str,
    on_card: fit.Card,
    geometry: Geometry,
    predicted: memory.Plan,
    changes: tuple[fit.Change, ...] | None,
) -> None:
    """Whether it fits a card, how it is trained there, and if not, which keys to change."""
    say = _say(Console())
    say(f"{vram} fits: {'yes' if changes == () else 'no'} (predicted)")
    if changes == ():
        way = on_card.way
        needs = f"needs {format_bytes(on_card.needed_bytes)} of {format_bytes(on_card.num_bytes)}"
        say(f"on {vram}: {_how(way, geometry)}, {_rows(way.micro_batch)} a pass, {needs}")
        if (
            on_card.needed_bytes > on_card.num_bytes
        ):  # `auto` looks at training alone, and answers may take more
            say("which is more: set train.activations and memory.host to those of the least")
        return
    say(f"it needs {format_bytes(predicted.needed_bytes)} at least")
    if changes is None:
        say("no change of the recipe's keys makes it fit: choose a smaller model.base")
        return
    say("change these keys:")
    for change in changes:
        say(f"  {change.override}  -> needs {format_bytes(change.needed_bytes)}")


def answer_json(
    on_card: fit.Card, predicted: memory.Plan, room: int, changes: tuple[fit.Change, ...] | None
) -> dict[str, Any]:
    return {
        "bytes": room,
        "fits": changes == (),
        "headroom_bytes": room - predicted.needed_bytes,
        "least_bytes": predicted.needed_bytes,
        "needed_bytes": on_card.needed_bytes if changes == () else predicted.needed_bytes,
        "chosen": on_card.way.keys if changes == () else None,
        "changes": [change.to_json() for change in changes] if changes is not None else None,
    }


def show_parts(plan: memory.Plan) -> None:
    """Parts down, phases across, and how each part is computed."""
    title = f"predicted memory of the least: micro batch {plan.micro_batch}, rows of {plan.row_tokens} tokens"
    table = Table("part", title=title, title_justify="left", box=box.SIMPLE_HEAD)
    # the others take less than training, and a terminal is narrow
    phases = [one for one in plan.phases if one.name in ("load", "train", "evaluate")]
    for phase in phases:
        table.add_column(phase.name, justify="right", no_wrap=True)
    table.add_column("how")
    parts: dict[str, str] = {}
    for part in (part for phase in phases for part in phase.parts):
        parts.setdefault(part.name, part.formula)
    for name, formula in parts.items():
        sizes = [{part.name: part.num_bytes for part in phase.parts}.get(name) for phase in phases]
        table.add_row(name, *(format_bytes(size) if size is not None else "" for size in sizes), formula)
    table.add_section()
    table.add_row("peak", *(format_bytes(phase.peak_bytes) for phase in phases), "of tensors")
    for beside in plan.outside:
        empty = ["" for _ in phases[1:]]
        table.add_row(beside.name, *empty, format_bytes(beside.num_bytes), beside.formula)
    console = Console()
    console.print(table)
    _say(console)(f"the device needs {format_bytes(plan.needed_bytes)}")


def _how(way: memory.Way, geometry: Geometry) -> str:
    """A way to train in the recipe's own words: "recompute, last 15 of 32 layers kept"."""
    if way.activations == "keep":
        said = ["all activations kept"]
    else:
        said = [way.activations]
        said += [f"last {way.kept_layers} of {geometry.num_layers} layers kept"] if way.kept_layers else []
    said += ["attention outputs kept"] if way.keep_attention else []
    said += [f"slices of {way.slice_columns} columns"] if way.slice_columns != "all" else []
    said += [f"{' and '.join(way.host)} on the host"] if way.host else []
    return ", ".join(said)


def _how_keys(recipe: Recipe, geometry: Geometry) -> str:
    """The same of a recipe that leaves nothing of it to `auto`, but for a count of layers."""
    train, host = recipe.train, recipe.memory.host
    kept = train.kept_layers if isinstance(train.kept_layers, int) else 0
    columns: int | Literal["all"] = train.slice_columns if isinstance(train.slice_columns, int) else "all"
    hosted = host if isinstance(host, tuple) else ()
    way = memory.Way(train.activations, 1, kept, train.keep_attention is True, columns, 0, 0.0, hosted)
    return _how(way, geometry)


def _rows(micro_batch: int) -> str:
    return f"{micro_batch} row{'' if micro_batch == 1 else 's'}"


def _say(console: Console) -> Any:
    """Prints a line as it is, uncut."""
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
