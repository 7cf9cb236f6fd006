"""Preferences to pairs of token rows, for training that compares two answers.

Owns the pair. Nothing trains on it yet: `train.task: dpo` is not available.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .rows import Preference
from .tokens import TokenRow, Turns, tokenize


@dataclass(frozen=True)
class Pair:
    """Two rows that begin with the same prompt; the labels stand on their last answers."""

    chosen: TokenRow
    rejected: TokenRow


def tokenize_pair(preference: Preference, tokenizer: Any, turns: Turns) -> Pair:
    """Both conversations in tokens, masked as `loss_on: last` masks them.

    Raises:
        DataError: one of them cannot be tokenized.
    """
    chosen, rejected = (
        tokenize(preference.conversation(answer), tokenizer, turns, "last")
        for answer in (preference.chosen, preference.rejected)
    )
    return Pair(chosen, rejected)
