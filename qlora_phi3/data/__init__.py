"""From the user's files to rows of tokens: read -> normalise -> template -> tokens and mask.

Owns what the model sees and what it is trained on. Every row that is left out is counted and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, Problem
from ..recipe import Data, Evaluate, Train
from .overlong import Fitted, Fitter
from .read import EVALUATE, TRAIN, check_files, name_of, read_splits, shortened
from .rows import Conversation, Example, Text
from .text import fit_text
from .tokens import TokenRow, Turns, prompt_ids

__all__ = ["Conversation", "Prompt", "Split", "Splits", "TokenRow", "check_files", "load"]


@dataclass(frozen=True)
class Prompt:
    """What a held-out conversation asks for last, and the answer it has."""

    input_ids: list[int]
    expected: str
    text: str
    place: str


@dataclass(frozen=True)
class Split:
    """Rows of one source, each with the conversation it holds, and what became of longer ones.

    `num_dropped`: rows, or exchanges of split rows, without room for an answer. `num_truncated`: kept rows
    that were cut. `num_split`: rows of the source that became several.
    Units: `num_tokens` and `num_supervised` in tokens of the kept rows.
    """

    rows: list[TokenRow]
    conversations: list[Conversation | Text]
    num_dropped: int
    num_truncated: int = 0
    num_split: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def num_supervised(self) -> int:
        return sum(row.num_supervised for row in self.rows)

    @property
    def longest(self) -> int:
        return max(len(row.input_ids) for row in self.rows)

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
    """Training rows, held-out rows if any, and how the template frames a turn."""

    train: Split
    eval: Split | None
    turns: Turns


Conversations = Mapping[str, list[Example]]
"""Rows as read, by split: "train", and "eval" where the recipe has it."""


def read_all(data: Data, train: Train = TRAIN, evaluate: Evaluate = EVALUATE) -> Conversations:
    """Read and check all rows, before a model is fetched for them.

    Raises:
        DataError: a source is missing, or rows cannot be read, or the run has no use for them.
    """
    check_files(data)
    return read_splits(data, train, evaluate)


def load(data: Data, tokenizer: Any, conversations: Conversations | None = None) -> Splits:
    """Tokenize what the recipe names; read it first where `conversations` does not bring it.

    Raises:
        DataError: rows that cannot be read, are too long for `overlong: error`, or all dropped.
    """
    turns, rows = Turns.of(tokenizer), conversations or read_all(data)
    train = _split(rows["train"], name_of(data.train), data, tokenizer, turns)
    held_out = None
    if "eval" in rows:
        name = name_of(data.eval_sources or data.train_sources)
        held_out = _split(rows["eval"], name, data, tokenizer, turns)
    return Splits(train, held_out, turns)


def prompts(split: Split, tokenizer: Any, limit: int) -> list[Prompt]:
    """The first `limit` conversations as prompts for their last answer."""
    found = []
    for conversation in split.conversations[:limit]:
        assert isinstance(conversation, Conversation)  # `read` refuses text where answers are asked for
        ids, expected = prompt_ids(conversation, tokenizer)
        before = conversation.messages[: conversation.last_answer]
        asked = next((m for m in reversed(before) if m.role == "user"), before[-1])
        found.append(Prompt(ids, expected, asked.content, conversation.place))
    return found


def _split(conversations: list[Example], place: str, data: Data, tokenizer: Any, turns: Turns) -> Split:
    fitter = Fitter(data, tokenizer, turns)
    parts: list[Fitted] = []
    problems: list[Problem] = []
    for conversation in conversations:
        try:
            parts.append(_fit(conversation, fitter))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError.of(shortened(problems, place))
    found = Fitted.sum(parts)
    if not found.rows:
        reason = f"all {len(conversations)} rows are longer than data.max_length {data.max_length}"
        detail = "." if data.overlong == "drop" else ", and none has room for an answer to train on."
        raise DataError(place, reason + detail, "Raise data.max_length.")
    rows, talks = [row for _, row in found.rows], [talk for talk, _ in found.rows]
    return Split(rows, talks, found.num_dropped, found.num_truncated, found.num_split)


def _fit(row: Example, fitter: Fitter) -> Fitted:
    if isinstance(row, Text):
        return fit_text(row, fitter.data, fitter.tokenizer, fitter.turns)
    assert isinstance(row, Conversation)  # `read` refuses preferences
    return fitter.fit(row)
