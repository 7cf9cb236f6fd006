"""How single values of a recipe are written: what pydantic's own types cannot say.

Owns the marker of features to come, the values with several forms (`auto`, sizes, targets, hub ids), and the
words in which a wrong one is refused. Knows no key. Knows nothing of torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from . import base_names, phi3
from .units import HOW_TO_WRITE, parse_bytes

Method = Literal["lora", "rslora", "dora", "loftq"]

GGUF_KINDS: Final = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

EXPORTS: Final = (
    *("adapter", "loralib", "mlx", "vllm", "merged", "gguf-lora", "ollama"),
    *(f"gguf:{kind}" for kind in GGUF_KINDS),
)
"""What a run can write for other programs. Pushing to the hub is for the command line alone."""

TARGETS: Final = (*phi3.PROJECTIONS, *phi3.LINEARS, *phi3.EMBEDDINGS)


@dataclass(frozen=True)
class Today:
    """Marks a key whose feature is still being built: these values work, any other is refused by name."""

    values: tuple[Any, ...]
    instead: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "literal" and self.values:  # a misspelled name is told today's names only
            today = " or ".join(repr(value) for value in self.values)
            schema = core_schema.custom_error_schema(
                schema, "literal_error", custom_error_context={"expected": today}
            )
        return core_schema.no_info_after_validator_function(self._check, schema)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        today = [list(value) if isinstance(value, tuple) else value for value in self.values]
        return {**handler(schema), **({"enum": today} if today else {"not": {}})}

    def _check(self, value: Any) -> Any:
        if value in self.values:
            return value
        detail = {"today": list(self.values), "hint": self.instead}
        raise PydanticCustomError("not_available", "not available yet", detail)


def check_version(value: Any) -> Any:
    if type(value) is int and value == 1:
        return value
    raise PydanticCustomError("expected", "needs 1, the only format so far")


def check_base(value: Any) -> Any:
    """A known name as Microsoft writes it: caches and tables tell capitals apart, the hub does not."""
    return base_names.canonical(value) if isinstance(value, str) else value


def auto_or_positive(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise PydanticCustomError("expected", "needs `auto` or a positive whole number")


def auto_or_count(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise PydanticCustomError("expected", "needs `auto` or a whole number from 0 on")


def auto_or_switch(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise PydanticCustomError("expected", "needs `auto`, true or false")


def columns(value: Any) -> Any:
    if value in ("auto", "all"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % 64 == 0:
        return value
    raise PydanticCustomError("expected", "needs `auto`, `all` or a multiple of 64")


def auto_or_size(value: Any) -> Any:
    text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if isinstance(text, str) and text != "auto":
        try:
            parse_bytes(text)
        except ValueError:
            raise PydanticCustomError("expected", f"needs `auto`, or {HOW_TO_WRITE}") from None
    return text


def size_schema(schema: dict[str, Any]) -> None:
    """What `auto_or_size` accepts."""
    size = r"^(auto|\s*\d+(\.\d+)?\s*([KMGTkmgt]([Ii]?[Bb])?)?\s*)$"
    text = {"type": schema.pop("type"), "pattern": size}
    schema["anyOf"] = [text, {"type": "number", "exclusiveMinimum": 0}]


def check_method(value: Any) -> Any:
    """pissa and olora are starts of PEFT's that are declined for good, and told so."""
    if value in ("pissa", "olora"):
        detail = {"allowed": list(get_args(Method)), "instead": _KEEPS_THE_BASE}
        raise PydanticCustomError("declined", _MOVES_THE_BASE, detail)
    return value


_MOVES_THE_BASE: Final = (
    "moves the largest directions out of the base's weights: what is saved would fit no stock base, and what "
    "is left of a 4-bit base would have to be quantized anew"
)
_KEEPS_THE_BASE: Final = "Use loftq, which starts from the base's weights too and leaves them as they are."


def check_target(name: Any) -> Any:
    """A linear, a projection inside one, the embedding or the head.

    `o` and `down` are linears, q_proj is what Llama calls q.
    """
    if not isinstance(name, str):
        raise PydanticCustomError("expected", "needs the name of a linear")
    if name in TARGETS:
        return {"o": "o_proj", "down": "down_proj"}.get(name, name)
    if name in phi3.LLAMA_NAMES:
        return phi3.LLAMA_NAMES[name]
    if name == "all-linear":
        raise PydanticCustomError("expected", "needs to stand alone, outside a list")
    allowed = [*TARGETS, "all-linear"]
    known = {"allowed": allowed, "known": [*allowed, *phi3.LLAMA_NAMES]}
    raise PydanticCustomError("target", "is not a Phi-3 projection", known)


def check_targets(value: Any) -> Any:
    """A list; a name that stands alone gets the message of its own fault first."""
    if isinstance(value, str):
        check_target(value)
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("expected", "needs all-linear, or a list such as [q, v]")
    return value


QUANTIZER_KIND: Final = re.compile(r"(?:gguf:)?(q\d_k\w*|[it]q\d\w*)", re.IGNORECASE)
"""Kinds of GGUF that only llama.cpp's own quantizer makes."""


def check_export(name: Any) -> Any:
    """What a run can make: a k-quant is refused here and not when the training is done."""
    if not isinstance(name, str):
        raise PydanticCustomError("string_type", "needs text")
    if name in EXPORTS:
        return name
    known = {"allowed": list(EXPORTS)}
    kind = QUANTIZER_KIND.fullmatch(name)
    if kind is None:
        raise PydanticCustomError("target", "is no export", known)
    instead = f"Write gguf:f16, then run `llama-quantize NAME-f16.gguf NAME.gguf {kind[1].upper()}`."
    raise PydanticCustomError("declined", _NEEDS_LLAMA_CPP, known | {"instead": instead})


_NEEDS_LLAMA_CPP: Final = "is a kind that llama.cpp's own quantizer makes, and no Python package"


def check_host(value: Any) -> Any:
    if value == "auto" or isinstance(value, (list, tuple)):
        return value
    raise PydanticCustomError("expected", "needs `auto`, or a list such as [embedding]")


def check_sources(value: Any) -> Any:
    """Not `min_length`: pydantic counts what is valid, and would blame the list for its only item too."""
    if not value:
        raise PydanticCustomError("expected", "needs at least one source")
    return value


def is_hub_id(path: str) -> bool:
    """Whether text has the form org/name; names that end as data files do are files."""
    return bool(_HUB_ID.fullmatch(path)) and not path.lower().endswith(FILE_SUFFIXES)


_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
FILE_SUFFIXES: Final = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".xlsx"),
    *(".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".yaml", ".yml"),
)
"""What a file of data is called, of kinds that can be read or not: a missing one is no hub id."""
