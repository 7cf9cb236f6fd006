"""Rows that are longer than `data.max_length`: dropped, truncated, split, or an error.

Owns what is left of a long conversation, and counts what is not. Refuses to keep a row without a
supervised token, or one whose last answer does not end: a model trained on it would not stop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError
from ..recipe import Data
from .rows import Conversation, Message, Row
from .tokens import Marked, Turns, assistant_spans, mark

Talk = tuple[Conversation, Marked]
Kept = tuple[Row, Marked]


@dataclass(frozen=True)
class Fitted:
    """What came of some conversations: the rows that fit, each with its messages, and what was lost.

    `num_dropped`: rows, or exchanges of split rows, of which nothing could be kept. `num_truncated`: kept
    rows that were cut. `num_split`: conversations that became several rows.
    """

    rows: tuple[Kept, ...] = ()
    num_dropped: int = 0
    num_truncated: int = 0
    num_split: int = 0

    @property
    def lost(self) -> bool:
        """Whether anything was dropped, cut or split."""
        return bool(self.num_dropped or self.num_truncated or self.num_split)

    @property
    def counts(self) -> Fitted:
        """The same without its rows."""
        return replace(self, rows=())

    @classmethod
    def sum(cls, parts: Iterable[Fitted]) -> Fitted:
        parts = list(parts)
        return cls(
            tuple(kept for part in parts for kept in part.rows),
            sum(part.num_dropped for part in parts),
            sum(part.num_truncated for part in parts),
            sum(part.num_split for part in parts),
        )


@dataclass(frozen=True)
class Fitter:
    """Makes rows of at most `data.max_length` tokens out of conversations, as `data.overlong` says."""

    data: Data
    tokenizer: Any
    turns: Turns

    def fit(self, conversation: Conversation, row: Marked) -> Fitted:
        """The rows of one conversation, which `row` is in tokens.

        Raises:
            DataError: it is too long for `overlong: error`, or a part of it cannot be tokenized.
        """
        if self._fits(row):
            return Fitted(((conversation, row),))
        if self.data.overlong == "error":
            reason = f"has {len(row.input_ids)} tokens, data.max_length is {self.data.max_length}."
            remedy = "Raise data.max_length, or set data.overlong to drop, truncate or split."
            raise DataError(row.place, reason, remedy)
        if self.data.overlong == "drop":
            return Fitted(num_dropped=1)
        return (
            self._truncate(conversation, row)
            if self.data.overlong == "truncate"
            else self._split(conversation)
        )

    def _truncate(self, conversation: Conversation, row: Marked) -> Fitted:
        """Cut inside the last answer that begins early enough, or behind it, and end it there.

        At least one token of the answer stays before its end: an empty answer would teach to say nothing.
        The cut may fall between the bytes of one character.
        """
        limit, spans = self.data.max_length, assistant_spans(row.input_ids, self.turns)
        answers = [message for message in conversation.messages if message.role == "assistant"]
        pairs = zip(spans, answers, strict=True)
        begun = [i for i, ((start, _), answer) in enumerate(pairs) if start + 2 <= limit and answer.trained]
        if not begun or (self.data.loss_on == "last" and begun[-1] != len(spans) - 1):
            return Fitted(num_dropped=1)
        stop = min(spans[begun[-1]][1], limit)
        cut = Marked([*row.input_ids[: stop - 1], self.turns.end], _cut(row.trained, stop), row.place)
        return Fitted(((_through_answer(conversation, begun[-1]), cut),), num_truncated=1)

    def _split(self, conversation: Conversation) -> Fitted:
        """As many exchanges a row as fit; one that does not fit alone is truncated."""
        messages, starts = conversation.messages, exchanges(conversation.messages)
        found: list[Talk] = []
        first = 0
        for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
            piece = self._part(conversation, first, stop)
            if start > first and self._fits(piece[1]):
                found.pop()
            elif start > first:
                first, piece = start, self._part(conversation, start, stop)
            found.append(piece)
        parts = [self._kept(talk, row) for talk, row in found]
        return replace(Fitted.sum(parts), num_split=int(len(found) > 1))

    def _kept(self, talk: Conversation, row: Marked) -> Fitted:
        """A part of a conversation, where it has something to train on."""
        if not row.trained:
            return Fitted(num_dropped=1)
        return Fitted(((talk, row),)) if self._fits(row) else self._truncate(talk, row)

    def _part(self, conversation: Conversation, start: int, stop: int) -> Talk:
        """Messages `start` to `stop` behind the system messages that came before them."""
        messages = conversation.messages
        system = tuple(message for message in messages[:start] if message.role == "system")
        part = replace(conversation, messages=system + messages[start:stop])
        return part, self._row(part)

    def _row(self, conversation: Conversation) -> Marked:
        return mark(conversation, self.tokenizer, self.turns, self.data.loss_on)

    def _fits(self, row: Marked) -> bool:
        return len(row.input_ids) <= self.data.max_length


def exchanges(messages: tuple[Message, ...]) -> list[int]:
    """Where exchanges begin: a question, or several, and what answers it.

    A question at the end that nothing answers belongs to the exchange before it; a tool's result to its call.
    """
    roles = [message.role for message in messages]
    asks = [role not in ("assistant", "tool") for role in roles]
    starts = [i for i in range(1, len(roles)) if asks[i] and not asks[i - 1]]
    return [0, *(start for start in starts if "assistant" in roles[start:])]


def _through_answer(conversation: Conversation, number: int) -> Conversation:
    """Up to and including the assistant message of this number."""
    answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    return replace(conversation, messages=conversation.messages[: answers[number] + 1])


def _cut(trained: list[tuple[int, int]], stop: int) -> list[tuple[int, int]]:
    """The runs before `stop`, of which the last token, an end put there, is always trained on."""
    kept = [(start, min(end, stop - 1)) for start, end in trained if start < stop - 1]
    if kept and kept[-1][1] == stop - 1:
        return [*kept[:-1], (kept[-1][0], stop)]
    return [*kept, (stop - 1, stop)]
