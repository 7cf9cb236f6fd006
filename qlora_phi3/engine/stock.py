"""torch's checkpoint on transformers' decoder layers, layer by layer as a policy says."""

from __future__ import annotations

from typing import Any, Final

from . import offload
from .policy import Policy

RECOMPUTING: Final = {"use_reentrant": False}


def follow(model: Any, policy: Policy) -> None:
    """Have the layers of a PeftModel keep what the policy says, from its next pass on.

    transformers puts its own way on all layers whenever training starts: follow after that.
    """
    if all(keep == "all" for keep in policy.keeps):
        return
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=RECOMPUTING)
    if policy.parks:
        offload.enable(model)
    layers = model.get_base_model().model.layers
    for layer, keep in zip(layers, policy.keeps, strict=True):
        layer.gradient_checkpointing = keep != "all"
