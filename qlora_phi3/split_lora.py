"""LoRA with an A/B pair of its own for each projection of a fused linear.

Owns the two modules that stand in PEFT's layers in place of the fused pair. To everybody else they are that
pair: `weight`, and what a state dict holds, are the stacked A and the block-diagonal B, so that merging and
saving are plain PEFT. What is trained are the blocks, each a parameter with gradients and optimizer states of
its own: there is nothing off the diagonal that could drift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .layouts.blocks import Pair, slices, stack


class _Blocks(nn.Module):
    """A parameter for each trained projection; in a state dict, one matrix for all projections.

    `sizes` are the output rows of every projection, `trained` says which have a block.
    """

    def __init__(self, rank: int, sizes: Sequence[int], trained: Sequence[bool], num_in: int) -> None:
        super().__init__()
        self.rank, self.sizes, self.trained, self.num_in = rank, tuple(sizes), tuple(trained), num_in

    @property
    def blocks(self) -> list[torch.Tensor]:
        """Parameters of the trained projections, in the order of the fused linear."""
        return list(self.parameters(recurse=False))

    @property
    def weight(self) -> torch.Tensor:
        """What a fused pair would hold."""
        raise NotImplementedError

    def parts(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The block of every projection, trained or not, in a matrix like `weight`."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *others: Any, **settings: Any
    ) -> None:
        missing, errors = others[2], others[4]
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing.append(f"{prefix}weight")
        elif weight.shape != self.weight.shape:
            errors.append(f"{prefix}weight is {list(weight.shape)}, not {list(self.weight.shape)}.")
        else:
            self._load(weight, prefix, errors)

    def _load(self, weight: torch.Tensor, prefix: str, errors: list[str]) -> None:
        parts = [part for part, on in zip(self.parts(weight), self.trained, strict=True) if on]
        with torch.no_grad():
            for block, part in zip(self.blocks, parts, strict=True):
                block.copy_(part)
        if not torch.equal(self.weight, weight.to(self.weight)):
            errors.append(f"{prefix}weight has values outside the blocks that are trained.")


class StackedA(_Blocks):
    """The A of every trained projection, applied at once.

    Shape: x (..., in) -> (..., k*rank) for k trained projections; `weight` is (n*rank, in), with zero rows
        for those of the n projections that are not trained.
    """

    def __init__(self, rank: int, sizes: Sequence[int], trained: Sequence[bool], num_in: int) -> None:
        super().__init__(rank, sizes, trained, num_in)
        for i in range(sum(trained)):
            block = nn.Parameter(torch.empty(rank, num_in))
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))  # as PEFT and loralib do
            self.register_parameter(f"block_{i}", block)

    @property
    def weight(self) -> torch.Tensor:
        blocks = iter(self.blocks)
        nothing = torch.zeros_like(self.blocks[0])
        return torch.cat([next(blocks) if on else nothing for on in self.trained])

    def parts(self, weight: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.split(weight, self.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, torch.cat(self.blocks))


class DiagonalB(_Blocks):
    """The B of every trained projection, each fed by its own A; zero at first.

    Shape: x (..., k*rank) -> (..., out), zero where a projection is not trained; `weight` is block-diagonal,
        (out, n*rank).
    """

    def __init__(self, rank: int, sizes: Sequence[int], trained: Sequence[bool], num_in: int) -> None:
        super().__init__(rank, sizes, trained, num_in)
        used = (size for size, on in zip(sizes, trained, strict=True) if on)
        for i, size in enumerate(used):
            self.register_parameter(f"block_{i}", nn.Parameter(torch.zeros(size, rank)))

    @property
    def weight(self) -> torch.Tensor:
        blocks = iter(self.blocks)
        pairs = [self._pair(next(blocks)) if on else None for on in self.trained]
        return stack(pairs, self.sizes).b

    def parts(self, weight: torch.Tensor) -> list[torch.Tensor]:
        a = weight.new_zeros(weight.shape[1], 1)
        return [part.b for part in slices(Pair(a, weight, 1.0), self.sizes)]

    def _pair(self, block: torch.Tensor) -> Pair:
        return Pair(block.new_zeros(self.rank, 1), block, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs, blocks = iter(torch.split(x, self.rank, dim=-1)), iter(self.blocks)
        parts = [
            functional.linear(next(inputs), next(blocks)) if on else x.new_zeros(*x.shape[:-1], size)
            for size, on in zip(self.sizes, self.trained, strict=True)
        ]
        return torch.cat(parts, dim=-1)


def blocks(module: Any) -> list[torch.Tensor]:
    """What is trained of an A or B: the blocks of a split one, or its weight.

    PEFT's embeddings have parameters in the place of modules.
    """
    if isinstance(module, nn.Parameter):
        return [module]
    return module.blocks if isinstance(module, _Blocks) else [module.weight]


def split(layer: Any, rank: int, sizes: Sequence[int], trained: Sequence[bool]) -> None:
    """Put blocks of `rank` into a PEFT layer that was made for `len(sizes)` times the rank."""
    fused_a, fused_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert fused_a.shape[0] == len(sizes) * rank
    assert fused_b.shape[0] == sum(sizes)
    for found, kind in ((layer.lora_A, StackedA), (layer.lora_B, DiagonalB)):
        made = kind(rank, sizes, trained, fused_a.shape[1])
        found["default"] = made.to(device=fused_a.device, dtype=fused_a.dtype)
