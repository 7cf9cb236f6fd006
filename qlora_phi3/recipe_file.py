"""From a recipe's name or path, and overrides, to a checked Recipe; and back to YAML.

Owns where recipes are found, how `key=value` overrides apply, what relative paths are relative to, and
how a refusal is worded: file:line, dotted path, found value, allowed values, nearest name.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from . import strict_yaml
from .errors import OutputError, Problem, RecipeError
from .recipe import ARMS, Recipe
from .recipe_checks import cross_problems
from .recipe_values import is_hub_id
from .strict_yaml import dotted_path

KeyPath = strict_yaml.Path
Part = type[BaseModel] | None

COMMAND_LINE: Final = "command line"
MAX_BYTES: Final = 1_000_000
MAX_SHOWN: Final = 60

SOURCE_KEYS: Final[tuple[KeyPath, ...]] = (("data", "train"), ("data", "eval"))
"""Keys of a source or a list of them, whose paths are relative to the recipe's folder, or to the working
folder in an override."""

BASE_KEY: Final[KeyPath] = ("model", "base")
"""Is made absolute where it is written as a folder."""

INIT_KEY: Final[KeyPath] = ("adapter", "init")
"""A file or folder always."""


def recipes_folder() -> Path:
    """Folder of the recipes that come with the toolkit: inside the wheel, or beside a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def list_recipes() -> list[Path]:
    """The recipes that come with the toolkit, by name."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """File of a recipe: a path as it is, else one that comes with the toolkit.

    Raises:
        RecipeError: no such file, or no such name -> the nearest one.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = {found.stem: found for found in list_recipes()}
    if name_or_path in names:
        return names[name_or_path]
    hint = _nearest(path.stem, names)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        reason = "is a folder." if path.is_dir() else "no such file."
        remedy = _join(hint, "List the recipes with `python -m qlora_phi3 recipe`.")
        raise RecipeError(name_or_path, reason, remedy)
    remedy = _join(hint, f"Known: {', '.join(names)}; or give the path of a YAML file.")
    raise RecipeError(name_or_path, "no recipe of this name.", remedy)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, check.

    Raises:
        RecipeError: every problem of the file and the overrides at once.
    """
    source = _Source(str(path), strict_yaml.parse(_read(path), str(path)))
    source.anchor_paths(path.parent, under=())
    problems = source.document.problems
    for text in overrides:
        try:
            source.override(text)
        except RecipeError as error:
            problems += error.problems
    try:
        recipe = Recipe.model_validate(source.document.values)
    except ValidationError as error:
        problems += source.explain(error)
    else:
        if not source.document.refused:  # it would read as null, and be blamed for what null contradicts
            problems += [Problem(source.place(key), *why) for key, *why in cross_problems(recipe)]
    if problems:
        raise RecipeError.of(sorted(problems, key=source.line_of))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every key; reading it gives an equal recipe."""
    return strict_yaml.dump(recipe.model_dump(mode="json"))


def copy_recipe(path: Path, changed: Recipe | None, target: Path) -> None:
    """Write a recipe to `target` to be edited: with its comments, or with overrides filled in.

    Relative data paths become absolute, since the copy stands in another folder.

    Raises:
        RecipeError: the recipe has problems.
        OutputError: the target exists or cannot be written.
    """
    wanted = load_recipe(path) if changed is None else changed
    text = _with_absolute_paths(path) if changed is None else dump_recipe(changed)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(str(target), "exists already.", "Choose another name.") from None
    except OSError as error:
        reason = f"cannot be written: {error.strerror}."
        raise OutputError(str(target), reason, "Choose another place.") from None
    assert load_recipe(target) == wanted


def _with_absolute_paths(path: Path) -> str:
    """The text of a recipe, comments and all, with only its relative paths changed."""
    text = _read(path)
    source = _Source(str(path), strict_yaml.parse(text, str(path)))
    before = {key: source.at(key) for key in source.anchored_keys()}
    source.anchor_paths(path.parent, under=())
    changed = [key for key, value in before.items() if source.at(key) != value]
    for key in sorted(changed, key=source.document.spans.__getitem__, reverse=True):
        start, stop = source.document.spans[key]
        written = text[start:stop].rstrip()  # the span of a block scalar ends after its newline
        text = text[:start] + strict_yaml.quote(source.at(key)) + text[start + len(written) :]
    return text


def document_keys() -> str:
    """Every key with default and help text as a Markdown table, from the fields themselves."""
    rows = ["| key | default | what it does |", "|---|---|---|"]
    rows += [f"| `{key}` | {default} | {text} |" for key, default, text in _keys(Recipe, "")]
    return "\n".join(rows) + "\n"


def _keys(part: type[BaseModel], prefix: str) -> Iterable[tuple[str, str, str]]:
    for name, info in part.model_fields.items():
        parts = set(_parts(info.annotation))
        if len(parts) == 1:
            yield from _keys(parts.pop(), f"{prefix}{name}.")
        else:
            default = "*required*" if info.is_required() else f"`{_show(info.default)}`"
            yield f"{prefix}{name}", default, info.description or ""


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            reason = f"is {path.stat().st_size / 1e6:.1f} MB, too much for a recipe."
            raise RecipeError(str(path), reason, "Data goes into a file of its own: data.train.path.")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), f"not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read: {error.strerror}.", "Check the path.") from None


@dataclass
class _Source:
    """Values of a recipe with the place each came from."""

    name: str
    document: strict_yaml.Document
    overridden: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath) -> str:
        """`file:line: dotted.path`, or the command line; a key that stands nowhere has its parent's place."""
        dotted = dotted_path(path)
        for length in range(len(path), 0, -1):
            parent = path[:length]
            if parent in self.overridden:
                return f"{COMMAND_LINE}: {dotted}"
            if parent in self.document.lines:
                return f"{self.name}:{self.document.lines[parent]}: {dotted}"
        return f"{self.name}: {dotted}"

    def line_of(self, problem: Problem) -> float:
        """Line in the recipe, for sorting; what has none comes last."""
        found = re.match(r":(\d+)", problem.place.removeprefix(self.name))
        return int(found[1]) if found else math.inf

    def override(self, text: str) -> None:
        """Apply `a.b=value`; relative paths are meant from the working folder."""
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
            remedy = "Write for example train.learning_rate=1e-4."
            raise RecipeError(COMMAND_LINE, f"{_show(text)} is not key=value.", remedy)
        path: KeyPath = tuple(key.split("."))
        parsed = strict_yaml.parse_value(value, COMMAND_LINE, path)
        self._parent_of(path)[path[-1]] = parsed
        self._forget(path)
        self.anchor_paths(Path.cwd(), under=path)

    def _parent_of(self, path: KeyPath) -> dict[str | int, Any]:
        """The mapping that holds `path`, made where there is none or null."""
        target: dict[Any, Any] = self.document.values
        for length, step in enumerate(path[:-1], start=1):
            if target.get(step) is None:
                target[step] = {}
                self._forget(path[:length])
            target = target[step]
            if not isinstance(target, dict):
                parent = dotted_path(path[:length])
                place = f"{COMMAND_LINE}: {dotted_path(path)}"
                raise RecipeError(place, f"{parent} is {_show(target)} and has no keys below it.")
        return target

    def _forget(self, path: KeyPath) -> None:
        """From here on, the command line is the place of `path` and all below."""
        lines = self.document.lines
        self.document.lines = {key: line for key, line in lines.items() if key[: len(path)] != path}
        self.document.refused = {key for key in self.document.refused if key[: len(path)] != path}
        self.overridden.add(path)

    def at(self, path: KeyPath) -> Any:
        """The value at `path`, or None."""
        value: Any = self.document.values
        for step in path:
            if isinstance(value, dict):
                value = value.get(step)
            else:
                value = value[step] if isinstance(value, list) and isinstance(step, int) else None
        return value

    def anchored_keys(self) -> list[KeyPath]:
        """Keys that hold a path: of every source that is written, the model's base, an adapter."""
        found: list[KeyPath] = []
        for key in SOURCE_KEYS:
            written = self.at(key)
            found += [(*key, i) for i in range(len(written))] if isinstance(written, list) else [key]
        return [*((*key, "path") for key in found), BASE_KEY, INIT_KEY]

    def anchor_paths(self, folder: Path, under: KeyPath) -> None:
        """Make the paths below `under` absolute, from `folder`."""
        for path in self.anchored_keys():
            if path[: len(under)] == under:
                self._anchor(path, folder)

    def _anchor(self, path: KeyPath, folder: Path) -> None:
        parent, value = self.at(path[:-1]), self.at(path)
        if not isinstance(value, str) or not value or (path == BASE_KEY and not _is_folder_name(value)):
            return
        if path not in (BASE_KEY, INIT_KEY) and is_hub_id(value) and not (folder / value).exists():
            return
        try:
            parent[path[-1]] = str((folder / Path(value).expanduser()).resolve())
        except (RuntimeError, OSError) as error:  # ~nobody, or links that go in circles
            reason = f"{_show(value)} leads nowhere: {error}"
            self.document.problems.append(Problem(self.place(path), reason, "Write the path out."))
            self.document.refused.add(path)

    def explain(self, error: ValidationError) -> list[Problem]:
        """Word pydantic's errors: what was found, what is allowed, what was probably meant."""
        return [
            Problem(self.place(path), *_word(detail, owner, below))
            for detail in error.errors()
            for path, owner, below in [_locate(detail["loc"])]
            if detail["type"] == "extra_forbidden" or not self._is_refused(path)
        ]

    def _is_refused(self, path: KeyPath) -> bool:
        return any(path[:length] in self.document.refused for length in range(len(path) + 1))


def _is_folder_name(base: str) -> bool:
    return base.startswith(("./", "../", "/", "~")) or base in (".", "..")


def _locate(location: KeyPath) -> tuple[KeyPath, Part, Part]:
    """The key an error is about, the part it belongs to, and the part that stands below it."""
    path: KeyPath = ()
    owner: Part = None
    below: Part = Recipe
    for step in location:
        if below is None and step in ARMS:
            below = ARMS[str(step)]
            continue
        if isinstance(step, int):  # an item is what its list is of
            path = (*path, step)
            continue
        owner, path = below, (*path, step)
        info = owner.model_fields.get(str(step)) if owner else None
        below = _part(info.annotation) if info else None
    return path, owner, below


def _parts(annotation: Any) -> Iterable[type[BaseModel]]:
    """The parts that an annotation names, inside unions and tuples too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _part(annotation: Any) -> Part:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _word(error: ErrorDetails, owner: Part, below: Part) -> tuple[str, str]:
    """Reason and remedy of one pydantic error."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    found, name = _show(value), str(error["loc"][-1])
    if kind == "extra_forbidden" and owner:
        return "unknown key.", _join(_meant_key(name, owner), _listed(owner.model_fields))
    if kind == "missing" and owner:
        return f"is missing: {owner.model_fields[name].description}.", "Add it."
    if kind == "not_available":
        today = ", ".join(_show(value) for value in context.get("today", ()))
        return f"{found} is not available yet.", context.get("hint") or f"Today: {today}."
    if kind == "declined":
        return f"{found} {error['msg']}.", _join(context["instead"], _listed(context["allowed"]))
    if kind in ("literal_error", "target"):
        allowed = context.get("allowed") or re.findall(r"'([^']*)'", context["expected"])
        what = error["msg"] if kind == "target" else "is not allowed"
        nearest = _nearest(str(value), context.get("known", allowed))
        return f"{found} {what}.", _join(nearest, _listed(allowed))
    needs = _NEEDS[kind].format(**context) if kind in _NEEDS else error["msg"]
    return f"found {found}, {needs}.", _how_to_write(kind, value, below)


def _how_to_write(kind: str, value: Any, below: Part) -> str:
    if kind == "model_type" and below:
        return f"They are {', '.join(below.model_fields)}."
    if kind == "tuple_type" and isinstance(value, str):
        return f"Write [{value}]."
    if kind == "string_type" and isinstance(value, (int, float)):
        return "Quote it."
    return ""


_NEEDS: Final = {
    "int_type": "needs a whole number",
    "float_type": "needs a number",
    "bool_type": "needs true or false",
    "string_type": "needs text",
    "tuple_type": "needs a list",
    "finite_number": "needs a finite number",
    "model_type": "needs keys of its own",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' or '-', and begin with a letter or digit",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
}
"""Kind of a pydantic error -> what the key needs; any other kind keeps pydantic's words."""


def _meant_key(name: str, owner: type[BaseModel]) -> str:
    """The same name in another part, or the nearest in this one."""
    homes = [key.rpartition(".")[0] for key, _, _ in _keys(Recipe, "") if key.split(".")[-1] == name]
    if homes or name in Recipe.model_fields:
        return f"It belongs to {homes[0]}." if any(homes) else "It belongs to the top level."
    return _nearest(name, owner.model_fields)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""


def _listed(names: Iterable[str]) -> str:
    return f"Allowed: {', '.join(names)}."


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _show(value: Any) -> str:
    """A value as it would stand in the YAML, shortened; text always in quotes."""
    if isinstance(value, str):
        text = repr(value)
    else:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        text = text.strip().removesuffix("...").strip()
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
