"""The model card: what an adapter or a merged model is, from what it came, and how to use it.

Owns its content. Refuses nothing; paths of this machine become names, since a card is for others. Whatever is
not the card's own wording is escaped: names, descriptions and reports come from users and other programs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final

from .. import strict_yaml
from ..errors import shown
from ..pages import environment

if TYPE_CHECKING:
    import jinja2

LIBRARIES: Final = {
    "merged": "transformers",
    "gguf": "gguf",
    "gguf-lora": "gguf",
    "ollama": "gguf",
    "mlx": "mlx",
}
"""Target -> what the hub calls the library that loads it; PEFT the others."""


@dataclass(frozen=True)
class About:
    """What a card says beside the run's report: the target, the merge report, the gate, the base's licence.

    `local`: it stays in its run folder, where the base's own path is what its code needs. `limits`: from
    where on the target's program computes otherwise.
    """

    target: str
    name: str
    base: str
    details: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    licence: str | None = None
    local: bool = False
    limits: Sequence[str] = ()


def render(report: Mapping[str, Any] | None, about: About) -> str:
    """The card's text; `report` is a run's report.json, None of an adapter without one."""
    family = about.target.partition(":")[0]
    public = without_paths(report) if report is not None else None
    recipe = strict_yaml.dump(public["recipe"]) if public is not None else ""
    system = report["data"].get("system_prompt") if report is not None else None  # "/brief" is no path
    return str(
        _environment()
        .get_template("card.md.j2")
        .render(
            report=public,
            about=about,
            base=about.base if about.local else public_text(about.base),
            family=family,
            library=LIBRARIES.get(family, "peft"),
            recipe=recipe,
            merge=about.details.get("merge"),
            system=system if isinstance(system, str) and system else None,
            folder="adapter" if about.local else about.target.replace(":", "-"),
        )
    )


def without_paths(value: Any) -> Any:
    """The same with the last part in place of every absolute path."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    return public_text(value) if isinstance(value, str) else value


def public_text(text: str) -> str:
    """A path of this machine by its last part; any other text as it is."""
    if "\n" not in text and PurePosixPath(text).is_absolute():
        return PurePosixPath(text).name or text
    if "\n" not in text and PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name or text
    return text


# What stands in a card


class _Safe(str):
    """Text that is Markdown already. All else is escaped when it is put into the card."""


_ENTITIES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKS: Final = re.compile(r"([\\`*\[\]#|~!]|(?<![^\W_])_|_(?![^\W_]))")
"""What Markdown reads; a _ only where no letter stands on one of its sides."""
_OPENS: Final = re.compile(r"^(\s*)([-+=]|\d+[.)](?=\s))")
"""What begins a list, a rule or the underline of a heading."""
_JOINERS: Final = "\u200c\u200d"
"""Of emoji and some scripts."""
_PLAIN: Final = re.compile(r"[\w ./:@,;=+^()\[\]{}*#~!?%$'\"-]+")


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    made = environment()
    made.finalize = _escaped
    made.filters |= {
        "raw": _Safe,
        "code": code,
        "py": _python,
        "identifier": _identifier,
        "sh": lambda text: _Safe(shlex.quote(_printable(text))),
        "fenced": _fenced,
        "spans": _spans,
        "prose": _prose,
        "json": lambda value: _Safe(json.dumps(value)),
        "ollama_name": lambda text: re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model",
    }
    return made


def _escaped(value: Any) -> Any:
    """One line of text, however many it had; so is a list or an object in a foreign report."""
    plain = isinstance(value, (_Safe, int, float)) or hasattr(value, "__html__")
    return value if plain else _Safe(_line(re.sub(r"\s+", " ", _printable(str(value)))))


def _line(text: str) -> str:
    text = _OPENS.sub(r"\1\\\2", _MARKS.sub(r"\\\1", text))
    return re.sub("[&<>]", lambda found: _ENTITIES[found[0]], text)


def _prose(text: str) -> _Safe:
    """A text of several lines and paragraphs, every one of them plain."""
    return _Safe("\n".join(_line(line.strip()) for line in _printable(text).strip().splitlines()))


def code(text: object) -> _Safe:
    """A value in code's type, within a table too."""
    line = " ".join(_printable(str(text)).split())
    if _PLAIN.fullmatch(line):
        return _Safe(f"`{line}`")
    entities = re.sub(r"[^\w ./:-]|_", lambda found: f"&#{ord(found[0])};", line)
    return _Safe(f"<code>{entities}</code>")


def _spans(text: str) -> _Safe:
    """A line of plain text with code between backticks."""
    parts = re.split("`([^`]*)`", text)
    return _Safe("".join(str(code(part)) if at % 2 else _line(part) for at, part in enumerate(parts)))


def _python(value: Any) -> _Safe:
    """A text as Python writes it, with nothing that ends a fence or a line."""
    if not isinstance(value, str):
        return _Safe(repr(value))
    text = json.dumps(value, ensure_ascii=False).replace("`", "\\x60")
    return _Safe("".join(one if one.isprintable() else _python_escape(one) for one in text))


def _identifier(text: object) -> _Safe:
    """A name that stands in code as it is.

    Raises:
        ValueError: it is none; a foreign report may have anything there.
    """
    if not str(text).isidentifier():
        raise ValueError(f"{shown(text)} is no name")
    return _Safe(str(text))


def _python_escape(one: str) -> str:
    return f"\\U{ord(one):08x}" if ord(one) > 0xFFFF else f"\\u{ord(one):04x}"


def _fenced(text: str, language: str = "") -> _Safe:
    """A block of code, whatever backticks it has."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _Safe(f"{fence}{language}\n{_printable(text).strip(chr(10))}\n{fence}\n")


def _printable(text: str) -> str:
    """Without control characters and halves of characters, which no viewer shows and UTF-8 cannot say."""
    return "".join(
        one if one.isprintable() or one in _JOINERS or one.isspace() else f"\\x{ord(one):02x}" for one in text
    )
