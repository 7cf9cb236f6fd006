"""How rows are laid out in passes, and that the layout changes nothing that a row computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_phi3.data import TokenRow
from qlora_phi3.engine import attention
from qlora_phi3.engine.documents import Documents, hidden_states, original_context, passes

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), max_size=30)


def row(*ids: int) -> TokenRow:
    return TokenRow(list(ids), list(ids), "x:1")


def test_documents() -> None:
    found = Documents.of([row(5, 6, 7), row(8), row(9, 1)], CPU)
    assert found.input_ids.tolist() == [[5, 6, 7, 8, 9, 1]]
    assert found.labels.tolist() == [[-100, 6, 7, -100, -100, 1]]
    assert found.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert found.bounds.tolist() == [0, 3, 4, 6]
    assert found.num_tokens == 6


@given(LENGTHS, st.integers(1, 8), st.one_of(st.none(), st.integers(8, 50)), st.none() | st.integers(1, 40))
def test_every_row_passes_once(
    lengths: list[int], micro_batch: int, pack_into: int | None, context: int | None
) -> None:
    groups = passes(lengths, micro_batch, pack_into=pack_into, context=context)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        if pack_into is None:
            assert len(group) <= micro_batch
        else:
            assert len(group) == 1 or sum(sizes) <= micro_batch * pack_into
        if context is not None:
            assert len({size > context for size in sizes}) == 1


def test_packing_fills_a_pass() -> None:
    assert passes([6, 2, 5, 3], 1, pack_into=8) == [[0, 1], [2, 3]]
    assert passes([6, 2, 5, 3], 2, pack_into=8) == [[0, 1, 2, 3]]
    assert passes([6, 2, 5, 3], 3) == [[0, 1, 2], [3]]


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model whose factors change beyond 16 positions."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [float(3 + i) for i in range(8)],
        "original_max_position_embeddings": 16,
    }
    config = Phi3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=rope,
        pad_token_id=0,
        sliding_window=None,
        initializer_range=0.2,
    )
    model = Phi3ForCausalLM(config)
    model.set_attn_implementation(attention.register())
    return model.eval()


def test_the_original_context(longrope: Any, checkpoints: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    assert original_context(longrope) == 16
    assert original_context(AutoModelForCausalLM.from_pretrained(checkpoints("gqa"))) is None


def test_a_row_is_computed_as_if_alone(longrope: Any) -> None:
    """Also beside rows on the other side of LongRoPE's original context."""
    torch.manual_seed(1)
    rows = [row(*torch.randint(1, 64, (n,)).tolist()) for n in (5, 30, 16, 17, 1, 9)]
    groups = passes([len(r.input_ids) for r in rows], 2, pack_into=40, context=original_context(longrope))
    assert sorted(map(len, groups)) == [2, 4]
    for group in groups:
        documents = Documents.of([rows[i] for i in group], CPU)
        with torch.no_grad():
            hidden = hidden_states(longrope, documents)[0].split(documents.bounds.diff().tolist())
        for i, ours in zip(group, hidden, strict=True):
            longrope.set_attn_implementation("eager")
            with torch.no_grad():
                alone = longrope.model(torch.tensor([rows[i].input_ids])).last_hidden_state[0]
            longrope.set_attn_implementation(attention.NAME)
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)


def test_another_attention_is_refused(longrope: Any) -> None:
    longrope.set_attn_implementation("sdpa")
    with pytest.raises(AssertionError, match="mix the documents"):
        hidden_states(longrope, Documents.of([row(1, 2)], CPU))
    longrope.set_attn_implementation(attention.NAME)
