"""Where the answers of an export end: every token at which this toolkit stops, and none of it left to others.

Owns the ids and the generation_config.json that says them. A base may name its eos alone, and then plain
transformers goes on behind `<|end|>`. Refuses a generation_config.json that cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import json_files
from ..data.tokens import Turns
from ..errors import ModelError
from ..model import load_tokenizer

if TYPE_CHECKING:
    from ..weights import Checkpoint
    from .source import Source

NAME: Final = "generation_config.json"


def stops_of(source: Source) -> list[int]:
    """The template's end of turn, the tokenizer's eos, and what the base itself names, ascending."""
    tokenizer = load_tokenizer(source.checkpoint.folder)
    found = {Turns.of(tokenizer).end, tokenizer.eos_token_id, *named_by(source.checkpoint)}
    return sorted(token for token in found if token is not None)


def named_by(checkpoint: Checkpoint) -> list[int | None]:
    """What the base's own settings of answering stop at.

    Raises:
        ModelError: they cannot be read.
    """
    named = _settings(checkpoint.folder, checkpoint.config).get("eos_token_id")
    return named if isinstance(named, list) else [named]


def generation_config(source: Source) -> dict[str, Any]:
    """The base's own settings of answering, with every stop; what is internal to transformers goes.

    `_from_model_config` is: transformers would build the settings anew from config.json, without our stops.
    """
    settings = _settings(source.checkpoint.folder, source.checkpoint.config)
    kept = {key: value for key, value in settings.items() if not key.startswith("_")}
    tokenizer = load_tokenizer(source.checkpoint.folder)
    pad = kept.get("pad_token_id")
    ids = {"eos_token_id": stops_of(source), "pad_token_id": tokenizer.pad_token_id if pad is None else pad}
    return kept | ids


def in_folder(adapter: Path) -> list[int]:
    """The stops that an adapter's own tokenizer tells; none where it has no tokenizer of a chat model."""
    try:
        tokenizer = load_tokenizer(adapter)
        return sorted({Turns.of(tokenizer).end, tokenizer.eos_token_id} - {None})
    except ModelError:
        return []


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json; where there is none what transformers takes from config.json.

    Raises:
        ModelError: it is no JSON object, or its eos is no id.
    """
    path = folder / NAME
    if not path.is_file():
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {name: config[name] for name in names if config.get(name) is not None}
    found = json_files.read(path, ModelError, "Download it again.")
    eos = found.get("eos_token_id") if isinstance(found, dict) else ""
    ids = eos if isinstance(eos, list) else [eos]
    if not all(one is None or (isinstance(one, int) and not isinstance(one, bool)) for one in ids):
        raise ModelError(str(path), "holds no settings with eos_token_id.", "Download it again.")
    assert isinstance(found, dict)
    return found
