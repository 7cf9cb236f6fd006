"""Weights out of bitsandbytes' NF4, whole or a slice of their rows or columns.

Source: bitsandbytes 0.50 functional.py, QuantState and dequantize_4bit: row-major, two weights a byte, a
scale per 64; with double quantization scales are uint8 codes with a float32 per 256 and a common mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from .backend import block_of, launch, takes_triton

if TYPE_CHECKING:
    import triton.language as tl

BYTES: Final = 1024
"""Packed bytes that a program reads."""


def dequantize(
    packed: torch.Tensor,
    state: Any,
    *,
    rows: Sequence[tuple[int, int]] | None = None,
    columns: tuple[int, int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A weight in the dtype it had; of it spans [start, stop) of rows, one behind the other, or of columns.

    Spans begin and end at whole blocks of 64 weights. Every bit is that of bitsandbytes on a CPU.

    Shape: packed (ceil(rows * columns / 2), 1) uint8; returns (rows, columns), `out` where it is given,
        contiguous and of that dtype.
    """
    num_rows, num_columns = state.shape
    runs = _runs(state, rows, columns)
    shape = (
        num_rows if rows is None else sum(stop - start for start, stop in rows),
        num_columns if columns is None else columns[1] - columns[0],
    )
    fits = out is None or (out.shape == shape and out.dtype == state.dtype and out.is_contiguous())
    assert fits, f"not memory for {shape} in {state.dtype}"
    if not takes_triton(packed.device, state.dtype):
        found = _reference(packed, state, rows, columns)
        return found if out is None else out.copy_(found)
    out = torch.empty(shape, dtype=state.dtype, device=packed.device) if out is None else out
    at = 0
    for run in runs:
        _launch(packed, state, run, out, at)
        at += run.spans * run.length
    return out


def _reference(
    packed: torch.Tensor,
    state: Any,
    rows: Sequence[tuple[int, int]] | None,
    columns: tuple[int, int] | None,
) -> torch.Tensor:
    num_rows, num_columns = state.shape
    size, scales = state.blocksize, _scales(state)
    if rows is not None and list(rows) != [(0, num_rows)]:
        ends = [(start * num_columns, stop * num_columns) for start, stop in rows]
        packed = torch.cat([packed.view(-1)[start // 2 : stop // 2] for start, stop in ends])
        scales = torch.cat([scales[start // size : stop // size] for start, stop in ends])
        num_rows = sum(stop - start for start, stop in rows)
    if columns is not None:
        first, last = columns
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


class _Run(NamedTuple):
    """Spans of one length at one distance. Units: blocks that share a scale."""

    spans: int
    length: int
    distance: int
    start: int


def _runs(state: Any, rows: Sequence[tuple[int, int]] | None, columns: tuple[int, int] | None) -> list[_Run]:
    """What is taken, in the order it is wanted: as one run wherever it is one.

    A slice of columns is one, and so are rows of gate and of up, which are the same in the two halves.
    """
    (num_rows, num_columns), size = state.shape, state.blocksize
    if columns is not None:
        first, last = columns
        assert first % size == last % size == num_columns % size == 0, "a span of columns cuts a block"
        across, length = num_columns // size, (last - first) // size
        each = rows or [(0, num_rows)]
        return [_Run(stop - start, length, across, start * across + first // size) for start, stop in each]
    if rows is None:
        return [_Run(1, -(-num_rows * num_columns // size), 0, 0)]
    ends = [(start * num_columns, stop * num_columns) for start, stop in rows]
    assert all(end % size == 0 for span in ends for end in span), "a span of rows cuts a block"
    blocks = [(start // size, (stop - start) // size) for start, stop in ends]
    lengths = {length for _, length in blocks}
    distances = {later[0] - earlier[0] for earlier, later in pairwise(blocks)} or {0}
    if len(lengths) == len(distances) == 1:
        return [_Run(len(blocks), lengths.pop(), distances.pop(), blocks[0][0])]
    return [_Run(1, length, 0, start) for start, length in blocks]


def _launch(packed: torch.Tensor, state: Any, run: _Run, out: torch.Tensor, at: int) -> None:
    """Write the run into `out`, from its block `at` on."""
    assert packed.dtype == torch.uint8, f"two weights a byte, not {packed.dtype}"
    second = state.state2
    nested = (second.absmax, second.code, state.offset) if state.nested else (state.absmax,) * 3
    half = state.blocksize // 2
    blocks = max(1, min(BYTES // half, block_of(run.length)))
    parts = -(-run.length // blocks)
    sizes = run.length, run.distance, run.start, at, parts, math.prod(state.shape), packed.numel()
    launch(
        _kernel,
        (run.spans * parts,),
        packed,
        state.absmax,
        state.code,
        *nested,
        out,
        *sizes,
        NESTED=state.nested,
        SECOND=second.blocksize if state.nested else 1,
        HALF=half,
        BLOCKS=blocks,
    )


def _kernel(
    packed: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    second_absmax: tl.tensor,
    second_code: tl.tensor,
    mean: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    distance: tl.tensor,
    start: tl.tensor,
    at: tl.tensor,
    parts: tl.tensor,
    num_weights: tl.tensor,
    num_bytes: tl.tensor,
    NESTED: tl.constexpr,
    SECOND: tl.constexpr,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    span = (tl.program_id(0) // parts).to(tl.int64)
    block = (tl.program_id(0) % parts) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < length
    source = span * distance + start + block
    if NESTED:
        which = tl.load(absmax + source, mask=inside, other=0).to(tl.int32)
        scale = tl.load(second_code + which) * tl.load(second_absmax + source // SECOND, mask=inside)
        scale = scale + tl.load(mean)
    else:
        scale = tl.load(absmax + source, mask=inside, other=0.0)
    byte = source[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + byte, mask=inside[:, None] & (byte < num_bytes), other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]
    weight = tl.arange(0, 2 * HALF)[None, :]
    there = inside[:, None] & (source[:, None] * (2 * HALF) + weight < num_weights)
    place = (at + span * length + block)[:, None] * (2 * HALF) + weight
    tl.store(out + place, tl.interleave(high, low).to(out.dtype.element_ty), mask=there)
