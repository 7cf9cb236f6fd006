"""The recipe's splits in tokens, checked: what a run trains on and is measured with.

Owns what a split is, and which findings stop a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import DataError, Problem
from ..findings import Finding
from ..recipe import Data, Evaluate, Recipe, Train
from . import cache
from .doctor import examine_answers, examine_batch, examine_overlap
from .mix import draw
from .parts import Part, Reading, build
from .provenance import SourceRead, changed_since
from .read import EVALUATE, TRAIN, check_files, name_of
from .rows import Conversation
from .store import Rows
from .tokens import Turns, prompt_ids

KEPT: Final = 1024
"""Conversations of a split that are kept as text, evenly drawn; of the others only tokens are."""


@dataclass(frozen=True)
class Prompt:
    """What a held-out conversation asks for last, and the answer it has."""

    input_ids: list[int]
    expected: str
    text: str
    place: str


@dataclass(frozen=True)
class Split:
    """Rows of one split, some of the conversations that they hold, and what became of longer ones.

    `num_dropped`: rows, or exchanges of split rows, without room for an answer. `num_truncated`: kept rows
    that were cut. `num_split`: rows of the source that became several. `system_prompt`: the system message
    that all rows begin with, None where none does or they differ; the template's own does not count.
    Units: `num_tokens` and `num_supervised` in tokens of the kept rows.
    """

    rows: Rows
    conversations: list[Conversation]
    num_dropped: int
    num_truncated: int = 0
    num_split: int = 0
    system_prompt: str | None = None

    @property
    def num_tokens(self) -> int:
        return self.rows.num_tokens

    @property
    def num_supervised(self) -> int:
        return self.rows.num_supervised

    @property
    def longest(self) -> int:
        return int(self.rows.lengths.max())

    def to_json(self) -> dict[str, int]:
        return {
            "rows": len(self.rows),
            "tokens": self.num_tokens,
            "supervised_tokens": self.num_supervised,
            "longest_row_tokens": self.longest,
            "dropped_overlong_rows": self.num_dropped,
            "truncated_rows": self.num_truncated,
            "split_rows": self.num_split,
        }


@dataclass(frozen=True)
class Splits:
    """Training rows, held-out rows if any, how the template frames a turn, and what was read for them.

    `sources`: "train" or "eval", and a file or data set.
    """

    train: Split
    eval: Split | None
    turns: Turns
    sources: tuple[tuple[str, SourceRead], ...] = ()

    def changed(self) -> list[str]:
        """A sentence for each file that is not any more what was read of it."""
        return changed_since(one for _, one in self.sources)

    def sources_json(self) -> list[dict[str, Any]]:
        """What was read, for others: files by name and hash, data sets on the hub by id and commit."""
        used = {"train": "training rows", "eval": "held-out rows"}
        return [{"used_for": used[name], **one.to_json()} for name, one in self.sources]


@dataclass(frozen=True)
class Prepared:
    """All rows in tokens, by split: "train", and "eval" where the recipe has it."""

    parts: Mapping[str, Part]
    data: Data
    turns: Turns
    sources: tuple[tuple[str, SourceRead], ...] = ()
    answers: tuple[Finding, ...] = ()
    """On the expected answers, which depend on evaluate's keys and so are in no cached part."""

    def splits(self) -> Splits:
        """What a run uses.

        Raises:
            DataError: rows that cannot be used, or none that are left.
        """
        data = self.data
        names = {"train": name_of(data.train), "eval": name_of(data.eval_sources or data.train_sources)}
        problems = [one for name, part in self.parts.items() for one in part.problems.shortened(names[name])]
        if problems:
            raise DataError.of(problems)
        found = {name: _split(part, names[name], data) for name, part in self.parts.items()}
        return Splits(found["train"], found.get("eval"), self.turns, self.sources)

    def findings(self, effective_batch: int) -> list[Finding]:
        """All that the doctor has to say."""
        train, held_out = self.parts["train"], self.parts.get("eval")
        found = [finding for part in self.parts.values() for finding in part.findings]
        found += [*examine_batch(len(train.rows), effective_batch, "data.train"), *self.answers]
        if held_out is not None:
            meant = any(source.limit is not None for source in self.data.eval_sources)
            own = bool(self.data.eval_sources) and not meant  # a share of training's rows has no copies
            found += examine_overlap(held_out.fingerprints, train.fingerprints, copies_may_be=not own)
        return found


def prepare(data: Data, tokenizer: Any, train: Train = TRAIN, evaluate: Evaluate = EVALUATE) -> Prepared:
    """Read, tokenize and examine what the recipe names; of large files, what did not change is cached.

    Raises:
        DataError: a source is missing. What is wrong with single rows is in the parts.
        ModelError: the tokenizer or its template cannot be used.
    """
    check_files(data)
    turns, num_kept = Turns.of(tokenizer), max(evaluate.samples, KEPT)
    parts: dict[str, Part] = {}
    sources: list[tuple[str, SourceRead]] = []
    for name in ("train", "eval") if data.eval_sources else ("train",):
        reading = Reading(name, data, train, evaluate, tokenizer, turns, num_kept)
        key = cache.key(reading)
        parts |= build(reading) if key is None else cache.fetch(key, reading)
        sources += [(name, one) for one in reading.read]
    held_out = parts["eval"].conversations if "eval" in parts else []
    asked = [held_out[number] for number in draw(len(held_out), evaluate.samples, train.seed)]
    answers = examine_answers(asked, evaluate, tokenizer, "data.eval")
    return Prepared(parts, data, turns, tuple(sources), tuple(answers))


def load(data: Data, tokenizer: Any, train: Train = TRAIN, evaluate: Evaluate = EVALUATE) -> Splits:
    """The splits of a recipe in tokens, with the text of the conversations that `evaluate` asks for.

    Raises:
        DataError: rows that cannot be read or tokenized, are too long for `overlong: error`, or all dropped.
        ModelError: the tokenizer or its template cannot be used.
    """
    return prepare(data, tokenizer, train, evaluate).splits()


def check(recipe: Recipe, tokenizer: Any) -> tuple[Splits, list[Finding]]:
    """The splits of a recipe, and the warnings and notes of the doctor on them.

    Raises:
        DataError: what `load` refuses, or what the doctor calls an error.
    """
    prepared = prepare(recipe.data, tokenizer, recipe.train, recipe.evaluate)
    splits, findings = prepared.splits(), prepared.findings(recipe.train.effective_batch)
    errors = [finding for finding in findings if finding.grade == "error"]
    if errors:
        raise DataError.of(Problem(place, one.what, one.fix) for one in errors for place in one.places)
    return splits, findings


def prompts(split: Split, tokenizer: Any, limit: int, seed: int = TRAIN.seed) -> list[Prompt]:
    """`limit` conversations, drawn by the seed, as prompts for their last answer; none of plain text."""
    found = []
    for number in draw(len(split.conversations), limit, seed):
        conversation = split.conversations[number]
        ids, expected = prompt_ids(conversation, tokenizer)
        before = conversation.messages[: conversation.last_answer]
        asked = next((m for m in reversed(before) if m.role == "user"), before[-1])
        found.append(Prompt(ids, expected, asked.content, conversation.place))
    return found


def _split(part: Part, place: str, data: Data) -> Split:
    if not len(part.rows):
        reason = f"all {part.num_read} rows are longer than data.max_length {data.max_length}"
        detail = "." if data.overlong == "drop" else ", and none has room for an answer to train on."
        longest = int(part.lengths.max(initial=0))
        raise DataError(place, reason + detail, f"Raise data.max_length: the longest has {longest:,} tokens.")
    fitted = part.fitted
    return Split(
        part.rows,
        part.conversations,
        fitted.num_dropped,
        fitted.num_truncated,
        fitted.num_split,
        part.system_prompt,
    )
