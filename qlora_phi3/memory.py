"""Predicted bytes per part and phase of a run, by arithmetic alone.

Owns what is in memory together in each phase of a run with the reference engine (TRL's trainer, PEFT,
transformers' Phi-3, bitsandbytes, our attention and loss), and the micro batch that fits. Weights, adapters,
gradients and optimizer states are exact; activations are a replay of the operations; what no tensor holds is
an estimate. Each part says which. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final, Literal

from .activations import (
    Peak,
    all_saved_bytes,
    answering_peak,
    autocast_bytes,
    backward_peak,
    embedding_bytes,
    forward_peak,
    held_bytes,
    inputs_in_flight,
    loss_peak,
    parked_inputs,
    row_bytes,
    saved_bytes,
    scoring_peak,
)
from .case import Case, Device
from .phi3 import LINEARS, Geometry
from .recipe import GENERATION_METRICS, Recipe
from .sizes import (
    ADAPTER_BYTES,
    adapter_elements,
    compute_dtype_bytes,
    linear_bytes,
    optimizer_bytes,
    quantizing_bytes,
)
from .units import format_bytes

Kind = Literal["exact", "replayed", "estimate"]

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

ANSWER_CACHE: Final = 3 * 1024**3 // 2
"""Bytes of KV cache that answers generated at once may take: 4096 tokens on Phi-3-mini."""

ANSWER_TOKENS: Final = 16384
"""Tokens of prompts and answers generated at once, pads too, however small their cache is."""

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
class Part:
    """Bytes of one thing in memory, with the arithmetic in words and how sure they are."""

    name: str
    num_bytes: int
    formula: str
    kind: Kind = "exact"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.num_bytes, "kind": self.kind, "formula": self.formula}


@dataclass(frozen=True)
class Phase:
    """What is in memory together at the fullest moment of "load", "attach" (the adapters), "first step" (no
    optimizer states yet), "train" (every later step), "evaluate" or "save"."""

    name: str
    parts: tuple[Part, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        parts = [part.to_json() for part in self.parts]
        return {"name": self.name, "peak_bytes": self.peak_bytes, "parts": parts}


@dataclass(frozen=True)
class Plan:
    """The prediction for one recipe, model and micro batch, with every row `row_tokens` long.

    `outside` is what the device holds beside tensors; `host` what is in the computer's memory when the device
    is another.
    """

    phases: tuple[Phase, ...]
    micro_batch: int
    row_tokens: int
    pass_tokens: int
    outside: tuple[Part, ...]
    host: tuple[Part, ...]

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
    phases = [_load_phase(case), _attach_phase(case), _first_step_phase(case), _train_phase(case)]
    if recipe.data.eval is not None:
        phases.append(_evaluate_phase(replace(case, length=row_tokens), micro_batch))
    phases.append(_save_phase(case))
    peak = max(phase.peak_bytes for phase in phases)
    outside, host = _outside(case, peak)
    return Plan(tuple(phases), micro_batch, row_tokens, case.tokens, outside, host)


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
        yield Way(activations, micro_batch, _train_phase(case).peak_bytes)


def usable_bytes(free_bytes: int) -> int:
    """What tensors can occupy of memory that is free once the CUDA context exists."""
    return int(free_bytes * (1 - ALLOCATOR_SLACK))


def answer_tokens(recipe: Recipe, geometry: Geometry) -> int:
    """Tokens of prompts and answers that are generated at once, pads too."""
    return min(ANSWER_TOKENS, ANSWER_CACHE // _kv_bytes(recipe, geometry))


def _kv_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of one token's keys and values in all layers."""
    width = geometry.num_kv_heads * geometry.head_dim
    return geometry.num_layers * 2 * width * compute_dtype_bytes(recipe)


# Parts


def _weight_parts(case: Case) -> list[Part]:
    g, bits = case.geometry, 8 * case.compute
    num, matrix = g.num_linear_parameters, g.vocab_size * g.hidden_size
    linears = linear_bytes(case.recipe, g)
    parts = [Part("linears", linears, f"{_count(num)} weights x {8 * linears / num:.4g} bit")]
    for name in ("embedding",) if g.tied_embeddings else ("embedding", "head"):
        parts.append(Part(name, matrix * case.compute, f"{_count(matrix)} weights x {bits} bit"))
    num = g.num_norm_parameters
    return [*parts, Part("norms", num * case.compute, f"{_count(num)} weights x {bits} bit")]


def _adapter_part(case: Case, name: str) -> Part:
    """The adapters, or what has their shapes and dtype."""
    num = adapter_elements(case.recipe, case.geometry)
    return Part(name, num * ADAPTER_BYTES, f"{_count(num)} parameters x {8 * ADAPTER_BYTES} bit")


def _elements(case: Case, *parts: str) -> int:
    return case.geometry.lora_parameters(parts, case.rank)


def _gradient_part(case: Case) -> Part:
    """Gradients; with a step in one pass what they weigh more, where most, than what of the layers is gone.

    The head's are then in the moments from the loss on; the embedding's come when all else is gone.
    """
    whole = _adapter_part(case, "gradients")
    if not case.one_pass:
        return whole
    layers = whole.num_bytes - ADAPTER_BYTES * _elements(case, *case.recipe.adapter.embeddings)
    last, all_held = case.geometry.num_layers - 1, held_bytes(case, case.geometry.num_layers - 1)
    # what is held falls evenly from the last layer on, offloaded to the third
    turns = [layer for layer in (0, 1, 2) if layer < last]
    beyond = [
        layers * (last - at) // case.geometry.num_layers - (all_held - held_bytes(case, at)) for at in turns
    ]
    words = f"{whole.formula}, as activations go"
    return replace(whole, num_bytes=max(0, *beyond) if beyond else 0, formula=words, kind="replayed")


def _optimizer_part(case: Case) -> Part:
    name = case.recipe.train.optimizer
    where = "; on the device unless evicted" if name.startswith("paged") else ""
    return Part("optimizer states", optimizer_bytes(case.recipe, case.geometry), f"two of {name}{where}")


def _count(number: int) -> str:
    """A count of parameters for people: "3.62 B"."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


# Phases


def _load_phase(case: Case) -> Phase:
    """All weights, and what quantizing the largest takes: transformers 5.23 then loads one by one.

    A base that was kept quantized is read without it.
    """
    scratch = max(quantizing_bytes(case.recipe, case.geometry, name, case.device) for name in LINEARS)
    words = "largest linear before, and its scales" + "; 13.5 bytes a weight" * (case.device == "cpu")
    quantizing = [Part("quantizing", scratch, words)] if scratch else []
    return Phase("load", (*_weight_parts(case), *quantizing))


def _attach_phase(case: Case) -> Phase:
    return Phase("attach", (*_weight_parts(case), _adapter_part(case, "adapters")))


def _first_step_phase(case: Case) -> Phase:
    """A step's only or last pass; optimizer states are made after it."""
    return replace(pass_phase(case), name="first step")


def _train_phase(case: Case) -> Phase:
    """Everything; `activations: auto` is the least that it can become, recompute."""
    return pass_phase(case, _optimizer_part(case))


def pass_phase(case: Case, *beside: Part) -> Phase:
    """A forward and backward pass with what is `beside` it.

    With a step in one pass, a layer's gradients come when the inputs behind it are gone; with several, they
    are all there from the second on.
    """
    keep = case.recipe.train.activations == "keep"
    fullest = max(_moments(case, keep), key=lambda peak: peak.num_bytes)
    activations = (
        Part("rows", row_bytes(case), f"{case.tokens} tokens: ids, labels, positions, RoPE", "replayed"),
        *_held_parts(case, keep),
        Part(
            "working set",
            fullest.num_bytes + embedding_bytes(case),
            f"fullest in: {fullest.stage}",
            "replayed",
        ),
    )
    states = (_adapter_part(case, "adapters"), _gradient_part(case), *beside)
    return Phase("train", (*_weight_parts(case), *states, *activations))


def _held_parts(case: Case, keep: bool) -> Iterator[Part]:
    """What the layers hold for their backward when that of the last one begins."""
    layers = case.geometry.num_layers
    if not case.through_layers:
        return
    if keep:
        words = f"{layers} layers x {format_bytes(saved_bytes(case))}"
        yield Part("kept activations", all_saved_bytes(case), words, "replayed")
        return
    there = inputs_in_flight(case, layers - 1) if case.offloads else layers
    words = f"{there} of {layers} layers" if case.offloads else f"{layers} layers"
    words = f"{words} x {format_bytes(case.state)}"
    yield Part("layer inputs", there * case.state, words, "replayed")
    if case.offloads and case.device == "cpu":
        yield _parked_part(case, case.state, "replayed")


def _parked_part(case: Case, each: int, kind: Kind) -> Part:
    """Layer inputs in host memory, of so many bytes each."""
    parked = parked_inputs(case, case.geometry.num_layers - 1)
    return Part("offloaded inputs", parked * each, f"{parked} layers x {format_bytes(each)}", kind)


def _moments(case: Case, keep: bool) -> Iterable[Peak]:
    """What is there beside what the layers hold, where it can be most."""
    cached = 0 if keep else autocast_bytes(case)
    forward = forward_peak(case, saving=keep and case.through_layers)
    # the last layer has not saved yet what it will; its input is there, and the embedding's output
    own = 2 * case.state - saved_bytes(case) if keep or not case.through_layers else 0
    own -= case.state if case.native and case.through_layers and keep else 0  # its input is in what it saves
    # offloaded, no input is on its way back yet; the embedding's output is there until all layers are through
    coming = case.state if case.offloads and parked_inputs(case, case.geometry.num_layers - 1) > 1 else 0
    own += case.state if case.offloads and case.trains_inputs else 0
    yield Peak(forward.num_bytes + own + cached - coming, forward.stage)
    loss = loss_peak(case, cached)
    yield Peak(loss.num_bytes - coming, loss.stage)
    if case.through_layers:
        backward = backward_peak(case, recomputes=not keep)
        head = ADAPTER_BYTES * _elements(case, "lm_head") if case.trains_head and case.one_pass else 0
        yield Peak(backward.num_bytes + head, backward.stage)


def _evaluate_phase(case: Case, micro_batch: int) -> Phase:
    """Weights, adapters, the optimizer of a trainer still alive; then the loss, or answers with their cache.

    The loss takes the micro batch at once; answers as many prompts as answer_tokens holds. Every row is
    taken to be as long as the longest.
    """
    scored = Case(
        case.recipe, case.geometry, micro_batch * case.length, case.length, case.device, training=False
    )
    words = f"loss of {micro_batch} x {case.length} tokens"
    peak = scoring_peak(scored)
    ways = [[Part("working set", row_bytes(scored) + peak.num_bytes, words, "replayed")]]
    if set(case.recipe.evaluate.metrics) & set(GENERATION_METRICS):
        ways.append(_answering_parts(case))
    fullest = max(ways, key=lambda parts: sum(part.num_bytes for part in parts))
    states = (_adapter_part(case, "adapters"), _optimizer_part(case))
    return Phase("evaluate", (*_weight_parts(case), *states, *fullest))


def _answering_parts(case: Case) -> list[Part]:
    settings, per_token = case.recipe.evaluate, _kv_bytes(case.recipe, case.geometry)
    width = case.length + settings.max_new_tokens
    rows = max(1, min(answer_tokens(case.recipe, case.geometry) // width, settings.samples))
    batch = Case(
        case.recipe,
        case.geometry,
        rows * case.length,
        case.length,
        case.device,
        training=False,
        padded=True,
    )
    words = f"{rows} x {case.length} tokens"
    cache = Part(
        "KV cache", rows * width * per_token, f"{words}, each + {settings.max_new_tokens}", "estimate"
    )
    peak = answering_peak(batch).num_bytes
    return [Part("working set", peak, f"one layer of {words}", "estimate"), cache]


def _save_phase(case: Case) -> Phase:
    """What training left, and on a CPU the adapter's bytes being written, then read back."""
    parts = [*_weight_parts(case), _adapter_part(case, "adapters"), _optimizer_part(case)]
    written = [_adapter_part(case, "written")] if case.device == "cpu" else []
    return Phase("save", (*parts, *written))


def _outside(case: Case, peak: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """What the device holds beside tensors, and what a host holds that is not the device."""
    imports = Part("imports", IMPORTS_BYTES, "Python and its libraries", "estimate")
    if case.device == "cpu":
        heap = Part("heap", HEAP_BYTES, "compiled kernels, gaps between tensors", "estimate")
        return (imports, heap), ()
    slack = int(peak * ALLOCATOR_SLACK / (1 - ALLOCATOR_SLACK))
    share = Part("allocator slack", slack, f"{ALLOCATOR_SLACK:.0%} of what is left", "estimate")
    context = Part("CUDA context", CONTEXT_BYTES, "kernels, workspaces, a desktop", "estimate")
    rows = Part("written", _adapter_part(case, "written").num_bytes, "the adapter, while it is saved")
    if not case.offloads:
        return (context, share), (imports, rows)
    # torch's pinned memory comes in powers of two. Source: ATen/core/CachingHostAllocator.h
    pinned = _parked_part(case, 1 << (case.state - 1).bit_length(), "estimate")
    return (context, share), (imports, pinned, rows)
