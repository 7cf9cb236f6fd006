"""layouts/blocks.py: rewriting a pair never changes its product, and every way back gives the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_phi3.layouts.blocks import (
    Pair,
    fuse,
    group,
    is_block_diagonal,
    narrow,
    same_bits,
    split,
    stack,
    ungroup,
    unstack,
    widen,
)


def same(one: Pair, other: Pair) -> bool:
    return same_bits(one.a, other.a) and same_bits(one.b, other.b) and one.scale == other.scale


def product(pair: Pair) -> torch.Tensor:
    return pair.b.double() @ pair.a.double()


def random_pair(rank: int, num_in: int, num_out: int, seed: int = 0, density: float = 1.0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, num_in, generator=generator)
    b = torch.randn(num_out, rank, generator=generator)
    return Pair(a, b * (torch.rand(b.shape, generator=generator) < density), 0.5)


SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=3)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Pair, list[int]]:
    """Any pair: dense, sparse, zero, block-diagonal, widened once or twice."""
    sizes, seed = draw(SIZES), draw(st.integers(0, 99))
    rank, num_in = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    pair = random_pair(rank, num_in, sum(sizes), seed, draw(st.sampled_from([0.0, 0.1, 1.0])))
    if draw(st.booleans()):
        blocks = [random_pair(rank, num_in, size, seed + i) for i, size in enumerate(sizes)]
        pair = stack(blocks, sizes)
    for _ in range(draw(st.integers(0, 2))):
        pair = widen(pair, sizes)
    return pair, sizes


@settings(deadline=None)
@given(pairs())
def test_split_is_block_diagonal_and_the_same_update(case: tuple[Pair, list[int]]) -> None:
    pair, sizes = case
    apart = split(pair, sizes)
    assert apart.rank % len(sizes) == 0
    assert is_block_diagonal(apart, sizes)
    torch.testing.assert_close(product(apart), product(pair), rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(pairs())
def test_fuse_undoes_split(case: tuple[Pair, list[int]]) -> None:
    pair, sizes = case
    assert same(fuse(split(pair, sizes), sizes), pair)


@settings(deadline=None)
@given(pairs())
def test_split_undoes_fuse(case: tuple[Pair, list[int]]) -> None:
    apart, sizes = split(*case), case[1]
    assert same(split(fuse(apart, sizes), sizes), apart)


@settings(deadline=None)
@given(pairs())
def test_narrow_undoes_widen(case: tuple[Pair, list[int]]) -> None:
    pair, sizes = case
    wide = widen(pair, sizes)
    assert is_block_diagonal(wide, sizes)
    narrower = narrow(wide, sizes)
    assert narrower is not None
    assert same(narrower, pair)


def test_only_same_as_are_tied() -> None:
    sizes = [3, 2]
    wide = widen(random_pair(2, 4, 5), sizes)
    wide.a[3, 1] += 1e-6
    assert narrow(wide, sizes) is None
    assert fuse(wide, sizes) is wide


def test_a_minus_zero_is_a_bit_that_stays() -> None:
    sizes = [3, 2]
    wide = widen(random_pair(2, 4, 5), sizes)
    wide.b[0, 3] = -0.0
    assert is_block_diagonal(wide, sizes)
    assert same(split(fuse(wide, sizes), sizes), wide)


def test_the_smallest_number_off_the_diagonal_counts() -> None:
    wide = widen(random_pair(2, 4, 5), [3, 2])
    wide.b[4, 0] = torch.finfo(torch.float32).smallest_normal
    assert not is_block_diagonal(wide, [3, 2])


@settings(deadline=None)
@given(SIZES, st.data())
def test_unstack_undoes_stack(sizes: list[int], data: st.DataObject) -> None:
    """Missing projections and unequal ranks come back as they were."""
    ranks = data.draw(st.lists(st.integers(0, 4), min_size=len(sizes), max_size=len(sizes)).filter(any))
    blocks = [
        random_pair(rank, 3, size, seed) if rank else None
        for seed, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
    ]
    stacked = stack(blocks, sizes)
    assert is_block_diagonal(stacked, sizes)
    assert stacked.rank == max(ranks) * len(sizes)
    for block, found in zip(blocks, unstack(stacked, sizes), strict=True):
        assert (block is None) == (found is None)
        assert block is None or found is None or same(block, found)


@settings(deadline=None)
@given(st.integers(2, 3), st.integers(1, 4), st.integers(1, 5), st.data())
def test_ungroup_undoes_group(num_blocks: int, rank: int, rows: int, data: st.DataObject) -> None:
    used = data.draw(st.lists(st.booleans(), min_size=num_blocks, max_size=num_blocks).filter(any))
    sizes = [rows] * num_blocks
    stacked = stack([random_pair(rank, 3, rows, i) if on else None for i, on in enumerate(used)], sizes)
    grouped, found = group(stacked, sizes)
    assert found == tuple(used)
    assert grouped.a.shape == (rank * sum(used), 3)
    assert grouped.b.shape == (rows * sum(used), rank)
    assert same(ungroup(grouped, sizes, found), stacked)


def test_a_block_without_effect_keeps_its_a() -> None:
    """One projection may be untrained while another is not; training goes on from its A."""
    pair = stack([random_pair(2, 4, 3), random_pair(2, 4, 3, seed=1)], [3, 3])
    pair.b[3:].zero_()
    first, second = unstack(pair, [3, 3])
    assert first is not None
    assert second is not None
    assert same(stack([first, second], [3, 3]), pair)
    assert group(pair, [3, 3])[1] == (True, True)


@pytest.mark.parametrize("rewrite", [split, unstack, group])
def test_a_pair_of_zeros_keeps_all_its_blocks(rewrite: object) -> None:
    nothing = Pair(torch.zeros(4, 3), torch.zeros(6, 4), 1.0)
    if rewrite is group:
        assert group(nothing, [3, 3])[1] == (True, True)
    else:
        assert None not in unstack(split(nothing, [3, 3]), [3, 3])


def test_results_share_no_memory_with_each_other() -> None:
    first, second = unstack(widen(random_pair(2, 4, 6), [3, 3]), [3, 3])
    assert first is not None
    assert second is not None
    first.a.zero_()
    assert second.a.any()
