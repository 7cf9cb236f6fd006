"""Bytes of live tensors, counted by watching every operation that makes one.

Owns a measure that means the same on every device and needs none: no allocator, no resident set, no other
program in it. Slow, so for tests and for a single step. What a kernel allocates within itself is not seen,
but for the operations of OPENED, which are run in the parts that their source names.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _gemm_4bit(*arguments: Any, **named: Any) -> torch.Tensor:
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    found: torch.Tensor = _gemm_4bit_default_impl(*arguments, **named)
    return found


OPENED: Final[dict[str, Callable[..., torch.Tensor]]] = {
    "bitsandbytes::gemm_4bit": _gemm_4bit,
}
"""Operations whose temporaries are large -> what does the same, one visible operation after the other."""


class TrackedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is not typed
    """While active, counts the bytes behind tensors that are alive, by what they are, and their peak.

    Whatever an operation makes is "activations" until `claim` says otherwise.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int]] = {}

    @property
    def peak_bytes(self) -> int:
        return sum(self.at_peak.values())

    def claim(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count the bytes behind these tensors as `name`, whatever they counted as before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._count(storage, "activations")
            old, size = self._known[storage._cdata]
            self.now[old] -= size
            self.now[name] += size
            self._known[storage._cdata] = (name, size)

    def start(self) -> None:
        """Forget the peak so far."""
        self.at_peak = Counter(self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        opened = OPENED.get(func._schema.name)
        if opened is not None:
            with self:
                return opened(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), "activations")
        if sum(self.now.values()) > self.peak_bytes:
            self.at_peak = Counter(self.now)
        return out

    def _count(self, storage: Any, name: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = (name, size)
            self.now[name] += size
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        name, size = self._known.pop(key)
        self.now[name] -= size


def model_tensors(model: Any) -> Iterable[torch.Tensor]:
    """Frozen weights and buffers, with everything in bitsandbytes' quantization states."""
    for weight in (*model.parameters(), *model.buffers()):
        if not weight.requires_grad:
            yield weight
        state = getattr(weight, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            if one is not None:
                yield from (t for t in vars(one).values() if isinstance(t, torch.Tensor))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    """Both states of every parameter; counters of steps are left out."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return (t for t in states if isinstance(t, torch.Tensor) and t.dim())
