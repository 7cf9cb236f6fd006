"""The token doctor: what is wrong or odd in the rows that a run would train on.

Owns the checks of text, turns and tokens, one row at a time. Prints nothing and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, Problem, printable, shown
from ..findings import Finding, Grade
from ..recipe import GENERATION_METRICS, Data, Evaluate
from .batches import Outcome
from .columns import describes
from .quirks import Quirks
from .read import MAX_PROBLEMS
from .repeats import Fingerprints
from .rows import Conversation, Row
from .text_signs import Sign, marker_signs, text_signs, texts_of
from .tokens import PLAIN_TEXT, LossOn, Marked, Turns, prompt_ids

MAX_REMEDIES: Final = 8
"""Ways to mend rows that are told apart; a file may be wrong in a thousand ways."""
_OTHERS: Final = "Each needs another remedy: mend the rows above first, and look again."

MAX_NAMES: Final = 20
MAX_SYSTEM: Final = 200
"""Keys that are named, and characters of a system message that are shown."""

MEANINGS: Final[Mapping[str, tuple[Grade, str, str]]] = {
    "unreadable": ("error", "The row cannot be read, or the run has no use for it.", ""),
    "special-token": (
        "error",
        "Text holds a special token, which would open or close turns by itself.",
        PLAIN_TEXT,
    ),
    "refused": ("error", "The row cannot be turned into tokens.", ""),
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
    "empty-question": (
        "warning",
        "A user message is empty: the model learns to give this answer to nothing.",
        "Write the question.",
    ),
    "placeholder": (
        "warning",
        "Text is a word that programs write for a missing value: the model learns it as text.",
        "Export the data again with nothing in its place, or ignore this where the word is meant.",
    ),
    "chat-markers": (
        "warning",
        "Text holds markers of another chat template, which are plain text to this base: the turns that they "
        "make are none to it, and it learns to write the markers.",
        "Write the turns as messages: the base's chat template is applied for you.",
    ),
    "swallowing-token": (
        "warning",
        "Text holds a token of the base's vocabulary that takes away the blanks beside it: the model sees "
        "another text than the row's.",
        "Write it another way if it is meant as text, for example with a blank inside.",
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
    "leading-blanks": (
        "note",
        "A message begins with blanks, which the base's chat template or its tokens swallow: of indented "
        "text the first line loses its indentation.",
        "Begin with a word or a fence (```) where the blanks matter.",
    ),
    "added-token": (
        "note",
        "Text holds words that are added tokens of the base: each is one token, not its letters.",
        "Right where the token is meant; else write it another way.",
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


@dataclass
class Column:
    """A key that is not used: the first value that it has, cut; that row's place; how many rows have one."""

    example: str
    place: str
    num_rows: int = 0


@dataclass
class Counts:
    """Conversations, and those that begin without a system message."""

    num: int = 0
    num_without_system: int = 0


@dataclass(frozen=True)
class Examiner:
    """Looks at every row of a split, which is at `place`, in turn and keeps what it finds, not the rows.

    `remedies`: of rows that cannot be read, by what mends them; `refused`: of rows that cannot be turned into
    tokens, likewise. `columns`: keys that are not used.
    """

    tokenizer: Any
    turns: Turns
    loss_on: LossOn
    place: str
    signs: dict[str, Places] = field(default_factory=dict)
    remedies: dict[str, Places] = field(default_factory=dict)
    refused: dict[str, Places] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    talks: Counts = field(default_factory=Counts)

    @cached_property
    def quirks(self) -> Quirks:
        return Quirks.of(self.tokenizer, self.turns.special)

    def look(self, row: Row | None, outcome: Outcome) -> None:
        """Take note of a row and of what became of it."""
        if row is None:
            assert isinstance(outcome, Problem)
            _sort(outcome, self.remedies)
            return
        for code, place in self._signs(row, outcome):
            self.signs.setdefault(code, Places()).add(place)
        for key, value in row.unused:
            name = _cut(printable(str(key)))
            if name not in self.columns:
                self.columns[name] = Column(shown(value), row.place)
            self.columns[name].num_rows += 1
        if isinstance(row, Conversation):
            self.talks.num += 1
            self.talks.num_without_system += row.system is None

    def findings(self, repeated: Iterable[str] = ()) -> list[Finding]:
        """All that was found; `repeated` rows are told with the rest."""
        found = [
            Finding("error", code, MEANINGS[code][1], tuple(places.first), fix, places.more)
            for code, by_remedy in (("unreadable", self.remedies), ("refused", self.refused))
            for fix, places in by_remedy.items()
        ]
        found += [_finding(code, self.signs[code]) for code in MEANINGS if code in self.signs]
        found += find("duplicate", repeated) + unused_columns(self.columns)
        return found + default_system(self.talks, self.quirks.default_system, self.place)

    def _signs(self, row: Row, outcome: Outcome) -> Iterator[Sign]:
        if isinstance(outcome, Marked):
            yield from row_signs(row, outcome, self.tokenizer, self.turns, self.loss_on)
            yield from marker_signs(row, self.quirks)
        elif isinstance(outcome, DataError):
            inside = special_tokens(row, self.tokenizer, self.turns)
            yield from (("special-token", place) for place in inside)
            for problem in () if inside else outcome.problems:
                _sort(problem, self.refused)
        yield from text_signs(row, self.quirks)


def _sort(problem: Problem, by_remedy: dict[str, Places]) -> None:
    """Put a row's place and what is wrong with it to the others that the same remedy mends."""
    room = problem.remedy in by_remedy or len(by_remedy) < MAX_REMEDIES
    told = str(Problem(problem.place, problem.reason))
    by_remedy.setdefault(problem.remedy if room else _OTHERS, Places()).add(told)


def find(code: str, places: Iterable[str]) -> list[Finding]:
    """The finding of `code` at these places; none where there are none."""
    found = Places()
    for place in places:
        found.add(place)
    return [_finding(code, found)] if found.first else []


def _finding(code: str, places: Places) -> Finding:
    grade, what, fix = MEANINGS[code]
    return Finding(grade, code, what, tuple(places.first), fix, places.more)


def unused_columns(columns: Mapping[str, Column]) -> list[Finding]:
    """Every key that is left out, with an example; a note where all of them only describe their rows."""
    if not columns:
        return []
    missed = {name for name in columns if not describes(name.removesuffix(" of messages"))}
    names = sorted(columns, key=lambda name: (name not in missed, name))
    listed = ", ".join(f"`{name}`" for name in names[:MAX_NAMES])
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    places = tuple(_example(name, columns[name]) for name in names[:MAX_PROBLEMS])
    fix = "Right if they only describe the rows; what the model shall learn belongs into keys that are used."
    return [
        Finding(
            "warning" if missed else "note",
            "unused-columns",
            f"Keys of the rows that are not used, and that the model never sees: {listed}{rest}.",
            places,
            fix,
            len(names) - len(places),
        )
    ]


def _cut(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


def _example(name: str, column: Column) -> str:
    rows = f"{column.num_rows} row{'' if column.num_rows == 1 else 's'}"
    return f"{column.place}: `{name}`: {column.example}, in {rows}"


def default_system(talks: Counts, text: str, place: str) -> list[Finding]:
    """What the chat template says in front of rows that have no system message."""
    if not text or not talks.num_without_system:
        return []
    cut = text if len(text) <= MAX_SYSTEM else f"{text[: MAX_SYSTEM - 3]}..."
    what = (
        f"{talks.num_without_system} of {talks.num} rows have no system message, and the base's chat "
        f"template puts its own in front of them: {cut!r}."
    )
    fix = "Right if the tuned model is asked the same way; else give the rows a system message of your own."
    return [Finding("note", "default-system", what, (place,), fix)]


def examine_answers(
    talks: Iterable[Conversation], evaluate: Evaluate, tokenizer: Any, place: str
) -> list[Finding]:
    """Expected answers that evaluate.max_new_tokens has no room for."""
    metrics = [name for name in GENERATION_METRICS if name in evaluate.metrics]
    if not metrics:
        return []
    limit, cut, longest = evaluate.max_new_tokens, Places(), 0
    asked = list(islice(talks, evaluate.samples))
    for talk in asked:
        _, answer = prompt_ids(talk, tokenizer)
        length = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        longest = max(longest, length)
        if length > limit:
            cut.add(f"{talk.place}: {length} tokens")
    if not cut.first:
        return []
    num_cut = len(cut.first) + cut.more
    what = (
        f"{num_cut} of the {len(asked)} answers of {place} that are asked for are longer than "
        f"evaluate.max_new_tokens {limit}: a model that gives them is cut off, and {' and '.join(metrics)} "
        f"{'counts' if len(metrics) == 1 else 'count'} it as wrong."
    )
    fix = f"Set evaluate.max_new_tokens={longest + 1}."
    return [Finding("warning", "answers-cut", what, tuple(cut.first), fix, cut.more)]


def special_tokens(row: Row, tokenizer: Any, turns: Turns) -> list[str]:
    """Places of special tokens inside text, each with the token."""
    found = []
    for place, text in texts_of(row):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in dict.fromkeys(token for token in ids if token in turns.special):
            found.append(f"{place}: {tokenizer.decode([token])}")
    return found


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


def _short_answers(talk: Conversation, trained: list[tuple[int, int]]) -> Iterator[Sign]:
    """Trained answers of fewer than two tokens, the one that ends them not counted."""
    if all(stop - start > 2 for start, stop in trained):
        return
    messages = enumerate(talk.messages)
    answers = [i for i, message in messages if message.role == "assistant" and message.trained]
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
        sizes = f"the shortest has {int(lengths.min()):,} tokens, the longest {int(lengths.max()):,}"
        return [Finding("error", "overlong", f"Every row is longer than {limit}: {sizes}.", (place,), fix)]
    grade: Grade = "error" if data.overlong == "error" else "note"
    what = f"Rows are longer than {limit}; data.overlong is {data.overlong}."
    return [Finding(grade, "overlong", what, tuple(over.first), fix, over.more)]


def examine_overlap(held_out: Fingerprints, train: Fingerprints, *, copies_may_be: bool) -> list[Finding]:
    """Held-out rows that ask what training rows ask; an error where most of them are training rows."""
    found = find("overlap", held_out.shared(train))
    num, copied = len(held_out.whole), held_out.num_copied(train)
    if copies_may_be or 2 * copied <= num:
        return found
    example = found[0].places[0]
    what = f"{copied} of {num} held-out rows are training rows too: what is measured is memory ({example})."
    fix = (
        "Hold out rows of their own, or a share with data.eval={fraction: 0.05}. To measure memory on "
        "purpose, set data.eval.limit."
    )
    return [Finding("error", "overlap", what, ("data.eval",), fix)]


def examine_batch(num_rows: int, effective_batch: int, place: str) -> list[Finding]:
    """An optimizer step that asks for more rows than there are; none at all is another finding."""
    if effective_batch <= num_rows or not num_rows:
        return []
    what = (
        f"train.effective_batch {effective_batch} is more than all rows ({num_rows}): an epoch is one step."
    )
    fix = f"Set train.effective_batch to {num_rows} or less, or add rows."
    return [Finding("warning", "large-batch", what, (place,), fix)]
