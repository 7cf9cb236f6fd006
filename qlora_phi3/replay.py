"""A decoder layer's operations replayed on a tape that only adds and subtracts bytes.

Owns what transformers' Phi-3 layer around its linears and our attention allocate while they run, in their
order, with gradients and without. A replay follows the source it names line by line: what is made, what
autograd keeps, what dies when a function returns. No torch.
"""

from __future__ import annotations

from .case import Case, eager_sizes, norm_backward_bytes, norm_saved_bytes, window_blocks
from .linears import Linears
from .tape import Tape


class Layer(Linears):
    """One decoder layer on a tape. The layer's input and the gradient of its output are the caller's.

    Source: transformers 5.23 modeling_phi3.py.
    """

    def forward(self) -> None:
        """Leaves the output, and what is saved."""
        self.until_swiglu()
        self._product()
        self.linear("down_proj")
        self._end_of_mlp()
        self.tape.free(self.case.state)  # down_proj's output, in the sum with the residual

    def until_swiglu(self) -> None:
        """Up to silu(gate); leaves residual, norm's output, gate_up_proj's output and silu(gate)."""
        case, tape = self.case, self.tape
        self.norm()
        self._attention_block()
        self.drop(case.state, case.shares_input("qkv_proj"))
        tape.new(case.state)  # the sum with the residual
        tape.free(case.state)  # o_proj's output
        self.keeps_residual = self.gradient and case.compute == 4  # else norm keeps a float32 copy
        self.norm()
        self.linear("gate_up_proj")
        tape.stage = "SwiGLU"
        tape.new(case.wide)
        self.keeps_swiglu = self.gradient

    def _product(self) -> None:
        self.tape.new(self.case.wide)
        self.drop(self.case.wide, self.keeps_swiglu)  # silu(gate)

    def _end_of_mlp(self) -> None:
        case = self.case
        self.drop(case.wide, case.shares_input("down_proj"))
        self.drop(2 * case.wide, self.keeps_swiglu)
        self.drop(case.state, case.shares_input("gate_up_proj"))
        self.tape.new(case.state)
        self.drop(case.state, self.keeps_residual)

    def norm(self) -> None:
        """Leaves the output; saved are the input as float32 and a scale per token."""
        case, tape = self.case, self.tape
        tape.stage = "norm"
        scale, wide = 4 * case.tokens, 4 * case.tokens * case.geometry.hidden_size
        half = case.compute != 4
        copy = tape.new(wide if half else 0)
        tape.passing(wide, scale)  # the squares and their mean
        tape.new(scale, scale, wide)
        tape.passing(case.state if half else 0, case.state)
        tape.free(scale, wide)
        self.drop(copy + scale, self.gradient)
        tape.new(case.state)

    def _attention_block(self) -> None:
        """qkv_proj to o_proj; leaves o_proj's output."""
        case = self.case
        self.linear("qkv_proj")
        self._rope()
        self._attend()
        kept = self.gradient
        self.linear("o_proj")
        # flash keeps its output itself, the others' was copied into another layout
        self.drop(case.query, case.shares_input("o_proj") or (kept and case.attention == "flash"))
        repeated = case.attention == "sdpa" and case.grouped
        self.drop(case.query, kept and not self._copies_query())
        self.drop(2 * case.key + case.query + case.key, kept and not repeated)  # values are a view of qkv

    def _rope(self) -> None:
        """Leaves queries and keys with their positions; autograd keeps only the shared sines."""
        for part in (self.case.query, self.case.key):
            turned = int(part * self.case.geometry.rotary_fraction)
            self.tape.passing(3 * turned)
            self.tape.new(part)

    def _attend(self) -> None:
        """Leaves the output in o_proj's layout. Source: engine/attention.py."""
        case, tape = self.case, self.tape
        tape.stage = "attention"
        scores = 4 * case.geometry.num_heads * case.tokens
        if case.attention == "flash":
            tape.new(case.query, scores)
            self.drop(scores, self.gradient)
            return
        self._eager() if case.attention == "eager" else self._sdpa(scores)
        tape.new(case.query)  # all documents' outputs as one
        tape.passing(case.query)
        self.drop(case.query, self.gradient and case.attention == "sdpa")  # each one's

    def _copies_query(self) -> bool:
        """Several documents' queries are strided: grouping their heads copies them."""
        return self.case.attention == "eager" and self.case.grouped and self.case.tokens > self.case.length

    def _eager(self) -> None:
        """Leaves each document's output. Scores and softmax are float32, a document's at once."""
        case, tape = self.case, self.tape
        one, wide, weights, hidden = eager_sizes(case)
        copy = case.query * case.length // case.tokens if self._copies_query() else 0
        saved = wide + weights + hidden + copy
        tape.new((case.tokens // case.length - 1) * saved) if self.gradient else 0
        tape.new(case.query - one, copy)
        half = case.compute != 4
        tape.passing(case.compute * wide // 4, wide if half else 0, wide)
        tape.new(wide, hidden)
        tape.passing(2 * wide)
        tape.new(wide, weights, one)
        tape.free(wide)
        if not self.gradient:
            tape.free(saved)

    def _sdpa(self, scores: int) -> None:
        """Leaves each document's output. Grouped keys and values are repeated to all heads.

        `scores`: bytes of a float32 per query and head.
        """
        case, tape = self.case, self.tape
        documents, blocks = max(1, case.tokens // case.length), window_blocks(case)
        pairs, keys = sum(q * k for q, k in blocks), sum(k for _, k in blocks) or case.length
        repeated = 2 * case.query * keys // case.tokens if case.grouped else 0
        mask = case.compute * (case.length**2 if case.padded else pairs)
        tape.new(case.query, scores)
        if self.gradient or case.padded:
            tape.new(documents * (repeated + mask))
        else:
            tape.passing(repeated, mask)
        if not self.gradient:
            tape.free(scores, documents * (repeated + mask) if case.padded else 0)
        if blocks:
            tape.passing(case.query)  # each document's blocks as one


def saved_beside_input(case: Case, *, first: bool = False) -> int:
    tape = Tape()
    Layer(case, tape, saving=True, first=first).forward()
    return tape.now - case.state


class Backward(Layer):
    """The backward of one layer down to its attention; what comes behind that takes less."""

    def __init__(self, case: Case, tape: Tape) -> None:
        super().__init__(case, tape, saving=True)

    def backward(self, *, recomputes: bool) -> None:
        """From the gradient of the output, which stays as the residual's.

        `recomputes`: the forward runs once more when its first saved tensor is asked for, and breaks off at
        the last. Otherwise what it saved is taken to be there, and not counted.
        """
        case, tape = self.case, self.tape
        tape.stage = "down_proj's backward"
        tape.new(case.state)
        early = case.recipe.model.quantization == "nf4" and not case.adapted("down_proj")
        if early:  # bitsandbytes keeps its weight by itself: nothing that was saved is asked for
            self.through_base("down_proj")
        self.reach("down_proj")
        if recomputes:
            self._recompute(early)
        tape.stage = "down_proj's backward"
        if not early:
            self.through_linear("down_proj")
        self._swiglu()
        self._gate_up()
        self._attention()

    def _recompute(self, early: bool) -> None:
        before = self.tape.now
        self.until_swiglu()
        if not early:
            self._product()
        if self.case.adapted("down_proj"):
            self.linear("down_proj", stops=True)
        self.tape.now = before + saved_beside_input(self.case)
        if self.case.offloads and self.case.compute != 4:  # else autograd holds the copy for the norm
            self.tape.free(self.case.state)

    def _swiglu(self) -> None:
        wide, tape = self.case.wide, self.tape
        tape.stage = "SwiGLU's backward"
        tape.new(wide, wide)
        tape.free(wide, wide)  # the product's gradient, silu(gate)
        tape.passing(wide)
        tape.free(2 * wide)  # gate_up_proj's output; both halves' gradients become one
        tape.passing(2 * wide)

    def _gate_up(self) -> None:
        """gate_up_proj and the norm before it; leaves nothing but the residual's gradient."""
        case, tape = self.case, self.tape
        tape.stage = "gate_up_proj's backward"
        left = self.reach("gate_up_proj", given=2 * case.wide)
        self.through_linear("gate_up_proj")
        tape.free(left)
        tape.stage = "norm's backward"
        self.tape.passing(norm_backward_bytes(case))
        tape.free(case.state, norm_saved_bytes(case))

    def _attention(self) -> None:
        case, tape = self.case, self.tape
        tape.stage = "attention's backward"
        self.reach("o_proj")
        self.through_linear("o_proj")
        if case.attention == "eager":
            self._through_eager()
        else:  # gradients, and as float32 the sums of the queries' or as one the documents'
            tape.passing(2 * (case.query + 2 * (case.query if case.grouped else case.key)))

    def _through_eager(self) -> None:
        """The document that is gone through first, to where its softmax's gradient is there."""
        case, tape = self.case, self.tape
        one, wide, weights, _ = eager_sizes(case)
        copy = one if case.grouped else 0
        tape.new(one * case.key // case.query, copy, weights or wide)
        tape.free(weights, copy)
        if case.tokens == case.length:  # values, a view of qkv, and the output's gradient are not needed more
            tape.free(2 * case.query + 2 * case.key)
        if weights:
            tape.new(wide)
            tape.free(weights)
        tape.new(wide)
