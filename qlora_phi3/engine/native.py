"""The native engine on one model: our layer in place of transformers' while it trains.

Owns what is installed on the instances of a model and taken back. A layer whose pass is not one of documents
under gradients (evaluating, answering) runs as it did. State dicts know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ..case import hosts
from ..errors import RecipeError
from ..recipe import Recipe
from .layer import Function, Layer, Norm, NormFunction, heads_of, why_not
from .offload import Parking
from .policy import Policy
from .residency import Residency
from .tiles import Run


def choose(recipe: Recipe, config: Mapping[str, Any], device: torch.device) -> tuple[str, str]:
    """The engine that a recipe's `train.engine` means for this base and device, and the reason in words.

    Raises:
        RecipeError: it says native, and native does not compute this.
    """
    asked, lacks = recipe.train.engine, why_not(config, recipe.adapter.method)
    streams = hosts(recipe, "layers")
    if streams and lacks is not None:
        reason = f"'layers' is for the native engine, which does not do this: {lacks}."
        raise RecipeError("memory.host", reason, "Leave layers out.")
    if asked == "native" and lacks is not None:
        raise RecipeError("train.engine", f"'native': {lacks}.", "Set train.engine=auto, or reference.")
    if asked != "auto":
        return asked, "the recipe says so"
    if lacks is not None:
        return "reference", f"native does not do this: {lacks}"
    if streams:
        return "native", "memory.host has layers, whose weights no other engine lets go"
    if device.type != "cpu":
        return "reference", "native was proven on CPUs only; train.engine=native chooses it"
    return "native", "it is proven on CPUs"


class Native:
    """Our layers on a Phi3ForCausalLM; whoever gives them another `policy` does so between passes.

    `resident`: what of its weights is on the host.
    """

    def __init__(self, causal: Any, policy: Policy, resident: Residency | None = None) -> None:
        self.policy, self._resident = policy, resident
        self._config, self._layers = causal.config, causal.model.layers
        self._heads = heads_of(self._config)
        self._parking = Parking()
        self._run: tuple[torch.Tensor, Run] | None = None
        for index, module in enumerate(self._layers):
            # transformers would recompute around us. Source: modeling_layers.py, GradientCheckpointingLayer
            module.gradient_checkpointing = False
            module.forward = self._in_place_of(module.forward, module, index)
        self._norm = causal.model.norm
        self._norm.forward = _norm_in_place_of(self._norm.forward, self._norm)

    def remove(self) -> None:
        """transformers' own layers again."""
        for module in (*self._layers, self._norm):
            del module.forward

    def _in_place_of(self, stock: Any, module: Any, index: int) -> Any:
        def forward(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            documents = named.get("documents")
            if documents is None or not (module.training and torch.is_grad_enabled()):
                found: torch.Tensor = stock(hidden_states, *arguments, **named)
                return found
            run = self._run_of(documents, *named["position_embeddings"])
            return self._through(index, module, hidden_states, run)

        return forward

    def _through(self, index: int, module: Any, state: torch.Tensor, run: Run) -> torch.Tensor:
        policy, keep = self.policy, self.policy.keeps[index]
        here = nullcontext if self._resident is None else partial(self._resident.backward_of, index)
        layer = Layer.of(module, None if keep == "all" else policy.slice_columns, here)
        # the embedding's output is a leaf, which autograd holds anyway
        parked = policy.parks and keep == "input" and not state.is_leaf
        with self._parking.hooks() if parked else nullcontext():
            out: torch.Tensor = Function.apply(  # type: ignore[no-untyped-call]
                state[0], layer, run, keep, *layer.parameters
            )
        return out.unsqueeze(0)

    def _run_of(self, documents: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Run:
        """One for all layers of a pass."""
        if self._run is None or self._run[0] is not cos:
            window = getattr(self._config, "sliding_window", None)
            scale = self._heads.width**-0.5
            columns = self.policy.slice_columns
            self._run = cos, Run(documents, window, cos[0], sin[0], self._heads, scale, columns)
        return self._run[1]


def _norm_in_place_of(stock: Any, module: Any) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if not (module.training and torch.is_grad_enabled() and hidden_states.requires_grad):
            found: torch.Tensor = stock(hidden_states)
            return found
        rows = hidden_states.flatten(0, 1)
        out: torch.Tensor = NormFunction.apply(rows, Norm.of(module))  # type: ignore[no-untyped-call]
        return out.view_as(hidden_states)

    return forward
