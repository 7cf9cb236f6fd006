"""Frozen weights in host memory: losses and gradients as with them on the device, and nothing left there."""

from __future__ import annotations

import weakref
from typing import Any

import memory_lab
import pytest
import torch
from memory_lab import build, documents, host_is_apart, loss_of, losses_and_gradients, recipe, rows, trained
from pairs import every_pair

from qlora_phi3 import evaluate, phases
from qlora_phi3.case import Case
from qlora_phi3.engine import attention, layer, residency
from qlora_phi3.engine.documents import hidden_states
from qlora_phi3.engine.native import choose
from qlora_phi3.errors import RecipeError
from qlora_phi3.ladder import RanOut, tried
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
KEEPING = {**POLICIES, "attention": {"train__activations": "recompute", "train__keep_attention": True}}
TALL: dict[str, Any] = {"vocab_size": 4096}
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024}
"""Where a layer's linears are much of what is there."""
PASSES = {"packed": [[9, 30, 1]], "several": [[40], [7, 20], [3]]}


def model_of(settings: Recipe, num_layers: int = 4, **sizes: Any) -> tuple[Any, residency.Residency]:
    """A model whose adapters are no longer zero, with its weights where the recipe has them."""
    model, _ = build(settings, num_layers, **{**SIZES, **sizes})
    torch.manual_seed(1)
    for parameter in trained(model):
        parameter.data.normal_(0, 0.05)
    return model, model.resident


def step(settings: Recipe, passes: list[list[int]]) -> list[torch.Tensor]:
    return losses_and_gradients(model_of(settings)[0], settings, passes)


HOSTED = {
    "reference-embedding": ("reference", ["embedding"]),
    "native-embedding": ("native", ["embedding"]),
    "native-embedding-layers": ("native", ["embedding", "layers"]),
}


@every_pair("hosted, base, policy, passes", HOSTED, ["nf4", "bfloat16", "float32"], POLICIES, PASSES)
def test_losses_and_gradients_are_those_without(hosted: str, base: str, policy: str, passes: str) -> None:
    engine, host = HOSTED[hosted]
    shared = {"adapter__rank": 4, "adapter__dropout": 0.3, "train__engine": engine}
    shared |= {**BASES[base], **POLICIES[policy]}
    found, expected = (step(recipe(memory__host=where, **shared), PASSES[passes]) for where in (host, []))
    assert len(found) == len(expected) > len(PASSES[passes])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


LARGEST: dict[str, tuple[dict[str, Any], list[int]]] = {"tall": (TALL, [300]), "wide": (WIDE, [70])}


@every_pair(
    "hosted, base, policy, largest",
    HOSTED,
    ["nf4", "float32"],
    KEEPING,
    LARGEST,
    allowed=lambda hosted, _, policy, __: (hosted, policy) != ("reference-embedding", "attention"),
)
def test_the_device_has_what_the_plan_says(
    hosted: str, base: str, policy: str, largest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_is_apart(monkeypatch)
    (engine, host), (sizes, lengths) = HOSTED[hosted], LARGEST[largest]
    keys = {**BASES[base], **KEEPING[policy], "train__engine": engine, "adapter__rank": 4}
    settings = recipe(memory__host=host, train__effective_batch=1, **keys)
    assert on_device(settings, lengths, sizes) == pytest.approx(planned(settings, lengths, sizes), rel=0.02)


def on_device(settings: Recipe, lengths: list[int], sizes: dict[str, Any], num_layers: int = 4) -> int:
    """Bytes at the fullest moment of a step's only pass, as a card would have them."""
    model, resident = model_of(settings, num_layers, **sizes)
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


def planned(settings: Recipe, lengths: list[int], sizes: dict[str, Any], num_layers: int = 4) -> int:
    _, geometry = build(settings, num_layers, **{**SIZES, **sizes})
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


# Layers that come and go

LAYERS: dict[str, Any] = {"train__engine": "native", "memory__host": ["layers"]}


class Watched:
    """Which layers' linears were on the device at each moment that any came or left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, resident: residency.Residency) -> None:
        self.seen: list[list[int]] = []
        self._alive: list[tuple[int, weakref.ref[torch.Tensor]]] = []
        ordered = resident._ordered

        def watched(index: int) -> Any:
            coming = ordered(index)
            self._alive.append((index, weakref.ref(coming.packed)))
            self.seen.append(self.now)
            return coming

        monkeypatch.setattr(resident, "_ordered", watched)

    @property
    def now(self) -> list[int]:
        return sorted(index for index, packed in self._alive if packed() is not None)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_layers_come_one_ahead_and_leave(policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(**LAYERS, **policy)
    model, resident = model_of(settings)
    watched = Watched(monkeypatch, resident)
    for _ in range(2):
        watched.seen.clear()
        loss = loss_of(model, settings, documents([20, 10]))
        assert watched.seen == [[0], [0, 1], [1, 2], [2, 3]]
        assert watched.now == []
        watched.seen.clear()
        loss.backward()
        assert watched.seen == [[3], [2, 3], [1, 2], [0, 1]]
        assert watched.now == []


def test_layers_come_for_a_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, resident = model_of(recipe(**LAYERS))
    watched = Watched(monkeypatch, resident)
    evaluate.mean_loss(model, rows([20, 7]), 2)
    assert watched.seen == [[0], [0, 1], [1, 2], [2, 3]] and watched.now == []
    watched.seen.clear()
    with torch.inference_mode():
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert max(map(len, watched.seen)) == 2 and watched.now == []
    settings = recipe(**LAYERS)
    loss_of(model.train(), settings, documents([9])).backward()
    assert watched.now == []


def fails(*_: Any) -> None:
    raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "copy"])
def test_a_pass_that_failed_leaves_nothing_and_the_next_is_right(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(**LAYERS, **BASES["float32"])
    model, whole = model_of(settings)[0], model_of(recipe(train__engine="native", **BASES["float32"]))[0]
    watched, causal = Watched(monkeypatch, model.resident), model.get_base_model()
    with monkeypatch.context() as broken:
        if where == "forward":
            broken.setattr(layer, "feed_forward", fails)
        if where == "loss":
            broken.setattr(memory_lab.PhiTrainer, "nll", lambda *a: fails(hidden_states(causal, a[2])))
        if where == "backward":
            broken.setattr(layer, "feed_backward", fails)
        if where == "copy":
            broken.setattr(residency.offload, "copied", fails)
        assert isinstance(tried(lambda: loss_of(model, settings, documents([30])).backward()), RanOut)
    assert watched.now == []
    model.zero_grad()
    for which in (model, whole):
        loss_of(which, settings, documents([30])).backward()
    for ours, theirs in zip(trained(model), trained(whole), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert watched.now == []


def test_what_is_on_its_way_when_a_pass_is_given_up_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(**LAYERS)
    model, resident = model_of(settings)
    watched = Watched(monkeypatch, resident)
    hook = model.get_base_model().model.layers[2].register_forward_pre_hook(fails, prepend=True)
    with pytest.raises(torch.OutOfMemoryError):
        loss_of(model, settings, documents([9]))
    hook.remove()
    resident.forget()
    assert watched.now == []


@pytest.mark.parametrize("base", ["nf4", "nf4-single", "float32"])
def test_streamed_layers_evaluate_the_same_and_are_taken_back(base: str) -> None:
    hosted, resident = model_of(recipe(**BASES[base], **LAYERS))
    plain, _ = model_of(recipe(**BASES[base], train__engine="native"))

    def check() -> None:
        asked, ids = rows([20, 7, 33]), torch.tensor([[5, 6, 7, 8]])
        assert evaluate.mean_loss(hosted, asked, 2) == evaluate.mean_loss(plain, asked, 2)
        answers = [one.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for one in (hosted, plain)]
        assert torch.equal(*answers)
        first, second = hosted.state_dict(), plain.state_dict()
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first)

    check()
    resident.remove()
    assert list(resident.on_host()) == []
    for module in hosted.modules():
        assert not {"parameters", "_apply"} & set(vars(module))
    check()


@pytest.mark.parametrize("base", ["nf4", "float32"])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 9])
def test_two_layers_linears_are_there_of_however_many(
    num_layers: int, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_is_apart(monkeypatch)
    settings = recipe(**LAYERS, **BASES[base], train__effective_batch=1, adapter__rank=1)
    found = on_device(settings, [20], WIDE, num_layers)
    assert found == pytest.approx(planned(settings, [20], WIDE, num_layers), rel=0.02)
    if num_layers > 2:
        without = planned(settings.settled(host=()), [20], WIDE, num_layers)
        one = (planned(settings, [20], WIDE, 2) - planned(settings, [20], WIDE, 1)) // 2
        assert without - found > (num_layers - 2) * one


def test_layers_choose_the_native_engine() -> None:
    model, _ = build(recipe(), 1, **SIZES)
    config, card = model.get_base_model().config.to_dict(), torch.device("cuda")
    asked = recipe(train__engine="auto", memory__host=["layers"])
    assert choose(asked, config, card)[0] == "native"
    assert choose(recipe(train__engine="auto"), config, card)[0] == "reference"
    with pytest.raises(RecipeError, match=r"memory\.host: 'layers' is for the native engine"):
        choose(asked, {**config, "hidden_act": "gelu"}, card)
