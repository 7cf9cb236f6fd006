"""Layer inputs in host memory, from a layer's forward to its backward: `train.activations: offload`.

Owns where the inputs of recomputed layers are meanwhile; the recomputing itself is torch's checkpoint.
Nothing is kept here: an input lives and dies with the graph of its pass, so a pass that failed leaves none
behind. On CUDA copies run on a stream of their own, out while the layer computes, back while the layer behind
it is in its backward. That path is untested on hardware. A CPU makes the same moves with plain copies; its
host is the same memory, so nothing is gained there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def enable(model: nn.Module) -> None:
    """Park the inputs of the layers that are recomputed; to recompute alone, enable that again.

    Source: transformers 5.23 modeling_layers.py, GradientCheckpointingLayer. Its own
    `activation_checkpointing_enable(offload=True)` copies on the stream that computes, and needs CUDA.
    """
    parking = Parking()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = parking  # type: ignore[assignment]


class Parking:
    """torch's checkpoint for the layers of one model, with their inputs in host memory meanwhile."""

    def __init__(self) -> None:
        self._last: Callable[[], _Parked | None] = lambda: None

    def __call__(self, layer: Callable[[torch.Tensor], torch.Tensor], state: torch.Tensor) -> torch.Tensor:
        """The layer's output; all that it takes beside the hidden states is bound in `layer`, and shared.

        Shape: state (rows, length, hidden_size), the output too.
        """
        if state.is_leaf:  # the embedding's output: autograd holds it anyway, a copy would be one more
            found: torch.Tensor = checkpoint(layer, state, use_reentrant=False)
            return found
        # checkpoint saves its arguments under these hooks, and what the layer saves under its own
        with self.hooks():
            found = checkpoint(layer, state, use_reentrant=False)
        return found

    def hooks(self) -> saved_tensors_hooks:
        """While entered, whatever a function saves for its backward is parked: one input of one layer."""
        return saved_tensors_hooks(self._park, _Parked.take)

    def _park(self, state: torch.Tensor) -> _Parked:
        before = self._last()
        if before is not None:
            before.leave()
        parked = _Parked(state.detach(), before)
        self._last = weakref.ref(parked)
        return parked


class _Parked:
    """A layer's input: on the host, and on the device until the next layer's comes, and again when wanted.

    The last layer's never leaves. Asking for one sets out for that of the layer before.
    """

    def __init__(self, state: torch.Tensor, before: _Parked | None) -> None:
        self._state: torch.Tensor | None = state
        self._device = state.device
        self._host, self._wait = copied(state, torch.device("cpu"))
        self._before: Callable[[], _Parked | None] = weakref.ref(before) if before else lambda: None

    def leave(self) -> None:
        """Give up the device's, once what is computed from now on comes after the copy."""
        self._wait()
        self._state = None

    def come(self) -> torch.Tensor:
        """The device's, maybe still on its way."""
        if self._state is None:
            self._state, self._wait = copied(self._host, self._device)
        return self._state

    def take(self) -> torch.Tensor:
        """The input, whole for whatever is computed from now on."""
        state = self.come()
        self.leave()
        before = self._before()
        if before is not None:
            before.come()
        return state


@torch.no_grad()
def copied(tensor: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Callable[[], None]]:
    """A copy on that device, and what has the current stream wait until it is whole.

    Both tensors belong to the stream that computes. Whoever drops one of the card's before waiting has to
    synchronize, or that stream may write where the copy still does.
    """
    card = tensor.device if tensor.is_cuda else device
    if card.type != "cuda":
        return tensor.clone(), lambda: None
    # torch keeps pinned memory that was freed, and gives it out again only when its copies are done
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=device.type == "cpu")
    side = _side_stream(card)
    side.wait_stream(torch.cuda.current_stream(card))
    with torch.cuda.stream(side):
        copy.copy_(tensor, non_blocking=True)
    done = side.record_event()
    return copy, lambda: torch.cuda.current_stream(card).wait_event(done)


@lru_cache(maxsize=8)
def _side_stream(card: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(card)  # type: ignore[no-untyped-call]
