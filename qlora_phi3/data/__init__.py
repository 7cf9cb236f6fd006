"""From the user's files to rows of tokens: read -> normalise -> template -> tokens and mask.

Owns what the model sees and what it is trained on. Every row that is left out is counted and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, Problem
from ..recipe import Data, Source
from .formats import Conversation
from .read import check_files, read, shortened
from .tokens import TokenRow, Turns, prompt_ids, tokenize

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
    """Rows of one source. Units: `num_tokens` and `num_supervised` in tokens of the kept rows."""

    rows: list[TokenRow]
    conversations: list[Conversation]
    num_dropped: int

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
        }


@dataclass(frozen=True)
class Splits:
    """Training rows, held-out rows if any, and how the template frames a turn."""

    train: Split
    eval: Split | None
    turns: Turns


Conversations = Mapping[str, list[Conversation]]
"""Rows as read, by split: "train", and "eval" where the recipe has it."""


def read_all(data: Data) -> Conversations:
    """Read and check all rows, before a model is fetched for them.

    Raises:
        DataError: a source is missing, or rows cannot be read.
    """
    check_files(data)
    found = {"train": read(data.train)}
    if isinstance(data.eval, Source):
        found["eval"] = read(data.eval)
    return found


def load(data: Data, tokenizer: Any, conversations: Conversations | None = None) -> Splits:
    """Tokenize what the recipe names; read it first where `conversations` does not bring it.

    Raises:
        DataError: rows that cannot be read, are too long for `overlong: error`, or all dropped.
    """
    turns, rows = Turns.of(tokenizer), conversations or read_all(data)
    train = _split(rows["train"], data.train.path, data, tokenizer, turns)
    held_out = None
    if isinstance(data.eval, Source):
        held_out = _split(rows["eval"], data.eval.path, data, tokenizer, turns)
    return Splits(train, held_out, turns)


def prompts(split: Split, tokenizer: Any, limit: int) -> list[Prompt]:
    """The first `limit` conversations as prompts for their last answer."""
    found = []
    for conversation in split.conversations[:limit]:
        ids, expected = prompt_ids(conversation, tokenizer)
        before = conversation.messages[: conversation.last_answer]
        asked = next((m for m in reversed(before) if m.role == "user"), before[-1])
        found.append(Prompt(ids, expected, asked.content, conversation.place))
    return found


def _split(conversations: list[Conversation], place: str, data: Data, tokenizer: Any, turns: Turns) -> Split:
    rows: list[TokenRow] = []
    problems: list[Problem] = []
    for conversation in conversations:
        try:
            rows.append(tokenize(conversation, tokenizer, turns))
        except DataError as error:
            problems += error.problems
    fits = [len(row.input_ids) <= data.max_length for row in rows]
    if data.overlong == "error":
        problems += [_overlong(row, data.max_length) for row, fit in zip(rows, fits, strict=True) if not fit]
    if problems:
        raise DataError.of(shortened(problems, place))
    if not any(fits):
        reason = f"all {len(rows)} rows are longer than data.max_length {data.max_length}."
        raise DataError(place, reason, "Raise data.max_length.")
    kept = [(row, talk) for row, talk, fit in zip(rows, conversations, fits, strict=True) if fit]
    return Split([row for row, _ in kept], [talk for _, talk in kept], len(rows) - len(kept))


def _overlong(row: TokenRow, limit: int) -> Problem:
    reason = f"has {len(row.input_ids)} tokens, data.max_length is {limit}."
    return Problem(row.place, reason, "Raise data.max_length, or set data.overlong=drop.")
