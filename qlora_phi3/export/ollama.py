"""The Modelfile that makes a merged GGUF a model of Ollama, with the base's own chat template.

Owns the chat template as a Go template, taken apart by rendering probes and checked against the original.
Refuses templates that are more than text around each turn. No `ADAPTER`: Ollama is dropping it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..data.tokens import Turns
from ..errors import InputError
from ..model import load_tokenizer
from ..weights import first_line

_REMEDY: Final = "Export gguf instead: the file carries the chat template as it is."

Messages = list[dict[str, Any]]

_ONE, _TWO, _THREE = "\u2460", "\u2461", "\u2462"
"""What stands for contents in probes; no template has them."""
_CHECKED: Final[tuple[list[tuple[str, str]], ...]] = (
    [("user", "Hello")],
    [("user", "\n  spaces around \n")],
    [("user", "a"), ("assistant", " b\n"), ("user", "c")],
    [("system", "Be brief."), ("user", "a")],
    [("system", " \n s "), ("user", "a"), ("assistant", "b"), ("user", '{{ "c" }}')],
)
"""Role and content of conversations whose text must come out as the chat template's."""


@dataclass(frozen=True)
class Turn:
    """The text around the content of one role's messages."""

    before: str
    after: str


@dataclass(frozen=True)
class Parts:
    """A chat template as text around turns.

    `start` opens every conversation, `default` those without a system turn; `prompt` asks for the answer.
    `turns` has no "system" where the template refuses such a turn.
    """

    start: str
    default: str
    turns: dict[str, Turn]
    prompt: str

    def render(self, messages: Messages) -> str:
        """What Ollama will make of a conversation."""
        opened = any(message["role"] == "system" for message in messages)
        body = [self.turns[m["role"]].before + m["content"] + self.turns[m["role"]].after for m in messages]
        return self.start + ("" if opened else self.default) + "".join(body) + self.prompt

    def go(self) -> str:
        """The same in Go's template language; fixed text as literals, of which no whitespace is trimmed."""
        default = f"{{{{ if not .System }}}}{_literal(self.default)}{{{{ end }}}}" if self.default else ""
        turns = [
            f'if eq .Role "{role}" }}}}{_literal(turn.before)}{{{{ .Content }}}}{_literal(turn.after)}'
            for role, turn in self.turns.items()
        ]
        body = "{{ " + "{{ else ".join(turns) + "{{ end }}"
        turns_in_order = f"{{{{ range .Messages }}}}{body}{{{{ end }}}}"
        return f"{_literal(self.start)}{default}{turns_in_order}{_literal(self.prompt)}"


def modelfile(
    gguf_name: str,
    tokenizer: Path,
    *,
    num_ctx: int,
    license: str | None,
    system: str | None = None,
    stop_ids: Sequence[int] = (),
) -> str:
    """The Modelfile's text, for a GGUF of that name in the same folder; `stop_ids` end an answer too.

    Raises:
        InputError: the chat template cannot be said in Ollama's, or a text cannot be quoted.
        ModelError: no tokenizer or no chat template.
    """
    words = load_tokenizer(tokenizer)
    parts = take_apart(words, str(tokenizer))
    lines = [f"FROM ./{gguf_name}", f"TEMPLATE {_quoted(parts.go(), 'the template')}"]
    # Ollama's parser takes the outer quotes off and knows no escapes
    lines += [f'PARAMETER stop "{stop}"' for stop in stops_of(words, stop_ids)]
    lines.append(f"PARAMETER num_ctx {num_ctx}")
    if system is not None:
        if "system" not in parts.turns:
            raise InputError("system", "the chat template has no system turn.", "Leave the system text out.")
        lines.append(f"SYSTEM {_quoted(system, 'the system text')}")
    if license:
        lines.append(f"LICENSE {_quoted(license, 'the licence')}")
    return "\n".join(lines) + "\n"


def stops_of(tokenizer: Any, stop_ids: Sequence[int] = ()) -> list[str]:
    """Texts at which Ollama must stop: the end of a turn, the eos, `stop_ids`, and what opens a turn."""
    probe = _text(tokenizer, [("user", "1"), ("assistant", "2"), ("user", "3")])
    ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
    special = Turns.of(tokenizer).special
    opening = (token for token in ids if token in special)
    found = [Turns.of(tokenizer).end, tokenizer.eos_token_id, *stop_ids, *opening]
    texts = [tokenizer.convert_ids_to_tokens(token) for token in found if token is not None]
    named = [text for text in dict.fromkeys(texts) if text]  # a spare row has none
    return [text for text in named if text != tokenizer.bos_token or text in probe[1:]]


def take_apart(tokenizer: Any, place: str) -> Parts:
    """The text around turns, by rendering probes and cutting at their contents.

    Raises:
        InputError: what comes together again is not what the chat template says.
    """
    try:
        parts = _parts(tokenizer)
    except _NoPartsError as error:
        raise InputError(
            place, f"the chat template is more than text around turns ({error}).", _REMEDY
        ) from None
    for conversation in _CHECKED:
        if any(role not in parts.turns for role, _ in conversation):
            continue
        expected = _text(tokenizer, conversation)
        found = parts.render(_messages(conversation))
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found)
            )
            reason = f"the chat template does more than put text around turns: {expected[at : at + 40]!r} is "
            raise InputError(place, f"{reason}{found[at : at + 40]!r} in Ollama's.", _REMEDY)
    return parts


class _NoPartsError(Exception):
    """A rendered probe cannot be cut. Never leaves this module."""


def _parts(tokenizer: Any) -> Parts:
    head, user_to_answer, answer_to_user, tail = _cut(tokenizer, "user", "assistant", "user")
    tail_of_answer = _cut(tokenizer, "user", "assistant")[-1]
    end = tokenizer.convert_ids_to_tokens(Turns.of(tokenizer).end)
    before_user = _common_end(head, answer_to_user).rpartition(end)[2].lstrip()
    opening = head.removesuffix(before_user)
    after_answer = _without(answer_to_user, before_user, at_end=True)
    prompt = _without(tail_of_answer, after_answer)
    after_user = _without(tail, prompt, at_end=True)
    answer = Turn(_without(user_to_answer, after_user), after_answer)
    turns = {"user": Turn(before_user, after_user), "assistant": answer}
    try:
        system_head, system_to_user, _ = _cut(tokenizer, "system", "user")
    except _NoPartsError:  # the template refuses a system turn, or leaves it out
        return Parts(opening, "", turns, prompt)
    after_system = _without(system_to_user, before_user, at_end=True)
    # what both begin with is said once: a bos, where the rest of the opening is a default system turn
    start = opening if system_head.startswith(opening) else ""
    system = Turn(_without(system_head, start), after_system)
    return Parts(start, opening.removeprefix(start), {"system": system, **turns}, prompt)


def _cut(tokenizer: Any, *roles: str) -> list[str]:
    """The text before, between and after the contents of turns of these roles."""
    marks = (_ONE, _TWO, _THREE)[: len(roles)]
    try:
        rest = _text(tokenizer, list(zip(roles, marks, strict=True)))
    except Exception as error:  # jinja's own errors, and what templates raise
        raise _NoPartsError(f"{', '.join(roles)}: {first_line(error)}") from None
    pieces = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            raise _NoPartsError(f"{', '.join(roles)}: a turn is left out")
        pieces.append(piece)
    return [*pieces, rest]


def _without(text: str, part: str, *, at_end: bool = False) -> str:
    if not (text.endswith(part) if at_end else text.startswith(part)):
        raise _NoPartsError(f"{text!r} has no {part!r} at its {'end' if at_end else 'beginning'}")
    return text.removesuffix(part) if at_end else text.removeprefix(part)


def _common_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-size - 1] == other[-size - 1]:
        size += 1
    return one[len(one) - size :]


def _messages(conversation: list[tuple[str, str]]) -> Messages:
    return [{"role": role, "content": content} for role, content in conversation]


def _text(tokenizer: Any, conversation: list[tuple[str, str]]) -> str:
    return str(
        tokenizer.apply_chat_template(_messages(conversation), tokenize=False, add_generation_prompt=True)
    )


def _literal(text: str) -> str:
    """Fixed text as a string of Go's, whose escapes are JSON's."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""


UNFIT: Final = (
    'the system prompt of the training data holds """ at the end of a line, or a character that no Modelfile '
    "can hold; give it with each request"
)
_ENDS: Final = re.compile(r'"""[ \t]*[\r\n]')


def fits(text: str) -> bool:
    """Whether Ollama reads a text out of a Modelfile as it was.

    Between triple quotes anything is itself, quotes and backslashes too; three of them before the end of a
    line end the text, and what does not print, spaces beyond ASCII among it, is left out.
    Source: ollama parser/parser.go, ParseFile and unquote.
    """
    return not _ENDS.search(text) and all(one.isprintable() or one in "\t\r\n" for one in text)


def _quoted(text: str, what: str) -> str:
    if _ENDS.search(text):
        reason = 'holds """ at the end of a line, which ends a text in a Modelfile.'
        raise InputError(what, reason, "Leave the quotes out.")
    return f'"""{text}"""'
