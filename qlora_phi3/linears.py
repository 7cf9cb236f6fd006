"""PEFT's linears, LoRA's and DoRA's, replayed on a tape: forward, what autograd keeps, backward.

Owns what bitsandbytes' products and PEFT's adapters allocate while they run, in their order. No torch.
Source: PEFT 0.21 tuners/lora/bnb.py, layer.py, dora.py and variants.py; bitsandbytes 0.50.
"""

from __future__ import annotations

from .case import Case
from .phi3 import FUSED
from .sizes import dequantized_bytes
from .tape import Tape


class Linears:
    """A layer's linears on a tape. `saving`: autograd keeps what their backward needs.

    In the `first` layer gradients begin at the first adapter: embeddings need none.
    """

    def __init__(self, case: Case, tape: Tape, *, saving: bool, first: bool = False) -> None:
        self.case, self.tape, self.saving = case, tape, saving
        self.gradient = saving and not first
        """Whether what is made now depends on anything that is trained."""

    def drop(self, size: int, kept: bool) -> None:
        """A local that dies, unless autograd keeps it."""
        if not (self.saving and kept):
            self.tape.free(size)

    def _input(self, name: str) -> int:
        return self.case.tokens * self.case.geometry.linear_shape(name)[1] * self.case.compute

    def _output(self, name: str) -> int:
        return self.case.tokens * self.case.geometry.linear_shape(name)[0] * self.case.compute

    def _element(self) -> int:
        """Bytes of an element that A or B makes."""
        return self.case.compute if self.case.autocast or self.case.compute == 4 else 4

    # Forward

    def linear(self, name: str, *, stops: bool = False) -> None:
        """Leaves the output, and what is saved; with `stops` breaks off once all of that is there.

        A quantized base's output is cloned, before an adapter's is added to it.
        """
        case, tape, out = self.case, self.tape, self._output(name)
        tape.stage = name
        scratch = dequantized_bytes(case.recipe, case.geometry, name)
        tape.new(scratch, out)
        tape.free(scratch)
        if not case.adapted(name):
            return
        if scratch:
            tape.passing(out)
        if case.dora:
            self._dora(name, stops)
        else:
            self._lora(name, stops, cloned=bool(scratch))
        self.gradient = self.saving

    def _lora(self, name: str, stops: bool, *, cloned: bool) -> None:
        """B's output, it scaled, and the sum."""
        case, tape, out = self.case, self.tape, self._output(name)
        cast = self._adapter_inputs(name)
        if stops:
            return
        branch = out // case.compute * self._element()
        tape.new(branch)
        tape.passing(branch)
        if branch > out and cloned:
            tape.new(out)
            tape.free(branch)
            branch = out
        tape.passing(branch)  # the sum; without a quantized base float32 too, and then cast
        tape.free(branch, cast)
        self.drop(sum(self.saved_by_adapter(name)), True)

    def saved_by_adapter(self, name: str) -> tuple[int, int, int]:
        """Bytes that autograd keeps of its input, of A's output, and of autocast's copies of A and B.

        Dropout keeps its mask, bool on CUDA and of the input's float32 on a CPU. Without gradients the copies
        are none of a layer's: the autocast that is around the whole pass keeps them until it ends.
        """
        case, width = self.case, self.case.hidden_width(name)
        num_in = case.geometry.linear_shape(name)[1]
        inputs = 0 if case.shares_input(name) or not (case.autocast or case.dropout) else case.compute
        copies = case.pair_elements(name) * case.compute if case.autocast and self.saving else 0
        return (
            case.tokens * num_in * (inputs + self._mask_element()),
            case.tokens * width * self._element(),
            copies,
        )

    def _mask_element(self) -> int:
        """Dropout's mask is kept for the input's gradient only."""
        wanted = self.case.dropout and (self.gradient or not self.saving)
        return (4 if self.case.device == "cpu" else 1) if wanted else 0

    def _adapter_inputs(self, name: str) -> int:
        """Up to A's output; returns the bytes of the input's float32 copy, a local of the linear."""
        case, tape = self.case, self.tape
        num_in = case.tokens * case.geometry.linear_shape(name)[1]
        cast = tape.new(4 * num_in if case.casts_inputs else 0)
        tape.new(*self.saved_by_adapter(name))
        if case.dropout and case.casts_inputs:
            tape.passing(4 * num_in)  # what dropout left of it, until A has its cast
        return cast

    # DoRA's forward

    def _dora(self, name: str, stops: bool) -> None:
        """(m/|W'| - 1) * base + m/|W'| * B(A(x)) * scale, of which every factor with tokens is float32.

        With dropout the base's product is made once more, of the input that dropout left.
        """
        case, tape, out = self.case, self.tape, self._output(name)
        wide = 4 * out // case.compute
        inputs, hidden, copies = self.saved_by_adapter(name)
        base, update, weight, vectors = self.saved_by_lengths(name)
        held = self._dropped(name)
        tape.new(copies)
        held += self._lengths(name)
        tape.new(vectors, inputs - self._early_inputs(name), hidden, update)
        tape.passing(update if name in FUSED and case.recipe.adapter.split_fused else 0)  # blocks, as one
        if case.dropout:
            held -= self._base_again(name, weight)
        tape.new(wide)
        if stops:
            return
        tape.passing(2 * wide)  # the other product, it scaled; then their sum
        tape.free(held)
        tape.passing(wide)  # the sum with the base's output
        if case.compute != 4:
            tape.new(out)
            tape.free(wide)
        if case.dropout:
            tape.free(out)  # the base's first output
        self.drop(sum((inputs, hidden, copies, base, update, weight, vectors)), True)

    def saved_by_lengths(self, name: str) -> tuple[int, int, int, int]:
        """Bytes that autograd keeps: the base's output, B's, the weight that dropout's input met, lengths.

        The last are |W'|, m/|W'|, and that less one.
        """
        case = self.case
        num_out, num_in = case.geometry.linear_shape(name)
        remade = case.recipe.model.quantization == "nf4" or case.casts_inputs
        weight = num_out * num_in * case.compute if case.dropout and self.gradient and remade else 0
        update = case.tokens * num_out * self._element()
        return self._output(name), update, weight, num_out * (4 + 4 + self._input_element())

    def _input_element(self) -> int:
        return 4 if self.case.casts_inputs else self.case.compute

    def _early_inputs(self, name: str) -> int:
        """What of the adapter's saved inputs is there before DoRA comes to the weight: all but A's cast."""
        saved, _, _ = self.saved_by_adapter(name)
        cast = self.case.compute if self.case.casts_inputs and self.case.autocast else 0
        return saved - self.case.tokens * self.case.geometry.linear_shape(name)[1] * cast

    def _dropped(self, name: str) -> int:
        """The input as float32, and what dropout left of it; both stay to the end."""
        case = self.case
        size = 4 * case.tokens * case.geometry.linear_shape(name)[1] if case.casts_inputs else 0
        self.tape.new(self._early_inputs(name))
        return self.tape.new(size, size if case.dropout else 0)

    def _lengths(self, name: str) -> int:
        """|W + scale * B @ A|, its update as B(A(identity)); leaves what its locals hold to the end."""
        case, tape = self.case, self.tape
        num_out, num_in = case.geometry.linear_shape(name)
        made, element = self._element(), self._input_element()
        tape.stage = f"{name}'s lengths"
        eye = tape.new(4 * num_in**2)
        rows = tape.new(made * num_in * case.hidden_width(name))
        copy = tape.new(made * num_in**2) if made != 4 else 0
        self.drop(copy, True)
        update = tape.new(made * num_out * num_in)
        tape.passing(update if name in FUSED and case.recipe.adapter.split_fused else 0)
        graph = rows + (copy or eye)
        tape.free(eye if copy or not self.saving else 0)
        self.drop(rows, True)
        if element != made:
            tape.new(element * num_out * num_in)
            tape.free(update)
        weight = self._weight(name, element)
        tape.passing(2 * element * num_out * num_in)
        return element * num_out * num_in + weight + (graph if self.saving else 0)

    def _weight(self, name: str, element: int) -> int:
        """Leaves the weight, where it is not the base's own; returns its bytes."""
        case, tape = self.case, self.tape
        num_out, num_in = case.geometry.linear_shape(name)
        scratch = dequantized_bytes(case.recipe, case.geometry, name)
        tape.new(scratch)
        if element != case.compute:
            tape.new(element * num_out * num_in)
            tape.free(scratch)
            return element * num_out * num_in
        left = case.compute * num_out * num_in if scratch else 0
        tape.free(scratch - left)
        return left

    def _base_again(self, name: str, kept: int) -> int:
        """The product with the dequantized weight, under autocast of copies of both.

        `kept` is the weight's copy, or where there is none the weight, no longer a local: returns its bytes.
        """
        case, tape = self.case, self.tape
        num_out, num_in = case.geometry.linear_shape(name)
        if not (case.casts_inputs and case.autocast):
            tape.new(self._output(name))
            return kept
        copies = tape.new(self._input(name), case.compute * num_out * num_in)
        tape.new(self._output(name))
        tape.free(copies - kept)
        return 0

    # Backward

    def reach(self, name: str, given: int = 0) -> int:
        """What the output's gradient becomes before anything that was saved is asked for.

        LoRA's is scaled for B. DoRA's is float32, and goes to the base in the compute dtype at once.
        `given`: bytes of that gradient where nobody else needs it; returns those still there.
        """
        out, tape = self._output(name), self.tape
        if not self.case.adapted(name):
            return given
        if not self.case.dora or self.case.compute == 4:
            tape.new(out)
            return given
        wide = tape.new(4 * out // self.case.compute)
        tape.free(given)
        tape.new(out, wide)
        return 0

    def through_linear(self, name: str) -> None:
        """Leaves the gradient of the input; what `reach` made is gone."""
        adapted, base, pending = self.case.adapted(name), 0, 0
        if adapted and self.case.dora:
            base, pending = self._through_lengths(name)
        if adapted:
            self._through_adapter(name, pending)
        self.through_base(name)
        self.tape.free(base)
        if adapted:
            self.tape.passing(self._input(name))
            self.tape.free(self._input(name))

    def through_base(self, name: str) -> None:
        scratch = dequantized_bytes(self.case.recipe, self.case.geometry, name)
        self.tape.new(scratch, self._input(name))
        self.tape.free(scratch)

    def _through_lengths(self, name: str) -> tuple[int, int]:
        """Both products; leaves B's output's gradient, and two whose bytes it returns.

        They are that of the base's output, and with dropout that of the adapter's input.
        Each product's other gradient, that of the lengths, is as large until it is summed over the tokens.
        """
        case, tape, out = self.case, self.tape, self._output(name)
        base, update, weight, vectors = self.saved_by_lengths(name)
        wide, half = 4 * out // case.compute, case.compute != 4
        self._through_product(wide, out)
        tape.free(wide, update)  # what was scaled
        self._through_product(wide, out)
        tape.free(base, vectors, wide if half else 0)
        if not case.dropout:
            tape.new(out)  # the sum of what goes to the base
            tape.free(out, out if half else 0)
            return out, 0
        pending = tape.new(self._input(name))
        tape.free(out, weight)
        if case.casts_inputs:
            pending = self._becomes(pending, 4 * pending // case.compute)
        return out if half else 0, pending

    def _through_product(self, wide: int, out: int) -> None:
        """Leaves the gradient of the factor with tokens, in the compute dtype."""
        self.tape.new(wide)
        self.tape.passing(wide)
        if out != wide:
            self.tape.new(out)
            self.tape.free(wide)

    def _through_adapter(self, name: str, pending: int) -> None:
        """B, A, the casts of both and of the input; gradients of A and B, which are added to, pass by.

        `pending`: bytes of another gradient of the adapter's input.
        """
        case, tape = self.case, self.tape
        num_out, num_in = case.geometry.linear_shape(name)
        kept, hidden, copies = self.saved_by_adapter(name)
        tape.new(hidden)
        tape.free(self._output(name))
        largest = max(case.hidden_width(name) * num_in, case.recipe.adapter.rank * num_out)
        tape.passing(largest * (4 + case.compute))
        now = tape.new(self._input(name))
        mask = case.tokens * num_in * self._mask_element()
        tape.free(2 * hidden, copies, kept - mask, self._input(name) if case.shares_input(name) else 0)
        if case.casts_inputs:
            now = self._becomes(now, 4 * case.tokens * num_in)
        if pending:
            now = self._becomes(now, now)
            tape.free(pending)
        if case.dropout:
            now = self._becomes(now, now)
        if case.casts_inputs:
            self._becomes(now, self._input(name))
        tape.free(mask)

    def _becomes(self, old: int, size: int) -> int:
        self.tape.new(size)
        self.tape.free(old)
        return size
