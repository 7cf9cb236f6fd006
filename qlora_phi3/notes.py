"""What a run's report says beside its figures, in sentences: what was left out, and what had no effect.

Owns these sentences; what was found in the rows is the doctor's.
"""

from __future__ import annotations

import torch

from . import data
from .recipe import Recipe


def of_settings(recipe: Recipe, splits: data.Splits, device: torch.device) -> list[str]:
    """On keys that do nothing on this device, rows that did not fit, and what was not measured."""
    notes = []
    optimizer, chosen = recipe.train.optimizer, "optimizer" in recipe.train.model_fields_set
    if device.type == "cpu" and optimizer.startswith("paged") and chosen:
        notes.append(f"{optimizer}: on a CPU optimizer states stay where they are; paging needs CUDA")
    if device.type == "cpu" and recipe.train.activations == "offload":
        notes.append("layer inputs are copied and gain nothing by it on a CPU; offloading them needs CUDA")
    if device.type == "cpu" and recipe.memory.host:
        parts = " and ".join(recipe.memory.host)
        notes.append(f"{parts} in host memory: a CPU has no other, nothing is gained; it needs CUDA")
    rows, batch = len(splits.train.rows), recipe.train.effective_batch
    notes += _overlong_notes(splits.train, "training", recipe)
    if splits.eval is not None:
        notes += _overlong_notes(splits.eval, "held-out", recipe)
    if rows % batch:
        notes.append(f"the last step of an epoch has {rows % batch} rows instead of {batch}")
    if splits.eval is None:
        notes.append("data.eval is null: nothing was evaluated")
    elif recipe.evaluate.compares_answers and len(splits.eval.rows) < recipe.evaluate.samples:
        notes.append(
            f"only {len(splits.eval.rows)} held-out rows for evaluate.samples {recipe.evaluate.samples}"
        )
    return notes


def _overlong_notes(split: data.Split, which: str, recipe: Recipe) -> list[str]:
    """A sentence for each thing that happened to rows longer than data.max_length."""
    dropped, longer = split.num_dropped, "longer than data.max_length"
    notes = []
    if dropped and recipe.data.overlong == "drop":
        notes.append(f"{dropped} {which} rows were {longer} and dropped")
    elif dropped:
        what = "rows or exchanges" if recipe.data.overlong == "split" else "rows"
        notes.append(f"{dropped} {which} {what} were {longer} and dropped: no room for an answer to train on")
    if split.num_truncated:
        notes.append(f"{split.num_truncated} {which} rows were {longer} and truncated: their end is missing")
    if split.num_split:
        notes.append(f"{split.num_split} {which} rows were {longer} and split between turns")
    return notes
