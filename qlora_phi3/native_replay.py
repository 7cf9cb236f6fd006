"""A native decoder layer's operations replayed on a tape that only adds and subtracts bytes.

Owns what engine/layer.py and what it calls allocate while they run, in their order; a replay follows that
source line by line. Nothing of it is autograd's, so what is saved is what the policy names. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from .case import SCORES, Case
from .sizes import dequantized_bytes, target_linears
from .tape import Tape

INTERMEDIATE: Final = ("gate_up_proj", "down_proj")


def kept_beside_input(case: Case) -> int:
    """What a layer keeps beside its input where it keeps all."""
    narrow = sum(narrow_bytes(case, name) for name in target_linears(case.recipe))
    return 2 * case.query + 2 * case.key + case.state + 2 * case.wide + narrow + sums_bytes(case)


def narrow_bytes(case: Case, name: str) -> int:
    """The output of all A of a linear."""
    return case.tokens * case.hidden_width(name) * case.compute


def sums_bytes(case: Case) -> int:
    """Flash attention's logsumexp."""
    return 4 * case.geometry.num_heads * case.tokens if case.attention == "flash" else 0


class Tiles:
    """How engine/tiles.py cuts documents of one length, off flash attention.

    `whole`: documents of a group that is computed together, 0 where one is too long for that.
    """

    def __init__(self, case: Case) -> None:
        g, self.case = case.geometry, case
        self.length = min(case.length, case.tokens)
        self.documents = max(1, case.tokens // self.length)
        area = g.num_heads * self.length**2
        self.whole = min(self.documents, SCORES // area)
        self.queries, self.keys = self.length, self.length
        if not self.whole:
            window = min(self.length, g.sliding_window or self.length)
            reach = min(self.length, 2 * window)
            step = max(1, min(window, SCORES // (g.num_heads * reach)))
            stops = [(at, min(self.length, at + step)) for at in range(0, self.length, step)]
            blocks = [(stop - at, stop - max(0, at - window + 1)) for at, stop in stops]
            self.queries, self.keys = max(blocks, key=lambda block: block[0] * block[1])

    @property
    def count(self) -> int:
        return max(1, self.whole)

    @property
    def scores(self) -> int:
        """Bytes of one tile's scores."""
        return self.count * self.case.geometry.num_heads * self.queries * self.keys * self.case.compute

    def rows(self, size: int, tokens: int) -> int:
        """Of `size`, bytes that all tokens have, those of so many in each document of a tile."""
        return size // self.case.tokens * self.count * tokens

    @property
    def kept(self) -> int:
        """What the layers of a pass share: each group's places and bias."""
        if self.case.attention == "flash" or not self.whole:
            return 0
        shares = self.case.geometry.num_heads // self.case.geometry.num_kv_heads
        groups = -(-self.documents // self.whole)
        return 8 * self.case.tokens + groups * shares * self.length**2 * self.case.compute

    @property
    def bias(self) -> int:
        """Of one block, made for it: int64 distances and what is seen come and go before it."""
        if self.whole:
            return 0
        shares = self.case.geometry.num_heads // self.case.geometry.num_kv_heads
        return shares * self.queries * self.keys * self.case.compute


class NativeLayer:
    """One layer on a tape. The layer's input and the gradient of its output are the caller's."""

    def __init__(self, case: Case, tape: Tape) -> None:
        self.case, self.tape, self.tiles = case, tape, Tiles(case)

    # Forward

    def forward(self, *, keeps: bool) -> None:
        """Leaves the output; with `keeps`, what is saved too, else what is not is freed on the way."""
        case, tape = self.case, self.tape
        masks = self._masks()
        self._attend()
        dropped = 0 if keeps else 2 * case.query + 2 * case.key + sums_bytes(case)
        tape.free(dropped, 0 if keeps else self._narrow("qkv_proj", "o_proj"))
        self._feed_forward()
        tape.free(0 if keeps else case.state + 2 * case.wide + self._narrow(*INTERMEDIATE), masks)

    def _attend(self) -> None:
        """Leaves qkv, the attention's output, the sum with the residual, both A's outputs."""
        case, tape = self.case, self.tape
        self._norm()
        self._linear("qkv_proj")
        tape.free(case.state)
        self._rotate()
        self._attention()
        self._linear("o_proj")

    def _feed_forward(self) -> None:
        """Leaves the output, gate_up_proj's, both A's outputs."""
        case, tape = self.case, self.tape
        self._norm()
        tape.stage = "gate_up_proj"
        self._narrowed("gate_up_proj")
        self._product("gate_up_proj", 2 * case.wide)
        tape.stage = "SwiGLU"
        tape.new(case.wide)
        tape.stage = "down_proj"
        self._narrowed("down_proj", dropped=case.wide)
        weight, scales = self._weight("down_proj")
        tape.new(weight, scales)
        tape.free(scales)
        tape.new(case.state)
        self._widen("down_proj")
        tape.free(weight, case.wide, case.state)

    def _norm(self) -> None:
        """Leaves the output."""
        case, tape = self.case, self.tape
        tape.stage = "norm"
        scale, wide = self._normed()
        if case.compute != 4:
            tape.new(case.state)
            tape.free(wide)
        tape.free(scale)

    def _normed(self) -> tuple[int, int]:
        """Leaves a scale per token and the input over its length, in float32; returns their bytes."""
        case, tape = self.case, self.tape
        scale, wide = 4 * case.tokens, 4 * case.tokens * case.geometry.hidden_size
        tape.new(wide if case.compute != 4 else 0)
        tape.passing(wide, scale)  # the squares
        tape.new(scale, 0 if case.compute != 4 else wide)
        return scale, wide

    def _rotate(self) -> None:
        """Half of the dimensions that turn."""
        self.tape.stage = "RoPE"
        turning = (self.case.query + self.case.key) * self.case.geometry.rotary_fraction
        self.tape.passing(int(turning) // 2)

    def _linear(self, name: str) -> None:
        """Leaves the output, and A's."""
        self.tape.stage = name
        self._narrowed(name)
        self._product(name, self._output(name))

    def _product(self, name: str, out: int) -> None:
        weight, scales = self._weight(name)
        self.tape.new(weight, scales)
        self.tape.free(scales)
        self.tape.new(out)
        if name == "gate_up_proj":  # a local of the caller's until B is through
            self._widen(name)
            self.tape.free(weight)
            return
        self.tape.free(weight)
        self._widen(name)

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

    def _widen(self, name: str) -> None:
        """A copy of the largest B, where it is cast."""
        self.tape.passing(self._b_copy(name))

    def _b_copy(self, name: str) -> int:
        if not self.case.adapted(name) or self.case.compute == 4:
            return 0
        shapes = map(self.case.geometry.pair_shape, self.case.parts(name))
        return max(num_out for num_out, _ in shapes) * self.case.rank * self.case.compute

    def _weight(self, name: str) -> tuple[int, int]:
        """The weight as it is multiplied with, and what only making it takes; none where it is not packed."""
        whole = dequantized_bytes(self.case.recipe, self.case.geometry, name)
        if not whole:
            return 0, 0
        rows, columns = self.case.geometry.linear_shape(name)
        weight = rows * columns * self.case.compute
        return weight, whole - weight

    def _attention(self) -> None:
        """Leaves the output. Source: engine/tiles.py."""
        case, tape, tiles = self.case, self.tape, self.tiles
        tape.stage = "attention"
        tape.new(case.query, sums_bytes(case))
        if case.attention == "flash":
            return
        held = tape.new(tiles.bias) + self._taken()
        tape.new(tiles.scores)
        tape.passing(tiles.scores)  # the softmax is another
        found = tape.new(tiles.rows(case.query, tiles.queries))
        tape.free(tiles.scores)
        tape.passing(found)  # in the order of tokens
        tape.free(found, held)

    def _taken(self) -> int:
        """Leaves a tile's queries, keys and values by heads; returns their bytes.

        Copied are several heads of several documents, and queries that share keys.
        """
        case, tape, tiles = self.case, self.tape, self.tiles
        size = tiles.rows(case.query + 2 * case.key, tiles.length) if tiles.whole else 0
        if tiles.count > 1 and case.geometry.num_kv_heads > 1:
            tape.passing(size, size)
            return tape.new(size)
        return tape.new(size, tiles.rows(case.query, tiles.queries) if case.grouped else 0)

    # Backward

    def backward(self, *, recomputes: bool) -> None:
        """From the gradient of the output, which stays to the end, to that of the input.

        `recomputes`: the first half is computed again from the input; otherwise what was kept is there, and
        not counted.
        """
        case, tape = self.case, self.tape
        tape.new(case.state)
        self._masks()
        if recomputes:
            self._attend()
        self._feed_backward(recomputes=recomputes)
        self._attend_backward()

    def _feed_backward(self, *, recomputes: bool) -> None:
        """Leaves the gradient of the sum, and those of both adapters."""
        case, tape = self.case, self.tape
        self._norm()
        tape.stage = "down_proj's backward"
        if recomputes:
            self._narrowed("gate_up_proj")
        narrow = self._narrow(*INTERMEDIATE)
        self._narrow_backward("down_proj")
        weight, scales = self._weight("gate_up_proj")
        tape.new(weight, scales)
        tape.free(scales)
        if recomputes:
            tape.new(2 * case.wide)
            self._widen("gate_up_proj")
        down, scales = self._weight("down_proj")
        tape.new(down, scales)
        tape.free(scales)
        tape.new(case.wide)
        tape.free(down)
        self._input_backward("down_proj", case.wide)
        tape.stage = "SwiGLU's backward"
        inner = case.wide if case.adapted("down_proj") else 0
        tape.new(case.wide, inner)
        tape.free(2 * case.wide)  # silu(gate), and the gradient of what came out
        if inner and recomputes:
            self._narrowed("down_proj", dropped=case.wide)
        self._a_backward("down_proj")
        tape.free(inner)
        tape.stage = "gate_up_proj's backward"
        self._b_backward("gate_up_proj")
        self._narrow_backward("gate_up_proj")
        tape.new(case.state)
        tape.free(2 * case.wide if recomputes else 0, weight)
        self._b_backward("down_proj")
        self._a_backward("gate_up_proj")
        self._input_backward("gate_up_proj", case.state)
        self._norm_backward()
        # h, its gradient, both dz; kept, A's outputs go when `second` does
        tape.free(2 * case.state, narrow, narrow if recomputes else 0)

    def _attend_backward(self) -> None:
        """Leaves the gradient of the input, and those of both adapters."""
        case, tape = self.case, self.tape
        tape.stage = "o_proj's backward"
        self._linear_backward("o_proj", case.query)
        self._attention_backward()
        tape.free(case.query)
        self._rotate()
        self._norm()
        tape.stage = "qkv_proj's backward"
        self._linear_backward("qkv_proj", case.state)
        tape.free(case.query + 2 * case.key, case.state)
        self._norm_backward()

    def _linear_backward(self, name: str, size: int) -> None:
        """Leaves the input's gradient, of so many bytes, and the adapter's."""
        self._narrow_backward(name)
        self._b_backward(name)
        self._a_backward(name)
        weight, scales = self._weight(name)
        self.tape.new(weight, scales)
        self.tape.free(scales)
        self.tape.new(size)
        self.tape.free(weight)
        self._input_backward(name, size)
        self.tape.free(self._narrow(name))

    def _narrow_backward(self, name: str) -> None:
        """Leaves the gradient of A's output."""
        self.tape.new(self._narrow(name))
        self.tape.passing(self._b_copy(name))

    def _b_backward(self, name: str) -> None:
        """Leaves the gradients of B; a product of the largest passes by."""
        if self.case.adapted(name):
            shapes = list(map(self.case.geometry.pair_shape, self.case.parts(name)))
            self.tape.new(4 * self.case.rank * sum(num_out for num_out, _ in shapes))
            self.tape.passing(max(num_out for num_out, _ in shapes) * self.case.rank * self.case.compute)

    def _a_backward(self, name: str) -> None:
        """Leaves the gradients of A."""
        case, tape = self.case, self.tape
        if not case.adapted(name):
            return
        elements = case.hidden_width(name) * case.geometry.linear_shape(name)[1]
        made = tape.new(elements * case.compute)
        tape.passing(self._input(name) if case.dropout else 0)
        tape.new(4 * elements if case.compute != 4 else 0)
        tape.free(made if case.compute != 4 else 0)

    def _input_backward(self, name: str, size: int) -> None:
        """A's part of a gradient of so many bytes; dropout makes it apart."""
        if self.case.adapted(name):
            copies = self._a_copies(name)
            self.tape.passing(copies, size if self.case.dropout else 0)

    def _norm_backward(self) -> None:
        """Leaves the gradient of the input."""
        case, tape = self.case, self.tape
        tape.stage = "norm's backward"
        scale, wide = self._normed()
        half = case.compute != 4
        tape.new(case.state)
        if half:
            tape.new(wide)
            tape.free(case.state)
        tape.passing(wide, scale)
        tape.new(scale)
        tape.new(case.state if half else 0)
        tape.free(wide, scale, scale, wide if half else 0)

    def _attention_backward(self) -> None:
        """Leaves the gradient of qkv."""
        case, tape, tiles = self.case, self.tape, self.tiles
        tape.stage = "attention's backward"
        size = case.query + 2 * case.key
        if case.attention == "flash":
            tape.new(size)
            tape.passing(size)
            return
        tape.new(size)
        summed = (
            0 if tiles.whole else tape.new(2 * 4 * tiles.length * (case.key // case.tokens) // case.compute)
        )
        held = tape.new(tiles.bias) + self._taken()
        queries, keys = tiles.rows(case.query, tiles.queries), tiles.rows(case.key, tiles.keys)
        copies = tiles.count > 1 or case.grouped
        tape.passing(queries if tiles.whole else 0, queries if copies else 0)
        held += tape.new(queries if copies or tiles.whole else 0)
        tape.new(tiles.scores)
        tape.passing(tiles.scores)
        tape.new(keys, tiles.scores)
        tape.new(tiles.scores)
        tape.free(tiles.scores)
        tape.new(queries, keys)
        tape.free(2 * tiles.scores)
        tape.free(0 if tiles.whole else held)
        tape.passing(queries + 2 * keys if tiles.whole else 0)
        tape.free(held if tiles.whole else 0, queries, 2 * keys, summed)

    # Both

    def _masks(self) -> int:
        """Dropout's, drawn one after the other; returns their bytes."""
        case, tape, found = self.case, self.tape, 0
        if not case.dropout:
            return 0
        for name in target_linears(case.recipe):
            elements = case.tokens * case.geometry.linear_shape(name)[1]
            tape.passing(8 * elements, elements)
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
