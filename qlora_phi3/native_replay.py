"""A native decoder layer's operations replayed on a tape that only adds and subtracts bytes.

Owns what engine/layer.py and what it calls allocate while they run, in their order, but for the attention; a
replay follows that source line by line. Nothing of it is autograd's, so what is saved is what the policy
names. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from .case import NORM_ELEMENTS, Case
from .sizes import dequantized_bytes, target_linears
from .tape import Tape
from .tiles_replay import Tiles, sums_bytes

INTERMEDIATE: Final = ("gate_up_proj", "down_proj")


def kept_beside_input(case: Case, *, all_of_it: bool = True) -> int:
    """What a layer keeps beside its input where it keeps all, or the attention's output only."""
    if not all_of_it:
        return case.query + sums_bytes(case)
    narrow = sum(narrow_bytes(case, name) for name in target_linears(case.recipe))
    return 2 * case.query + 2 * case.key + case.state + 2 * case.wide + narrow + sums_bytes(case)


def narrow_bytes(case: Case, name: str) -> int:
    """The output of all A of a linear."""
    return case.tokens * case.hidden_width(name) * case.compute


class NativeLayer:
    """One layer on a tape. The layer's input and the gradient of its output are the caller's."""

    def __init__(self, case: Case, tape: Tape) -> None:
        self.case, self.tape = case, tape
        self.all_heads = [Tiles(case, case.geometry.num_kv_heads)]
        self.groups = [Tiles(case, size) for size in case.head_groups]

    # Forward

    def forward(self, *, keeps: bool) -> None:
        """Leaves the output, and what is saved; with `keeps` all, else the rest is freed."""
        case, tape = self.case, self.tape
        masks = self._masks()
        groups = self.all_heads if keeps else self.groups
        self._attend(groups, leaves_out=keeps or case.keeps_attention)
        if not keeps:
            tape.free(0 if len(groups) > 1 else case.query + 2 * case.key, self._narrow("qkv_proj", "o_proj"))
        last = self._feed_forward([1.0] if keeps else self._slices)
        tape.free(0 if keeps else case.state + 2 * last + self._narrow(*INTERMEDIATE), masks)

    @property
    def _slices(self) -> list[float]:
        """Shares of the intermediate columns."""
        return [columns / self.case.geometry.intermediate_size for columns in self.case.slices]

    def _attend(self, groups: list[Tiles], *, attends: bool = True, leaves_out: bool = True) -> None:
        """Leaves the sum with the residual and both A's outputs; of a single group qkv, and of all that is
        computed with `leaves_out` the attention's output.

        Without `attends`, that is there, and not counted.
        """
        case, tape, alone = self.case, self.tape, len(groups) == 1
        self.norm()
        tape.stage = "qkv_proj"
        self._narrowed("qkv_proj")
        share, last = 0.0, groups[-1]
        for group in groups:
            tape.free(int(self._output("qkv_proj") * share))
            share = group.heads / case.geometry.num_kv_heads
            share = share if attends or alone else 0.0
            if share:
                tape.stage = "qkv_proj"
                weight = self._made_weight("qkv_proj", share)
                tape.new(int(self._output("qkv_proj") * share))
                tape.free(weight)
                self._widen("qkv_proj", share)
                self._rotate(share)
            tape.free(case.state if group is last else 0)
            made = group.query + sums_bytes(case) * group.query // case.query
            if attends:
                group.forward(tape)
            elif not alone:
                tape.new(made)  # a copy of what is there
            tape.stage = "o_proj"
            self._narrow_part("o_proj", group.query, first=group is groups[0])
            weight = self._made_weight("o_proj", group.query / case.query)
            tape.new(case.state if group is groups[0] else 0)
            tape.free(weight)
            gone = not leaves_out if attends else not alone
            tape.free(made if gone else 0)
        self._widen("o_proj")
        tape.free(0 if alone else int(self._output("qkv_proj") * share))
        if attends and leaves_out and not alone:
            tape.passing(case.query + sums_bytes(case))  # those of all groups, joined

    def _feed_forward(self, slices: Sequence[float]) -> int:
        """Leaves the output, the last slice of gate_up_proj's, both A's outputs; returns half that slice."""
        case, tape, wide = self.case, self.tape, 0
        self.norm()
        tape.stage = "gate_up_proj"
        self._narrowed("gate_up_proj")
        for number, share in enumerate(slices):
            tape.free(2 * wide)
            wide = int(case.wide * share)
            tape.stage = "gate_up_proj"
            self._product("gate_up_proj", 2 * wide, share)
            tape.stage = "SwiGLU"
            tape.new(wide)
            tape.stage = "down_proj"
            self._narrow_part("down_proj", wide, first=number == 0)
            weight = self._made_weight("down_proj", share)
            tape.new(0 if number else case.state)
            tape.free(weight, wide)
        self._widen("down_proj")
        tape.free(case.state)
        return wide

    def _narrow_part(self, name: str, size: int, *, first: bool) -> None:
        """What a part of so many bytes of a linear's input gives to the output of its A; leaves the first."""
        self._narrowed(name, dropped=size)
        self.tape.free(0 if first else self._narrow(name))

    def norm(self) -> None:
        """Leaves the output."""
        self.tape.stage = "norm"
        self._by_rows(self._norm)

    def _norm(self, tokens: int) -> None:
        case, tape = self.case, self.tape
        scale, wide = self._normed(tokens)
        if case.compute != 4:
            tape.new(case.state // case.tokens * tokens)
            tape.free(wide)
        tape.free(scale)

    def _by_rows(self, work: Callable[[int], None]) -> None:
        """What leaves a state for so many tokens, done for as many at once as are in float32."""
        tokens, state = self.case.tokens, self.case.state
        step = max(1, NORM_ELEMENTS // self.case.geometry.hidden_size)
        if tokens <= step:
            work(tokens)
            return
        self.tape.new(state)
        work(step)
        self.tape.free(state // tokens * step)

    def _normed(self, tokens: int) -> tuple[int, int]:
        """Leaves a scale per token and the input over its length, in float32; returns their bytes."""
        case, tape = self.case, self.tape
        scale, wide = 4 * tokens, 4 * tokens * case.geometry.hidden_size
        tape.new(wide if case.compute != 4 else 0)
        tape.passing(wide, scale)  # the squares
        tape.new(scale, 0 if case.compute != 4 else wide)
        return scale, wide

    def _rotate(self, share: float) -> None:
        """Half of the dimensions that turn, of a share of the heads."""
        self.tape.stage = "RoPE"
        turning = (self.case.query + self.case.key) * self.case.geometry.rotary_fraction * share
        self.tape.passing(int(turning) // 2)

    def _product(self, name: str, out: int, share: float) -> None:
        """Leaves the output; the weight is a local of the caller's until B is through."""
        weight = self._made_weight(name, share)
        self.tape.new(out)
        self._widen(name, share)
        self.tape.free(weight)

    def _narrowed(self, name: str, dropped: int = 0) -> None:
        """Leaves A's output. `dropped`: bytes of its input, where it is no state."""
        case, tape = self.case, self.tape
        if not case.adapted(name):
            return
        copies = self._a_copies(name)
        tape.new(copies)
        tape.passing((dropped or self._input(name)) if case.dropout else 0, narrow_bytes(case, name))
        tape.new(narrow_bytes(case, name))
        tape.free(copies)

    def _a_copies(self, name: str) -> int:
        """All A as one where they are several, or in the compute dtype; more only while it is made."""
        case = self.case
        elements = case.hidden_width(name) * case.geometry.linear_shape(name)[1]
        several = len(case.parts(name)) > 1
        if case.compute == 4:
            return 4 * elements if several else 0
        self.tape.passing(elements * (case.compute + (4 if several else 0)))
        return elements * case.compute

    def _widen(self, name: str, share: float = 1.0) -> None:
        """A copy of the largest B, where it is cast."""
        self.tape.passing(self._b_copy(name, share))

    def _b_copy(self, name: str, share: float = 1.0) -> int:
        if not self.case.adapted(name) or self.case.compute == 4:
            return 0
        return self._most_rows(name, share) * self.case.rank * self.case.compute

    def _most_rows(self, name: str, share: float) -> int:
        """Of a B that are taken at once; of slices those of gate or of up, of groups those of queries."""
        g, most = (
            self.case.geometry,
            max(self.case.geometry.pair_shape(part)[0] for part in self.case.parts(name)),
        )
        if share == 1 or name not in ("gate_up_proj", "qkv_proj"):
            return most
        largest = g.intermediate_size if name == "gate_up_proj" else g.num_heads * g.head_dim
        return int(share * min(most, largest))

    def _made_weight(self, name: str, share: float = 1.0) -> int:
        """Leaves the weight as it is multiplied with, or what of it a slice takes; returns its bytes.

        Unpacked, only rows are copied, to lie one behind the other.
        """
        case, tape = self.case, self.tape
        rows, columns = case.geometry.linear_shape(name)
        weight = int(rows * columns * case.compute * share)
        whole = dequantized_bytes(case.recipe, case.geometry, name)
        if not whole:
            return tape.new(weight if share < 1 and name in ("gate_up_proj", "qkv_proj") else 0)
        scales = whole - rows * columns * case.compute
        if share == 1:
            tape.new(weight, scales)
            tape.free(scales)
            return weight
        packed, some = int(rows * columns * share) // 2, 4 * int(rows * columns * share) // 64
        tape.new(scales, packed, some)
        tape.free(scales)
        tape.new(weight)
        tape.free(packed, some)
        return weight

    # Backward

    def backward(self, *, recomputes: bool) -> None:
        """From the gradient of the output, which stays to the end, to that of the input.

        `recomputes`: the first half is computed again from the input, but for an attention that was kept;
        otherwise what was kept is there, and not counted.
        """
        case, tape = self.case, self.tape
        tape.new(case.state)
        self._masks()
        groups = self.groups if recomputes else self.all_heads
        if recomputes:
            self._attend(groups, attends=not case.keeps_attention)
        self._feed_backward(recomputes=recomputes)
        self._attend_backward(groups)

    def _feed_backward(self, *, recomputes: bool) -> None:
        """Leaves the gradient of the sum, and those of both adapters."""
        case, tape = self.case, self.tape
        self.norm()
        tape.stage = "down_proj's backward"
        if recomputes:
            self._narrowed("gate_up_proj")
        narrow = self._narrow(*INTERMEDIATE)
        self._narrow_backward("down_proj")
        for number, share in enumerate(self._slices if recomputes else [1.0]):
            self._slice_backward(share, first=number == 0, recomputes=recomputes)
        self._b_backward("down_proj")
        self._a_backward("gate_up_proj")
        self._input_backward("gate_up_proj", case.state)
        self.norm_backward()
        # h, its gradient, both dz; kept, A's outputs go when `second` does
        tape.free(2 * case.state, narrow, narrow if recomputes else 0)

    def _slice_backward(self, share: float, *, first: bool, recomputes: bool) -> None:
        """Of the intermediate columns; the first leaves what the others add to."""
        case, tape, wide = self.case, self.tape, int(self.case.wide * share)
        tape.stage = "down_proj's backward"
        weight = self._made_weight("gate_up_proj", share)
        if recomputes:
            tape.new(2 * wide)
            self._widen("gate_up_proj", share)
        down = self._made_weight("down_proj", share)
        tape.new(wide)
        tape.free(down)
        self._input_backward("down_proj", wide)
        tape.stage = "SwiGLU's backward"
        inner = wide if case.adapted("down_proj") else 0
        tape.new(wide, inner)
        tape.free(2 * wide)  # silu(gate), and the gradient of what came out
        if inner and recomputes:
            self._narrow_part("down_proj", wide, first=first)
        self._a_backward("down_proj", share, first=first)
        tape.free(inner)
        tape.stage = "gate_up_proj's backward"
        self._b_backward("gate_up_proj", share, first=first)
        self._narrow_backward("gate_up_proj", share)
        tape.free(0 if first else self._narrow("gate_up_proj"))
        tape.new(case.state if first else 0)
        tape.free(2 * wide if recomputes else 0, weight)

    def _attend_backward(self, groups: list[Tiles]) -> None:
        """Leaves the gradient of the input, and those of both adapters."""
        case, tape, alone = self.case, self.tape, len(groups) == 1
        if not alone:
            self.norm()
        tape.stage = "o_proj's backward"
        self._narrow_backward("o_proj")
        for group in groups:
            self._group_backward(group, first=group is groups[0], alone=alone)
        tape.stage = "o_proj's backward"
        self._b_backward("o_proj")
        if alone:
            self.norm()
        tape.stage = "qkv_proj's backward"
        self._a_backward("qkv_proj")
        tape.free(case.state)
        self._input_backward("qkv_proj", case.state)
        self.norm_backward()

    def _group_backward(self, group: Tiles, *, first: bool, alone: bool) -> None:
        """Of some heads; the first leaves what the others add to."""
        case, tape = self.case, self.tape
        share, columns = group.heads / case.geometry.num_kv_heads, group.query / case.query
        tape.stage = "o_proj's backward"
        part = tape.new(0 if alone else group.query)  # a copy of the attention's output
        self._a_backward("o_proj", columns, first=first)
        weight = self._made_weight("o_proj", columns)
        tape.new(group.query)
        tape.free(weight)
        self._input_backward("o_proj", group.query)
        qkv = weight = 0
        if not alone:
            tape.stage = "qkv_proj's backward"
            weight = self._made_weight("qkv_proj", share)
            qkv = tape.new(group.query + 2 * group.key)
            self._widen("qkv_proj", share)
            self._rotate(share)
        group.backward(tape)
        tape.free(group.query, qkv, part)
        self._rotate(share)
        tape.stage = "qkv_proj's backward"
        self._b_backward("qkv_proj", share, first=first)
        self._narrow_backward("qkv_proj", share)
        tape.free(0 if first else self._narrow("qkv_proj"))
        weight = weight if not alone else self._made_weight("qkv_proj")
        tape.new(case.state if first else 0)
        tape.free(group.query + 2 * group.key, weight)

    def _narrow_backward(self, name: str, share: float = 1.0) -> None:
        """Leaves the gradient of A's output."""
        self.tape.new(self._narrow(name))
        self.tape.passing(self._b_copy(name, share))

    def _b_backward(self, name: str, share: float = 1.0, *, first: bool = True) -> None:
        """Leaves the gradients of B, with the first slice; a product of the largest passes by."""
        if self.case.adapted(name):
            outputs = sum(self.case.geometry.pair_shape(part)[0] for part in self.case.parts(name))
            self.tape.new(4 * self.case.rank * outputs if first else 0)
            self.tape.passing(self._most_rows(name, share) * self.case.rank * self.case.compute)

    def _a_backward(self, name: str, share: float = 1.0, *, first: bool = True) -> None:
        """Leaves the gradients of A, all of it with the first slice."""
        case, tape = self.case, self.tape
        if not case.adapted(name):
            return
        elements = case.hidden_width(name) * case.geometry.linear_shape(name)[1]
        some = int(elements * share)
        made = tape.new(some * case.compute)
        tape.passing(int(self._input(name) * share) if case.dropout else 0)
        cast = tape.new(4 * some if case.compute != 4 else 0)
        tape.free(made if cast else 0)
        if share < 1:
            tape.new(4 * elements if first else 0)
            tape.free(cast or made)

    def _input_backward(self, name: str, size: int) -> None:
        """A's part of a gradient of so many bytes; dropout makes it apart."""
        if self.case.adapted(name):
            copies = self._a_copies(name)
            self.tape.passing(copies, size if self.case.dropout else 0)

    def norm_backward(self) -> None:
        """Leaves the gradient of the input."""
        self.tape.stage = "norm's backward"
        self._by_rows(self._norm_backward)

    def _norm_backward(self, tokens: int) -> None:
        case, tape = self.case, self.tape
        scale, wide = self._normed(tokens)
        half, state = case.compute != 4, case.state // case.tokens * tokens
        tape.new(state)
        if half:
            tape.new(wide)
            tape.free(state)
        tape.passing(wide, scale)
        tape.new(scale)
        tape.new(state if half else 0)
        tape.free(wide, scale, scale, wide if half else 0)

    # Both

    def _masks(self) -> int:
        """Dropout's, drawn one after the other; returns their bytes.

        A CPU makes noise, then its product with ones; CUDA's one operation a mask beside that.
        """
        case, tape, found = self.case, self.tape, 0
        each = 3 * 4 if case.device == "cpu" else 2 * 4 + 1
        tape.stage = "dropout's masks"
        if not case.dropout:
            return 0
        for name in target_linears(case.recipe):
            elements = case.tokens * case.geometry.linear_shape(name)[1]
            tape.passing(each * elements)
            found += tape.new(elements)
        return found

    def _narrow(self, *names: str) -> int:
        return sum(narrow_bytes(self.case, name) for name in self._adapted(names))

    def _adapted(self, names: Iterable[str]) -> Iterable[str]:
        return (name for name in names if self.case.adapted(name))

    def _input(self, name: str) -> int:
        return self.case.tokens * self.case.geometry.linear_shape(name)[1] * self.case.compute

    def _output(self, name: str) -> int:
        return self.case.tokens * self.case.geometry.linear_shape(name)[0] * self.case.compute
