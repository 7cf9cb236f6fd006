"""What a row of a source can be: a conversation, plain text, or a preference between two answers.

Owns the row types, what a chat template is given of them, and when two rows are equal. Knows nothing of
files, layouts or tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from typing_extensions import Self


@dataclass(frozen=True)
class Message:
    """What one side says.

    `more`: what else a chat template takes of it, as a JSON object: an assistant's `tool_calls`, a tool
    message's `name` and `tool_call_id`, a system message's `tools`. Text, so that messages can be compared.
    `trained`: whether it may be trained on; a weight of 0 says that it is only shown.
    """

    role: str
    content: str
    more: str = ""
    trained: bool = True

    @property
    def calls_tools(self) -> bool:
        return self.role == "assistant" and bool(self.more)

    def to_template(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        found = {"role": self.role, "content": self.content}
        return {**found, **json.loads(self.more)} if self.more else found


Unused = tuple[tuple[str, Any], ...]
"""Keys of a row that its format does not use, each with its value."""


@dataclass(frozen=True)
class _Example:
    """What every kind of row has besides what it says.

    `unused`: told by the doctor, and never part of what a row is.
    """

    unused: Unused = field(default=(), compare=False, repr=False, kw_only=True)

    def without_unused(self) -> Self:
        return replace(self, unused=()) if self.unused else self


@dataclass(frozen=True)
class Conversation(_Example):
    """Messages, and the place they came from: `file:line`, `file: row N` or `org/name[split]: row N`.

    `tools_json`: the functions that the assistant may call, as a JSON list; empty where there are none.
    """

    messages: tuple[Message, ...]
    place: str
    tools_json: str = ""

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """What `apply_chat_template` takes as `tools`."""
        return json.loads(self.tools_json) if self.tools_json else None

    @property
    def has_tools(self) -> bool:
        """Whether a template gets more of it than roles and contents."""
        return bool(self.tools_json) or any([message.more for message in self.messages])

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple([message.content for message in self.messages])

    @property
    def shown_only(self) -> tuple[int, ...]:
        """Indices of the messages that are not trained on, whatever `data.loss_on` says."""
        return tuple([i for i, message in enumerate(self.messages) if not message.trained])

    @property
    def system(self) -> str | None:
        """The system message that it begins with."""
        first = self.messages[0]
        return first.content if first.role == "system" else None

    @property
    def last_answer(self) -> int:
        """Index of the last assistant message."""
        from_the_end = range(len(self.messages) - 1, -1, -1)
        return next(i for i in from_the_end if self.messages[i].role == "assistant")

    def to_template(self, stop: int | None = None) -> list[dict[str, Any]]:
        """The first `stop` messages as a chat template takes them."""
        return [message.to_template() for message in self.messages[:stop]]

    @property
    def canonical(self) -> str:
        """Equal for equal rows, wherever they stand."""
        weights = [self.shown_only] if self.shown_only else []
        return _canonical([self.tools, self.to_template(), *weights])


@dataclass(frozen=True)
class Text(_Example):
    """A document without turns."""

    text: str
    place: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)

    @property
    def canonical(self) -> str:
        """Equal for equal rows, wherever they stand."""
        return _canonical(self.text)


@dataclass(frozen=True)
class Preference(_Example):
    """Two ways to go on after the same messages, of which the first is better.

    Both begin with an assistant message, and differ in it.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    place: str
    tools_json: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(message.content for message in self.prompt + self.chosen + self.rejected)

    def conversation(self, answer: tuple[Message, ...]) -> Conversation:
        """The prompt with one of the two behind it."""
        return Conversation(self.prompt + answer, self.place, self.tools_json)

    @property
    def canonical(self) -> str:
        """Equal for equal rows, wherever they stand."""
        both = [self.conversation(self.chosen), self.conversation(self.rejected)]
        return _canonical([one.canonical for one in both])


Row = Conversation | Text
"""A row that `train.task: sft` learns from."""

Example = Row | Preference
"""A row of any format."""


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
