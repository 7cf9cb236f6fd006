"""Layouts of a row, and how each becomes a conversation, a text or a preference.

Owns which keys a layout has, and which keys would be lost. Refuses keys that would change what is trained
on, rather than leave them out. Knows nothing of files or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, Final

from ..errors import DataError
from .columns import SYSTEM, carries, meaning, singulars, unused, words_of
from .messages import (
    ROLES,
    SHAREGPT_ROLES,
    Turn,
    check_turns,
    entries,
    kind,
    read_messages,
    read_text,
    read_tools,
    turn,
)
from .rows import Conversation, Example, Message, Preference, Text

__all__ = ["FORMATS", "ROLES", "SHAREGPT_ROLES", "Conversation", "Format", "Message", "convert", "detect"]


@dataclass(frozen=True)
class Format:
    """A layout: of each group of keys a row has one; `optional` keys are used where they are there."""

    keys: tuple[tuple[str, ...], ...]
    shape: str
    build: Callable[[dict[str, Any], str], Example]
    optional: tuple[str, ...] = ()

    @cached_property
    def used(self) -> frozenset[str]:
        """Every key that is read."""
        return frozenset((*(key for group in self.keys for key in group), *self.optional))

    def missing(self, row: Any) -> list[str]:
        """The keys that `row` lacks, as they are told to the user."""
        lacks = [
            group for group in self.keys if not isinstance(row, dict) or not any(k in row for k in group)
        ]
        return [" or ".join(f"`{key}`" for key in group) for group in lacks]

    def ends(self, row: dict[str, Any]) -> tuple[str, str]:
        """Of the keys that the row has: the first that is used, and that of its answer."""
        has = [next(key for key in group if key in row) for group in self.keys]
        return has[0], has[-1]


def detect(row: Any, place: str) -> str:
    """Name of the format that the keys of `row` fit; `text` only where no other does.

    Raises:
        DataError: they fit none, or several.
    """
    found = [name for name, format_ in FORMATS.items() if not format_.missing(row)]
    if len(found) > 1 and "text" in found:  # chats often come with a column that joins their messages
        found.remove("text")
    if len(found) > 1:
        reason = f"fits the formats {' and '.join(found)} (found {_found(row)})."
        raise DataError(place, reason, f"Choose one: data.train.format={found[0]}.")
    if found:
        return found[0]
    raise DataError(place, f"has no format that is known (found {_found(row)}).", _hint(row) or _REMEDY)


def convert(row: Any, name: str, place: str, *, named: bool = False) -> Example:
    """What a row of the format `name` holds; `named`: by the recipe, which so means these keys alone.

    Raises:
        DataError: not of this shape, keys that would be missed, or nothing to train on.
    """
    format_ = FORMATS[name]
    missing = format_.missing(row)
    if missing:
        reason = f"has no {' and no '.join(missing)} (found {_found(row)})."
        if any(not other.missing(row) for other in FORMATS.values()):
            raise DataError(place, reason, f"All rows need one format: write {format_.shape}.")
        raise DataError(place, reason, _hint(row) or f"Write {format_.shape}.")
    beside = (
        ()
        if row.keys() <= format_.used
        else unused(row, format_.used, name, format_.ends(row), place, named=named)
    )
    example = format_.build(row, place)
    return replace(example, unused=(*example.unused, *beside)) if beside else example


def _conversation(
    turns_of: Callable[[dict[str, Any], str], list[Turn]], row: Any, place: str
) -> Conversation:
    turns = turns_of(row, place)
    check_turns(turns, place)
    turns = _with_system(row, turns, place)
    beside = tuple(one for turn in turns for one in turn.unused)
    messages = tuple(turn.message for turn in turns)
    return Conversation(messages, place, read_tools(row.get("tools"), place), unused=beside)


def _with_system(row: dict[str, Any], turns: list[Turn], place: str) -> list[Turn]:
    """The turns behind the system message that stands beside them, as LLaMA-Factory writes it."""
    texts = {key: read_text(row, key, place) for key in SYSTEM if key in row and carries(row[key])}
    if not texts:
        return turns
    key, text = next(iter(texts.items()))
    others = [turn.message.content for turn in turns if turn.message.role == "system"]
    if any(other.strip() != text.strip() for other in (*texts.values(), *others)):
        reason = f"has the system message `{key}`, and another one beside it."
        raise DataError(place, reason, "Keep one, with the text of both if the model shall see both.")
    return turns if others else [Turn(Message("system", text), f"{place}: {key}"), *turns]


def _messages(row: dict[str, Any], place: str) -> list[Turn]:
    return read_messages(row, "messages", place)


def _sharegpt(row: dict[str, Any], place: str) -> list[Turn]:
    return [
        turn(message, where, ("from", "value"), SHAREGPT_ROLES)
        for message, where in entries(row, "conversations", place)
    ]


def _alpaca(row: dict[str, Any], place: str) -> list[Turn]:
    asked = [read_text(row, "instruction", place)]
    if row.get("input") is not None and read_text(row, "input", place).strip():
        asked.append(row["input"])
    return _pair(
        "\n\n".join(filter(None, asked)), "instruction", read_text(row, "output", place), "output", place
    )


def _prompt_completion(row: dict[str, Any], place: str) -> list[Turn]:
    if "completion" in row and "response" in row:
        raise DataError(place, "has both `completion` and `response`.", "Keep the one to train on.")
    answer = "completion" if "completion" in row else "response"
    if isinstance(row["prompt"], list) or isinstance(row[answer], list):
        key = "prompt" if isinstance(row["prompt"], list) else answer
        remedy = 'Put all messages into one list, {"messages": [...]}, with data.loss_on: last.'
        raise DataError(place, f"{key} is a list, not text.", remedy)
    return _pair(read_text(row, "prompt", place), "prompt", read_text(row, answer, place), answer, place)


def _pair(asked: str, question: str, answered: str, answer: str, place: str) -> list[Turn]:
    user, assistant = Message("user", asked), Message("assistant", answered)
    return [Turn(user, f"{place}: {question}"), Turn(assistant, f"{place}: {answer}")]


def _text(row: dict[str, Any], place: str) -> Text:
    text = read_text(row, "text", place)
    if not text.strip():
        raise DataError(place, "text is empty: nothing to train on.", "Remove the row.")
    return Text(text, place)


def _preference(row: dict[str, Any], place: str) -> Preference:
    """The two answers behind what they have in common: `prompt`, and the messages both begin with."""
    prompt = _said(row, "prompt", "user", place) if row.get("prompt") is not None else []
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
    tools = read_tools(row.get("tools"), place)
    return Preference(good[:shared], good[shared:], bad[shared:], place, tools)


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
    """Text as a message of `role`, or a list of messages."""
    if isinstance(row[key], list):
        return read_messages(row, key, place)
    return [Turn(Message(role, read_text(row, key, place)), f"{place}: {key}")]


_BESIDE: Final = ("tools", *SYSTEM)

FORMATS: Final[Mapping[str, Format]] = {
    "messages": Format(
        (("messages",),),
        '{"messages": [{"role": "user", "content": "..."}, ...]}',
        partial(_conversation, _messages),
        _BESIDE,
    ),
    "sharegpt": Format(
        (("conversations",),),
        '{"conversations": [{"from": "human", "value": "..."}, ...]}',
        partial(_conversation, _sharegpt),
        _BESIDE,
    ),
    "alpaca": Format(
        (("instruction",), ("output",)),
        '{"instruction": "...", "input": "...", "output": "..."}',
        partial(_conversation, _alpaca),
        ("input", *_BESIDE),
    ),
    "prompt-completion": Format(
        (("prompt",), ("completion", "response")),
        '{"prompt": "...", "completion": "..."}',
        partial(_conversation, _prompt_completion),
        _BESIDE,
    ),
    "text": Format((("text",),), '{"text": "..."}', _text),
    "preference": Format(
        (("chosen",), ("rejected",)),
        '{"prompt": "...", "chosen": "...", "rejected": "..."}',
        _preference,
        ("prompt", "tools"),
    ),
}

_REMEDY: Final = "Write one of " + ", or ".join(format_.shape for format_ in FORMATS.values()) + "."


def _found(row: Any) -> str:
    """What stands where a row was expected."""
    if not isinstance(row, dict) or not row:
        return kind(row)
    keys = [repr(key) if len(str(key)) <= 60 else repr(f"{str(key)[:57]}...") for key in row]
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return f"keys {', '.join(keys[:12])}{more}"


def _hint(row: Any) -> str:
    """A way on for the commonest reasons that a row's keys are not found."""
    if not isinstance(row, dict):
        return ""
    if len(row) == 1 and any(mark in str(next(iter(row))) for mark in ";\t"):
        return "Separate columns with commas."
    return _rename(row)


_ASKED: Final = (
    *("question", "query", "problem", "prompt", "instruction", "input", "user", "human"),
    *("document", "article", "text", "message", "sentence", "review", "source"),
)
"""Words of keys that hold a question, the likeliest first."""
_PLAIN: Final = ("content", "document", "body", "article", "passage", "paragraph")
"""Words of keys that hold plain text."""


def _rename(row: dict[str, Any]) -> str:
    """Which keys to rename, where their names say what they are; nothing where they do not."""
    names = {"_".join(words_of(str(key))): str(key) for key in row}
    for name in (name for name in FORMATS if name != "text"):
        if pairs := _other_case(names, FORMATS[name]):
            return _renaming(pairs)
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        for wanted, speaker in (("messages", "role"), ("conversations", "from")):
            if isinstance(first, dict) and speaker in first:
                return _renaming([(str(key), wanted)])
    answers = _answers(row, "messages") or _answers(row, "text")  # beside text more words mean a label
    asked = _first(_ASKED, names, answers)
    if asked and len(answers) == 1:
        if asked == "instruction":  # Alpaca's, under other names
            context = [(names["context"], "input")] if "context" in names else []
            return _renaming([*context, (answers[0], "output")])
        return _renaming([(asked, "prompt"), (answers[0], "completion")])
    if pairs := _other_case(names, FORMATS["text"]):
        return _renaming(pairs)
    plain = "" if answers else _first(_PLAIN, names, [])
    return f"If it is plain text, rename `{plain}` to `text`." if plain else ""


def _other_case(names: dict[str, str], format_: Format) -> list[tuple[str, str]]:
    """The keys to rename where a row has all of a format's, written in another way; none where it has not."""
    found = [next((key for key in group if key in names), None) for group in format_.keys]
    pairs = [(names[key], key) for key in found if key is not None and names[key] != key]
    return pairs if None not in found else []


def _first(words: tuple[str, ...], names: dict[str, str], taken: list[str]) -> str:
    """The key that is named by the first of these words, in the singular or the plural."""
    found = {word: key for name, key in names.items() if key not in taken for word in singulars(name)}
    return next((found[word] for word in words if word in found), "")


def _answers(row: dict[str, Any], format_: str) -> list[str]:
    """Keys that hold an answer or a label."""
    meant = ((key, meaning(key, format_)) for key in map(str, row))
    return [key for key, one in meant if one is not None and one.answers]


def _renaming(pairs: list[tuple[str, str]]) -> str:
    return "Rename " + " and ".join(f"`{old}` to `{new}`" for old, new in pairs if old != new) + "."
