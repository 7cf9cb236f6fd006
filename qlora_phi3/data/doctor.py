"""The token doctor: what is wrong or odd in the rows that a run would train on.

Owns the checks of text, turns and tokens. Prints nothing and changes nothing; what cannot be read at all is
`read`'s to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from ..errors import DataError
from ..findings import Finding, Grade
from ..recipe import Data, Recipe
from .rows import Conversation, Example, Preference, Text
from .text import tokenize_text
from .tokens import IGNORE, LossOn, TokenRow, Turns, tokenize
from .tools import tool_texts

Row = Conversation | Text
Pair = tuple[Row, TokenRow]

MEANINGS: Final[Mapping[str, tuple[Grade, str, str]]] = {
    "special-token": (
        "error",
        "Text of a message holds a special token, which would open or close turns by itself.",
        "Remove it from the text, or remove the row.",
    ),
    "refused": ("error", "The row cannot be turned into tokens.", "Change the row, or remove it."),
    "all-masked": (
        "error",
        "No token of the row is trained on: it costs time and teaches nothing.",
        "Give it an answer, or remove it.",
    ),
    "no-stop": (
        "error",
        "A trained answer does not end with the token that stops the model: it would learn to go on.",
        "Mend the chat template: each answer must close with its end-of-turn token.",
    ),
    "double-bos": (
        "warning",
        "The row begins with two beginning-of-text tokens, which the base model has never seen.",
        "Let only one of tokenizer and chat template add it.",
    ),
    "double-eos": (
        "warning",
        "The row ends with two end-of-text tokens.",
        "Let only one of tokenizer and chat template add it.",
    ),
    "turn-order": (
        "warning",
        "Two messages of the same role follow each other, which a chat never has when it is used.",
        "Join them into one message, or remove the row.",
    ),
    "garbled": (
        "warning",
        "Text was decoded wrongly somewhere on its way (a replacement character, or 'Ã©' in place of 'é'): "
        "the model learns to write it.",
        "Export the data again as UTF-8, or mend the text.",
    ),
    "duplicate": (
        "warning",
        "The row repeats an earlier one, which then counts more than the others.",
        "Remove the repetition.",
    ),
    "overlap": (
        "warning",
        "A held-out row asks the same as a training row: its metrics measure memory.",
        "Remove it from one of the two.",
    ),
    "short-answer": (
        "note",
        "An answer is shorter than two tokens: right for labels, else a sign of cut data.",
        "Look at these rows.",
    ),
}
"""Code -> grade, what it means, what to do."""


def find(code: str, places: Iterable[str]) -> list[Finding]:
    """The finding of `code` at these places, each told once though weights repeat it; none without any."""
    grade, what, fix = MEANINGS[code]
    found = tuple(dict.fromkeys(places))
    return [Finding(grade, code, what, found, fix)] if found else []


def examine_all(
    examples: Mapping[str, Sequence[Example]], recipe: Recipe, tokenizer: Any
) -> tuple[dict[str, list[TokenRow]], list[Finding]]:
    """The rows of every split that a run could tokenize, and all findings on them."""
    turns, settings = Turns.of(tokenizer), recipe.data
    conversations = {
        name: [row for row in found if not isinstance(row, Preference)] for name, found in examples.items()
    }
    rows: dict[str, list[TokenRow]] = {}
    findings: list[Finding] = []
    for name, talks in conversations.items():
        pairs, refused = tokenize_all(talks, tokenizer, turns, settings.loss_on)
        rows[name] = [row for _, row in pairs]
        findings += [*refused, *examine(pairs, tokenizer, turns), *examine_text(talks)]
        findings += examine_sizes(rows[name], settings, f"data.{name}")
    fits = sum(len(row.input_ids) <= settings.max_length for row in rows["train"])
    findings += examine_batch(fits, recipe.train.effective_batch, "data.train")
    findings += overlap(conversations["train"], conversations.get("eval", ()))
    return rows, findings


def tokenize_all(
    conversations: Iterable[Row], tokenizer: Any, turns: Turns, loss_on: LossOn
) -> tuple[list[Pair], list[Finding]]:
    """Every row as a run would tokenize it; the ones it would refuse come as findings."""
    pairs: list[Pair] = []
    special: list[str] = []
    refused: list[str] = []
    for talk in conversations:
        try:
            pairs.append((talk, _tokens(talk, tokenizer, turns, loss_on)))
        except DataError as error:
            inside = special_tokens(talk, tokenizer, turns)
            special += inside
            refused += [] if inside else [f"{problem.place}: {problem.reason}" for problem in error.problems]
    return pairs, find("special-token", special) + find("refused", refused)


def _tokens(row: Row, tokenizer: Any, turns: Turns, loss_on: LossOn) -> TokenRow:
    if isinstance(row, Text):
        return tokenize_text(row, tokenizer, turns)
    return tokenize(row, tokenizer, turns, loss_on)


def special_tokens(row: Row, tokenizer: Any, turns: Turns) -> list[str]:
    """Places of special tokens inside text, each with the token."""
    found = []
    for place, text in _texts(row):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in dict.fromkeys(token for token in ids if token in turns.special):
            found.append(f"{place}: {tokenizer.decode([token])}")
    return found


def _texts(row: Row) -> list[tuple[str, str]]:
    """(place, text) of all that a row says."""
    if isinstance(row, Text):
        return [(row.place, row.text)]
    said = [(f"{row.place}: messages[{i}]", message.content) for i, message in enumerate(row.messages)]
    return said + list(tool_texts(row))


def examine(pairs: Sequence[Pair], tokenizer: Any, turns: Turns) -> list[Finding]:
    """Findings on the tokens of a split."""
    rows = [row for _, row in pairs]
    talks = [(talk, row) for talk, row in pairs if isinstance(talk, Conversation)]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [
        *find("all-masked", (row.place for row in rows if not row.num_supervised)),
        *find(
            "no-stop", (row.place for _, row in talks if any(span[-1] != turns.end for span in _spans(row)))
        ),
        *find("double-bos", (row.place for row in rows if row.input_ids[:2] == [bos, bos])),
        *find("double-eos", (row.place for row in rows if row.input_ids[-2:] == [eos, eos])),
        *find("short-answer", (place for pair in talks for place in _short_answers(*pair))),
    ]


def examine_text(rows: Sequence[Row]) -> list[Finding]:
    """Findings that need no tokens."""
    talks = [row for row in rows if isinstance(row, Conversation)]
    return [
        *find("turn-order", (place for talk in talks for place in _repeated_roles(talk))),
        *find("garbled", (place for row in rows for place in _garbled(row))),
        *find("duplicate", _repeated(rows, lambda row: row.canonical)),
    ]


def overlap(train: Iterable[Row], held_out: Iterable[Row]) -> list[Finding]:
    """Held-out rows whose user messages a training row has too, apart from case and whitespace."""
    asked: dict[tuple[str, ...], str] = {}
    for talk in train:
        asked.setdefault(_asked(talk), talk.place)
    shared = [(talk.place, asked[_asked(talk)]) for talk in held_out if _asked(talk) in asked]
    return find("overlap", (f"{place} (as {first})" for place, first in shared))


def examine_sizes(rows: Sequence[TokenRow], data: Data, place: str) -> list[Finding]:
    """Rows that do not fit `data.max_length`."""
    over = tuple(row.place for row in rows if len(row.input_ids) > data.max_length)
    if not over:
        return []
    fix = "Raise data.max_length, or shorten them."
    limit = f"data.max_length {data.max_length}"
    if len(over) == len(rows):
        return [Finding("error", "overlong", f"Every row is longer than {limit}.", (place,), fix)]
    grade: Grade = "error" if data.overlong == "error" else "note"
    what = f"Rows are longer than {limit}; data.overlong is {data.overlong}."
    return [Finding(grade, "overlong", what, over, fix)]


def examine_batch(num_rows: int, effective_batch: int, place: str) -> list[Finding]:
    """An optimizer step that asks for more rows than there are; none at all is another finding."""
    if effective_batch <= num_rows or not num_rows:
        return []
    what = (
        f"train.effective_batch {effective_batch} is more than all rows ({num_rows}): an epoch is one step."
    )
    fix = f"Set train.effective_batch to {num_rows} or less, or add rows."
    return [Finding("warning", "large-batch", what, (place,), fix)]


def _spans(row: TokenRow) -> list[list[int]]:
    """The runs of tokens that are trained on."""
    runs = groupby(row.labels, key=lambda label: label != IGNORE)
    return [list(run) for trained, run in runs if trained]


def _short_answers(talk: Conversation, row: TokenRow) -> list[str]:
    """Assistant messages of fewer than two tokens, the one that ends them not counted."""
    answers = [i for i, message in enumerate(talk.messages) if message.role == "assistant"]
    spans = zip(answers, _spans(row), strict=False)
    return [f"{talk.place}: messages[{i}]" for i, span in spans if len(span) - 1 < 2]


def _repeated_roles(talk: Conversation) -> list[str]:
    roles = [message.role for message in talk.messages]
    twins = (i for i in range(1, len(roles)) if roles[i] == roles[i - 1] != "tool")
    return [f"{talk.place}: messages[{i}]: {roles[i]} after {roles[i]}" for i in twins]


def _repeated(talks: Iterable[Row], key: Callable[[Row], Any]) -> list[str]:
    first: dict[Any, str] = {}
    places = [(talk.place, first.setdefault(key(talk), talk.place)) for talk in talks]
    return [f"{place} (as {earlier})" for place, earlier in places if place != earlier]


def _asked(row: Row) -> tuple[str, ...]:
    """What the user says, or the whole of a text."""
    asked = [row.text] if isinstance(row, Text) else [m.content for m in row.messages if m.role == "user"]
    return tuple(" ".join(text.casefold().split()) for text in asked)


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


def _garbled(row: Row) -> list[str]:
    hits = ((place, _GARBLED.search(text)) for place, text in _texts(row))
    return [f"{place}: {hit[0]!r}" for place, hit in hits if hit is not None]
