"""What is tried next where memory runs out, with nothing left of the try before.

Owns which errors mean it, the order in which a training step becomes smaller, halving what an evaluation
takes at once, and giving back random states and caches. Refuses to go on where nothing smaller is left, or
where the recipe says `memory.on_oom: fail`. Which tensors a try made is the caller's to forget.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import torch
from typing_extensions import Self

from .errors import FitError
from .recipe import Recipe
from .weights import first_line

SMALL_LOGIT_TOKENS: Final = 256
"""`train.logit_tokens` of the last rung: a quarter of the default, 33 MB of float32 for Phi-3-mini."""

_SAID: Final = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "could not create a primitive",  # oneDNN, of a product whose scratch finds no room
    "CUDA error: out of memory",  # beside the caching allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What a RuntimeError that is no torch.OutOfMemoryError says when memory ran out."""
_UNSUPPORTED: Final = "could not create a primitive descriptor"
"""oneDNN of a product that it does not have."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Adapted:
    """One rung down: where memory ran out, what is smaller since then, and what the error said."""

    place: str
    change: str
    error: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.place}: out of memory; taken again with {self.change}"


@dataclass(frozen=True)
class RanOut:
    """In place of a result: what the error said."""

    said: str


def ran_out(error: BaseException) -> bool:
    """Whether an error means that the device's memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or _UNSUPPORTED in text:
        return False
    return any(said in text for said in _SAID)


def tried(work: Callable[[], Result]) -> Result | RanOut:
    """What `work` gives; or that memory ran out.

    By then the error's traceback, which held the tensors of the try, is gone, and caches are free.
    """
    try:
        return work()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        said = first_line(error)
    _clear_autograd()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # copies of the try on other streams may still write into what is free now
        torch.cuda.empty_cache()
    return RanOut(said)


def _clear_autograd() -> None:
    """Drop what is left of a backward that failed: torch 2.13 keeps its tasks, and with them half a graph, in
    the queue of this thread until the next one runs."""
    with torch.inference_mode(False), torch.enable_grad():
        torch.autograd.backward(torch.zeros((), requires_grad=True).mul(1))


@dataclass(frozen=True)
class RandomState:
    """Where Python's, numpy's and torch's random numbers stand."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> Self:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def lower(recipe: Recipe, *, host_apart: bool = True) -> tuple[Recipe, str] | None:
    """The recipe with less in memory at once and the keys that changed; None where nothing is left to lower.

    The effective batch stays: the micro batch becomes its largest divisor that is at most half. From one row
    on, half as many layers keep their activations, and half of those; then no attention outputs are kept,
    then layers' inputs are offloaded where the host's memory is not the device's, then the loss takes fewer
    tokens' logits at once.
    """
    train = recipe.train
    assert isinstance(train.micro_batch, int), "the recipe is not settled"
    halves = [n for n in range(1, train.micro_batch // 2 + 1) if train.effective_batch % n == 0]
    kept = train.kept_layers if isinstance(train.kept_layers, int) else 0
    fewer = {"kept_layers": kept // 2} if kept else {}
    rungs: tuple[tuple[bool, dict[str, Any]], ...] = (
        (bool(halves), {"micro_batch": max(halves, default=1)}),
        (train.activations == "keep", {"activations": "recompute", **fewer}),
        (kept > 0, fewer),
        (train.keep_attention is True, {"keep_attention": False}),
        (train.activations == "recompute" and host_apart, {"activations": "offload"}),
        (train.logit_tokens > SMALL_LOGIT_TOKENS, {"logit_tokens": SMALL_LOGIT_TOKENS}),
    )
    for possible, keys in rungs:
        if possible:
            told = [f"train.{key}={keys[key]} instead of {getattr(train, key)}" for key in keys]
            return recipe.settled(**keys), ", ".join(told)
    return None


@dataclass
class Ladder:
    """A training's recipe as it stands, and how it goes down; `told` hears of every rung and its recipe.

    `host_apart`: whether what is moved to the host leaves the device's memory.
    """

    recipe: Recipe
    told: Callable[[Adapted, Recipe], None]
    host_apart: bool = True

    def take(self, place: str, work: Callable[[], Result], forget: Callable[[], None]) -> Result:
        """What `work` gives; where memory runs out, `forget` drops its tensors and it begins anew, lower.

        Every try begins with the same random numbers.

        Raises:
            FitError: memory ran out, and nothing is left to lower or `memory.on_oom` is fail.
        """
        before = RandomState.now()
        while True:
            found = tried(work)
            if not isinstance(found, RanOut):
                return found
            forget()
            before.restore()
            self._lower(place, found.said)

    def _lower(self, place: str, said: str) -> None:
        if self.recipe.memory.on_oom == "fail":
            remedy = "Lower train.micro_batch or data.max_length, or set memory.on_oom to adapt."
            raise FitError(place, f"out of memory: {said}", remedy)
        found = lower(self.recipe, host_apart=self.host_apart)
        if found is None:
            train = self.recipe.train
            how = "offloaded" if train.activations == "offload" else "recomputed"
            reason = f"out of memory with one row, {how}, and {train.logit_tokens} tokens' logits at once"
            remedy = "Lower data.max_length; `plan --vram` says which keys help."
            raise FitError(place, f"{reason}: {said}", remedy)
        self.recipe, change = found
        self.told(Adapted(place, change, said), self.recipe)


@dataclass
class Halving:
    """How much an evaluation takes at once; half of it from where memory runs out.

    `told` hears the smaller size and what the error said; None: running out ends the evaluation.
    """

    size: int
    told: Callable[[int, str], None] | None = None

    @classmethod
    def of(cls, size: int | Halving) -> Halving:
        """A plain number is never halved."""
        return size if isinstance(size, Halving) else cls(size)

    def each(
        self,
        items: Sequence[Item],
        cut: Callable[[Sequence[Item], int], Iterable[Sequence[Item]]],
        take: Callable[[Sequence[Item]], Result],
        weigh: Callable[[Sequence[Item]], int] = len,
    ) -> Iterator[Result]:
        """What `take` makes of each group of consecutive items that `cut` makes for a size.

        Where memory runs out, the size becomes half of what the group weighs, and what is left is cut anew.

        Raises:
            FitError: memory ran out with a single item, or with a size that is not to be halved.
        """
        rest = items
        while rest:
            for group in cut(rest, self.size):
                found = tried(partial(take, group))
                if isinstance(found, RanOut):
                    self._halve(weigh(group) // 2 if len(group) > 1 else 0, found.said)
                    break
                yield found
                rest = rest[len(group) :]

    def _halve(self, size: int, said: str) -> None:
        if self.told is None or not size:
            remedy = "Lower data.max_length or evaluate.max_new_tokens."
            raise FitError("evaluation", f"out of memory{'' if size else ' with one row'}: {said}", remedy)
        self.size = size
        self.told(size, said)
