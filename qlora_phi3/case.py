"""One pass of tokens through the model, and the sizes that its memory is made of. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Final, Literal

from .phi3 import Geometry
from .recipe import HostPart, Recipe, Train
from .sizes import compute_dtype_bytes, target_linears

Device = Literal["cuda", "cpu"]

LOGIT_TOKENS: Final[int] = Train.model_fields["logit_tokens"].default
"""Supervised tokens whose logits exist at once: 131 MB of float32 for Phi-3-mini."""

EAGER_TOKENS: Final = 512
"""Longest document for which plain matrix products beat torch's CPU attention, which in bfloat16 is slow."""

SCORES: Final = 2**22
"""Scores, one per query, key and head, that a native layer's attention has at once; at least one query's."""

NORM_ELEMENTS: Final = 2**22
"""Elements of a norm's input that are in float32 at once on the native engine: 16 MiB."""

QUERY_BLOCK: Final = 1024
"""Queries that share one mask where a window is narrower than the document, off CUDA's flash attention."""


def kept_layers(recipe: Recipe, num_layers: int) -> int:
    """How many layers, from the last on, keep all that they compute; `auto` is none."""
    train = recipe.train
    if train.activations == "keep":
        return num_layers
    return min(train.kept_layers, num_layers) if isinstance(train.kept_layers, int) else 0


def hosts(recipe: Recipe, part: HostPart) -> bool:
    """Whether `memory.host` has it in the computer's memory; `auto` is no."""
    return recipe.memory.host != "auto" and part in recipe.memory.host


def keeps_attention(recipe: Recipe) -> bool:
    """Whether layers that recompute on the native engine keep their attention's output; `auto` is no."""
    return recipe.train.keep_attention is True and recipe.train.activations != "offload"


def head_groups(num: int, num_kv: int, width: int, most_columns: int | None) -> list[tuple[int, int]]:
    """Spans of key heads whose queries, keys and values are at most so many columns, where one's are.

    What a group takes of o_proj's columns is whole blocks of 64 of its weights. None: one group.
    """
    if most_columns is None:
        return [(0, num_kv)]
    shares = num // num_kv
    aligned = 64 // gcd(64, shares * width)
    fitting = most_columns // ((shares + 2) * width)
    step = max(aligned, fitting // aligned * aligned)
    return [(at, min(at + step, num_kv)) for at in range(0, num_kv, step)]


@dataclass(frozen=True)
class Case:
    """One pass: `tokens` in documents of `length`. Without `training` there are no gradients, no autocast."""

    recipe: Recipe
    geometry: Geometry
    tokens: int
    length: int
    device: Device
    training: bool = True
    padded: bool = False
    """Answers: rows padded to `length`, with transformers' own attention and mask."""
    counted: int | None = None
    """Supervised tokens of a real pass; None: as many as there can be."""

    @cached_property
    def supervised(self) -> int:
        """Tokens that are predicted: all but the first of each document, unless they were counted."""
        return self.tokens - self.tokens // self.length if self.counted is None else self.counted

    @cached_property
    def compute(self) -> int:
        return compute_dtype_bytes(self.recipe)

    @cached_property
    def state(self) -> int:
        """Bytes of one hidden state per token."""
        return self.tokens * self.geometry.hidden_size * self.compute

    @cached_property
    def query(self) -> int:
        """Bytes of all heads' queries."""
        return self.tokens * self.geometry.num_heads * self.geometry.head_dim * self.compute

    @cached_property
    def key(self) -> int:
        return self.tokens * self.geometry.num_kv_heads * self.geometry.head_dim * self.compute

    @cached_property
    def wide(self) -> int:
        """Bytes of one intermediate state, half of gate_up_proj's output."""
        return self.tokens * self.geometry.intermediate_size * self.compute

    @cached_property
    def autocast(self) -> bool:
        return self.training and self.compute != 4

    @cached_property
    def casts_inputs(self) -> bool:
        """Whether PEFT casts an adapter's input to float32 first.

        Its Linear4bit asks for CUDA's autocast; its Linear always casts.
        Source: PEFT 0.21 tuners/lora/bnb.py and layer.py.
        """
        under_cuda = self.autocast and self.device == "cuda" and self.recipe.model.quantization == "nf4"
        return self.compute != 4 and not under_cuda

    @cached_property
    def native(self) -> bool:
        """Whether engine/layer.py computes the layers. What `auto` means: engine/native.py, choose."""
        engine = self.recipe.train.engine
        means_native = engine == "auto" and not self.dora and (self.device == "cpu" or self.hosts("layers"))
        return self.training and (engine == "native" or means_native)

    @cached_property
    def dropout(self) -> bool:
        return self.training and self.recipe.adapter.dropout > 0

    @cached_property
    def dora(self) -> bool:
        return self.recipe.adapter.method == "dora"

    @cached_property
    def grouped(self) -> bool:
        return self.geometry.num_heads != self.geometry.num_kv_heads

    @cached_property
    def attention(self) -> Literal["flash", "eager", "sdpa"]:
        """Which way engine/attention.py goes. A card before Ampere goes sdpa's; that is not known here."""
        if self.padded:
            return "sdpa"
        if self.device == "cuda" and self.compute == 2:
            return "flash"
        return "eager" if self.device == "cpu" and self.length <= EAGER_TOKENS else "sdpa"

    @cached_property
    def trains_inputs(self) -> bool:
        """Whether what goes into the first layer depends on anything that is trained."""
        return "embed_tokens" in self.recipe.adapter.embeddings

    @cached_property
    def trains_head(self) -> bool:
        return "lm_head" in self.recipe.adapter.embeddings

    @cached_property
    def kept_layers(self) -> int:
        return kept_layers(self.recipe, self.geometry.num_layers)

    @cached_property
    def keeps_attention(self) -> bool:
        return self.native and keeps_attention(self.recipe)

    @cached_property
    def slices(self) -> list[int]:
        """Intermediate columns that a layer which recomputes has at once, one slice after the other."""
        wanted, whole = self.recipe.train.slice_columns, self.geometry.intermediate_size
        step = wanted if self.native and isinstance(wanted, int) else whole
        return [min(step, whole - at) for at in range(0, whole, step)]

    @cached_property
    def head_groups(self) -> list[int]:
        """Key heads whose attention such a layer computes at once, one group after the other."""
        wanted, g = self.recipe.train.slice_columns, self.geometry
        most = wanted if self.native and isinstance(wanted, int) else None
        return [stop - start for start, stop in head_groups(g.num_heads, g.num_kv_heads, g.head_dim, most)]

    @cached_property
    def through_layers(self) -> bool:
        """Whether the backward goes through the layers; torch's recomputing always has it do so."""
        recomputes = self.kept_layers < self.geometry.num_layers and not self.native
        return self.trains_inputs or bool(self.recipe.adapter.pairs) or recomputes

    @cached_property
    def offloads(self) -> bool:
        """Whether layers' inputs are in host memory from forward to backward."""
        return self.recipe.train.activations == "offload"

    @cached_property
    def host_apart(self) -> bool:
        """Whether the computer's memory is another than the device's."""
        return self.device != "cpu"

    def hosts(self, part: HostPart) -> bool:
        """Whether these frozen weights are in the computer's memory."""
        return hosts(self.recipe, part)

    @cached_property
    def one_pass(self) -> bool:
        """Whether a step is one pass, so that there are no gradients before its backward."""
        return self.tokens >= self.recipe.train.effective_batch * self.length

    @cached_property
    def rank(self) -> int:
        return self.recipe.adapter.rank

    def adapted(self, linear: str) -> bool:
        return linear in target_linears(self.recipe)

    def parts(self, linear: str) -> list[str]:
        """What of a linear has an A/B pair of its own: projections, or the linear itself."""
        return [part for owner, part in self.recipe.adapter.pairs if owner == linear]

    def hidden_width(self, linear: str) -> int:
        """Width of the output of all A of a linear together."""
        return self.recipe.adapter.rank * len(self.parts(linear))

    def pair_elements(self, linear: str) -> int:
        """Elements of all A and B of a linear in one layer."""
        shapes = map(self.geometry.pair_shape, self.parts(linear))
        return self.recipe.adapter.rank * sum(map(sum, shapes))

    def shares_input(self, linear: str) -> bool:
        """Whether autograd keeps an adapter's input itself, not a copy of it."""
        return self.adapted(linear) and not self.casts_inputs and not self.dropout


def eager_sizes(case: Case) -> tuple[int, int, int, int]:
    """Of one document: bytes of its output, of a float32 per pair of tokens and head, of the weights in the
    compute dtype where that is another, and of the mask."""
    pairs = min(case.length, case.tokens) ** 2
    wide = 4 * case.geometry.num_heads * pairs
    one = case.query * min(case.length, case.tokens) // case.tokens
    return one, wide, wide // 2 if case.compute != 4 else 0, pairs


def window_blocks(case: Case) -> list[tuple[int, int]]:
    """(queries, keys) of each block of one document that has a mask; empty where none needs one."""
    window = case.geometry.sliding_window
    if case.attention != "sdpa" or case.padded or window is None or case.length <= window:
        return []
    stops = [(at, min(at + QUERY_BLOCK, case.length)) for at in range(0, case.length, QUERY_BLOCK)]
    return [(stop - at, stop - max(0, at - window + 1)) for at, stop in stops]


def norm_saved_bytes(case: Case) -> int:
    """A norm's input as float32 and a scale per token."""
    return 4 * case.tokens * (case.geometry.hidden_size + 1)


def norm_backward_bytes(case: Case) -> int:
    """Four float32 temporaries, and in another dtype the gradient as it came."""
    return case.tokens * case.geometry.hidden_size * (4 * 4 + (case.compute if case.compute != 4 else 0))
