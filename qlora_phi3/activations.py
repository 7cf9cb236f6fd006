"""Bytes of activations: what a pass keeps for its backward, and its fullest moments. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .case import LOGIT_TOKENS, Case, eager_sizes, norm_backward_bytes, window_blocks
from .native_replay import NativeLayer, kept_beside_input
from .replay import Backward, Layer, saved_beside_input
from .sizes import target_linears
from .tape import Tape
from .tiles_replay import shared_bytes


def saved_bytes(case: Case) -> int:
    """What the backward of one layer needs; in float32 that includes the layer's input."""
    if not case.through_layers:
        return 0
    if case.native:
        return case.state + kept_beside_input(case)
    return saved_beside_input(case) + (case.state if case.compute == 4 else 0)


@dataclass(frozen=True)
class Held:
    """What layers hold for their backward. Units: layers that keep all, inputs on the device and on the host,
    bytes of the first."""

    kept: int
    inputs: int
    parked: int
    kept_bytes: int


def held(case: Case, layer: int, saved: int, *, back: bool = True) -> Held:
    """What the layers up to this one, counted from 0, hold as its backward begins.

    Without `back`, no offloaded input is on its way to the device yet: not before the first layer that
    recomputes is reached. `saved` is `saved_bytes` of the case.
    """
    if not case.through_layers:
        return Held(0, 0, 0, 0)
    others = case.geometry.num_layers - case.kept_layers
    kept = max(0, layer + 1 - others)
    kept_bytes = kept * saved
    if not others and not (case.trains_inputs or case.native):  # the first layer's input needs no gradient
        kept_bytes += saved_beside_input(case, first=True) - saved
    inputs = min(layer + 1, others)
    if not case.offloads or not inputs:
        return Held(kept, inputs, 0, kept_bytes)
    # the embedding's output is a leaf that autograd holds, unless an adapter on it makes it none
    leaf = 0 if case.trains_inputs else 1
    parked = inputs - leaf
    return Held(kept, leaf + min(2 if back else 1, parked), parked, kept_bytes)


def input_bytes(case: Case) -> int:
    """What a layer holds that recomputes: its input, and the attention's output where that is kept."""
    kept = kept_beside_input(case, all_of_it=False) if case.keeps_attention else 0
    return case.state + kept


def held_bytes(case: Case, found: Held) -> int:
    """Of the device; a CPU's host is the same memory."""
    on_host = 0 if case.host_apart else found.parked * case.state
    return found.kept_bytes + found.inputs * input_bytes(case) + on_host


def embedding_bytes(case: Case) -> int:
    """What the backward of the embedding's adapter needs: A's rows of the tokens, and autocast's copy of B.

    Source: PEFT 0.21 tuners/lora/layer.py, Embedding.forward.
    """
    if not case.trains_inputs:
        return 0
    copy = case.geometry.hidden_size * case.rank * case.compute if case.autocast else 0
    return case.tokens * case.rank * case.compute + copy


@dataclass(frozen=True)
class Peak:
    """Bytes of a pass at its fullest moment, and which that is."""

    num_bytes: int
    stage: str


def _peak(tape: Tape) -> Peak:
    return Peak(tape.peak, tape.fullest)


def row_bytes(case: Case) -> int:
    """Ids, labels and positions of a pass as int64, RoPE's sines, and the masks that are kept for reuse."""
    masks = sum(queries * keys for queries, keys in set(window_blocks(case)))
    masks += eager_sizes(case)[3] if case.attention == "eager" else 0
    masks = shared_bytes(case) if case.native else masks
    return case.tokens * 3 * 8 + _rotary_bytes(case) + masks


def _rotary_bytes(case: Case) -> int:
    rotary = int(case.geometry.head_dim * case.geometry.rotary_fraction)
    return case.tokens * 2 * rotary * case.compute


def autocast_bytes(case: Case) -> int:
    """Autocast's copies of all adapters, from a pass's forward to its loss, while torch recomputes layers."""
    if case.native:
        return 0
    tape = Tape()
    layer = Layer(case, tape, saving=True)
    linears = target_linears(case.recipe)
    return case.geometry.num_layers * sum(layer.saved_by_adapter(name)[2] for name in linears)


def forward_peak(case: Case, *, saving: bool) -> Peak:
    """Fullest moment of the last layer's forward, its input not counted."""
    tape = Tape()
    if case.native:
        NativeLayer(case, tape).forward(keeps=saving)
    else:
        Layer(case, tape, saving=saving).forward()
    return _peak(tape)


def backward_peak(case: Case, *, recomputes: bool) -> Peak:
    """Fullest moment of the last layer's backward, beside its input, or beside what was saved."""
    tape = Tape()
    (NativeLayer if case.native else Backward)(case, tape).backward(recomputes=recomputes)
    return _peak(tape)


def loss_peak(case: Case, cached: int = 0) -> Peak:
    """Fullest moment from the last layer's output to the last norm's backward.

    `cached`: what autocast holds until the loss is there.
    Source: engine/loss.py.
    """
    tape, through = Tape(), case.through_layers
    tape.new(cached, case.state)
    if case.native and through:
        NativeLayer(case, tape).norm()  # saves the last layer's output as it is
    else:
        Layer(case, tape, saving=through).norm()
        tape.free(case.state if case.compute != 4 or not through else 0)
    tape.free(0 if through or case.native else _rotary_bytes(case))  # no backward of a layer keeps them
    tape.stage = "loss"
    chosen = case.supervised * case.geometry.hidden_size * case.compute
    gradient = chosen if through else 0
    tape.new(40 * case.supervised, chosen, gradient)  # their numbers and targets, their states
    head = _HeadBytes.of(case, chosen) if case.trains_head else _HeadBytes()
    tape.new(head.inputs, head.narrow)
    tape.passing(head.narrow)  # z before it is scaled
    tape.new(head.narrow, head.b_gradient)
    tape.passing(head.b_copy, _logits_bytes(case))
    tape.free(cached, head.narrow, 0 if head.shared else chosen, case.state)  # the last is the model's output
    tape.new(gradient, head.narrow, head.b_gradient)
    tape.free(gradient, head.narrow, head.b_gradient)
    tape.free(0 if case.one_pass else head.b_gradient)  # else it is added to what is counted apart
    if case.trains_head:  # A's backward: its own gradient, the states' beside what came through the base
        tape.passing(head.narrow, head.a_gradient)
        tape.passing(gradient, gradient)
    tape.free(head.inputs, head.narrow, head.shared)
    if not through:
        return _peak(tape)  # A was the last
    tape.passing(2 * case.state)  # spread over all tokens, then beside each row's last
    if case.native:
        tape.new(case.state)  # the gradient as it came
        NativeLayer(case, tape).norm_backward()
        return _peak(tape)
    tape.stage = "last norm's backward"
    tape.passing(norm_backward_bytes(case))
    return _peak(tape)


@dataclass(frozen=True)
class _HeadBytes:
    """What the head's adapter makes in the loss.

    `shared`: of the states that autograd keeps for A; with dropout `inputs` holds a copy instead, and the
    mask. `narrow`: of A's output. `b_copy`: B in the compute dtype, and a chunk's part of its gradient.
    """

    shared: int = 0
    inputs: int = 0
    narrow: int = 0
    b_copy: int = 0
    b_gradient: int = 0
    a_gradient: int = 0

    @classmethod
    def of(cls, case: Case, chosen: int) -> _HeadBytes:
        g, half = case.geometry, case.compute != 4
        mask = chosen if case.device == "cpu" else chosen // case.compute
        mask = mask if case.through_layers else 0  # it is for the states' gradient
        a_copy = case.rank * g.hidden_size * case.compute if half else 0
        return cls(
            shared=0 if case.dropout else chosen,
            inputs=a_copy + (chosen + mask if case.dropout else 0),
            narrow=case.supervised * case.rank * case.compute,
            b_copy=g.vocab_size * case.rank * case.compute if half else 0,
            b_gradient=g.vocab_size * case.rank * 4,
            a_gradient=case.rank * g.hidden_size * (4 + (case.compute if half else 0)),
        )


def _logits_bytes(case: Case) -> int:
    """One chunk's logits as made and as float32, its error as such and cast, or that and its product."""
    num = min(case.supervised, case.recipe.train.logit_tokens)
    each = case.geometry.vocab_size, case.geometry.hidden_size
    made = each[0] * (4 + (case.compute if case.compute != 4 else 0))
    return num * max(made, case.compute * sum(each))


def scoring_peak(case: Case) -> Peak:
    """evaluate.py's loss: one layer, or hidden states and a chunk's logits, as float32 too, and log-softmax.

    The float32 logits of the chunk before are still there when the next are made. An adapter on the head adds
    two more in float32: B's output and that scaled, then that and the sum.
    """
    layer = forward_peak(case, saving=False)
    made = 4 + (case.compute if case.compute != 4 else 0)
    made = case.compute + 8 if case.trains_head else made
    first = min(case.supervised, LOGIT_TOKENS)
    second = min(case.supervised - first, LOGIT_TOKENS)
    logits = case.geometry.vocab_size * max(8 * first, made * first, 4 * first + made * second)
    head = Peak(2 * case.state + logits, "logits")
    return max(Peak(case.state + layer.num_bytes, layer.stage), head, key=lambda peak: peak.num_bytes)


def answering_peak(case: Case) -> Peak:
    """One layer while `tokens` of prompts padded to `length` are read at once, with the mask of the pass."""
    layer = forward_peak(case, saving=False)
    return Peak(case.state + layer.num_bytes + case.tokens * case.length, layer.stage)
