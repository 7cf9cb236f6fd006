"""Tiny models that train as PhiTrainer does, under TrackedBytes: what test_memory.py compares plans with."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from qlora_phi3 import adapters, memory, phi3
from qlora_phi3.data import TokenRow
from qlora_phi3.engine import attention, offload, residency, stock
from qlora_phi3.engine.documents import Documents
from qlora_phi3.engine.native import Native
from qlora_phi3.engine.policy import Policy
from qlora_phi3.phi3 import Geometry
from qlora_phi3.recipe import Recipe
from qlora_phi3.tracked import TrackedBytes, model_tensors, optimizer_tensors
from qlora_phi3.trainer import PhiTrainer


def recipe(**keys: Any) -> Recipe:
    """A recipe with neither packing nor split adapters and some keys set, written `part__key=value`."""
    data = {"train": {"path": "rows.jsonl"}, "packing": False}
    values: dict[str, Any] = {"version": 1, "name": "test", "data": data, "adapter": {"split_fused": False}}
    values["train"] = {"engine": "reference"}
    for key, value in keys.items():
        part, name = key.split("__")
        values.setdefault(part, {})[name] = value
    return Recipe.model_validate(values)


def tiny(num_layers: int = 2, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> tuple[Any, Geometry]:
    """A random Phi-3 with our attention, frozen, and its geometry."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = Phi3Config(num_hidden_layers=num_layers, **ids, **{"vocab_size": 320, **sizes})
    geometry = phi3.geometry_from_config({**config.to_dict(), "architectures": None})
    model = Phi3ForCausalLM._from_config(config, attn_implementation=attention.register()).to(dtype)
    return model.requires_grad_(False), geometry


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
    from peft import get_peft_model

    found = get_peft_model(model, adapters.peft_config(settings.adapter))
    if settings.adapter.split_fused:
        geometry = phi3.geometry_from_config({**model.config.to_dict(), "architectures": None})
        adapters.split_linears(found, settings.adapter, geometry)
    if settings.adapter.method == "dora":
        adapters.keep_dtype(found)
    return found


def recomputing(model: Any) -> Any:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def build(settings: Recipe, num_layers: int, **sizes: Any) -> tuple[Any, Geometry]:
    """The model that a recipe trains."""
    base, geometry = tiny(num_layers, getattr(torch, settings.model.compute_dtype), **sizes)
    if settings.model.quantization == "nf4":
        quantize(base, settings.model.double_quant)
    model = adapt(base, settings).train()
    model.resident = residency.install(base, settings)
    if settings.train.engine == "native":
        Native(base, Policy.of(settings, num_layers), model.resident)
        return model, geometry
    policy = Policy.of(settings, num_layers)
    if policy.keeps[0] != "all":
        model.enable_input_require_grads()
    stock.follow(model, policy)
    return model, geometry


def host_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have TrackedBytes count none of what offload.py moves to the host, as on a card."""
    on_host: dict[int, weakref.ref[torch.Tensor]] = {}
    copied = offload.copied

    def apart(tensor: torch.Tensor, device: torch.device) -> Any:
        if (known := on_host.get(id(tensor))) is not None and known() is tensor:
            return copied(tensor, device)
        with _disable_current_modes():
            copy, wait = copied(tensor, device)
        on_host[id(copy)] = weakref.ref(copy)
        return copy, wait

    monkeypatch.setattr(offload, "copied", apart)


def allocated_bytes(done: Callable[[], object]) -> int:
    """Peak of what torch allocates meanwhile, inside of operations too; done once before, for what stays."""
    from torch.profiler import ProfilerActivity, profile

    done()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        done()
    found = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate(one.nbytes() for one in sorted(found, key=lambda one: one.start_ns())))


def trained(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def rows(lengths: Sequence[int]) -> list[TokenRow]:
    ids = [[i % 300 + 3 for i in range(n)] for n in lengths]
    return [SimpleNamespace(input_ids=one, labels=one) for one in ids]  # type: ignore[misc]


def documents(lengths: Sequence[int]) -> Documents:
    return Documents.of(rows(lengths), torch.device("cpu"))


def loss_of(model: Any, settings: Recipe, found: Documents) -> torch.Tensor:
    dtype = getattr(torch, settings.model.compute_dtype)
    trainer: Any = SimpleNamespace(compute_dtype=dtype, logit_tokens=settings.train.logit_tokens)
    return PhiTrainer.nll(trainer, model, found)


def losses_and_gradients(model: Any, settings: Recipe, passes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Losses of the passes, by the lengths of their documents, then all gradients of them together."""
    torch.manual_seed(2)
    losses = []
    for lengths in passes:
        loss = loss_of(model, settings, documents(lengths))
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in trained(model) if p.grad is not None)]


def optimizer_of(name: str, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
        "adamw_torch": torch.optim.AdamW,
    }
    return made[name](parameters, lr=1e-3)


def step(optimizer: torch.optim.Optimizer) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        optimizer.step()


@dataclass(frozen=True)
class Compared:
    """A step's peak as tracked, by category, beside its plan."""

    tracked: TrackedBytes
    plan: memory.Phase
    geometry: Geometry

    @property
    def ratio(self) -> float:
        return self.plan.peak_bytes / self.tracked.peak_bytes


def compare(settings: Recipe, num_layers: int, lengths: Sequence[int], passes: int, **sizes: Any) -> Compared:
    """An optimizer step of so many passes over documents of these lengths, its states already there."""
    model, geometry = build(settings, num_layers, **sizes)
    parameters = trained(model)
    optimizer = optimizer_of(settings.train.optimizer, parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    attention._seen.cache_clear()
    tracked = TrackedBytes()
    tracked.claim("weights", model_tensors(model))
    tracked.claim("adapters", parameters)
    tracked.claim("optimizer states", optimizer_tensors(optimizer))
    tracked.start()
    with tracked:
        for _ in range(passes):
            loss_of(model, settings, documents(lengths)).backward()
            tracked.claim("gradients", (p.grad for p in parameters if p.grad is not None))
        step(optimizer)
    micro = len(lengths) if not settings.data.packing else 1
    plan = memory.predict(settings, geometry, micro_batch=micro, row_tokens=max(lengths), device="cpu")
    return Compared(tracked, next(phase for phase in plan.phases if phase.name == "train"), geometry)
