"""engine/policy.py and engine/stock.py: what each layer keeps, and that it changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_lab import build, documents, loss_of, recipe, trained

from qlora_phi3.engine.native import Native
from qlora_phi3.engine.policy import Policy

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
EXACT = dict(model__quantization="none", model__compute_dtype="float32", adapter__dropout=0.2)


def policy(**keys: Any) -> Policy:
    return Policy.of(recipe(**{f"train__{key}": value for key, value in keys.items()}), 4)


def test_the_last_layers_keep() -> None:
    assert policy(activations="recompute", kept_layers=1).keeps == ("input", "input", "input", "all")
    assert policy(activations="keep", kept_layers=1).keeps == ("all",) * 4
    assert policy(activations="recompute", kept_layers=9).keeps == ("all",) * 4
    assert policy(activations="recompute").keeps == ("input",) * 4
    assert policy(activations="recompute", keep_attention=True, kept_layers=2, engine="native").keeps == (
        "attention", "attention", "all", "all",
    )  # fmt: skip


def test_offloaded_layers_keep_their_input_alone() -> None:
    found = policy(activations="offload", keep_attention=True, kept_layers=2, engine="native")
    assert found.keeps == ("input", "input", "all", "all")
    assert found.parks and not policy(activations="recompute").parks


def test_slices_of_a_recipe() -> None:
    sizes = [policy(engine="native", slice_columns=asked).slice_columns for asked in ("auto", "all", 128)]
    assert sizes == [None, None, 128]


def step(**keys: Any) -> list[torch.Tensor]:
    """The loss of a step, and all gradients."""
    settings = recipe(adapter__rank=4, **{**EXACT, **keys})
    model, _ = build(settings, 4, **SIZES)
    torch.manual_seed(1)
    for parameter in trained(model):
        parameter.data.normal_(0, 0.05)
    loss = loss_of(model, settings, documents([30, 7, 1, 12]))
    loss.backward()
    return [loss.detach(), *(p.grad for p in trained(model) if p.grad is not None)]


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("activations", ["recompute", "offload"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_kept_layers_of_the_reference_change_no_bit(method: str, activations: str, kept: int) -> None:
    found = step(train__activations=activations, train__kept_layers=kept, adapter__method=method)
    expected = step(train__activations="recompute", adapter__method=method)
    assert len(found) == len(expected) > 1
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("keep_attention", [True, False])
def test_kept_layers_of_the_native_engine_change_nothing(keep_attention: bool, kept: int) -> None:
    keys = {"train__keep_attention": keep_attention, "train__kept_layers": kept, "train__slice_columns": 64}
    found = step(train__activations="recompute", train__engine="native", **keys)
    expected = step(train__activations="keep", train__engine="native")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=2e-5)


def test_a_policy_can_change_between_passes() -> None:
    settings = recipe(adapter__rank=4, **EXACT, train__engine="native", train__activations="keep")
    model, _ = build(settings, 4, **SIZES)
    native = Native(model.get_base_model(), Policy(("all",) * 4))
    losses = []
    for keeps in (("all",) * 4, ("input", "attention", "all", "all"), ("input",) * 4):
        native.policy = Policy(keeps)  # type: ignore[arg-type]
        torch.manual_seed(3)
        losses.append(float(loss_of(model, settings, documents([20, 11])).detach()))
    assert losses[0] == losses[1] == losses[2]
