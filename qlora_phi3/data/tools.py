"""Which parts of function calling a chat template shows, told by probes, and the refusal of the others.

Owns the probes for tool schemas, calls and results. A template that leaves one out without a word would
teach calls to functions that the model was never shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..errors import DataError
from .rows import Conversation

_PARTS: Final = {"assistant": ("tool_calls", "tool_calls"), "system": ("system tools", "tools")}
"""Role -> what is probed of its messages, and the key that it stands under."""

Messages = list[dict[str, Any]]
Render = Callable[[Messages, list[dict[str, Any]] | None], str]
"""Messages and tools -> the text that a template makes of them."""

_ASKED: Final = {"role": "user", "content": "1"}
_ANSWERED: Final = {"role": "assistant", "content": "2"}
_IN_SYSTEM: Final = 'It takes them as text: {"role": "system", "content": "...", "tools": "[...]"}.'
_ANOTHER: Final = "Use a base whose template shows them, or remove the row."


def silent_tools(render: Render) -> frozenset[str]:
    """Out of `tools`, `system tools`, `tool_calls` and `tool`: what makes no difference to the text."""
    found = set()
    for kind, probe in _PROBES.items():
        try:
            rendered = {render(*probe(name)) for name in ("f", "g")}
        except Exception:  # refused aloud, and so will be the row
            continue
        if len(rendered) == 1:
            found.add(kind)
    return frozenset(found)


def check_shown(conversation: Conversation, silent: frozenset[str]) -> None:
    """Refuse what the template would leave out.

    Raises:
        DataError: tools, or a message's calls or tools, that are in `silent`.
    """
    if conversation.tools_json and "tools" in silent:
        remedy = _ANOTHER if "system tools" in silent else _IN_SYSTEM
        raise DataError(conversation.place, "the model's chat template leaves out `tools`.", remedy)
    for i, message in enumerate(conversation.messages):
        kind, key = _PARTS.get(message.role, ("", ""))
        if message.more and kind in silent:
            place = f"{conversation.place}: messages[{i}]"
            raise DataError(place, f"the model's chat template leaves out `{key}`.", _ANOTHER)


def tool_texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """(place, text) of what the template shows of tools, beside the messages' own texts."""
    if conversation.tools_json:
        yield f"{conversation.place}: tools", conversation.tools_json
    for i, message in enumerate(conversation.messages):
        if message.more:
            yield f"{conversation.place}: messages[{i}]", message.more


def _schema(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "1"}}}
    function = {"name": name, "description": "1", "parameters": {**parameters, "required": ["x"]}}
    return {"type": "function", "function": function}


def _calling(name: str) -> dict[str, Any]:
    call = {"id": "123456789", "type": "function", "function": {"name": name, "arguments": {"x": "1"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _system(name: str) -> dict[str, Any]:
    return {"role": "system", "content": "1", "tools": json.dumps([_schema(name)])}


def _result(name: str) -> dict[str, Any]:
    return {"role": "tool", "name": "f", "tool_call_id": "123456789", "content": name}


_PROBES: Final[dict[str, Callable[[str], tuple[Messages, list[dict[str, Any]] | None]]]] = {
    "tools": lambda name: ([_ASKED, _ANSWERED], [_schema(name)]),
    "system tools": lambda name: ([_system(name), _ASKED, _ANSWERED], None),
    "tool_calls": lambda name: ([_ASKED, _calling(name)], [_schema("f")]),
    "tool": lambda name: ([_ASKED, _calling("f"), _result(name), _ANSWERED], [_schema("f")]),
}
"""What is probed -> a conversation that differs in it alone."""
