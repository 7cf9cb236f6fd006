"""One source, read, tokenized and examined in a single pass that holds none of its rows as objects.

Owns what becomes of every row on the way. Rows that are left out are counted; rows that cannot be used are
told together.
"""

from __future__ import annotations

import json
from array import array
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, Problem
from ..findings import Finding
from ..recipe import Data, Source
from .batches import Outcome, mark_all
from .doctor import Examiner, Places, examine_sizes
from .formats import Conversation, Message
from .overlong import Fitted, Fitter
from .read import MAX_PROBLEMS, stream
from .repeats import Fingerprints, FingerprintsBuilder
from .store import Places as RowPlaces
from .store import Rows, RowsBuilder, load_arrays, save_arrays
from .tokens import Marked, Turns

_FACTS: Final = "facts.json"
_ARRAYS: Final = "part.npz"


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
    """A source in tokens, and what was found in it.

    `rows`: what is trained on, cut or split where the recipe says so, with the first `conversations` behind
        them. `fitted`: how many were dropped, truncated, split.
    `lengths`, `num_supervised`: of all rows that could be turned into tokens, whatever their length.
    `num_read`: conversations, with those that could not be.
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
        }
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Part:
        """What `save` wrote.

        Raises:
            OSError, ValueError, KeyError, TypeError: a file is missing, or not what was written.
        """
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
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
        )


def build(
    source: Source,
    name: str,
    data: Data,
    tokenizer: Any,
    turns: Turns,
    num_kept: int,
    folder: Path | None = None,
) -> Part:
    """Read, tokenize and examine `source`, which is data.`name`; with a `folder`, the ids are put there.

    Raises:
        DataError: the source is missing. What is wrong with single rows is in the part.
        OutputError: the folder's disk is full.
    """
    builder = _Builder(name, data, tokenizer, turns, num_kept, folder)
    with closing(mark_all(stream(source), tokenizer, turns, data.loss_on)) as outcomes:
        for talk, outcome in outcomes:
            builder.add(talk, outcome)
    return builder.finish()


class _Builder:
    """Takes a source's rows one at a time."""

    def __init__(
        self, name: str, data: Data, tokenizer: Any, turns: Turns, num_kept: int, folder: Path | None
    ) -> None:
        self.name, self.data, self.num_kept = name, data, num_kept
        self.fitter = Fitter(data, tokenizer, turns)
        self.examiner = Examiner(tokenizer, turns, data.loss_on)
        self.rows, self.fingerprints = RowsBuilder(folder), FingerprintsBuilder()
        self.lengths, self.num_supervised, self.num_read = array("i"), 0, 0
        self.over, self.problems, self.fitted = Places(), Problems(), Fitted()
        self.conversations: list[Conversation] = []

    def add(self, talk: Conversation | None, outcome: Outcome) -> None:
        self.examiner.look(talk, outcome)
        if isinstance(outcome, Problem):
            self.problems.add((outcome,))
        if talk is None:
            return
        self.num_read += 1
        self.fingerprints.add(talk)
        if isinstance(outcome, DataError):
            self.problems.add(outcome.problems)
        elif isinstance(outcome, Marked):
            self._add_row(talk, outcome)

    def _add_row(self, talk: Conversation, row: Marked) -> None:
        self.lengths.append(len(row.input_ids))
        self.num_supervised += row.num_supervised
        if len(row.input_ids) > self.data.max_length:
            self.over.add(row.place)
        try:
            fitted = self.fitter.fit(talk, row)
        except DataError as error:
            self.problems.add(error.problems)
            return
        for kept, cut in fitted.rows:
            self.rows.add(cut)
            if len(self.conversations) < self.num_kept:
                self.conversations.append(kept)
        if fitted.lost:  # most rows fit, and a sum for each would cost 6 us
            self.fitted = Fitted.sum((self.fitted, fitted.counts))

    def finish(self) -> Part:
        prints = self.fingerprints.finish()
        findings = self.examiner.findings(prints.repeated())
        findings += examine_sizes(len(self.lengths), self.over, self.data, f"data.{self.name}")
        return Part(
            rows=self.rows.finish(),
            conversations=self.conversations,
            fitted=self.fitted,
            lengths=np.array(self.lengths, dtype=np.int32),
            num_supervised=self.num_supervised,
            num_read=self.num_read,
            findings=findings,
            fingerprints=prints,
            problems=self.problems,
        )


def _conversation(fields: dict[str, Any]) -> Conversation:
    messages = tuple(Message(**message) for message in fields["messages"])
    return Conversation(**fields | {"messages": messages})
