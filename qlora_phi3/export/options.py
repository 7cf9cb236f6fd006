"""What an export can be asked for: the targets by name, and what each of them may be told.

Owns the names, and which option belongs to which target. Refuses an option that would be passed over in
silence. Knows nothing of torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from ..errors import InputError, Problem, shown
from ..recipe_values import EXPORTS, QUANTIZER_KIND

Say = Callable[[str], None]

MergeBase = Literal["dequant", "original"]
PeftLayout = Literal["fused", "split", "unfused"]
Dtype = Literal["bf16", "fp16"]

TARGETS: Final = (*EXPORTS, "hub")
MERGED: Final = ("merged", "gguf", "ollama")
"""Targets with the adapter in the weights, gguf of any kind."""

LAYOUTS: Final[tuple[PeftLayout, ...]] = get_args(PeftLayout)
MERGE_BASES: Final = ("auto", *get_args(MergeBase))
OLLAMA_KINDS: Final = tuple(name.removeprefix("gguf:") for name in EXPORTS if name.startswith("gguf:"))


@dataclass(frozen=True)
class Options:
    """What targets may be told; None where a target's own default holds."""

    layout: PeftLayout | None = None
    merge_base: Literal["auto", "dequant", "original"] = "auto"
    dtype: Dtype = "bf16"
    kind: str = "q8_0"
    num_ctx: int | None = None
    repo: str | None = None
    what: Literal["adapter", "merged"] = "adapter"
    dry_run: bool = False
    gate: bool = True


BELONGS: Final = {
    "layout": ("adapter",),
    "merge_base": MERGED,
    "dtype": ("merged",),
    "kind": ("ollama",),
    "num_ctx": ("ollama",),
    "repo": ("hub",),
    "what": ("hub",),
    "dry_run": ("hub",),
    "gate": tuple(dict.fromkeys(name.partition(":")[0] for name in EXPORTS)),
}
"""Option -> the targets that heed it."""

_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "layout": LAYOUTS,
    "merge_base": MERGE_BASES,
    "dtype": get_args(Dtype),
    "kind": OLLAMA_KINDS,
    "what": ("adapter", "merged"),
}


def check(targets: Sequence[str], given: dict[str, object]) -> Options:
    """The options as given on the command line, where they and the targets make sense together.

    Raises:
        InputError: an unknown target or value, with the nearest one; an option for none of the targets; a
            target named twice; no repository for the hub.
    """
    problems = [_unknown("--to", name, TARGETS) for name in targets if name not in TARGETS]
    if len(set(targets)) < len(targets):
        problems.append(Problem("--to", f"names a target twice: {', '.join(targets)}.", "Keep one."))
    kinds = {family(name) for name in targets}
    for name, value in given.items():
        option = flag(name)
        if problems == [] and not kinds & set(BELONGS[name]):
            reason = f"is for {' and '.join(BELONGS[name])}, not for {', '.join(targets)}."
            problems.append(Problem(option, reason, "Leave it out, or add the target with --to."))
        if name in _CHOICES and value not in _CHOICES[name]:
            problems.append(_unknown(option, str(value), _CHOICES[name]))
    if "hub" in targets and not given.get("repo"):
        problems.append(Problem("--repo", "is missing: where to on the hub.", "Write --repo you/name."))
    if problems:
        raise InputError.of(problems)
    return Options(**given)  # type: ignore[arg-type]  # checked just above


def family(target: str) -> str:
    """A target without the kind behind its colon."""
    return target.partition(":")[0]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _unknown(place: str, value: str, allowed: Sequence[str]) -> Problem:
    if QUANTIZER_KIND.fullmatch(value):
        kind = value.rpartition(":")[2].upper()
        reason = f"{shown(value)} is a kind that llama.cpp's own quantizer makes, and no Python package."
        remedy = f"Export gguf:f16, then run `llama-quantize NAME-f16.gguf NAME.gguf {kind}`."
        return Problem(place, reason, remedy)
    close = ["gguf:q8_0"] if value == "gguf" else difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return Problem(place, f"{shown(value)} is unknown.", f"{meant}Allowed: {', '.join(allowed)}.")
