"""The model card: what an adapter or a merged model is, from what it came, and how to load it.

Owns its content. Refuses nothing; paths of this machine become names, since a card is for others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

from .. import strict_yaml
from ..pages import template

LIBRARIES: Final = {
    "merged": "transformers",
    "gguf": "gguf",
    "gguf-lora": "gguf",
    "ollama": "gguf",
    "mlx": "mlx",
}
"""Target -> what the hub calls the library that loads it; PEFT the others."""


@dataclass(frozen=True)
class About:
    """What a card says beside the run's report: the target, the merge report, the gate, the base's licence.

    `local`: it stays in its run folder, where the base's own path is what its code needs. `limits`: from
    where on the target's program computes otherwise.
    """

    target: str
    name: str
    base: str
    details: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    licence: str | None = None
    local: bool = False
    limits: Sequence[str] = ()


def render(report: Mapping[str, Any] | None, about: About) -> str:
    """The card's text; `report` is a run's report.json, None of an adapter without one."""
    family = about.target.partition(":")[0]
    public = without_paths(report) if report is not None else None
    recipe = strict_yaml.dump(public["recipe"]) if public is not None else ""
    return template("card.md.j2").render(
        report=public,
        about=about,
        base=about.base if about.local else public_text(about.base),
        family=family,
        library=LIBRARIES.get(family, "peft"),
        recipe=recipe,
        merge=about.details.get("merge"),
    )


def without_paths(value: Any) -> Any:
    """The same with the last part in place of every absolute path."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return public_text(value) if isinstance(value, str) else value


def public_text(text: str) -> str:
    """A path of this machine by its last part; any other text as it is."""
    if "\n" not in text and PurePosixPath(text).is_absolute():
        return PurePosixPath(text).name or text
    if "\n" not in text and PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name or text
    return text
