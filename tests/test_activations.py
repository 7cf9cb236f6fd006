"""activations.py and replay.py against what operations really allocate, tracked tensor by tensor, on CPU."""

from __future__ import annotations

import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from memory_lab import build, compare, documents, host_is_apart, loss_of, recipe, rows, trained
from pairs import every_pair, thinned

from qlora_phi3 import activations, native_replay, phases, phi3
from qlora_phi3.case import Case
from qlora_phi3.engine.documents import hidden_states
from qlora_phi3.evaluate import mean_loss
from qlora_phi3.kernels import rms_norm
from qlora_phi3.recipe import Recipe
from qlora_phi3.replay import saved_beside_input
from qlora_phi3.tracked import TrackedBytes, model_tensors

MINI = phi3.VARIANTS["microsoft/Phi-3-mini-4k-instruct"]

SHAPES: dict[str, dict[str, Any]] = {
    "mini": dict(
        hidden_size=192,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=6,
        sliding_window=None,
    ),
    "gqa": dict(
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=None,
    ),
    "tied": dict(
        hidden_size=192,
        intermediate_size=672,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        vocab_size=2048,
        sliding_window=None,
    ),
    "wide": dict(  # fullest behind its attention
        hidden_size=128,
        intermediate_size=4096,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=None,
    ),
}
BASES = [("nf4", "bfloat16"), ("none", "bfloat16"), ("nf4", "float32"), ("none", "float32")]
TARGETS: list[Any] = ["all-linear", ["qkv_proj"], ["down"], ["gate_up_proj", "o_proj"]]
SPLIT: list[Any] = ["all-linear", ["q", "v"], ["gate_up_proj"]]
"""With an A/B pair for each projection; the others with one for the fused linear."""
EMBEDDINGS: list[Any] = [["lm_head"], ["embed_tokens", "down"], ["q", "v", "embed_tokens", "lm_head"]]
LENGTHS = [[256], [64] * 6, [700], [550, 550], [1300]]
OPTIMIZERS = ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"]


def grid(
    seed: int,
    adapters: list[tuple[Any, bool]],
    method: str = "lora",
    policies: Sequence[str] = ("recompute", "keep"),
    engine: str = "reference",
) -> list[Any]:
    """Every activation policy, base, dropout and adapter; the other settings drawn once and for all."""
    draw, found = random.Random(seed), []
    for policy, base, (targets, split), dropout in product(policies, BASES, adapters, [0.0, 0.1]):
        lengths, shape = draw.choice(LENGTHS), draw.choice(["gqa", "mini", "tied"])
        packing, passes = draw.random() < 0.3, draw.choice([1, 2])
        keys = {
            "train__activations": policy,
            "train__engine": engine,
            "model__quantization": base[0],
            "model__compute_dtype": base[1],
            "model__double_quant": draw.random() < 0.7,
            "adapter__method": method,
            "adapter__targets": targets,
            "adapter__split_fused": split,
            "adapter__dropout": dropout,
            "adapter__rank": draw.choice([4, 8, 32]),
            "train__optimizer": draw.choice(OPTIMIZERS),
            "train__effective_batch": len(lengths) * passes,
            "data__packing": packing,
            "data__max_length": sum(lengths) if packing else max(lengths),
        }
        words = "-".join(targets) if isinstance(targets, list) else targets
        words = f"{engine}-{method}-{words}" + ("-split" if split else "")
        name = f"{policy}-{base[0]}-{base[1]}-{words}-{dropout}-{shape}-{max(lengths)}x{len(lengths)}"
        found.append(pytest.param(shape, lengths, passes, keys, id=name))
    return found


def mixed(grid: list[Any], seed: int) -> list[Any]:
    """The same settings, of three layers one or two kept; native ones with kept attention, in slices."""
    draw, found = random.Random(seed), []
    for one in grid:
        shape, lengths, passes, keys = one.values
        keys = keys | {"train__kept_layers": draw.choice([0, 1, 2])}
        if keys["train__engine"] == "native":
            keys["train__keep_attention"] = draw.random() < 0.5
            shape = draw.choice(["gqa", "wide", "wide"])  # whose intermediate size is one of whole blocks
            keys["train__slice_columns"] = draw.choice([256, 640, 2048])
        words = [str(keys.get(f"train__{key}")) for key in ("kept_layers", "keep_attention", "slice_columns")]
        name = f"{one.id}-{shape}-kept-{'-'.join(words)}"
        found.append(pytest.param(shape, lengths, passes, keys, id=name))
    return found


ADAPTERS = [(targets, False) for targets in TARGETS], [(targets, True) for targets in SPLIT]
LINEARS = grid(7, [*ADAPTERS[0], *ADAPTERS[1]])[::2]
LENGTHED = grid(7, [*ADAPTERS[0][:1], *ADAPTERS[1][:1]], "dora")[::2]  # its steps take long
BESIDE_LAYERS = grid(3, [(targets, True) for targets in EMBEDDINGS])[::4]
OFFLOADED = [
    *grid(9, [("all-linear", True)], policies=["offload"]),
    *grid(2, [(["q", "v", "embed_tokens", "lm_head"], True)], policies=["offload"])[::2],
    *grid(4, [("all-linear", False)], "dora", ["offload"])[:1],
]
NATIVE = [
    *grid(5, [("all-linear", False), ("all-linear", True)], engine="native"),
    *grid(5, [(["q", "v"], True), (["down"], False)], engine="native")[::3],
    *grid(6, [(["q", "v", "embed_tokens", "lm_head"], True), (["lm_head"], True)], engine="native")[::3],
    *grid(8, [("all-linear", True)], policies=["offload"], engine="native")[::2],
]

MIXED = [
    *mixed(grid(21, [("all-linear", False), (["q", "v"], True)], policies=["recompute"]), 1),
    *mixed(grid(22, [("all-linear", False)], policies=["offload"]), 2)[::2],
    *mixed(grid(23, [(["q", "v", "embed_tokens", "lm_head"], True)], policies=["recompute"]), 3)[::3],
    *mixed(grid(24, [("all-linear", True)], "dora", ["recompute"]), 4)[::4],
    *mixed(
        grid(25, [("all-linear", False), ("all-linear", True)], policies=["recompute"], engine="native"), 5
    ),
    *mixed(
        grid(26, [(["o", "down"], True), (["qkv_proj"], False)], policies=["recompute"], engine="native"), 6
    ),
    *mixed(grid(27, [("all-linear", True)], policies=["offload"], engine="native"), 7)[::2],
    *mixed(grid(28, [(["q", "down", "embed_tokens"], True)], policies=["recompute"], engine="native"), 8)[
        ::2
    ],
]


def settings_of(shape: str, lengths: list[int], passes: int, keys: dict[str, Any]) -> list[object]:
    """What differs between cases, in an order that is the same for all.

    Engine, policy and shape count as one setting too, which meets every other: together they decide where a
    step is fullest, and a fault is seen only there.
    """
    names = {name for one in GRID for name in one.values[3]} - {"train__effective_batch", "data__max_length"}
    where = keys["train__engine"], keys["train__activations"], shape
    return [shape, lengths, passes, where, *(keys.get(name) for name in sorted(names))]


GRID = sorted(
    [*LINEARS, *LENGTHED, *BESIDE_LAYERS, *OFFLOADED, *NATIVE, *MIXED],
    key=lambda case: sum(case.values[1]) * case.values[2],  # of two cases that serve, the quicker one
)


@pytest.mark.parametrize(("shape", "lengths", "passes", "keys"), thinned(GRID, settings_of))
def test_peak_of_a_training_step(shape: str, lengths: list[int], passes: int, keys: dict[str, Any]) -> None:
    found = compare(recipe(**keys), 3, lengths, passes, **SHAPES[shape])
    assert found.ratio == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(("shape", "lengths", "passes", "keys"), NATIVE[::8])
def test_norms_take_some_rows_at_once(
    shape: str, lengths: list[int], passes: int, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (rms_norm, native_replay):
        monkeypatch.setattr(room, "NORM_ELEMENTS", 192 * 37)
    found = compare(recipe(**keys), 3, lengths, passes, **SHAPES[shape])
    assert found.ratio == pytest.approx(1, rel=0.02)


@every_pair(
    "policy, shape, windowed",
    ["recompute", "keep"],
    ["mini", "gqa"],
    [(48, [256]), (300, [700]), (400, [1300])],
)
def test_peak_with_a_window(policy: str, shape: str, windowed: tuple[int, list[int]]) -> None:
    window, lengths = windowed
    settings = recipe(adapter__rank=8, train__activations=policy, train__effective_batch=2)
    found = compare(settings, 3, lengths, 2, **{**SHAPES[shape], "sliding_window": window})
    assert found.ratio == pytest.approx(1, rel=0.02)


def test_peak_with_partial_rotary_positions() -> None:
    settings = recipe(adapter__rank=8, train__effective_batch=2)
    found = compare(settings, 3, [256], 2, **SHAPES["gqa"], partial_rotary_factor=0.75)
    assert found.ratio == pytest.approx(1, rel=0.02)


def test_ragged_documents_need_no_more_than_planned() -> None:
    packed = {"data__packing": True, "data__max_length": 600}
    settings = recipe(adapter__rank=8, train__effective_batch=6, **packed)
    found = compare(settings, 3, [300, 200, 60, 40], 2, **SHAPES["mini"])
    assert 1 <= found.ratio < 1.5


def test_categories_of_a_step_are_those_of_the_plan() -> None:
    found = compare(recipe(adapter__rank=8, train__effective_batch=2), 3, [256], 2, **SHAPES["gqa"])
    planned = {part.name: part.num_bytes for part in found.plan.parts}
    for name in ("adapters", "gradients", "optimizer states"):
        assert found.tracked.at_peak[name] == planned[name]
    weights = sum(planned[name] for name in ("linears", "embedding", "head", "norms"))
    assert found.tracked.at_peak["weights"] == pytest.approx(weights, abs=2048)  # RoPE's frequencies


@dataclass(frozen=True)
class OnCuda(Case):
    """CUDA's casts, with the attention that this computer has."""

    @property
    def attention(self) -> Any:
        return "eager" if self.length <= 512 else "sdpa"


@every_pair(
    "lengths, base, policy, method",
    [[256], [600]],
    [("nf4", "bfloat16"), ("none", "bfloat16")],
    ["recompute", "keep", "offload"],
    ["lora", "dora"],
)
def test_peak_as_on_cuda(
    lengths: list[int], base: tuple[str, str], policy: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_is_apart(monkeypatch)
    # PEFT's Linear4bit asks for CUDA's autocast only; answer as it would be there
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: asked(*kind) if kind else True)
    keys = {"model__quantization": base[0], "model__compute_dtype": base[1], "train__activations": policy}
    settings = recipe(adapter__method=method, adapter__rank=8, train__effective_batch=2, **keys)
    found = compare(settings, 3, lengths, 2, **SHAPES["gqa"])
    case = OnCuda(settings, found.geometry, sum(lengths), max(lengths), "cuda")
    assert phases.train_phase(case).peak_bytes == pytest.approx(found.tracked.peak_bytes, rel=0.02)


def saved_in_pass(num_layers: int, settings: Recipe, tokens: int, shape: str) -> tuple[int, Case]:
    """Bytes that autograd really saves in a forward pass without checkpointing, weights aside."""
    model, geometry = build(settings, num_layers, **SHAPES[shape])
    weights = {t.untyped_storage()._cdata for t in model.parameters()}
    saved: list[weakref.ref[torch.Tensor]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(weakref.ref(tensor))  # DoRA saves for a graph that nobody keeps
        return tensor

    dtype = getattr(torch, settings.model.compute_dtype)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        out = hidden_states(model.get_base_model(), documents([tokens]))
    kept = [tensor.untyped_storage() for tensor in (found() for found in saved) if tensor is not None]
    storages = {storage._cdata: storage.nbytes() for storage in kept}
    assert out.requires_grad
    size = sum(size for key, size in storages.items() if key not in weights)
    return size, Case(settings, geometry, tokens, tokens, "cpu")


KEPT: list[dict[str, Any]] = [
    {},
    {"adapter__targets": ["qkv_proj", "down"]},
    {"adapter__split_fused": True},
    {"adapter__split_fused": True, "adapter__targets": ["q", "v", "up"]},
    {"adapter__dropout": 0.1},
    {"model__quantization": "none"},
    {"model__compute_dtype": "float32"},
    {"adapter__method": "dora"},
    {"adapter__method": "dora", "adapter__split_fused": True, "adapter__dropout": 0.1},
    {"adapter__method": "dora", "model__quantization": "none", "adapter__dropout": 0.1},
    {"adapter__method": "dora", "model__compute_dtype": "float32", "adapter__dropout": 0.1},
]


@every_pair(
    "policy, shape, tokens, keys",
    ["keep", "attention", "recompute"],
    ["mini", "gqa"],
    [64, 600],
    [keys for keys in KEPT if keys.get("adapter__method") != "dora"],
)
def test_what_a_native_layer_saves(policy: str, shape: str, tokens: int, keys: dict[str, Any]) -> None:
    how = {"train__activations": "keep"} if policy == "keep" else {"train__activations": "recompute"}
    how |= {"train__keep_attention": policy == "attention", "train__engine": "native"}
    settings = recipe(adapter__rank=4, **how, **keys)
    fewer, _ = saved_in_pass(2, settings, tokens, shape)
    more, case = saved_in_pass(3, settings, tokens, shape)
    assert more - fewer == (activations.saved_bytes if policy == "keep" else activations.input_bytes)(case)


@every_pair("shape, tokens, keys", ["mini", "gqa"], [64, 600], KEPT)
def test_what_autograd_saves_in_a_layer(shape: str, tokens: int, keys: dict[str, Any]) -> None:
    settings = recipe(adapter__rank=4, train__activations="keep", **keys)
    fewer, _ = saved_in_pass(2, settings, tokens, shape)
    more, case = saved_in_pass(3, settings, tokens, shape)
    assert more - fewer == activations.saved_bytes(case)


def test_flash_attention_saves_its_output_once() -> None:
    """In units of a state of 6 KiB a token: norms, flash attention, adapters' inputs, SwiGLU."""
    case = Case(recipe(), MINI, 2048, 2048, "cuda")
    norms, attention, mlp = 2 * 2, 2 + 3 + 1, (2 * 8192 + 8192 + 8192) / 3072
    inputs = 1 + 0 + 1  # o_proj's is flash attention's output, down_proj's a third of what SwiGLU is
    assert saved_beside_input(case) == pytest.approx(
        case.state * (norms + attention + mlp + inputs), rel=0.02
    )


def test_logits_do_not_grow_with_tokens_beyond_a_chunk() -> None:
    one, two, three = (
        activations.loss_peak(Case(recipe(), MINI, n, n, "cuda")).num_bytes for n in (8192, 16384, 24576)
    )
    assert three - two == pytest.approx(two - one, rel=1e-3)
    assert two - one < 8192 * 40 * 3072


def test_a_layer_without_gradients_takes_less() -> None:
    trains = Case(recipe(), MINI, 2048, 2048, "cuda")
    scores = Case(recipe(), MINI, 2048, 2048, "cuda", training=False)
    layer = activations.backward_peak(trains, recomputes=True).num_bytes
    assert activations.forward_peak(scores, saving=False).num_bytes < layer


def test_the_lab_trains_every_adapter() -> None:
    settings = recipe(adapter__rank=4, adapter__targets=["embed_tokens", "o", "qkv_proj", "lm_head"])
    model, _ = build(settings, 2, **SHAPES["mini"])
    loss_of(model, settings, documents([32])).backward()
    assert all(p.grad is not None for p in trained(model))


SCORED: list[tuple[str, list[int], Any]] = [
    ("mini", [300], "all-linear"),
    ("gqa", [700], "all-linear"),
    ("tied", [1300], "all-linear"),
    ("tied", [1300], ["o", "embed_tokens", "lm_head"]),
    ("tied", [700, 700], ["lm_head"]),
]


@every_pair(
    "method, quantization, scored",
    ["lora", "dora"],
    ["nf4", "none"],
    SCORED,
    allowed=lambda method, _, scored: method == "lora" or scored[2] == "all-linear",
)
def test_peak_of_scoring(method: str, quantization: str, scored: tuple[str, list[int], Any]) -> None:
    shape, lengths, targets = scored
    keys = {"adapter__targets": targets, "adapter__method": method, "data__eval": {"path": "eval.jsonl"}}
    settings = recipe(adapter__rank=8, model__quantization=quantization, **keys)
    model, geometry = build(settings, 3, **SHAPES[shape])
    tracked = TrackedBytes()
    tracked.claim("weights", model_tensors(model))
    tracked.claim("weights", trained(model))
    with tracked:
        mean_loss(model, rows(lengths), len(lengths))
    case = Case(settings, geometry, sum(lengths), max(lengths), "cpu", training=False)
    expected = activations.scoring_peak(case).num_bytes + activations.row_bytes(case)
    assert tracked.at_peak["activations"] == pytest.approx(expected, rel=0.05)
