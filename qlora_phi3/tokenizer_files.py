"""The files of a checkpoint's tokenizer, checked before any library reads them.

Owns what the keys of tokenizer.json, tokenizer_config.json and the small files beside them must be, and
whether the embedding has a row for every token. Libraries meet a wrong one with exceptions of any kind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from . import json_files
from .errors import ModelError, shown

TOKENIZER: Final = "tokenizer.json"
ADDED: Final = "added_tokens.json"
SETTINGS: Final = "tokenizer_config.json"
GENERATION: Final = "generation_config.json"

_AGAIN: Final = "Download it again, or mend it."
MAX_TEMPLATE: Final = 200_000
"""Characters of a chat template; the longest of known models has some 20,000."""

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what is needed where it is not."""


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not any("\ud800" <= one <= "\udfff" for one in value)


def _is_token(value: Any) -> bool:
    """A token's text, alone or as transformers writes an `AddedToken`."""
    if isinstance(value, dict):
        switches = [value[key] for key in _SWITCHES if key in value]
        return _is_text(value.get("content")) and all(isinstance(one, bool) for one in switches)
    return _is_text(value)


_SWITCHES: Final = ("lstrip", "rstrip", "normalized", "single_word", "special")


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, dict) and all(map(_is_template, map(one.get, _NAMED))) for one in value)
    return _is_text(value) and len(value) <= MAX_TEMPLATE


_NAMED: Final = ("name", "template")


def _or_null(fits: Callable[[Any], bool], needs: str) -> Check:
    return lambda value: value is None or fits(value), f"{needs}, or null"


_TOKEN: Final = _or_null(_is_token, "a token's text")
_SWITCH: Final = _or_null(lambda value: isinstance(value, bool), "true or false")
_TOKENS: Final = _or_null(
    lambda value: isinstance(value, (list, dict)) and all(map(_is_token, _values(value))), "tokens"
)


def _values(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


_SPECIAL: Final[dict[str, Check]] = {
    **dict.fromkeys(
        ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"), _TOKEN
    ),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _TOKENS),
}
_CHECKS: Final[dict[str, dict[str, Check]]] = {
    SETTINGS: {
        **_SPECIAL,
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"), _SWITCH),
        **dict.fromkeys(("clean_up_tokenization_spaces", "use_default_system_prompt"), _SWITCH),
        "added_tokens_decoder": _or_null(
            lambda value: (
                isinstance(value, dict)
                and all(key.isascii() and key.isdecimal() and len(key) < 10 for key in value)
                and all(isinstance(one, dict) and _is_token(one) for one in value.values())
            ),
            "tokens by number",
        ),
        "model_max_length": _or_null(
            lambda value: type(value) in (int, float) and 0 < value < 10**40, "a positive number"
        ),
        "chat_template": _or_null(
            _is_template, f"a text of at most {MAX_TEMPLATE:,} characters, or a list of names and texts"
        ),
        "tokenizer_class": _or_null(_is_text, "a name"),
        "model_input_names": _or_null(
            lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of names"
        ),
        **dict.fromkeys(
            ("padding_side", "truncation_side"),
            _or_null(lambda value: value in ("left", "right"), "left or right"),
        ),
    },
    "special_tokens_map.json": _SPECIAL,
    GENERATION: {
        **dict.fromkeys(
            ("bos_token_id", "pad_token_id", "decoder_start_token_id"), _or_null(_is_id, "a token's number")
        ),
        "eos_token_id": _or_null(
            lambda value: all(map(_is_id, value)) if isinstance(value, list) else _is_id(value),
            "a token's number, or a list of them",
        ),
    },
}
"""File -> what its keys must be, where they are there."""


def check(folder: Path, rows: int | None) -> None:
    """Refuse files that no tokenizer can be made of, and more tokens than the embedding has `rows`.

    Raises:
        ModelError: the first of them.
    """
    check_settings(folder)
    highest, token = max(_tokens(folder / TOKENIZER), default=(-1, ""))
    if rows is not None and highest >= rows:
        raise beyond(folder, highest, token, rows)


def check_settings(folder: Path) -> None:
    """Refuse small files with a value of another kind: what is said of the tokenizer, not its vocabulary.

    Raises:
        ModelError: a file cannot be read, or all that is wrong in it.
    """
    for name, checks in _CHECKS.items():
        path = folder / name
        if not os.path.lexists(path):
            continue
        found = json_files.read_object(path, ModelError, _AGAIN, strict=True)
        wrong = [
            f"{key} is {shown(found[key])}, needs {needs}"
            for key, (fits, needs) in checks.items()
            if key in found and not fits(found[key])
        ]
        if wrong:
            raise ModelError(str(path), f"{'; '.join(wrong)}.", _AGAIN)
    template = folder / "chat_template.jinja"
    if os.path.lexists(template):
        _check_template(template)
    added = folder / ADDED
    if os.path.lexists(added):
        found = json_files.read_object(added, ModelError, _AGAIN, strict=True)
        for token, number in found.items():
            _number(added, token, number)


def _check_template(path: Path) -> None:
    try:
        json_files.read_text(path, MAX_TEMPLATE)
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {json_files.said(error)}."
        raise ModelError(str(path), reason, json_files.way_on(error, _AGAIN)) from None


def beyond(folder: Path, highest: int, token: str, rows: int) -> ModelError:
    """What is said of tokens that were added and never given a row: lookups would go past the embedding."""
    reason = f"the tokenizer has {highest + 1} tokens, the embedding {rows} rows ({shown(token)} has none)."
    remedy = "Resize the embedding with resize_token_embeddings and save it, or remove the added tokens."
    return ModelError(str(folder), reason, remedy)


def _tokens(path: Path) -> Iterator[tuple[int, str]]:
    """(id, text) of every token that tokenizer.json has."""
    found = json_files.read_object(path, ModelError, _AGAIN, strict=True)
    model, added = found.get("model"), found.get("added_tokens", [])
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocab, (dict, list)) or not isinstance(added, list):
        raise ModelError(str(path), "is no tokenizer: it has no model with a vocab.", _AGAIN)
    if isinstance(vocab, list):  # Unigram's: a token and its score
        yield from ((number, str(one[:1])) for number, one in enumerate(vocab) if isinstance(one, list))
    else:
        yield from ((_number(path, token, number), token) for token, number in vocab.items())
    for one in added:
        one = one if isinstance(one, Mapping) else {}
        yield _number(path, str(one.get("content")), one.get("id")), str(one.get("content"))


def _number(path: Path, token: str, number: Any) -> int:
    if not _is_id(number):
        raise ModelError(str(path), f"the token {shown(token)} has the number {shown(number)}.", _AGAIN)
    return int(number)
