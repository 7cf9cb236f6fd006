"""A single message of a row, and the tools beside it: which keys they have and what is refused.

Owns roles, texts, tool calls and tool schemas. Refuses keys that would change what is trained on, rather
than leave them out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from ..errors import DataError, shown
from .columns import carries, describes, is_neutral
from .json_text import parse
from .rows import Message, Unused

ROLES: Final = ("system", "user", "assistant", "tool")
_ITSELF: Final = {role: role for role in ROLES}
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
KEPT: Final[Mapping[str, tuple[str, ...]]] = {
    "system": ("tools",),
    "assistant": ("tool_calls",),
    "tool": ("name", "tool_call_id"),
}
"""Role -> keys beside role and content that chat templates take."""

_NO_MESSAGES: Final = "Write its messages, or remove the row if it has none."
_OTHER_KEYS: Final = {
    "from": ("role", "Messages of role and content: name their list `messages`."),
    "role": ("from", "Messages of from and value: name their list `conversations`."),
}
"""Key of the speaker -> the other one, and what to do where that is there instead."""
_AS_OBJECT: Final = "Write it as an object, or as the JSON text of one."
_CALL: Final = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
_SCHEMA: Final = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'


@dataclass(frozen=True)
class Turn:
    """A message and the part of the row it was read from, for errors.

    `unused`: its keys that only describe it.
    """

    message: Message
    place: str
    unused: Unused = ()


def read_messages(row: Mapping[str, Any], key: str, place: str) -> list[Turn]:
    """The messages of a list of `role` and `content`.

    Raises:
        DataError: no such list, or one of them is malformed.
    """
    return [_message(message, where) for message, where in entries(row, key, place)]


def entries(row: Mapping[str, Any], key: str, place: str) -> list[tuple[Any, str]]:
    """What a row's list has, each with its place.

    Raises:
        DataError: not a list, or empty.
    """
    messages = row[key]
    if isinstance(messages, str) and messages.strip():  # a table has no lists of its own
        messages = parse(messages, place, "Write the list itself, or as JSON.", f"{key} is ")
    if isinstance(messages, dict) and carries(messages):
        messages = _zipped(messages, key, place)
    if not isinstance(messages, list) or not messages:
        raise DataError(place, f"{key} is not a list with messages.", _NO_MESSAGES)
    return [(message, f"{place}: {key}[{i}]") for i, message in enumerate(messages)]


def _zipped(columns: dict[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    """The messages of an object of lists, as `datasets` writes a Sequence of objects."""
    lists = {name: value for name, value in columns.items() if value is not None}
    lengths = {len(value) if isinstance(value, list) else -1 for value in lists.values()}
    if len(lengths) != 1 or -1 in lengths:
        found = "one object" if -1 in lengths else "an object of lists that are not equally long"
        raise DataError(place, f"{key} is not a list with messages.", f"It is {found}: write [{{...}}, ...].")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def turn(
    message: Any, place: str, keys: tuple[str, str], roles: Mapping[str, str], more: tuple[str, ...] = ()
) -> Turn:
    """A message with these names for speaker and text; `more` keys are the caller's to keep.

    Raises:
        DataError: not an object, an unknown role, no text, or other keys that say something.
    """
    speaker, text = keys
    role = _role(message, place, keys, roles)
    unused = []
    for key in sorted(set(message) - {speaker, text, *more}, key=str):
        value = message[key]
        if not carries(value) or is_neutral(str(key), value) or (key == "name" and value == role):
            continue
        if key == "name" or not describes(str(key)):
            raise DataError(place, f"{shown(key)} is not available yet.", _instead(str(key), text))
        unused.append((f"{key} of messages", value))
    return Turn(Message(roles[role], read_text(message, text, place)), place, tuple(unused))


def _instead(key: str, text: str) -> str:
    """What to do with a key of a message that no chat template shows."""
    if key == "name":
        return f'Write who speaks into {text} ("Ada: ..."), or remove the names if nothing refers to them.'
    if key in ("weight", "train"):
        return "Give every message the value 1; data.loss_on: last trains on each row's last answer alone."
    return f"Put what it says into {text}, or remove it if the message means the same without it."


def _role(message: Any, place: str, keys: tuple[str, str], roles: Mapping[str, str]) -> str:
    speaker, text = keys
    if not isinstance(message, dict):
        raise DataError(place, f"is {kind(message)}, not an object.", f"Give it {speaker} and {text}.")
    role = message.get(speaker)
    if not isinstance(role, str) or role not in roles:
        found = "is missing" if role is None else f"{shown(role)} is unknown"
        other, remedy = _OTHER_KEYS[speaker]
        if role is not None or other not in message:
            remedy = f"Use one of {', '.join(roles)}."
        raise DataError(place, f"{speaker} {found}.", remedy)
    return role


def _message(message: Any, place: str) -> Turn:
    keys = ("role", "content")
    role = _role(message, place, keys, _ITSELF)
    if len(message) == 2 and "content" in message:  # nothing to look for, in a million rows
        return Turn(Message(role, read_text(message, "content", place)), place)
    more = {key: message[key] for key in KEPT.get(role, ()) if carries(message.get(key))}
    if "tool_calls" in more:
        more["tool_calls"] = _calls(more["tool_calls"], place)
        if message.get("content") is None:  # as the OpenAI API writes an answer that only calls
            message = {**message, "content": ""}
    if not isinstance(more.get("tools", ""), str):  # the templates that take them there take text
        more["tools"] = read_tools(more["tools"], place)
    found = turn(message, place, keys, _ITSELF, tuple(more))
    written = _json(more, place, "tool_calls" if role == "assistant" else ", ".join(more)) if more else ""
    return Turn(Message(role, found.message.content, written), place, found.unused)


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as templates take them: arguments that are written as JSON text become what it holds.

    Raises:
        DataError: not a list of calls with a name and arguments.
    """
    if not isinstance(value, list):
        raise DataError(place, f"tool_calls is {kind(value)}, not a list.", f"Write [{_CALL}].")
    return [_call(one, f"{place}: tool_calls[{i}]") for i, one in enumerate(value)]


def _call(value: Any, place: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(place, "has no function with a name.", f"Write {_CALL}.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse(arguments, place, _AS_OBJECT, "arguments is ")
    if not isinstance(arguments, dict):
        raise DataError(place, f"arguments is {kind(arguments)}, not an object.", f"Write {_CALL}.")
    function = {**function, "arguments": arguments}
    return {**value, "function": function} if "function" in value else function


def read_tools(value: Any, place: str) -> str:
    """Schemas of functions as JSON text; as a list, or as the JSON text of one.

    Raises:
        DataError: not a list of objects.
    """
    if not carries(value):
        return ""
    tools = parse(value, place, _AS_OBJECT, "tools is ") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(place, "tools is not a list of objects.", f"Write [{_SCHEMA}].")
    return _json(tools, place, "tools")


def _json(value: Any, place: str, key: str) -> str:
    """Keys stay in their order, in which a template shows them."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"{key} has a value that JSON cannot hold: {str(error).splitlines()[0]}."
        raise DataError(place, reason, "Write it as text.") from None
    return text


def read_text(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under `key`.

    Raises:
        DataError: missing, not text, or with half a character.
    """
    value = row.get(key)
    if isinstance(value, list) and value and key in ("content", "value"):
        value = _joined(value, key, place)
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


def _joined(parts: list[Any], key: str, place: str) -> str:
    """The text of a message that is written in parts, as for models that see pictures too.

    Raises:
        DataError: another part than text, or parts of which nobody knows what stands between them.
    """
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        shape = part.get("type", "text") if isinstance(part, dict) else None
        if shape not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            found = f"a part of type {shown(shape)}" if shape else f"{kind(part)} as a part"
            reason = f"{key} has {found}, and only parts of text can be read."
            raise DataError(place, reason, 'Write {"type": "text", "text": "..."}, or plain text.')
        texts.append(part["text"])
    for before, after in pairwise(texts):
        if not (before[-1:].isspace() or after[:1].isspace()):
            reason = f"{key} has several parts of text without a blank or a new line between them."
            raise DataError(place, reason, "Join them into one text.")
    return "".join(texts)


def check_turns(turns: list[Turn], place: str) -> None:
    """Refuse turns that teach nothing.

    Raises:
        DataError: no answer, an empty one, one without a question, or a tool's result that nobody asked for.
    """
    if not any(turn.message.role == "assistant" for turn in turns):
        raise DataError(place, "has no assistant turn: nothing to train on.", "Add the answer, or remove it.")
    for before, turn in zip([None, *turns], turns, strict=False):
        message = turn.message
        if message.role == "assistant" and not message.content.strip() and not message.calls_tools:
            raise DataError(turn.place, "the assistant says nothing.", "Remove the row.")
        if message.role == "tool" and not (before and _awaits_tool(before.message)):
            reason = "is a tool's result, but does not follow the assistant's call."
            raise DataError(turn.place, reason, "Give the assistant's tool_calls before it.")
    if turns[0].message.role == "assistant":
        remedy = "Are user and assistant swapped? Begin with what it answers to."
        raise DataError(place, "begins with the assistant.", remedy)


def _awaits_tool(message: Message) -> bool:
    """Whether a tool's result may follow: a call, in `tool_calls` or in the answer's own text, or another."""
    return message.role in ("assistant", "tool")


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
