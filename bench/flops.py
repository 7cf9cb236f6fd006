"""Model FLOPs of a training step: what the mathematics of LoRA needs, however a toolkit computes it."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_phi3.phi3 import Geometry

from .probe import IGNORE, Row


def of_rows(rows: Iterable[Row], geometry: Geometry, trained_parameters: int) -> int:
    """Floating-point operations of one forward and backward of rows, without pads and without recomputing.

    A frozen linear of n weights: 2n a token forward and 2n for its input's gradient, together 4n; there is no
    gradient of its weight. A trained one: 6n. The head likewise 4n, for supervised tokens only. Attention:
    for every pair of a query and a key it sees, 2 products of head_dim in each head forward (4 x heads x
    head_dim operations) and twice that backward. Norms, activations and the optimizer are not counted.
    """
    head = 4 * geometry.vocab_size * geometry.hidden_size
    token = 4 * geometry.num_linear_parameters + 6 * trained_parameters
    pair = 12 * geometry.num_layers * geometry.num_heads * geometry.head_dim
    total = 0
    for ids, labels in rows:
        supervised = sum(label != IGNORE for label in labels[1:])
        total += len(ids) * token + supervised * head + pairs(len(ids), geometry.sliding_window) * pair
    return total


def pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key at or before it, in a row, and within the window."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen
