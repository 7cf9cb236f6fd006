"""Frozen weights in the computer's memory, on the device only where they are computed with: `memory.host`.

Owns where those weights are and how they come. The input embedding's matrix never does: ids are looked up on
the host and their states copied to the device. The layers' linears do, a layer at a time: while one computes,
the next one's are on their way, in a backward the one's before; when it is done they leave. So at most two
layers' are on the device, and none from a pass's forward to its backward, or when it is over.

All of it is installed on the modules of one model and can be removed; parameters stay the same objects, so
state dicts and what is saved of them know nothing of it. On CUDA the host's memory is pinned and copies run
on a stream of their own. That path is untested on hardware. A CPU makes the layers' copies too, plainly; its
host is the same memory, so nothing is gained there.

Refused before, by the recipe's checks and the plan: an embedding that is the head too or has an adapter, and
layers of another engine than native, whose backward would have to find the weights where its forward did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from ..case import hosts
from ..recipe import Recipe
from . import offload

HOST: Final = torch.device("cpu")

ALIGNED: Final = 16
"""Tensors in one piece of memory begin at multiples of so many bytes, as kernels want to read them."""


def install(causal: Any, recipe: Recipe) -> Residency:
    """Move what a settled recipe has on the host there, of a Phi3ForCausalLM with its adapters on it."""
    found = Residency(causal)
    if hosts(recipe, "embedding"):
        found.host_embedding()
    if hosts(recipe, "layers"):
        found.host_layers()
    return found


class Residency:
    """What of one model is on the host, how its layers' weights come and go, and the way back."""

    def __init__(self, causal: Any) -> None:
        self.device: torch.device = causal.device
        self._causal = causal
        self._layers: list[_Packed] = []
        self._ahead: _Coming | None = None
        self._undo: list[Callable[[], None]] = []

    def on_host(self) -> Iterator[torch.Tensor]:
        """What is there."""
        if "forward" in vars(self._causal.model.embed_tokens):
            yield self._causal.model.embed_tokens.weight
        yield from (layer.host for layer in self._layers)

    def remove(self) -> None:
        """Everything on the device again, and computed as before."""
        self.forget()
        while self._undo:
            self._undo.pop()()

    # The embedding

    def host_embedding(self) -> None:
        """Look ids up in the computer's memory from now on."""
        module = self._causal.model.embed_tokens
        assert module.weight is not self._causal.lm_head.weight, "a tied embedding computes on the device"
        assert not module.weight.requires_grad and type(module) is nn.Embedding, "the embedding is trained"
        if module.weight.device != HOST:
            module.weight.data = _moved(module.weight.data)
        module.forward = _Lookup(module, self.device)  # type: ignore[method-assign, assignment]
        _stays(module)
        self._device_first()
        self._undo.append(self._give_embedding_back)

    def _give_embedding_back(self) -> None:
        module = self._causal.model.embed_tokens
        del module.forward, module._apply
        module.weight.data = module.weight.data.to(self.device)

    # The layers

    def host_layers(self) -> None:
        """Have the layers' linears in the computer's memory between their passes from now on."""
        for index, module in enumerate(self._causal.model.layers):
            self._layers.append(_Packed(module))
            before = module.register_forward_pre_hook(self._before(index))
            after = module.register_forward_hook(self._after(index), always_call=True)
            self._undo += [before.remove, after.remove]
        self._device_first()
        self._undo.append(self._give_layers_back)

    def _give_layers_back(self) -> None:
        for layer in self._layers:
            layer.give_back(self.device)
        self._layers.clear()

    def _before(self, index: int) -> Callable[..., None]:
        return lambda module, arguments: self._enter(index, index + 1)

    def _after(self, index: int) -> Callable[..., None]:
        def leave(module: nn.Module, arguments: Any, out: Any) -> None:
            self._layers[index].leave()
            if out is None:  # it failed
                self.forget()

        return leave

    @contextmanager
    def backward_of(self, index: int) -> Iterator[None]:
        """A layer's linears on the device, those of the layer before on their way."""
        if not self._layers:
            yield
            return
        try:
            self._enter(index, index - 1)
            yield
        except BaseException:
            self.forget()
            raise
        finally:
            self._layers[index].leave()

    def forget(self) -> None:
        """Drop what is on its way to the device for a pass that will not go on."""
        if self._ahead is not None:
            self._ahead.wait()
        self._ahead = None

    @torch.inference_mode(False)  # parameters outlive the pass
    def _enter(self, index: int, following: int) -> None:
        coming, self._ahead = self._ahead, None
        if coming is None or coming.layer != index:
            if coming is not None:  # of a pass that was given up
                coming.wait()
            coming = self._ordered(index)
        coming.wait()
        self._layers[index].place(coming.packed)
        if 0 <= following < len(self._layers):
            self._ahead = self._ordered(following)

    def _ordered(self, index: int) -> _Coming:
        return _Coming(index, *offload.copied(self._layers[index].host, self.device))

    def _device_first(self) -> None:
        """Have the model's parameters begin with those on its device.

        What transformers calls a model's device is the first one's, and answers go there.
        Source: transformers 5.23 modeling_utils.py, device.
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
        """The device's states of these ids.

        The ids are waited for: they are on the device, and the host has to read them.

        Shape: (rows, length) int64 -> (rows, length, hidden_size).
        """
        width, on_card = self._weight.shape[1], self._device.type == "cuda"
        states = torch.empty(*ids.shape, width, dtype=self._weight.dtype, pin_memory=on_card)
        torch.index_select(self._weight, 0, ids.reshape(-1).to(HOST), out=states.view(-1, width))
        return states.to(self._device, non_blocking=True)


class _Coming(NamedTuple):
    """A layer's linears on the device, whole for what is computed after `wait`."""

    layer: int
    packed: torch.Tensor
    wait: Callable[[], None]


class _Place(NamedTuple):
    """Where a tensor lies in a layer's one piece of memory, and what it is an attribute of."""

    owner: Any
    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    num_bytes: int

    def of(self, packed: torch.Tensor) -> torch.Tensor:
        return packed[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class _Packed:
    """The frozen tensors of a layer's four linears, packed weights' scales and code books too, in one piece.

    `host` is that piece; the modules' own attributes are parts of it, or of the device's while it is there.
    """

    def __init__(self, layer: Any) -> None:
        linears = (
            layer.self_attn.qkv_proj,
            layer.self_attn.o_proj,
            layer.mlp.gate_up_proj,
            layer.mlp.down_proj,
        )
        self._modules = [getattr(linear, "base_layer", linear) for linear in linears]
        self._places, size = [], 0
        found = [one for module in self._modules for one in _tensors(module)]
        for owner, name, tensor in found:
            place = _Place(owner, name, tensor.dtype, tensor.shape, size, tensor.nbytes)
            self._places.append(place)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        packed = torch.zeros(size, dtype=torch.uint8, device=found[0][2].device)
        for place, (_, _, tensor) in zip(self._places, found, strict=True):
            place.of(packed).copy_(tensor)
        self.host = _moved(packed)
        self._at_home = [place.of(self.host) for place in self._places]
        self.leave()
        for module in self._modules:
            _stays(module)

    def place(self, packed: torch.Tensor) -> None:
        """Compute with this copy of it."""
        for place in self._places:
            setattr(place.owner, place.name, place.of(packed))

    def leave(self) -> None:
        """Let go of the device's."""
        for place, tensor in zip(self._places, self._at_home, strict=True):
            setattr(place.owner, place.name, tensor)

    def give_back(self, device: torch.device) -> None:
        self.place(self.host.to(device))
        for module in self._modules:
            del module._apply


def _tensors(module: Any) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """(owner, attribute, tensor) of a frozen linear: its weight, and what bitsandbytes needs to read it."""
    weight = module.weight
    assert not weight.requires_grad and getattr(module, "bias", None) is None, (
        "not a frozen linear of Phi-3's"
    )
    yield weight, "data", weight.data
    state = getattr(weight, "quant_state", None)
    for one in (state, getattr(state, "state2", None)):
        if one is not None:
            yield from ((one, name, value) for name, value in vars(one).items() if torch.is_tensor(value))


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the computer's memory, pinned where it is of a card, and whole."""
    found, _ = offload.copied(tensor, HOST)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return found


def _stays(module: nn.Module) -> None:
    """Have a module's tensors where they are, whatever the model around it is moved to."""
    module._apply = lambda fn, recurse=True: module  # type: ignore[method-assign]
