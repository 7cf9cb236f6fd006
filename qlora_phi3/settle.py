"""`auto` replaced by what fits here: the settled recipe, its plan, and what a user should know of both.

Owns how much memory a run may use on this device. What would be fastest in it is memory.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from . import data, memory, notes, weights
from .errors import FitError, RecipeError
from .recipe import Recipe
from .units import format_bytes, parse_bytes


def settle(
    recipe: Recipe,
    checkpoint: weights.Checkpoint,
    splits: data.Splits,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Recipe, memory.Plan, list[str]]:
    """Replace `auto` by what fits and say so, predict its memory, and note what a user should know."""
    row_tokens = max(split.longest for split in (splits.train, splits.eval) if split is not None)
    known = splits.train.rows.fullest_step(recipe.train.effective_batch)
    usable, kind = memory.usable_bytes(allowed_bytes(recipe, device)), device_kind(device)
    way = memory.Ways(recipe, checkpoint.geometry, known=known, device=kind).fastest(usable)
    told = []
    chosen_host = recipe.memory.host == "auto" and bool(way.host)
    if chosen_host or "auto" in (recipe.train.activations, recipe.train.micro_batch):
        told.append(way.of(usable))
        say(told[0])
    recipe = recipe.settled(**way.keys)
    plan = memory.predict(
        recipe,
        checkpoint.geometry,
        micro_batch=way.micro_batch,
        row_tokens=row_tokens,
        known=known,
        device=kind,
    )
    _hold_to_budget(recipe, plan, device)
    return recipe, plan, told + notes.of_settings(recipe, splits, device)


def device_kind(device: torch.device) -> Literal["cuda", "cpu"]:
    return "cuda" if device.type == "cuda" else "cpu"


def free_bytes(device: torch.device) -> int:
    """Memory that a run may use now: free on the GPU, or available to the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def allowed_bytes(recipe: Recipe, device: torch.device) -> int:
    """Memory that a run may use: what is free, and no more than the budget leaves beside context or imports.

    Raises:
        RecipeError: the budget is more than the device has.
    """
    free = free_bytes(device)
    if recipe.memory.budget == "auto":
        return free
    budget, total = parse_bytes(recipe.memory.budget), total_bytes(device)
    if budget > total:
        reason = f"{recipe.memory.budget} is more than the {format_bytes(total)} of this {device.type}."
        raise RecipeError("memory.budget", reason, "Lower it, or write auto.")
    on_cpu = memory.IMPORTS_BYTES + memory.HEAP_BYTES
    beside = memory.CONTEXT_BYTES if device.type == "cuda" else on_cpu
    return max(0, min(free, budget - beside))


def total_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of the computer."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    import psutil

    return int(psutil.virtual_memory().total)


def _hold_to_budget(recipe: Recipe, plan: memory.Plan, device: torch.device) -> None:
    """Refuse a plan above the budget, and let CUDA's allocator refuse what the plan did not foresee.

    Raises:
        FitError: the plan needs more than the budget.
    """
    if recipe.memory.budget == "auto":
        return
    budget = parse_bytes(recipe.memory.budget)
    if plan.needed_bytes > budget:
        reason = f"the run needs {format_bytes(plan.needed_bytes)}, the budget is {recipe.memory.budget}."
        raise FitError("memory.budget", reason, "The plan command's --vram says which keys to change.")
    if device.type == "cuda":
        share = (budget - memory.CONTEXT_BYTES) / total_bytes(device)
        torch.cuda.set_per_process_memory_fraction(share, device)
