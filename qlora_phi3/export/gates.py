"""The gate between writing an export and giving it its name: does a real consumer compute what was trained?

Owns the prompts, what happens on drift, and what is said where no consumer is here. How it is measured is
the parity module's matter.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .. import data, model
from ..errors import InputError, RunError
from . import destination
from .options import Say
from .source import Source

NUM_PROMPTS: Final = 4
FALLBACK: Final = ("Hello! Who are you?", "Name three colours.", "What is 2 + 3?")
"""What is asked where there are no held-out rows."""


class Gates:
    """The gate for several exports of one source: the live model is loaded once, when it is first needed."""

    def __init__(self, source: Source, say: Say) -> None:
        self._source, self._say = source, say
        self._live: Any = None

    def check(self, target: str, partial: Path, folder: Path) -> dict[str, Any]:
        """What the gate found, which is in parity.json of the unfinished folder too.

        Raises:
            RunError: drift -> `<folder>.failed` keeps parity.json, and the export is removed.
        """
        found = self._measure(target, partial)
        destination.write_json(partial / destination.PARITY, found)
        if found["passed"] or found["skipped"]:
            return found
        failed = destination.keep_failed(partial, folder)
        reason = f"{found['consumer']} does not compute what was trained: {found['first_difference']}."
        raise RunError(f"{target}: {failed / destination.PARITY}", reason, "The export was removed.")

    def _measure(self, target: str, partial: Path) -> dict[str, Any]:
        parity = _optional("parity")
        if parity is None:
            return {"target": target, "passed": False, "skipped": "this version has no parity gate"}
        if self._live is None:
            self._live = parity.Live.of(self._source, self._say)
        consumers = _optional("consumers")
        consumer, control = consumers.open_pair(target, self._source, partial)
        self._say(f"comparing it in {consumer.name}")
        found: dict[str, Any] = parity.gate(
            target, self._live, consumer, control, prompts(self._source)
        ).to_json()
        return {"skipped": None, **found}


def prompts(source: Source) -> list[list[dict[str, Any]]]:
    """Messages to answer: the beginnings of held-out conversations, else a few questions of ours."""
    recipe = source.recipe
    if recipe is not None and recipe.data.eval is not None:
        try:
            splits = data.load(recipe.data, model.load_tokenizer(source.checkpoint.folder))
        except InputError:
            splits = None  # the gate asks its own questions; the merge report says why
        if splits is not None and splits.eval is not None:
            found = splits.eval.conversations[:NUM_PROMPTS]
            if found:
                return [one.to_template(one.last_answer) for one in found]
    return [[{"role": "user", "content": text}] for text in FALLBACK]


def _optional(name: str) -> Any:
    """A module of this package, or None where this version has none of the name."""
    full = f"{__package__}.{name}"
    return importlib.import_module(full) if importlib.util.find_spec(full) else None


def summary(found: dict[str, Any]) -> str:
    """One line of what the gate found."""
    if found.get("skipped"):
        return f"not gated: {found['skipped']}"
    kl: Sequence[Any] = [found.get("kl_mean")]
    return f"gated in {found['consumer']}: KL {kl[0]:.3g}, greedy agreement {found['greedy_agreement']:.0%}"
