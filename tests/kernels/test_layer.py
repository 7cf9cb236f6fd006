"""Whole layers and the loss on kernels: the native engine on Triton against itself on plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_lab import devices, triton_on
from memory_lab import build, loss_of, recipe, rows, trained
from torch import nn

from qlora_phi3 import kernels
from qlora_phi3.engine.documents import Documents
from qlora_phi3.engine.native import Native
from qlora_phi3.engine.policy import Keep, Policy

LENGTHS = [5, 1, 8]
SIZES: dict[str, Any] = dict(
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_size=128,
    intermediate_size=192,
    vocab_size=320,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
)


def pair(dtype: str, device: str, **keys: Any) -> tuple[Any, Any, Any]:
    """The same model twice, with adapters as after training, and its recipe."""
    settings = dict(model__quantization="nf4", model__compute_dtype=dtype, train__activations="keep")
    chosen = recipe(**settings, **keys)
    model, _ = build(chosen, num_layers=2, **SIZES)
    torch.manual_seed(1)
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.05)
    return model.to(device), copy.deepcopy(model).to(device), chosen


def step(model: Any, chosen: Any, device: str, keep: Keep, slice_columns: int | None) -> float:
    Native(model.get_base_model(), Policy((keep, keep), slice_columns=slice_columns))
    loss = loss_of(model, chosen, Documents.of(rows(LENGTHS), torch.device(device))) / sum(LENGTHS)
    loss.backward()
    return float(loss.detach())


@devices
@pytest.mark.parametrize(
    ("keep", "slice_columns", "rank", "split", "dtype"),
    [
        ("all", None, 4, False, "bfloat16"),
        ("input", 64, 1, True, "float32"),
        ("attention", 128, 3, True, "bfloat16"),
    ],
)
def test_a_step_is_the_same(keep, slice_columns, rank, split, dtype, device) -> None:
    """In float32 but for the order of sums; in bfloat16 two last bits of a gradient's largest."""
    tolerance = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    one, other, chosen = pair(dtype, device, adapter__rank=rank, adapter__split_fused=split)
    with kernels.using("torch"):
        wanted = step(one, chosen, device, keep, slice_columns)
    with triton_on(device):
        found = step(other, chosen, device, keep, slice_columns)
    assert found == pytest.approx(wanted, rel=tolerance)
    for a, b in zip(trained(one), trained(other), strict=True):
        assert a.grad is not None and b.grad is not None
        scale = float(a.grad.abs().max())
        torch.testing.assert_close(b.grad / scale, a.grad / scale, rtol=tolerance, atol=tolerance)
