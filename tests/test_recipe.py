"""Every key of the recipe: what it accepts, what it refuses with its line, and what is not available yet."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from qlora_phi3 import phi3, recipe_words, strict_yaml
from qlora_phi3.errors import RecipeError
from qlora_phi3.recipe import (
    ARMS,
    GENERATION_METRICS,
    METRICS,
    Data,
    Fraction,
    Recipe,
    Source,
)
from qlora_phi3.recipe_checks import cross_problems
from qlora_phi3.recipe_file import load_recipe
from qlora_phi3.recipe_values import TARGETS
from qlora_phi3.strict_yaml import dotted_path

FORMATS = ["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"]
BASE = {
    "version": "1",
    "name": "phi",
    "data.train.path": "/data/train.jsonl",
    "data.eval.path": "/data/eval.jsonl",
}
"""The smallest recipe that every key can be added to: dotted key -> YAML text."""

ACCEPTED: dict[str, dict[str, Any]] = {
    "version": {"1": 1, "01": 1},
    "name": {
        "phi": "phi",
        "Phi3-mini_8gb.v2": "Phi3-mini_8gb.v2",
        "no": "no",
        "0x": "0x",
        "a" * 80: "a" * 80,
    },
    "description": {"''": "", "one line": "one line", "on": "on", "'2e-4: #'": "2e-4: #"},
    "model.base": {
        "microsoft/Phi-3-mini-4k-instruct": "microsoft/Phi-3-mini-4k-instruct",
        "builtin:smollm2-135m": "builtin:smollm2-135m",
        "/models/phi": "/models/phi",
    },
    "model.revision": {"null": None, "": None, "abc123": "abc123", "'1234567'": "1234567"},
    "model.quantization": {"nf4": "nf4", "none": "none"},
    "model.double_quant": {"true": True, "false": False},
    "model.cache": {"true": True, "false": False},
    "model.compute_dtype": {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"},
    "adapter.method": {"lora": "lora", "rslora": "rslora", "dora": "dora", "loftq": "loftq"},
    "adapter.rank": {"16": 16, "1": 1, "012": 12},
    "adapter.alpha": {"32": 32, "1": 1},
    "adapter.dropout": {"0.0": 0.0, "0": 0.0, "0.99": 0.99, "1e-3": 1e-3},
    "adapter.targets": {
        "all-linear": "all-linear",
        "[qkv_proj]": ("qkv_proj",),
        "[down, gate_up_proj, o]": ("down_proj", "gate_up_proj", "o_proj"),
        "[q, k, v, gate, up]": ("q", "k", "v", "gate", "up"),
        "[q_proj, k_proj, v_proj, gate_proj, up_proj]": ("q", "k", "v", "gate", "up"),
        "[lm_head, q, embed_tokens]": ("lm_head", "q", "embed_tokens"),
    },
    "adapter.split_fused": {"true": True, "false": False},
    "adapter.init": {"null": None, "/adapters/a": "/adapters/a"},
    "data.train.path": {"/data/train.jsonl": "/data/train.jsonl", "/no": "/no", "'/a b: #c'": "/a b: #c"},
    "data.train.format": {name: name for name in FORMATS},
    "data.train.split": {"train": "train"},  # others need a hub id: tested below
    "data.train.subset": {"null": None},
    "data.train.revision": {"null": None},
    "data.train.limit": {"null": None, "1": 1, "1000": 1000},
    "data.train.weight": {"1": 1.0, "0.5": 0.5, "2": 2.0, "100.0": 100.0},
    "data.eval": {"null": None, "{path: /e, format: messages}": Any},
    "data.eval.path": {"/data/eval.jsonl": "/data/eval.jsonl"},
    "data.eval.format": {name: name for name in FORMATS},
    "data.eval.split": {"train": "train"},
    "data.eval.subset": {"null": None},
    "data.eval.revision": {"null": None},
    "data.eval.limit": {"null": None, "7": 7},
    "data.eval.weight": {"1": 1.0, "0.25": 0.25},
    "data.eval.fraction": {"0.05": 0.05, "1e-3": 1e-3, "0.99": 0.99},
    "data.max_length": {"2048": 2048, "8": 8},
    "data.overlong": {"drop": "drop", "truncate": "truncate", "split": "split", "error": "error"},
    "data.packing": {"true": True, "false": False},
    "data.loss_on": {"assistant": "assistant", "last": "last", "all": "all"},
    "train.task": {"sft": "sft"},
    "train.engine": {"auto": "auto", "reference": "reference", "native": "native"},
    "train.activations": {name: name for name in ("auto", "keep", "recompute", "offload")},
    "train.kept_layers": {"auto": "auto", "0": 0, "32": 32},
    "train.keep_attention": {"auto": "auto", "true": True, "false": False},
    "train.slice_columns": {"auto": "auto", "all": "all", "64": 64, "2048": 2048},
    "train.epochs": {"1": 1, "3": 3},
    "train.max_steps": {"null": None, "1": 1},
    "train.effective_batch": {"16": 16, "1": 1},
    "train.micro_batch": {"auto": "auto", "1": 1, "16": 16},
    "train.learning_rate": {"2e-4": 2e-4, "0.0002": 2e-4, "2E-4": 2e-4, "1e-30": 1e-30},
    "train.lora_plus_ratio": {"null": None, "16": 16.0, "1": 1.0},
    "train.scheduler": {"cosine": "cosine", "linear": "linear", "constant": "constant"},
    "train.warmup": {"0.03": 0.03, "0": 0.0, "1": 1.0, "100": 100.0, "100.0": 100.0},
    "train.weight_decay": {"0.0": 0.0, "1": 1.0},
    "train.max_grad_norm": {"1.0": 1.0, "0.3": 0.3, "1e9": 1e9},
    "train.optimizer": {
        "paged_adamw_8bit": "paged_adamw_8bit",
        "paged_adamw_32bit": "paged_adamw_32bit",
        "adamw_8bit": "adamw_8bit",
        "adamw_torch": "adamw_torch",
    },
    "train.seed": {"42": 42, "0": 0, "4294967295": 2**32 - 1},
    "train.logit_tokens": {"1024": 1024, "1": 1},
    "train.log_every": {"1": 1, "10": 10},
    "train.eval_every": {"null": None, "10": 10},
    "train.save_every": {"null": None},
    "train.keep_checkpoints": {"2": 2},
    "memory.budget": {"auto": "auto", "8GiB": "8GiB", "8": "8", "7.5GB": "7.5GB"},
    "memory.on_oom": {"adapt": "adapt", "fail": "fail"},
    "memory.host": {
        "auto": "auto",
        "[]": (),
        "[embedding]": ("embedding",),
        "[embedding, layers]": ("embedding", "layers"),
    },
    "evaluate.metrics": {
        "[loss]": ("loss",),
        "[]": (),
        "[perplexity, exact_match, json_match]": ("perplexity", "exact_match", "json_match"),
    },
    "evaluate.samples": {"32": 32, "1": 1},
    "evaluate.max_new_tokens": {"128": 128, "1": 1},
    "evaluate.compare_base": {"true": True, "false": False},
    "export": {
        "[adapter]": ("adapter",),
        "[]": (),
        "[merged, gguf:q8_0, gguf-lora]": ("merged", "gguf:q8_0", "gguf-lora"),
    },
    "track": {"[]": ()},
}
"""Key -> YAML text -> value. The first text of an optional key is its default."""

WHOLE = "needs a whole number"
NUMBER = "needs a number"
FINITE = "needs a finite number"
BOOL = "needs true or false"
TEXT = "needs text"
LIST = "needs a list"
KEYS = "needs keys of its own"
AUTO = "needs `auto` or a positive whole number"
TARGET = "needs all-linear, or a list such as [q, v]"
VERSION = "needs 1, the only format so far"
NOT_WHOLE = {
    "many": WHOLE,
    "1.0": WHOLE,
    "'8'": WHOLE,
    "1_000": WHOLE,
    "true": WHOLE,
    "[1]": WHOLE,
    ".inf": WHOLE,
}
COUNT = {**NOT_WHOLE, "null": WHOLE, "0": "must be 1 or more", "-1": "must be 1 or more"}
COUNT_OR_NULL = {**NOT_WHOLE, "0": "must be 1 or more"}
NOT_NUMBER = {
    "low": NUMBER,
    "'0.1'": NUMBER,
    "1_0.0": NUMBER,
    "true": NUMBER,
    "null": NUMBER,
    "[0.1]": NUMBER,
}
NOT_FINITE = {".inf": FINITE, "-.inf": FINITE, ".nan": FINITE, "1e999": FINITE}
NO_FLOAT = {**NOT_NUMBER, **NOT_FINITE}
NOT_BOOL = {
    "no": BOOL,
    "yes": BOOL,
    "on": BOOL,
    "off": BOOL,
    "1": BOOL,
    "0": BOOL,
    "'true'": BOOL,
    "null": BOOL,
}
NOT_TEXT_OR_NULL = {"3": TEXT, "1e5": TEXT, "true": TEXT, "[a]": TEXT, "{a: 1}": TEXT}
NOT_TEXT = {**NOT_TEXT_OR_NULL, "null": TEXT}
NO_PATH = {**NOT_TEXT, "''": "must not be empty"}
SIZE = "needs `auto`, or a size such as 8GiB, 8GB, 512MiB or 8, which is GiB"
NO_CHOICE = {
    "'': ''": "",
    "nonsense": "'nonsense' is not allowed",
    "null": "null is not allowed",
    "true": "true is",
}
NO_CHOICE = {
    "qqq": "'qqq' is not allowed. Allowed: ",
    "null": "null is not allowed",
    "[]": "[] is not",
}
FRACTION = {**NO_FLOAT, "0": "must be above 0", "1": "must be below 1"}

WEIGHT = {**NO_FLOAT, "0": "must be above 0", "-1": "must be above 0", "101": "must be 100.0 or less"}
NO_NAME = {**NOT_TEXT_OR_NULL, "''": "must not be empty"}

REFUSED: dict[str, dict[str, str]] = {
    "version": {
        "2": VERSION,
        "1.0": VERSION,
        "true": VERSION,
        "'1'": VERSION,
        "null": VERSION,
        "[1]": VERSION,
    },
    "name": {
        **NOT_TEXT,
        "012": TEXT,
        "''": "must be letters",
        "a b": "must be letters",
        "a/b": "must be letters",
        "..": "must be letters",
        '"a\\n"': "must be letters",
        "ü": "must be letters",
        "a" * 81: "must have at most 80 characters",
    },
    "description": NOT_TEXT,
    "model": {"3": KEYS, "null": KEYS, "[]": KEYS, "microsoft/phi-4": KEYS},
    "model.base": NO_PATH,
    "model.revision": NOT_TEXT_OR_NULL,
    "model.quantization": NO_CHOICE,
    "model.double_quant": NOT_BOOL,
    "model.cache": NOT_BOOL,
    "model.compute_dtype": {**NO_CHOICE, "bf16": "Did you mean 'bfloat16'?"},
    "adapter": {"lora": KEYS, "null": KEYS, "[lora]": KEYS},
    "adapter.method": {
        **NO_CHOICE,
        "Lora": "Did you mean 'lora'? Allowed: lora, rslora, dora, loftq.",
        "pissa": "'pissa' moves the largest directions out of the base's weights: what is saved would fit no",
        "olora": "Use loftq, which starts from the base's weights too and leaves them as they are. "
        "Allowed: lora, rslora, dora, loftq.",
        "PiSSA": "'PiSSA' is not allowed. Allowed: lora, rslora, dora, loftq.",
        "pissa_niter_4": "'pissa_niter_4' is not allowed.",
    },
    "adapter.rank": COUNT,
    "adapter.alpha": COUNT,
    "adapter.dropout": {**NO_FLOAT, "-0.1": "must be 0.0 or more", "1": "must be below 1.0"},
    "adapter.targets": {
        "null": TARGET,
        "3": TARGET,
        "{q: 1}": TARGET,
        "o_proj": TARGET,
        "q_prj": "is not a Phi-3 projection. Did you mean 'q_proj'?",
        "all-linaer": "Did you mean 'all-linear'?",
    },
    "adapter.split_fused": NOT_BOOL,
    "adapter.init": {"3": TEXT, "''": "empty"},
    "data": {"3": KEYS, "null": KEYS, "[a.jsonl]": KEYS, "a.jsonl": KEYS},
    "data.train": {"a.jsonl": KEYS, "null": KEYS, "3": KEYS, "[]": "needs at least one source"},
    "data.train.path": NO_PATH,
    "data.train.format": {
        **NO_CHOICE,
        "mesages": "Did you mean 'messages'? Allowed: "
        "auto, messages, sharegpt, alpaca, prompt-completion, text.",
    },
    "data.train.split": NO_PATH,
    "data.train.subset": NO_NAME,
    "data.train.revision": NO_NAME,
    "data.train.limit": COUNT_OR_NULL,
    "data.train.weight": WEIGHT,
    "data.eval": {"a.jsonl": KEYS, "[]": "needs at least one source", "3": KEYS},
    "data.eval.path": NO_PATH,
    "data.eval.format": NO_CHOICE,
    "data.eval.split": NO_PATH,
    "data.eval.subset": NO_NAME,
    "data.eval.revision": NO_NAME,
    "data.eval.limit": COUNT_OR_NULL,
    "data.eval.weight": WEIGHT,
    "data.eval.fraction": FRACTION,
    "data.max_length": {**NOT_WHOLE, "7": "must be 8 or more"},
    "data.overlong": NO_CHOICE,
    "data.packing": NOT_BOOL,
    "data.loss_on": NO_CHOICE,
    "train": {"3": KEYS, "null": KEYS, "[]": KEYS},
    "train.task": NO_CHOICE,
    "train.engine": NO_CHOICE,
    "train.activations": NO_CHOICE,
    "train.kept_layers": {
        "-1": "needs `auto` or a whole number",
        "1.5": "whole number",
        "all": "whole number",
    },
    "train.keep_attention": {name: "needs `auto`, true or false" for name in ("yes", "3", "null", "all")},
    "train.slice_columns": {name: "a multiple of 64" for name in ("0", "100", "-64", "most", "true")},
    "train.epochs": COUNT,
    "train.max_steps": COUNT_OR_NULL,
    "train.effective_batch": {**COUNT, "9" * 29: "must be 100000 or less"},
    "train.micro_batch": {
        "0": AUTO,
        "-1": AUTO,
        "1.0": AUTO,
        "true": AUTO,
        "null": AUTO,
        "'4'": AUTO,
        "[1]": AUTO,
    },
    "train.learning_rate": {**FRACTION, "1e-400": "must be above 0"},
    "train.lora_plus_ratio": {"0.5": "must be 1.0 or more", "fast": NUMBER},
    "train.scheduler": {**NO_CHOICE, "cosin": "Did you mean 'cosine'?"},
    "train.warmup": {**NO_FLOAT, "-1": "must be 0.0 or more"},
    "train.weight_decay": {**NO_FLOAT, "-0.1": "must be 0.0 or more", "1.1": "must be 1.0 or less"},
    "train.max_grad_norm": {**NO_FLOAT, "0": "must be above 0"},
    "train.optimizer": {**NO_CHOICE, "adamw": "Did you mean 'adamw_"},
    "train.seed": {
        **NOT_WHOLE,
        "null": WHOLE,
        "-1": "must be 0 or more",
        "4294967296": "must be below 4294967296",
    },
    "train.logit_tokens": COUNT,
    "train.log_every": COUNT,
    "train.eval_every": COUNT_OR_NULL,
    "train.save_every": NOT_WHOLE,
    "train.keep_checkpoints": COUNT,
    "memory": {"8GiB": KEYS, "null": KEYS},
    "memory.budget": {"nonsense": SIZE, "0": SIZE, "true": TEXT, "null": TEXT, "[8GiB]": TEXT, "-1GiB": SIZE},
    "memory.on_oom": NO_CHOICE,
    "memory.host": {name: "needs `auto`, or a list" for name in ("embedding", "null", "3", "{embedding: 1}")},
    "evaluate": {"[loss]": KEYS, "null": KEYS},
    "evaluate.metrics": {"loss": "needs a list. Write [loss].", "null": LIST, "3": LIST, "{loss: 1}": LIST},
    "evaluate.samples": COUNT,
    "evaluate.max_new_tokens": COUNT,
    "evaluate.compare_base": NOT_BOOL,
    "export": {"adapter": "needs a list. Write [adapter].", "null": LIST, "3": LIST, "{adapter: 1}": LIST},
    "track": {"wandb": "needs a list. Write [wandb].", "null": LIST, "false": LIST},
}
"""Key -> YAML text -> part of the message, beside the found value."""

REFUSED_ITEMS = {
    "data.train": {"a.jsonl": f"{KEYS}. Write {{path: a.jsonl}}.", "3": f"{KEYS}. They are path, format, "},
    "data.eval": {"[{path: x}]": KEYS},
    "adapter.targets": {
        "nope": "'nope' is not a Phi-3 projection. Allowed: q, k, v, o, gate, up, down, qkv_proj,",
        "all-linear": "needs to stand alone, outside a list",
        "3": "needs the name of a linear",
        "{q: 1}": "needs the name of a linear",
        "null": "needs the name of a linear",
    },
    "evaluate.metrics": {
        "los": "Did you mean 'loss'? Allowed: loss, perplexity, exact_match, json_match.",
        "3": "3 is",
    },
    "export": {
        "1": "needs text. Quote it.",
        "null": TEXT,
        "merge": "'merge' is no export. Did you mean 'merged'? Allowed: adapter, loralib, mlx,",
        "gguf:q8": "Did you mean 'gguf:q8_0'?",
        "hub": "'hub' is no export.",
    },
    "memory.host": {"embeding": "Did you mean 'embedding'?", "auto": "'auto' is not", "3": "3 is"},
    "track": {"wandbb": "Did you mean 'wandb'?", "no": "'no' is not allowed"},
}

LATER: dict[str, list[str]] = {
    "data.train.format": ["preference"],
    "data.eval.format": ["preference"],
    "train.task": ["dpo"],
    "train.save_every": ["1", "100"],
    "train.keep_checkpoints": ["1", "3"],
    "track": ["[wandb]", "[tensorboard]", "[trackio]", "[mlflow]"],
}
LATER_ITEMS = {
    "evaluate.metrics": ["rouge"],
}


def write(folder: Path, key: str, value: str) -> tuple[Path, int]:
    """A recipe with `key: value` put into BASE, and the line of that key."""
    values = {other: text for other, text in BASE.items() if not f"{other}.".startswith(f"{key}.")}
    if key == "data.eval.fraction":
        del values["data.eval.path"]
    if key == "data":
        values = {other: text for other, text in values.items() if not other.startswith("data.")}
    values[key] = value
    lines: list[str] = ["# every key in a line of its own"]
    seen: set[str] = set()
    for dotted in sorted(values):
        steps = dotted.split(".")
        for depth, step in enumerate(steps):
            prefix = ".".join(steps[: depth + 1])
            if prefix not in seen:
                seen.add(prefix)
                lines.append(f"{'  ' * depth}{step}:" + (f" {values[dotted]}" if prefix == dotted else ""))
            if prefix == key:
                line = len(lines)
    path = folder / "r.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path, line


def load(folder: Path, key: str, value: str) -> Recipe:
    return load_recipe(write(folder, key, value)[0])


def refusal(folder: Path, key: str, value: str, *, item: bool = False) -> str:
    """The one message about `key`, after its place was checked."""
    path, line = write(folder, key, value)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert len(caught.value.problems) == 1, str(caught.value)
    place = f"{path}:{line}: {key}" + ("[0]" if item else "")
    message = str(caught.value)
    assert message.startswith(f"{place}: ")
    return message.removeprefix(f"{place}: ")


def cases(table: Any) -> list[Any]:
    """(key, text), and what stands behind the text where the table says it."""
    found = []
    for key, texts in table.items():
        for text in texts:
            rest = (texts[text],) if isinstance(texts, dict) else ()
            found.append(pytest.param(key, text, *rest, id=f"{key}={text[:40]}"))
    return found


@pytest.mark.parametrize(("key", "text", "value"), cases(ACCEPTED))
def test_accepted(tmp_path: Path, key: str, text: str, value: Any) -> None:
    found = reduce(getattr, key.split("."), load(tmp_path, key, text))
    if value is not Any:
        assert found == value
        assert type(found) is type(value)


OPTIONAL = {key: next(iter(texts)) for key, texts in ACCEPTED.items() if key not in BASE and texts}
for _key in ("data.eval", "data.eval.fraction"):  # BASE sets the former; its default is tested below
    OPTIONAL.pop(_key)


@pytest.mark.parametrize(("key", "text"), OPTIONAL.items())
def test_defaults(tmp_path: Path, key: str, text: str) -> None:
    assert load(tmp_path, key, text) == load(tmp_path, "version", "1")


def test_what_has_to_be_given() -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({})
    assert [(error["type"], error["loc"]) for error in caught.value.errors()] == [
        ("missing", (name,)) for name in ("version", "name", "data")
    ]
    smallest = Recipe.model_validate({"version": 1, "name": "a", "data": {"train": {"path": "x"}}})
    assert smallest.data.eval is None


@pytest.mark.parametrize(("key", "text", "words"), cases(REFUSED))
def test_refused(tmp_path: Path, key: str, text: str, words: str) -> None:
    message = refusal(tmp_path, key, text)
    assert words in message
    assert "Input should be" not in message  # pydantic's words for programmers


@pytest.mark.parametrize(("key", "text", "words"), cases(REFUSED_ITEMS))
def test_refused_items(tmp_path: Path, key: str, text: str, words: str) -> None:
    assert words in refusal(tmp_path, key, f"[{text}]", item=True)


@pytest.mark.parametrize(("key", "text"), cases(LATER))
def test_not_available_yet(tmp_path: Path, key: str, text: str) -> None:
    found, _, remedy = refusal(tmp_path, key, text).partition(" is not available yet. ")
    assert strict_yaml.parse_value(found, "message") == strict_yaml.parse_value(text, "recipe")
    assert remedy.startswith(("Today: ", "Its rows are for train.task dpo", "Every logged step"))


@pytest.mark.parametrize(("key", "text"), cases(LATER_ITEMS))
def test_items_not_available_yet(tmp_path: Path, key: str, text: str) -> None:
    assert refusal(tmp_path, key, f"[{text}]", item=True).startswith(f"'{text}' is not available yet. ")


def test_what_is_not_available_is_marked_where_keys_are_listed() -> None:
    listed = {key: text for key, _, text in recipe_words.keys(Recipe, "")}
    for key, text in [(key, text) for key, texts in (LATER | LATER_ITEMS).items() for text in texts]:
        words = listed[key.replace("data.eval.", "data.train.")]
        assert words.startswith("not yet: ") or words.endswith(f"{text}: not yet"), key
    properties = Recipe.model_json_schema()["$defs"]["Train"]["properties"]
    assert properties["save_every"]["description"].startswith("not yet: ")


@pytest.mark.parametrize("name", ["q", "o", "q_proj", "qkv_proj"])
def test_a_target_alone_wants_a_list(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, "adapter.targets", name) == f"found '{name}', {TARGET}."


@pytest.mark.parametrize("targets", [["q"], ["qkv_proj", "up"]])
def test_a_projection_needs_a_pair_of_its_own(targets: list[str]) -> None:
    [(path, reason, _)] = cross_problems(recipe(adapter__targets=targets, adapter__split_fused=False))
    assert path == ("adapter", "targets")
    assert reason == "names a projection inside a fused linear, but adapter.split_fused is false."


@pytest.mark.parametrize(
    ("targets", "split", "pairs"),
    [
        (["v", "q"], True, [("qkv_proj", "q"), ("qkv_proj", "v")]),
        (
            ["down", "gate_up_proj"],
            True,
            [("gate_up_proj", "gate"), ("gate_up_proj", "up"), ("down_proj", "down_proj")],
        ),
        (["down", "gate_up_proj"], False, [("gate_up_proj", "gate_up_proj"), ("down_proj", "down_proj")]),
    ],
)
def test_pairs(targets: list[str], split: bool, pairs: list[tuple[str, str]]) -> None:
    assert recipe(adapter__targets=targets, adapter__split_fused=split).adapter.pairs == tuple(pairs)


@pytest.mark.parametrize(
    ("targets", "embeddings", "parts"),
    [
        ("all-linear", (), ("q", "k", "v", "o_proj", "gate", "up", "down_proj")),
        (["lm_head"], ("lm_head",), ("lm_head",)),
        (["lm_head", "v", "embed_tokens"], ("embed_tokens", "lm_head"), ("v", "embed_tokens", "lm_head")),
    ],
)
def test_the_embedding_and_the_head_are_beside_the_layers(
    targets: Any, embeddings: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    adapter = recipe(adapter__targets=targets).adapter
    assert (adapter.embeddings, adapter.parts) == (embeddings, parts)
    assert not set(adapter.trained) & set(phi3.EMBEDDINGS)


def parts(kind: Any) -> list[type[BaseModel]]:
    """The recipe parts an annotation stands for."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [part for inner in typing.get_args(kind) for part in parts(inner)]


def schema_keys(part: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, annotation) of every key, parts included."""
    for name, info in part.model_fields.items():
        yield f"{prefix}{name}", info.annotation
        for inner in parts(info.annotation):
            yield from schema_keys(inner, f"{prefix}{name}.")


def choices(kind: Any) -> list[Any]:
    """Values of every Literal in an annotation."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [value for inner in typing.get_args(kind) for value in choices(inner)]


def test_every_key_is_tested() -> None:
    keys = dict(schema_keys())
    parts_of_recipe = {key for key, kind in keys.items() if parts(kind)} - {
        "data.eval"
    }  # a list of sources has tests of its own
    assert set(REFUSED) == set(keys)
    assert set(ACCEPTED) == set(keys) - parts_of_recipe


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for key, kind in schema_keys() if choices(kind)])
def test_every_choice_is_tested(key: str, kind: Any) -> None:
    tested = [*ACCEPTED[key], *LATER.get(key, ()), *LATER_ITEMS.get(key, ())]
    words = {word for text in tested for word in re.findall(r"[^\[\], ]+", text)}
    assert {str(choice) for choice in choices(kind)} <= words


def test_names_of_targets_and_metrics_are_tested() -> None:
    tested = set(re.findall(r"\w+", str(list(ACCEPTED["adapter.targets"]))))
    assert tested >= set(TARGETS) - {"o_proj", "down_proj"}
    assert set(re.findall(r"\w+", str(list(ACCEPTED["evaluate.metrics"])))) == set(METRICS)
    assert set(GENERATION_METRICS) < set(METRICS)


def test_every_arm_of_a_union_has_its_part() -> None:
    found = {part for _, kind in schema_keys() if len(parts(kind)) > 1 for part in parts(kind)}
    assert found == {part for part in ARMS.values() if part is not None}


# Checks between keys


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "version": 1,
        "name": "a",
        "data": {"train": {"path": "x"}, "eval": {"path": "y"}},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        values.setdefault(part, {})[name] = value
    return Recipe.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        (
            {"train__engine": "native", "adapter__method": "dora"},
            "train.engine",
            "native has no DoRA.",
        ),
        (
            {"train__engine": "reference", "train__keep_attention": True},
            "train.engine",
            "reference neither keeps attention outputs alone nor recomputes in slices.",
        ),
        ({"train__engine": "reference", "train__slice_columns": 128}, "train.engine", "reference neither"),
        ({"train__micro_batch": 3}, "train.micro_batch", "3 does not divide train.effective_batch 16."),
        ({"train__micro_batch": 32}, "train.micro_batch", "32 does not divide train.effective_batch 16."),
        ({"adapter__targets": []}, "adapter.targets", "is empty: nothing would be trained."),
        (
            {"adapter__targets": ["o_proj", "o"]},
            "adapter.targets",
            "names a projection twice: o_proj, o_proj.",
        ),
        (
            {"adapter__targets": ["q", "qkv_proj"]},
            "adapter.targets",
            "names a projection twice: q, qkv_proj.",
        ),
        (
            {"adapter__method": "loftq", "adapter__init": "/adapters/a"},
            "adapter.init",
            "says where training starts, and so does adapter.method loftq.",
        ),
        (
            {"adapter__method": "loftq", "model__quantization": "none"},
            "adapter.method",
            "'loftq' starts from what quantization lost, and with model.quantization none nothing is lost.",
        ),
        (
            {"adapter__targets": ["q", "lm_head"], "adapter__method": "dora"},
            "adapter.method",
            "dora on lm_head would build a whole matrix of the vocabulary in every pass",
        ),
        (
            {"adapter__targets": ["lm_head", "q", "lm_head"]},
            "adapter.targets",
            "names a projection twice: lm_head, q, lm_head.",
        ),
        ({"train__warmup": 1.5}, "train.warmup", "1.5 is neither a fraction below 1 nor a whole number"),
        ({"data__eval": None, "train__eval_every": 5}, "train.eval_every", "data.eval is null."),
        (
            {"data__eval": None, "evaluate__metrics": ["loss", "exact_match"]},
            "evaluate.metrics",
            "loss, exact_match asked for, but data.eval is null.",
        ),
        (
            {"data__train": {"path": "/x", "split": "test"}},
            "data.train.split",
            "'test' is for a data set on the hub; /x is a file or folder.",
        ),
        (
            {"data__train": [{"path": "a/b", "subset": "main"}, {"path": "/x", "subset": "main"}]},
            "data.train[1].subset",
            "'main' is for a data set on the hub; /x is",
        ),
        (
            {"data__eval": {"path": "a/b.json", "revision": "v1"}},
            "data.eval.revision",
            "'v1' is for a data set on the hub; a/b.json is",
        ),
        (
            {"data__train": {"path": "x", "format": "text"}, "data__loss_on": "last"},
            "data.loss_on",
            "plain text has no last answer",
        ),
        (
            {
                "data__train": [{"path": "x", "format": "text"}],
                "data__eval": {"fraction": 0.1},
                "evaluate__metrics": ["json_match"],
            },
            "evaluate.metrics",
            "compare answers, and plain text has none",
        ),
        (
            {"memory__host": ["embedding"], "adapter__targets": ["q", "embed_tokens"]},
            "memory.host",
            "embedding has an adapter",
        ),
        ({"memory__host": ["layers"], "train__engine": "reference"}, "memory.host", "says not to take"),
        ({"memory__host": ["layers"], "adapter__method": "dora"}, "memory.host", "has no DoRA"),
        ({"memory__host": ["embedding", "embedding"]}, "memory.host", "a part twice: embedding, embedding."),
        (
            {"data__eval": {"path": "x", "format": "text"}, "evaluate__metrics": ["exact_match"]},
            "evaluate.metrics",
            "compare answers, and plain text has none",
        ),
    ],
)
def test_keys_that_contradict_each_other(changes: dict[str, Any], place: str, words: str) -> None:
    [(path, reason, remedy)] = cross_problems(recipe(**changes))
    assert dotted_path(path) == place
    assert words in reason
    assert remedy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__eval": None},
        {"data__eval": None, "evaluate__metrics": []},
        {"train__micro_batch": 16},
        {"train__micro_batch": 6, "train__effective_batch": 12},
        {"train__warmup": 1},
        {"train__warmup": 0.999},
        {"train__eval_every": 5, "evaluate__metrics": ["json_match"]},
        {"adapter__targets": ["o_proj", "down"]},
        {"data__train": {"path": "a/b", "split": "train_sft", "subset": "main", "revision": "v1"}},
        {"data__train": {"path": "x", "format": "text"}, "data__loss_on": "all"},
        {"data__train": {"path": "x", "format": "text"}, "evaluate__metrics": ["exact_match"]},
        {"data__eval": {"fraction": 0.1}, "evaluate__metrics": ["exact_match"]},
    ],
)
def test_keys_that_agree(changes: dict[str, Any]) -> None:
    assert cross_problems(recipe(**changes)) == []


@pytest.mark.parametrize(
    ("path", "is_hub"),
    [
        ("HuggingFaceH4/ultrachat_200k", True),
        ("org/data-v1.0", True),
        ("a/b", True),
        ("a", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("../b", False),
        ("/a/b", False),
        ("~/b", False),
        ("a/", False),
        ("a/.b", False),
        ("a/b.jsonl", False),
        ("a/b.JSON", False),
        ("a/b.tar.gz", False),
        ("a/b.txt", False),
        ("a b/c", False),
    ],
)
def test_what_looks_like_a_hub_id(path: str, is_hub: bool) -> None:
    assert Source(path=path).is_hub is is_hub


def test_one_source_and_a_list_of_them() -> None:
    one, other = Source(path="x"), Source(path="y", weight=2)
    single = Data(train=one, eval=Fraction(fraction=0.1))
    assert (single.train_sources, single.eval_sources) == ((one,), ())
    several = Data(train=[one, other], eval=(other,))
    assert (several.train_sources, several.eval_sources) == ((one, other), (other,))
    assert [key for key, _ in several.sources()] == [
        ("data", "train", 0),
        ("data", "train", 1),
        ("data", "eval", 0),
    ]
    assert Data(train=one).eval_sources == ()


def test_all_contradictions_at_once() -> None:
    changes = {"train__micro_batch": 5, "train__warmup": 2.5, "adapter__targets": []}
    places = {".".join(path) for path, _, _ in cross_problems(recipe(**changes))}
    assert places == {"train.micro_batch", "train.warmup", "adapter.targets"}


def test_a_recipe_cannot_be_changed() -> None:
    made = recipe()
    with pytest.raises(ValidationError, match="frozen"):
        made.train.epochs = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        made.name = "b"  # type: ignore[misc]


def test_settled_replaces_auto_and_nothing_else() -> None:
    made = recipe(train__effective_batch=12)
    settled = made.settled(micro_batch=4, activations="keep")
    assert settled == recipe(train__effective_batch=12, train__micro_batch=4, train__activations="keep")
    assert (made.train.micro_batch, made.train.activations) == ("auto", "auto")
    hosted = made.settled(micro_batch=4, host=("embedding",))
    assert hosted == recipe(train__effective_batch=12, train__micro_batch=4, memory__host=["embedding"])
    assert made.settled(micro_batch=4).memory.host == "auto"


# The JSON schema, which editors check and complete with

SCHEMA = json.loads(json.dumps(Recipe.model_json_schema()))
TYPES = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Does `value` obey `schema`? Only what our schema uses; an unknown keyword is a KeyError."""
    checks = {
        "type": lambda name: (
            isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
        ),
        "const": lambda constant: value == constant and type(value) is type(constant),
        "enum": lambda names: any(value == name and type(value) is type(name) for name in names),
        "not": lambda inner: not fits(value, inner),
        "anyOf": lambda arms: any(fits(value, arm) for arm in arms),
        "oneOf": lambda arms: sum(fits(value, arm) for arm in arms) == 1,
        "$ref": lambda name: fits(value, SCHEMA["$defs"][name.removeprefix("#/$defs/")]),
        "minimum": lambda limit: value >= limit,
        "maximum": lambda limit: value <= limit,
        "multipleOf": lambda step: value % step == 0,
        "exclusiveMinimum": lambda limit: value > limit,
        "exclusiveMaximum": lambda limit: value < limit,
        "minItems": lambda limit: len(value) >= limit,
        "minLength": lambda limit: len(value) >= limit,
        "maxLength": lambda limit: len(value) <= limit,
        "pattern": lambda pattern: re.search(pattern, value) is not None,
        "items": lambda inner: all(fits(item, inner) for item in value),
        "required": lambda names: set(names) <= set(value),
        "additionalProperties": lambda allowed: allowed or set(value) <= set(schema["properties"]),
        "properties": lambda keys: all(fits(value[key], keys[key]) for key in keys if key in value),
    }
    rules = {
        key: rule for key, rule in schema.items() if key not in ("title", "description", "default", "$defs")
    }
    wrong_type = "type" in rules and not checks["type"](rules["type"])
    return not wrong_type and all(checks[key](rule) for key, rule in rules.items())


def test_the_json_schema_describes_every_key_and_its_default() -> None:
    described = {
        (part["title"], key): info for part in schema_parts() for key, info in part["properties"].items()
    }
    assert len(described) == sum(len(part.model_fields) for part in {Recipe, *all_parts()})
    for place, info in described.items():
        assert len(info.get("description", "")) > 5, place
        if "default" in info and "$ref" not in info:
            assert fits(info["default"], info), place


def schema_parts() -> list[dict[str, Any]]:
    return [SCHEMA, *SCHEMA["$defs"].values()]


def all_parts() -> list[type[BaseModel]]:
    return [part for _, kind in schema_keys() for part in parts(kind)]


def values_in(path: Path) -> dict[str, Any]:
    return strict_yaml.parse(path.read_text(encoding="utf-8"), str(path)).values


@pytest.mark.parametrize(("key", "text", "value"), cases(ACCEPTED))
def test_the_json_schema_accepts_what_is_accepted(tmp_path: Path, key: str, text: str, value: Any) -> None:
    path, _ = write(tmp_path, key, text)
    assert fits(values_in(path), SCHEMA)
    assert fits(load_recipe(path).model_dump(mode="json"), SCHEMA)


REFUSED_LISTS = {key: [f"[{text}]" for text in texts] for key, texts in (REFUSED_ITEMS | LATER_ITEMS).items()}
NOT_IN_JSON = {".inf", "-.inf", ".nan", "1e999", '"a\\n"'}  # JSON has no such numbers; `$` before a newline


@pytest.mark.parametrize(
    ("key", "text"),
    [*cases({key: list(texts) for key, texts in REFUSED.items()}), *cases(LATER), *cases(REFUSED_LISTS)],
)
def test_the_json_schema_refuses_what_is_refused(tmp_path: Path, key: str, text: str) -> None:
    if text not in NOT_IN_JSON:
        assert not fits(values_in(write(tmp_path, key, text)[0]), SCHEMA)


@pytest.mark.parametrize(
    "extra", [{"nam": "x"}, {"adapter": {"rnk": 3}}, {"data": {"train": {"path": "x", "p": 1}}}]
)
def test_the_json_schema_refuses_unknown_keys(extra: dict[str, Any]) -> None:
    smallest = {"version": 1, "name": "a", "data": {"train": {"path": "x"}}}
    assert fits(smallest, SCHEMA)
    assert not fits(smallest | extra, SCHEMA)


@pytest.mark.parametrize(
    ("method", "targets", "words"),
    [
        ("dora", ["adapter", "merged"], "adapter, merged: DoRA's lengths fit no other form than PEFT's own."),
        ("lora", ["mlx", "mlx"], "names a target twice: mlx, mlx."),
    ],
)
def test_exports_that_cannot_be(method: str, targets: list[str], words: str) -> None:
    checked = recipe(adapter__method=method).model_copy(update={"export": tuple(targets)})
    [(path, reason, _)] = cross_problems(checked)
    assert path == ("export",) and words in reason
