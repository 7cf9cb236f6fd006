"""Which cards a recipe fits, how far it can grow on one, and what to change where it does not fit.

Every answer comes from `memory.predict`: nothing here adds bytes of its own. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from . import memory
from .errors import MAX_SHOWN, InputError, shown
from .phi3 import ADAPTABLE, Geometry
from .recipe import Recipe
from .sizes import target_linears
from .units import format_bytes, parse_bytes

CARDS_GIB: Final = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
"""Memory of consumer and common data-centre cards, smallest first."""

MOST_ROOM: Final = 1024**4
"""Bytes that no card has."""

SHOWN_GIB: Final = (4, 6, 8, 10, 12, 16, 24)
"""Cards of the plan's table."""

SHORTEST: Final = 128
"""Tokens below which halving `data.max_length` is no advice."""


@dataclass(frozen=True)
class Card:
    """A recipe on one card, and what `auto` becomes there.

    `max_length` and `micro_batch` are the largest that fit, each by itself. `needed_bytes` is what a run
    takes there, in its `way`; where it does not fit, the least it can do with.

    Units: `headroom_bytes` is below zero where it does not fit; `max_length` in tokens, None where none fits.
    """

    gib: float
    fits: bool
    headroom_bytes: int
    max_length: int | None
    micro_batch: int | None
    way: memory.Way
    needed_bytes: int

    @property
    def num_bytes(self) -> int:
        return int(self.gib * 1024**3)

    def to_json(self) -> dict[str, Any]:
        return {
            "gib": self.gib,
            "fits": self.fits,
            "headroom_bytes": self.headroom_bytes,
            "largest_max_length": self.max_length,
            "largest_micro_batch": self.micro_batch,
            "chosen": self.way.keys,
            "needed_bytes": self.needed_bytes,
        }


@dataclass(frozen=True)
class Change:
    """One override, `key=value`, and what the whole then needs. Units: bytes of the card."""

    override: str
    needed_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"override": self.override, "needed_bytes": self.needed_bytes}


def planned(recipe: Recipe, geometry: Geometry) -> memory.Plan:
    """The plan of a recipe on a card; `auto` as the least it can become: one row, offloaded, in slices, with
    frozen weights on the host."""
    explicit = recipe.train.micro_batch
    found = least(recipe, geometry)
    return memory.predict(found, geometry, micro_batch=explicit if isinstance(explicit, int) else 1)


def least(recipe: Recipe, geometry: Geometry) -> Recipe:
    """The recipe with `auto` as what takes the least memory of a card."""
    if recipe.train.activations == "auto":
        recipe = recipe.settled(activations="offload")
    if recipe.train.slice_columns == "auto" and memory.can_slice(recipe, geometry, "cuda"):
        recipe = recipe.settled(slice_columns=memory.SLICE_COLUMNS)
    return recipe.settled(host=memory.host_choices(recipe, geometry, "cuda")[-1])


def smallest_card(recipe: Recipe, geometry: Geometry) -> int | None:
    """GiB of the smallest card in CARDS_GIB that the run fits, `auto` as the least it can become."""
    needed = planned(recipe, geometry).needed_bytes
    return next((card for card in CARDS_GIB if needed <= card * 1024**3), None)


def card(recipe: Recipe, geometry: Geometry, gib: float) -> Card:
    """How a recipe does on a card of so many GiB."""
    room = int(gib * 1024**3)
    headroom = room - planned(recipe, geometry).needed_bytes
    longest = largest_length(recipe, geometry, room)
    largest = largest_micro_batch(recipe, geometry, room)
    # as a run chooses where nothing else is on the card
    way = _ways(recipe, geometry).fastest(memory.usable_bytes(room - memory.CONTEXT_BYTES))
    needed = room - headroom
    if headroom >= 0:
        there = memory.predict(recipe.settled(**way.keys), geometry, micro_batch=way.micro_batch)
        needed = there.needed_bytes
    return Card(gib, headroom >= 0, headroom, longest, largest, way, needed)


@lru_cache(maxsize=1)
def _ways(recipe: Recipe, geometry: Geometry) -> memory.Ways:
    """The same for every card."""
    return memory.Ways(recipe, geometry)


def largest_length(recipe: Recipe, geometry: Geometry, room: int) -> int | None:
    """Longest `data.max_length` that fits into `room` bytes, in steps of 64 tokens up to the model's."""

    def fits(steps: int) -> bool:
        return planned(_with(recipe, "data", max_length=steps * 64), geometry).needed_bytes <= room

    steps = _largest(fits, geometry.max_positions // 64)
    return steps * 64 if steps else None


def largest_micro_batch(recipe: Recipe, geometry: Geometry, room: int) -> int | None:
    """Largest divisor of `train.effective_batch` that fits into `room` bytes."""
    whole = recipe.train.effective_batch
    sizes = [n for n in range(1, whole + 1) if whole % n == 0]

    def fits(count: int) -> bool:
        return _needed(_with(recipe, "train", micro_batch=sizes[count - 1]), geometry) <= room

    count = _largest(fits, len(sizes))
    return sizes[count - 1] if count else None


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Largest of 1..most that fits, 0 where none does; what is larger takes more."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def advise(recipe: Recipe, geometry: Geometry, room: int) -> tuple[Change, ...] | None:
    """The fewest of the changes, in the order of `_ladder`, with which the recipe needs at most `room` bytes.

    () where it fits as it is, None where nothing helps. A change that saves nothing is left out; what a later
    one makes needless is taken back.
    """
    if _needed(recipe, geometry) <= room:
        return ()
    chosen: list[_Override] = []
    current = recipe
    for change in _ladder(recipe, geometry):
        found = change.on(current)
        if _needed(found, geometry) >= _needed(current, geometry):
            continue
        current, chosen = found, [*(c for c in chosen if c.key != change.key), change]
        if _needed(current, geometry) <= room:
            return _told(recipe, geometry, _fewest(recipe, geometry, room, chosen))
    return None


@dataclass(frozen=True)
class _Override:
    part: str
    name: str
    value: Any

    @property
    def key(self) -> str:
        return f"{self.part}.{self.name}"

    def on(self, recipe: Recipe) -> Recipe:
        return _with(recipe, self.part, **{self.name: self.value})

    def __str__(self) -> str:
        value = f"[{','.join(self.value)}]" if isinstance(self.value, tuple) else self.value
        return f"{self.key}={value}"


def _ladder(recipe: Recipe, geometry: Geometry) -> Iterator[_Override]:
    """What can be changed, what costs the run least first: time, then precision, rows, the adapter."""
    if recipe.train.micro_batch != "auto":
        yield _Override("train", "micro_batch", 1)
    if recipe.train.activations == "keep":
        yield _Override("train", "activations", "recompute")
    if recipe.train.kept_layers != "auto":
        yield _Override("train", "kept_layers", 0)
    if recipe.train.keep_attention is True:
        yield _Override("train", "keep_attention", False)
    if recipe.train.activations in ("keep", "recompute"):
        yield _Override("train", "activations", "offload")
    for host in memory.host_choices(_with(recipe, "memory", host="auto"), geometry, "cuda")[1:]:
        if recipe.memory.host != "auto" and not set(host) <= set(recipe.memory.host):
            yield _Override("memory", "host", host)
    if recipe.train.optimizer != "paged_adamw_8bit":
        yield _Override("train", "optimizer", "paged_adamw_8bit")
    if recipe.model.quantization == "none":
        yield _Override("model", "quantization", "nf4")
    if recipe.model.quantization == "nf4" and not recipe.model.double_quant:
        yield _Override("model", "double_quant", True)
    yield from _halved("data", "max_length", recipe.data.max_length, SHORTEST)
    yield from _halved("adapter", "rank", recipe.adapter.rank, 4)
    targets = (*target_linears(recipe), *recipe.adapter.embeddings)
    by_size = sorted(targets, key=lambda name: geometry.lora_parameters((name,), 1), reverse=True)
    for dropped in range(1, len(by_size)):
        yield _Override("adapter", "targets", tuple(n for n in ADAPTABLE if n in by_size[dropped:]))


def _halved(part: str, name: str, value: int, least: int) -> Iterator[_Override]:
    while value // 2 >= least:
        value //= 2
        yield _Override(part, name, value)


def _fewest(
    recipe: Recipe, geometry: Geometry, room: int, chosen: Sequence[_Override]
) -> Sequence[_Override]:
    """Without the changes that the others make needless, the costliest tried first."""
    kept = list(chosen)
    for change in reversed(chosen):
        others = [c for c in kept if c is not change]
        if others and _needed(_apply(recipe, others), geometry) <= room:
            kept = others
    return kept


def _told(recipe: Recipe, geometry: Geometry, changes: Sequence[_Override]) -> tuple[Change, ...]:
    steps = [_apply(recipe, changes[: n + 1]) for n in range(len(changes))]
    return tuple(
        Change(str(change), _needed(found, geometry)) for change, found in zip(changes, steps, strict=True)
    )


def _apply(recipe: Recipe, changes: Sequence[_Override]) -> Recipe:
    for change in changes:
        recipe = change.on(recipe)
    return recipe


def _needed(recipe: Recipe, geometry: Geometry) -> int:
    return planned(recipe, geometry).needed_bytes


def _with(recipe: Recipe, part: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={part: getattr(recipe, part).model_copy(update=values)})


def room(vram: str) -> int:
    """Bytes of a card, as somebody wrote them.

    Raises:
        InputError: of several cards, no size, or more than any card has.
    """
    several = re.fullmatch(r"\s*\d+\s*[x*\u00d7]\s*(.+)", vram)
    if several is not None:
        raise InputError(
            "--vram", f"{shown(vram)}: a run takes one GPU only.", f"Write {several[1][:MAX_SHOWN]}."
        )
    try:
        num_bytes = parse_bytes(vram)
    except ValueError as error:
        raise InputError("--vram", f"{shown(vram)} {error}.") from None
    if num_bytes > MOST_ROOM:
        reason = f"{shown(vram)} is {format_bytes(num_bytes)}, more than any card has."
        raise InputError("--vram", reason, "Write the memory on the card's box, 12GB for example.")
    return num_bytes
