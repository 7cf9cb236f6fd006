"""How a refusal of a recipe is worded: what was found, what is needed, what was probably meant.

Owns the sentences for pydantic's errors, the nearest names, and the walk over all keys. Knows no file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from .errors import MAX_SHOWN
from .recipe import Data, Model, Recipe, Source
from .recipe_aliases import ALIASES, SENTENCES, VALUES
from .strict_yaml import quote

Part = type[BaseModel] | None


def keys(part: type[BaseModel], prefix: str) -> Iterable[tuple[str, str, str]]:
    """(dotted key, default as YAML, help text) of every key below a part."""
    for name, info in part.model_fields.items():
        parts = set(_parts(info.annotation))
        if len(parts) == 1:
            yield from keys(parts.pop(), f"{prefix}{name}.")
        else:
            default = "*required*" if info.is_required() else f"`{show(info.default)}`"
            yield f"{prefix}{name}", default, info.description or ""


def _parts(annotation: Any) -> Iterable[type[BaseModel]]:
    """The parts that an annotation names, inside unions and tuples too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def word(error: ErrorDetails, owner: Part, below: Part) -> tuple[str, str]:
    """Reason and remedy of one pydantic error."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    found, name = show(value), str(error["loc"][-1])
    if kind == "extra_forbidden" and owner:
        return "unknown key.", meant_key(name, owner) or _listed(owner.model_fields)
    if kind == "missing" and owner:
        return f"is missing: {owner.model_fields[name].description}.", _ADD.get(name, "Add it.")
    if kind == "not_available":
        today = ", ".join(show(value) for value in context.get("today", ()))
        return f"{found} is not available yet.", context.get("hint") or f"Today: {today}."
    if kind == "declined":
        return f"{found} {error['msg']}.", join(context["instead"], _listed(context["allowed"]))
    if kind in ("literal_error", "target"):
        allowed = context.get("allowed") or re.findall(r"'([^']*)'", context["expected"])
        what = error["msg"] if kind == "target" else "is not allowed"
        hint = _meant_value(value, allowed) or nearest(str(value), context.get("known", allowed))
        return f"{found} {what}.", join(hint, _listed(allowed))
    needs = _NEEDS[kind].format(**context) if kind in _NEEDS else error["msg"]
    if _is_quoted(kind, value):
        return f"found the text {found}, {needs}.", "Remove the quotes."
    return f"found {found}, {needs}.", _how_to_write(kind, value, below)


_ADD: Final = {
    "version": "Add the line `version: 1`.",
    "name": "Add a line such as `name: my-run`.",
    "data": "Add a line such as `data: {train: {path: chats.jsonl}}`.",
    "train": "Add it, as in `data: {train: {path: chats.jsonl}}`.",
    "path": "Add it, as in `path: chats.jsonl`.",
}
"""Key that every recipe has -> how to write it."""

_SHORT: Final[dict[type[BaseModel], str]] = {
    Source: "{{path: {}}}",
    Data: "{{train: {{path: {}}}}}",
    Model: "{{base: {}}}",
}
"""Part -> how it is written where people write its chief value alone."""


def _how_to_write(kind: str, value: Any, below: Part) -> str:
    if kind == "model_type" and below:
        split = _colon(value) if isinstance(value, str) else None
        if split is not None and split[0] in below.model_fields:
            return f"Put a space after the colon: `{split[0]}: {split[1]}`."
        if isinstance(value, str) and below in _SHORT and 0 < len(value) <= MAX_SHOWN and "\n" not in value:
            plain = value if re.fullmatch(r"[\w./~-]+", value) else quote(value)
            return f"Write {_SHORT[below].format(plain)}."
        return f"They are {', '.join(below.model_fields)}."
    if kind == "tuple_type" and isinstance(value, str):
        return f"Write [{value}]."
    if kind == "string_type" and isinstance(value, (int, float)):
        return "Quote it."
    if kind == "bool_type" and str(value).lower() in ("yes", "on", "no", "off"):
        return f"Write {'true' if str(value).lower() in ('yes', 'on') else 'false'}."
    return ""


_NEEDS: Final = {
    "int_type": "needs a whole number",
    "float_type": "needs a number",
    "bool_type": "needs true or false",
    "string_type": "needs text",
    "tuple_type": "needs a list",
    "finite_number": "needs a finite number",
    "model_type": "needs keys of its own",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' or '-', and begin with a letter or digit",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
}
"""Kind of a pydantic error -> what the key needs; any other kind keeps pydantic's words."""

_QUOTED: Final = {
    "int_type": r"[-+]?\d+",
    "float_type": r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?",
    "bool_type": r"true|false",
    "expected": r"\d+|true|false",
}
"""Kind -> text that would have been right without its quotes."""


def _is_quoted(kind: str, value: Any) -> bool:
    fits = isinstance(value, str) and kind in _QUOTED
    return fits and re.fullmatch(_QUOTED[kind], value, re.ASCII | re.IGNORECASE) is not None


def meant_key(name: str, owner: type[BaseModel] = Recipe) -> str:
    """The same name in another part, another trainer's name for ours, or the nearest in this part."""
    every = [key for key, _, _ in keys(Recipe, "")]
    homes = [key for key in every if key.split(".")[-1] == name]
    if homes and "." in homes[0]:
        return f"It belongs to {homes[0].rpartition('.')[0]}: {homes[0]}."
    if homes or name in Recipe.model_fields:
        return "It belongs to the top level."
    split = _colon(name)
    if split is not None and split[0] in owner.model_fields:
        return f"Put a space after the colon: `{split[0]}: {split[1]}`."
    plain = name.lower().replace("-", "_")
    if plain in SENTENCES:
        return SENTENCES[plain]
    if plain in ALIASES:
        return f"Here that is {ALIASES[plain]}."
    return nearest(name, owner.model_fields)


def dotted_key(name: str) -> str | None:
    """The key that a name means: `train.epochs`, `epochs`, or another trainer's name of it."""
    plain = name.lower().replace("-", "_")
    every = [key for key, _, _ in keys(Recipe, "")]
    whole = [key for key in every if plain in (key, key.rpartition(".")[2])]
    last = plain.rpartition(".")[2]
    if whole or last in ALIASES:
        return whole[0] if whole else ALIASES[last]
    return name if plain.partition(".")[0] in Recipe.model_fields and "." in plain else None


def _colon(text: str) -> tuple[str, str] | None:
    """What `key:value`, written without a space, was to be."""
    key, colon, value = text.partition(":")
    return (key, value[:MAX_SHOWN]) if colon and value and re.fullmatch(r"[A-Za-z_]+", key) else None


def _meant_value(value: Any, allowed: Iterable[str]) -> str:
    meant = VALUES.get(value.lower()) if isinstance(value, str) else None
    return f"Did you mean {meant!r}?" if meant is not None and meant in allowed else ""


def nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:MAX_SHOWN], list(names), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""


def _listed(names: Iterable[str]) -> str:
    return f"Allowed: {', '.join(names)}."


def join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def show(value: Any) -> str:
    """A value as it would stand in the YAML, shortened; text always in quotes."""
    if isinstance(value, str):
        text = repr(value[: 2 * MAX_SHOWN])
    else:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        text = text.strip().removesuffix("...").strip()
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
