"""What is odd in the text of a row, whatever its tokens: garbled, empty, a placeholder, a rendered chat.

Owns the checks that need only the text, and what is known of the base's tokenizer. They run over every
message of a million rows: a place is named only where there is something to tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from .quirks import Quirks
from .rows import Conversation, Row, Text
from .tools import tool_texts

Sign = tuple[str, str]
"""The code of a finding and a place that has it."""


def texts_of(row: Row) -> Iterator[tuple[str, str]]:
    """(place, text) of all that a row says."""
    if isinstance(row, Text):
        yield row.place, row.text
        return
    for i, message in enumerate(row.messages):
        yield f"{row.place}: messages[{i}]", message.content
    yield from tool_texts(row)


def text_signs(row: Row, quirks: Quirks) -> Iterator[Sign]:
    """What is odd in what a row says."""
    if isinstance(row, Conversation):
        yield from _message_signs(row, quirks)
        if not row.has_tools and all([message.content.isascii() for message in row.messages]):
            return
    for place, text in texts_of(row):
        hit = None if text.isascii() else _GARBLED.search(text)
        if hit is not None:
            yield "garbled", f"{place}: {hit[0]!r}"


def _message_signs(row: Conversation, quirks: Quirks) -> Iterator[Sign]:
    before = ""
    for i, message in enumerate(row.messages):
        role, content = message.role, message.content
        if role == before != "tool":  # one answer may make several calls
            yield "turn-order", f"{row.place}: messages[{i}]: {before} after {before}"
        before = role
        if role == "user" and (not content or content.isspace()):
            yield "empty-question", f"{row.place}: messages[{i}]"
        elif content[:1].isspace() and role in quirks.strips:
            yield "leading-blanks", f"{row.place}: messages[{i}]"
        missing = _missing(role, content)
        if missing:
            yield "placeholder", f"{row.place}: messages[{i}]: {missing!r}"


def _missing(role: str, content: str) -> str:
    """The word for a missing value that a message is, or that a question ends with as its input."""
    if role == "assistant":
        return content.strip() if len(content) < _LONGEST and content.strip() in _NOTHING else ""
    if len(content) < _LONGEST and content.strip() in _NOTHING | _NO_INPUT:
        return content.strip()
    return content.rpartition("\n")[2] if content.endswith(_INPUTS) else ""


def marker_signs(row: Row, quirks: Quirks) -> Iterator[Sign]:
    """Markers of chats in text, where they are no special tokens of this base: those are refused."""
    for place, text in _marked(row, quirks):
        swallowing = quirks.swallowing and quirks.swallowing.search(text)
        added = quirks.added and quirks.added.search(text)
        if swallowing:
            yield "swallowing-token", f"{place}: {swallowing[0]}"
        if added:
            yield "added-token", f"{place}: {added[0]}"
        for hit in _MARKERS.finditer(text):
            if not any(one and one.search(hit[0]) for one in (quirks.swallowing, quirks.added)):
                yield "chat-markers", f"{place}: {hit[0]}"
                break


def _marked(row: Row, quirks: Quirks) -> Iterator[tuple[str, str]]:
    """Texts of the row, where any of them may have a marker: none has in nearly every row."""
    contents = [row.text] if isinstance(row, Text) else [message.content for message in row.messages]
    if any([_may_have(content) for content in contents]) or any(
        one is not None and any([one.search(content) for content in contents])
        for one in (quirks.swallowing, quirks.added)
    ):
        yield from texts_of(row)


def _may_have(text: str) -> bool:
    return "<|" in text or "INST]" in text or "_of_turn>" in text or "<<SYS" in text or text[:1] == "["


_MARKERS: Final = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_ ]{0,30}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"""|\A\[\s*\{\s*["'](?:role|from|content|value)["']\s*:"""
)
"""Of ChatML, Phi-3, Llama, Mistral and Gemma, and messages as JSON text inside a text."""

_NOTHING: Final = frozenset({"nan", "NaN", "<NA>", "<na>", "<noinput>", "<nooutput>", "undefined", "#N/A"})
"""What programs write for a missing value, and nobody for an answer."""
_NO_INPUT: Final = frozenset({"None", "none", "null", "NULL", "N/A", "n/a", "nil", "<noinput>."})
"""The same, which may be an answer."""
_INPUTS: Final = tuple(f"\n\n{word}" for word in sorted(_NOTHING | _NO_INPUT))
_LONGEST: Final = 20


def _high_characters() -> str:
    """What bytes 0x80 to 0xBF become when UTF-8 is read as Latin-1 or Windows-1252."""
    windows = bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore")
    return "".join(map(chr, range(0x80, 0xC0))) + windows


_CLOSING: Final = "\xa0»’”"
"""May follow a capital letter that is meant, as in “AMANHÔ: then they are no sign of damage."""

_HIGH: Final = re.escape("".join(c for c in _high_characters() if c not in _CLOSING))

_GARBLED: Final = re.compile(
    f"\N{REPLACEMENT CHARACTER}|[ÂÃ][{_HIGH}]|(?<![A-ZÀ-Þ])[ÂÃ][{_CLOSING}]|â[{_HIGH}{_CLOSING}]{{2}}"
)
