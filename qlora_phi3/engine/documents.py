"""Rows of tokens as one long row without padding, and how many of them pass through the model together.

Owns the layout of a forward pass. What is in an optimizer step is the trainer's matter: however its rows are
laid out, the sums over their tokens are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import TokenRow
from ..data.packing import best_fit
from ..recipe import Recipe
from .attention import NAME
from .loss import IGNORE


@dataclass(frozen=True)
class Documents:
    """Rows one behind the other; positions begin at 0 in each.

    Shape: input_ids, labels, position_ids (1, T) int64; bounds (rows + 1,) int32 on the CPU: 0, and where
        each row ends. A row's first label is IGNORE: nothing in its own row predicts it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[TokenRow], device: torch.device) -> Documents:
        ids = [torch.as_tensor(row.input_ids, dtype=torch.int64) for row in rows]
        labels = [torch.as_tensor(row.labels, dtype=torch.int64).clone() for row in rows]
        for label in labels:
            label[:1] = IGNORE
        positions = [torch.arange(len(row)) for row in ids]
        row = [torch.cat(parts).unsqueeze(0).to(device) for parts in (ids, labels, positions)]
        ends = [0, *accumulate(map(len, ids))]
        return cls(row[0], row[1], row[2], torch.tensor(ends, dtype=torch.int32))

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


def hidden_states(causal: Any, documents: Documents) -> torch.Tensor:
    """The last hidden states of a Phi3ForCausalLM, each document alone.

    Shape: returns (1, T, hidden_size).
    """
    assert causal.config._attn_implementation == NAME, "any other attention would mix the documents"
    # a mask of four dimensions is passed on as it is; any other would be made into [S, S]
    no_mask = torch.empty(1, 1, 1, 1, device=documents.input_ids.device)
    out = causal.model(
        input_ids=documents.input_ids,
        position_ids=documents.position_ids,
        attention_mask=no_mask,
        use_cache=False,
        documents=documents.bounds,
    )
    found: torch.Tensor = out.last_hidden_state
    return found


def original_context(causal: Any) -> int | None:
    """Longest document that gets LongRoPE's factors for short contexts; None where there is one set."""
    rope = causal.config.rope_parameters
    longrope = rope["rope_type"] == "longrope"
    return int(rope["original_max_position_embeddings"]) if longrope else None


@dataclass(frozen=True)
class Layout:
    """How the rows of a step are laid out in passes: the arguments of `passes`."""

    micro_batch: int
    pack_into: int | None
    context: int | None

    @classmethod
    def of(cls, recipe: Recipe, causal: Any) -> Layout:
        pack_into = recipe.data.max_length if recipe.data.packing else None
        return cls(int(recipe.train.micro_batch), pack_into, original_context(causal))

    def cut(self, rows: Sequence[TokenRow]) -> list[list[TokenRow]]:
        lengths = [len(row.input_ids) for row in rows]
        found = passes(lengths, self.micro_batch, pack_into=self.pack_into, context=self.context)
        return [[rows[i] for i in group] for group in found]

    def fullest(self, lengths: NDArray[np.int64], effective_batch: int) -> list[int]:
        """Numbers of rows of such lengths that make a pass as full as a step can have it.

        The longest rows, and when they are packed, the next longest that still fit. Whether they meet in a
        step is chance; no step's longest document is longer, and without packing no pass is fuller. Packed,
        others can be fuller by less than a row.
        """
        beyond = lengths > (self.context or lengths.max())
        sides = [np.flatnonzero(side) for side in (~beyond, beyond) if side.any()]
        found = [self._filled(lengths, side, effective_batch) for side in sides]
        return max(found, key=lambda rows: int(lengths[rows].sum()))

    def _filled(self, lengths: NDArray[np.int64], rows: NDArray[np.int64], most: int) -> list[int]:
        ordered = rows[np.argsort(-lengths[rows], kind="stable")]
        if self.pack_into is None:
            return [int(row) for row in ordered[: self.micro_batch]]
        room, chosen = self.micro_batch * self.pack_into, [int(ordered[0])]
        room -= int(lengths[ordered[0]])
        for row in ordered[1:]:
            if len(chosen) == most or room < lengths[ordered[-1]]:
                break
            if lengths[row] <= room:
                chosen.append(int(row))
                room -= int(lengths[row])
        return chosen


def passes(
    lengths: Sequence[int], micro_batch: int, *, pack_into: int | None = None, context: int | None = None
) -> list[list[int]]:
    """Indices of the rows of one optimizer step that go through the model together.

    `micro_batch` rows at a time, or with `pack_into` as many as fit into `micro_batch` rows of that many
    tokens. LongRoPE chooses its factors by the longest document of a pass, so rows within and beyond its
    original `context` never share one.
    """
    sides = [
        [i for i, n in enumerate(lengths) if (context is not None and n > context) == far]
        for far in (False, True)
    ]
    return [
        [side[i] for i in group]
        for side in sides
        for group in _groups([lengths[i] for i in side], micro_batch, pack_into)
    ]


def _groups(lengths: Sequence[int], micro_batch: int, pack_into: int | None) -> list[list[int]]:
    if pack_into is None:
        indices = list(range(len(lengths)))
        return [indices[at : at + micro_batch] for at in range(0, len(indices), micro_batch)]
    return best_fit(lengths, micro_batch * pack_into)
