"""memory.py against the known numbers of Phi-3 and against what the libraries really allocate, on CPU."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_phi3 import memory, phi3
from qlora_phi3.memory import _Case
from qlora_phi3.phi3 import Geometry
from qlora_phi3.recipe import Recipe

MINI = phi3.VARIANTS["microsoft/Phi-3-mini-4k-instruct"]
GIB, MIB = 1024**3, 1024**2

SHAPES = {
    "untied": dict(hidden_size=200, intermediate_size=300, num_attention_heads=4),
    "tied": dict(hidden_size=192, intermediate_size=320, num_attention_heads=6, tie_word_embeddings=True),
    "gqa": dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=2),
}


def recipe(**keys: Any) -> Recipe:
    """A recipe without packing and with some keys set, written `part__key=value`."""
    data = {"train": {"path": "rows.jsonl"}, "packing": False}
    values: dict[str, Any] = {"version": 1, "name": "test", "data": data}
    for key, value in keys.items():
        part, name = key.split("__")
        values.setdefault(part, {})[name] = value
    return Recipe.model_validate(values)


def part(phase: memory.Phase, name: str) -> int:
    return next(part.num_bytes for part in phase.parts if part.name == name)


def phase(plan: memory.Plan, name: str) -> memory.Phase:
    return next(phase for phase in plan.phases if phase.name == name)


def training(settings: Recipe, geometry: Geometry = MINI, **keys: Any) -> memory.Phase:
    return phase(memory.predict(settings, geometry, **{"micro_batch": 1, **keys}), "train")


# Known numbers


@pytest.mark.parametrize(("double_quant", "gib", "bits"), [(True, 1.741, 4.127), (False, 1.898, 4.5)])
def test_nf4_linears_of_phi_3_mini(double_quant: bool, gib: float, bits: float) -> None:
    size = memory.linear_bytes(recipe(model__double_quant=double_quant), MINI)
    assert size / GIB == pytest.approx(gib, abs=5e-4)
    assert 8 * size / MINI.num_linear_parameters == pytest.approx(bits, abs=1e-3)


def test_embedding_and_head_of_phi_3_mini_take_188_mib_each() -> None:
    train = training(recipe())
    assert [round(part(train, name) / MIB) for name in ("embedding", "head")] == [188, 188]


def test_tied_head_is_counted_once() -> None:
    names = [p.name for p in training(recipe(), phi3.VARIANTS["microsoft/Phi-4-mini-instruct"]).parts]
    assert "embedding" in names
    assert "head" not in names


def test_rank_16_on_all_linears_of_phi_3_mini() -> None:
    assert sum(memory.adapter_sizes(recipe(), MINI)) == 25_165_824
    assert part(training(recipe()), "adapters") == part(training(recipe()), "gradients") == 96 * MIB


@pytest.mark.parametrize(
    ("optimizer", "mib"),
    [("adamw_torch", 192), ("paged_adamw_32bit", 192), ("paged_adamw_8bit", 48.75), ("adamw_8bit", 48.75)],
)
def test_adam_states_of_phi_3_mini(optimizer: str, mib: float) -> None:
    size = memory.optimizer_bytes(recipe(train__optimizer=optimizer), MINI)
    assert size / MIB == pytest.approx(mib, abs=0.01)


def test_layer_inputs_of_phi_3_mini_take_192_kib_a_token() -> None:
    train = training(recipe(), row_tokens=1000)
    assert part(train, "layer inputs") == 1000 * 192 * 1024


def test_a_nf4_run_takes_less_than_half_of_a_bf16_one() -> None:
    nf4 = memory.predict(recipe(), MINI, micro_batch=1)
    bf16 = memory.predict(recipe(model__quantization="none"), MINI, micro_batch=1)
    assert nf4.peak_bytes / GIB == pytest.approx(3.1, abs=0.2)  # the 3.2 GiB of performance.md's tier T0
    assert 2 * nf4.peak_bytes < bf16.peak_bytes


# Against bitsandbytes, PEFT and torch, byte by byte


def tiny(num_layers: int = 2, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> tuple[Any, Geometry]:
    """A random Phi-3 and its geometry."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = Phi3Config(vocab_size=320, num_hidden_layers=num_layers, **ids, **sizes)
    geometry = phi3.geometry_from_config({**config.to_dict(), "architectures": None})
    return Phi3ForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype), geometry


def quantize(model: Any, double_quant: bool = True) -> None:
    """Replace the decoder linears by NF4 ones, as transformers does."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, old in list(module.named_children()):
                if isinstance(old, torch.nn.Linear):
                    how = dict(compress_statistics=double_quant, quant_type="nf4")
                    new = bnb.nn.Linear4bit(
                        old.in_features, old.out_features, False, compute_dtype=old.weight.dtype, **how
                    )
                    new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, **how).to("cpu")
                    new.support_avx512bf16_for_cpu = False
                    setattr(module, name, new)
    model.is_loaded_in_4bit = True


def adapt(model: Any, settings: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    adapter = settings.adapter
    targets = list(memory.target_linears(settings))
    return get_peft_model(
        model, LoraConfig(r=adapter.rank, lora_dropout=adapter.dropout, target_modules=targets)
    )


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind tensors, shared ones once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def trained(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def packed_tensors(model: Any) -> list[torch.Tensor]:
    """Packed weights with everything in their quantization state."""
    found = []
    for weight in (p for p in model.parameters() if hasattr(p, "quant_state")):
        states = [weight.quant_state, weight.quant_state.state2]
        found += [weight, *(t for s in states if s for t in vars(s).values() if isinstance(t, torch.Tensor))]
    return found


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_byte_exact(shape: str, double_quant: bool) -> None:
    model, geometry = tiny(**SHAPES[shape])
    quantize(model, double_quant)
    settings = recipe(model__double_quant=double_quant)
    assert storage_bytes(packed_tensors(model)) == memory.linear_bytes(settings, geometry)
    rest = storage_bytes(p for p in model.parameters() if not hasattr(p, "quant_state"))
    predicted = training(settings, geometry)
    assert rest == sum(p.num_bytes for p in predicted.parts if p.name in ("embedding", "head", "norms"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_unquantized_weights_are_byte_exact(dtype: str) -> None:
    model, geometry = tiny(dtype=getattr(torch, dtype), **SHAPES["gqa"])
    settings = recipe(model__quantization="none", model__compute_dtype=dtype)
    load = phase(memory.predict(settings, geometry, micro_batch=1), "load")
    assert load.peak_bytes == storage_bytes(model.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["o_proj"], ["down", "qkv_proj"]])
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_are_byte_exact(shape: str, targets: Any) -> None:
    model, geometry = tiny(**SHAPES[shape])
    quantize(model)
    settings = recipe(adapter__targets=targets, adapter__rank=8)
    assert storage_bytes(trained(adapt(model, settings))) == part(training(settings, geometry), "adapters")


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"])
@pytest.mark.parametrize("rank", [1, 8])  # at 1 every tensor is too small for 8-bit states, at 8 some are
def test_optimizer_states_are_byte_exact(name: str, rank: int) -> None:
    import bitsandbytes as bnb

    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
        "adamw_torch": torch.optim.AdamW,
    }
    base, geometry = tiny(**SHAPES["untied"])
    settings = recipe(adapter__rank=rank, train__optimizer=name)
    parameters = trained(adapt(base, settings))
    optimizer = made[name](parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert storage_bytes(t for t in states if t.dim()) == memory.optimizer_bytes(settings, geometry)


def forward(model: Any, case: _Case) -> torch.Tensor:
    """Hidden states under the autocast that the trainer uses."""
    dtype = getattr(torch, case.recipe.model.compute_dtype)
    ids = torch.arange(case.tokens).reshape(case.rows, -1) % 300 + 3
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found: torch.Tensor = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state
    return found


def saved_bytes(num_layers: int, settings: Recipe, tokens: int, **sizes: Any) -> tuple[int, _Case]:
    """Bytes that autograd really saves in a forward pass without checkpointing, weights aside."""
    dtype = getattr(torch, settings.model.compute_dtype)
    base, geometry = tiny(num_layers, dtype, **sizes)
    if settings.model.quantization == "nf4":
        quantize(base)
    model = adapt(base, settings).train()
    weights = {t.untyped_storage()._cdata for t in model.parameters()}
    saved: list[torch.Tensor] = []
    case = _Case(settings, geometry, 1, tokens, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward(model, case)
    return storage_bytes(t for t in saved if t.untyped_storage()._cdata not in weights), case


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({}, None),
        ({}, 48),  # dense mask, and repeated keys and values
        ({"adapter__targets": ["qkv_proj", "down"]}, None),
        ({"adapter__dropout": 0.1}, None),
        ({"model__quantization": "none"}, None),
        ({"model__compute_dtype": "float32"}, None),
    ],
)
@pytest.mark.parametrize("shape", ["untied", "gqa"])
def test_what_autograd_saves_in_a_layer(shape: str, keys: dict[str, Any], window: int | None) -> None:
    settings = recipe(adapter__rank=4, **keys)
    sizes = {**SHAPES[shape], "sliding_window": window}
    fewer, _ = saved_bytes(1, settings, 64, **sizes)
    more, case = saved_bytes(2, settings, 64, **sizes)
    assert more - fewer == memory.layer_saved_bytes(case)


class Live(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation made and that is still alive, and their peak."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def recomputing(model: Any) -> Any:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


PEAK_SHAPE = dict(
    hidden_size=128, intermediate_size=352, num_attention_heads=4, num_key_value_heads=2, sliding_window=None
)


def peak_of(model: Any, run: Callable[[], torch.Tensor]) -> int:
    """Peak bytes beside the model and its gradients, of a forward and backward pass."""
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    live = Live([*model.parameters(), *model.buffers(), *(p.grad for p in trained(model))])
    with live:
        run().backward()
    return live.peak


@pytest.mark.parametrize(
    ("quantization", "dtype", "window"),
    [
        ("nf4", "bfloat16", None),
        ("nf4", "bfloat16", 64),
        ("nf4", "float32", None),
        ("none", "bfloat16", None),
    ],
)
def test_peak_of_a_recomputed_layer(
    quantization: str, dtype: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT's Linear4bit asks for CUDA's autocast only; answer as it would be there
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: asked(*kind) if kind else True)
    keys = {"model__quantization": quantization, "model__compute_dtype": dtype}
    settings = recipe(adapter__rank=4, **keys)
    base, geometry = tiny(3, getattr(torch, dtype), **{**PEAK_SHAPE, "sliding_window": window})
    if quantization == "nf4":
        quantize(base)
    model = recomputing(adapt(base, settings).train())
    case = _Case(settings, geometry, 1, 256, "cuda")  # nothing of the loss is compared here
    train = training(settings, geometry, row_tokens=256)
    rope = 256 * (2 * case.compute * geometry.head_dim + 8)  # too small to be planned, not so in a tiny model
    expected = part(train, "layer inputs") + memory.layer_peak_bytes(case) + memory.mask_bytes(case) + rope
    assert peak_of(model, lambda: forward(model, case).sum()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_peak_with_the_loss_of_trl(activations: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    keys = {"model__quantization": "none", "train__activations": activations}
    settings = recipe(adapter__rank=4, **keys)
    base, geometry = tiny(8, **PEAK_SHAPE)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = adapt(base, settings).train()
    model = recomputing(model) if activations == "recompute" else model
    ids = torch.arange(256).reshape(1, -1) % 300 + 3

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: torch.Tensor = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss
        return found

    train = training(settings, geometry, row_tokens=256, device="cpu")
    held = "kept activations" if activations == "keep" else "layer inputs"
    expected = part(train, held) + part(train, "working set")
    assert peak_of(model, loss) == pytest.approx(expected, rel=0.05)


# How activations scale


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_activations_grow_with_tokens_and_never_shrink(activations: str) -> None:
    settings = recipe(train__activations=activations)
    peaks = [training(settings, row_tokens=n).peak_bytes for n in (128, 512, 1024, 2048, 4096)]
    assert peaks == sorted(set(peaks))


@pytest.mark.parametrize("name", ["layer inputs", "working set"])
def test_activations_are_linear_in_long_rows_without_a_mask(name: str) -> None:
    geometry = replace(MINI, sliding_window=None, max_positions=131072)
    one, two, three = (part(training(recipe(), geometry, row_tokens=n * 8192), name) for n in (1, 2, 3))
    assert three - two == two - one > 0


def test_keeping_activations_costs_more_than_recomputing() -> None:
    assert training(recipe(train__activations="keep")).peak_bytes > 2 * training(recipe()).peak_bytes


def test_auto_activations_are_recomputed() -> None:
    assert training(recipe()) == training(recipe(train__activations="recompute"))


@pytest.mark.parametrize("keys", [{"adapter__rank": 64}, {"adapter__dropout": 0.05}])
def test_bigger_or_dropped_adapters_cost_more(keys: dict[str, Any]) -> None:
    assert training(recipe(**keys)).peak_bytes > training(recipe()).peak_bytes


def test_fewer_targets_cost_less() -> None:
    assert training(recipe(adapter__targets=["o_proj"])).peak_bytes < training(recipe()).peak_bytes


@pytest.mark.parametrize(
    ("tokens", "rows", "mask"),
    [(2046, 1, 0), (2047, 1, 2047**2), (100, 1, 0), (100, 2, 2 * 100**2)],
)
def test_mask_is_dense_from_the_window_on_and_for_padded_rows(tokens: int, rows: int, mask: int) -> None:
    assert part(training(recipe(), row_tokens=tokens, micro_batch=rows), "attention mask") == mask


def test_loss_on_cpu_needs_more_than_on_cuda() -> None:
    cuda, cpu = (memory.loss_bytes(_Case(recipe(), MINI, 1, 2048, device)) for device in ("cuda", "cpu"))
    assert cpu - cuda == 29 * 2048 * 32064


def test_loss_tile_is_bounded() -> None:
    """Beyond 4096 tokens only hidden states grow: twice in bf16, gradient in float32 and bf16, norm input."""
    one, two = (memory.loss_bytes(_Case(recipe(), MINI, 1, n, "cuda")) for n in (65536, 131072))
    assert two - one == 65536 * 3072 * (4 + max(2 + 2 + 4 + 2, 4 * 4 + 2 * 2))


def test_packing_fills_a_row_up_to_max_length_or_the_whole_step() -> None:
    settings = recipe(data__packing=True, train__effective_batch=4)
    rows = [memory.predict(settings, MINI, micro_batch=m, row_tokens=300).row_tokens for m in (1, 2, 4)]
    assert rows == [1200, 600, 300]
    assert memory.predict(settings, MINI, micro_batch=1, row_tokens=900).row_tokens == 2048


# Phases


def test_evaluation_is_planned_only_with_held_out_rows() -> None:
    names = [p.name for p in memory.predict(recipe(), MINI, micro_batch=1).phases]
    assert names == ["load", "train"]
    with_eval = memory.predict(recipe(data__eval={"path": "eval.jsonl"}), MINI, micro_batch=1)
    assert [p.name for p in with_eval.phases] == ["load", "train", "evaluate"]
    assert "KV cache" not in [p.name for p in with_eval.phases[-1].parts]


def test_answers_need_a_cache() -> None:
    keys = {"data__eval": {"path": "eval.jsonl"}, "evaluate__metrics": ["exact_match"]}
    settings = recipe(**keys, evaluate__max_new_tokens=128)
    for row_tokens, at_once in ((2048, 1), (1024, 3), (256, 10)):
        plan = memory.predict(settings, MINI, micro_batch=1, row_tokens=row_tokens)
        tokens = at_once * (row_tokens + 128)
        assert tokens <= memory.answer_tokens(settings, MINI) == 4096 < tokens + row_tokens + 128
        assert part(phase(plan, "evaluate"), "KV cache") == tokens * 32 * 2 * 3072 * 2


def test_fewer_samples_than_a_batch_need_less() -> None:
    keys = {"data__eval": {"path": "eval.jsonl"}, "evaluate__metrics": ["exact_match"]}
    many, one = (
        phase(
            memory.predict(recipe(**keys, evaluate__samples=n), MINI, micro_batch=1, row_tokens=256),
            "evaluate",
        ).peak_bytes
        for n in (32, 1)
    )
    assert one < many


def test_plan_as_json() -> None:
    plan = memory.predict(recipe(), MINI, micro_batch=2, row_tokens=700)
    found = json.loads(json.dumps(plan.to_json()))
    assert (found["version"], found["micro_batch"], found["row_tokens"]) == (1, 2, 700)
    assert found["peak_bytes"] == plan.peak_bytes == max(p["peak_bytes"] for p in found["phases"])
    for shown in found["phases"]:
        assert shown["peak_bytes"] == sum(p["bytes"] for p in shown["parts"])
        assert all(p["name"] and p["formula"] for p in shown["parts"])
    assert "estimate" in found["covers"]


def test_rows_are_max_length_until_measured() -> None:
    assert memory.predict(recipe(data__max_length=512), MINI, micro_batch=1).row_tokens == 512


# Choosing


def test_micro_batch_is_the_largest_divisor_that_fits() -> None:
    settings = recipe(train__effective_batch=12)
    peaks = {n: training(settings, micro_batch=n, row_tokens=512).peak_bytes for n in (1, 2, 3, 4, 6, 12)}
    for size, free in peaks.items():
        assert memory.choose_micro_batch(settings, MINI, free, row_tokens=512) == size
    assert memory.choose_micro_batch(settings, MINI, peaks[6] - 1, row_tokens=512) == 4
    assert memory.choose_micro_batch(settings, MINI, 10**15, row_tokens=512) == 12


def test_micro_batch_is_never_below_one() -> None:
    assert memory.choose_micro_batch(recipe(), MINI, 0) == 1


def test_micro_batch_is_not_held_down_by_the_evaluation() -> None:
    keys = {"data__eval": {"path": "eval.jsonl"}, "evaluate__metrics": ["exact_match"]}
    assert memory.choose_micro_batch(recipe(**keys), MINI, 8 * GIB) == memory.choose_micro_batch(
        recipe(), MINI, 8 * GIB
    )


def test_explicit_micro_batch_stays() -> None:
    assert memory.choose_micro_batch(recipe(train__micro_batch=8), MINI, 0) == 8


@pytest.mark.parametrize(
    ("keys", "variant", "card"),
    [
        ({}, "builtin:smollm2-135m", 4),
        ({"data__max_length": 1024}, "microsoft/Phi-3-mini-4k-instruct", 4),
        ({"train__micro_batch": 16}, "microsoft/Phi-3-mini-4k-instruct", 16),
        ({"model__quantization": "none"}, "microsoft/Phi-3-mini-4k-instruct", 10),
        ({}, "microsoft/phi-4", 12),
        ({"model__quantization": "none"}, "microsoft/phi-4", 32),
        ({"model__quantization": "none", "train__activations": "keep"}, "microsoft/phi-4", 80),
        ({"train__micro_batch": 16, "train__activations": "keep"}, "microsoft/phi-4", None),
    ],
)
def test_smallest_card(keys: dict[str, Any], variant: str, card: int | None) -> None:
    assert memory.smallest_card(recipe(**keys), phi3.VARIANTS[variant]) == card


def test_a_card_is_never_usable_to_the_last_byte() -> None:
    for card in memory.CARDS_GIB:
        usable = memory.usable_bytes(card * GIB - memory.CONTEXT_BYTES)
        assert 0.75 * card * GIB < usable < 0.95 * card * GIB


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 * MIB, "5.00 MiB"), (3_446_711_214, "3.21 GiB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert memory.format_bytes(num_bytes) == text


def test_no_torch_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, qlora_phi3.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
