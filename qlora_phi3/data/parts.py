"""Sources, read, tokenized and examined in a single pass that holds none of their rows as objects.

Owns what becomes of every row on the way. Rows that are left out are counted; rows that cannot be used are
told together.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, Problem
from ..findings import Finding
from ..json_files import load
from ..recipe import Data, Evaluate, Fraction, Source, Train
from .batches import Outcome, mark_all
from .doctor import Examiner, Places, examine_sizes
from .mix import Sampler
from .overlong import Fitted, Fitter
from .provenance import SourceRead
from .read import MAX_PROBLEMS, stream_held_out, stream_training
from .repeats import Fingerprints, FingerprintsBuilder
from .rows import Conversation, Example, Message, Preference, Row, Text
from .store import Places as RowPlaces
from .store import Rows, RowsBuilder, load_arrays, save_arrays
from .text import fit_text
from .tokens import Marked, Turns

_FACTS: Final = "facts.json"
_ARRAYS: Final = "part.npz"


@dataclass(frozen=True)
class Reading:
    """One pass over the sources of data.`name`, "train" or "eval", and all that its outcome depends on.

    `num_kept`: conversations of a split that are kept as text. `read`: gets what was read of the sources.
    """

    name: str
    data: Data
    train: Train
    evaluate: Evaluate
    tokenizer: Any
    turns: Turns
    num_kept: int
    read: list[SourceRead] = field(default_factory=list)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.data.train_sources if self.name == "train" else self.data.eval_sources

    @property
    def splits(self) -> tuple[str, ...]:
        """What comes of it: training rows may have the held-out ones among them."""
        both = self.name == "train" and isinstance(self.data.eval, Fraction)
        return ("train", "eval") if both else (self.name,)

    def stream(self) -> Iterator[tuple[str, Example | Problem]]:
        """Every row with its split."""
        rows = stream_training if self.name == "train" else stream_held_out
        self.read.clear()
        return rows(self.data, self.train, self.evaluate, self.read.append)


@dataclass
class Problems:
    """The first problems, and how many more there are; a wrong export is wrong in every row."""

    first: list[Problem] = field(default_factory=list)
    more: int = 0

    def add(self, problems: tuple[Problem, ...]) -> None:
        room = MAX_PROBLEMS - len(self.first)
        self.first += problems[:room]
        self.more += len(problems[room:])

    def shortened(self, path: str) -> list[Problem]:
        rest = [Problem(path, f"and {self.more} more rows with problems.")] if self.more else []
        return [*self.first, *rest]


@dataclass(frozen=True)
class Part:
    """A split in tokens, and what was found in it.

    `rows`: what is trained on, cut or split where the recipe says so, and some of the `conversations`
        behind them, evenly drawn; plain text is not kept. `fitted`: how many were dropped, truncated, split.
    `lengths`, `num_supervised`: of all rows that could be turned into tokens, whatever their length.
    `num_read`: rows, with those that could not be. A row counts as often as its weight takes it.
    `system_prompt`: the system message that all rows begin with; None where none does, or they differ.
    Shape: `lengths` (whole rows,) int32.
    """

    rows: Rows
    conversations: list[Conversation]
    fitted: Fitted
    lengths: NDArray[np.int32]
    num_supervised: int
    num_read: int
    findings: list[Finding]
    fingerprints: Fingerprints
    system_prompt: str | None = None
    problems: Problems = field(default_factory=Problems)

    def save(self, folder: Path) -> None:
        """Write it beside the ids, which are in `folder` already. A part with problems is not saved."""
        assert not self.problems.first
        self.rows.save(folder)
        prints = self.fingerprints
        arrays = prints.places.arrays("place")
        arrays |= {"lengths": self.lengths, "whole": prints.whole, "asked": prints.asked}
        save_arrays(folder / _ARRAYS, arrays)
        facts = {
            "fitted": asdict(self.fitted),
            "num_supervised": self.num_supervised,
            "num_read": self.num_read,
            "findings": [asdict(finding) for finding in self.findings],
            "conversations": [asdict(talk) for talk in self.conversations],
            "prefixes": prints.places.prefixes,
            "system_prompt": self.system_prompt,
        }
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Part:
        """What `save` wrote.

        Raises:
            OSError, ValueError, KeyError, TypeError: a file is missing, or not what was written.
        """
        facts = load(folder / _FACTS, None)
        arrays = load_arrays(folder / _ARRAYS)
        places = RowPlaces(tuple(facts["prefixes"]), arrays["place_which"], arrays["place_numbers"])
        return cls(
            rows=Rows.open(folder),
            conversations=[_conversation(one) for one in facts["conversations"]],
            fitted=Fitted(**facts["fitted"] | {"rows": ()}),
            lengths=arrays["lengths"],
            num_supervised=facts["num_supervised"],
            num_read=facts["num_read"],
            findings=[Finding(**one | {"places": tuple(one["places"])}) for one in facts["findings"]],
            fingerprints=Fingerprints(arrays["whole"], arrays["asked"], places),
            system_prompt=facts["system_prompt"],
        )


def build(reading: Reading, folder: Path | None = None) -> dict[str, Part]:
    """Read, tokenize and examine; with a `folder`, each split's ids are put into a folder of its name there.

    Raises:
        DataError: a source is missing. What is wrong with single rows is in the parts.
        ModelError: plain text, and the tokenizer has no token for the end of one.
        OutputError: the folder's disk is full.
    """
    builders = {name: _Builder(name, reading, _subfolder(folder, name)) for name in reading.splits}
    names = deque[str]()  # of the rows that are under way

    def rows() -> Iterator[Row | Problem]:
        for name, row in reading.stream():
            assert not isinstance(row, Preference)  # `read` refuses them
            names.append(name)
            yield row

    with closing(mark_all(rows(), reading.tokenizer, reading.turns, reading.data.loss_on)) as outcomes:
        for row, outcome in outcomes:
            builders[names.popleft()].add(row, outcome)
    return {name: builder.finish() for name, builder in builders.items()}


def _subfolder(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        return None
    (folder / name).mkdir()
    return folder / name


class _Builder:
    """Takes a split's rows one at a time."""

    def __init__(self, name: str, reading: Reading, folder: Path | None) -> None:
        data, tokenizer, turns = reading.data, reading.tokenizer, reading.turns
        self.name, self.data = name, data
        self.fitter = Fitter(data, tokenizer, turns)
        self.examiner = Examiner(tokenizer, turns, data.loss_on, f"data.{name}")
        self.before: Row | None = None
        self.rows, self.fingerprints = RowsBuilder(folder), FingerprintsBuilder()
        self.lengths, self.num_supervised, self.num_read = array("i"), 0, 0
        self.over, self.problems, self.fitted = Places(), Problems(), Fitted()
        self.conversations = Sampler[Conversation](reading.num_kept)
        self.systems: set[str | None] = set()  # of the rows that are kept; two are as good as all

    def add(self, row: Row | None, outcome: Outcome) -> None:
        copy = row is not None and row is self.before
        self.before = row
        if not copy:
            self._examine(row, outcome)
        if row is None:
            return
        self.num_read += 1
        if isinstance(outcome, Marked):
            self._add_row(row, outcome, copy=copy)

    def _examine(self, row: Row | None, outcome: Outcome) -> None:
        """Say once what is said of a row, however often its weight takes it."""
        self.examiner.look(row, outcome)
        if isinstance(outcome, Problem):
            self.problems.add((outcome,))
        elif isinstance(outcome, DataError):
            self.problems.add(outcome.problems)
        elif len(outcome.input_ids) > self.data.max_length:
            self.over.add(outcome.place)
        if row is not None:
            self.fingerprints.add(row)

    def _add_row(self, row: Row, marked: Marked, *, copy: bool) -> None:
        self.lengths.append(len(marked.input_ids))
        self.num_supervised += marked.num_supervised
        try:
            fitted = self._fit(row, marked)
        except DataError as error:
            self.problems.add(() if copy else error.problems)
            return
        for kept, cut in fitted.rows:
            self.rows.add(cut)
            if len(self.systems) < 2:
                self.systems.add(kept.system if isinstance(kept, Conversation) else None)
            if isinstance(kept, Conversation):
                self.conversations.add(kept.without_unused())
        if fitted.lost:  # most rows fit, and a sum for each would cost 6 us
            self.fitted = Fitted.sum((self.fitted, fitted.counts))

    def _fit(self, row: Row, marked: Marked) -> Fitted:
        return fit_text(row, marked, self.data) if isinstance(row, Text) else self.fitter.fit(row, marked)

    def finish(self) -> Part:
        prints, lengths = self.fingerprints.finish(), np.array(self.lengths, dtype=np.int32)
        findings = self.examiner.findings(prints.repeated())
        findings += examine_sizes(lengths, self.over, self.data, f"data.{self.name}")
        return Part(
            rows=self.rows.finish(),
            conversations=self.conversations.finish(),
            fitted=self.fitted,
            lengths=lengths,
            num_supervised=self.num_supervised,
            num_read=self.num_read,
            findings=findings,
            fingerprints=prints,
            system_prompt=next(iter(self.systems)) if len(self.systems) == 1 else None,
            problems=self.problems,
        )


def _conversation(fields: dict[str, Any]) -> Conversation:
    messages = tuple(Message(**message) for message in fields["messages"])
    return Conversation(**fields | {"messages": messages, "unused": ()})
