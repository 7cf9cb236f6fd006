"""Which linears PEFT gives an A and a B by an adapter's config, to hold the tensors of a file against it.

Owns what target_modules, exclude_modules and layers_to_transform mean. Refuses tensors that the config leaves
out, which PEFT would pass over in silence, and linears that it names and the file does not have.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Final

from ..errors import ModelError, Problem, shown
from .config import is_quick

Chooses = Callable[[str], bool]
"""Whether the linear of a path is adapted."""

_ALL_LINEAR: Final = "all-linear"
_CORRECT: Final = "Give the config that belongs to the adapter."
_CHOOSING: Final = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_FIRST_INDEX: Final = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def chooser(found: Mapping[str, Any], place: str) -> Chooses | None:
    """The rule of an adapter_config.json; None where it has none, or an expression that is not followed.

    Source: PEFT 0.21 tuners_utils.py, check_target_module_exists.

    Raises:
        ModelError: a value of a kind that PEFT takes none of.
    """
    wanted, left_out = found.get("target_modules"), found.get("exclude_modules") or []
    inside = _in_layers(found, place)
    if wanted is None:
        return None
    by_target = _matcher(wanted, "target_modules", place)
    excluded = _matcher(left_out, "exclude_modules", place)
    if by_target is None or excluded is None:
        return None
    ruled = isinstance(wanted, str)  # which PEFT follows in all layers, and a whole path wherever it leads
    return lambda module: (
        by_target(module) and not excluded(module) and (ruled or module in wanted or inside(module))
    )


def _matcher(value: Any, key: str, place: str) -> Chooses | None:
    """A list of names or one expression as a rule; None for an expression that could take forever."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return lambda module: any(module == name or module.endswith(f".{name}") for name in value)
    if not isinstance(value, str):
        raise _no_value(key, value, place)
    if key == "target_modules" and value.lower() == _ALL_LINEAR:
        return lambda module: ".layers." in module  # the head is left out, the embedding is no linear
    rule = _compiled(value, key, place)
    if not is_quick(value):
        return None
    return lambda module: rule.fullmatch(module) is not None


def _compiled(value: str, key: str, place: str) -> re.Pattern[str]:
    """An expression that Python takes, were it one that is not followed here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise
            return re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        why = str(error) or "it is nested too deeply"
        reason = f"{key} is {shown(value)}, which is no regular expression: {why}."
        raise ModelError(place, reason, _CORRECT) from None


def _in_layers(found: Mapping[str, Any], place: str) -> Chooses:
    """Whether a linear is in a layer that is adapted."""
    layers, patterns = found.get("layers_to_transform"), found.get("layers_pattern") or []
    wanted = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in wanted):
        raise _no_value("layers_to_transform", layers, place)
    names = [patterns] if isinstance(patterns, str) else patterns
    fits = isinstance(names, list) and all(isinstance(n, str) and re.fullmatch(r"[\w.]+", n) for n in names)
    if not fits:
        raise _no_value("layers_pattern", patterns, place)
    rules = [re.compile(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.") for name in names] or [_FIRST_INDEX]

    def inside(module: str) -> bool:
        at = next((match for rule in rules if (match := rule.match(module))), None)
        return not wanted or (at is not None and int(at["index"]) in wanted)

    return inside


def _no_value(key: str, value: object, place: str) -> ModelError:
    reason = f"{key} is {shown(value)}, which PEFT does not take."
    return ModelError(place, reason, _CORRECT)


def check_any(found: Mapping[str, Any], modules: Iterable[str], chooses: Chooses, place: str) -> None:
    """Refuse a config whose rule matches none of the base's linears.

    Raises:
        ModelError: so it is.
    """
    if not any(map(chooses, modules)):
        rule = ", ".join(f"{key} {shown(found[key])}" for key in _CHOOSING if found.get(key) is not None)
        raise ModelError(place, f"matches no linear of the base: {rule}.", _CORRECT)


def check_chosen(
    present: Collection[str], modules: Iterable[str], chooses: Chooses, place: str, config: str
) -> None:
    """Hold the linears of a file against the rule of its config. `modules`: all that the base has.

    Raises:
        ModelError: one has tensors and is not chosen, or is chosen and has none.
    """
    wanted = {module for module in modules if chooses(module)}
    surplus = [module for module in present if module not in wanted]
    missing = [module for module in modules if module in wanted and module not in present]
    problems = []
    if surplus:
        reason = f"has tensors for {_some(surplus)}, which {config} does not choose: PEFT leaves them out."
        problems.append(Problem(place, reason, "Give the config that belongs to these tensors."))
    if missing:
        reason = f"has no tensors for {_some(missing)}, which its config names."
        problems.append(Problem(place, reason, "Copy or save the adapter again."))
    if problems:
        raise ModelError.of(problems)


def _some(modules: list[str]) -> str:
    more = f" and {len(modules) - 1} more like it" if len(modules) > 1 else ""
    return f"{modules[0]}{more}"
