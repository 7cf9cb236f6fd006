"""Frozen weights in host memory: losses and gradients as with them on the device, and nothing left there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_lab import build, documents, host_is_apart, loss_of, recipe, rows, trained

from qlora_phi3 import evaluate, phases
from qlora_phi3.case import Case
from qlora_phi3.engine import attention, residency
from qlora_phi3.recipe import Recipe
from qlora_phi3.tracked import TrackedBytes, model_tensors

SIZES: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=None,
)
BASES = {
    "nf4": {},
    "nf4-single": {"model__double_quant": False},
    "bfloat16": {"model__quantization": "none"},
    "float32": {"model__quantization": "none", "model__compute_dtype": "float32"},
}
POLICIES: dict[str, dict[str, Any]] = {
    "keep": {"train__activations": "keep"},
    "recompute": {"train__activations": "recompute"},
    "offload": {"train__activations": "offload"},
    "one-kept": {"train__activations": "recompute", "train__kept_layers": 1},
}
PASSES = {"one": [[40]], "packed": [[9, 30, 1]], "several": [[40], [7, 20], [3]]}


def model_of(settings: Recipe, num_layers: int = 4, **sizes: Any) -> tuple[Any, residency.Residency]:
    """A model whose adapters are no longer zero, with its weights where the recipe has them."""
    model, _ = build(settings, num_layers, **{**SIZES, **sizes})
    torch.manual_seed(1)
    for parameter in trained(model):
        parameter.data.normal_(0, 0.05)
    return model, residency.install(model.get_base_model(), settings)


def step(settings: Recipe, passes: list[list[int]]) -> list[torch.Tensor]:
    """Losses of the passes, then all gradients of them together."""
    model, _ = model_of(settings)
    torch.manual_seed(2)
    losses = []
    for lengths in passes:
        loss = loss_of(model, settings, documents(lengths))
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in trained(model) if p.grad is not None)]


ENGINES = [("reference", ["embedding"]), ("native", ["embedding"])]


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("engine", "host"), ENGINES, ids=["-".join([e, *h]) for e, h in ENGINES])
def test_losses_and_gradients_are_those_without(
    engine: str, host: list[str], base: dict[str, Any], policy: dict[str, Any], passes: list[list[int]]
) -> None:
    shared = {"adapter__rank": 4, "adapter__dropout": 0.3, "train__engine": engine, **base, **policy}
    found, expected = (step(recipe(memory__host=where, **shared), passes) for where in (host, []))
    assert len(found) == len(expected) > len(passes)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("engine", ["reference", "native"])
def test_the_embedding_does_not_count_on_the_device(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host_is_apart(monkeypatch)
    settings = recipe(train__engine=engine, memory__host=["embedding"], train__effective_batch=1)
    assert on_device(settings, [300]) == pytest.approx(planned(settings, [300]), rel=0.02)


def on_device(settings: Recipe, lengths: list[int], num_layers: int = 4) -> int:
    """Bytes at the fullest moment of a step's only pass, as a card would have them."""
    model, resident = model_of(settings, num_layers, vocab_size=4096)
    attention._seen.cache_clear()
    tracked = TrackedBytes()
    apart = {tensor.untyped_storage().data_ptr() for tensor in resident.on_host()}
    weights = (one for one in model_tensors(model) if one.untyped_storage().data_ptr() not in apart)
    tracked.claim("weights", weights)
    tracked.claim("adapters", trained(model))
    with tracked:
        loss_of(model, settings, documents(lengths)).backward()
    return tracked.peak_bytes


class OnCard(Case):
    """Of a CPU's casts and attention, with a card's host."""

    @property
    def host_apart(self) -> bool:
        return True


def planned(settings: Recipe, lengths: list[int], num_layers: int = 4) -> int:
    _, geometry = build(settings, num_layers, **{**SIZES, "vocab_size": 4096})
    return phases.pass_phase(OnCard(settings, geometry, sum(lengths), max(lengths), "cpu")).peak_bytes


def test_evaluating_is_the_same_and_state_dicts_too() -> None:
    settings = recipe(memory__host=["embedding"])
    (hosted, _), (plain, _) = model_of(settings), model_of(recipe(memory__host=[]))
    asked = rows([20, 7, 33])
    assert evaluate.mean_loss(hosted, asked, 2) == evaluate.mean_loss(plain, asked, 2)
    ids = torch.tensor([[5, 6, 7, 8]])
    answers = [one.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for one in (hosted, plain)]
    assert torch.equal(*answers)
    first, second = hosted.state_dict(), plain.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_removing_takes_everything_back() -> None:
    settings = recipe(memory__host=["embedding"])
    model, resident = model_of(settings)
    causal = model.get_base_model()
    resident.remove()
    assert list(resident.on_host()) == []
    for module in (causal, *causal.modules()):
        assert not {"forward", "parameters", "_apply"} & set(vars(module))
    assert loss_of(model, settings, documents([9])).requires_grad


def test_the_device_of_the_model_stays_its_own() -> None:
    """With `meta` for a card, to which everything else is moved."""
    model, resident = model_of(recipe(memory__host=[], model__quantization="none"))
    causal, meta = model.get_base_model(), torch.device("meta")
    resident.device = meta
    resident.host_embedding()
    model.to(meta)
    weight = causal.model.embed_tokens.weight
    assert [weight.device.type, causal.lm_head.weight.device.type] == ["cpu", "meta"]
    assert causal.device == meta
    assert {id(one) for one in causal.parameters()} == {id(one) for _, one in causal.named_parameters()}
    found = causal.model.embed_tokens(torch.tensor([[3, 4, 5]]))
    assert found.device == meta and found.shape == (1, 3, 128)
