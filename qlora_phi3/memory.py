"""Predicted bytes per part and phase of a run, by arithmetic alone.

Owns the plan of a run: its phases, what is beside tensors, and the fastest way to train that fits. What
phases hold is phases.py's. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from .activations import held
from .case import Case, Device
from .phases import (
    Part,
    Phase,
    adapter_part,
    attach_phase,
    evaluate_phase,
    first_step_phase,
    load_phase,
    merge_phase,
    parked_part,
    save_phase,
    train_phase,
)
from .phi3 import Geometry
from .recipe import Recipe
from .units import format_bytes

CONTEXT_BYTES: Final = 600 * 1024**2
"""Of a card and not ours: CUDA context with loaded kernels (300-500 MiB), cuBLAS workspaces, a desktop."""

ALLOCATOR_SLACK: Final = 0.05
"""Share of the rest lost to rounding and fragmentation; a cautious guess until measured."""

IMPORTS_BYTES: Final = 540 * 1024**2
"""Resident bytes of a process that has imported all a run needs and read its rows, before any weight.

With the CPU build of torch; CUDA's libraries take more, by how much is not measured.
"""

HEAP_BYTES: Final = 360 * 1024**2
"""Resident bytes of a CPU's process beside tensors and imports: oneDNN's compiled kernels, about 100 MiB, and
gaps that freed tensors left.

So in three runs of the quickstart, whose tensors took 0.3 to 1.3 GiB: it does not grow with them.
"""

POLICIES: Final[dict[Device, tuple[str, ...]]] = {
    "cuda": ("keep", "recompute", "offload"),
    "cpu": ("keep", "recompute"),
}
"""What `train.activations: auto` can become, the fastest first; a CPU has no other memory to move to."""

_COVERS: Final = (
    "Bytes of all tensors on the device at the fullest moment of each phase, with paged optimizer states. "
    "exact: weights, adapters, gradients, optimizer states. replayed: activations, operation by operation, "
    "for passes as full as the rows that are known allow, else of row_tokens each. estimate: answers, and "
    "what is outside of tensors (the CUDA context or the libraries, the allocator's slack). Other "
    "programs are not counted."
)


@dataclass(frozen=True)
class Plan:
    """The prediction for one recipe, model and micro batch, with every row `row_tokens` long.

    `outside` is what the device holds beside tensors; `host` what is in the computer's memory when the device
    is another. `merge` is of the computer's memory too, once the run's models are gone.
    """

    phases: tuple[Phase, ...]
    micro_batch: int
    row_tokens: int
    pass_tokens: int
    outside: tuple[Part, ...]
    host: tuple[Part, ...]
    merge: Phase

    @property
    def peak_bytes(self) -> int:
        """Of tensors, in the fullest phase."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def needed_bytes(self) -> int:
        """Of the device: tensors and what is beside them."""
        return self.peak_bytes + sum(part.num_bytes for part in self.outside)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "version": 1,
            "micro_batch": self.micro_batch,
            "row_tokens": self.row_tokens,
            "pass_tokens": self.pass_tokens,
            "peak_bytes": self.peak_bytes,
            "needed_bytes": self.needed_bytes,
            "phases": [phase.to_json() for phase in self.phases],
            "outside": [part.to_json() for part in self.outside],
            "host": [part.to_json() for part in self.host],
            "merge": self.merge.to_json(),
            "covers": _COVERS,
        }


@dataclass(frozen=True)
class StepRows:
    """The most that an optimizer step can have, row by row; where it has more rows, they are as the last.

    Units: `longest` in tokens, the longest row first; `supervised` in tokens that are trained on, the row
    with most of them first; empty: all but the first of each row.
    """

    longest: tuple[int, ...]
    supervised: tuple[int, ...] = ()


def predict(
    recipe: Recipe,
    geometry: Geometry,
    *,
    micro_batch: int,
    row_tokens: int | None = None,
    known: StepRows | None = None,
    device: Device = "cuda",
) -> Plan:
    """Predict a run's memory.

    Units: tokens. `row_tokens` is the longest row of all, `data.max_length` while it is not known; `known`
    what is known of the rows that are trained on.
    """
    row_tokens = row_tokens or recipe.data.max_length
    case = training_case(recipe, geometry, micro_batch, known or StepRows((row_tokens,)), device)
    phases = [load_phase(case), attach_phase(case), first_step_phase(case), train_phase(case)]
    if recipe.data.eval is not None:
        phases.append(evaluate_phase(replace(case, length=row_tokens), micro_batch))
    phases.append(save_phase(case))
    peak = max(phase.peak_bytes for phase in phases)
    outside, host = _outside(case, peak)
    return Plan(tuple(phases), micro_batch, row_tokens, case.tokens, outside, host, merge_phase(case))


def training_case(
    recipe: Recipe, geometry: Geometry, micro_batch: int, known: StepRows, device: Device
) -> Case:
    """The largest pass that `engine.documents.passes` can make of a step with these rows."""
    batch, rows = recipe.train.effective_batch, known.longest
    rows = (*rows, *[rows[-1]] * (batch - len(rows)))[:batch]
    at_once = batch if recipe.data.packing else micro_batch
    tokens = sum(rows[:at_once])
    if recipe.data.packing:
        tokens = max(rows[0], min(micro_batch * recipe.data.max_length, tokens))
    counted = min(tokens, sum(known.supervised[:at_once])) if known.supervised else None
    return Case(recipe, geometry, tokens, rows[0], device, counted=counted)


@dataclass(frozen=True)
class Way:
    """A way to train. Units: bytes of tensors at the fullest moment."""

    activations: str
    micro_batch: int
    peak_bytes: int

    def of(self, usable: int) -> str:
        """The choice in words."""
        verb = {"keep": "keeping", "recompute": "recomputing", "offload": "offloading"}[self.activations]
        sizes = f"{format_bytes(self.peak_bytes)} of {format_bytes(usable)}"
        return f"{verb} activations, micro batch {self.micro_batch}: {sizes}"


def choose(ways: Iterable[Way], usable: int) -> Way:
    """The first way that fits, the last where none does.

    Loading and answering samples do not depend on it: look at the plan's peak for those.

    Units: `usable` as `usable_bytes` gives them.
    """
    for way in ways:
        if way.peak_bytes <= usable:
            break
    return way


def ways(
    recipe: Recipe, geometry: Geometry, *, known: StepRows | None = None, device: Device = "cuda"
) -> Iterator[Way]:
    """What `auto` can become, the fastest first; explicit settings as they are.

    Kept activations before recomputed ones, which take a third more time, and these before offloaded ones,
    which take copies besides; then by the micro batch, a divisor of `effective_batch`.
    """
    train, known = recipe.train, known or StepRows((recipe.data.max_length,))
    policies = POLICIES[device] if train.activations == "auto" else (train.activations,)
    whole = train.effective_batch
    sizes = [n for n in range(whole, 0, -1) if whole % n == 0]
    if isinstance(train.micro_batch, int):
        sizes = [train.micro_batch]
    for activations, micro_batch in product(policies, sizes):
        case = training_case(recipe.settled(activations=activations), geometry, micro_batch, known, device)
        yield Way(activations, micro_batch, train_phase(case).peak_bytes)


def usable_bytes(free_bytes: int) -> int:
    """What tensors can occupy of memory that is free once the CUDA context exists."""
    return int(free_bytes * (1 - ALLOCATOR_SLACK))


def _outside(case: Case, peak: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """What the device holds beside tensors, and what a host holds that is not the device."""
    imports = Part("imports", IMPORTS_BYTES, "Python and its libraries", "estimate")
    if case.device == "cpu":
        heap = Part("heap", HEAP_BYTES, "compiled kernels, gaps between tensors", "estimate")
        return (imports, heap), ()
    slack = int(peak * ALLOCATOR_SLACK / (1 - ALLOCATOR_SLACK))
    share = Part("allocator slack", slack, f"{ALLOCATOR_SLACK:.0%} of what is left", "estimate")
    context = Part("CUDA context", CONTEXT_BYTES, "kernels, workspaces, a desktop", "estimate")
    rows = Part("written", adapter_part(case, "written").num_bytes, "the adapter, while it is saved")
    if not case.offloads:
        return (context, share), (imports, rows)
    # torch's pinned memory comes in powers of two. Source: ATen/core/CachingHostAllocator.h
    each, whole = 1 << (case.state - 1).bit_length(), held(case, case.geometry.num_layers - 1)
    pinned = parked_part(case, whole, each, "estimate")
    return (context, share), (imports, pinned, rows)
