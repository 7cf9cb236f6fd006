"""Layer inputs in host memory: the gradients of recomputing, nothing on the device, nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_lab import (
    build,
    documents,
    host_is_apart,
    loss_of,
    losses_and_gradients,
    recipe,
    recomputing,
    trained,
)

from qlora_phi3.engine import attention, offload
from qlora_phi3.engine.documents import Documents
from qlora_phi3.ladder import RanOut, tried
from qlora_phi3.recipe import Recipe
from qlora_phi3.tracked import TrackedBytes, model_tensors

SIZES: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=None,
)
FLOAT32 = {"model__quantization": "none", "model__compute_dtype": "float32"}
EMBEDDINGS = {"adapter__targets": ["q", "v", "embed_tokens", "lm_head"], "adapter__split_fused": True}


def model_of(settings: Recipe, num_layers: int = 5, **sizes: Any) -> Any:
    """A model whose adapters are no longer zero."""
    model, _ = build(settings, num_layers, **{**SIZES, **sizes})
    torch.manual_seed(1)
    for parameter in trained(model):
        parameter.data.normal_(0, 0.05)
    return model


def step(settings: Recipe, passes: list[list[int]]) -> list[torch.Tensor]:
    return losses_and_gradients(model_of(settings), settings, passes)


@pytest.mark.parametrize("passes", [[[40]], [[9, 30, 1]], [[40], [7, 20], [3]]], ids=["one", "packed", "3"])
@pytest.mark.parametrize(
    "keys",
    [FLOAT32, {}, {"adapter__method": "dora"}, {**FLOAT32, **EMBEDDINGS}, EMBEDDINGS],
    ids=["float32", "nf4", "dora", "float32-embeddings", "nf4-embeddings"],
)
def test_losses_and_gradients_are_those_of_recomputing(keys: dict[str, Any], passes: list[list[int]]) -> None:
    shared = {"adapter__rank": 4, "adapter__dropout": 0.3, **keys}
    found, expected = (
        step(recipe(train__activations=policy, **shared), passes) for policy in ("offload", "recompute")
    )
    assert len(found) == len(expected) > len(passes)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def parked() -> list[Any]:
    """What is in host memory, without help of the garbage collector."""
    return [one for one in gc.get_objects() if isinstance(one, offload._Parked)]


@pytest.mark.parametrize(("keys", "expected"), [({}, 4), (EMBEDDINGS, 5)])
def test_every_input_is_parked_once_and_gone_with_its_pass(keys: dict[str, Any], expected: int) -> None:
    settings = recipe(train__activations="offload", **keys)
    model = model_of(settings)
    for _ in range(2):
        loss = loss_of(model, settings, documents([20, 10]))
        assert [tuple(one._host.shape) for one in parked()] == [(1, 30, 64)] * expected
        assert sum(one._state is not None for one in parked()) == 1, "the last layer's is still there"
        loss.backward()
        assert parked() == []


def fails_at(layer: torch.nn.Module, call: int) -> None:
    """Have a layer's MLP run out of memory when it is called for the `call`th time."""
    calls = iter(range(1, 100))

    def fail(*_: Any) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError("full")

    layer.mlp.register_forward_pre_hook(fail)


@pytest.mark.parametrize("call", [1, 2], ids=["forward", "backward"])
def test_a_pass_that_failed_leaves_nothing_and_the_next_is_right(call: int) -> None:
    settings = recipe(train__activations="offload", **FLOAT32)
    model, whole = model_of(settings), model_of(settings)
    fails_at(model.get_base_model().model.layers[2], call)

    def work(which: Any) -> None:
        loss_of(which, settings, documents([30])).backward()

    assert isinstance(tried(lambda: work(model)), RanOut)
    assert parked() == []
    model.zero_grad()
    for which in (model, whole):
        work(which)
    for ours, theirs in zip(trained(model), trained(whole), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def device_bytes(num_layers: int, settings: Recipe) -> tuple[int, int]:
    """Activations there between forward and backward; and at the fullest moment of both, gradients too."""
    model = model_of(settings, num_layers)
    attention._seen.cache_clear()
    tracked = TrackedBytes()
    tracked.claim("weights", model_tensors(model))
    tracked.claim("adapters", trained(model))
    with tracked:
        loss = loss_of(model, settings, documents([256]))
        between = tracked.now["activations"]
        loss.backward()
    return between, tracked.at_peak["activations"]


def test_the_device_holds_no_more_for_more_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    host_is_apart(monkeypatch)
    state = 256 * 64 * 2
    offloaded, recomputed = (
        [device_bytes(layers, recipe(train__activations=policy, adapter__rank=1)) for layers in (4, 12)]
        for policy in ("offload", "recompute")
    )
    assert offloaded[1][0] == offloaded[0][0]
    assert recomputed[1][0] - recomputed[0][0] == 8 * state
    assert offloaded[1][1] - offloaded[0][1] < state < 6 * state < recomputed[1][1] - recomputed[0][1]


def test_only_the_hidden_states_are_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    copied = offload.copied

    def watched(tensor: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
        shapes.append(tuple(tensor.shape))
        return copied(tensor, device)

    monkeypatch.setattr(offload, "copied", watched)
    settings = recipe(train__activations="offload")
    loss_of(model_of(settings), settings, documents([24])).backward()
    assert shapes == [(1, 24, 64)] * (4 + 3), "out for all layers but the first, back for all but the last"


def test_nothing_of_the_model_changes_and_recomputing_takes_it_back() -> None:
    settings = recipe(train__activations="recompute")
    model = model_of(settings)
    before = list(model.state_dict())
    offload.enable(model)
    assert list(model.state_dict()) == before
    loss = loss_of(model, settings, documents([24]))
    assert len(parked()) == 4
    del loss
    loss = loss_of(recomputing(model), settings, documents([24]))
    assert parked() == [] and loss.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(dtype: str) -> None:
    """Copies large enough to be late; the peak is lower by the inputs of all layers but three."""
    layers, tokens, hidden = 12, 8192, 1024
    sizes = dict(hidden_size=hidden, intermediate_size=2048, num_attention_heads=16, num_key_value_heads=16)
    rows = documents([tokens // 2] * 2)
    rows = Documents(*(part.cuda() for part in (rows.input_ids, rows.labels, rows.position_ids)), rows.bounds)
    found: dict[str, tuple[list[torch.Tensor], int]] = {}
    for policy in ("recompute", "offload"):
        keys = {"model__quantization": "none", "model__compute_dtype": dtype, "train__activations": policy}
        settings = recipe(adapter__rank=4, **keys)
        model = model_of(settings, layers, **sizes).cuda()
        for _ in range(3):  # the second and third find pinned buffers of the first
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            loss_of(model, settings, rows).backward()
        gradients = [p.grad.float().cpu() for p in trained(model) if p.grad is not None]
        found[policy] = gradients, torch.cuda.max_memory_allocated()
        del model
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    for ours, theirs in zip(found["offload"][0], found["recompute"][0], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    state = tokens * hidden * (4 if dtype == "float32" else 2)
    saved = found["recompute"][1] - found["offload"][1]
    assert saved == pytest.approx((layers - 3) * state, rel=0.2)
    assert parked() == []
