"""The native engine against transformers' layers with PEFT: losses, gradients, and whole trainings."""

from __future__ import annotations

import copy
import weakref
from math import prod
from typing import Any

import pytest
import torch
from memory_lab import adapt, build, documents, loss_of, recipe, tiny, trained
from pairs import every_pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.linear_flops import LinearFlops
from qlora_phi3 import phi3
from qlora_phi3.case import head_groups
from qlora_phi3.engine import tiles
from qlora_phi3.engine.layer import Function, Layer, heads_of
from qlora_phi3.engine.native import Native, choose
from qlora_phi3.engine.policy import Keep, Policy
from qlora_phi3.errors import RecipeError

SMALL = dict(hidden_size=64, intermediate_size=192, vocab_size=320)
GEOMETRIES: dict[str, dict[str, Any]] = {
    "mini": dict(num_attention_heads=4, num_key_value_heads=4, **SMALL),
    "medium": dict(
        num_attention_heads=6, num_key_value_heads=2, **SMALL | dict(hidden_size=192, vocab_size=336)
    ),
    "phi-4-mini": dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        **SMALL | dict(hidden_size=128),
    ),
    "128k": dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i / 4 for i in range(8)],
            "original_max_position_embeddings": 16,
        },
        **SMALL,
    ),
    "window": dict(num_attention_heads=4, num_key_value_heads=4, sliding_window=5, **SMALL),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "fused": dict(adapter__rank=4),
    "split": dict(adapter__rank=4, adapter__split_fused=True),
    "q and up": dict(adapter__rank=3, adapter__split_fused=True, adapter__targets=["q", "up"]),
    "rslora on down": dict(adapter__rank=5, adapter__method="rslora", adapter__targets=["down"]),
    "dropout": dict(adapter__rank=4, adapter__split_fused=True, adapter__dropout=0.3),
    "embeddings": dict(adapter__rank=4, adapter__targets=["q", "embed_tokens", "lm_head"]),
}
KEEPS: tuple[Keep, ...] = ("all", "attention", "input")
LENGTHS = [9, 1, 23, 11, 14]
EXACT = dict(model__quantization="none", model__compute_dtype="float32", train__activations="keep")
NF4 = dict(model__quantization="nf4", model__compute_dtype="float32", train__activations="keep")
HALF = dict(model__quantization="nf4", model__compute_dtype="bfloat16", train__activations="keep")


def pair(geometry: str, settings: dict[str, Any], seed: int = 1, **adapter: Any) -> tuple[Any, Any, Any]:
    """The same model twice, with adapters as after training, and its recipe."""
    chosen = recipe(**{"adapter__split_fused": False, **settings, **adapter})
    model, _ = build(chosen, num_layers=2, **GEOMETRIES[geometry])
    torch.manual_seed(seed)
    for parameter in trained(model):
        nn.init.normal_(parameter, std=0.05)  # beyond, rounding in float32 shows
    return model, copy.deepcopy(model), chosen


def install(model: Any, *keeps: Keep, parks: bool = False, **how: Any) -> Native:
    causal = model.get_base_model()
    return Native(causal, Policy(keeps or ("input",) * causal.config.num_hidden_layers, parks, **how))


def backward(model: Any, chosen: Any, lengths: list[int]) -> float:
    torch.manual_seed(7)
    loss = loss_of(model, chosen, documents(lengths)) / sum(lengths)
    loss.backward()
    return float(loss.detach())


def compare_gradients(one: Any, other: Any, tolerance: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if not a.requires_grad:
            continue
        assert a.grad is not None and b.grad is not None, name
        assert a.grad.dtype == b.grad.dtype == torch.float32
        scale = float(a.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(b.grad, a.grad, rtol=tolerance, atol=tolerance * scale, msg=name)


@every_pair("geometry, adapter, keep", GEOMETRIES, ADAPTERS, KEEPS)
def test_loss_and_gradients_are_the_references(geometry: str, adapter: str, keep: Keep) -> None:
    stock, ours, chosen = pair(geometry, EXACT, **ADAPTERS[adapter])
    install(ours, keep, keep)
    found, expected = backward(ours, chosen, LENGTHS), backward(stock, chosen, LENGTHS)
    assert found == pytest.approx(expected, rel=1e-6)
    compare_gradients(stock, ours, 2e-5)


BASES = {"float32": EXACT, "nf4": NF4}


@every_pair("base, adapter, columns", BASES, ["fused", "split", "dropout", "rslora on down"], [64, 128, None])
def test_slices_and_packed_weights(base: str, adapter: str, columns: int | None) -> None:
    stock, ours, chosen = pair("mini", BASES[base], **ADAPTERS[adapter])
    install(ours, "input", "all", slice_columns=columns)
    found, expected = backward(ours, chosen, LENGTHS), backward(stock, chosen, LENGTHS)
    assert found == pytest.approx(expected, rel=1e-6)
    compare_gradients(stock, ours, 2e-5)


SIX_HEADS = SMALL | dict(hidden_size=192, num_attention_heads=6, num_key_value_heads=6)
TWO_SHARED = SMALL | dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=4, sliding_window=5)
GROUPS: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "even": (SIX_HEADS, 64, [2, 2, 2]),
    "uneven": (SIX_HEADS, 384, [4, 2]),
    "shared": (TWO_SHARED, 320, [2, 2]),
}
"""Sizes, columns of a slice, and the heads of each group that those make."""


@every_pair(
    "groups, base, adapter, keep",
    GROUPS,
    BASES,
    ADAPTERS,
    ["input", "attention"],
    allowed=lambda _, base, adapter, __: base == "float32" or adapter in ("split", "dropout"),
)
def test_heads_in_groups(
    groups: str, base: str, adapter: str, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, columns, expected_groups = GROUPS[groups]
    monkeypatch.setitem(GEOMETRIES, "grouped", sizes)
    stock, ours, chosen = pair("grouped", BASES[base], **ADAPTERS[adapter])
    heads = heads_of(ours.get_base_model().config)
    spans = head_groups(heads.num, heads.num_kv, heads.width, columns)
    assert [stop - start for start, stop in spans] == expected_groups
    install(ours, keep, keep, slice_columns=columns)
    found, expected = backward(ours, chosen, LENGTHS), backward(stock, chosen, LENGTHS)
    assert found == pytest.approx(expected, rel=1e-6)
    compare_gradients(stock, ours, 3e-5)


class Products(TorchDispatchMode):
    """Counts operations of matrix products, those of the attention aside."""

    total = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if operation._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = arguments[-2:]
            self.total += 2 * left.shape[0] * prod(right.shape)
        return operation(*arguments, **(named or {}))


@pytest.mark.parametrize("keep", ["attention", "input"])
def test_products_of_a_layer_in_slices(keep: Keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values are made once more, unless the attention's output was kept."""
    monkeypatch.setitem(GEOMETRIES, "grouped", SIX_HEADS)
    _, ours, chosen = pair("grouped", EXACT, adapter__rank=2)
    native, totals = install(ours), []
    for columns in (None, 64):
        native.policy = Policy((keep, keep), slice_columns=columns)
        with Products() as counter:
            backward(ours, chosen, LENGTHS)
        totals.append(counter.total)
    num_out, num_in = ours.get_base_model().model.layers[0].self_attn.qkv_proj.base_layer.weight.shape
    once_more = 2 * 2 * sum(LENGTHS) * num_out * (num_in + 2) if keep == "input" else 0
    assert totals[1] - totals[0] == once_more


def test_a_pass_leaves_nothing_of_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without help of the garbage collector."""
    _, ours, chosen = pair("phi-4-mini", EXACT)
    native = install(ours, slice_columns=64)
    backward(ours, chosen, LENGTHS)
    assert native._run is not None
    whole, groups = weakref.ref(native._run[1]), native._run[1].head_groups
    assert len(groups) == 2
    part = weakref.ref(groups[0].run)
    native._run = groups = None  # type: ignore[assignment]
    assert whole() is None and part() is None


@pytest.mark.parametrize("geometry", ["medium", "window"])
@pytest.mark.parametrize("scores", [1, 40, 700])
def test_attention_in_blocks(geometry: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SCORES", scores)
    stock, ours, chosen = pair(geometry, EXACT, **ADAPTERS["split"])
    install(ours)
    found, expected = backward(ours, chosen, LENGTHS), backward(stock, chosen, LENGTHS)
    assert found == pytest.approx(expected, rel=1e-6)
    compare_gradients(stock, ours, 2e-5)


def test_half_precision_to_its_rounding() -> None:
    """Ours rounds less often than autocast: both lie as near to float32."""
    errors = dict.fromkeys(("stock", *KEEPS), 0.0)
    for seed in range(6):
        exact, _, in_full = pair("mini", NF4, seed, **ADAPTERS["split"])
        stock, ours, chosen = pair("mini", HALF, seed, **ADAPTERS["split"])
        native, lengths = install(ours), [9, 13, 20, 7, seed + 3]
        backward(exact, in_full, lengths)
        loss = backward(stock, chosen, lengths)
        errors["stock"] += distance(stock, exact)
        for keep in KEEPS:
            native.policy = Policy((keep, keep))
            ours.zero_grad()
            assert backward(ours, chosen, lengths) == pytest.approx(loss, rel=2e-3)
            errors[keep] += distance(ours, exact)
    assert max(errors[keep] for keep in KEEPS) < 1.1 * errors["stock"]


def distance(model: Any, exact: Any) -> float:
    """Of all gradients, relative to the exact ones."""
    each = zip(trained(model), trained(exact), strict=True)
    return sum(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in each)


def test_parked_inputs_give_the_same() -> None:
    here, parked, chosen = pair("mini", EXACT, **ADAPTERS["split"])
    install(here)
    install(parked, parks=True)
    assert backward(here, chosen, LENGTHS) == backward(parked, chosen, LENGTHS)
    for a, b in zip(trained(here), trained(parked), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("geometry", "base", "num_steps"),
    [
        ("window", "float32", 12),
        ("phi-4-mini", "nf4", 12),
        *(pytest.param(one, base, 50, marks=pytest.mark.grid) for one in GEOMETRIES for base in BASES),
    ],
)
def test_trains_as_the_reference_does(geometry: str, base: str, num_steps: int) -> None:
    """Steps of AdamW, two passes each, gradients clipped; a fault shows in the first.

    Steps this small: where a gradient is all rounding, Adam makes a whole step of it.
    """
    stock, ours, chosen = pair(geometry, BASES[base], **ADAPTERS["split"])
    install(ours, "all", "input")
    losses = [curve(model, chosen, num_steps) for model in (stock, ours)]
    assert min(losses[0][-2:]) < (1 - num_steps / 2500) * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def curve(model: Any, chosen: Any, num_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4)
    found = []
    for number in range(num_steps):
        optimizer.zero_grad()
        lengths = [LENGTHS, [5 + number % 7, 11]][number % 2]
        found.append(backward(model, chosen, lengths) + backward(model, chosen, [8, 3]))
        torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
    return found


def test_what_is_not_training_is_as_it_was() -> None:
    stock, ours, _ = pair("mini", NF4, **ADAPTERS["split"])
    keys = list(ours.state_dict())
    native = install(ours)
    assert list(ours.state_dict()) == keys
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, stock.eval()(ids).logits)
    native.remove()
    assert all("forward" not in vars(layer) for layer in ours.get_base_model().model.layers)


def test_only_what_the_policy_asks_for_is_saved() -> None:
    _, ours, chosen = pair("mini", EXACT, **ADAPTERS["split"])
    native, counts = install(ours), {}
    for keep in KEEPS:
        native.policy = Policy((keep, keep))
        saved: list[torch.Tensor] = []

        def note(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss_of(ours, chosen, documents(LENGTHS))
        counts[keep] = len([one for one in saved if one is not None])
    assert counts["attention"] - counts["input"] == 2 and counts["all"] - counts["input"] == 2 * 8


@pytest.mark.parametrize(("columns", "scores"), [(None, 2**22), (8, 20)])
def test_gradients_against_differences(
    columns: int | None, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, of the input and every A and B; whole, and in slices and blocks."""
    monkeypatch.setattr(tiles, "SCORES", scores)
    sizes = dict(hidden_size=12, intermediate_size=24, num_attention_heads=3, num_key_value_heads=1)
    targets = {"adapter__targets": ["q", "o", "up", "down"], "adapter__split_fused": True}
    base, _ = tiny(1, torch.float64, **sizes)
    tuned = adapt(base, recipe(**EXACT, adapter__rank=2, **targets)).double()
    layer = Layer.of(tuned.get_base_model().model.layers[0], columns)
    torch.manual_seed(0)
    for parameter in layer.parameters:
        nn.init.normal_(parameter, std=0.3)
    angles = torch.rand(5, 2, dtype=torch.float64).repeat(1, 2)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    run = tiles.Run(bounds, None, angles.cos(), angles.sin(), heads_of(base.config), 0.5)
    inputs = (torch.randn(5, 12, dtype=torch.float64, requires_grad=True), *layer.parameters)

    def through(keep: Keep) -> Any:
        return lambda x, *parameters: Function.apply(x, layer, run, keep, *parameters)

    assert torch.autograd.gradcheck(through("input"), inputs)
    found = {keep: torch.autograd.grad(through(keep)(*inputs).square().sum(), inputs) for keep in KEEPS}
    if columns is None:  # what keeps all is never sliced
        for keep in KEEPS:
            torch.testing.assert_close(found[keep], found["input"])


def test_what_was_kept_serves_once() -> None:
    """Its gradients are written over it: a second backward is refused, not wrong."""
    _, ours, chosen = pair("mini", EXACT, **ADAPTERS["split"])
    install(ours, "all", "all")
    loss = loss_of(ours, chosen, documents(LENGTHS))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("geometry", ["mini", "medium", "phi-4-mini"])
def test_products_with_the_weights(geometry: str) -> None:
    """Of Phi-3-mini's sizes, recomputing takes 5.56 operations a weight and token, not 6; keeping 4."""
    _, ours, chosen = pair(geometry, EXACT, **ADAPTERS["embeddings"] | {"adapter__rank": 2})
    native = install(ours)
    sizes = phi3.geometry_from_config({**ours.config.to_dict(), "architectures": None})
    shares = {name: prod(sizes.linear_shape(name)) for name in phi3.LINEARS}
    again = 2 * (1 - shares["down_proj"] / sum(shares.values()))
    for keep, expected in (("input", 4 + again), ("attention", 4 + again), ("all", 4.0)):
        native.policy = Policy((keep, keep))
        with LinearFlops(sizes) as counter:
            backward(ours, chosen, LENGTHS)
        assert counter.total == pytest.approx(expected * sum(LENGTHS) * sizes.num_linear_parameters)
    mini = phi3.VARIANTS["microsoft/Phi-3-mini-4k-instruct"]
    rows, columns = mini.linear_shape("down_proj")
    assert 6 - 2 * rows * columns * mini.num_layers / mini.num_linear_parameters < 5.6


@pytest.mark.parametrize(
    ("asked", "method", "config", "device", "expected"),
    [
        ("auto", "lora", {}, "cpu", ("native", "it is proven on CPUs")),
        ("auto", "lora", {}, "cuda", ("reference", "native was proven on CPUs only")),
        ("native", "lora", {}, "cuda", ("native", "the recipe says so")),
        ("reference", "lora", {}, "cpu", ("reference", "the recipe says so")),
        ("auto", "dora", {}, "cpu", ("reference", "DoRA's lengths are not in it")),
        ("auto", "lora", {"hidden_act": "gelu"}, "cpu", ("reference", "its activation is silu, not gelu")),
        ("auto", "lora", {"resid_pdrop": 0.1}, "cpu", ("reference", "config.json says resid_pdrop")),
    ],
)
def test_which_engine_runs_and_why(
    asked: str, method: str, config: dict[str, Any], device: str, expected: tuple[str, str]
) -> None:
    chosen = recipe(train__engine=asked, adapter__method=method)
    name, why = choose(chosen, config, torch.device(device))
    assert name == expected[0] and expected[1] in why


def test_native_is_refused_where_it_would_be_wrong() -> None:
    with pytest.raises(RecipeError, match=r"config\.json says resid_pdrop") as raised:
        choose(recipe(train__engine="native"), {"resid_pdrop": 0.1}, torch.device("cpu"))
    assert "train.engine" in str(raised.value)
