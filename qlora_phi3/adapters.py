"""Attach, describe and save LoRA on a Phi-3 base.

Owns the target contract: every target that was asked for is trained in every layer, nothing else is, and
the table of what is trained says so. Saving is atomic, checked by reading back, and carries the base's
provenance.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from . import phi3
from .errors import ModelError, RunError
from .model import Base, logical_numel
from .recipe import Recipe
from .sizes import target_linears
from .weights import first_line

WEIGHTS_NAME: Final = "adapter_model.safetensors"
PROVENANCE_NAME: Final = "base_provenance.json"


@dataclass(frozen=True)
class Trained:
    """One row of the trained table: a linear, in how many layers, and what its adapters hold."""

    target: str
    num_modules: int
    in_features: int
    out_features: int
    rank: int
    num_parameters: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def attach(base: Base, recipe: Recipe) -> Any:
    """Wrap the base in a `PeftModel` with float32 LoRA on the chosen linears.

    Raises:
        ModelError: a target that exists nowhere, or not in every layer.
    """
    from peft import LoraConfig, get_peft_model

    settings, targets = recipe.adapter, target_linears(recipe)
    # not `targets`: a name that is no linear at all is missing there, in a recipe that nobody checked
    asked = targets if settings.targets == "all-linear" else settings.targets
    linears = [phi3.PROJECTIONS.get(name, name) for name in asked]
    check_targets(base.model, linears, base.checkpoint.geometry.num_layers)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config, autocast_adapter_dtype=True)
    # PEFT writes this into adapter_config.json; for hub ids others can load from it, a folder of this
    # machine would tell nobody anything.
    config.base_model_name_or_path = base.checkpoint.provenance.base
    config.revision = base.checkpoint.provenance.revision
    check_trained(model, targets, base.checkpoint.geometry)
    return model


def check_targets(model: nn.Module, targets: Sequence[str], num_layers: int) -> None:
    """Every target must exist once in every decoder layer; PEFT accepts partial matches in silence.

    Raises:
        ModelError: the number of modules of that name is not the number of layers.
    """
    names = [name.rsplit(".", 1)[-1] for name, module in model.named_modules() if ".layers." in f".{name}"]
    for target in targets:
        found = names.count(target)
        if found != num_layers:
            reason = f"{target} exists in {found} of {num_layers} layers of the base."
            raise ModelError("adapter.targets", reason, f"Choose out of {', '.join(phi3.LINEARS)}.")


def check_trained(model: nn.Module, targets: Sequence[str], geometry: phi3.Geometry) -> None:
    """Assert that exactly the A/B pairs of the targets are trained, as many parameters as computed."""
    table = trained_table(model)
    assert {row.target for row in table} == set(targets), [row.target for row in table]
    assert all(row.num_modules == geometry.num_layers for row in table)
    in_adapters = sum(row.num_parameters for row in table)
    trainable = sum(logical_numel(p) for p in model.parameters() if p.requires_grad)
    computed = geometry.lora_parameters(tuple(targets), table[0].rank)
    assert in_adapters == trainable == computed, (in_adapters, trainable, computed)


def trained_table(model: nn.Module) -> list[Trained]:
    """What is trained, a row per linear, read off the modules themselves."""
    rows: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            rows.setdefault(name.rsplit(".", 1)[-1], []).append(module)
    return [_row(target, modules) for target, modules in rows.items()]


def _row(target: str, modules: list[Any]) -> Trained:
    pairs = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in modules]
    a, b = pairs[0]
    return Trained(
        target=target,
        num_modules=len(modules),
        in_features=a.shape[1],
        out_features=b.shape[0],
        rank=a.shape[0],
        num_parameters=sum(p.numel() for pair in pairs for p in pair if p.requires_grad),
        dtype=str(a.dtype).removeprefix("torch."),
    )


def save(model: Any, base: Base, folder: Path) -> None:
    """Write the PEFT adapter, its tokenizer and the base's provenance; all or nothing.

    The folder appears under its name only after the written weights were read back equal.

    Raises:
        RunError: a weight is not finite, or reads back differently.
    """
    check_finite(model)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # "auto", PEFT's default, asks the hub or any folder of the base's name for its vocabulary
    model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
    base.tokenizer.save_pretrained(partial)
    provenance = json.dumps(base.checkpoint.provenance.to_json(), indent=2)
    (partial / PROVENANCE_NAME).write_text(provenance + "\n", encoding="utf-8")
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty template; report.py writes the real card
    check_saved(model, partial)
    partial.rename(folder)


def check_finite(model: nn.Module) -> None:
    """Raises RunError when a trained weight is NaN or infinite."""
    bad = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if bad:
        reason = f"{len(bad)} trained weights are not finite, {bad[0]} the first."
        raise RunError("adapter", reason, "Lower train.learning_rate; nothing was saved.")


def check_saved(model: Any, folder: Path) -> None:
    """Read the written adapter back and compare it bit by bit with the live one.

    Raises:
        RunError: a weight is missing or differs.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place, remedy = str(folder / WEIGHTS_NAME), "Check the disk, then run again."
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    try:
        saved = load_file(place)
    except (OSError, SafetensorError) as error:
        raise RunError(place, f"cannot be read back: {first_line(error)}.", remedy) from None
    wrong = [key for key in live if key not in saved or not _same_bits(live[key].cpu(), saved[key])]
    if wrong or len(saved) != len(live):
        reason = f"reads back differently: {(wrong or ['surplus weights'])[0]}."
        raise RunError(place, reason, remedy)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Stricter than `torch.equal`, to which minus zero is zero and 1 in bfloat16 is 1 in float32."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))
