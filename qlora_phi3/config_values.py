"""The values of a checkpoint's config.json, checked before any library reads them.

Owns what each key of `Phi3Config` (transformers 5.23) must be. Libraries meet a wrong one with exceptions of
any kind, with hours of building layers, or with a message about something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from .errors import shown

MAX_LAYERS: Final = 1000
MAX_SIZE: Final = 10_000_000
MAX_POSITIONS: Final = 1_000_000_000

_PADDING: Final = 32000
"""What `Phi3Config` takes where `pad_token_id` is left out."""

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is right, and what is needed where it is not."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A finite number; whole ones of 400 digits are no float."""
    is_float = isinstance(value, float) and math.isfinite(value)
    return is_float or (_is_whole(value) and abs(value) < 10**300)


def _count(most: int) -> Check:
    return lambda value: _is_whole(value) and 1 <= value <= most, f"a positive whole number of at most {most}"


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Check:
    def fits(value: Any) -> bool:
        return _is_number(value) and (least < value if above else least <= value) and value <= most

    upper = "" if most == math.inf else f" and at most {most}"
    return fits, f"a number {'above' if above else 'from'} {least}{upper}"


def _point(check: Check) -> Check:
    """`Phi3Config` takes no whole number there."""
    return lambda value: isinstance(value, float) and check[0](value), f"{check[1]}, written with a point"


_SIZE: Final = _count(MAX_SIZE)
_POSITIONS: Final = _count(MAX_POSITIONS)
_SHARE: Final = _number(0, 1)
_ID: Final[Check] = (
    lambda value: value is None or (_is_whole(value) and abs(value) <= MAX_SIZE),
    "a token's number or null",
)
_IDS: Final[Check] = (
    lambda value: all(_ID[0](one) for one in (value if isinstance(value, list) else [value])),
    "a token's number, a list of them or null",
)
_SWITCH: Final[Check] = (lambda value: isinstance(value, bool), "true or false")
_NAMES: Final[Check] = (
    lambda value: value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)),
    "a list of names",
)
_ABOVE_ZERO: Final = _number(0, above=True)
_FACTORS: Final = _or_null(
    (
        lambda value: isinstance(value, list) and all(_ABOVE_ZERO[0](one) for one in value),
        "a list of numbers above 0",
    )
)
"""Frequencies are divided by them: 0 makes every logit NaN."""

_DTYPES: Final = ("auto", "bfloat16", "float16", "float32", "float64")


def _one_of(*names: str | None) -> Check:
    known = ", ".join(name or "null" for name in names if not (name or "").startswith("torch."))
    return lambda value: (value is None or isinstance(value, str)) and value in names, f"one of {known}"


REQUIRED: Final[dict[str, Check]] = {
    "num_hidden_layers": _count(MAX_LAYERS),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"), _SIZE),
}
OPTIONAL: Final[dict[str, Check]] = {
    "architectures": _NAMES,
    "num_key_value_heads": _or_null(_SIZE),
    "head_dim": _SIZE,
    "max_position_embeddings": _POSITIONS,
    "original_max_position_embeddings": _POSITIONS,
    "sliding_window": _or_null(_POSITIONS),
    "tie_word_embeddings": _SWITCH,
    "use_cache": _SWITCH,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop"), _SHARE),
    "attention_dropout": (lambda value: _is_number(value) and value == 0, "0: attention drops nothing here"),
    "hidden_act": _one_of("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"),
    **dict.fromkeys(
        ("dtype", "torch_dtype"), _one_of(None, *_DTYPES, *(f"torch.{name}" for name in _DTYPES))
    ),
    "transformers_version": (lambda value: value is None or isinstance(value, str), "a version"),
    "initializer_range": _point(_number(0)),
    "rms_norm_eps": _point(_number(0, 1, above=True)),
    "rope_theta": _or_null(_number(0, above=True)),
    "partial_rotary_factor": _or_null(_number(0, 1, above=True)),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters"),
        _or_null((lambda value: isinstance(value, dict), "a mapping")),
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _ID),
    "eos_token_id": _IDS,
}
_SCALED: Final = ("longrope", "su", "yarn")
"""Kinds of RoPE with a factor for each frequency, the 128k models'; they were once called otherwise."""

_ROPE: Final[dict[str, Check]] = {
    **{key: OPTIONAL[key] for key in ("rope_theta", "partial_rotary_factor")},
    "original_max_position_embeddings": OPTIONAL["original_max_position_embeddings"],
    **dict.fromkeys(("type", "rope_type"), _one_of(None, "default", *_SCALED)),
    **dict.fromkeys(("short_factor", "long_factor"), _FACTORS),
}


def known(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json goes on to `Phi3Config`: others' keys become attributes of it, methods included."""
    return {key: value for key, value in config.items() if key in REQUIRED or key in OPTIONAL}


def faults(config: Mapping[str, Any]) -> list[str]:
    """Every value that cannot be one of `Phi3Config`, in words: "hidden_size is 'x', needs ..."."""
    found = [
        f"{key} is {shown(config[key]) if key in config else 'missing'}, needs {needs}"
        for key, (fits, needs) in REQUIRED.items()
        if key not in config or not fits(config[key])
    ]
    found += _wrong(config, OPTIONAL, "")
    for name in ("rope_scaling", "rope_parameters"):
        inside = config.get(name)
        found += _wrong(inside, _ROPE, f"{name}.") if isinstance(inside, dict) else []
    return found or [*_padding(config), *_factors(config)]


def _factors(config: Mapping[str, Any]) -> list[str]:
    """Lists of factors that are not as long as a head has rotated pairs, or that are missing."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"  # as transformers prefers them
    rope = config.get(name) or {}
    if (rope.get("rope_type") or rope.get("type")) not in _SCALED:
        return []
    share = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    length = int(config["hidden_size"] // config["num_attention_heads"] * share) // 2
    return [
        f"{name}.{key} has {len(rope.get(key) or ())} numbers, needs {length}"
        for key in ("short_factor", "long_factor")
        if len(rope.get(key) or ()) != length
    ]


def _wrong(config: Mapping[str, Any], checks: Mapping[str, Check], prefix: str) -> list[str]:
    return [
        f"{prefix}{key} is {shown(config[key])}, needs {needs}"
        for key, (fits, needs) in checks.items()
        if key in config and not fits(config[key])
    ]


def _padding(config: Mapping[str, Any]) -> list[str]:
    """A padding token that the embedding has no row for: torch meets it with an assertion."""
    padding, rows = config.get("pad_token_id", _PADDING), config["vocab_size"]
    if padding is None or -rows <= padding < rows:
        return []
    missing = "" if "pad_token_id" in config else " where it is left out"
    return [f"pad_token_id is {padding}{missing}, needs a number below vocab_size {rows}"]
