"""What a split looks like: its figures, and single rows token by token.

Owns the length histogram, the padding shares and the text that each token adds. Judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from .packing import best_fit
from .tokens import IGNORE, TokenRow

if TYPE_CHECKING:
    from .parts import Part

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

    Units: tokens; shares from 0 to 1. `rows` counts what could be turned into tokens, and what follows up to
    `over_max_length_share` is of those. `dropped_share` and `truncated_share` are of the rows that
    data.overlong makes of them, lost ones included, and so are the paddings of the kept ones: in batches of
    `micro_batch`, each row alone, and with as many rows as fit into data.max_length behind one another.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    longest_row_tokens: int
    over_max_length_share: float
    dropped_share: float
    truncated_share: float
    micro_batch: int
    padding_share: float
    packed_rows: int
    packed_padding_share: float
    histogram: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Piece:
    """A token as text; empty while a character is still incomplete."""

    token: int
    text: str
    trained: bool


def summarize(part: Part, max_length: int, micro_batch: int, seed: int) -> Summary:
    """Figures of a split; the batches for the padding are drawn with `seed`, not the run's own."""
    lengths, kept, fitted = part.lengths, part.rows.lengths, part.fitted
    num_tokens, num_made = int(lengths.sum()), max(len(kept) + fitted.num_dropped, 1)
    draw = np.random.default_rng(seed).permutation
    packed = np.array([int(kept[rows].sum()) for rows in best_fit(kept, max_length)], dtype=np.int64)
    return Summary(
        rows=len(lengths),
        tokens=num_tokens,
        supervised_tokens=part.num_supervised,
        supervised_share=part.num_supervised / max(num_tokens, 1),
        longest_row_tokens=int(lengths.max(initial=0)),
        over_max_length_share=float((lengths > max_length).mean()) if len(lengths) else 0.0,
        dropped_share=fitted.num_dropped / num_made,
        truncated_share=fitted.num_truncated / num_made,
        micro_batch=micro_batch,
        padding_share=padding_share(draw(kept), micro_batch),
        packed_rows=len(packed),
        packed_padding_share=padding_share(draw(packed), micro_batch),
        histogram=histogram(lengths),
    )


def padding_share(lengths: NDArray[Any], micro_batch: int) -> float:
    """Share of padding when rows are batched in this order, each batch as wide as its longest row."""
    if not len(lengths):
        return 0.0
    starts = np.arange(0, len(lengths), micro_batch)
    rows = np.diff(np.append(starts, len(lengths)))
    area = int((np.maximum.reduceat(lengths, starts).astype(np.int64) * rows).sum())
    return 1 - int(lengths.sum()) / area


def histogram(lengths: NDArray[Any]) -> tuple[Bin, ...]:
    """At most MAX_BINS bins of one round width from the shortest row to the longest."""
    if not len(lengths):
        return ()
    low, high = int(lengths.min()), int(lengths.max())
    widths = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < MAX_BINS)
    first = low // width
    counts = np.bincount(lengths // width - first).tolist()
    return tuple(Bin(at * width, (at + 1) * width - 1, rows) for at, rows in enumerate(counts, start=first))


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
