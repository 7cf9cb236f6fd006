"""What a base's tokenizer and chat template do to a row besides what it says, told by probes.

Owns the probes. What is found is no fault of the rows, and still changes what the model sees of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ModelError
from .tokens import ANSWERED, ASKED, render

_MARK: Final = "7d3f1"
"""A system message that no template has of its own."""


@dataclass(frozen=True)
class Quirks:
    """`swallowing`: added tokens that take blanks beside them away; `added`: the other ones, which are not
    special either. `strips`: roles whose messages lose the blanks that they begin with. `default_system`: the
    system message that the template gives rows that have none.
    """

    swallowing: re.Pattern[str] | None
    added: re.Pattern[str] | None
    strips: frozenset[str]
    default_system: str

    @classmethod
    def of(cls, tokenizer: Any, special: frozenset[int]) -> Quirks:
        plain = [token for i, token in tokenizer.added_tokens_decoder.items() if i not in special]
        words = [
            token for token in plain if token.content.strip()
        ]  # runs of blanks are tokens of code models
        swallowing = {token.content for token in words if token.lstrip or token.rstrip}
        return cls(
            _any_of(swallowing),
            _any_of({token.content for token in words} - swallowing),
            frozenset(role for role in ("system", "user", "assistant") if _strips(tokenizer, role)),
            _default_system(tokenizer),
        )


def _any_of(words: set[str]) -> re.Pattern[str] | None:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first))) if words else None


def _strips(tokenizer: Any, role: str) -> bool:
    """Whether blanks in front of a message make no difference to the tokens."""
    before = {"system": [], "user": [], "assistant": [ASKED]}[role]
    after = {"system": [ASKED, ANSWERED], "user": [ANSWERED], "assistant": []}[role]
    found = []
    for content in ("1", "    1"):
        try:
            text = render(tokenizer, [*before, {"role": role, "content": content}, *after])
        except ModelError:  # a role that the template refuses
            return False
        if content.strip() not in text:
            return False
        found.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return found[0] == found[1]


def _default_system(tokenizer: Any) -> str:
    """What stands in a row without a system message where that of another row stands."""
    talk = [ASKED, ANSWERED]
    try:
        without = render(tokenizer, talk)
        given = render(tokenizer, [{"role": "system", "content": _MARK}, *talk])
    except ModelError:
        return ""
    before, mark, after = given.partition(_MARK)
    if not mark or not without.startswith(before) or not without.endswith(after):
        return ""
    return without[len(before) : len(without) - len(after)].strip()
