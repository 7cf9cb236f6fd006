"""What an adapter's tensors do not say themselves: ranks, alphas, and which scaling they mean.

Owns the meaning of rank and alpha patterns and the arithmetic between alpha and scale. No torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, get_args

from ..errors import ModelError, shown

Layout = Literal["fused", "split", "unfused", "loralib", "loralib_merged", "mlx"]
LAYOUTS: Final[tuple[Layout, ...]] = get_args(Layout)
PEFT_LAYOUTS: Final = ("fused", "split", "unfused")
"""Layouts whose consumer is PEFT, the only one that knows rsLoRA."""

_PLAIN: Final = re.compile(r"\^?[\w.]{1,200}")
"""Pattern keys that are read as names. PEFT runs any key as a regular expression; one from a foreign file
could take forever."""

_ATOM: Final = r"(?:\\[.dw]|\[\^?[\w.-]+\]|[\w.])"
_SIMPLE: Final = re.compile(
    rf"\^?(?:{_ATOM}(?:[+*?]|\{{\d+(?:,\d*)?\}})?|\((?:\?:)?(?:{_ATOM}|\|)*\)\??|\|)*\$?"
)
"""Regular expressions that repeat no group; with few repetitions (_MOST_REPEATS) they are quick."""
_MOST_REPEATS: Final = 3
_LONGEST: Final = 200

LARGEST: Final = 3.4e38
"""The most that a float32 holds; a JSON file may have an integer of any length."""

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings that give a dict of adapter tensors its meaning.

    `layout` is how the tensors are laid out, "split" being the claim that every B of a fused linear is
    block-diagonal. `targets` are the linears that must be there, by name or path. Patterns map a linear's
    name or path to what differs from `rank` and `alpha`, the first match winning, as in PEFT. `enable_lora`
    says which blocks a grouped (loralib_merged) linear adapts.

    Units: `alpha` as its consumer uses it: the update is B @ A times alpha/rank, or alpha/sqrt(rank) where
    `use_rslora`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    layout: Layout = "fused"
    enable_lora: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        return match(self.alpha_pattern, module, self.alpha)

    def blocks_of(self, module: str) -> tuple[bool, ...]:
        """Which blocks a linear's grouped pair adapts; empty where none is said, as for a plain pair."""
        nothing: tuple[bool, ...] = ()
        return match(self.enable_lora, module, nothing)

    def scale_of(self, module: str) -> float:
        """Factor of B @ A for a linear."""
        return self.alpha_of(module) / divisor(self.rank_of(module), self.use_rslora)


def match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """Value of the first key that is the module's path or the end of it.

    Source: PEFT 0.21 utils/other.py, get_pattern_key; keys there are regular expressions, here names.
    """
    for key, value in pattern.items():
        name = key.removeprefix("^")
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def by_path(pattern: Mapping[str, T], modules: Iterable[str]) -> Mapping[str, T]:
    """A pattern of regular expressions as the modules' paths that they match, the first match winning.

    One of names stays as it is, and so does one with an expression that could take forever, for
    `check_config` to refuse.

    Source: PEFT 0.21 utils/other.py, get_pattern_key.
    """
    if all(_PLAIN.fullmatch(key) for key in pattern) or not all(map(is_quick, pattern)):
        return pattern
    try:
        rules = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in pattern.items()]
    except re.error:
        return pattern
    found = {module: next((v for rule, v in rules if rule.match(module)), None) for module in modules}
    return {module: value for module, value in found.items() if value is not None}


def is_quick(key: str) -> bool:
    """Whether a regular expression of a foreign file can be followed without taking forever."""
    repeats = sum(key.count(sign) for sign in "+*{")
    return len(key) <= _LONGEST and repeats <= _MOST_REPEATS and bool(_SIMPLE.fullmatch(key))


def divisor(rank: int, use_rslora: bool) -> float:
    """What alpha is divided by. Source: Kalajdzievski 2023 (rsLoRA), arXiv 2312.03732."""
    return math.sqrt(rank) if use_rslora else rank


def alpha_for(scale: float, rank: int, use_rslora: bool) -> float:
    """The alpha that gives `scale` at `rank`.

    Cut to 13 digits: a round trip then returns the alpha it began with instead of 15.999999999999998, and
    the 1e-13 it costs is far below float32.
    """
    alpha = float(f"{scale * divisor(rank, use_rslora):.13g}")
    return int(alpha) if alpha.is_integer() else alpha


def check_config(config: AdapterConfig, place: str) -> None:
    """Refuse settings that no adapter can have.

    Raises:
        ModelError: an unknown layout, a rank that is no positive whole number, an alpha that is no finite
            number, a pattern key that is no name.
    """
    remedy = "Correct the adapter's config, or train it again."
    if config.layout not in LAYOUTS:
        raise ModelError(place, f"layout is {config.layout!r}.", f"Choose out of {', '.join(LAYOUTS)}.")
    for name, rank in {"rank": config.rank, **config.rank_pattern}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ModelError(place, f"{name}: rank {shown(rank)} is not a positive whole number.", remedy)
    for name, alpha in {"alpha": config.alpha, **config.alpha_pattern}.items():
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not abs(alpha) <= LARGEST:
            raise ModelError(place, f"{name}: alpha {shown(alpha)} is not a finite number.", remedy)
    for key in (*config.rank_pattern, *config.alpha_pattern, *config.enable_lora):
        if not _PLAIN.fullmatch(key):
            reason = f"the pattern {key[:80]!r} is a regular expression, which is not followed."
            raise ModelError(place, reason, "Name linears (qkv_proj) or their paths instead.")


def compress(values: Mapping[str, T], default: T | None = None) -> tuple[T, dict[str, T]]:
    """A default, the commonest where none is given, and a pattern that say the same as every module's value.

    Linears that differ in all layers alike are named once; else by their path.
    """
    default = Counter(values.values()).most_common(1)[0][0] if default is None else default
    pattern: dict[str, T] = {}
    for name, modules in by_name(values).items():
        found = {values[module] for module in modules}
        if found == {default}:
            continue
        if len(found) == 1:
            pattern[name] = values[modules[0]]
        else:
            pattern |= {module: values[module] for module in modules if values[module] != default}
    return default, pattern


def by_name(modules: Iterable[str]) -> dict[str, list[str]]:
    """Paths of modules by the last part of them."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(module.rsplit(".", 1)[-1], []).append(module)
    return found


def to_json(config: AdapterConfig) -> dict[str, Any]:
    """What a loralib file is accompanied by, for it holds tensors only."""
    return {
        "layout": config.layout,
        "targets": list(config.targets),
        "rank": config.rank,
        "alpha": config.alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "enable_lora": {name: list(blocks) for name, blocks in config.enable_lora.items()},
    }
