"""Predicted bytes per part and phase of a run, by arithmetic alone.

Owns the plan of a run: its phases, what is beside tensors, and the fastest way to train that fits. What
phases hold is phases.py's. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Final, Literal

from .activations import held
from .case import Case, Device
from .errors import RecipeError
from .phases import (
    Part,
    Phase,
    Stages,
    adapter_part,
    attach_phase,
    evaluate_phase,
    first_step_phase,
    hosted_parts,
    load_phase,
    merge_phase,
    parked_part,
    save_phase,
    train_phase,
)
from .phi3 import Geometry
from .recipe import HostPart, Recipe
from .sizes import linear_bytes
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

SLICE_COLUMNS: Final = 2048
"""Intermediate columns of a slice where `auto` slices."""

SLICED: Final = 0.5
"""Share of time that slices add to what is computed again. On a CPU narrow ones of a small model add more
(docs/engine.md); wide ones on a card are not measured: enough to go there for little else than to fit."""

OFFLOADED: Final = 0.5
"""The same of copies to the host. Not measured: enough to go there for little else than to fit."""

HOSTED: Final = 0.1
"""Operations a weight and token that are set for looking up the embedding on the host. Not measured: a pass
waits for its ids and for one hidden state, little beside its products."""

STREAMED: Final = 1.0
"""The same for layers that come from the host, beside what their copies take. Not measured: enough to go
there for little else than to fit, since answers take all copies for every token."""

COPYING: Final = 4400
"""Tokens whose three products with all weights take as long as copying these once, at a byte a weight.

Of a card computed: 25 GB/s of the bus, beside 26 GFLOP a token at 790 TFLOP/s; as if nothing were computed
meanwhile.
"""

DEQUANTIZING: Final[dict[Device, float]] = {"cuda": 68, "cpu": 5}
"""Tokens whose three products with all weights take as long as dequantizing these once.

Of a card computed: 6.4 ms at 4.3 TB/s for three times, beside 26 GFLOP a token at 790 TFLOP/s. Of a CPU
measured on the built-in model: 18 ms, beside 2.7 s for 838 tokens.
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
    train = train_phase(case)
    phases = [load_phase(case), attach_phase(case), first_step_phase(train), train]
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
    """A way to train: a recipe's keys, the bytes of tensors at its fullest moment, and how long it takes.

    Units: `cost` in operations a weight and token, 4 where
    nothing is computed again and the attention takes none.
    """

    activations: str
    micro_batch: int
    kept_layers: int
    keep_attention: bool
    slice_columns: int | Literal["all"]
    peak_bytes: int
    cost: float
    host: tuple[HostPart, ...] = ()

    @property
    def keys(self) -> dict[str, Any]:
        """What `Recipe.settled` writes into a run's recipe: keys of `train`, and `memory.host`."""
        return {
            "activations": self.activations,
            "micro_batch": self.micro_batch,
            "kept_layers": self.kept_layers,
            "keep_attention": self.keep_attention,
            "slice_columns": self.slice_columns,
            "host": self.host,
        }

    @property
    def words(self) -> str:
        """What happens to activations, and what is on the host.

        "recomputing activations but for 12 layers, embedding in host memory"
        """
        verb = {"keep": "keeping", "recompute": "recomputing", "offload": "offloading"}[self.activations]
        kept = self.kept_layers if self.activations != "keep" else 0
        but = [f"{kept} layers"] if kept else []
        but += ["attention outputs"] if self.keep_attention else []
        sliced = f" in slices of {self.slice_columns}" if self.slice_columns != "all" else ""
        hosted = f", {' and '.join(self.host)} in host memory" if self.host else ""
        return f"{verb} activations{sliced}" + (f" but for {' and '.join(but)}" if but else "") + hosted

    def of(self, usable: int) -> str:
        """The choice in words."""
        sizes = f"{format_bytes(self.peak_bytes)} of {format_bytes(usable)}"
        return f"{self.words}, micro batch {self.micro_batch}: {sizes}"


class Ways:
    """What `auto` can become for a recipe; explicit settings stay as they are.

    `known`: what is known of the rows that are trained on.
    """

    def __init__(
        self, recipe: Recipe, geometry: Geometry, *, known: StepRows | None = None, device: Device = "cuda"
    ) -> None:
        self._recipe, self._geometry, self._device = recipe, geometry, device
        self._known = known or StepRows((recipe.data.max_length,))
        self._native = self._case(recipe, 1).native
        self._hosts = host_choices(recipe, geometry, device)
        self._peaks: dict[Way, Way] = {}
        self._stages: dict[tuple[Way, bool, bool], Stages] = {}

    def fastest(self, usable: int) -> Way:
        """The fastest way that fits, of equals the one with the largest micro batch; where none fits, the one
        that needs least.

        Loading and answering samples do not depend on it: look at the plan's peak for those.

        Units: `usable` as `usable_bytes` gives them.
        """
        kinds = (replace(kind, host=host) for kind in self._kinds() for host in self._hosts)
        found = [self._most_kept(kind, usable) for kind in kinds]
        fitting = [way for way in found if way.peak_bytes <= usable]
        if fitting:
            return min(fitting, key=lambda way: (way.cost, -way.micro_batch))
        return min(found, key=lambda way: (way.peak_bytes, way.micro_batch))

    def _kinds(self) -> Iterator[Way]:
        """Every combination but for how many layers are kept and what is on the host."""
        train, auto = self._recipe.train, self._recipe.train.activations == "auto"
        policies = POLICIES[self._device][1:] if auto else (train.activations,)
        whole = train.effective_batch
        sizes = [n for n in range(whole, 0, -1) if whole % n == 0]
        sizes = [train.micro_batch] if isinstance(train.micro_batch, int) else sizes
        free = auto and self._native
        attention = [False, True] if free else [False]
        attention = [train.keep_attention] if isinstance(train.keep_attention, bool) else attention
        columns: list[int | Literal["all"]] = ["all"]
        if train.slice_columns != "auto":
            columns = [train.slice_columns]
        elif can_slice(self._recipe, self._geometry, self._device):
            columns = ["all", SLICE_COLUMNS]
        if policies == ("keep",):  # nothing is computed again
            attention, columns = [False], ["all"]
        for policy, size, kept, sliced in product(policies, sizes, attention, columns):
            yield Way(policy, size, 0, kept and policy == "recompute", sliced, 0, 0.0)

    def _most_kept(self, way: Way, usable: int) -> Way:
        """With as many layers kept as fit, where that is free; all of them are `keep`."""
        train, layers = self._recipe.train, self._geometry.num_layers
        if isinstance(train.kept_layers, int) or train.activations != "auto":
            kept = train.kept_layers if isinstance(train.kept_layers, int) else 0
            return self._measured(way, layers if way.activations == "keep" else min(kept, layers))
        low, high = 0, layers
        if self._measured(way, high).peak_bytes <= usable:
            return self._measured(way, high)
        while low < high - 1 and self._measured(way, low).peak_bytes <= usable:
            middle = (low + high) // 2
            fits = self._measured(way, middle).peak_bytes <= usable
            low, high = (middle, high) if fits else (low, middle)
        return self._measured(way, low)

    def _measured(self, way: Way, kept: int) -> Way:
        """With so many layers kept; its bytes and its cost."""
        if kept == self._geometry.num_layers:
            way = replace(way, activations="keep", keep_attention=False, slice_columns="all")
        way = replace(way, kept_layers=kept)
        if way not in self._peaks:
            case = self._case(self._recipe.settled(**way.keys), way.micro_batch)
            alike = replace(way, kept_layers=0, host=()), kept > 0, kept < self._geometry.num_layers
            if alike not in self._stages:
                self._stages[alike] = Stages(case)
            peak = train_phase(case, self._stages[alike]).peak_bytes
            self._peaks[way] = replace(way, peak_bytes=peak, cost=_cost(case))
        return self._peaks[way]

    def _case(self, recipe: Recipe, micro_batch: int) -> Case:
        return training_case(recipe, self._geometry, micro_batch, self._known, self._device)


def can_slice(recipe: Recipe, geometry: Geometry, device: Device) -> bool:
    """Whether `auto` may slice: on the native engine, whole blocks of NF4, more than one slice."""
    columns = geometry.intermediate_size
    return Case(recipe, geometry, 1, 1, device).native and columns > SLICE_COLUMNS and columns % 64 == 0


def host_choices(recipe: Recipe, geometry: Geometry, device: Device) -> tuple[tuple[HostPart, ...], ...]:
    """What `memory.host` can become, the fastest first; a CPU has no other memory to move to.

    Raises:
        RecipeError: it says what this base cannot do.
    """
    asked = recipe.memory.host
    if asked != "auto":
        if "embedding" in asked and geometry.tied_embeddings:
            reason = "'embedding': this base's embedding is its head too, which computes on the device."
            raise RecipeError("memory.host", reason, "Leave it out, or write auto.")
        return (asked,)
    if device == "cpu":
        return ((),)
    frozen = not geometry.tied_embeddings and "embed_tokens" not in recipe.adapter.embeddings
    native = Case(recipe, geometry, 1, 1, device).native
    embedding: tuple[HostPart, ...] = ("embedding",) if frozen else ()
    layers: tuple[HostPart, ...] = ("layers",) if native else ()
    return tuple(dict.fromkeys(((), embedding, embedding + layers)))


def _cost(case: Case) -> float:
    """Operations a weight and token that a pass's time is made of, dequantizing as many as it takes as long.

    Products forward and with the gradient are 2 each; attention's forward has two products of a token with
    those it sees, half of a document, its backward five. What is computed again comes once more: the native
    engine leaves down_proj out, and dequantizes once for both.
    """
    g, again = case.geometry, 1 - case.kept_layers / case.geometry.num_layers
    seen = min(case.length, g.sliding_window or case.length) / 2
    attention = 4 * g.num_layers * g.num_heads * g.head_dim * seen / g.num_linear_parameters
    down = prod(g.linear_shape("down_proj")) * g.num_layers / g.num_linear_parameters
    products = 2 * (1 - down) if case.native else 2
    if len(case.head_groups) > 1 and not case.keeps_attention:  # queries, keys and values once more
        products += 2 * prod(g.linear_shape("qkv_proj")) * g.num_layers / g.num_linear_parameters
    recomputed = again * (products + (0 if case.keeps_attention else attention))
    recomputed *= 1 + (SLICED if len(case.slices) > 1 else 0) + (OFFLOADED if case.offloads else 0)
    packed = case.recipe.model.quantization == "nf4"
    times = 2 if case.native else 2 + again
    dequantizing = 6 * times * DEQUANTIZING[case.device] / case.tokens if packed else 0
    hosted = HOSTED if case.hosts("embedding") else 0
    each = linear_bytes(case.recipe, g) / g.num_linear_parameters
    hosted += STREAMED + 6 * 2 * COPYING * each / case.tokens if case.hosts("layers") else 0
    return 4 + 3.5 * attention + recomputed + dequantizing + hosted


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
    weights = [replace(part, kind="estimate") for part in hosted_parts(case, _pinned)]
    if not case.offloads:
        return (context, share), (imports, *weights, rows)
    whole = held(case, case.geometry.num_layers - 1, 0)
    inputs = parked_part(case, whole, _pinned(case.state), "estimate")
    return (context, share), (imports, *weights, inputs, rows)


def _pinned(num_bytes: int) -> int:
    """torch's pinned memory comes in powers of two. Source: ATen/core/CachingHostAllocator.h"""
    return 1 << (num_bytes - 1).bit_length()
