"""What is in memory together at the fullest moment of each phase of a run, part by part.

Weights, adapters, gradients and optimizer states are exact; activations are a replay of the operations, the
reference engine's (TRL's trainer, PEFT, transformers' Phi-3, bitsandbytes, our attention and loss) or the
native one's. Each part says how sure it is. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from .activations import (
    Held,
    Peak,
    answering_peak,
    autocast_bytes,
    backward_peak,
    embedding_bytes,
    forward_peak,
    held,
    held_bytes,
    input_bytes,
    loss_peak,
    row_bytes,
    saved_bytes,
    scoring_peak,
)
from .case import Case
from .phi3 import LINEARS, Geometry
from .recipe import Recipe
from .sizes import (
    ADAPTER_BYTES,
    adapter_elements,
    compute_dtype_bytes,
    linear_bytes,
    merging_bytes,
    optimizer_bytes,
    quantizing_bytes,
    saved_adapter_bytes,
)
from .units import format_bytes

Kind = Literal["exact", "replayed", "estimate"]

ANSWER_CACHE: Final = 3 * 1024**3 // 2
"""Bytes of KV cache that answers generated at once may take: 4096 tokens on Phi-3-mini."""

ANSWER_TOKENS: Final = 16384
"""Tokens of prompts and answers generated at once, pads too, however small their cache is."""

SHOWN_PROMPT: Final = 256
"""Tokens of a prompt that is answered to be looked at, however little a training pass has."""


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
    """What is in memory together at its fullest moment.

    "load", "attach" (the adapters), "first step" (no optimizer states yet), "train" (every later step),
    "evaluate", "save"; and "merge", in the computer's memory.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        parts = [part.to_json() for part in self.parts]
        return {"name": self.name, "peak_bytes": self.peak_bytes, "parts": parts}


def answer_tokens(recipe: Recipe, geometry: Geometry, pass_tokens: int) -> int:
    """Tokens of prompts and answers that are generated at once, pads too.

    Where answers are only to be looked at they should not decide whether a run fits: a quarter of what a
    training pass has takes less than the pass on all of Phi-3's sizes, with offloaded inputs too.
    """
    most = min(ANSWER_TOKENS, ANSWER_CACHE // _kv_bytes(recipe, geometry))
    settings = recipe.evaluate
    if settings.compares_answers:
        return most
    return min(most, max(pass_tokens // 4, SHOWN_PROMPT + settings.max_new_tokens))


def _kv_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of one token's keys and values in all layers."""
    width = geometry.num_kv_heads * geometry.head_dim
    return geometry.num_layers * 2 * width * compute_dtype_bytes(recipe)


# Parts


def _loaded_parts(case: Case) -> list[Part]:
    """All weights, before any of them leaves the device."""
    g, bits = case.geometry, 8 * case.compute
    num, matrix = g.num_linear_parameters, g.vocab_size * g.hidden_size
    linears = linear_bytes(case.recipe, g)
    parts = [Part("linears", linears, f"{_count(num)} weights x {8 * linears / num:.4g} bit")]
    for name in ("embedding",) if g.tied_embeddings else ("embedding", "head"):
        parts.append(Part(name, matrix * case.compute, f"{_count(matrix)} weights x {bits} bit"))
    num = g.num_norm_parameters
    return [*parts, Part("norms", num * case.compute, f"{_count(num)} weights x {bits} bit")]


def _weight_parts(case: Case, visiting: int = 0) -> list[Part]:
    """Those on the device; a CPU's host is the same memory.

    `visiting`: how many layers' linears are there of those that come from the host.
    """
    parts = [part for part in _loaded_parts(case) if not _on_host(case, part.name)]
    if visiting and case.hosts("layers"):
        words = f"{visiting} layers x {format_bytes(_visitor_bytes(case))}, of {case.geometry.num_layers}"
        parts.insert(0, Part("linears", visiting * _visitor_bytes(case), words))
    return parts if case.host_apart else [*parts, *hosted_parts(case)]


def _on_host(case: Case, part: str) -> bool:
    return case.hosts("layers") if part == "linears" else part == "embedding" and case.hosts("embedding")


def _visitor_bytes(case: Case) -> int:
    """Of one layer's linears, where they come from the host."""
    return linear_bytes(case.recipe, case.geometry) // case.geometry.num_layers if case.hosts("layers") else 0


def hosted_parts(case: Case, allocated: Callable[[int], int] = lambda size: size) -> list[Part]:
    """Weights in the computer's memory, in pieces that take as much as is `allocated` for their size."""
    found = []
    for part in _loaded_parts(case):
        if _on_host(case, part.name):
            pieces = case.geometry.num_layers if part.name == "linears" else 1
            taken = pieces * allocated(part.num_bytes // pieces)
            found.append(replace(part, name=f"offloaded {part.name}", num_bytes=taken))
    return found


def adapter_part(case: Case, name: str) -> Part:
    """The adapters, or what has their shapes and dtype."""
    num = adapter_elements(case.recipe, case.geometry)
    return Part(name, num * ADAPTER_BYTES, f"{_count(num)} parameters x {8 * ADAPTER_BYTES} bit")


def _elements(case: Case, *parts: str) -> int:
    return case.geometry.lora_parameters(parts, case.rank)


def _gradients(case: Case, layer: int, stages: Stages) -> int:
    """Bytes of gradients as this layer's backward begins, counted from 0.

    A step in one pass has none before it: its layers' come one by one, the embedding's when all else is gone,
    the head's with the loss, which counts them itself. With several passes they are all there from the second
    on.
    """
    if not case.one_pass:
        return stages.adapters.num_bytes
    num_layers = case.geometry.num_layers
    through = num_layers - 1 - min(layer, num_layers - 1)
    head = stages.head_gradients if layer < num_layers else 0
    return stages.layers_gradients * through // num_layers + head


def _optimizer_part(case: Case) -> Part:
    name = case.recipe.train.optimizer
    where = "; on the device unless evicted" if name.startswith("paged") else ""
    return Part("optimizer states", optimizer_bytes(case.recipe, case.geometry), f"two of {name}{where}")


def _count(number: int) -> str:
    """A count of parameters for people: "3.62 B"."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


# Phases


def load_phase(case: Case) -> Phase:
    """All weights, and what quantizing the largest takes: transformers 5.23 then loads one by one.

    A base that was kept quantized is read without it.
    """
    scratch = max(quantizing_bytes(case.recipe, case.geometry, name, case.device) for name in LINEARS)
    words = "largest linear before, and its scales" + "; 13.5 bytes a weight" * (case.device == "cpu")
    quantizing = [Part("quantizing", scratch, words)] if scratch else []
    return Phase("load", (*_loaded_parts(case), *quantizing))


def attach_phase(case: Case) -> Phase:
    return Phase("attach", (*_loaded_parts(case), adapter_part(case, "adapters")))


def first_step_phase(train: Phase) -> Phase:
    """What every step takes but for the optimizer's states, which are made after the first one's passes."""
    parts = [part for part in train.parts if part.name != "optimizer states"]
    return Phase("first step", tuple(parts))


def train_phase(case: Case, stages: Stages | None = None) -> Phase:
    """Everything; `activations: auto` is the least that it can become, recompute."""
    stages = stages or Stages(case)
    return pass_phase(case, stages.optimizer, stages=stages)


class Stages:
    """A pass replayed stage by stage, each once, however many of its layers keep: all, some or none.

    `case` stands for all that differ in nothing but how many of some.
    """

    def __init__(self, case: Case) -> None:
        self._case, self._peaks = case, dict[tuple[str, bool | int], Peak]()
        self.saved = saved_bytes(case) if case.kept_layers else 0
        self.autocast = autocast_bytes(case)
        self.rows, self.embedding = row_bytes(case), embedding_bytes(case)
        self.adapters, self.optimizer = adapter_part(case, "adapters"), _optimizer_part(case)
        embeddings = case.recipe.adapter.embeddings
        self.layers_gradients = self.adapters.num_bytes - ADAPTER_BYTES * _elements(case, *embeddings)
        self.head_gradients = ADAPTER_BYTES * _elements(case, "lm_head") if case.trains_head else 0

    def forward(self, *, saving: bool) -> Peak:
        return self._once("forward", saving, lambda: forward_peak(self._case, saving=saving))

    def loss(self, cached: int) -> Peak:
        return self._once("loss", cached, lambda: loss_peak(self._case, cached))

    def backward(self, *, recomputes: bool) -> Peak:
        return self._once("backward", recomputes, lambda: backward_peak(self._case, recomputes=recomputes))

    def _once(self, name: str, how: bool | int, replayed: Callable[[], Peak]) -> Peak:
        found = self._peaks.get((name, how))
        if found is None:
            found = self._peaks[name, how] = replayed()
        return found


@dataclass(frozen=True)
class _Moment:
    """One that may be a pass's fullest.

    Units: bytes; `visiting` in layers whose linears are there from the host.
    """

    peak: Peak
    held: Held
    held_bytes: int
    gradients: int
    visiting: int
    visitor_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.peak.num_bytes + self.held_bytes + self.gradients + self.visiting * self.visitor_bytes


def pass_phase(case: Case, *beside: Part, stages: Stages | None = None) -> Phase:
    """A forward and backward pass with what is `beside` it."""
    stages = stages or Stages(case)
    fullest = max(_moments(case, stages), key=lambda moment: moment.num_bytes)
    whole = stages.adapters
    there = "" if whole.num_bytes == fullest.gradients else ", of the layers that are through"
    states = (
        stages.adapters,
        Part("gradients", fullest.gradients, whole.formula + there),
        *beside,
    )
    words = f"{case.tokens} tokens: ids, labels, positions, RoPE"
    working = fullest.peak.num_bytes + stages.embedding
    activations = (
        Part("rows", stages.rows, words, "replayed"),
        *_held_parts(case, fullest.held),
        Part("working set", working, f"fullest in: {fullest.peak.stage}", "replayed"),
    )
    return Phase("train", (*_weight_parts(case, fullest.visiting), *states, *activations))


def _held_parts(case: Case, found: Held) -> Iterator[Part]:
    """What the layers hold for their backward."""
    layers = case.geometry.num_layers
    if found.kept:
        words = f"{found.kept} layers x {format_bytes(found.kept_bytes // found.kept)}"
        yield Part("kept activations", found.kept_bytes, words, "replayed")
    if found.inputs:
        words = f"{found.inputs} layers x {format_bytes(input_bytes(case))}"
        words += f", of {layers}" if case.offloads or found.kept else ""
        yield Part("layer inputs", found.inputs * input_bytes(case), words, "replayed")
    if found.parked and not case.host_apart:
        yield parked_part(case, found, case.state, "replayed")


def parked_part(case: Case, found: Held, each: int, kind: Kind) -> Part:
    """Layer inputs in host memory, of so many bytes each."""
    words = f"{found.parked} layers x {format_bytes(each)}"
    return Part("offloaded inputs", found.parked * each, words, kind)


def _moments(case: Case, stages: Stages) -> Iterator[_Moment]:
    """Where a pass can be fullest: the last layer's forward, the loss, and backwards of layers.

    Between layers that do the same, what is held and the gradients change evenly: the first and last of them
    decide, and offloaded, where less is on its way to the device, those before the last. Where linears come
    from the host, the last layer's forward has its own alone there, the one before two.
    """
    last, kept = case.geometry.num_layers - 1, case.kept_layers
    others = case.geometry.num_layers - kept
    saved = stages.saved
    whole = held(case, last, saved, back=False)
    cached, visitor = stages.autocast * others // case.geometry.num_layers, _visitor_bytes(case)

    def moment(peak: Peak, layer: int, there: Held, visiting: int) -> _Moment:
        gradients = _gradients(case, layer, stages)
        return _Moment(peak, there, held_bytes(case, there), gradients, visiting, visitor)

    for layer in {last, max(0, last - 1)} if case.hosts("layers") else {last}:
        keep = layer >= others
        forward = stages.forward(saving=keep and case.through_layers)
        # the layer has not saved yet what it will; its input is there
        own = case.state - saved if keep or not case.through_layers else 0
        # and so is the embedding's output: of its own where it is not what the first layer holds
        beside = not case.through_layers or (keep and not others and not case.native)
        own += case.state if beside else 0
        # offloaded, the embedding's output is there until all layers are through
        own += case.state if case.offloads and case.trains_inputs else 0
        peak = Peak(forward.num_bytes + own + cached, forward.stage)
        yield moment(peak, last + 1, held(case, layer, saved, back=False), min(2, last - layer + 1))
    yield moment(stages.loss(cached), last + 1, whole, 0)
    if not case.through_layers:
        return
    if kept:
        backward = stages.backward(recomputes=False)
        for layer in {last, others}:
            yield moment(backward, layer, held(case, layer, saved, back=False), min(2, layer + 1))
    if others:
        backward = stages.backward(recomputes=True)
        for layer in {others - 1, *range(min(3, others))}:
            yield moment(backward, layer, held(case, layer, saved), min(2, layer + 1))


def evaluate_phase(case: Case, micro_batch: int) -> Phase:
    """Weights, adapters, the optimizer of a trainer still alive; then the loss, or answers with their cache.

    The loss takes the micro batch at once; answers as many prompts as answer_tokens holds. Every row is
    taken to be as long as the longest; `case` is the training's.
    """
    scored = Case(
        case.recipe, case.geometry, micro_batch * case.length, case.length, case.device, training=False
    )
    words = f"loss of {micro_batch} x {case.length} tokens"
    peak = scoring_peak(scored)
    ways = [[Part("working set", row_bytes(scored) + peak.num_bytes, words, "replayed")]]
    ways.append(_answering_parts(case))
    fullest = max(ways, key=lambda parts: sum(part.num_bytes for part in parts))
    states = (adapter_part(case, "adapters"), _optimizer_part(case))
    visiting = min(2, case.geometry.num_layers)
    return Phase("evaluate", (*_weight_parts(case, visiting), *states, *fullest))


def _answering_parts(case: Case) -> list[Part]:
    settings, per_token = case.recipe.evaluate, _kv_bytes(case.recipe, case.geometry)
    most = answer_tokens(case.recipe, case.geometry, case.tokens)
    prompt, width = case.length, case.length + settings.max_new_tokens
    if not settings.compares_answers and width > most:  # longer ones are not looked at
        prompt, width = max(1, most - settings.max_new_tokens), most
    rows = max(1, min(most // width, settings.num_answered))
    batch = Case(case.recipe, case.geometry, rows * prompt, prompt, case.device, training=False, padded=True)
    words = f"{rows} x {prompt} tokens"
    cache = Part(
        "KV cache", rows * width * per_token, f"{words}, each + {settings.max_new_tokens}", "estimate"
    )
    peak = answering_peak(batch).num_bytes
    return [Part("working set", peak, f"one layer of {words}", "estimate"), cache]


def save_phase(case: Case) -> Phase:
    """What training left, and on a CPU the adapter's bytes being written, then read back."""
    parts = [*_weight_parts(case), adapter_part(case, "adapters"), _optimizer_part(case)]
    written = [adapter_part(case, "written")] if case.device == "cpu" else []
    return Phase("save", (*parts, *written))


def merge_phase(case: Case) -> Phase:
    """An export as merged safetensors, of the computer's memory: one matrix after the other, no model.

    The checkpoint is taken to be in bf16, as Microsoft's are.
    """
    recipe, g = case.recipe, case.geometry
    sizes = {name: merging_bytes(recipe, g, name, case.device) for name in (*LINEARS, "embed_tokens")}
    name = max(sizes, key=lambda name: sizes[name])
    saved = saved_adapter_bytes(recipe, g)
    adapter = Part("adapter file", saved, "float32; pairs of a fused linear as one")
    words = f"{name}: read, as trained, merged"
    return Phase("merge", (adapter, Part("one matrix", sizes[name], words, "replayed")))
