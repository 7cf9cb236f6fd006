"""From a recipe's name or path, and overrides, to a checked Recipe; and back to YAML.

Owns where recipes are found, how `key=value` overrides apply, what relative paths are relative to, and
how a refusal is placed: file:line, dotted path. What it says is recipe_words' matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from . import files, strict_yaml
from .errors import MAX_SHOWN, OutputError, Problem, RecipeError, is_file, is_folder
from .recipe import ARMS, Recipe
from .recipe_checks import cross_problems
from .recipe_values import is_hub_id
from .recipe_words import Part, join, keys, nearest, show, word
from .strict_yaml import dotted_path

KeyPath = strict_yaml.Path

COMMAND_LINE: Final = "command line"
MAX_BYTES: Final = 200_000
"""PyYAML reads 100 kB a second on a busy core; a recipe of a thousand sources has 60 kB."""


DATA: Final = (".jsonl", ".csv", ".parquet", ".txt")
"""Of files that no recipe is in; a .json may be one."""

MAX_PROBLEMS: Final = 20
"""Problems that are told; a file that is no recipe may have as many as lines."""

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
        RecipeError: no such file, or no such name -> the nearest one; a path that cannot be looked up.
    """
    path = Path(name_or_path)
    if path.suffix.lower() in DATA and is_file(path, RecipeError):
        remedy = (
            f"Give it to a recipe, `recipe NAME data.train.path={name_or_path}`, or to `doctor NAME` alike."
        )
        raise RecipeError(name_or_path, "is a file of data, not a recipe.", remedy)
    if is_file(path, RecipeError):
        return path
    names = {found.stem: found for found in list_recipes()}
    if name_or_path in names:
        return names[name_or_path]
    hint = nearest(path.stem, names)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        reason = "is a folder." if is_folder(path, RecipeError) else "no such file."
        remedy = join(hint, "List the recipes with `python -m qlora_phi3 recipe`.")
        raise RecipeError(name_or_path, reason, remedy)
    remedy = join(hint, f"Known: {', '.join(names)}; or give the path of a YAML file.")
    raise RecipeError(name_or_path, "no recipe of this name.", remedy)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, check.

    Raises:
        RecipeError: every problem of the file and the overrides at once.
    """
    source = _Source(str(path), strict_yaml.parse(_read(path), str(path)))
    source.anchor_paths(path.parent, under=())
    problems = source.document.problems
    for text in _joined(overrides):
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
        raise RecipeError.of(_capped(sorted(problems, key=source.line_of), source.unworded))
    return recipe


def _capped(problems: list[Problem], unworded: int) -> list[Problem]:
    """As many as one reads; the rest is counted."""
    left = max(len(problems) - MAX_PROBLEMS, 0) + unworded
    rest = [Problem("and", f"{left} more problem{'s' if left > 1 else ''} like these.")] if left else []
    return [*problems[:MAX_PROBLEMS], *rest]


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
    rows += [f"| `{key}` | {default} | {text} |" for key, default, text in keys(Recipe, "")]
    return "\n".join(rows) + "\n"


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            reason = f"is {path.stat().st_size / 1e6:.1f} MB, too much for a recipe."
            raise RecipeError(str(path), reason, "Data goes into a file of its own: data.train.path.")
        with TextIOWrapper(files.open_file(path), encoding="utf-8") as text:  # of any line ends
            return text.read()
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), f"not UTF-8 text (byte {error.start}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read: {error.strerror}.", "Check the path.") from None


_KEY: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def _joined(overrides: Sequence[str]) -> list[str]:
    """Overrides, with `key = value` as the one that it was meant to be."""
    found: list[str] = []
    for text in overrides:
        before = found[-1] if found else ""
        lone = "=" not in text and "." in before and _KEY.fullmatch(before) and not _KEY.fullmatch(text)
        open_end = before.endswith("=") and before.count("=") == 1 and "=" not in text
        if lone or open_end or (text.startswith("=") and _KEY.fullmatch(before)):
            found[-1] = f"{before} {text}"
        else:
            found.append(text)
    return found


def _how_to_override(text: str) -> str:
    spaced = re.fullmatch(rf"({_KEY.pattern})(?:\s*=\s*|\s+)([^\s=]+)", text)
    if spaced is not None:
        return f"Write {spaced[1]}={spaced[3][:MAX_SHOWN]}, without spaces."
    if _KEY.fullmatch(text) and "." in text:
        return f"Write {text[:MAX_SHOWN]}=VALUE, for example train.learning_rate=1e-4."
    return "Write for example train.learning_rate=1e-4."


@dataclass
class _Source:
    """Values of a recipe with the place each came from."""

    name: str
    document: strict_yaml.Document
    overridden: set[KeyPath] = field(default_factory=set)
    unworded: int = 0

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
        if not equals or not _KEY.fullmatch(key):
            raise RecipeError(COMMAND_LINE, f"{show(text)} is not key=value.", _how_to_override(text))
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
                raise RecipeError(place, f"{parent} is {show(target)} and has no keys below it.")
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
        if path not in (BASE_KEY, INIT_KEY) and is_hub_id(value) and not _exists(folder / value):
            return
        try:
            parent[path[-1]] = str((folder / Path(value).expanduser()).resolve())
        except (RuntimeError, OSError) as error:  # ~nobody, or links that go in circles
            reason = f"{show(value)} leads nowhere: {error}"
            self.document.problems.append(Problem(self.place(path), reason, "Write the path out."))
            self.document.refused.add(path)

    def explain(self, error: ValidationError) -> list[Problem]:
        """Word pydantic's errors: what was found, what is allowed, what was probably meant.

        The first MAX_PROBLEMS of the file: looking for the nearest of many names takes its time.
        """
        found = [
            (self.place(path), detail, owner, below)
            for detail in error.errors(include_url=False)
            for path, owner, below in [_locate(detail["loc"])]
            if detail["type"] == "extra_forbidden" or not self._is_refused(path)
        ]
        found.sort(key=lambda one: self.line_of(Problem(one[0], "")))
        self.unworded = max(len(found) - MAX_PROBLEMS, 0)
        return [
            Problem(place, *word(detail, owner, below))
            for place, detail, owner, below in found[:MAX_PROBLEMS]
        ]

    def _is_refused(self, path: KeyPath) -> bool:
        return any(path[:length] in self.document.refused for length in range(len(path) + 1))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


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


def _part(annotation: Any) -> Part:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
