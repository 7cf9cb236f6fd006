"""The settings files of the layouts: what PEFT, MLX and our loralib folders write beside the tensors.

Owns reading them into an `AdapterConfig` and writing them. Refuses settings that change what an adapter
computes and that no layout can carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..errors import ModelError, shown
from .config import LARGEST, AdapterConfig, Layout, alpha_for, compress, match

_REFUSED: Final = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases on B",
    "fan_in_fan_out": "transposed weights",
    "modules_to_save": "whole weights beside the LoRA",
    "layer_replication": "repeated layers",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "adapted parameters",
    "alora_invocation_tokens": "activated LoRA",
    "ensure_weight_tying": "tied adapters",
    "arrow_config": "routing between adapters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's parallel linears",
}
"""Keys of PEFT 0.21's LoraConfig that make an adapter more than B @ A times a scale, when they are set."""

UNPADDED: Final = "unpadded_ranks"
"""Our note in MLX's config: linear's name or path -> its rank, where that is less than the file's."""

_READ: Final = (
    "peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "exclude_modules",
)  # fmt: skip
_WITHOUT_EFFECT: Final = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "merge_weights",
)  # fmt: skip
"""Keys of PEFT's LoraConfig, 0.3 to 0.21, that change nothing of what a saved adapter computes. Any other key
may be a feature of a version that is newer than this."""

_STARTS: Final = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
"""Initializations that leave the base as it is."""
_MOVED_BASE: Final = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Those that change the base's weights too, so that the adapter fits no stock base."""


def from_peft(found: Mapping[str, Any], layout: Layout, place: str) -> AdapterConfig:
    """Read an adapter_config.json of PEFT.

    Raises:
        ModelError: not LoRA, or a feature that none of our layouts has, or a value of the wrong type.
    """
    if found.get("peft_type") != "LORA":
        kind = shown(found.get("peft_type"))
        raise ModelError(place, f"peft_type is {kind}, not LORA.", "Give a LoRA adapter.")
    used = [meaning for key, meaning in _REFUSED.items() if found.get(key)]
    if found.get("bias", "none") != "none":
        used.append("trained biases")
    start = str(found.get("init_lora_weights", True)).lower()
    if start.startswith(_MOVED_BASE):
        used.append(f"the initialization {start}, which moves the base's weights")
    elif start not in _STARTS:
        used.append(f"the initialization {shown(found['init_lora_weights'])}, which is not known here")
    if used:
        remedy = "Merge it with the tool that made it, or train plain LoRA."
        raise ModelError(place, f"the adapter uses {', '.join(used)}, which is no plain LoRA.", remedy)
    known = {*_READ, *_WITHOUT_EFFECT, *_REFUSED}
    unknown = [key for key, value in found.items() if value and key not in known]
    if unknown:
        reason = f"sets {', '.join(map(shown, unknown[:8]))}, of which nothing is known here."
        remedy = "Remove it where the adapter computes the same without; else merge it with its own tool."
        raise ModelError(place, reason, remedy)
    return AdapterConfig(
        rank=_positive(found, "r", int, place),
        alpha=_positive(found, "lora_alpha", (int, float), place),
        targets=_peft_targets(found, place),
        rank_pattern=_positives(found, "rank_pattern", int, place),
        alpha_pattern=_positives(found, "alpha_pattern", (int, float), place),
        use_rslora=_get(found, "use_rslora", bool, place, False),
        layout=layout,
    )


def _peft_targets(found: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Linears that must be there; none where PEFT chose them by a pattern or left layers out."""
    by_rule = isinstance(found.get("target_modules"), str)
    if by_rule or found.get("layers_to_transform") is not None or found.get("exclude_modules"):
        return ()
    return _names(found, "target_modules", place)


def _names(found: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    names = _get(found, key, list, place, [])
    if not all(isinstance(name, str) for name in names):
        raise ModelError(place, f"{key} is no list of names.", "Give the config that belongs to the adapter.")
    return tuple(names)


def from_mlx(found: Mapping[str, Any], ranks: Mapping[str, int], place: str) -> AdapterConfig:
    """Read an adapter_config.json of mlx-lm: one scale for all; ranks as we noted, else as its tensors have.

    Raises:
        ModelError: not LoRA, or no scale, or a note of ours that is none.
    """
    if found.get("fine_tune_type", "lora") != "lora":
        reason = f"fine_tune_type is {shown(found['fine_tune_type'])}, not lora."
        raise ModelError(place, reason, "Give a LoRA adapter.")
    if found.get("use_dora"):  # of mlx-lm before there was fine_tune_type
        raise ModelError(place, "the adapter uses DoRA, which is no plain LoRA.", "Give a LoRA adapter.")
    settings = _get(found, "lora_parameters", dict, place)
    scale, rank = _positive(settings, "scale", (int, float), place), _positive(settings, "rank", int, place)
    noted = _get(found, UNPADDED, dict, place, {})
    if not all(isinstance(own, int) and own > 0 for own in noted.values()):
        raise ModelError(place, f"{UNPADDED} holds other than ranks.", "Write the adapter again.")
    ranks = {module: match(noted, module, own) for module, own in ranks.items()}
    alphas = {module: alpha_for(scale, own, False) for module, own in ranks.items()}
    return AdapterConfig(rank, alpha_for(scale, rank, False), (), ranks, alphas, layout="mlx")


def from_loralib(found: Mapping[str, Any], place: str) -> AdapterConfig:
    """Read what `config.to_json` wrote beside a loralib file.

    Raises:
        ModelError: a value is missing or of the wrong type.
    """
    layout = found.get("layout")
    if layout not in ("loralib", "loralib_merged"):
        raise ModelError(place, f"layout is {layout!r}, not loralib.", "Write the adapter again.")
    enable_lora = _get(found, "enable_lora", dict, place, {})
    for name, blocks in enable_lora.items():
        if not isinstance(blocks, list) or not all(isinstance(block, bool) for block in blocks):
            raise ModelError(place, f"enable_lora: {name} is no list of true and false.", "Correct it.")
    return AdapterConfig(
        rank=_positive(found, "rank", int, place),
        alpha=_positive(found, "alpha", (int, float), place),
        targets=_names(found, "targets", place),
        rank_pattern=_positives(found, "rank_pattern", int, place),
        alpha_pattern=_positives(found, "alpha_pattern", (int, float), place),
        layout=layout,
        enable_lora={name: tuple(blocks) for name, blocks in enable_lora.items()},
    )


def to_peft(config: AdapterConfig, **more: Any) -> Any:
    """PEFT's own `LoraConfig` of an adapter in one of its layouts; `more` of its fields as they are."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
        **more,
    )


def to_mlx(config: AdapterConfig, modules: list[str], place: str) -> dict[str, Any]:
    """What mlx-lm's `load_adapters` reads. -1 layers are all of them; the keys say which linears.

    It has one rank for all: narrower pairs are padded in their file, and their own rank noted for `from_mlx`.

    Raises:
        ModelError: the scales differ, of which mlx-lm knows one.
    """
    scales = {f"{config.scale_of(module):.12g}" for module in modules}
    if len(scales) > 1:
        reason = f"its linears are scaled by {', '.join(sorted(scales))}; MLX has one scale for all."
        raise ModelError(place, reason, "Train with one alpha/rank, or export another layout.")
    keys = {m.split(".", 3)[3] if ".layers." in m else m for m in modules}
    ranks = {module: config.rank_of(module) for module in modules}
    widest = max(ranks.values())
    _, narrower = compress(ranks, widest)
    parameters = {"rank": widest, "scale": config.scale_of(modules[0]), "dropout": 0.0}
    return {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {**parameters, "keys": sorted(keys)},
        **({UNPADDED: narrower} if narrower else {}),
    }


def _positives(found: Mapping[str, Any], key: str, kind: Any, place: str) -> Any:
    """The values of a pattern, each more than zero."""
    values = _get(found, key, dict, place, {})
    for name in values:
        _positive(values, name, kind, place, f"{key}: ")
    return values


def _positive(found: Mapping[str, Any], key: str, kind: Any, place: str, within: str = "") -> Any:
    """A rank, an alpha or a scale of a trained adapter: at zero it would do nothing, below that undo."""
    value = found.get(key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and isinstance(value, kind) and 0 < value <= LARGEST):
        whole = "whole number" if kind is int else "finite number"
        reason = f"{within}{shown(key) if within else key} is {shown(value)}, not a positive {whole}."
        raise ModelError(place, reason, "Give the config that belongs to the adapter.")
    return value


def _get(found: Mapping[str, Any], key: str, kind: Any, place: str, default: Any = None) -> Any:
    """A value of the right type; true and false are no numbers, whatever Python says."""
    value = found.get(key)
    value = default if value is None else value
    fits = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if not fits or (isinstance(value, (int, float)) and not abs(value) <= LARGEST):
        raise ModelError(place, f"{key} is {shown(value)}.", "Give the config that belongs to the adapter.")
    return value
