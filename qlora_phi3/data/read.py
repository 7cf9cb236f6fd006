"""Read the rows of a recipe's sources, one at a time, every problem with its place.

Owns the way from sources to rows: their order, limits, weights, and which are held out. Files are
`sources`' matter, the hub `hub`'s, a row's shape `formats`'. Refuses rows that the run has no use for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from ..errors import DataError, Problem
from ..recipe import GENERATION_METRICS, Data, Evaluate, Fraction, Source, Train
from ..recipe_checks import NO_ANSWERS, NO_LAST_ANSWER
from . import hub
from .columns import split_problem
from .formats import convert, detect, is_conversation
from .mix import is_held_out, num_copies
from .provenance import Record
from .rows import Conversation, Example, Message, Preference, Text
from .sources import files_of, rows_of

__all__ = [
    "MAX_PROBLEMS",
    "Conversation",
    "Example",
    "Message",
    "Preference",
    "Text",
    "check_files",
    "check_source",
    "name_of",
    "read",
    "shortened",
    "stream",
    "stream_held_out",
    "stream_splits",
    "stream_training",
]

MAX_PROBLEMS: Final = 20
"""Problems listed before the rest is only counted; a wrong export is wrong in every row."""

TRAIN: Final = Train()
EVALUATE: Final = Evaluate()
"""What rows are for, where nobody says it."""


def check_files(data: Data) -> None:
    """Check that the sources exist, without reading them and without the hub.

    Raises:
        DataError: every source that is missing or unreadable.
    """
    problems: list[Problem] = []
    for (_, name, *number), source in data.sources():
        key = f"data.{name}{''.join(f'[{one}]' for one in number)}.path"
        try:
            check_source(source)
        except DataError as error:
            problems += [Problem(f"{key}: {one.place}", one.reason, one.remedy) for one in error.problems]
    if problems:
        raise DataError.of(problems)


def check_source(source: Source) -> list[Path]:
    """The files of a source, checked to exist and be readable, without reading them; none of a hub data set.

    Raises:
        DataError: missing, unreadable, or of a kind that is not available.
    """
    return [] if source.is_hub else files_of(Path(source.path))


def name_of(sources: Source | tuple[Source, ...]) -> str:
    """The path of a source, or of several, for messages."""
    return sources.path if isinstance(sources, Source) else ", ".join(source.path for source in sources)


def stream(source: Source, record: Record | None = None, use: str = "train") -> Iterator[Example | Problem]:
    """Rows of one source in its order, each once; a malformed row comes as the Problem it has.

    All rows have the format of the first, or the named one. `record` gets what was read. `use`: "train" or
    "eval"; a row that says that it is of another split is such a Problem too.
    """
    named = source.format != "auto"
    name: str | None = source.format if named else None
    rows = hub.rows_of(source, record) if source.is_hub else rows_of(check_source(source), record)
    for place, found in islice(rows, source.limit):
        if isinstance(found, Problem):
            yield found
            continue
        row = {"messages": found} if is_conversation(found) else found
        try:
            name = name or detect(row, place)
            example = convert(row, name, place, named=named)
            yield split_problem(example.unused, place, use) or example
        except RecursionError:
            yield Problem(place, "is nested too deeply.", "Write it with fewer levels, or as text.")
        except DataError as error:
            yield from error.problems
            if name is None:  # what the first row is decides what the others should be
                return


def stream_splits(
    data: Data, train: Train = TRAIN, evaluate: Evaluate = EVALUATE
) -> Iterator[tuple[str, Example | Problem]]:
    """Every row of the recipe with its split, "train" or "eval", in one pass over the sources.

    A row is taken as often as its source's weight says; of the rows that `data.eval.fraction` holds out,
    each is taken once at most. A side that stays empty ends with a Problem. Copies follow their row, and are
    the same object.
    """
    yield from stream_training(data, train, evaluate)
    yield from stream_held_out(data, train, evaluate)


def stream_held_out(
    data: Data, train: Train, evaluate: Evaluate, record: Record | None = None
) -> Iterator[tuple[str, Example | Problem]]:
    """The part of `stream_splits` that comes from `data.eval`'s own sources."""
    for source in data.eval_sources:
        for row, copies in _weighted(source, data, train, evaluate, record, "eval", held_out=True):
            yield from [("eval", row)] * copies


def stream_training(
    data: Data, train: Train, evaluate: Evaluate, record: Record | None = None
) -> Iterator[tuple[str, Example | Problem]]:
    """The part of `stream_splits` that comes from `data.train`'s sources, held-out share included."""
    share = data.eval.fraction if isinstance(data.eval, Fraction) else 0.0
    found = {"train": 0, "eval": 0}
    broken = False
    for source in data.train_sources:
        for row, copies in _weighted(source, data, train, evaluate, record, "train", held_out=share > 0):
            if isinstance(row, Problem):
                broken = True
                yield "train", row
                continue
            held_out = share > 0 and is_held_out(row, share, train.seed)
            split, times = ("eval", min(copies, 1)) if held_out else ("train", copies)
            found[split] += times
            yield from [(split, row)] * times
    if share and not broken:
        yield from (("train", problem) for problem in _empty_sides(share, **found))


def _empty_sides(share: float, train: int, eval: int) -> Iterator[Problem]:
    place = f"data.eval.fraction: {share}"
    if not eval:
        reason = f"holds out none of the {train} rows: each has its own lot."
        yield Problem(place, reason, "Raise it, or add rows.")
    if not train:
        yield Problem(
            place, f"holds out all {eval} rows: none is left to train on.", "Lower it, or add rows."
        )


def useful(
    source: Source, data: Data, train: Train, evaluate: Evaluate, use: str
) -> Iterator[Example | Problem]:
    """Rows of a source of data.`use` as long as the run can use them, unrecorded and unweighted."""
    held_out = use == "eval" or isinstance(data.eval, Fraction)
    return _useful(source, data, train, evaluate, None, use, held_out=held_out)


def _weighted(
    source: Source,
    data: Data,
    train: Train,
    evaluate: Evaluate,
    record: Record | None,
    use: str,
    *,
    held_out: bool,
) -> Iterator[tuple[Example | Problem, int]]:
    """Rows of a source, each with how often it is taken; ends with a Problem where none is."""
    taken = rows = 0
    for row in _useful(source, data, train, evaluate, record, use, held_out=held_out):
        copies = 1 if isinstance(row, Problem) else num_copies(row, source.weight, train.seed)
        taken, rows = taken + copies, rows + 1
        yield row, copies
    if rows and not taken:
        reason = f"weight {source.weight} takes none of its {rows} rows: each has its own lot."
        yield Problem(source.path, reason, "Raise the weight, or add rows."), 1


def _useful(
    source: Source,
    data: Data,
    train: Train,
    evaluate: Evaluate,
    record: Record | None,
    use: str,
    *,
    held_out: bool,
) -> Iterator[Example | Problem]:
    """Rows of a source as long as the run can use them; ends with a Problem at the first it cannot."""
    for row in stream(source, record, use):
        refusal = _refusal(row, data, train, evaluate, held_out=held_out)
        yield refusal or row
        if refusal:
            return


def _refusal(
    row: Example | Problem, data: Data, train: Train, evaluate: Evaluate, *, held_out: bool
) -> Problem | None:
    """Why a run of these settings cannot use such rows; all of a source are of one kind."""
    if isinstance(row, Preference) and train.task == "sft":
        reason = "is a preference (chosen and rejected), which train.task: sft cannot learn from."
        return Problem(row.place, reason, "Train on the chosen answers: write prompt-completion rows.")
    if isinstance(row, Text) and data.loss_on == "last":
        return Problem(row.place, f"data.loss_on: {NO_LAST_ANSWER}", "Set data.loss_on to all.")
    if isinstance(row, Text) and held_out and set(GENERATION_METRICS) & set(evaluate.metrics):
        return Problem(row.place, f"evaluate.metrics: {NO_ANSWERS}", "Set evaluate.metrics=[loss].")
    return None


def read(source: Source) -> list[Example]:
    """All rows of one source, in its order, each once.

    Raises:
        DataError: every malformed row with its place (the first 20), or no rows at all.
    """
    rows = list(stream(source))
    problems = [row for row in rows if isinstance(row, Problem)]
    if problems:
        raise DataError.of(shortened(problems, source.path))
    return [row for row in rows if not isinstance(row, Problem)]


def shortened(problems: list[Problem], path: Path | str) -> list[Problem]:
    """The first MAX_PROBLEMS, and how many more there are."""
    surplus = len(problems) - MAX_PROBLEMS
    if surplus <= 0:
        return problems
    return [*problems[:MAX_PROBLEMS], Problem(str(path), f"and {surplus} more rows with problems.")]
