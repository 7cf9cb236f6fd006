"""What to do with a row whose keys are of no format: which to rename, where their names say what they are.

Owns guesses that are only told. Nothing is read because of one.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Any, Final

from .columns import meaning, singulars, words_of
from .contents import kind


def found_in(row: Any) -> str:
    """What stands where a row was expected."""
    if not isinstance(row, dict) or not row:
        return kind(row)
    keys = [repr(key) if len(str(key)) <= 60 else repr(f"{str(key)[:57]}...") for key in row]
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return f"keys {', '.join(keys[:12])}{more}"


def hint(row: Any) -> str:
    """A way on for the commonest reasons that a row's keys are not found; nothing where none is known."""
    if not isinstance(row, dict):
        return ""
    first = dict(islice(row.items(), MAX_KEYS))
    return _known(first) or _rename(first)


MAX_KEYS: Final = 200
"""Keys that are looked at; a row of more is no row that anybody wrote."""


_ASKED: Final = (
    *("question", "query", "problem", "prompt", "instruction", "input", "user", "human"),
    *("document", "article", "text", "dialogue", "dialog", "message", "sentence", "review", "source"),
)
"""Words of keys that hold a question, the likeliest first."""
_PLAIN: Final = ("content", "document", "body", "article", "passage", "paragraph")
"""Words of keys that hold plain text."""
_SPOKEN: Final = re.compile(r"(?im)^\s*(?:#+\s*)?(?:user|human|assistant|instruction)\s*:")


def _known(row: dict[str, Any]) -> str:
    """What to do with shapes of public data sets that hold something else than messages or texts."""
    if {"role", "from"} & set(row) and {"content", "value"} & set(row):
        return 'A message is no row: write {"messages": [{"role": "user", "content": "..."}, ...]}.'
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        for wanted, speaker in (("messages", "role"), ("conversations", "from")):
            if isinstance(first, dict) and speaker in first:
                return _renaming([(str(key), wanted)])
        if isinstance(first, dict) and {"label", "text"} <= set(first):
            return (
                f"`{cut(key)}` holds text that is rendered already, with its masks: write the turns as "
                "messages, and the base's template and masks are applied for you."
            )
        if isinstance(first, dict) and {"input", "output"} <= set(first):
            return (
                f'Write each of `{cut(key)}` as a row of its own: {{"prompt": "...", "completion": "..."}}.'
            )
        if isinstance(value, str) and len(_SPOKEN.findall(value[:MAX_LOOKED])) > 1:
            return (
                f"`{cut(key)}` is a conversation as one text: write its turns as "
                '{"messages": [{"role": "user", "content": "..."}, ...]}.'
            )
    languages = row.get("translation")
    if isinstance(languages, dict) and len(languages) > 1:
        one, other = list(map(str, languages))[:2]
        return f"Write the text of `{cut(one)}` as `prompt` and that of `{cut(other)}` as `completion`."
    return ""


MAX_LOOKED: Final = 10_000
"""Characters of a value that are searched."""


def _rename(row: dict[str, Any]) -> str:
    """Which keys to rename, where their names say what they are; nothing where they do not."""
    names = {"_".join(words_of(str(key))): str(key) for key in row}
    answers = _answers(row, "messages") or _answers(row, "text")  # beside text more words mean a label
    asked = _first(_ASKED, names, answers)
    if asked and len(answers) == 1:
        return _renaming([(asked, "prompt"), (answers[0], "completion")])
    if asked and answers:
        told = ", ".join(f"`{cut(key)}`" for key in answers[:MAX_NAMED])
        return f"Rename `{cut(asked)}` to `prompt` and the answer to train on (of {told}) to `completion`."
    plain = "" if answers else _first(_PLAIN, names, [])
    return f"If it is plain text, rename `{cut(plain)}` to `text`." if plain else ""


MAX_NAMED: Final = 6
"""Keys that a remedy names."""


def _first(words: tuple[str, ...], names: dict[str, str], taken: list[str]) -> str:
    """The key that is named by the first of these words, in the singular or the plural."""
    found = {word: key for name, key in names.items() if key not in taken for word in singulars(name)}
    return next((found[word] for word in words if word in found), "")


def _answers(row: dict[str, Any], format_: str) -> list[str]:
    """Keys that hold an answer or a label."""
    meant = ((key, meaning(key, format_)) for key in map(str, row))
    return [key for key, one in meant if one is not None and one.answers]


def _renaming(pairs: list[tuple[str, str]]) -> str:
    return "Rename " + " and ".join(f"`{cut(old)}` to `{new}`" for old, new in pairs if old != new) + "."


def cut(name: object) -> str:
    """A key for a message."""
    text = str(name)
    return text if len(text) <= 60 else f"{text[:57]}..."
