"""What each decoder layer keeps for its backward, as a recipe says. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..case import keeps_attention, kept_layers
from ..recipe import Recipe

Keep = Literal["all", "attention", "input"]
"""What a layer keeps for its backward: all that is computed with weights; the attention's output, beside the
input; or the input alone."""


@dataclass(frozen=True)
class Policy:
    """What is kept layer by layer.

    `parks`: inputs that are all a layer keeps are in host memory meanwhile. `slice_columns`: intermediate
    columns that a layer which recomputes has at once, None for all.
    """

    keeps: tuple[Keep, ...]
    parks: bool = False
    slice_columns: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, num_layers: int) -> Policy:
        """Of a settled recipe. The last layers keep: their backward comes first, and theirs is gone when the
        others begin to recompute."""
        kept, train = kept_layers(recipe, num_layers), recipe.train
        rest: tuple[Keep, ...] = ("attention" if keeps_attention(recipe) else "input",)
        columns = train.slice_columns if isinstance(train.slice_columns, int) else None
        last: tuple[Keep, ...] = ("all",)
        return cls(rest * (num_layers - kept) + last * kept, train.activations == "offload", columns)
