"""Read YAML the way people expect it: YAML 1.2 scalars, no duplicate keys, a line for every key.

Owns the step from text to plain values with the places they came from, and back to text. Knows nothing
of recipes. Refuses tags, anchors, non-text keys and documents that are not one mapping, all problems at
once. PyYAML alone reads `2e-4` as text, `no` as false, `012` as 10 and keeps the last of duplicate keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import yaml
from yaml.composer import ComposerError

from .errors import Problem, RecipeError

Path = tuple[str | int, ...]

_STR, _INT, _FLOAT = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_BOOL, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"
_ANCHOR, _TAG = "refused:anchor", "refused:tag"

_REFUSED: Final = {
    _ANCHOR: ("anchors and aliases are not supported.", "Write the value out."),
    _TAG: ("tags are not supported.", "Remove the part that begins with `!`."),
}
_REMEDIES: Final = {
    r"'\t'": "Use spaces instead of the tab.",
    "could not find expected ':'": "Put a space after the colon, or mend the indentation.",
    "mapping values are not allowed": "Quote the text if it holds a colon, or mend the indentation.",
    "cannot start any token": "Quote the text.",
    "single document": "Keep one.",
    "<stream end>": "Close the bracket.",
    "unexpected end of stream": "Close the quote.",
    "<block end>": "Mend the indentation.",
}
"""Part of PyYAML's message -> what helps."""

MAX_DEPTH: Final = 32
MAX_DIGITS: Final = 30


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's loader with the scalar rules of the YAML 1.2 core schema, less its hex and octal numbers.

    Tags, anchors and aliases are marked on the node, for a message with the key's name; aliases are not
    followed. Depth is limited because PyYAML recurses.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class attribute
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            alias: Any = self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_ANCHOR, alias.anchor, alias.start_mark, alias.end_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ComposerError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and (event.anchor or event.tag):
            node.tag = _ANCHOR if event.anchor else _TAG
        return node


class _CoreDumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or 1.2 would read as something else, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar(_STR, data, style=None if data.isprintable() else '"')


_CoreDumper.add_representer(str, _CoreDumper.represent_str)


# Source: https://yaml.org/spec/1.2.2/#1032-tag-resolution
for _tag, _pattern, _first in (
    (_NULL, r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    (_BOOL, r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    (_INT, r"[-+]?[0-9]+", list("-+0123456789")),
    (_FLOAT, r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+0123456789.")),
    (_FLOAT, r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))", list("-+.")),
):
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^{_pattern}$"), _first)


def _text(text: str) -> str:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds a character that no file can hold.", "Remove it.")
    return text


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"is a number of more than {MAX_DIGITS} digits.", "Quote it if it is text.")
    return int(text, 10)


_CONVERT: Final[dict[str, Callable[[str], Any]]] = {
    _STR: _text,
    _INT: _whole_number,
    _FLOAT: lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    _BOOL: lambda text: text.lower() == "true",
    _NULL: lambda text: None,
}


@dataclass
class Document:
    """One mapping, the line (from 1) of every key and list item in it, and what had to be refused.

    A refused value stands as None in `values`, and its path in `refused`. `spans` has where in the text
    each single value begins and ends.
    """

    values: dict[str, Any]
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)
    spans: dict[Path, tuple[int, int]] = field(default_factory=dict)


def parse(text: str, place: str) -> Document:
    """Parse one YAML mapping; `place` is the file name for messages.

    Duplicate keys, tags and the like are left out and listed in `problems`, so that a caller can
    report them together with its own.

    Raises:
        RecipeError: not YAML, or not a mapping -> the line.
    """
    walk = _Walk(place, numbered=True)
    node = walk.compose(text)
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(place, "holds no mapping of keys to values.", "Start it with `version: 1`.")
    return Document(walk.convert(node, ()) or {}, walk.lines, walk.problems, walk.refused, walk.spans)


def parse_value(text: str, place: str, path: Path = ()) -> Any:
    """Parse one value as it would stand behind the key `path`: `8`, `2e-4`, `[q, v]`, `{fraction: 0.1}`.

    Raises:
        RecipeError: not YAML, or refused contents.
    """
    walk = _Walk(place, numbered=False)
    node = walk.compose(text, path)
    value = None if node is None else walk.convert(node, path)
    if walk.problems:
        raise RecipeError.of(walk.problems)
    return value


def dump(values: dict[str, Any]) -> str:
    """Text that `parse` reads back as equal values, and other YAML readers too."""
    return _visible(yaml.dump(values, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=110))


def quote(text: str) -> str:
    """`text` as it can stand for any value, in one line."""
    found = yaml.dump(text, Dumper=_CoreDumper, default_style='"', allow_unicode=True, width=math.inf)
    return _visible(found.strip())


def _visible(text: str) -> str:
    """YAML in which what hides or turns letters is escaped; a text that holds it is in double quotes."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n " else f"\\U{ord(one):08X}" for one in text)


def dotted_path(path: Path) -> str:
    """`("data", "train", 0)` -> `data.train[0]`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in path]
    return "".join(steps).removeprefix(".")


class _Walk:
    """Turns text into nodes and nodes into values, and collects lines and problems on the way."""

    def __init__(self, place: str, *, numbered: bool) -> None:
        self.place = place
        self.numbered = numbered
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []
        self.refused: set[Path] = set()
        self.spans: dict[Path, tuple[int, int]] = {}

    def compose(self, text: str, path: Path = ()) -> yaml.Node | None:
        try:
            return yaml.compose(text, Loader=_CoreLoader)
        except yaml.MarkedYAMLError as error:
            line, reason, remedy = _word(error)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            reason, remedy = f"the character U+{error.character:04X} cannot stand in YAML.", "Remove it."
        except (ValueError, OverflowError) as error:  # PyYAML lets "\\UFFFFFFFF" through to chr()
            line, reason, remedy = 0, f"not valid YAML: {error}.", "Mend it."
        raise RecipeError(self.where(line, path), reason, remedy)

    def where(self, line: int, path: Path) -> str:
        place = f"{self.place}:{line}" if self.numbered and line else self.place
        return f"{place}: {dotted_path(path)}" if path else place

    def convert(self, node: yaml.Node, path: Path) -> Any:
        if node.tag in _REFUSED:
            return self._refuse(node, path, *_REFUSED[node.tag])
        if isinstance(node, yaml.MappingNode):
            return {key: self.convert(value, (*path, key)) for key, value in self._entries(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self._item(child, (*path, i)) for i, child in enumerate(node.value)]
        self.spans[path] = (node.start_mark.index, node.end_mark.index)
        try:
            return _CONVERT[node.tag](node.value)
        except ValueError as error:
            return self._refuse(node, path, *error.args)

    def _item(self, node: yaml.Node, path: Path) -> Any:
        self.lines[path] = _line(node)
        return self.convert(node, path)

    def _entries(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node]]:
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag in _REFUSED:
                self._report(key_node, path, *_REFUSED[key_node.tag])
            elif key_node.tag != _STR or not key.isprintable():
                shown = ascii(key) if isinstance(key, str) else "a list or a mapping"
                self._report(key_node, path, f"a key must be plain text, not {shown}.", "Mend or remove it.")
            elif key in first:
                earlier = f", first in line {first[key]}" if self.numbered else ""
                self._report(key_node, (*path, key), f"the key stands twice{earlier}.", "Keep one.")
            else:
                first[key] = self.lines[(*path, key)] = _line(key_node)
                yield key, value_node

    def _refuse(self, node: yaml.Node, path: Path, reason: str, remedy: str) -> None:
        self.refused.add(path)
        self._report(node, path, reason, remedy)

    def _report(self, node: yaml.Node, path: Path, reason: str, remedy: str) -> None:
        self.problems.append(Problem(self.where(_line(node), path), reason, remedy))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _word(error: yaml.MarkedYAMLError) -> tuple[int, str, str]:
    """Line, reason and remedy of a syntax error; what was opened in an earlier line is named."""
    mark, opened = error.problem_mark, error.context_mark
    line = mark.line + 1 if mark else 1
    context = error.context or ""
    if opened is not None and opened.line + 1 != line:
        context += f" from line {opened.line + 1}"
    detail = f"{context} {error.problem}".strip()
    remedy = next((text for part, text in _REMEDIES.items() if part in detail), "Mend the line.")
    return line, f"not valid YAML: {detail}.", remedy
