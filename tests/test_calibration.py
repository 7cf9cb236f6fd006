"""The full pass before a run: which rows make it, what it takes beside its prediction, how that is told."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from memory_lab import build, documents, loss_of
from memory_lab import recipe as in_memory

from qlora_phi3 import memory
from qlora_phi3.calibration import Calibration, compare
from qlora_phi3.engine.documents import Layout, passes

MIB = 1024**2


def tokens(rows: list[int], lengths: Any) -> int:
    return int(sum(lengths[i] for i in rows))


@pytest.mark.parametrize("pack_into", [None, 100, 37])
@pytest.mark.parametrize("context", [None, 25])
@pytest.mark.parametrize(("effective", "micro"), [(1, 1), (7, 7), (8, 2), (12, 3)])
def test_no_step_of_many_is_fuller(
    pack_into: int | None, context: int | None, effective: int, micro: int
) -> None:
    """Beside passes of steps drawn at random; packed, there may be room left that is too little for a row."""
    draw = random.Random(f"{pack_into} {context} {effective} {micro}")
    lengths = np.array([draw.randint(1, 37) for _ in range(60)])
    layout = Layout(micro, pack_into, context)
    chosen = layout.fullest(lengths, effective)
    assert len(set(chosen)) == len(chosen) <= effective
    own = passes([int(lengths[i]) for i in chosen], micro, pack_into=pack_into, context=context)
    assert len(own) == 1, "it is one that a step can have"
    fullest = 0
    for _ in range(300):
        step = draw.sample(range(60), effective)
        cut = passes([int(lengths[i]) for i in step], micro, pack_into=pack_into, context=context)
        fullest = max(fullest, *(sum(int(lengths[step[i]]) for i in group) for group in cut))
    if pack_into is not None and context is not None:
        same_side = [n for n in lengths if (n > context) == (lengths[chosen[0]] > context)]
        fullest = min(fullest, micro * pack_into - min(same_side) + 1)
    assert tokens(chosen, lengths) >= fullest
    if pack_into is None and context is None:
        assert tokens(chosen, lengths) == sum(sorted(lengths, reverse=True)[:micro])


def test_fewer_rows_than_a_pass_takes_and_rows_all_alike() -> None:
    assert Layout(4, None, None).fullest(np.array([3, 5]), 8) == [1, 0]
    assert Layout(2, 10, None).fullest(np.array([5, 5, 5, 5, 5]), 8) == [0, 1, 2, 3]
    assert Layout(1, 10, None).fullest(np.array([10, 10]), 8) == [0]


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("lengths", [[301], [97, 97, 97], [63] * 5])
@pytest.mark.parametrize("keys", [{}, {"model__quantization": "none"}, {"adapter__split_fused": True}])
def test_the_prediction_of_a_pass_holds(activations: str, lengths: list[int], keys: dict[str, Any]) -> None:
    settings = in_memory(train__activations=activations, train__effective_batch=64, **keys)
    sizes = dict(hidden_size=192, intermediate_size=512, num_attention_heads=6, vocab_size=900)
    model, geometry = build(settings, 4, **sizes, num_key_value_heads=6)
    pass_of = documents(lengths)
    found = compare(settings, geometry, model, pass_of, lambda: loss_of(model, settings, pass_of).backward())
    assert (found.pass_tokens, found.longest_row_tokens) == (sum(lengths), max(lengths))
    assert found.kind == "tracked" and sum(found.measured_parts.values()) == found.measured_bytes
    assert abs(found.drift) < 0.05 and found.notes() == []
    exact = {part.name: part.num_bytes for part in found.predicted.parts}
    assert found.measured_parts["adapters"] == exact["adapters"]
    assert "optimizer states" not in exact


def calibration(measured: int) -> Calibration:
    parts = (
        memory.Part("linears", 60 * MIB, "", "exact"),
        memory.Part("rows", MIB, "", "replayed"),
        memory.Part("working set", 39 * MIB, "", "replayed"),
    )
    return Calibration(512, 256, 200, memory.Phase("train", parts), measured, "allocated", {})


def test_drift_is_told_from_5_percent_on_with_the_parts_it_can_come_from() -> None:
    assert calibration(104 * MIB).notes() == calibration(96 * MIB).notes() == []
    (more,) = calibration(110 * MIB).notes()
    assert more == (
        "a full pass of 512 tokens took 110.00 MiB, 10% more than the 100.00 MiB predicted: not by "
        "linears 60.00 MiB, which are exact; by rows 1.00 MiB, working set 39.00 MiB, which are replayed"
    )
    assert "6% less than the 100.00 MiB predicted" in calibration(94 * MIB).notes()[0]


def test_as_json() -> None:
    found = calibration(110 * MIB).to_json()
    assert (found["predicted_bytes"], found["measured_bytes"]) == (100 * MIB, 110 * MIB)
    assert found["drift"] == pytest.approx(0.1)
    assert found["covers"].startswith("bytes of CUDA's allocator")
    assert [part["name"] for part in found["predicted_parts"]] == ["linears", "rows", "working set"]
