"""Weights out of bitsandbytes' NF4, whole or a slice of their rows or columns.

Source: bitsandbytes 0.50 functional.py, QuantState and dequantize_4bit: row-major, two weights a byte, a
scale per 64; with double quantization scales are uint8 codes with a float32 per 256 and a common mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def dequantize(
    packed: torch.Tensor,
    state: Any,
    *,
    rows: Sequence[tuple[int, int]] | None = None,
    columns: tuple[int, int] | None = None,
) -> torch.Tensor:
    """A weight in the dtype it had; of it spans [start, stop) of rows, one behind the other, or of columns.

    Spans begin and end at whole blocks of 64 weights.

    Shape: packed (ceil(rows * columns / 2), 1) uint8; returns (rows, columns).
    """
    num_rows, num_columns = state.shape
    size, scales = state.blocksize, _scales(state)
    if rows is not None and list(rows) != [(0, num_rows)]:
        ends = [(start * num_columns, stop * num_columns) for start, stop in rows]
        assert all(end % size == 0 for span in ends for end in span), "a span of rows cuts a block"
        packed = torch.cat([packed.view(-1)[start // 2 : stop // 2] for start, stop in ends])
        scales = torch.cat([scales[start // size : stop // size] for start, stop in ends])
        num_rows = sum(stop - start for start, stop in rows)
    if columns is not None:
        first, last = columns
        assert first % size == last % size == num_columns % size == 0, "a span of columns cuts a block"
        packed = packed.view(num_rows, -1)[:, first // 2 : last // 2].contiguous()
        scales = scales.view(num_rows, -1)[:, first // size : last // size].contiguous().view(-1)
        num_columns = last - first
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.view(-1, 1), scales, size, state.quant_type, (num_rows, num_columns), state.dtype
    )
    return found


def _scales(state: Any) -> torch.Tensor:
    """A float32 per block."""
    if not state.nested:
        found: torch.Tensor = state.absmax
        return found
    second = state.state2
    scales: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        state.absmax, second.absmax, second.code, second.blocksize, second.dtype
    )
    return scales.add_(state.offset)
