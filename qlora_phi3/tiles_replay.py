"""The native attention's operations replayed on a tape that only adds and subtracts bytes.

Owns what engine/tiles.py allocates while it runs, in its order, for documents of one length. No torch.
"""

from __future__ import annotations

from .case import SCORES, Case
from .tape import Tape


def sums_bytes(case: Case) -> int:
    """Flash attention's logsumexp."""
    return 4 * case.geometry.num_heads * case.tokens if case.attention == "flash" else 0


class Tiles:
    """How engine/tiles.py cuts documents of one length, off flash attention, with so many key heads at once.

    `whole`: documents of a group that is computed together, 0 where one is too long for that. `query` and
    `key` are bytes of what these heads have.
    """

    def __init__(self, case: Case, num_kv_heads: int) -> None:
        g, self.case = case.geometry, case
        self.shares = g.num_heads // g.num_kv_heads
        self.heads = num_kv_heads
        self.query = case.query // g.num_kv_heads * num_kv_heads
        self.key = case.key // g.num_kv_heads * num_kv_heads
        self.length = min(case.length, case.tokens)
        self.documents = max(1, case.tokens // self.length)
        heads = self.shares * num_kv_heads
        self.whole = min(self.documents, SCORES // (heads * self.length**2))
        self.queries, self.keys = self.length, self.length
        if not self.whole:
            window = min(self.length, g.sliding_window or self.length)
            reach = min(self.length, 2 * window)
            step = max(1, min(window, SCORES // (heads * reach)))
            stops = [(at, min(self.length, at + step)) for at in range(0, self.length, step)]
            blocks = [(stop - at, stop - max(0, at - window + 1)) for at, stop in stops]
            self.queries, self.keys = max(blocks, key=lambda block: block[0] * block[1])

    @property
    def count(self) -> int:
        return max(1, self.whole)

    @property
    def scores(self) -> int:
        """Bytes of one tile's scores."""
        return self.count * self.shares * self.heads * self.queries * self.keys * self.case.compute

    def rows(self, size: int, tokens: int) -> int:
        """Of `size`, bytes that all tokens have, those of so many in each document of a tile."""
        return size // self.case.tokens * self.count * tokens

    @property
    def kept(self) -> int:
        """What the layers of a pass share: each group's places and bias."""
        if self.case.attention == "flash" or not self.whole:
            return 0
        groups = -(-self.documents // self.whole)
        return 8 * self.case.tokens + groups * self.shares * self.length**2 * self.case.compute

    @property
    def bias(self) -> int:
        """Of one block, made for it: int64 distances and what is seen come and go before it."""
        return 0 if self.whole else self.shares * self.queries * self.keys * self.case.compute

    def forward(self, tape: Tape) -> None:
        """Leaves the output."""
        case = self.case
        tape.stage = "attention"
        tape.new(self.query, sums_bytes(case) * self.query // case.query)
        if case.attention == "flash":
            return
        held = tape.new(self.bias) + self._taken(tape)
        tape.new(self.scores)
        tape.passing(self.scores)  # the softmax is another
        found = tape.new(self.rows(self.query, self.queries))
        tape.free(self.scores)
        tape.passing(found)  # in the order of tokens
        tape.free(found, held)

    def backward(self, tape: Tape) -> None:
        """Leaves the gradient of qkv."""
        case = self.case
        tape.stage = "attention's backward"
        size = self.query + 2 * self.key
        if case.attention == "flash":
            tape.new(size)
            tape.passing(size)
            return
        tape.new(size)
        summed = (
            0 if self.whole else tape.new(2 * 4 * self.length * (self.key // case.tokens) // case.compute)
        )
        held = tape.new(self.bias) + self._taken(tape)
        queries, keys = self.rows(self.query, self.queries), self.rows(self.key, self.keys)
        copies = self.count > 1 or case.grouped
        tape.passing(queries if self.whole else 0, queries if copies else 0)
        held += tape.new(queries if copies or self.whole else 0)
        tape.new(self.scores)
        tape.passing(self.scores)
        tape.new(keys, self.scores)
        tape.new(self.scores)
        tape.free(self.scores)
        tape.new(queries, keys)
        tape.free(2 * self.scores)
        tape.free(0 if self.whole else held)
        tape.passing(queries + 2 * keys if self.whole else 0)
        tape.free(held if self.whole else 0, queries, 2 * keys, summed)

    def _taken(self, tape: Tape) -> int:
        """Leaves a tile's queries, keys and values by heads; returns their bytes.

        Copied are several heads of several documents, and queries that share keys.
        """
        case = self.case
        size = self.rows(self.query + 2 * self.key, self.length) if self.whole else 0
        if self.count > 1 and self.heads > 1:
            tape.passing(size, size)
            return tape.new(size)
        return tape.new(size, self.rows(self.query, self.queries) if case.grouped else 0)


def shared_bytes(case: Case) -> int:
    """What the layers of a pass share of documents' places and biases, for every number of heads at once."""
    sizes = set(case.head_groups) if case.kept_layers < case.geometry.num_layers else set()
    sizes |= {case.geometry.num_kv_heads} if case.kept_layers else set()
    return sum(Tiles(case, size).kept for size in sizes)
