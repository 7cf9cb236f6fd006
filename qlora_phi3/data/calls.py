"""Functions that an assistant may call: their schemas, its calls, and results, in the ways they are written.

Owns what becomes of OpenAI's first functions, LLaMA-Factory's calls in text, and Anthropic's parts: all
become what chat templates take. Whether a base's template shows them is `tools`' matter.
"""

from __future__ import annotations

import json
from typing import Any, Final

from ..errors import DataError
from .columns import carries
from .contents import kind
from .json_text import parse

_AS_OBJECT: Final = "Write it as an object, or as the JSON text of one."
_CALL: Final = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
_SCHEMA: Final = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
_PARTS: Final = ("tool_use", "tool_result")
"""Types of Anthropic's parts that are messages of their own elsewhere."""


def read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as templates take them: arguments that are written as JSON text become what it holds.

    Raises:
        DataError: not a list of calls with a name and arguments.
    """
    if not isinstance(value, list):
        raise DataError(place, f"tool_calls is {kind(value)}, not a list.", f"Write [{_CALL}].")
    return [_call(one, f"{place}: tool_calls[{i}]") for i, one in enumerate(value)]


def read_function_call(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls of a `function_call`: an object or a list of them, or the JSON text of either."""
    if isinstance(value, str):
        value = parse(value, place, _AS_OBJECT, "the call is ")
    return [
        {"type": "function", "function": _call(one, place)}
        for one in (value if isinstance(value, list) else [value])
    ]


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


def read_tools(row: dict[str, Any], place: str) -> str:
    """Schemas of the functions beside a row as JSON text; OpenAI's first `functions` become `tools`.

    Raises:
        DataError: not a list of objects, or both.
    """
    tools, functions = _schemas(row, "tools", place), _schemas(row, "functions", place)
    if tools and functions:
        raise DataError(place, "has both `tools` and `functions`.", "Put all schemas into `tools`.")
    if functions:
        tools = [one if "function" in one else {"type": "function", "function": one} for one in functions]
    return json_of(tools, place, "tools") if tools else ""


def read_schemas(value: Any, place: str) -> str:
    """The tools of a system message."""
    tools = _schemas({"tools": value}, "tools", place)
    return json_of(tools, place, "tools") if tools else ""


def _schemas(row: dict[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    value = row.get(key)
    if not carries(value):
        return []
    tools = parse(value, place, _AS_OBJECT, f"{key} is ") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(place, f"{key} is not a list of objects.", f"Write [{_SCHEMA}].")
    return tools


def json_of(value: Any, place: str, key: str) -> str:
    """Keys stay in their order, in which a template shows them."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"{key} has a value that JSON cannot hold: {str(error).splitlines()[0]}."
        raise DataError(place, reason, "Write it as text.") from None
    return text


def has_calls_in_parts(content: Any) -> bool:
    """Whether a content is written as Anthropic writes calls and results."""
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in _PARTS for part in content
    )


def in_own_messages(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """A message of Anthropic's parts as messages of role and content, in its order.

    Raises:
        DataError: a call outside an answer, or a result inside one.
    """
    beside = {key: value for key, value in message.items() if key not in ("role", "content")}
    found: list[dict[str, Any]] = []
    for part in message["content"]:
        type_ = part.get("type") if isinstance(part, dict) else None
        if type_ in _PARTS and message["role"] != ("assistant" if type_ == "tool_use" else "user"):
            reason = f"is a message of {message['role']}, and has a part of type {type_!r}."
            raise DataError(place, reason, "The assistant calls (tool_use), the user has the result.")
        if type_ == "tool_result":
            found.append(
                {"role": "tool", "tool_call_id": part.get("tool_use_id"), "content": part.get("content", "")}
            )
        elif type_ == "tool_use":
            function = {"name": part.get("name"), "arguments": part.get("input", {})}
            call = {"id": part.get("id"), "type": "function", "function": function}
            if not found:
                found.append({**beside, "role": "assistant", "content": ""})
            found[-1].setdefault("tool_calls", []).append(call)
        elif found and found[-1]["role"] == message["role"] and not found[-1].get("tool_calls"):
            found[-1]["content"].append(part)
        elif found and found[-1].get("tool_calls"):
            raise DataError(place, "has text behind its calls.", "Write the text in front of them.")
        else:
            found.append({**beside, "role": message["role"], "content": [part]})
    return found
