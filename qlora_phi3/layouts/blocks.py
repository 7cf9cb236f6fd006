"""The algebra of one A/B pair on a fused linear: block-diagonal, tied, grouped, apart.

Owns exact rewritings of a single pair; B @ A times scale is the same before and after. Block sizes are the
output rows of each projection, in order. Nothing is rounded, so every way back gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Sizes = Sequence[int]


@dataclass(frozen=True)
class Pair:
    """The A and B of one linear, and the factor of their product.

    Shape: a (r, in), b (out, r); a grouped pair of k blocks: a (k*r, in), b (k*out/n, r).
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.b.shape[1]


def stack(blocks: Sequence[Pair | None], sizes: Sizes) -> Pair:
    """One block-diagonal pair out of a pair per projection.

    A projection without a pair gets a zero block, a smaller rank is padded with zeros: plain LoRA has no
    other way to write them.

    Shape: blocks a (r_i, in), b (size_i, r_i) -> a (n*r, in), b (sum of sizes, n*r), r the largest r_i.
    """
    present = [block for block in blocks if block is not None]
    rank, one = max(block.rank for block in present), present[0]
    a = one.a.new_zeros(len(sizes) * rank, one.a.shape[1])
    b = one.b.new_zeros(sum(sizes), len(sizes) * rank)
    start = 0
    for i, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        if block is not None:
            a[i * rank : i * rank + block.rank] = block.a
            b[start : start + size, i * rank : i * rank + block.rank] = block.b
        start += size
    return Pair(a, b, one.scale)


def slices(pair: Pair, sizes: Sizes) -> list[Pair]:
    """The diagonal blocks of a block-diagonal pair, zero ones too."""
    rank = pair.rank // len(sizes)
    rows = torch.split(pair.b, list(sizes))
    return [
        Pair(
            pair.a[i * rank : (i + 1) * rank].clone(), part[:, i * rank : (i + 1) * rank].clone(), pair.scale
        )
        for i, part in enumerate(rows)
    ]


def unstack(pair: Pair, sizes: Sizes) -> list[Pair | None]:
    """The other way of `stack`: zero blocks become None, rows that are padding go."""
    parts = slices(pair, sizes)
    return [_trim(part) if used else None for part, used in zip(parts, enabled(pair, sizes), strict=True)]


def enabled(pair: Pair, sizes: Sizes) -> tuple[bool, ...]:
    """Which blocks hold anything; all, where none does, since an adapter must hold something."""
    used = [bool(part.a.any() or part.b.any()) for part in slices(pair, sizes)]
    return tuple(used) if any(used) else (True,) * len(used)


def _trim(part: Pair) -> Pair:
    used = part.a.any(dim=1) | part.b.any(dim=0)
    rank = int(used.nonzero().max()) + 1 if used.any() else part.rank
    return Pair(part.a[:rank].clone(), part.b[:, :rank].clone(), part.scale)


def is_block_diagonal(pair: Pair, sizes: Sizes) -> bool:
    """Whether each projection has columns of B of its own, all else exactly zero."""
    if pair.rank % len(sizes):
        return False
    rank, mask = pair.rank // len(sizes), torch.ones_like(pair.b, dtype=torch.bool)
    start = 0
    for i, size in enumerate(sizes):
        mask[start : start + size, i * rank : (i + 1) * rank] = False
        start += size
    return not bool(pair.b[mask].any())


def widen(pair: Pair, sizes: Sizes) -> Pair:
    """A fused pair as a block-diagonal one of n times the rank: the same A for each, B cut in slices."""
    rows = torch.split(pair.b, list(sizes))
    return stack([Pair(pair.a, part, pair.scale) for part in rows], sizes)


def narrow(pair: Pair, sizes: Sizes) -> Pair | None:
    """The pair that `widen` makes this one from, bit by bit, or None."""
    if pair.rank % len(sizes):
        return None
    parts = slices(pair, sizes)
    found = Pair(parts[0].a, torch.cat([part.b for part in parts]), pair.scale)
    wide = widen(found, sizes)
    return found if same_bits(wide.a, pair.a) and same_bits(wide.b, pair.b) else None


def split(pair: Pair, sizes: Sizes) -> Pair:
    """A fused pair as a block-diagonal one, as narrow as can be without losing the way back.

    One that is block-diagonal already stays; any other is widened. A widened pair is block-diagonal too, so
    to tell the two apart all widenings are undone first (the bijection of Cantor, Schröder and Bernstein
    between all pairs and the block-diagonal ones among them).
    """
    return pair if is_block_diagonal(_origin(pair, sizes), sizes) else widen(pair, sizes)


def fuse(pair: Pair, sizes: Sizes) -> Pair:
    """The inverse of `split`."""
    narrower = narrow(pair, sizes)
    if narrower is None or is_block_diagonal(_origin(pair, sizes), sizes):
        return pair
    return narrower


def _origin(pair: Pair, sizes: Sizes) -> Pair:
    narrower = narrow(pair, sizes)
    return pair if narrower is None else _origin(narrower, sizes)


def group(pair: Pair, sizes: Sizes) -> tuple[Pair, tuple[bool, ...]]:
    """A block-diagonal pair in loralib's grouped shapes, and which blocks are in it.

    Shape: a (n*r, in), b (n*size, n*r) -> a (k*r, in), b (k*size, r) for k enabled blocks.
    Source: loralib 0.1.2 layers.py, MergedLinear.
    """
    used = enabled(pair, sizes)
    parts = [part for part, use in zip(slices(pair, sizes), used, strict=True) if use]
    grouped = Pair(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts]), pair.scale)
    return grouped, used


def ungroup(pair: Pair, sizes: Sizes, used: Sequence[bool]) -> Pair:
    """The inverse of `group`."""
    parts = zip(torch.split(pair.a, pair.rank), torch.split(pair.b, sizes[0]), strict=True)
    pairs = iter([Pair(a, b, pair.scale) for a, b in parts])
    return stack([next(pairs) if use else None for use in used], sizes)


def same_scale(pairs: Sequence[Pair]) -> bool:
    return all(math.isclose(pair.scale, pairs[0].scale, rel_tol=1e-12) for pair in pairs)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than `torch.equal`, to which minus zero is zero."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
