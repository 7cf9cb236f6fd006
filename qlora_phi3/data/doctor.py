"""The token doctor: what is wrong or odd in the rows that a run would train on.

Owns the checks of text, turns and tokens, one row at a time. Prints nothing and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, Problem
from ..findings import Finding, Grade
from ..recipe import Data
from .batches import Outcome
from .read import MAX_PROBLEMS
from .rows import Conversation, Row, Text
from .tokens import LossOn, Marked, Turns
from .tools import tool_texts

Sign = tuple[str, str]
"""The code of a finding and a place that has it."""

MEANINGS: Final[Mapping[str, tuple[Grade, str, str]]] = {
    "unreadable": ("error", "The row cannot be read, or the run has no use for it.", ""),
    "special-token": (
        "error",
        "Text of a message holds a special token, which would open or close turns by itself.",
        "Remove it from the text, or remove the row.",
    ),
    "refused": ("error", "The row cannot be turned into tokens.", "Change the row, or remove it."),
    "all-masked": (
        "error",
        "No token of the row is trained on: it costs time and teaches nothing.",
        "Give it an answer, or remove it.",
    ),
    "no-stop": (
        "error",
        "A trained answer does not end with the token that stops the model: it would learn to go on.",
        "Mend the chat template: each answer must close with its end-of-turn token.",
    ),
    "double-bos": (
        "warning",
        "The row begins with two beginning-of-text tokens, which the base model has never seen.",
        "Let only one of tokenizer and chat template add it.",
    ),
    "double-eos": (
        "warning",
        "The row ends with two end-of-text tokens.",
        "Let only one of tokenizer and chat template add it.",
    ),
    "turn-order": (
        "warning",
        "Two messages of the same role follow each other, which a chat never has when it is used.",
        "Join them into one message, or remove the row.",
    ),
    "garbled": (
        "warning",
        "Text was decoded wrongly somewhere on its way (a replacement character, or 'Ã©' in place of 'é'): "
        "the model learns to write it.",
        "Export the data again as UTF-8, or mend the text.",
    ),
    "duplicate": (
        "warning",
        "The row repeats an earlier one, which then counts more than the others.",
        "Remove the repetition.",
    ),
    "overlap": (
        "warning",
        "A held-out row asks the same as a training row: its metrics measure memory.",
        "Remove it from one of the two.",
    ),
    "short-answer": (
        "note",
        "An answer is shorter than two tokens: right for labels, else a sign of cut data.",
        "Look at these rows.",
    ),
}
"""Code -> grade, what it means, what to do."""


@dataclass
class Places:
    """The first places of a finding, each once, and how many more it has."""

    first: list[str] = field(default_factory=list)
    more: int = 0

    def add(self, place: str) -> None:
        if place in self.first:  # a source may be named twice
            return
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(place)
        else:
            self.more += 1


@dataclass(frozen=True)
class Examiner:
    """Looks at every row of a split in turn and keeps what it finds, not the rows.

    `remedies`: of rows that cannot be read, by what mends them.
    """

    tokenizer: Any
    turns: Turns
    loss_on: LossOn
    signs: dict[str, Places] = field(default_factory=dict)
    remedies: dict[str, Places] = field(default_factory=dict)

    def look(self, row: Row | None, outcome: Outcome) -> None:
        """Take note of a row and of what became of it."""
        if row is None:
            assert isinstance(outcome, Problem)
            self.remedies.setdefault(outcome.remedy, Places()).add(f"{outcome.place}: {outcome.reason}")
            return
        for code, place in self._signs(row, outcome):
            self.signs.setdefault(code, Places()).add(place)

    def findings(self, repeated: Iterable[str] = ()) -> list[Finding]:
        """All that was found; `repeated` rows are told with the rest."""
        _, what, _ = MEANINGS["unreadable"]
        found = [
            Finding("error", "unreadable", what, tuple(places.first), fix, places.more)
            for fix, places in self.remedies.items()
        ]
        found += [_finding(code, self.signs[code]) for code in MEANINGS if code in self.signs]
        return found + find("duplicate", repeated)

    def _signs(self, row: Row, outcome: Outcome) -> Iterator[Sign]:
        if isinstance(outcome, Marked):
            yield from row_signs(row, outcome, self.tokenizer, self.turns, self.loss_on)
        elif isinstance(outcome, DataError):
            inside = special_tokens(row, self.tokenizer, self.turns)
            yield from (("special-token", place) for place in inside)
            if not inside:
                yield from (("refused", f"{p.place}: {p.reason}") for p in outcome.problems)
        yield from text_signs(row)


def find(code: str, places: Iterable[str]) -> list[Finding]:
    """The finding of `code` at these places; none where there are none."""
    found = Places()
    for place in places:
        found.add(place)
    return [_finding(code, found)] if found.first else []


def _finding(code: str, places: Places) -> Finding:
    grade, what, fix = MEANINGS[code]
    return Finding(grade, code, what, tuple(places.first), fix, places.more)


def special_tokens(row: Row, tokenizer: Any, turns: Turns) -> list[str]:
    """Places of special tokens inside text, each with the token."""
    found = []
    for place, text in _texts(row):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in dict.fromkeys(token for token in ids if token in turns.special):
            found.append(f"{place}: {tokenizer.decode([token])}")
    return found


def _texts(row: Row) -> Iterator[tuple[str, str]]:
    """(place, text) of all that a row says."""
    if isinstance(row, Text):
        yield row.place, row.text
        return
    for i, message in enumerate(row.messages):
        yield f"{row.place}: messages[{i}]", message.content
    yield from tool_texts(row)


def row_signs(example: Row, row: Marked, tokenizer: Any, turns: Turns, loss_on: LossOn) -> Iterator[Sign]:
    """What is odd in a row's tokens; plain text has no turns that could stop, or be short."""
    ids, trained = row.input_ids, row.trained
    if not trained:
        yield "all-masked", row.place
    if isinstance(example, Conversation):
        yield from _turn_signs(example, row, turns, loss_on)
    if len(ids) < 2:
        return
    if ids[0] == ids[1] == tokenizer.bos_token_id:  # last, because transformers takes 1.3 us to look it up
        yield "double-bos", row.place
    if ids[-1] == ids[-2] == tokenizer.eos_token_id:
        yield "double-eos", row.place


def _turn_signs(talk: Conversation, row: Marked, turns: Turns, loss_on: LossOn) -> Iterator[Sign]:
    ids, trained = row.input_ids, row.trained
    if loss_on == "all":  # what the template writes behind the last turn is trained on too
        stops = all(turns.end in ids[start:stop] for start, stop in trained)
    else:
        stops = all(ids[stop - 1] == turns.end for _, stop in trained)
        yield from _short_answers(talk, trained)
    if not stops:
        yield "no-stop", row.place


def text_signs(row: Row) -> Iterator[Sign]:
    """What is odd in what a row says."""
    messages = row.messages if isinstance(row, Conversation) else ()
    before, ascii_only = "", isinstance(row, Conversation) and not row.tools_json
    for i, message in enumerate(messages):
        if message.role == before != "tool":  # one answer may make several calls
            yield "turn-order", f"{row.place}: messages[{i}]: {before} after {before}"
        before = message.role
        ascii_only = ascii_only and not message.more and message.content.isascii()
    if ascii_only:  # to name the places of a million rows takes longer than to look at their text
        return
    for place, text in _texts(row):
        hit = None if text.isascii() else _GARBLED.search(text)
        if hit is not None:
            yield "garbled", f"{place}: {hit[0]!r}"


def _short_answers(talk: Conversation, trained: list[tuple[int, int]]) -> Iterator[Sign]:
    """Trained answers of fewer than two tokens, the one that ends them not counted."""
    if all(stop - start > 2 for start, stop in trained):
        return
    answers = [i for i, message in enumerate(talk.messages) if message.role == "assistant"]
    for i, (start, stop) in zip(answers[-len(trained) :], trained, strict=True):
        if stop - start <= 2:
            yield "short-answer", f"{talk.place}: messages[{i}]"


def examine_sizes(lengths: NDArray[np.int32], over: Places, data: Data, place: str) -> list[Finding]:
    """Rows that do not fit `data.max_length`, which are at `over`; an error where all are and none is cut.

    Shape: `lengths` (rows,).
    """
    if not over.first:
        return []
    fix = "Raise data.max_length, or shorten them."
    limit = f"data.max_length {data.max_length}"
    if data.overlong in ("drop", "error") and (lengths > data.max_length).all():
        return [Finding("error", "overlong", f"Every row is longer than {limit}.", (place,), fix)]
    grade: Grade = "error" if data.overlong == "error" else "note"
    what = f"Rows are longer than {limit}; data.overlong is {data.overlong}."
    return [Finding(grade, "overlong", what, tuple(over.first), fix, over.more)]


def examine_batch(num_rows: int, effective_batch: int, place: str) -> list[Finding]:
    """An optimizer step that asks for more rows than there are; none at all is another finding."""
    if effective_batch <= num_rows or not num_rows:
        return []
    what = (
        f"train.effective_batch {effective_batch} is more than all rows ({num_rows}): an epoch is one step."
    )
    fix = f"Set train.effective_batch to {num_rows} or less, or add rows."
    return [Finding("warning", "large-batch", what, (place,), fix)]


def _high_characters() -> str:
    """What bytes 0x80 to 0xBF become when UTF-8 is read as Latin-1 or Windows-1252."""
    windows = bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore")
    return "".join(map(chr, range(0x80, 0xC0))) + windows


_CLOSING: Final = "\xa0»’”"
"""May follow a capital letter that is meant, as in “AMANHÔ: then they are no sign of damage."""

_HIGH: Final = re.escape("".join(c for c in _high_characters() if c not in _CLOSING))

_GARBLED: Final = re.compile(
    f"\N{REPLACEMENT CHARACTER}|[ÂÃ][{_HIGH}]|(?<![A-ZÀ-Þ])[ÂÃ][{_CLOSING}]|â[{_HIGH}{_CLOSING}]{{2}}"
)
