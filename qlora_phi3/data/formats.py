"""Layouts of a row and how each becomes a conversation.

Owns what a conversation is, which keys a layout has, and every check of a row's shape. Refuses keys that
would change what is trained on, rather than leave them out. Knows nothing of files or tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import DataError

ROLES: Final = ("system", "user", "assistant")
SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """One row: its messages and the place it came from, `file:line` or `file: row N`."""

    messages: tuple[Message, ...]
    place: str

    @property
    def last_answer(self) -> int:
        """Index of the last assistant message."""
        return max(i for i, message in enumerate(self.messages) if message.role == "assistant")

    def to_template(self, stop: int | None = None) -> list[dict[str, str]]:
        """The first `stop` messages as a chat template takes them."""
        return [{"role": m.role, "content": m.content} for m in self.messages[:stop]]


@dataclass(frozen=True)
class Turn:
    """A message and the part of the row it was read from, for errors."""

    message: Message
    place: str


@dataclass(frozen=True)
class Format:
    """A layout: of each group of keys a row has one; `refused` keys would change what the row means."""

    keys: tuple[tuple[str, ...], ...]
    shape: str
    turns: Callable[[dict[str, Any], str], list[Turn]]
    refused: tuple[str, ...] = ()

    def missing(self, row: Any) -> list[str]:
        """The keys that `row` lacks, as they are told to the user."""
        lacks = [
            group for group in self.keys if not isinstance(row, dict) or not any(k in row for k in group)
        ]
        return [" or ".join(f"`{key}`" for key in group) for group in lacks]


def detect(row: Any, place: str) -> str:
    """Name of the format that the keys of `row` fit.

    Raises:
        DataError: they fit none, or several.
    """
    found = [name for name, format_ in FORMATS.items() if not format_.missing(row)]
    if len(found) > 1:
        reason = f"fits the formats {' and '.join(found)} (found {_found(row)})."
        raise DataError(place, reason, f"Choose one: data.train.format={found[0]}.")
    if found:
        return found[0]
    for name, keys in LATER.items():
        if isinstance(row, dict) and keys <= set(row):
            raise DataError(place, f"has format {name}, which is not available yet.", _REMEDY)
    raise DataError(place, f"has no format that is known (found {_found(row)}).", _hint(row) or _REMEDY)


def convert(row: Any, name: str, place: str) -> Conversation:
    """The conversation that a row of the format `name` holds.

    Raises:
        DataError: not of this shape, keys that would be lost, or no assistant turn to train on.
    """
    format_ = FORMATS[name]
    missing = format_.missing(row)
    if missing:
        reason = f"has no {' and no '.join(missing)} (found {_found(row)})."
        write = (
            "Write"
            if all(other.missing(row) for other in FORMATS.values())
            else "All rows need one format: write"
        )
        raise DataError(place, reason, _hint(row) or f"{write} {format_.shape}.")
    for key in (*REFUSED, *format_.refused):
        if _says_something(row.get(key)):
            remedy = "Remove it, if the row means the same without it."
            raise DataError(place, f"{key!r} is not available yet.", remedy)
    turns = format_.turns(row, place)
    _check_turns(turns, place)
    return Conversation(tuple(turn.message for turn in turns), place)


def _messages(row: dict[str, Any], place: str) -> list[Turn]:
    return [
        _turn(message, where, ("role", "content"), dict.fromkeys(ROLES))
        for message, where in _entries(row, "messages", place)
    ]


def _sharegpt(row: dict[str, Any], place: str) -> list[Turn]:
    return [
        _turn(message, where, ("from", "value"), SHAREGPT_ROLES)
        for message, where in _entries(row, "conversations", place)
    ]


def _alpaca(row: dict[str, Any], place: str) -> list[Turn]:
    asked = [_text(row, "instruction", place)]
    if row.get("input") is not None and _text(row, "input", place).strip():
        asked.append(row["input"])
    return _pair(
        "\n\n".join(filter(None, asked)), "instruction", _text(row, "output", place), "output", place
    )


def _prompt_completion(row: dict[str, Any], place: str) -> list[Turn]:
    if "completion" in row and "response" in row:
        raise DataError(place, "has both `completion` and `response`.", "Keep the one to train on.")
    answer = "completion" if "completion" in row else "response"
    return _pair(_text(row, "prompt", place), "prompt", _text(row, answer, place), answer, place)


def _pair(asked: str, question: str, answered: str, answer: str, place: str) -> list[Turn]:
    user, assistant = Message("user", asked), Message("assistant", answered)
    return [Turn(user, f"{place}: {question}"), Turn(assistant, f"{place}: {answer}")]


FORMATS: Final[Mapping[str, Format]] = {
    "messages": Format(
        (("messages",),), '{"messages": [{"role": "user", "content": "..."}, ...]}', _messages
    ),
    "sharegpt": Format(
        (("conversations",),), '{"conversations": [{"from": "human", "value": "..."}, ...]}', _sharegpt
    ),
    "alpaca": Format(
        (("instruction",), ("output",)),
        '{"instruction": "...", "input": "...", "output": "..."}',
        _alpaca,
        refused=("context",),
    ),
    "prompt-completion": Format(
        (("prompt",), ("completion", "response")),
        '{"prompt": "...", "completion": "..."}',
        _prompt_completion,
        refused=("context", "input"),
    ),
}
LATER: Final[Mapping[str, set[str]]] = {"preference": {"chosen", "rejected"}, "text": {"text"}}
"""Formats that are recognised, to be refused by name."""

REFUSED: Final = (
    *("tools", "functions", "documents", "chat_template_kwargs"),
    *("weight", "train", "label"),
    *("system", "system_prompt", "history"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
"""Keys of a row, of any format, that would change what the model sees or is trained on."""

_REMEDY: Final = "Write one of " + ", or ".join(format_.shape for format_ in FORMATS.values()) + "."


def _entries(row: dict[str, Any], key: str, place: str) -> list[tuple[Any, str]]:
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise DataError(place, f"{key} is not a list with messages.", "Remove the row, or fill it.")
    return [(message, f"{place}: {key}[{i}]") for i, message in enumerate(messages)]


def _turn(message: Any, place: str, keys: tuple[str, str], roles: Mapping[str, str | None]) -> Turn:
    speaker, text = keys
    if not isinstance(message, dict):
        raise DataError(place, f"is {kind(message)}, not an object.", f"Give it {speaker} and {text}.")
    role = message.get(speaker)
    if not isinstance(role, str) or role not in roles:
        found = "is missing" if role is None else f"{role!r} is unknown"
        raise DataError(place, f"{speaker} {found}.", f"Use one of {', '.join(roles)}.")
    for key in sorted(set(message) - {speaker, text, "name"}, key=str):
        if _says_something(message[key]):
            raise DataError(place, f"{key!r} is not available yet.", f"Leave only {speaker} and {text}.")
    return Turn(Message(roles[role] or role, _text(message, text, place)), place)


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        found = "missing" if value is None else f"{kind(value)}, not text"
        whose = "message" if key in ("content", "value") else "row"
        raise DataError(place, f"{key} is {found}.", f"Give the text of the {whose}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = f"{key} has half a character: {value[error.start]!r}."
        remedy = "It was cut inside an emoji: mend the text, or remove the row."
        raise DataError(place, reason, remedy) from None
    return value


def _check_turns(turns: list[Turn], place: str) -> None:
    if not any(turn.message.role == "assistant" for turn in turns):
        raise DataError(place, "has no assistant turn: nothing to train on.", "Add the answer, or remove it.")
    for turn in turns:
        if turn.message.role == "assistant" and not turn.message.content.strip():
            raise DataError(turn.place, "the assistant says nothing.", "Remove the row.")
    if turns[0].message.role == "assistant":
        raise DataError(place, "begins with the assistant.", "Begin with what it answers to.")


def _says_something(value: Any) -> bool:
    """Whether leaving `value` out loses something; 0 and false mean something."""
    if isinstance(value, dict):  # Parquet fills the fields that a row lacks with null
        return any(_says_something(one) for one in value.values())
    return value not in (None, "", [])


def _found(row: Any) -> str:
    """What stands where a row was expected."""
    if not isinstance(row, dict) or not row:
        return kind(row)
    keys = [repr(key) if len(str(key)) <= 60 else repr(f"{str(key)[:57]}...") for key in row]
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return f"keys {', '.join(keys[:12])}{more}"


def _hint(row: Any) -> str:
    """A way on for the commonest reason that a table's keys are not found."""
    if isinstance(row, dict) and len(row) == 1 and any(mark in str(next(iter(row))) for mark in ";\t"):
        return "Separate columns with commas."
    return ""


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
