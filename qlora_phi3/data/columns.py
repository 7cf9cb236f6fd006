"""Keys of a row that its format does not use: which of them may be left out, and which would be missed.

Owns what a key's name says about its values. A key is judged by its words, so that `Answers`, `answer_text`
and `goldAnswer` are one. Keys that are left out are told, never skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from ..errors import DataError, Problem, shown
from .rows import Unused

TEXT: Final = frozenset({"text"})
PAIRS: Final = frozenset({"alpaca", "prompt-completion", "preference"})
TALKS: Final = frozenset({"messages", "sharegpt"})
CHATS: Final = PAIRS | TALKS
ALL: Final = CHATS | TEXT

SYSTEM: Final = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
"""Keys that hold the system message of a row."""


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


@dataclass(frozen=True)
class Meaning:
    """What keys of these names say, in rows of which formats, and what to do with them.

    `phrases`: the whole key, its words joined by _. `last`: its last word, singular or plural.
    `hard`: refused even where the source names its format, since the row would mean something else.
    `numbered`: a number or a path may stand for it, as in `label_id` and `image_path`.
    `judges`: the value false says that the row is a bad one. `answers`: what it holds may be trained on.
    """

    says: str
    remedy: str
    formats: frozenset[str] = ALL
    phrases: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    hard: bool = False
    numbered: bool = False
    judges: bool = False
    answers: bool = False

    def fits(self, words: tuple[str, ...], format_: str) -> bool:
        if format_ not in self.formats:
            return False
        return "_".join(words) in self.phrases or any(one in self.last for one in singulars(words[-1]))


_PAIR: Final = "rename {used} to `prompt` and {key} to `completion`"

MEANINGS: Final = (
    Meaning(
        "that says how much a row counts",
        "Keep the rows that count, each with the value 1. A whole source has data.train.weight.",
        phrases=_set("weight weights sample_weight loss_weight row_weight train mask loss_mask"),
        hard=True,
    ),
    Meaning(
        "that changes what the model is shown",
        "Remove it, if the row means the same without it.",
        CHATS,
        _set("functions documents chat_template_kwargs"),
        hard=True,
    ),
    Meaning(
        "that changes what the model is shown",
        "Name it `tools`, if it has the schemas of functions that the assistant may call.",
        CHATS,
        last=_set("tool function"),
        hard=True,
    ),
    Meaning(
        "those are earlier turns",
        'Write them as messages: {{"messages": [{{"role": "user", "content": "..."}}, ...]}}.',
        CHATS,
        last=_set("history"),
        hard=True,
    ),
    Meaning(
        "that tells the model how to behave",
        "Name it `system`: it is the first message then.",
        CHATS - {"preference"},
        frozenset(SYSTEM),
        hard=True,
    ),
    Meaning(
        "that tells the model how to behave",
        'Put it where the model sees it: {{"messages": [{{"role": "system", "content": "..."}}, ...]}}.',
        frozenset({"preference"}),
        frozenset(SYSTEM),
        hard=True,
    ),
    Meaning(
        "that belongs to the question",
        "Put it into {used}, where the model sees it.",
        PAIRS,
        _set("context contexts input inputs"),
        _set("choice option"),
        hard=True,
    ),
    Meaning(
        "that is no text",
        "Leave out the rows that mean nothing without it, and the key of the others.",
        CHATS,
        last=_set("image img audio video picture pixel_values"),
        phrases=_set("pixel_values"),
        hard=True,
        numbered=True,
    ),
    Meaning(
        "that is no text",
        "Leave out the rows that mean nothing without it, and the key of the others.",
        TEXT,
        last=_set("image img audio video picture"),
        phrases=_set("pixel_values"),
        numbered=True,
    ),
    Meaning(
        "that looks like an answer",
        "To train on it, " + _PAIR + ".",
        TEXT,
        phrases=_set("tldr tl_dr code sql ans gpt assistant bot"),
        last=_set(
            "answer response output completion summary target reply solution translation highlight truth "
            "gold expected continuation chosen rejected generation conclusion verdict correction paraphrase"
        ),
        answers=True,
    ),
    Meaning(
        "that looks like an answer",
        "Keep the answer to train on in {answer}.",
        CHATS,
        phrases=_set("tldr tl_dr ans gpt assistant bot"),
        last=_set(
            "answer response output completion summary target reply solution translation highlight truth "
            "gold expected continuation chosen rejected generation conclusion verdict correction"
        ),
        answers=True,
    ),
    Meaning(
        "that looks like a label",
        "To train on it, " + _PAIR + ", as text.",
        TEXT,
        phrases=_set("ner_tags pos_tags tag_ids"),
        last=_set(
            "label class sentiment intent emotion polarity stance category rating star entity annotation "
            "spam toxic toxicity hate offensive"
        ),
        answers=True,
        numbered=True,
    ),
    Meaning(
        "that looks like a label",
        "If the model shall say it, put it into {answer}; if it says which rows are good, keep only those.",
        CHATS,
        last=_set("label class sentiment intent emotion polarity stance"),
        numbered=True,
        judges=True,
        answers=True,
    ),
    Meaning(
        "that looks like a line of thought",
        "If the model shall write it, put it into {answer}, in front.",
        phrases=_set("chain_of_thought cot think"),
        last=_set("reasoning rationale thought thinking explanation scratchpad cot justification"),
    ),
    Meaning(
        "that says which rows belong together, and each would be learned alone",
        'Write a conversation as one row: {{"messages": [{{"role": "user", "content": "..."}}, ...]}}.',
        TEXT,
        _set(
            "role from speaker sender parent_id parent message_id reply_to in_reply_to turn turn_id "
            "turn_index turn_idx conversation_id thread_id dialogue_id dialog_id "
            "system system_prompt system_message"
        ),
        _set("history"),
    ),
    Meaning(
        "that says which rows belong together, and what was said before would be missing",
        'Write a conversation as one row: {{"messages": [{{"role": "user", "content": "..."}}, ...]}}.',
        PAIRS,
        _set(
            "role from speaker sender parent_id parent reply_to in_reply_to turn turn_id turn_index turn_idx"
        ),
    ),
    Meaning(
        "that looks like the question",
        "To show it to the model, rename {key} to `prompt` and {used} to `completion`.",
        TEXT,
        _set("context contexts"),
        _set("question prompt instruction query input problem"),
    ),
    Meaning(
        "that looks like the question",
        "Put it into {used}, where the model sees it.",
        PAIRS,
        last=_set("question query problem instruction"),
    ),
    Meaning(
        "that belongs to the question",
        "Put it into the question, where the model sees it.",
        TALKS,
        _set("context contexts input inputs"),
    ),
    Meaning(
        "that belongs to the question",
        "Put it into the question, where the model sees it.",
        CHATS,
        last=_set("passage document article paragraph background evidence knowledge persona premise"),
    ),
)
"""In the order in which a row's keys are told: one message names all keys of the first meaning that fits."""

DESCRIBING: Final = _set(
    "id idx index uuid guid hash md5 sha sha256 checksum url uri link source origin dataset corpus dump "
    "timestamp time date datetime created updated modified year lang language locale version license file "
    "filename path row line page meta metadata length count model author user score prob probability "
    "perplexity token split subset fold partition country state ip header identifier"
)
"""Last words of keys that only describe a row: they are named, and nothing is made of them."""

MAX_NAMED: Final = 8
"""Keys that a message names."""
LONG: Final = 40
"""Characters of a text that does not stand in another one by chance."""

_COUNTING: Final = _set("num n count has len length min max avg mean total score token tokens")
"""First words of keys that hold a figure about what the others name, such as `num_answers`."""
_NEUTRAL: Final = (("parallel", "tool", "calls"), ("is", "function", "call"))
"""Keys that say how an API was called, or what stands in the messages anyway."""
_DETAIL: Final = _set(
    "text txt str string content body raw clean field column col json key step steps process trace chain"
)
"""Last words that leave a key's meaning as it is, as in `answer_text`."""
_NUMBERED: Final = _set("id ids idx index name num value code url uri path file bytes")
"""The same for labels and pictures, which tables name by a number or a path."""
_CREATED: Final = _set("created updated modified crawl warc unnamed")

NAMES: Final = 2**16
"""Keys whose meaning is remembered: a table of thousands of columns has them in every row."""
MAX_KEY: Final = 200
"""Characters of a key that say what it means."""

_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_HELD_OUT: Final = re.compile(r"(test|valid|val|dev|eval|held)", re.IGNORECASE)
_TRAINING: Final = re.compile(r"train", re.IGNORECASE)
_SPLIT: Final = _set("split subset partition fold set")


@lru_cache(maxsize=NAMES)
def words_of(key: str) -> tuple[str, ...]:
    """`goldAnswer_text` -> gold, answer, text; `CoT` is one word."""
    key = key[:MAX_KEY]
    if len(key) <= 4 and key.isalpha():
        return (key.casefold(),)
    return tuple(word.casefold() for word in _WORD.findall(key))


@lru_cache(maxsize=NAMES)
def meaning(key: str, format_: str) -> Meaning | None:
    """What a key that `format_` does not use says by its name; None where it may be left out."""
    words = words_of(key)
    if not words or words[0] in _COUNTING or words in _NEUTRAL or (len(words) > 1 and words[0] == "original"):
        return None
    plain = _without(words, _DETAIL)
    number = _without(plain, _NUMBERED)
    whole = (one for one in MEANINGS if one.fits(plain, format_))
    numbered = (one for one in MEANINGS if one.numbered and one.fits(number, format_))
    return next(whole, None) or next(numbered, None)


def _without(words: tuple[str, ...], endings: frozenset[str]) -> tuple[str, ...]:
    """Without words at the end that add nothing; numbers, letters and language codes are such words too."""
    stop = len(words)
    while stop > 1 and (
        words[stop - 1] in endings
        or words[stop - 1].isdigit()
        or (len(words[stop - 1]) <= 2 and words[stop - 1] not in ("id", "tl", "dr"))
    ):
        stop -= 1
    return words[:stop]


def singulars(word: str) -> Iterable[str]:
    yield word
    if word.endswith("ies"):
        yield f"{word[:-3]}y"
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]


@lru_cache(maxsize=NAMES)
def describes(key: str) -> bool:
    """Whether a key of this name only says where a row is from, or how it is counted."""
    words = words_of(key)
    if not words or words[0] in _COUNTING or words[0] in _CREATED or all(word.isdigit() for word in words):
        return True
    if words in _NEUTRAL:
        return True
    return any(one in DESCRIBING for one in singulars(words[-1]))


def carries(value: Any) -> bool:
    """Whether a value says anything: blanks, nulls and lists of them do not, 0 and false do."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    waiting = [value]  # no recursion: JSON may be nested as deep as Python can read it
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if one and not one.isspace():
                return True
        elif isinstance(one, dict):  # Parquet fills the fields that a row lacks with null
            waiting += one.values()
        elif isinstance(one, (list, tuple)):
            waiting += one
        elif one is not None and one == one:  # NaN is what pandas writes for nothing
            return True
    return False


def is_neutral(key: str, value: Any) -> bool:
    """Whether a weight or switch is what every row has without it, such as OpenAI's `weight: 1`."""
    words = words_of(key)
    if words == ("train",):
        return value in (True, "true", "True")
    values = value if isinstance(value, list) else [value]
    weight = bool(words) and words[-1] in ("weight", "weights", "mask")
    return weight and all([one in (1, True, "1", "1.0") for one in values])


def unused(
    row: Mapping[str, Any],
    used: Iterable[str],
    format_: str,
    shape: tuple[str, str],
    place: str,
    *,
    said: Sequence[str],
    named: bool,
) -> Unused:
    """The keys beside those that are `used`, where nothing is missed without them.

    `shape`: the key of what is asked, or of the text, and that of the answer, for messages. `said`: the texts
    that are read, and what stands in one of them is not missed. `named`: the source names the format itself,
    and so says that only its keys are meant.

    Raises:
        DataError: keys that would be missed.
    """
    found, missed = [], []
    for key, value in row.items():
        if key in used or not carries(value):
            continue
        one = meaning(key, format_)
        if one is None or _may_go(one, format_, value, named) or _stands_in(value, said):
            found.append((key, value))
        elif not is_neutral(key, value):
            missed.append((key, one))
    if missed:
        first = min((one for _, one in missed), key=MEANINGS.index)
        keys = [key for key, one in missed if one is first]
        raise _refusal(keys, first, format_, shape, place, row[keys[0]])
    return tuple(found)


def _stands_in(value: Any, said: Sequence[str]) -> bool:
    """Whether a text is a message, or a part of one that is too long to be there by chance."""
    if not isinstance(value, str):
        return False
    text = value.strip()
    return any(text == one.strip() or (len(text) >= LONG and text in one) for one in said)


def _may_go(one: Meaning, format_: str, value: Any, named: bool) -> bool:
    """Whether a source that names its format may do without."""
    return named and (format_ == "text" or not (one.hard or (one.judges and value is False)))


def _refusal(
    keys: list[str], one: Meaning, format_: str, shape: tuple[str, str], place: str, value: Any
) -> DataError:
    named = [f"`{_short(key)}`" for key in keys[:MAX_NAMED]]
    if len(keys) > MAX_NAMED:
        named.append(f"{len(keys) - MAX_NAMED:,} more")
    *others, final = named
    names = f"{', '.join(others)} and {final}" if others else final
    asked, answer = shape
    reason = f"{names} would be left out ({shown(value)}): {one.says}."
    remedy = one.remedy.format(used=f"`{asked}`", key=f"`{_short(keys[0])}`", answer=f"`{answer}`")
    if format_ == "text":
        remedy += " If only `text` is meant, write `format: text` beside its path."
    elif _may_go(one, format_, value, True):
        remedy += f" If it is not meant, write `format: {format_}` beside its path."
    return DataError(place, reason, remedy)


def _short(key: str) -> str:
    return key if len(key) <= 60 else f"{key[:57]}..."


def split_problem(unused: Unused, place: str, use: str) -> Problem | None:
    """Why a row that names its own split is no row to train on, or none to hold out."""
    wrong, done = (_HELD_OUT, "trained on") if use == "train" else (_TRAINING, "held out")
    for key, value in unused:
        if wrong.match(_named_split(key, value)):
            reason = f"`{_short(key)}` says {shown(value)}, and the row would be {done}."
            remedy = (
                "Give each split a file of its own: data.train.path=train.jsonl data.eval.path=test.jsonl."
            )
            return Problem(place, reason, remedy)
    return None


def _named_split(key: str, value: Any) -> str:
    """What `split: test` and `is_test: true` say; nothing for other keys."""
    words = words_of(key)
    if words and words[-1] in _SPLIT and isinstance(value, str):
        return value.strip()
    yes = words[:1] == ("is",) and len(words) == 2 and value in (True, "true", "True", "1")
    return words[1] if yes else ""
