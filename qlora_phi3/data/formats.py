"""Layouts of a row, and how each becomes a conversation, a text or a preference.

Owns which keys a layout has, and which keys would be lost. Refuses keys that would change what is trained
on, rather than leave them out. Knows nothing of files or tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any, Final

from ..errors import DataError
from .calls import read_tools
from .columns import SYSTEM, carries, unused, words_of
from .contents import is_blank, read_text
from .hints import found_in, hint
from .json_text import parse_list
from .messages import ROLES, Turn, check_turns, read_messages
from .rows import Conversation, Example, Message, Preference, Text

__all__ = ["FORMATS", "ROLES", "Conversation", "Format", "Message", "convert", "detect"]


@dataclass(frozen=True, eq=False)  # hashed with every row's keys: by identity, which is fast
class Group:
    """Keys of which a row of a format has one: `names` say that it is this format.

    Where it is no other, `others` are taken for them, and without these the `last`; by their words, so that
    `Question` and `question` are one.
    """

    names: tuple[str, ...]
    others: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    needed: bool = True

    @property
    def ways(self) -> tuple[tuple[str, ...], ...]:
        return (*self.names, *self.others), self.last


Picked = tuple[str, ...]
"""Which keys of a row are read: one of each group; empty where one that is not needed is missing."""


@dataclass(frozen=True)
class Format:
    """A layout: of each group of keys a row has one; `beside` keys are used where they are there."""

    groups: tuple[Group, ...]
    shape: str
    build: Callable[[dict[str, Any], str, Picked], Example]
    beside: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """The names that say it is this format."""
        return tuple(group.names for group in self.groups if group.needed)

    def missing(self, row: Any, *, loosely: bool = True) -> list[str]:
        """The keys that `row` lacks, as they are told to the user."""
        has = tuple(row) if isinstance(row, dict) else ()
        lacks = [
            group
            for group, key in zip(self.groups, _picked(has, self.groups, loosely=loosely), strict=True)
            if group.needed and not key
        ]
        return [" or ".join(f"`{key}`" for key in group.names) for group in lacks]

    def picked(self, row: dict[str, Any]) -> Picked:
        return _picked(tuple(row), self.groups, loosely=True)


@lru_cache(maxsize=64)
def _picked(has: tuple[str, ...], groups: tuple[Group, ...], *, loosely: bool) -> Picked:
    """Of each group the key that is there; of several by other names none, since nobody knows which."""
    found = [next((key for key in group.names if key in has), "") for group in groups]
    if loosely and not all(found):
        names: dict[str, list[str]] = {}
        for key in has:
            names.setdefault("_".join(words_of(str(key))), []).append(key)
        for i, group in enumerate(groups):
            ways = ([key for name in way for key in names.get(name, [])] for way in group.ways)
            others = next((keys for keys in ways if keys), [])
            if not found[i] and len(others) == 1:
                found[i] = others[0]
    return tuple(found)


def detect(row: Any, place: str) -> str:
    """Name of the format that the keys of `row` fit; `text` only where no other does.

    Raises:
        DataError: they fit none, or several.
    """
    found = [name for name, format_ in FORMATS.items() if not format_.missing(row, loosely=False)]
    if len(found) > 1 and "text" in found:  # chats often come with a column that joins their messages
        found.remove("text")
    if len(found) > 1:
        reason = f"fits the formats {' and '.join(found)} (found {found_in(row)})."
        raise DataError(place, reason, f"Choose one: data.train.format={found[0]}.")
    found = found or [name for name in LOOSE if not FORMATS[name].missing(row)]
    if found:
        return found[0]
    raise DataError(place, f"has no format that is known (found {found_in(row)}).", hint(row) or _REMEDY)


def is_conversation(row: Any) -> bool:
    """Whether a row is a bare list of messages."""
    first = row[0] if isinstance(row, list) and row else None
    return isinstance(first, dict) and bool({"role", "from"} & set(first))


def convert(row: Any, name: str, place: str, *, named: bool = False) -> Example:
    """What a row of the format `name` holds; `named`: by the recipe, which so means these keys alone.

    Raises:
        DataError: not of this shape, keys that would be missed, or nothing to train on.
    """
    format_ = FORMATS[name]
    missing = format_.missing(row)
    if missing:
        reason = f"has no {' and no '.join(missing)} (found {found_in(row)})."
        if any(not other.missing(row) for other in FORMATS.values()):
            raise DataError(place, reason, f"All rows need one format: write {format_.shape}.")
        raise DataError(place, reason, hint(row) or f"Write {format_.shape}.")
    picked = format_.picked(row)
    example = format_.build(row, place, picked)
    if len(row) == sum(map(bool, picked)):
        return example
    used = {*picked, *format_.beside}
    ends = (picked[0], [key for key, group in zip(picked, format_.groups, strict=True) if group.needed][-1])
    beside = unused(row, used, name, ends, place, said=example.texts, named=named)
    return replace(example, unused=(*example.unused, *beside)) if beside else example


def _conversation(
    turns_of: Callable[[dict[str, Any], str, Picked], list[Turn]], row: Any, place: str, picked: Picked
) -> Conversation:
    turns = turns_of(row, place, picked)
    check_turns(turns, place)
    turns = _with_system(row, turns, place)
    beside = tuple(one for turn in turns for one in turn.unused)
    messages = tuple(turn.message for turn in turns)
    tools = read_tools(row, place) if "tools" in row or "functions" in row else ""
    return Conversation(messages, place, tools, unused=beside)


def _with_system(row: dict[str, Any], turns: list[Turn], place: str) -> list[Turn]:
    """The turns behind the system message that stands beside them, as LLaMA-Factory writes it."""
    texts = {key: read_text(row, key, place, "message") for key in SYSTEM if key in row and carries(row[key])}
    if not texts:
        return turns
    key, text = next(iter(texts.items()))
    others = [turn.message.content for turn in turns if turn.message.role == "system"]
    if any(other.strip() != text.strip() for other in (*texts.values(), *others)):
        reason = f"has the system message `{key}`, and another one beside it."
        raise DataError(place, reason, "Keep one, with the text of both if the model shall see both.")
    return turns if others else [Turn(Message("system", text), f"{place}: {key}"), *turns]


def _talk(keys: tuple[str, str], row: dict[str, Any], place: str, picked: Picked) -> list[Turn]:
    return read_messages(row, picked[0], place, keys)


def _alpaca(row: dict[str, Any], place: str, picked: Picked) -> list[Turn]:
    instruction, given, output = picked
    asked = [read_text(row, instruction, place)]
    if given and carries(row[given]):
        asked.append(read_text(row, given, place))
    question = Turn(Message("user", "\n\n".join(filter(None, asked))), f"{place}: {instruction}")
    return [*_history(row, place), question, *_said(row, output, "assistant", place)]


def _prompt_completion(row: dict[str, Any], place: str, picked: Picked) -> list[Turn]:
    """Question and answer; of lists of messages, as TRL takes them, the completion alone is trained on."""
    prompt, answer = picked
    if answer in ("completion", "response") and {"completion", "response"} <= set(row):
        raise DataError(place, "has both `completion` and `response`.", "Keep the one to train on.")
    asked = _said(row, prompt, "user", place)
    shown = [replace(turn, message=_shown_only(turn.message)) for turn in asked]
    return [*_history(row, place), *shown, *_said(row, answer, "assistant", place)]


def _shown_only(message: Message) -> Message:
    return replace(message, trained=False) if message.role == "assistant" else message


def _history(row: dict[str, Any], place: str) -> list[Turn]:
    """Earlier exchanges, as LLaMA-Factory writes them: a list of questions with their answers."""
    history: Any = row.get("history")
    if not carries(history):
        return []
    found = parse_list(history, place, "history is ") if isinstance(history, str) else history
    rows = found if isinstance(found, list) else []
    pairs = [list(one) for one in rows if isinstance(one, list | tuple)]
    if not pairs or len(pairs) != len(rows) or any(len(pair) != 2 for pair in pairs):
        remedy = 'Write [["question", "answer"], ...], or all of the row as {"messages": [...]}.'
        raise DataError(place, "history is not a list of questions with their answers.", remedy)
    return [
        Turn(Message(role, read_text({"history": text}, "history", where)), where)
        for i, pair in enumerate(pairs)
        for role, text in zip(("user", "assistant"), pair, strict=True)
        for where in (f"{place}: history[{i}]",)
    ]


def _text(row: dict[str, Any], place: str, picked: Picked) -> Text:
    text = read_text(row, picked[0], place)
    if is_blank(text):
        raise DataError(place, "text is empty: nothing to train on.", "Remove the row.")
    return Text(text, place)


def _preference(row: dict[str, Any], place: str, picked: Picked) -> Preference:
    """The two answers behind what they have in common: `prompt`, and the messages both begin with."""
    prompt = _said(row, "prompt", "user", place) if row.get("prompt") is not None else []
    if not prompt and all(isinstance(row[key], str) for key in ("chosen", "rejected")):
        reason = "is a preference (chosen and rejected) without the question that both answer."
        raise DataError(place, reason, "Write it as `prompt`, and only the answers as chosen and rejected.")
    chosen, rejected = (_branch(prompt, row, key, place) for key in ("chosen", "rejected"))
    for turns in (chosen, rejected):
        check_turns(turns, place)
    good, bad = (tuple(turn.message for turn in turns) for turns in (chosen, rejected))
    if good == bad:
        raise DataError(place, "chosen and rejected are the same.", "Remove the row.")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(good, bad, strict=False)))
    for answer in (good[shared:], bad[shared:]):
        if not answer or answer[0].role != "assistant":
            reason = "chosen and rejected do not part at an answer."
            raise DataError(place, reason, "Let both answer the same messages.")
    return Preference(good[:shared], good[shared:], bad[shared:], place, read_tools(row, place))


def _branch(prompt: list[Turn], row: dict[str, Any], key: str, place: str) -> list[Turn]:
    """The whole conversation under `key`; one that has its prompt in itself has it only once."""
    said = _said(row, key, "assistant", place)
    if said[0].message.role == "assistant":
        return prompt + said
    last = prompt[-1].message if prompt else None
    if last is not None and last not in [turn.message for turn in said]:
        reason = f"{key} begins with a question, and has not that of `prompt`."
        raise DataError(place, reason, f"Leave only the answers in {key}, or remove `prompt`.")
    return said


def _said(row: dict[str, Any], key: str, role: str, place: str) -> list[Turn]:
    """Text as a message of `role`, or a list of messages, in a table as JSON."""
    value = row[key]
    columns = isinstance(value, dict) and {"role", "from"} & set(value)  # as `datasets` writes a Sequence
    messages = isinstance(value, list) and (not value or isinstance(value[0], dict))
    if columns or messages or (isinstance(value, str) and _MESSAGES.match(value)):
        return read_messages(row, key, place)
    return [Turn(Message(role, read_text(row, key, place)), f"{place}: {key}")]


_MESSAGES: Final = re.compile(r"""\A\[\s*\{\s*["'](?:role|from|content|value)["']\s*:(?s:.*)\]\s*\Z""")
"""A list of messages that a cell holds as text."""
_BESIDE: Final = ("tools", "functions", *SYSTEM)
_ASKING: Final = ("question", "query", "problem", "input", "inputs"), ("user", "human", "q")
_ANSWERING: Final = (
    ("answer", "output", "outputs", "target", "targets", "solution", "reply"),
    ("assistant", "bot", "gpt", "a"),
)

FORMATS: Final[Mapping[str, Format]] = {
    "messages": Format(
        (Group(("messages",), ("contents",)),),
        '{"messages": [{"role": "user", "content": "..."}, ...]}',
        partial(_conversation, partial(_talk, ("role", "content"))),
        _BESIDE,
    ),
    "sharegpt": Format(
        (Group(("conversations",), ("conversation",)),),
        '{"conversations": [{"from": "human", "value": "..."}, ...]}',
        partial(_conversation, partial(_talk, ("from", "value"))),
        _BESIDE,
    ),
    "alpaca": Format(
        (
            Group(("instruction",)),
            Group(("input",), ("context",), needed=False),
            Group(("output",), ("response", "completion", "answer")),
        ),
        '{"instruction": "...", "input": "...", "output": "..."}',
        partial(_conversation, _alpaca),
        (*_BESIDE, "history"),
    ),
    "prompt-completion": Format(
        (Group(("prompt",), *_ASKING), Group(("completion", "response"), *_ANSWERING)),
        '{"prompt": "...", "completion": "..."}',
        partial(_conversation, _prompt_completion),
        (*_BESIDE, "history"),
    ),
    "text": Format((Group(("text",)),), '{"text": "..."}', _text),
    "preference": Format(
        (Group(("chosen",)), Group(("rejected",))),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        _preference,
        ("prompt", "tools", "functions"),
    ),
}
LOOSE: Final = ("messages", "sharegpt", "alpaca", "prompt-completion", "text")
"""Formats that are known by other names of their keys too, the surest first."""

_REMEDY: Final = "Write one of " + ", or ".join(format_.shape for format_ in FORMATS.values()) + "."
