"""Bytes of activations: what a pass keeps for its backward, and its fullest moments. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .case import LOGIT_TOKENS, Case, eager_sizes, norm_backward_bytes, window_blocks
from .replay import Backward, Layer, saved_beside_input
from .sizes import target_linears
from .tape import Tape


def saved_bytes(case: Case) -> int:
    """What the backward of one layer needs; in float32 that includes the layer's input."""
    return saved_beside_input(case) + (case.state if case.compute == 4 else 0)


def all_saved_bytes(case: Case) -> int:
    """What the backward of all layers needs."""
    return (case.geometry.num_layers - 1) * saved_bytes(case) + saved_beside_input(case, first=True)


@dataclass(frozen=True)
class Peak:
    """Bytes of a pass at its fullest moment, and which that is."""

    num_bytes: int
    stage: str


def _peak(tape: Tape) -> Peak:
    return Peak(tape.peak, tape.fullest)


def row_bytes(case: Case) -> int:
    """Ids, labels and positions of a pass as int64, RoPE's sines, and the masks that are kept for reuse."""
    rotary = int(case.geometry.head_dim * case.geometry.rotary_fraction)
    masks = sum(queries * keys for queries, keys in set(window_blocks(case)))
    masks += eager_sizes(case)[3] if case.attention == "eager" else 0
    return case.tokens * (3 * 8 + 2 * rotary * case.compute) + masks


def autocast_bytes(case: Case) -> int:
    """Autocast's copies of all adapters, from a pass's forward to its loss, while layers are recomputed."""
    tape = Tape()
    layer = Layer(case, tape, saving=True)
    linears = target_linears(case.recipe)
    return case.geometry.num_layers * sum(layer.saved_by_adapter(name)[2] for name in linears)


def forward_peak(case: Case, *, saving: bool) -> Peak:
    """Fullest moment of the last layer's forward, its input not counted."""
    tape = Tape()
    Layer(case, tape, saving=saving).forward()
    return _peak(tape)


def backward_peak(case: Case, *, recomputes: bool) -> Peak:
    """Fullest moment of the last layer's backward, beside its input, or beside what was saved."""
    tape = Tape()
    Backward(case, tape).backward(recomputes=recomputes)
    return _peak(tape)


def loss_peak(case: Case, cached: int = 0) -> Peak:
    """Fullest moment from the last layer's output to the last norm's backward.

    `cached`: what autocast holds until the loss is there.
    Source: engine/loss.py.
    """
    tape = Tape()
    tape.new(cached, case.state)
    Layer(case, tape, saving=True).norm()
    tape.free(case.state if case.compute != 4 else 0)
    tape.stage = "loss"
    chosen = case.supervised * case.geometry.hidden_size * case.compute
    tape.new(40 * case.supervised, 2 * chosen)  # their numbers and targets, their states and gradients
    tape.passing(_logits_bytes(case))
    tape.free(cached, chosen, case.state)  # the last of these is the model's output
    tape.new(chosen)
    tape.free(chosen)
    tape.passing(2 * case.state)  # spread over all tokens, then beside each row's last
    tape.stage = "last norm's backward"
    tape.passing(norm_backward_bytes(case))
    return _peak(tape)


def _logits_bytes(case: Case) -> int:
    """One chunk's logits as made and as float32, with logsumexp's temporary, or with the softmax cast.

    Source: ATen's logsumexp, which has a temporary of its input's size.
    """
    num, cast = min(case.supervised, LOGIT_TOKENS), case.compute if case.compute != 4 else 0
    per_token = case.geometry.vocab_size * (4 + cast) + case.geometry.hidden_size * case.compute
    return num * max(case.geometry.vocab_size * (4 + 4), per_token)


def scoring_peak(case: Case) -> Peak:
    """evaluate.py's loss: one layer, or hidden states and a chunk's logits, as float32 too, and log-softmax.

    The float32 logits of the chunk before are still there when the next are made.
    """
    layer = forward_peak(case, saving=False)
    cast = case.compute if case.compute != 4 else 0
    first = min(case.supervised, LOGIT_TOKENS)
    second = min(case.supervised - first, LOGIT_TOKENS)
    logits = case.geometry.vocab_size * max(8 * first, (4 + cast) * first, 4 * first + (4 + cast) * second)
    head = Peak(2 * case.state + logits, "logits")
    return max(Peak(case.state + layer.num_bytes, layer.stage), head, key=lambda peak: peak.num_bytes)


def answering_peak(case: Case) -> Peak:
    """One layer while `tokens` of prompts padded to `length` are read at once, with the mask of the pass."""
    layer = forward_peak(case, saving=False)
    return Peak(case.state + layer.num_bytes + case.tokens * case.length, layer.stage)
