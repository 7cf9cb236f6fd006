"""Between loralib (microsoft/LoRA) and PEFT: its updates as formulas, its two helpers, its files on Phi-3.

Owns what loralib means by an adapter, tested against loralib itself, which is not needed to run. Refuses
nothing of its own; files and shapes are checked in `layouts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from .layouts import AdapterConfig, Tensors, convert
from .layouts.blocks import Pair, ungroup
from .layouts.settings import to_peft
from .phi3 import Geometry

Bias = Literal["none", "all", "lora_only"]


# What is added to a frozen weight. Source of all four: loralib 0.1.2 layers.py


def delta_linear(a: Tensor, b: Tensor, scale: float, *, fan_in_fan_out: bool = False) -> Tensor:
    """Update of a `loralib.Linear`.

    Shape: a (r, in), b (out, r) -> (out, in), transposed where the layer stores (in, out).
    """
    delta = (b @ a) * scale
    return delta.T if fan_in_fan_out else delta


def delta_embedding(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Update of a `loralib.Embedding`.

    Shape: a (r, num), b (dim, r) -> (num, dim).
    """
    return (b @ a).T * scale


def delta_conv2d(a: Tensor, b: Tensor, scale: float, weight_shape: Sequence[int]) -> Tensor:
    """Update of a `loralib.Conv2d` with a square kernel of side ks.

    Shape: a (r*ks, in*ks), b (out/groups*ks, r*ks) -> (out, in/groups, ks, ks), `weight_shape`.
    """
    return (b @ a).view(*weight_shape) * scale


def delta_merged_linear(
    a: Tensor, b: Tensor, scale: float, enable_lora: Sequence[bool], *, fan_in_fan_out: bool = False
) -> Tensor:
    """Update of a `loralib.MergedLinear` of n equal blocks, zero for those that are off.

    Shape: a (r*k, in), b (out/n*k, r), k blocks on -> (out, in), transposed where the layer stores (in, out).
    """
    sizes = [b.shape[0] // sum(enable_lora)] * len(enable_lora)
    apart = ungroup(Pair(a, b, scale), sizes, enable_lora)
    return delta_linear(apart.a, apart.b, scale, fan_in_fan_out=fan_in_fan_out)


# loralib's two helpers, for models wrapped by PEFT


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freeze all but the LoRA parameters, and train the biases that `bias` names.

    "all": every bias of the model; "lora_only": those of the linears with LoRA. Phi-3 has none at all.

    Raises:
        ValueError: another `bias`.
    """
    chosen = _chosen_biases(model, bias, [name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        if "lora_" not in name:  # loralib leaves its own as they are, frozen ones too
            parameter.requires_grad = name in chosen


def lora_state_dict(model: nn.Module, bias: Bias = "none", adapter: str = "default") -> Tensors:
    """The LoRA tensors, and the biases that `bias` names, under loralib's names; a strict=False load away
    from the same model built of loralib's layers.

    Raises:
        ValueError: another `bias`.
    """
    state, found = model.state_dict(), {}
    chosen = _chosen_biases(model, bias, state)
    for key, tensor in state.items():
        name = _loralib_name(key, adapter)
        if name is not None and (key in chosen or "lora_" in key):
            found[name] = tensor
    return found


def _chosen_biases(model: nn.Module, bias: Bias, keys: Iterable[str]) -> set[str]:
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f'bias is {bias!r}; choose out of "none", "all", "lora_only"')
    names = {key for key in keys if "bias" in key and "lora_" not in key} if bias != "none" else set()
    if bias == "lora_only":
        with_lora = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
        names &= {f"{name}.{kind}" for name in with_lora for kind in ("bias", "base_layer.bias")}
    return names


def _loralib_name(key: str, adapter: str) -> str | None:
    """`base_model.model.<p>.lora_A.default.weight` -> `<p>.lora_A`; None for another adapter's."""
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if ".lora_" not in name:
        return name
    module, _, rest = name.partition(".lora_")
    side, _, owner = rest.removeprefix("embedding_").partition(".")
    mine = owner.removesuffix(".weight") in (adapter, "")  # loralib's own layers name no adapter
    return f"{module}.lora_{side}" if mine else None


# Adapters of any layout on a Phi-3


def attach_adapter(model: Any, tensors: Tensors, config: AdapterConfig, geometry: Geometry) -> Any:
    """Wrap a Phi-3 in a `PeftModel` that carries the adapter, of whatever layout; all of it or nothing.

    Raises:
        ModelError: the adapter is not whole or not of this base; the model is untouched.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    fused, found = convert(tensors, config, "fused", geometry)
    wrapped = get_peft_model(model, to_peft(found))
    set_peft_model_state_dict(wrapped, fused)
    return wrapped


def adapter_of(model: Any, geometry: Geometry, adapter: str = "default") -> tuple[Tensors, AdapterConfig]:
    """The adapter of a live `PeftModel`, fused or split as it is, copied to the CPU.

    Raises:
        ModelError: it is no plain LoRA of this base.
    """
    from peft import get_peft_model_state_dict

    from .layouts import detect
    from .layouts.settings import from_peft

    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state.items()}
    settings = model.peft_config[adapter].to_dict()
    kind = settings["peft_type"]
    settings["peft_type"] = getattr(kind, "value", kind)
    if isinstance(settings["target_modules"], set):  # which a saved config has as a list
        settings["target_modules"] = sorted(settings["target_modules"])
    return tensors, from_peft(settings, detect(tensors, geometry), "adapter")


def loralib_config(
    alpha: float, rank: int, enable_lora: dict[str, tuple[bool, ...]] | None = None
) -> AdapterConfig:
    """What a loralib `.pt` does not say: give it to `layouts.read_adapter`.

    `enable_lora` maps each MergedLinear to its blocks, as in `{"qkv_proj": (True, False, True)}`; without it
    every layer is a `loralib.Linear`.
    """
    layout: Literal["loralib", "loralib_merged"] = "loralib_merged" if enable_lora else "loralib"
    return AdapterConfig(rank, alpha, (), layout=layout, enable_lora=enable_lora or {})


__all__ = [
    "adapter_of",
    "attach_adapter",
    "delta_conv2d",
    "delta_embedding",
    "delta_linear",
    "delta_merged_linear",
    "lora_state_dict",
    "loralib_config",
    "mark_only_lora_as_trainable",
]
