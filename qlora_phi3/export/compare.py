"""What merging changes: each merge against the model as it was trained, on the run's held-out rows.

Owns the figures, loss and KL(live || merged) per supervised token, and the choice between the merges. The
merged model never exists as a whole: a layer's weights are there while the rows pass through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from .. import data, loralib_bridge, model, process
from ..engine import attention
from ..engine.documents import Documents, hidden_states, original_context, passes
from ..engine.loss import IGNORE
from ..errors import InputError
from .merge import EMBEDDING, HEAD, Merger, unties
from .options import MergeBase, Say
from .source import Source

MAX_TOKENS: Final = 4096
"""Of all rows together: they pass through each layer at once."""
MAX_BYTES: Final = 512 * 2**20
"""Of the live model's log-probabilities, which are kept: 4186 positions of Phi-3-mini's vocabulary."""
_CHUNK: Final = 128


@dataclass(frozen=True)
class Measured:
    """One merge. Units: nats per supervised token; KL of it from the live model, mean and largest."""

    loss: float
    kl_mean: float
    kl_max: float


@dataclass(frozen=True)
class MergeReport:
    """Which weights the adapter was added to, why, and what each choice costs where that was measured."""

    base: MergeBase
    reason: str
    rows: int = 0
    tokens: int = 0
    live_loss: float | None = None
    merges: dict[MergeBase, Measured] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Live:
    """The model as trained: its log-probabilities where something is predicted, pass by pass.

    Shape: log_probs (supervised tokens, vocabulary) float32; wanted (supervised tokens,) int64.
    """

    documents: list[Documents]
    log_probs: list[Tensor]
    wanted: list[Tensor]


@lru_cache(maxsize=1)  # several targets of one command are merged alike, and measuring takes minutes
def choose(source: Source, wanted: str, dtype: torch.dtype, say: Say) -> MergeReport:
    """The weights to merge into, measured where there are held-out rows.

    `auto` takes the merge that is nearer to the live model, the smaller mean KL.

    Raises:
        InputError: `auto`, and nothing says what the adapter was trained against; `dequant` of an adapter
            that was trained on unquantized weights.
    """
    bases = candidates(source, wanted)
    rows, why_not = _held_out(source)
    if not rows:
        reason = "asked for" if wanted != "auto" else _UNMEASURED[bases[0]]
        say(f"merging into the {bases[0]} weights: {reason}; not measured, {why_not}")
        return MergeReport(bases[0], f"{reason}; not measured: {why_not}")
    measured, live_loss, num_tokens = measure(source, bases, dtype, rows, say)
    best = min(bases, key=lambda base: measured[base].kl_mean)
    reason = "asked for" if wanted != "auto" else "the adapter was trained on them"
    if len(bases) > 1:
        reason = "nearest to the model as trained"
    say(f"merging into the {best} weights: {reason}")
    return MergeReport(best, reason, len(rows), num_tokens, live_loss, measured)


_UNMEASURED: Final[dict[MergeBase, str]] = {
    "dequant": "the adapter was trained against them",
    "original": "the adapter was trained on them",
}


def candidates(source: Source, wanted: str) -> tuple[MergeBase, ...]:
    """What may be merged into; the first where nothing can be measured.

    Raises:
        InputError: what was asked for does not fit the adapter.
    """
    if source.recipe is None and wanted == "auto":
        reason = "nothing says what this adapter was trained against, since it is in no run folder."
        raise InputError("--merge-base", reason, "Give dequant (trained on NF4) or original.")
    if source.recipe is not None and not source.quantized:
        if wanted == "dequant":
            reason = "dequant is for adapters trained on NF4; this one had model.quantization none."
            raise InputError("--merge-base", reason, "Give original, or leave it out.")
        return ("original",)
    if wanted == "auto":
        return ("dequant", "original")
    return ("dequant",) if wanted == "dequant" else ("original",)


def _held_out(source: Source) -> tuple[list[data.TokenRow], str]:
    """Held-out rows of the run, at most MAX_TOKENS of tokens in all; why there are none."""
    recipe = source.recipe
    if recipe is None or recipe.data.eval is None:
        return [], "there are no held-out rows"
    try:
        splits = data.load(recipe.data, model.load_tokenizer(source.checkpoint.folder))
    except InputError as error:
        return [], f"the run's rows cannot be read again ({error.problems[0]})"
    assert splits.eval is not None
    chosen, room = [], MAX_TOKENS
    for row in splits.eval.rows[: recipe.evaluate.samples]:
        if len(row.input_ids) <= room:
            chosen.append(row)
            room -= len(row.input_ids)
    return chosen, "" if chosen else f"each held-out row has more than {MAX_TOKENS} tokens"


def measure(
    source: Source, bases: Sequence[MergeBase], dtype: torch.dtype, rows: Sequence[data.TokenRow], say: Say
) -> tuple[dict[MergeBase, Measured], float, int]:
    """(figures of each merge, loss of the live model, supervised tokens)."""
    say(f"measuring the merge on {len(rows)} held-out rows")
    live = _run_live(source, rows, say)
    process.give_back()
    num_tokens = sum(map(len, live.wanted))
    nll = sum(-float(p.gather(1, w[:, None]).sum()) for p, w in zip(live.log_probs, live.wanted, strict=True))
    measured: dict[MergeBase, Measured] = {}
    for base in bases:
        measured[base] = _measure(Merger(source, base, dtype), live)
        one = measured[base]
        trained = f"as trained {nll / num_tokens:.4g}, from which KL is {one.kl_mean:.3g}"
        say(f"{base}: loss {one.loss:.4g} ({trained})")
        process.give_back()
    return measured, nll / num_tokens, num_tokens


@torch.inference_mode()
def _run_live(source: Source, rows: Sequence[data.TokenRow], say: Say) -> _Live:
    name = attention.register()
    base = model.load(source.checkpoint, source.model, model.device_for_run(), name, say)
    geometry = source.checkpoint.geometry
    tuned = loralib_bridge.attach_adapter(base.model, source.tensors, source.config, geometry).eval()
    causal = tuned.get_base_model()
    lengths = [len(row.input_ids) for row in rows]
    groups = passes(lengths, len(rows), context=original_context(causal))
    documents = [Documents.of([rows[i] for i in group], causal.device) for group in groups]
    room, log_probs, wanted = MAX_BYTES // (4 * geometry.vocab_size), [], []
    for one in documents:
        chosen, targets = _supervised(causal, one, room)
        found = [part.cpu() for part in _log_probs(causal, chosen)]
        log_probs.append(torch.cat(found or [torch.empty(0, geometry.vocab_size)]))
        wanted.append(targets.cpu())
        room -= len(targets)
    return _Live(documents, log_probs, wanted)


def _supervised(causal: Any, documents: Documents, limit: int) -> tuple[Tensor, Tensor]:
    """Hidden states that predict a supervised token, the first `limit` of them, and those tokens."""
    hidden, targets = hidden_states(causal, documents), documents.labels[:, 1:]
    chosen = targets != IGNORE
    return hidden[:, :-1][chosen][:limit], targets[chosen][:limit]


def _log_probs(causal: Any, hidden: Tensor) -> Iterator[Tensor]:
    for at in range(0, len(hidden), _CHUNK):
        yield functional.log_softmax(causal.lm_head(hidden[at : at + _CHUNK]).float(), dim=-1)


@torch.inference_mode()
def _measure(merger: Merger, live: _Live) -> Measured:
    total, largest, nll, count = 0.0, 0.0, 0.0, 0
    with streamed(merger) as causal:
        for documents, log_probs, wanted in zip(live.documents, live.log_probs, live.wanted, strict=True):
            hidden, _ = _supervised(causal, documents, len(wanted))
            for i, found in enumerate(_log_probs(causal, hidden)):
                part = slice(i * _CHUNK, i * _CHUNK + len(found))
                true, found = log_probs[part], found.cpu()
                kl = (true.exp() * (true - found)).sum(dim=1)
                total, largest = total + float(kl.sum()), max(largest, float(kl.max()))
                nll -= float(found.gather(1, wanted[part, None]).sum())
            count += len(wanted)
    return Measured(nll / count, total / count, largest)


@contextmanager
def streamed(merger: Merger) -> Iterator[Any]:
    """A merged Phi3ForCausalLM for our own passes, whose layers have weights only while rows pass them."""
    from transformers import Phi3ForCausalLM
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = model.native_config(merger.source.checkpoint)
    config.tie_word_embeddings = config.tie_word_embeddings and not unties(merger.source)
    config._attn_implementation = attention.register()
    config.use_cache = False
    # a CPU's float16 is slow, and float32 of the same numbers what a GPU makes of it
    dtype = torch.float32 if merger.device.type == "cpu" and merger.dtype == torch.float16 else merger.dtype

    def fill(module: Any, names: dict[str, str]) -> None:
        found = {key: merger.tensor(name).to(merger.device, dtype) for key, name in names.items()}
        module.load_state_dict(found, assign=True)

    with torch.device("meta"):
        causal = Phi3ForCausalLM(config).eval().requires_grad_(False)
    causal.model.rotary_emb = Phi3RotaryEmbedding(config).to(merger.device)
    fill(causal.model.embed_tokens, {"weight": EMBEDDING})
    fill(causal.model.norm, {"weight": "model.norm.weight"})
    fill(causal.lm_head, {"weight": HEAD if HEAD in merger.shapes else EMBEDDING})
    for i, layer in enumerate(causal.model.layers):
        names = {key: f"model.layers.{i}.{key}" for key in layer.state_dict()}
        layer.register_forward_pre_hook(lambda module, _, names=names: fill(module, names))
        layer.register_forward_hook(lambda module, *_: module.to("meta") and None)
    yield causal
