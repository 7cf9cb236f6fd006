"""What a split looks like: its figures, and single rows token by token.

Owns the length histogram, the padding share and the text that each token adds. Judges nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from .tokens import IGNORE, TokenRow

MAX_BINS: Final = 10
MAX_CHARACTER_BYTES: Final = 4
"""UTF-8 has no longer ones, and a token may be a single byte."""


@dataclass(frozen=True)
class Bin:
    """Rows with `first` to `last` tokens, both included."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Summary:
    """Figures of a split.

    Units: tokens; shares from 0 to 1. `rows` counts what could be turned into tokens, and all other figures
    are of those; `padding_share` is of the rows that fit, in batches of `micro_batch` without packing.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    longest_row_tokens: int
    over_max_length_share: float
    micro_batch: int
    padding_share: float
    histogram: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """A token as text; empty while a character is still incomplete."""

    token: int
    text: str
    trained: bool


def summarize(rows: Sequence[TokenRow], max_length: int, micro_batch: int, seed: int) -> Summary:
    """Figures of a split; the batches for the padding are drawn with `seed`, not the run's own."""
    lengths = [len(row.input_ids) for row in rows]
    fits = [length for length in lengths if length <= max_length]
    supervised = sum(row.num_supervised for row in rows)
    return Summary(
        rows=len(rows),
        tokens=sum(lengths),
        supervised_tokens=supervised,
        supervised_share=supervised / max(sum(lengths), 1),
        longest_row_tokens=max(lengths, default=0),
        over_max_length_share=1 - len(fits) / max(len(lengths), 1) if lengths else 0.0,
        micro_batch=micro_batch,
        padding_share=padding_share(random.Random(seed).sample(fits, len(fits)), micro_batch),
        histogram=histogram(lengths),
    )


def padding_share(lengths: Sequence[int], micro_batch: int) -> float:
    """Share of padding when rows are batched in this order, each batch as wide as its longest row."""
    batches = [lengths[i : i + micro_batch] for i in range(0, len(lengths), micro_batch)]
    area = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / area if area else 0.0


def histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """At most MAX_BINS bins of one round width from the shortest row to the longest."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    widths = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < MAX_BINS)
    starts = range(low // width * width, high + 1, width)
    return tuple(
        Bin(start, start + width - 1, sum(start <= n < start + width for n in lengths)) for start in starts
    )


def pieces(row: TokenRow, tokenizer: Any) -> list[Piece]:
    """Every token of a row as the text that it adds.

    Each is decoded behind the one before it: alone, a Llama tokenizer would strip its leading space.
    """
    found: list[Piece] = []
    before: list[int] = []
    pending: list[int] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        pending.append(token)
        text = tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]
        partial = text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < MAX_CHARACTER_BYTES
        found.append(Piece(token, "" if partial else text, label != IGNORE))
        if not partial:
            before, pending = pending, []
    return found


def bracketed(found: Sequence[Piece]) -> str:
    """The text with [ ] around what is trained on."""
    marks = [False, *(piece.trained for piece in found), False]
    parts = []
    for piece, before, after in zip(found, marks, marks[2:], strict=False):
        opening = "[" if piece.trained and not before else ""
        closing = "]" if piece.trained and not after else ""
        parts.append(f"{opening}{piece.text}{closing}")
    return "".join(parts)
