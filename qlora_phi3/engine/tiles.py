"""Causal attention over documents with its backward written out, in tiles of bounded scratch.

Owns what the native layer's attention computes: from qkv_proj's output to o_proj's input, and back from the
gradient of that. A tile has all keys of its queries, so nothing passes from forward to backward: its weights
are made again. CUDA's flash attention takes the place of the tiles where it can, and hands over a logsumexp
per query and head; that path is untested on hardware.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from ..case import SCORES, head_groups
from ..kernels.wide import wide_dtype
from .attention import flash_takes


@dataclass(frozen=True)
class Heads:
    """How a row of qkv_proj's output is cut into heads: queries, then keys, then values."""

    num: int
    num_kv: int
    width: int

    @property
    def shares(self) -> int:
        """Query heads that have the same keys."""
        return self.num // self.num_kv

    @property
    def size(self) -> int:
        """Columns of qkv_proj's output."""
        return (self.num + 2 * self.num_kv) * self.width

    def turning(self, qkv: torch.Tensor) -> torch.Tensor:
        """A view of the heads that get positions.

        Shape: qkv (tokens, size) -> (tokens, queries and keys, width).
        """
        return self.cut(qkv[:, : (self.num + self.num_kv) * self.width])

    def cut(self, rows: torch.Tensor) -> torch.Tensor:
        """Shape: (..., n * width) -> (..., n, width), a view."""
        return rows.view(*rows.shape[:-1], -1, self.width)

    def parts(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views (..., n, width) of queries, keys and values. Shape: qkv (..., size)."""
        q, k, v = torch.split(self.cut(qkv), [self.num, self.num_kv, self.num_kv], dim=-2)
        return q, k, v


@dataclass(frozen=True)
class _Whole:
    """Documents that are computed together, each padded to the longest.

    Shape: `tokens` (documents * longest,) their tokens' places, a pad's that of its document's first; `real`
        and `pads` the places in that of either, None where there are no pads.
    """

    count: int
    longest: int
    tokens: torch.Tensor
    real: torch.Tensor | None = None
    pads: torch.Tensor | None = None

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int]], device: torch.device) -> _Whole:
        starts, stops = (torch.tensor(ends) for ends in zip(*spans, strict=True))
        lengths = stops - starts
        longest = int(lengths.max())
        places = torch.arange(longest).expand(len(spans), -1)
        real = places < lengths[:, None]
        tokens = (starts[:, None] + places * real).flatten().to(device)
        if bool(real.all()):
            return cls(len(spans), longest, tokens)
        kept, pads = (mask.flatten().nonzero().flatten().to(device) for mask in (real, ~real))
        return cls(len(spans), longest, tokens, kept, pads)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Shape: (tokens, ...) -> (documents, longest, ...)."""
        return rows.index_select(0, self.tokens).view(self.count, self.longest, *rows.shape[1:])

    def take_zeroed(self, rows: torch.Tensor) -> torch.Tensor:
        """The same, pads zero: as queries they then give nothing to anything."""
        found = self.take(rows)
        if self.pads is not None:
            found.flatten(0, 1)[self.pads] = 0
        return found

    def put(self, padded: torch.Tensor, rows: torch.Tensor) -> None:
        """Shape: (documents, longest, ...) -> written into (tokens, ...)."""
        flat, tokens = padded.flatten(0, 1), self.tokens
        if self.real is not None:
            flat, tokens = flat.index_select(0, self.real), tokens.index_select(0, self.real)
        rows.index_copy_(0, tokens, flat)


@dataclass(frozen=True)
class Group:
    """Heads that are computed at once, as a run of their own, None where they are all heads.

    `rows` of qkv_proj's output are theirs, `columns` of o_proj's input, `queries` of the query heads.
    """

    run: Run | None
    rows: list[tuple[int, int]]
    columns: tuple[int, int]
    queries: slice

    @property
    def whole(self) -> bool:
        return self.run is None


@dataclass(frozen=True)
class Run:
    """What the layers of one pass share: where its documents end, its window, its cosines and sines.

    `most_columns`: of queries, keys and values together that a layer which recomputes has at once.

    Shape: bounds (documents + 1,) int32 on the CPU; cos and sin (tokens, rotary).
    """

    bounds: torch.Tensor
    window: int | None
    cos: torch.Tensor
    sin: torch.Tensor
    heads: Heads
    scale: float
    most_columns: int | None = None

    @cached_property
    def all_heads(self) -> list[Group]:
        """One group."""
        return self._grouped([(0, self.heads.num_kv)])

    @cached_property
    def head_groups(self) -> list[Group]:
        """As `most_columns` has them."""
        heads = self.heads
        return self._grouped(head_groups(heads.num, heads.num_kv, heads.width, self.most_columns))

    def _grouped(self, spans: list[tuple[int, int]]) -> list[Group]:
        heads, found, runs = self.heads, list[Group](), dict[int, Run | None]()
        for start, stop in spans:
            size, first = stop - start, heads.num * heads.width
            if size == heads.num_kv:
                runs[size] = None  # itself, which would never be freed
            elif size not in runs:
                runs[size] = replace(self, heads=Heads(size * heads.shares, size, heads.width))
            queries = start * heads.shares, stop * heads.shares
            columns = queries[0] * heads.width, queries[1] * heads.width
            keys = [first + at * heads.width for at in (start, stop)]
            values = [at + heads.num_kv * heads.width for at in keys]
            rows = [columns, (keys[0], keys[1]), (values[0], values[1])]
            rows = [(0, heads.size)] if size == heads.num_kv else rows
            found.append(Group(runs[size], rows, columns, slice(*queries)))
        return found

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        return list(pairwise(self.bounds.tolist()))

    @cached_property
    def groups(self) -> list[_Whole]:
        """Documents short enough to be computed whole, those of like length together."""
        short = [span for span in self.spans if self._area(1, span[1] - span[0]) <= SCORES]
        found: list[list[tuple[int, int]]] = []
        for span in sorted(short, key=lambda one: one[1] - one[0]):
            # the newest is the longest; more than half of a group's scores are never of pads
            if found and self._joins(found[-1], span):
                found[-1].append(span)
            else:
                found.append([span])
        return [_Whole.of(sorted(group), self.cos.device) for group in found]

    @cached_property
    def long(self) -> list[tuple[int, int]]:
        """Documents that are gone through in blocks of queries."""
        return [span for span in self.spans if self._area(1, span[1] - span[0]) > SCORES]

    def blocks(self, length: int) -> Iterator[tuple[int, int, int]]:
        """(first query, stop, first key) of each block of one document."""
        window = min(length, self.window or length)
        reach = min(length, 2 * window)  # of a block no longer than the window
        step = max(1, min(window, SCORES // (self.heads.num * reach)))
        for at in range(0, length, step):
            yield at, min(length, at + step), max(0, at - window + 1)

    def bias(self, at: int, stop: int, first: int) -> torch.Tensor:
        """0 where queries from `at` to `stop` see the keys from `first` to `stop`, -inf where they do not.

        Shape: (shares * queries, keys), in the dtype of the cosines.
        """
        device = self.cos.device
        back = torch.arange(at, stop, device=device)[:, None] - torch.arange(first, stop, device=device)
        hidden = back < 0
        hidden = hidden if self.window is None else hidden | (back >= self.window)
        found = torch.zeros_like(hidden, dtype=self.cos.dtype).masked_fill_(hidden, float("-inf"))
        return found.repeat(self.heads.shares, 1)

    @cached_property
    def whole(self) -> list[tuple[_Whole, torch.Tensor]]:
        """The groups, each with its bias."""
        return [(group, self.bias(0, group.longest, 0)) for group in self.groups]

    def _area(self, count: int, length: int) -> int:
        return self.heads.num * count * length**2

    def _joins(self, group: list[tuple[int, int]], span: tuple[int, int]) -> bool:
        length, shortest = span[1] - span[0], group[0][1] - group[0][0]
        return self._area(len(group) + 1, length) <= SCORES and length**2 <= 2 * shortest**2


def forward(qkv: torch.Tensor, run: Run) -> tuple[torch.Tensor, ...]:
    """What the backward needs beside qkv: the output, and of flash attention the logsumexp.

    Shape: qkv (tokens, heads.size), with positions; returns (tokens, num * width), (num, tokens) float32.
    """
    heads = run.heads
    if flash_takes(qkv):
        return _flash_forward(qkv, run)
    out = qkv.new_empty(len(qkv), heads.num * heads.width)
    for group, bias in run.whole:
        group.put(_forward_whole(group, bias, qkv, run), out)
    for start, end in run.long:
        for at, stop, first in run.blocks(end - start):
            queries, keys = slice(start + at, start + stop), slice(start + first, start + stop)
            out[queries] = _forward_block(queries, keys, run.bias(at, stop, first), qkv, run)
    return (out,)


def _forward_whole(group: _Whole, bias: torch.Tensor, qkv: torch.Tensor, run: Run) -> torch.Tensor:
    """Shape: returns (documents, longest, num * width)."""
    q, k, v = (_by_head(part, run.heads) for part in run.heads.parts(group.take(qkv)))
    return _by_token(torch.bmm(_weights(q, k, bias, run.scale), v), group.longest, run.heads).flatten(2)


def _forward_block(
    queries: slice, keys: slice, bias: torch.Tensor, qkv: torch.Tensor, run: Run
) -> torch.Tensor:
    """Shape: returns (queries, num * width)."""
    q, k, v = run.heads.parts(qkv.unsqueeze(0))
    each = _by_head(q[:, queries], run.heads), _by_head(k[:, keys], run.heads)
    found = torch.bmm(_weights(*each, bias, run.scale), _by_head(v[:, keys], run.heads))
    return _by_token(found, queries.stop - queries.start, run.heads)[0].flatten(1)


def backward(grad: torch.Tensor, qkv: torch.Tensor, kept: tuple[torch.Tensor, ...], run: Run) -> torch.Tensor:
    """The gradient of qkv, with positions; `kept` is what `forward` returned.

    Shape: grad (tokens, num * width), qkv as in `forward`; returns one like it.
    """
    if flash_takes(qkv):
        return _flash_backward(grad, qkv, kept, run)
    found = torch.empty_like(qkv)
    for group, bias in run.whole:
        group.put(_backward_whole(group, bias, grad, qkv, run), found)
    for start, end in run.long:
        _backward_long(slice(start, end), grad, qkv, run, found)
    return found


def _backward_whole(
    group: _Whole, bias: torch.Tensor, grad: torch.Tensor, qkv: torch.Tensor, run: Run
) -> torch.Tensor:
    """Shape: returns (documents, longest, heads.size)."""
    heads = run.heads
    q, k, v = (_by_head(part, heads) for part in heads.parts(group.take(qkv)))
    do = _by_head(heads.cut(group.take_zeroed(grad)), heads)
    made = _backward(do, q, k, v, bias, run.scale)
    return torch.cat([_by_token(part, group.longest, heads) for part in made], dim=2).flatten(2)


def _backward_long(rows: slice, grad: torch.Tensor, qkv: torch.Tensor, run: Run, found: torch.Tensor) -> None:
    """One document in blocks of queries; what they give to a key is summed in float32."""
    dq, dk, dv = run.heads.parts(found[rows])
    for_k, for_v = (qkv.new_zeros(dk.shape, dtype=wide_dtype(qkv)) for _ in range(2))
    for at, stop, first in run.blocks(len(dk)):
        queries, keys = (
            slice(rows.start + at, rows.start + stop),
            slice(rows.start + first, rows.start + stop),
        )
        made = _backward_block(queries, keys, run.bias(at, stop, first), grad, qkv, run)
        dq[at:stop] = made[0]
        for_k[first:stop] += made[1]
        for_v[first:stop] += made[2]
        del made
    dk.copy_(for_k)
    dv.copy_(for_v)


def _backward_block(
    queries: slice, keys: slice, bias: torch.Tensor, grad: torch.Tensor, qkv: torch.Tensor, run: Run
) -> list[torch.Tensor]:
    """Gradients of the block's queries and of what it gives to its keys and values, token by token."""
    heads = run.heads
    q, k, v = heads.parts(qkv.unsqueeze(0))
    do = _by_head(heads.cut(grad[queries]).unsqueeze(0), heads)
    each = _by_head(q[:, queries], heads), _by_head(k[:, keys], heads), _by_head(v[:, keys], heads)
    made = _backward(do, *each, bias, run.scale)
    sizes = [part.stop - part.start for part in (queries, keys, keys)]
    return [_by_token(part, size, heads)[0] for part, size in zip(made, sizes, strict=True)]


def _by_head(part: torch.Tensor, heads: Heads) -> torch.Tensor:
    """A matrix for each head of keys, in which the query heads that share it lie one behind the other.

    Shape: (documents, tokens, n, width) -> (documents * num_kv, n / num_kv * tokens, width).
    """
    cut = part.view(*part.shape[:2], heads.num_kv, -1, part.shape[3]).permute(0, 2, 3, 1, 4)
    return cut.reshape(len(part) * heads.num_kv, -1, part.shape[-1])


def _by_token(found: torch.Tensor, length: int, heads: Heads) -> torch.Tensor:
    """The other way round; a view.

    Shape: (documents * num_kv, n / num_kv * tokens, width) -> (documents, tokens, n, width).
    """
    cut = found.view(-1, heads.num_kv, found.shape[1] // length, length, found.shape[-1])
    return cut.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _weights(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of the scores, whose sums torch makes in float32. Shape: (n, shares * queries, keys)."""
    return torch.softmax(torch.baddbmm(bias, q, k.mT, alpha=scale), dim=-1)


def _backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shape: do and q (n, shares * queries, width), k and v (n, keys, width)."""
    weights = _weights(q, k, bias, scale)
    dv = torch.bmm(weights.mT, do)
    error = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), weights, -1, q.dtype)
    error.mul_(scale)
    return torch.bmm(error, k), torch.bmm(error.mT, q), dv


def _flash(run: Run, device: torch.device) -> tuple[Any, ...]:
    bounds = run.bounds.to(device, non_blocking=True)
    longest = max(end - start for start, end in run.spans)
    return bounds, bounds, longest, longest


def _flash_settings(run: Run) -> dict[str, Any]:
    # transformers' window of W keys counts the query's own, flash's is how many it reaches back
    left = None if run.window is None else run.window - 1
    return {"scale": run.scale, "window_size_left": left, "window_size_right": None if left is None else 0}


def _flash_forward(qkv: torch.Tensor, run: Run) -> tuple[torch.Tensor, ...]:
    """Source: torch 2.13 nn/attention/varlen.py, _varlen_attn."""
    found = torch.ops.aten._flash_attention_forward(
        *run.heads.parts(qkv),
        *_flash(run, qkv.device),
        0.0,
        True,
        return_debug_mask=False,
        **_flash_settings(run),
    )
    return found[0].flatten(1), found[1]


def _flash_backward(
    grad: torch.Tensor, qkv: torch.Tensor, kept: tuple[torch.Tensor, ...], run: Run
) -> torch.Tensor:
    """Source: torch 2.13 nn/attention/varlen.py, _varlen_attn_backward."""
    heads, (out, sums) = run.heads, kept
    do, o = (heads.cut(x) for x in (grad, out))
    unused = torch.empty(0, device=qkv.device)
    rng = torch.zeros(2, dtype=torch.uint64, device=qkv.device)
    parts = torch.ops.aten._flash_attention_backward(
        do.contiguous(),
        *heads.parts(qkv),
        o,
        sums,
        *_flash(run, qkv.device),
        0.0,
        True,
        rng,
        unused,
        **_flash_settings(run),
    )
    return torch.cat([part.flatten(1) for part in parts], dim=1)
