"""What one full pass of a run's own data really takes, beside what was predicted for it.

Owns the comparison and its wording. Which rows make the pass, and that nothing of it stays, is the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from .case import Case
from .engine.documents import Documents
from .engine.loss import IGNORE
from .phases import Phase, pass_phase
from .phi3 import Geometry
from .recipe import Recipe
from .tracked import TrackedBytes, model_tensors
from .units import format_bytes

NAMED_DRIFT: Final = 0.05
"""Share of the prediction above which a report names the parts it can come from."""

KINDS: Final = {
    "allocated": "bytes of CUDA's allocator at their highest",
    "tracked": "bytes of all tensors alive at once, operation by operation",
}
"""Kind of the measurement -> what it counts."""


@dataclass(frozen=True)
class Calibration:
    """One forward and backward without optimizer states. Units: tokens; bytes at the fullest moment.

    `measured_parts`: the same by what the tensors are; empty where only the sum is known.
    """

    pass_tokens: int
    longest_row_tokens: int
    supervised_tokens: int
    predicted: Phase
    measured_bytes: int
    kind: str
    measured_parts: dict[str, int]

    @property
    def drift(self) -> float:
        """Share of the prediction that was measured beyond it; below zero: less was."""
        return self.measured_bytes / self.predicted.peak_bytes - 1

    def to_json(self) -> dict[str, Any]:
        return {
            "pass_tokens": self.pass_tokens,
            "longest_row_tokens": self.longest_row_tokens,
            "supervised_tokens": self.supervised_tokens,
            "predicted_bytes": self.predicted.peak_bytes,
            "predicted_parts": [part.to_json() for part in self.predicted.parts],
            "measured_bytes": self.measured_bytes,
            "measured_parts": self.measured_parts,
            "kind": self.kind,
            "covers": KINDS[self.kind],
            "drift": self.drift,
        }

    def notes(self) -> list[str]:
        """A sentence where the prediction was off, with the parts that can be why and those that cannot."""
        if abs(self.drift) <= NAMED_DRIFT:
            return []
        measured, predicted = format_bytes(self.measured_bytes), format_bytes(self.predicted.peak_bytes)
        how = f"{abs(self.drift):.0%} {'more' if self.drift > 0 else 'less'} than the {predicted} predicted"
        sentence = (
            f"a full pass of {self.pass_tokens} tokens took {measured}, {how}: not by {self._named(True)}"
        )
        return [f"{sentence}, which are exact; by {self._named(False)}, which are replayed"]

    def _named(self, exact: bool) -> str:
        parts = [part for part in self.predicted.parts if (part.kind == "exact") == exact]
        return ", ".join(f"{part.name} {format_bytes(part.num_bytes)}" for part in parts)


def compare(
    recipe: Recipe, geometry: Geometry, model: Any, documents: Documents, work: Callable[[], object]
) -> Calibration:
    """Run `work`, a forward and backward of `documents` through `model`, and compare what it takes."""
    device = documents.input_ids.device
    longest, supervised = int(documents.bounds.diff().max()), int((documents.labels != IGNORE).sum())
    kind: Any = "cuda" if device.type == "cuda" else "cpu"
    alone = recipe.settled(effective_batch=1)  # a step of its own: there are no gradients before it
    case = Case(alone, geometry, documents.num_tokens, longest, kind, counted=supervised)
    measured, parts = _allocated(work, device) if kind == "cuda" else _tracked(work, model, documents)
    return Calibration(
        pass_tokens=documents.num_tokens,
        longest_row_tokens=longest,
        supervised_tokens=supervised,
        predicted=pass_phase(case),
        measured_bytes=measured,
        kind="allocated" if kind == "cuda" else "tracked",
        measured_parts=parts,
    )


def _allocated(work: Callable[[], object], device: torch.device) -> tuple[int, dict[str, int]]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device)), {}


def _tracked(work: Callable[[], object], model: Any, documents: Documents) -> tuple[int, dict[str, int]]:
    tracked = TrackedBytes()
    tracked.claim("rows", (documents.input_ids, documents.labels, documents.position_ids))
    tracked.claim("weights", model_tensors(model))
    tracked.claim("adapters", (p for p in model.parameters() if p.requires_grad))
    tracked.start()
    with tracked:
        work()
    parts = {"gradients and activations": tracked.at_peak.pop("activations", 0), **tracked.at_peak}
    return sum(parts.values()), parts
