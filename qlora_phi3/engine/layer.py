"""A Phi-3 decoder layer as one autograd function that owns what it keeps and what it computes again.

Owns the native engine's arithmetic: forward, and a backward that recomputes what its policy did not keep.
The output of down_proj is never computed twice, since no backward needs it, and a weight that is dequantized
for recomputing serves the gradient as well. Weights and adapters are read in place from PEFT's modules.
The reference is transformers' Phi3DecoderLayer with PEFT's linears under autocast.

Refused, by `why_not`: what the arithmetic here does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..kernels import rms_norm, rope, swiglu
from . import tiles
from .linear import Gradients, Linear, Span, draw
from .policy import Keep
from .tiles import Group, Heads, Run

Here = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Norm:
    """A layer's norm."""

    weight: torch.Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight, module.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm.forward(x, self.weight, self.eps)

    def backward(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return rms_norm.backward(grad, x, self.weight, self.eps)


@dataclass(frozen=True)
class Layer:
    """What one decoder layer computes with, and in slices of how many of its intermediate columns."""

    before: Norm
    qkv: Linear
    o: Linear
    between: Norm
    gate_up: Linear
    down: Linear
    intermediate: int
    slice_columns: int
    sliced: bool
    here: Here = nullcontext
    """Has the frozen weights on the device, in a backward."""

    @classmethod
    def of(cls, module: Any, slice_columns: int | None = None, here: Here = nullcontext) -> Layer:
        """Of transformers' layer with PEFT's linears in it, as they are now."""
        attention, mlp = module.self_attn, module.mlp
        intermediate = module.config.intermediate_size
        return cls(
            Norm.of(module.input_layernorm),
            Linear.of(attention.qkv_proj),
            Linear.of(attention.o_proj),
            Norm.of(module.post_attention_layernorm),
            Linear.of(mlp.gate_up_proj),
            Linear.of(mlp.down_proj),
            intermediate,
            slice_columns or intermediate,
            slice_columns is not None,
            here,
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What is trained, linear by linear."""
        return tuple(parameter for linear in self.linears for parameter in linear.parameters)

    @property
    def slices(self) -> list[Span]:
        """Of the intermediate columns, computed one after the other."""
        step = self.slice_columns
        return [(at, min(at + step, self.intermediate)) for at in range(0, self.intermediate, step)]

    def rows(self, columns: Span) -> list[Span]:
        """Those of gate_up_proj that make these intermediate columns; of all of them one span."""
        start, stop = columns
        if stop - start == self.intermediate:
            return [(0, 2 * self.intermediate)]
        return [(start, stop), (self.intermediate + start, self.intermediate + stop)]

    def groups(self, run: Run) -> list[Group]:
        """Of heads, computed one after the other."""
        return run.head_groups if self.sliced else run.all_heads

    def draw(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """Dropout's masks of all linears, in the order that PEFT draws them."""
        return [draw(linear, len(x), x.device) for linear in self.linears]


@dataclass
class Attended:
    """The first half of a layer: its tensors, up to the sum with the residual.

    Shape: qkv (tokens, size) with positions, None where heads were computed in groups; state (tokens,
        hidden_size), z's (tokens, ranks); `out` is what tiles.forward returns, o_proj's input first, () where
        nobody asked for it.
    """

    qkv: torch.Tensor | None
    out: tuple[torch.Tensor, ...]
    state: torch.Tensor
    z_qkv: torch.Tensor | None
    z_o: torch.Tensor | None


def attend(
    layer: Layer,
    x: torch.Tensor,
    run: Run,
    masks: Sequence[torch.Tensor | None],
    out: tuple[torch.Tensor, ...] = (),
    *,
    leaves_out: bool,
) -> Attended:
    """From the layer's input to the sum with the residual; `out`: the attention's, where it was kept."""
    groups, h = layer.groups(run), layer.before.forward(x)
    z_qkv, z_o = layer.qkv.narrow(h, masks[0]), None
    qkv = state = None
    made: list[tuple[torch.Tensor, ...]] = []
    for group in groups:
        qkv, part = None, _heads_of_group(out, group)  # gone before the next is there
        if not part or group.whole:
            qkv = torch.mm(h, layer.qkv.weight(h.dtype, rows=group.rows).T)
            _finish_qkv_(layer, qkv, z_qkv, group, run)
        if group is groups[-1]:
            del h
        if not part:
            assert qkv is not None
            part = tiles.forward(qkv, group.run or run)
        if leaves_out and not out:
            made.append(part)
        columns = None if group.whole else group.columns
        z_o = _plus(z_o, _narrow_part(layer.o, part[0], masks[1], columns))
        weight = layer.o.weight(x.dtype, columns=columns)
        state = torch.mm(part[0], weight.T) if state is None else state.addmm_(part[0], weight.T)
        del weight, part
    assert state is not None
    state = layer.o.widen_(state, z_o).add_(x)
    return Attended(qkv if groups[-1].whole else None, out or _joined(made), state, z_qkv, z_o)


def _finish_qkv_(layer: Layer, qkv: torch.Tensor, z: torch.Tensor | None, group: Group, run: Run) -> None:
    """Add the adapter's part to a group's queries, keys and values, and give them positions."""
    layer.qkv.widen_(qkv, z, group.rows)
    rope.rotate_((group.run or run).heads.turning(qkv), run.cos, run.sin)


def _heads_of_group(out: tuple[torch.Tensor, ...], group: Group) -> tuple[torch.Tensor, ...]:
    """A group's part of what tiles.forward returns of all heads."""
    if not out or group.whole:
        return out
    return out[0][:, slice(*group.columns)].contiguous(), *(sums[group.queries] for sums in out[1:])


def _joined(parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    if len(parts) < 2:
        return parts[0] if parts else ()
    outs, *sums = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), *(torch.cat(each) for each in sums)


def gate_and_up(
    layer: Layer, h: torch.Tensor, z: torch.Tensor | None, columns: Span, weight: torch.Tensor
) -> torch.Tensor:
    """gate_up_proj's output of these columns. Shape: (tokens, 2 * columns), gate first."""
    return layer.gate_up.widen_(torch.mm(h, weight.T), z, layer.rows(columns))


def feed_forward(
    layer: Layer, state: torch.Tensor, masks: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The layer's output, the last slice of gate_up_proj's, and both A's outputs."""
    h = layer.between.forward(state)
    z_gate_up = layer.gate_up.narrow(h, masks[2])
    out = z_down = gate_up = None
    for columns in layer.slices:
        rows, gate_up = layer.rows(columns), None  # gone before the next is there
        gate_up = gate_and_up(layer, h, z_gate_up, columns, layer.gate_up.weight(h.dtype, rows=rows))
        inner = swiglu.forward(*gate_up.chunk(2, dim=1))
        z_down = _plus(z_down, _narrow_part(layer.down, inner, masks[3], _columns(layer, columns)))
        weight = layer.down.weight(h.dtype, columns=_columns(layer, columns))
        out = torch.mm(inner, weight.T) if out is None else out.addmm_(inner, weight.T)
        del inner, weight
    assert out is not None and gate_up is not None
    return layer.down.widen_(out, z_down).add_(state), gate_up, z_gate_up, z_down


def feed_backward(
    layer: Layer,
    grad: torch.Tensor,
    state: torch.Tensor,
    masks: Sequence[torch.Tensor | None],
    gradients: Sequence[Gradients | None],
    kept: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None,
) -> torch.Tensor:
    """The gradient of `state` through the second half, from that of the layer's output.

    `kept`: gate_up_proj's output and both A's, where the forward kept them. The first is written over.
    """
    h = layer.between.forward(state)
    gate_up, z_gate_up, z_down = kept or (None, layer.gate_up.narrow(h, masks[2]), None)
    dz_down = layer.down.narrow_backward(grad)
    dh = dz = z_made = None
    for columns in layer.slices:
        rows, place = layer.rows(columns), _columns(layer, columns)
        part = None if kept is None else gate_up
        weight = layer.gate_up.weight(h.dtype, rows=rows)
        if part is None:
            part = gate_and_up(layer, h, z_gate_up, columns, weight)
        d_inner = torch.mm(grad, layer.down.weight(grad.dtype, columns=place))
        mask = _mask_part(masks[3], place)
        layer.down.input_backward_(d_inner, dz_down, mask, place)
        adapted = layer.down.lora is not None
        inner = swiglu.backward_(d_inner, *part.chunk(2, dim=1), product=adapted)
        del d_inner
        if inner is not None:
            if z_down is None:
                z_made = _plus(z_made, _narrow_part(layer.down, inner, masks[3], place))
            layer.down.a_backward(gradients[3], dz_down, inner, mask, place)
            del inner
        layer.gate_up.b_backward(gradients[2], part, z_gate_up, rows)
        dz = _plus(dz, layer.gate_up.narrow_backward(part, rows))
        dh = torch.mm(part, weight) if dh is None else dh.addmm_(part, weight)
        del part, weight
    assert dh is not None
    layer.down.b_backward(gradients[3], grad, z_made if z_down is None else z_down)
    layer.gate_up.a_backward(gradients[2], dz, h, masks[2])
    return layer.between.backward(layer.gate_up.input_backward_(dh, dz, masks[2]), state)


def attend_backward(
    layer: Layer,
    grad: torch.Tensor,
    x: torch.Tensor,
    found: Attended,
    run: Run,
    masks: Sequence[torch.Tensor | None],
    gradients: Sequence[Gradients | None],
    *,
    for_input: bool,
) -> torch.Tensor | None:
    """The gradient of the layer's input through the first half, where it is wanted, from that of its sum."""
    h = None if found.qkv is not None else layer.before.forward(x)
    dz_o, dz, dh = layer.o.narrow_backward(grad), None, None
    for group in layer.groups(run):
        columns, part = None if group.whole else group.columns, _heads_of_group(found.out, group)
        mask = _mask_part(masks[1], columns)
        layer.o.a_backward(gradients[1], dz_o, part[0], mask, columns)
        d_out = torch.mm(grad, layer.o.weight(grad.dtype, columns=columns))
        layer.o.input_backward_(d_out, dz_o, mask, columns)
        qkv, weight = found.qkv, None
        if qkv is None:
            assert h is not None
            weight = layer.qkv.weight(grad.dtype, rows=group.rows)
            qkv = torch.mm(h, weight.T)
            _finish_qkv_(layer, qkv, found.z_qkv, group, run)
        heads = group.run or run
        d_qkv = tiles.backward(d_out, qkv, part, heads)
        del d_out, qkv, part
        rope.rotate_(heads.heads.turning(d_qkv), run.cos, run.sin, back=True)
        layer.qkv.b_backward(gradients[0], d_qkv, found.z_qkv, group.rows)
        dz = _plus(dz, layer.qkv.narrow_backward(d_qkv, group.rows))
        if for_input:
            weight = layer.qkv.weight(grad.dtype, rows=group.rows) if weight is None else weight
            dh = torch.mm(d_qkv, weight) if dh is None else dh.addmm_(d_qkv, weight)
        del d_qkv, weight
    layer.o.b_backward(gradients[1], grad, found.z_o)
    h = layer.before.forward(x) if h is None else h
    layer.qkv.a_backward(gradients[0], dz, h, masks[0])
    del h
    return None if dh is None else layer.before.backward(layer.qkv.input_backward_(dh, dz, masks[0]), x)


class Function(torch.autograd.Function):
    """One layer. Shape: x (tokens, hidden_size), the output too; then the layer's parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, run: Run, keep: Keep, *parameters: torch.Tensor
    ) -> torch.Tensor:
        saves = any(ctx.needs_input_grad)
        keep = keep if saves else "input"
        with torch.autocast(x.device.type, enabled=False):
            ctx.random = _random_state(layer, x.device)
            masks = layer.draw(x)
            first = attend(layer, x, run, masks, leaves_out=keep != "input")
            state, kept = first.state, list[torch.Tensor | None](() if keep == "input" else first.out)
            half = [first.qkv, state, first.z_qkv, first.z_o] if keep == "all" else []
            del first
            out, *rest = feed_forward(layer, state, masks)
        ctx.layer, ctx.run, ctx.keep = layer, run, keep
        if keep == "all":
            kept = [*half, *rest, *kept]
        ctx.save_for_backward(*((x, *kept) if saves else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, run = ctx.layer, ctx.run
        x, *kept = ctx.saved_tensors
        grad = grads[0]
        gradients = [None if linear.lora is None else Gradients(linear.lora) for linear in layer.linears]
        with layer.here(), torch.autocast(x.device.type, enabled=False):
            masks = _draw_again(layer, x, ctx.random)
            if ctx.keep == "all":
                qkv, state, z_qkv, z_o, *second = kept[:7]
                found = Attended(qkv, tuple(kept[7:]), state, z_qkv, z_o)
            else:
                found, second = attend(layer, x, run, masks, tuple(kept), leaves_out=True), None
            del kept
            d_state = feed_backward(layer, grad, found.state, masks, gradients, second).add_(grad)
            del second
            wanted = ctx.needs_input_grad[0]
            dx = attend_backward(layer, d_state, x, found, run, masks, gradients, for_input=wanted)
        through = None if dx is None else dx.add_(d_state)
        of_parameters = [one for each in gradients if each is not None for one in each]
        return through, None, None, None, *of_parameters


class NormFunction(torch.autograd.Function):
    """The norm behind all layers, which saves its input as it is. Shape: x (tokens, hidden_size)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        with torch.autocast(x.device.type, enabled=False):
            return norm.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return ctx.norm.backward(grads[0], x), None


def why_not(config: Mapping[str, Any], method: str) -> str | None:
    """What of a config.json and a method this layer does not compute; None where it computes all."""
    if method == "dora":
        return "DoRA's lengths are not in it"
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f"its activation is silu, not {activation}"
    if config.get("resid_pdrop"):
        return "it drops nothing but adapters' inputs, and config.json says resid_pdrop"
    return None


def heads_of(config: Any) -> Heads:
    """Source: transformers 5.23 modeling_phi3.py, Phi3Attention."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads, config.num_key_value_heads, width)


def _columns(layer: Layer, columns: Span) -> Span | None:
    """None for all: the weight is then taken whole."""
    return None if columns == (0, layer.intermediate) else columns


def _mask_part(mask: torch.Tensor | None, columns: Span | None) -> torch.Tensor | None:
    return mask if mask is None or columns is None else mask[:, slice(*columns)]


def _narrow_part(
    linear: Linear, inner: torch.Tensor, mask: torch.Tensor | None, columns: Span | None
) -> torch.Tensor | None:
    """What these columns of a linear's input give to the output of its A."""
    if linear.lora is None:
        return None
    a = linear.lora.all_a(inner.dtype)
    a = a if columns is None else a[:, slice(*columns)]
    return torch.mm(linear.dropped(inner, _mask_part(mask, columns)), a.T)


def _plus(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    return part if total is None or part is None else total.add_(part)


def _random_state(layer: Layer, device: torch.device) -> torch.Tensor | None:
    """Of the generator that dropout draws from, where any is drawn."""
    if not any(linear.lora is not None and linear.lora.dropout for linear in layer.linears):
        return None
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _draw_again(layer: Layer, x: torch.Tensor, state: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """The masks of the forward; the generator goes on from where it is."""
    if state is None:
        return [None] * 4
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if x.device.type == "cuda":
            torch.cuda.set_rng_state(state, x.device)
        else:
            torch.set_rng_state(state)
        return layer.draw(x)
