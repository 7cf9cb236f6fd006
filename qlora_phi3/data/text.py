"""Plain text to rows of tokens: no chat template, every token trained on.

Owns what becomes of a document that is longer than a row. Refuses special tokens inside text, as in messages.
"""

from __future__ import annotations

from typing import Any

from ..errors import DataError, ModelError
from ..recipe import Data
from .overlong import Fitted
from .rows import Text
from .tokens import Marked, Turns, check_plain


def mark_text(text: Text, tokenizer: Any, turns: Turns) -> Marked:
    """The document's ids and the end of text: all trained on but the first, which nothing predicts.

    Raises:
        DataError: it contains a special token.
        ModelError: the tokenizer has no token for the end of a text.
    """
    if tokenizer.eos_token_id is None:
        reason = "the tokenizer has no end-of-text token: a model trained on plain text would never stop."
        raise ModelError("tokenizer", reason, "Use a base that has one.")
    return marked_text(text, check_plain(text.text, text.place, tokenizer, turns), tokenizer.eos_token_id)


def marked_text(text: Text, ids: list[int], end: int) -> Marked:
    """The row of a document whose ids are known; `end` is the end of text."""
    return _row([*ids, end], text)


def fit_text(text: Text, row: Marked, data: Data) -> Fitted:
    """A document, which `row` is in tokens, as rows of at most `data.max_length`, as `data.overlong` says.

    `truncate` ends what is left with the end of text. `split` does not: only the last part has it, and each
    part begins with the last token of the one before, so that every token is predicted once.

    Raises:
        DataError: it is too long for `overlong: error`.
    """
    ids, limit = row.input_ids, data.max_length
    if len(ids) <= limit:
        return Fitted(((text, row),))
    if data.overlong == "error":
        reason = f"has {len(ids)} tokens, data.max_length is {limit}."
        raise DataError(text.place, reason, "Raise data.max_length, or set data.overlong to split.")
    if data.overlong == "drop":
        return Fitted(num_dropped=1)
    if data.overlong == "truncate":
        return Fitted(((text, _row([*ids[: limit - 1], ids[-1]], text)),), num_truncated=1)
    starts = range(0, len(ids) - 1, limit - 1)
    return Fitted(tuple((text, _row(ids[start : start + limit], text)) for start in starts), num_split=1)


def _row(ids: list[int], text: Text) -> Marked:
    return Marked(ids, [(1, len(ids))] if len(ids) > 1 else [], text.place)
