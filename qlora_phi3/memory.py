"""Predicted bytes per part and phase of a run, by arithmetic alone.

Owns what the reference engine (TRL's SFTTrainer, PEFT, transformers' Phi-3, bitsandbytes) allocates for a
recipe, and which micro batch or card that fits. Weights, adapters, gradients and optimizer states are exact.
Activations are an estimate: the tensors that each step of plain autograd holds, as read in the libraries'
source and counted on CPU, until GPUs refine it. Refuses to guess what only the machine knows. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Final, Literal

from . import phi3
from .phi3 import Geometry
from .recipe import GENERATION_METRICS, Recipe

Device = Literal["cuda", "cpu"]

CARDS_GIB: Final = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
"""Memory of consumer and common data-centre cards, smallest first."""

CONTEXT_BYTES: Final = 600 * 1024**2
"""Of a card and not ours: CUDA context with loaded kernels (300-500 MiB), cuBLAS workspaces, a desktop."""

ALLOCATOR_SLACK: Final = 0.05
"""Share of the rest lost to rounding and fragmentation; a cautious guess until measured."""

LOGIT_TOKENS: Final = 1024
"""Supervised tokens whose logits exist at once in evaluate.py: 131 MB of float32 for Phi-3-mini."""

ANSWER_CACHE: Final = 3 * 1024**3 // 2
"""Bytes of KV cache that answers generated at once may take: 4096 tokens on Phi-3-mini."""

ANSWER_TOKENS: Final = 16384
"""Tokens of prompts and answers generated at once, pads too, however small their cache is."""

LOSS_CHUNK: Final = (4096, 32768)
"""(tokens, vocabulary columns) of TRL 1.16's logits tile; it is this wide for a smaller vocabulary too."""

_DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_COVERS: Final = (
    "Bytes of all tensors on the device at the fullest moment of each phase, with paged optimizer states. "
    "Weights, adapters, gradients and optimizer states are exact; activations are an estimate for full rows "
    "trained on every token. Not counted: the CUDA context, allocator fragmentation, other programs."
)


@dataclass(frozen=True)
class Part:
    """Bytes of one thing in memory, with the arithmetic in words."""

    name: str
    num_bytes: int
    formula: str


@dataclass(frozen=True)
class Phase:
    """What is in memory together at the fullest moment of "load", "train" or "evaluate"."""

    name: str
    parts: tuple[Part, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        parts = [{"name": p.name, "bytes": p.num_bytes, "formula": p.formula} for p in self.parts]
        return {"name": self.name, "peak_bytes": self.peak_bytes, "parts": parts}


@dataclass(frozen=True)
class Plan:
    """The prediction for one recipe, model and micro batch, with every row `row_tokens` long."""

    phases: tuple[Phase, ...]
    micro_batch: int
    row_tokens: int

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        numbers = {"micro_batch": self.micro_batch, "row_tokens": self.row_tokens}
        phases = [phase.to_json() for phase in self.phases]
        return {"version": 1, **numbers, "peak_bytes": self.peak_bytes, "phases": phases, "covers": _COVERS}


def predict(
    recipe: Recipe,
    geometry: Geometry,
    *,
    micro_batch: int,
    row_tokens: int | None = None,
    device: Device = "cuda",
) -> Plan:
    """Predict a run's memory; `row_tokens` is the longest row, `data.max_length` while it is not known."""
    case = _Case(recipe, geometry, micro_batch, _pass_row(recipe, row_tokens, micro_batch), device)
    phases = (_load_phase(case), _train_phase(case))
    evaluate = (_evaluate_phase(case),) if recipe.data.eval is not None else ()
    return Plan(phases + evaluate, micro_batch, case.row_tokens)


def choose_micro_batch(
    recipe: Recipe,
    geometry: Geometry,
    free_bytes: int,
    *,
    row_tokens: int | None = None,
    device: Device = "cuda",
) -> int:
    """Largest divisor of `effective_batch` whose training fits, at least 1; an explicit one as it is.

    Loading and answering samples do not depend on it: look at the plan's peak for those.

    Units: `free_bytes` as `usable_bytes` gives them.
    """
    if isinstance(recipe.train.micro_batch, int):
        return recipe.train.micro_batch
    whole = recipe.train.effective_batch
    for size in (n for n in range(whole, 1, -1) if whole % n == 0):
        tokens = _pass_row(recipe, row_tokens, size)
        if _train_phase(_Case(recipe, geometry, size, tokens, device)).peak_bytes <= free_bytes:
            return size
    return 1


def _pass_row(recipe: Recipe, longest: int | None, micro_batch: int) -> int:
    """Tokens of one of `micro_batch` rows: the longest, or with packing what fits."""
    if longest is None or not recipe.data.packing:
        return longest or recipe.data.max_length
    whole_step = ceil(longest * recipe.train.effective_batch / micro_batch)
    return max(longest, min(recipe.data.max_length, whole_step))


def smallest_card(recipe: Recipe, geometry: Geometry) -> int | None:
    """GiB of the smallest card in CARDS_GIB that the run fits, at micro batch 1 or the explicit one."""
    explicit = recipe.train.micro_batch
    plan = predict(recipe, geometry, micro_batch=explicit if isinstance(explicit, int) else 1)
    usable = {card: usable_bytes(card * 1024**3 - CONTEXT_BYTES) for card in CARDS_GIB}
    return next((card for card in CARDS_GIB if plan.peak_bytes <= usable[card]), None)


def usable_bytes(free_bytes: int) -> int:
    """What tensors can occupy of memory that is free once the CUDA context exists."""
    return int(free_bytes * (1 - ALLOCATOR_SLACK))


def format_bytes(num_bytes: int) -> str:
    """Bytes for people, in powers of 1024: "3.21 GiB"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(num_bytes) >= 1024**power:
            return f"{num_bytes / 1024**power:.2f} {unit}"
    return f"{num_bytes} B"


# Weights, adapters, gradients, optimizer: exact


def compute_dtype_bytes(recipe: Recipe) -> int:
    """Bytes of an element of activations, norms, embeddings and unquantized linears."""
    return _DTYPE_BYTES[recipe.model.compute_dtype]


def adapter_dtype_bytes(recipe: Recipe) -> int:
    """Bytes of an element of adapters and their gradients: float32, always.

    The trainer's autocast computes with them in the compute dtype; outside of it, as while evaluating, PEFT
    casts what goes in and out of them to float32.
    """
    return 4


def nf4_bytes(num_weights: int, double_quant: bool) -> int:
    """Bytes of one NF4 matrix: 4 bits a weight, a scale per 64 of them, code books.

    Source: bitsandbytes 0.50 functional.py, quantize_4bit. Scales are float32, or with double quantization
    uint8 with a float32 per 256 of them, their float32 mean and a code book of 256 float32 of its own.
    """
    num_scales = ceil(num_weights / 64)
    scales = num_scales + 4 * ceil(num_scales / 256) + 4 + 4 * 256 if double_quant else 4 * num_scales
    return ceil(num_weights / 2) + scales + 4 * 16


def linear_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of all decoder linears, as NF4 or in the compute dtype."""
    if recipe.model.quantization == "none":
        return geometry.num_linear_parameters * compute_dtype_bytes(recipe)
    sizes = [rows * columns for rows, columns in map(geometry.linear_shape, phi3.LINEARS)]
    return geometry.num_layers * sum(nf4_bytes(size, recipe.model.double_quant) for size in sizes)


def target_linears(recipe: Recipe) -> tuple[str, ...]:
    """The fused linears that get an A/B pair, in the order of the forward pass."""
    if isinstance(recipe.adapter.targets, str):
        return phi3.LINEARS
    chosen = {phi3.PROJECTIONS.get(name, name) for name in recipe.adapter.targets}
    return tuple(name for name in phi3.LINEARS if name in chosen)


def adapter_sizes(recipe: Recipe, geometry: Geometry) -> Iterator[int]:
    """Elements of every A (rank x in) and B (out x rank), layer by layer."""
    for _ in range(geometry.num_layers):
        for num_out, num_in in map(geometry.linear_shape, target_linears(recipe)):
            yield recipe.adapter.rank * num_in
            yield num_out * recipe.adapter.rank


def optimizer_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of both Adam states, paged ones counted as on the device.

    Source: bitsandbytes 0.50 optim/optimizer.py, Optimizer2State.init_state: 8-bit states have a float32
    scale per 256 elements and share two code books of 256 float32; tensors below 4096 elements stay float32.
    torch's AdamW keeps states in the parameter's dtype (its step counters live on the host).
    """
    sizes = list(adapter_sizes(recipe, geometry))
    if recipe.train.optimizer in ("adamw_torch", "paged_adamw_32bit"):
        element = adapter_dtype_bytes(recipe) if recipe.train.optimizer == "adamw_torch" else 4
        return 2 * element * sum(sizes)
    states = sum(2 * 4 * n if n < 4096 else 2 * (n + 4 * ceil(n / 256)) for n in sizes)
    return states + (2 * 4 * 256 if any(n >= 4096 for n in sizes) else 0)


# Activations: an estimate


@dataclass(frozen=True)
class _Case:
    """One forward pass: `rows` rows of `row_tokens` tokens each."""

    recipe: Recipe
    geometry: Geometry
    rows: int
    row_tokens: int
    device: Device

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def states(self) -> int:
        """Elements of one hidden state per token."""
        return self.tokens * self.geometry.hidden_size

    @property
    def compute(self) -> int:
        return compute_dtype_bytes(self.recipe)


def mask_bytes(case: _Case) -> int:
    """Bytes of the boolean mask [rows, 1, S, S], built from the sliding window on and for padded rows.

    Rows of one batch are taken to differ in length.
    Source: transformers 5.23 masking_utils.py, _ignore_causal_mask_sdpa.
    """
    window = case.geometry.sliding_window
    dense = case.rows > 1 or (window is not None and case.row_tokens >= window)
    return case.rows * case.row_tokens**2 if dense else 0


def attention_saved_bytes(case: _Case) -> int:
    """Bytes that autograd keeps in one layer for its norms and attention, adapters aside.

    Both norms save their input as float32 and 4 bytes of scale; SDPA saves q and k after RoPE, the fused qkv
    that v is a view of, its output, a float32 per head, and its own copy of the mask in the compute dtype. A
    masked GQA layer repeats k and v to all heads instead.
    Source: transformers 5.23 modeling_phi3.py, integrations/sdpa_attention.py.
    """
    g = case.geometry
    query, key = g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim
    keys_values = 2 * query if mask_bytes(case) and key != query else query + 3 * key
    per_token = 2 * (4 * g.hidden_size + 4) + case.compute * (2 * query + keys_values) + 4 * g.num_heads
    return case.tokens * per_token + case.compute * mask_bytes(case)


def adapter_saved_bytes(case: _Case, linears: tuple[str, ...] = phi3.LINEARS) -> int:
    """Bytes that autograd keeps in one layer for the adapters on `linears`.

    Their input, A's output, with dropout a mask per input element (bool, on CPU float32), and autocast's
    copies of A and B; the frozen linear keeps nothing. Source: PEFT 0.21 tuners/lora/bnb.py.
    """
    used = [case.geometry.linear_shape(name) for name in linears if name in target_linears(case.recipe)]
    rank, num_inputs = case.recipe.adapter.rank, sum(num_in for _, num_in in used)
    copies = rank * sum(map(sum, used)) if case.compute != adapter_dtype_bytes(case.recipe) else 0
    dropped = num_inputs * (4 if case.device == "cpu" else 1) if case.recipe.adapter.dropout > 0 else 0
    return case.tokens * (case.compute * (num_inputs + len(used) * rank) + dropped) + case.compute * copies


def layer_saved_bytes(case: _Case) -> int:
    """Bytes that the backward of one layer needs: the above, gate_up_proj's output and silu(gate)."""
    swiglu = case.tokens * case.compute * 3 * case.geometry.intermediate_size
    return attention_saved_bytes(case) + adapter_saved_bytes(case) + swiglu


def dequantized_bytes(case: _Case, linear: str) -> int:
    """Scratch of one NF4 product: the whole weight in the compute dtype, and its scales as float32.

    CUDA has kernels without it for few tokens; they are not counted on.
    Source: bitsandbytes 0.50 backends/default/ops.py, _gemm_4bit_default_impl.
    """
    rows, columns = case.geometry.linear_shape(linear)
    scales = 4 * ceil(rows * columns / 64) if case.recipe.model.double_quant else 0
    return rows * columns * case.compute + scales if case.recipe.model.quantization == "nf4" else 0


def expansion_bytes(case: _Case, lora_element: int) -> int:
    """Outputs alive at the fullest moment of gate_up_proj's forward.

    One with the dequantized weight, or three: PEFT's clone of the base's, B's and that scaled, the last two
    of `lora_element` bytes an element.
    """
    wide = case.tokens * 2 * case.geometry.intermediate_size
    lora = 2 * lora_element if "gate_up_proj" in target_linears(case.recipe) else 0
    return max(wide * (case.compute + lora), wide * case.compute + dequantized_bytes(case, "gate_up_proj"))


def layer_peak_bytes(case: _Case) -> int:
    """Fullest moment while one layer is recomputed and differentiated, its input not counted.

    It is in the recomputed gate_up_proj, with the residual and the norm's output; or in down_proj's backward,
    with the dequantized weight and two gradients of its input, whose saved copy is gone by then; or in
    SwiGLU's backward, with three; or in the recomputed down_proj, where PEFT's unquantized linear, and any on
    CPU, casts the input to float32 first. In float32 norms save layer input and residual, not copies.
    """
    b, states = case.compute, case.states
    targets, unquantized = target_linears(case.recipe), case.recipe.model.quantization == "none"
    held = (b if b != 4 else 0) + (0 if "gate_up_proj" in targets else b)
    wide = b * case.tokens * case.geometry.intermediate_size
    backward = 3 * wide + max(2 * wide + dequantized_bytes(case, "down_proj"), 3 * wide)
    casts = b != 4 and "down_proj" in targets and (unquantized or case.device == "cpu")
    contraction = 7 * wide + 3 * b * states if casts else 0  # float32 counts as two
    before = attention_saved_bytes(case) + adapter_saved_bytes(case, phi3.LINEARS[:3])
    return 2 * b * states + before + max(held * states + expansion_bytes(case, b), backward, contraction)


def loss_bytes(case: _Case) -> int:
    """Fullest moment between the last layer and its backward; all tokens are taken as trained on.

    The last norm's float32 input, then TRL's fused head (hidden states twice, their gradient as float32 and
    cast, one tile of logits) or the norm's backward (four float32 temporaries, two gradients). On CPU, which
    has no Triton, a tile takes 29 bytes a logit more, or itself and the head's slice as float32.
    Source: TRL 1.16 kernels/chunked_logprob.py.
    """
    b, states = case.compute, case.states
    num, width = min(case.tokens, LOSS_CHUNK[0]), min(case.geometry.vocab_size, LOSS_CHUNK[1])
    head = states * (2 * b + 4 + b) + num * LOSS_CHUNK[1] * b
    if case.device == "cpu":
        head += max(29 * num * width, 4 * width * (num + case.geometry.hidden_size))
    return 4 * states + max(head, states * (4 * 4 + 2 * b))


def answering_bytes(case: _Case) -> int:
    """Fullest moment in a layer without gradients: residual, gate_up_proj with float32 LoRA, SDPA's mask."""
    lora = adapter_dtype_bytes(case.recipe)
    layer = case.states * (2 * case.compute + lora) + expansion_bytes(case, lora)
    return layer + case.compute * mask_bytes(case)


def scoring_bytes(case: _Case) -> int:
    """evaluate.py's loss: hidden states, and a chunk's logits, as float32 too, and their log-softmax."""
    logits = min(case.tokens, LOGIT_TOKENS) * case.geometry.vocab_size * (case.compute + 4 + 4)
    return max(answering_bytes(case), 2 * case.states * case.compute + logits)


def kv_cache_bytes(case: _Case) -> int:
    """Keys and values of every layer while `rows` prompts of `row_tokens` get the longest answer."""
    new = case.recipe.evaluate.max_new_tokens
    return case.rows * (case.row_tokens + new) * _kv_bytes(case.recipe, case.geometry)


def _kv_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of one token's keys and values in all layers."""
    width = geometry.num_kv_heads * geometry.head_dim
    return geometry.num_layers * 2 * width * compute_dtype_bytes(recipe)


def answer_tokens(recipe: Recipe, geometry: Geometry) -> int:
    """Tokens of prompts and answers that are generated at once, pads too."""
    return min(ANSWER_TOKENS, ANSWER_CACHE // _kv_bytes(recipe, geometry))


# Phases


def _weight_parts(case: _Case) -> list[Part]:
    g, bits = case.geometry, 8 * case.compute
    num, matrix = g.num_linear_parameters, g.vocab_size * g.hidden_size
    linears = linear_bytes(case.recipe, g)
    parts = [Part("linears", linears, f"{_count(num)} weights x {8 * linears / num:.4g} bit")]
    for name in ("embedding",) if g.tied_embeddings else ("embedding", "head"):
        parts.append(Part(name, matrix * case.compute, f"{_count(matrix)} weights x {bits} bit"))
    num = g.num_norm_parameters
    return [*parts, Part("norms", num * case.compute, f"{_count(num)} weights x {bits} bit")]


def _adapter_part(case: _Case, name: str) -> Part:
    """The adapters, or their gradients: same shapes, same dtype."""
    num, element = sum(adapter_sizes(case.recipe, case.geometry)), adapter_dtype_bytes(case.recipe)
    return Part(name, num * element, f"{_count(num)} parameters x {8 * element} bit")


def _optimizer_part(case: _Case) -> Part:
    name = case.recipe.train.optimizer
    where = "; on the device unless evicted" if name.startswith("paged") else ""
    return Part("optimizer states", optimizer_bytes(case.recipe, case.geometry), f"two of {name}{where}")


def _mask_part(case: _Case) -> Part:
    words = f"{case.rows} x {case.row_tokens}^2 x 1 byte" if mask_bytes(case) else "causal, without a tensor"
    return Part("attention mask", mask_bytes(case), words)


def _load_phase(case: _Case) -> Phase:
    """All weights, and the largest before it is quantized: transformers 5.23 then loads one by one."""
    scratch = max(dequantized_bytes(case, name) for name in phi3.LINEARS)
    quantizing = [Part("quantizing", scratch, "largest linear before, and its scales")] if scratch else []
    return Phase("load", (*_weight_parts(case), *quantizing))


def _train_phase(case: _Case) -> Phase:
    """Everything; `activations: auto` means recompute in the reference engine."""
    layer, loss, keep = layer_peak_bytes(case), loss_bytes(case), case.recipe.train.activations == "keep"
    saved = layer_saved_bytes(case) if keep else case.states * case.compute
    # the working set holds what the last layer saved; in float32 that includes its input
    num = case.geometry.num_layers - (1 if keep or case.compute == 4 else 0)
    name = "kept activations" if keep else "layer inputs"
    held = Part(name, num * saved, f"{num} layers x {format_bytes(saved)}")
    loss += saved if keep else 0
    words = f"larger of: one layer {format_bytes(layer)}, loss {format_bytes(loss)}"
    working = Part("working set", max(layer, loss), words)
    states = (_adapter_part(case, "adapters"), _adapter_part(case, "gradients"), _optimizer_part(case))
    return Phase("train", (*_weight_parts(case), *states, _mask_part(case), held, working))


def _evaluate_phase(case: _Case) -> Phase:
    """Weights, adapters, the optimizer of a trainer still alive; then the loss, or answers with their cache.

    The loss takes the micro batch at once; answers as many prompts as answer_tokens holds. Every row is
    taken to be as long as the longest.
    """
    settings = case.recipe.evaluate
    words = f"{case.rows} x {case.row_tokens} tokens"
    ways = [(case, [Part("working set", scoring_bytes(case), f"loss of {words}")])]
    if set(settings.metrics) & set(GENERATION_METRICS):
        tokens = answer_tokens(case.recipe, case.geometry)
        at_once = tokens // (case.row_tokens + settings.max_new_tokens)
        batch = replace(case, rows=max(1, min(at_once, settings.samples)))
        words = f"{batch.rows} x {batch.row_tokens} tokens"
        cache = Part("KV cache", kv_cache_bytes(batch), f"{words}, each + {settings.max_new_tokens}")
        ways.append((batch, [Part("working set", answering_bytes(batch), f"one layer of {words}"), cache]))
    batch, fullest = max(ways, key=lambda way: sum(part.num_bytes for part in way[1]))
    states = (_adapter_part(case, "adapters"), _optimizer_part(case), _mask_part(batch))
    return Phase("evaluate", (*_weight_parts(case), *states, *fullest))


def _count(number: int) -> str:
    """A count of parameters for people: "3.62 B"."""
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
