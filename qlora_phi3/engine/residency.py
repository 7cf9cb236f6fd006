"""Frozen weights in the computer's memory, on the device only where they are computed with: `memory.host`.

Owns where those weights are and how they come: the input embedding's matrix never does, ids are looked up on
the host and their states copied to the device. All of it is installed on the modules of one model and can be
removed; parameters stay the same objects, so state dicts and what is saved of them know nothing of it. On
CUDA the host's memory is pinned. That path is untested on hardware. A CPU does the same without copies; its
host is the same memory, so nothing is gained there.

Refused before, by the recipe's checks and the plan: an embedding that is the head too, or has an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..case import hosts
from ..recipe import Recipe
from . import offload

HOST = torch.device("cpu")


def install(causal: Any, recipe: Recipe) -> Residency:
    """Move what a settled recipe has on the host there, of a Phi3ForCausalLM with its adapters on it."""
    found = Residency(causal)
    if hosts(recipe, "embedding"):
        found.host_embedding()
    return found


class Residency:
    """What of one model is on the host, and the way back."""

    def __init__(self, causal: Any) -> None:
        self.device: torch.device = causal.device
        self._causal = causal
        self._undo: list[Callable[[], None]] = []

    def host_embedding(self) -> None:
        """Look ids up in the computer's memory from now on."""
        module = self._causal.model.embed_tokens
        assert module.weight is not self._causal.lm_head.weight, "a tied embedding computes on the device"
        assert not module.weight.requires_grad and type(module) is nn.Embedding, "the embedding is trained"
        module.weight.data = on_host(module.weight.data)
        module.forward = _Lookup(module, self.device)  # type: ignore[method-assign, assignment]
        stays(module)
        self._device_first()
        self._undo.append(self._give_embedding_back)

    def on_host(self) -> Iterator[torch.Tensor]:
        """What is there."""
        if "forward" in vars(self._causal.model.embed_tokens):
            yield self._causal.model.embed_tokens.weight

    def remove(self) -> None:
        """Everything on the device again, and computed as before."""
        while self._undo:
            self._undo.pop()()

    def _give_embedding_back(self) -> None:
        module = self._causal.model.embed_tokens
        del module.forward, module._apply
        module.weight.data = module.weight.data.to(self.device)

    def _device_first(self) -> None:
        """Have the model's parameters begin with those on its device.

        What transformers calls a model's device is the first one's. Source: modeling_utils.py, device.
        """
        module = self._causal
        if "parameters" in vars(module):
            return
        stock, device = module.parameters, self.device

        def parameters(recurse: bool = True) -> Iterator[nn.Parameter]:
            for here in (True, False):
                yield from (one for one in stock(recurse) if (one.device == device) == here)

        module.parameters = parameters
        self._undo.append(lambda: delattr(module, "parameters"))


class _Lookup:
    """An embedding's forward, in the computer's memory."""

    def __init__(self, module: nn.Embedding, device: torch.device) -> None:
        self._weight, self._device = module.weight, device

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The device's states of these ids, maybe still on their way as CUDA orders it.

        The ids are waited for: they are on the device, and the host has to read them.

        Shape: (rows, length) int64 -> (rows, length, hidden_size).
        """
        width, on_card = self._weight.shape[1], self._device.type == "cuda"
        states = torch.empty(*ids.shape, width, dtype=self._weight.dtype, pin_memory=on_card)
        torch.index_select(self._weight, 0, ids.reshape(-1).to(HOST), out=states.view(-1, width))
        return states.to(self._device, non_blocking=True)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the computer's memory, pinned and whole; on a CPU it is there already."""
    if tensor.device == HOST:
        return tensor
    found, _ = offload.copied(tensor, HOST)
    torch.cuda.synchronize(tensor.device)
    return found


def stays(module: nn.Module) -> None:
    """Have a module's tensors where they are, whatever the model around it is moved to."""
    module._apply = lambda fn, recurse=True: module  # type: ignore[method-assign]
