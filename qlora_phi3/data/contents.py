"""The text of a row or a message: a string, or parts of text as models that see pictures take them.

Owns what counts as text, and how what is none is told. Refuses parts that are no text, half characters, and
parts of which nobody knows what stands between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

from ..errors import DataError, shown

TEXTS: Final = ("content", "value", "text", "parts")
"""Keys that hold what a message says: OpenAI's, ShareGPT's, OpenAssistant's and Gemini's."""

_NO_WIDTH: Final = " \t\r\n\f\v\xa0\u3000\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\xad"
_TEXT_PARTS: Final = ("text", "input_text", "output_text")


def read_text(row: Mapping[str, Any], key: str, place: str, whose: str = "row") -> str:
    """The text under `key`.

    Raises:
        DataError: missing, not text, or with half a character.
    """
    value = row.get(key)
    if isinstance(value, dict) and whose == "message" and carries_parts(value):  # Gemini's system message
        value = next(value[name] for name in ("parts", "content") if name in value)
    if isinstance(value, list) and value and whose == "message":
        value = _joined(value, key, place)
    if not isinstance(value, str):
        found = f"{kind(value)}, not text" if value is not None and value == value else "missing"
        raise DataError(place, f"{key} is {found}.", f"Give the text of the {whose}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = f"{key} has half a character: {value[error.start]!r}."
        remedy = "It was cut inside an emoji: mend the text, or remove the row."
        raise DataError(place, reason, remedy) from None
    return value


def is_blank(text: str) -> bool:
    """Whether nothing can be seen of a text: blanks of all scripts, and characters without a width."""
    return not text.strip() or not (text.isascii() or text.strip(_NO_WIDTH))


def carries_parts(value: Mapping[str, Any]) -> bool:
    """Whether an object is only a wrapper around text: `{"role": "system", "parts": [...]}`."""
    return bool({"parts", "content"} & set(value)) and set(value) <= {"role", "parts", "content"}


def _joined(parts: list[Any], key: str, place: str) -> str:
    """The text of a message that is written in parts, as for models that see pictures too.

    Raises:
        DataError: another part than text, or parts of which nobody knows what stands between them.
    """
    texts = [_part(part, key, place) for part in parts]
    for before, after in pairwise(texts):
        if not (before[-1:].isspace() or after[:1].isspace()):
            reason = f"{key} has several parts of text without a blank or a new line between them."
            raise DataError(place, reason, "Join them into one text.")
    return "".join(texts)


def _part(part: Any, key: str, place: str) -> str:
    if isinstance(part, str):
        return part
    shape = part.get("type", "text") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if shape in _TEXT_PARTS and isinstance(text, str):
        return text
    if isinstance(part, dict) and "type" not in part and "text" not in part:  # Gemini's and Bedrock's
        shape = next(iter(part), None)
    found = f"a part of type {shown(shape)}" if shape else f"{kind(part)} as a part"
    reason = f"{key} has {found}, and only parts of text can be read."
    raise DataError(place, reason, 'Write {"type": "text", "text": "..."}, or plain text.')


def kind(value: Any) -> str:
    """What a value is, in JSON's words where it has them."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    words = {
        "dict": "an object",
        "list": "a list",
        "str": "text",
        "int": "a number",
        "float": "a number",
        "bytes": "bytes",
    }
    return words.get(type(value).__name__, f"of type {type(value).__name__}")
