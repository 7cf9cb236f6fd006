"""The benchmark of single operations: every one leaves a row, whose bytes are those of its tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import kernels, results
from bench.__main__ import main
from qlora_phi3 import phi3


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> phi3.Geometry:
    sizes = dict(num_heads=4, num_kv_heads=2, hidden_size=128, intermediate_size=192, vocab_size=320)
    made = replace(phi3.VARIANTS[kernels.MODEL], **sizes)
    monkeypatch.setitem(phi3.VARIANTS, kernels.MODEL, made)
    monkeypatch.setattr(kernels, "SLICE", 64)
    return made


@pytest.mark.usefixtures("small")
def test_every_operation_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert main(["kernels", "--tokens=3,5", "--repeats=2"]) == 0
    [path] = tmp_path.glob("*/kernels.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["operation"] for row in rows} == {
        "rms_norm.forward",
        "rms_norm.backward",
        "rope.rotate_",
        "swiglu.forward",
        "swiglu.backward_",
        "cross_entropy.nll_and_error_",
        "nf4.dequantize",
    }
    assert len(rows) == 2 * (2 + 1 + 4 + 1) + 3
    for row in rows:
        assert row["backend"] == "torch" and row["device"] == "cpu" and row["repeats"] == 2
        assert 0 < row["p10_milliseconds"] <= row["milliseconds"] <= row["p90_milliseconds"]
        assert row["gigabytes_per_second"] >= 0 and row["versions"]["bitsandbytes"]


@pytest.mark.usefixtures("small")
def test_bytes_are_those_of_the_tensors() -> None:
    found = {(one.name, one.shape): one for one in kernels.operations((3,), "cpu")}
    assert found["rms_norm.backward", (3, 128)].moved_bytes == 2 * 3 * (3 * 128)
    rope = found["rope.rotate_", (3, 6, 32)]
    assert rope.moved_bytes == 2 * (2 * 3 * 6 * 32 + 3 * 32) and rope.inputs[0].shape == (3, 8 * 32)
    assert found["cross_entropy.nll_and_error_", (3, 320)].moved_bytes == 2 * 4 * 3 * 320
    assert {shape for name, shape in found if name == "nf4.dequantize"} == {(384, 128), (128, 128), (128, 64)}
    whole = found["nf4.dequantize", (384, 128)]
    assert whole.moved_bytes == 384 * 128 * 2 + whole.inputs[0].numel() + 768 + 4 * 3


@pytest.mark.usefixtures("small")
def test_inputs_stay_as_they_were() -> None:
    """Each call gets copies, or operations in place would be timed on what they wrote."""
    for operation in kernels.operations((3,), "cpu"):
        before = [one.clone() for one in operation.inputs]
        kernels.measure(operation, ["torch"], "cpu", repeats=1, warm_up=0)
        assert all(bool((one == other).all()) for one, other in zip(before, operation.inputs, strict=True))


@pytest.mark.usefixtures("small")
def test_some_of_them() -> None:
    assert {one.name for one in kernels.operations((3,), "cpu", "swiglu")} == {
        "swiglu.forward",
        "swiglu.backward_",
    }
