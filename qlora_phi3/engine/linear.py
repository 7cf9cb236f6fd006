"""A frozen linear with the adapter on it, forward and backward written out.

Owns how PEFT's modules are read: weights and adapters stay theirs and are looked up at each pass, so that
what is saved, merged or loaded is plain PEFT. LoRA is computed in the dtype of the states, as under autocast:
y = x W^T + scale (x A^T) B^T, where each part of a fused linear may have an A and a B of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..kernels import nf4
from ..split_lora import DiagonalB, blocks

Span = tuple[int, int]


@dataclass(frozen=True)
class Lora:
    """The pairs of one linear: all of A on the same input, each B on rows [start, stop) of the output.

    Shape: a[i] (rank, in), b[i] (stop - start, rank), spans[i] those rows.
    """

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    spans: tuple[Span, ...]
    scale: float
    dropout: float

    @classmethod
    def of(cls, layer: Any) -> Lora:
        """Of PEFT's layer, with our split modules in it or its own."""
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        if isinstance(b, DiagonalB):
            ends = [sum(b.sizes[: i + 1]) for i in range(len(b.sizes))]
            each = zip(ends, b.sizes, b.trained, strict=True)
            spans = tuple((end - size, end) for end, size, on in each if on)
        else:
            spans = ((0, len(b.weight)),)
        dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
        return cls(tuple(blocks(a)), tuple(blocks(b)), spans, layer.scaling["default"], dropout)

    @property
    def rank(self) -> int:
        return len(self.a[0])

    def all_a(self, dtype: torch.dtype) -> torch.Tensor:
        """Shape: (pairs * rank, in)."""
        return (self.a[0] if len(self.a) == 1 else torch.cat(self.a)).to(dtype)

    def narrow(self, z: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each pair's columns of A's output."""
        return torch.split(z, self.rank, dim=1)

    def overlaps(self, taken: Sequence[Span]) -> Iterator[tuple[int, slice, slice]]:
        """(pair, rows of its B, columns of the output) where only rows `taken` of the linear are computed.

        They lie one behind the other in that output.
        """
        at = 0
        for first, last in taken:
            for pair, (start, stop) in enumerate(self.spans):
                low, high = max(first, start), min(last, stop)
                if low < high:
                    yield pair, slice(low - start, high - start), slice(low - first + at, high - first + at)
            at += last - first


class Gradients:
    """Of one linear's adapter, while they are gathered. Shape: those of its pairs, in float32."""

    def __init__(self, lora: Lora) -> None:
        self.a: list[torch.Tensor | None] = [None] * len(lora.a)
        self.b: list[torch.Tensor | None] = [None] * len(lora.b)

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        yield from self.a
        yield from self.b


@dataclass(frozen=True)
class Linear:
    """One of a layer's four, as it is now."""

    base: Any
    lora: Lora | None

    @classmethod
    def of(cls, module: Any) -> Linear:
        adapted = hasattr(module, "lora_A") and "default" in module.lora_A
        return cls(getattr(module, "base_layer", module), Lora.of(module) if adapted else None)

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What is trained, in the order of Gradients."""
        return () if self.lora is None else (*self.lora.a, *self.lora.b)

    def weight(
        self, dtype: torch.dtype, *, rows: Sequence[Span] | None = None, columns: Span | None = None
    ) -> torch.Tensor:
        """The base's, of it the rows or the columns asked for.

        Shape: (out, in); of several spans of rows one behind the other.
        """
        weight: torch.Tensor = self.base.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            if rows is not None:
                return _rows([weight[start:stop] for start, stop in rows])
            return weight if columns is None else weight[:, slice(*columns)]
        return nf4.dequantize(weight.data, state, rows=rows, columns=columns).to(dtype)

    # The adapter's part; without one nothing happens

    def dropped(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The adapter's input."""
        if mask is None or self.lora is None:
            return x
        return x.mul(mask).mul_(1 / (1 - self.lora.dropout))

    def narrow(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """A's output. Shape: x (tokens, in) -> (tokens, pairs * rank)."""
        if self.lora is None:
            return None
        return torch.mm(self.dropped(x, mask), self.lora.all_a(x.dtype).T)

    def widen_(
        self, y: torch.Tensor, z: torch.Tensor | None, taken: Sequence[Span] | None = None
    ) -> torch.Tensor:
        """Add scale z B^T to the output, or to the rows of it that are there; returns it."""
        if self.lora is None:
            return y
        assert z is not None
        parts = self.lora.narrow(z)
        for pair, rows, columns in self.lora.overlaps(taken or ((0, y.shape[1]),)):
            b = self.lora.b[pair][rows].to(y.dtype)
            y[:, columns].addmm_(parts[pair], b.T, alpha=self.lora.scale)
        return y

    def narrow_backward(self, grad: torch.Tensor, taken: Sequence[Span] | None = None) -> torch.Tensor | None:
        """The gradient of A's output, of the rows that are there. Shape: (tokens, pairs * rank)."""
        if self.lora is None:
            return None
        found = grad.new_zeros(len(grad), len(self.lora.a) * self.lora.rank)
        parts = self.lora.narrow(found)
        for pair, rows, columns in self.lora.overlaps(taken or ((0, grad.shape[1]),)):
            b = self.lora.b[pair][rows].to(grad.dtype)
            parts[pair].addmm_(grad[:, columns], b, alpha=self.lora.scale)
        return found

    def b_backward(
        self,
        gradients: Gradients | None,
        grad: torch.Tensor,
        z: torch.Tensor | None,
        taken: Sequence[Span] | None = None,
    ) -> None:
        """Note the gradient of B's rows that the output's gradient is there of."""
        if self.lora is None or gradients is None:
            return
        assert z is not None
        parts = self.lora.narrow(z)
        for pair, rows, columns in self.lora.overlaps(taken or ((0, grad.shape[1]),)):
            found = gradients.b[pair]
            if found is None:
                found = gradients.b[pair] = torch.zeros_like(self.lora.b[pair])
            found[rows] = torch.mm(grad[:, columns].T, parts[pair]).mul_(self.lora.scale)

    def a_backward(
        self,
        gradients: Gradients | None,
        dz: torch.Tensor | None,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        columns: Span | None = None,
    ) -> None:
        """Note the gradient of A, or of its columns that the input is there of."""
        if self.lora is None or gradients is None:
            return
        assert dz is not None
        whole = torch.mm(dz.T, self.dropped(x, mask)).to(self.lora.a[0].dtype)
        for pair, part in enumerate(torch.split(whole, self.lora.rank)):
            if columns is None:
                gradients.a[pair] = part
                continue
            found = gradients.a[pair]
            if found is None:
                found = gradients.a[pair] = torch.zeros_like(self.lora.a[pair])
            found[:, slice(*columns)] = part

    def input_backward_(
        self,
        dx: torch.Tensor,
        dz: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        columns: Span | None = None,
    ) -> torch.Tensor:
        """Add what comes back through A to the input's gradient, or to that of its columns; returns it."""
        if self.lora is None:
            return dx
        assert dz is not None
        a = self.lora.all_a(dx.dtype)
        a = a if columns is None else a[:, slice(*columns)]
        if mask is None:
            return dx.addmm_(dz, a)
        return dx.add_(torch.mm(dz, a).mul_(mask), alpha=1 / (1 - self.lora.dropout))

    # Both

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The output, and A's. Shape: x (tokens, in) -> (tokens, out), (tokens, pairs * rank)."""
        z = self.narrow(x, mask)
        return self.widen_(torch.mm(x, self.weight(x.dtype).T), z), z

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        z: torch.Tensor | None,
        gradients: Gradients | None,
        mask: torch.Tensor | None = None,
        *,
        for_input: bool = True,
    ) -> torch.Tensor | None:
        """The input's gradient where it is wanted; the adapter's are noted."""
        dz = self.narrow_backward(grad)
        self.b_backward(gradients, grad, z)
        self.a_backward(gradients, dz, x, mask)
        if not for_input:
            return None
        return self.input_backward_(torch.mm(grad, self.weight(grad.dtype)), dz, mask)


def draw(linear: Linear, tokens: int, device: torch.device) -> torch.Tensor | None:
    """Where dropout leaves the adapter's input, drawn as `functional.dropout` draws it for PEFT.

    Shape: (tokens, in) bool.
    """
    if linear.lora is None or not linear.lora.dropout:
        return None
    ones = torch.ones(tokens, linear.lora.a[0].shape[1], device=device)
    return functional.dropout(ones, linear.lora.dropout) != 0


def _rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
