"""The messages of a row: who speaks, what is said, and which keys beside that are refused.

Owns the ways in which a list of messages is written, and roles. Refuses keys that would change what is
trained on, rather than leave them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import DataError, shown
from .calls import (
    has_calls_in_parts,
    in_own_messages,
    json_of,
    read_calls,
    read_function_call,
    read_schemas,
)
from .columns import carries, describes, words_of
from .contents import TEXTS, is_blank, kind, read_text
from .json_text import parse_list
from .rows import Message, Unused

ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
"""Who speaks, in any case, -> the role that chat templates know."""
_CALLING: Final = ("function_call", "tool_call")
"""Roles whose text is a call."""
_USUAL: Final = (("role", "content"), ("from", "value"))
_PLAIN: Final = frozenset(("system", "user", "assistant", "human", "gpt"))
"""The usual keys and speakers, which need no further look."""
_SPEAKERS: Final = ("role", "from")
"""Keys of who speaks."""
_USE: Final = "Use one of system, user, assistant, tool."

KEPT: Final[Mapping[str, tuple[str, ...]]] = {
    "system": ("tools",),
    "assistant": ("tool_calls", "function_call"),
    "tool": ("name", "tool_call_id"),
}
"""Role -> keys beside role and content that chat templates take."""
_WEIGHTS: Final = ("weight", "loss_weight", "loss_mask", "train", "training", "trainable")
"""Keys that say whether a message is trained on."""
_LOSS: Final = "loss"
"""Another such key where it holds no fraction, which is a figure that somebody measured."""
_CHOOSING: Final = frozenset(
    word
    for stem in ("weight", "mask", "ignore", "skip", "exclude", "train", "learn", "supervise", "backprop")
    for word in (stem, f"{stem}s", f"{stem}d", f"{stem}ed", f"{stem}ped", f"{stem.removesuffix('e')}ing")
) | {"trainable", "loss"}
"""Words of a flag's name that is likely to say the same in a way that is not known here (`ignore: true`)."""
_COUNTS: Final[Mapping[Any, bool]] = (
    {1: True, 0: False}
    | {word: yes for word, yes in (("1", True), ("1.0", True), ("true", True), ("0", False), ("0.0", False))}
    | {"false": False}
)

_ANSWER: Final = "Write the answer, or remove the row."
_NO_MESSAGES: Final = "Write its messages, or remove the row if it has none."


@dataclass(frozen=True)
class Turn:
    """A message and the part of the row it was read from, for errors.

    `unused`: its keys that only describe it.
    """

    message: Message
    place: str
    unused: Unused = ()


def read_messages(
    row: Mapping[str, Any], key: str, place: str, keys: tuple[str, str] = ("role", "content")
) -> list[Turn]:
    """The messages of a list, whichever keys they have; `keys` are named where one has none.

    Raises:
        DataError: no such list, or one of them is malformed.
    """
    return [turn for entry, where in _entries(row, key, place) for turn in _turns(entry, where, keys)]


def _entries(row: Mapping[str, Any], key: str, place: str) -> list[tuple[Any, str]]:
    """What a row's list has, each with its place.

    Raises:
        DataError: not a list, or empty.
    """
    messages = row[key]
    if isinstance(messages, str) and messages.strip():  # a table has no lists of its own
        messages = parse_list(messages, place, f"{key} is ")
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


def _turns(entry: Any, place: str, keys: tuple[str, str]) -> list[Turn]:
    """The messages that an entry of the list is: one, or a question with its answer, or calls and results."""
    if not isinstance(entry, dict):
        raise DataError(place, f"is {kind(entry)}, not an object.", f"Give it {' and '.join(keys)}.")
    if len(entry) == 2:  # nearly every message of a million rows
        for speaker, text in _USUAL:
            role = entry.get(speaker)
            if isinstance(role, str) and role in _PLAIN and isinstance(entry.get(text), str):
                return [Turn(Message(ROLES[role], read_text(entry, text, place)), place)]
    if set(entry) == {"input", "output"}:  # an exchange, as Capybara has them
        return [
            Turn(Message(role, read_text(entry, key, place)), place)
            for role, key in (("user", "input"), ("assistant", "output"))
        ]
    if has_calls_in_parts(entry.get("content")) and entry.get("role") in ("user", "assistant"):
        return [_turn(message, place, keys) for message in in_own_messages(entry, place)]
    return [_turn(entry, place, keys)]


def _turn(entry: dict[str, Any], place: str, keys: tuple[str, str]) -> Turn:
    """A message out of its keys.

    Raises:
        DataError: an unknown role, no text, or other keys that say something.
    """
    speaker = _key(entry, _SPEAKERS, keys[0])
    text = _key(entry, TEXTS, keys[1])
    written = _written_role(entry, speaker, place)
    role = ROLES[written]
    more = {key: entry[key] for key in KEPT.get(role, ()) if carries(entry.get(key))}
    trained, unused = True, []
    for key in sorted(set(entry) - {speaker, text, *more}, key=str):
        value = entry[key]
        if not carries(value) or (key == "name" and value == written):
            continue
        if key in _WEIGHTS or (key == _LOSS and not _is_fraction(value)):
            trained = trained and _counts(key, value, place)
        elif _may_go(str(key), value):
            unused.append((f"{key} of messages", value))
        else:
            raise DataError(place, f"{shown(key)} is not available yet.", _instead(str(key), text))
    said = _said(entry, text, place, written, more)
    kept = json_of(more, place, ", ".join(more)) if more else ""
    return Turn(Message(role, said, kept, trained), place, tuple(unused))


def _key(entry: dict[str, Any], names: tuple[str, ...], usual: str) -> str:
    """The key that is there, the usual one first; a null beside another one is none."""
    there = [name for name in (usual, *names) if name in entry]
    return next((name for name in there if entry[name] is not None), there[0] if there else usual)


def _written_role(entry: dict[str, Any], speaker: str, place: str) -> str:
    written = entry.get(speaker)
    role = written.strip().casefold().replace("-", "_") if isinstance(written, str) else None
    if role is None or role not in ROLES:
        found = "is missing" if written is None else f"{shown(written)} is unknown"
        raise DataError(place, f"{speaker} {found}.", _USE)
    return role


def _said(entry: dict[str, Any], text: str, place: str, written: str, more: dict[str, Any]) -> str:
    """The text of a message; what it calls goes into `more`, in the way that templates take."""
    if "function_call" in more:
        more["tool_calls"] = [
            *more.get("tool_calls", []),
            *read_function_call(more.pop("function_call"), place),
        ]
    if "tool_calls" in more:
        more["tool_calls"] = read_calls(more["tool_calls"], place)
        if entry.get(text) is None:  # as the OpenAI API writes an answer that only calls
            return ""
    if not isinstance(more.get("tools", ""), str):  # the templates that take them there take text
        more["tools"] = read_schemas(more["tools"], place)
    said = read_text(entry, text, place, "message")
    if written in _CALLING:
        more["tool_calls"] = read_function_call(said, place)
        return ""
    return said


def _counts(key: str, value: Any, place: str) -> bool:
    """Whether a message of this weight is trained on."""
    word = value.strip().casefold() if isinstance(value, str) else value
    if isinstance(word, (str, int, float)) and word in _COUNTS:
        return _COUNTS[word]
    reason = f"{key} is {shown(value)}, and a message is trained on or not."
    raise DataError(place, reason, "Write 1 or 0. A whole source has data.train.weight.")


def _may_go(key: str, value: Any) -> bool:
    """Whether a key of a message only describes it: by its name, or a figure or a flag about it."""
    figure = isinstance(value, (bool, int, float))
    return key != "name" and ((figure and not _chooses(key, value)) or describes(key))


def _chooses(key: str, value: Any) -> bool:
    """Whether a flag, by its name, says that a message is trained on or not; a fraction does as a weight."""
    words = words_of(key)
    if words[-1:] in (("weight",), ("mask",)):
        return True
    return not _is_fraction(value) and value in (0, 1) and not _CHOOSING.isdisjoint(words)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and value not in (0.0, 1.0)


def _instead(key: str, text: str) -> str:
    """What to do with a key of a message that no chat template shows."""
    if not _CHOOSING.isdisjoint(words_of(key)):
        return "Write weight: 0 for a message that is not to be trained on, weight: 1 for one that is."
    if key == "name":
        return f'Write who speaks into {text} ("Ada: ..."), or remove the names if nothing refers to them.'
    return f"Put what it says into {text}, or remove it if the message means the same without it."


def check_turns(turns: list[Turn], place: str) -> None:
    """Refuse turns that teach nothing.

    Raises:
        DataError: no answer, an empty one, one without a question, none that is trained on, or a tool's
            result that nobody asked for.
    """
    answers = [turn.message for turn in turns if turn.message.role == "assistant"]
    if not answers:
        raise DataError(place, "has no assistant turn: nothing to train on.", "Add the answer, or remove it.")
    for before, turn in zip([None, *turns], turns, strict=False):
        message = turn.message
        if message.role == "assistant" and is_blank(message.content) and not message.calls_tools:
            raise DataError(turn.place, "the assistant says nothing.", _ANSWER)
        if message.role == "tool" and not (before and _awaits_tool(before.message)):
            reason = "is a tool's result, but does not follow the assistant's call."
            raise DataError(turn.place, reason, "Give the assistant's tool_calls before it.")
    if turns[0].message.role == "assistant":
        remedy = "Are user and assistant swapped? Begin with what it answers to."
        raise DataError(place, "begins with the assistant.", remedy)
    if not any(message.trained for message in answers):
        reason = "every answer has the weight 0: nothing to train on."
        raise DataError(place, reason, "Give the answers to train on the weight 1, or remove the row.")


def _awaits_tool(message: Message) -> bool:
    """Whether a tool's result may follow: a call, in `tool_calls` or in the answer's own text, or another."""
    return message.role in ("assistant", "tool")
