"""What is odd in the text of a row, whatever its tokens: garbled, empty, a placeholder, a rendered chat.

Owns the checks that need only the text, and what is known of the base's tokenizer. They run over every
message of a million rows: a place is named only where there is something to tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from .contents import is_blank
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
    if isinstance(row, Text) and len(row.text) < _LONGEST and _missing("user", row.text):
        yield "placeholder", f"{row.place}: {row.text.strip()!r}"
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
        if role == "user" and is_blank(content):
            yield "empty-question", f"{row.place}: messages[{i}]"
        elif content[:1].isspace() and role in quirks.strips and content.strip():
            yield "leading-blanks", f"{row.place}: messages[{i}]"
        if len(content) < _LONGEST or content.endswith(_INPUTS):
            missing = _missing(role, content)
            if missing:
                yield "placeholder", f"{row.place}: messages[{i}]: {missing!r}"


def _missing(role: str, content: str) -> str:
    """The word for a missing value that a message is, or that a question ends with as its input."""
    whole = content.strip()
    if whole in _NOTHING or (role != "assistant" and whole in _NO_INPUT):
        return whole
    return content.rpartition("\n")[2] if role != "assistant" and content.endswith(_INPUTS) else ""


def marker_signs(row: Row, quirks: Quirks) -> Iterator[Sign]:
    """Markers of chats in text, where they are no special tokens of this base: those are refused."""
    added = [one for one in (quirks.swallowing, quirks.added) if one is not None]
    for text in (row.text,) if isinstance(row, Text) else [message.content for message in row.messages]:
        if text[:1] == "[" or any([part in text for part in _PARTS]):
            break
        if added and any([one.search(text) for one in added]):
            break
    else:
        if not (isinstance(row, Conversation) and row.has_tools):
            return  # nearly every row
    for place, text in texts_of(row):
        yield from _markers_in(text, place, quirks)


def _markers_in(text: str, place: str, quirks: Quirks) -> Iterator[Sign]:
    own = (("swallowing-token", quirks.swallowing), ("added-token", quirks.added))
    for code, pattern in own:
        hit = pattern.search(text) if pattern is not None else None
        if hit is not None:
            yield code, f"{place}: {hit[0]}"
    asked, answered = _ASKED.search(text), _ANSWERED.search(text)
    if asked is not None and answered is not None:
        yield "chat-markers", f"{place}: {asked[0]}"
        return
    for hit in _MARKERS.finditer(text):
        if not any(pattern is not None and pattern.search(hit[0]) for _, pattern in own):
            yield "chat-markers", f"{place}: {hit[0]}"
            return


_MARKERS: Final = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_ ]{0,30}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<｜[^｜\n]{1,30}｜>"
    r"|^#{2,3} ?(?:Instruction|Response|Human|Assistant|User|System|Input|Output) ?:|\bASSISTANT:"
    r"""|\A\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""",
    re.MULTILINE,
)
"""Of ChatML, Phi-3, Llama, Mistral, Gemma and DeepSeek; headers of Alpaca, Guanaco, Vicuna and Claude; and
messages as JSON text inside a text."""
_ASKED: Final = re.compile(r"^(?:Human|User) ?:", re.MULTILINE)
_ANSWERED: Final = re.compile(r"^(?:Assistant|AI|Bot) ?:", re.MULTILINE)
"""Both in one text are a chat that is written out, as Claude's first ones were."""
_PARTS: Final = (
    "<|",
    "INST]",
    "_of_turn>",
    "###",
    "ssistant:",
    "SSISTANT:",
    "｜>",
    "nstruction:",
    "esponse:",
)
"""Without any of these there is no marker, which is found sooner than by the pattern."""

_NOTHING: Final = frozenset(
    {"nan", "NaN", "<NA>", "<na>", "<noinput>", "<nooutput>", "undefined", "#N/A", "NaT", "(null)", "#VALUE!"}
)
"""What programs write for a missing value, and nobody for an answer."""
_NO_INPUT: Final = frozenset({"None", "none", "null", "NULL", "Null", "N/A", "n/a", "nil", "<noinput>."})
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
