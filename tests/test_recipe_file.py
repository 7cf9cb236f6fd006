"""From a recipe's name or path to a checked recipe: overrides, places, wording, paths, and back to YAML."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from qlora_phi3 import recipe_file
from qlora_phi3.errors import OutputError, RecipeError
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import (
    copy_recipe,
    document_keys,
    dump_recipe,
    find_recipe,
    list_recipes,
    load_recipe,
)

SMALLEST = """\
version: 1
name: phi
data:
  train:
    path: train.jsonl
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_recipe(text: str | bytes, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_recipe


def refusals(path: Path, *overrides: str) -> list[str]:
    """Messages of all problems, with the recipe's folder left out."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


# Messages

MODEL_KEYS = "base, revision, quantization, double_quant, compute_dtype, cache"
ADAPTER_KEYS = "method, rank, alpha, dropout, targets, split_fused, init"
PATH_HELP = (
    "a JSONL, JSON, CSV, Parquet or .txt file or a folder of them, relative to the recipe's folder or, "
    "on the command line, to the current one; or org/name, a data set on the hub (./org/name: a folder)"
)
TRAIN_HELP = "training rows; or a list of such sources, with weights"
SOURCE_KEYS = "path, format, split, subset, revision, limit, weight"
NEEDS_SOURCE = f"needs keys of its own. They are {SOURCE_KEYS}."
TOP_KEYS = "version, name, description, model, adapter, data, train, memory, evaluate, export, track"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {lr: 1}", "train.lr: unknown key. Here that is train.learning_rate."),
        ("adapter: {lora_r: 8}", "adapter.lora_r: unknown key. Here that is adapter.rank."),
        ("load_in_4bit: true", "load_in_4bit: unknown key. Here that is model.quantization."),
        (
            "train: {Batch-Size: 8}",
            "train.Batch-Size: unknown key. "
            "Here that is train.effective_batch (rows a step) or train.micro_batch (rows a pass).",
        ),
        (
            "train: {gradient_accumulation_steps: 8}",
            "train.gradient_accumulation_steps: unknown key. "
            "Here train.effective_batch has the rows of a whole step, in passes of train.micro_batch.",
        ),
        ("output_dir: o", "output_dir: unknown key. It is --out DIR on the command line."),
        (
            "model: {base:builtin:smollm2-135m}",
            "model.base:builtin:smollm2-135m: unknown key. "
            "Put a space after the colon: `base: builtin:smollm2-135m`.",
        ),
        (
            "model: base:a/b",
            "model: found 'base:a/b', needs keys of its own. Put a space after the colon: `base: a/b`.",
        ),
        (
            "model: microsoft/phi-4",
            "model: found 'microsoft/phi-4', needs keys of its own. Write {base: microsoft/phi-4}.",
        ),
        (
            "adapter: {rank: '16'}",
            "adapter.rank: found the text '16', needs a whole number. Remove the quotes.",
        ),
        (
            "train: {learning_rate: '2e-4', micro_batch: auto}",
            "train.learning_rate: found the text '2e-4', needs a number. Remove the quotes.",
        ),
        (
            "train: {micro_batch: '4'}",
            "train.micro_batch: found the text '4', needs `auto` or a positive whole number. "
            "Remove the quotes.",
        ),
        (
            "evaluate: {metrics: [accuracy]}",
            "evaluate.metrics[0]: 'accuracy' is not allowed. Did you mean 'exact_match'? "
            "Allowed: loss, perplexity, exact_match, json_match.",
        ),
        ("model: 3", f"model: found 3, needs keys of its own. They are {MODEL_KEYS}."),
        ("model:", f"model: found null, needs keys of its own. They are {MODEL_KEYS}."),
        ("adapter: [lora]", f"adapter: found [lora], needs keys of its own. They are {ADAPTER_KEYS}."),
        (
            "adapter: {targets: q_proj}",
            "adapter.targets: found 'q_proj', needs all-linear, or a list such as [q, v].",
        ),
        (
            "adapter: {targets: qkv_proj}",
            "adapter.targets: found 'qkv_proj', needs all-linear, or a list such as [q, v].",
        ),
        ("adapter: {rank: sixteen}", "adapter.rank: found 'sixteen', needs a whole number."),
        ("adapter: {rnk: 8}", "adapter.rnk: unknown key. Did you mean 'rank'?"),
        ("model: {double_quant: no}", "model.double_quant: found 'no', needs true or false. Write false."),
        ("model: {revision: 1234567}", "model.revision: found 1234567, needs text. Quote it."),
        ("model: {revision: 12e34}", "model.revision: found 1.2e+35, needs text. Quote it."),
        (
            "model: {quantization: int4}",
            "model.quantization: 'int4' is not allowed. Did you mean 'nf4'? Allowed: nf4, none.",
        ),
        ("export: adapter", "export: found 'adapter', needs a list. Write [adapter]."),
        ("train: {task: dpo}", "train.task: 'dpo' is not available yet. Today: 'sft'."),
        ("evaluate: {metrics: loss}", "evaluate.metrics: found 'loss', needs a list. Write [loss]."),
        (
            "memory: {budget: 8 cards}",
            "memory.budget: found '8 cards', needs `auto`, "
            "or a size such as 8GiB, 8GB, 512MiB or 8, which is GiB.",
        ),
        ("trian: {epochs: 3}", "trian: unknown key. Did you mean 'train'?"),
        ("epochs: 3", "epochs: unknown key. It belongs to train: train.epochs."),
        ("path: a.jsonl", "path: unknown key. It belongs to data.train: data.train.path."),
        (
            "model: {export: []}",
            "model.export: unknown key. It belongs to the top level.",
        ),
        (
            "model: {train: {}}",
            "model.train: unknown key. It belongs to the top level.",
        ),
        ("<<: {rank: 8}", f"<<: unknown key. Allowed: {TOP_KEYS}."),
        ("<name>: x", "<name>: unknown key. Did you mean 'name'?"),
        ("name: other", "name: the key stands twice, first in line 2. Keep one."),
        (f"description: [{'x' * 100}]", f"description: found [{'x' * 56}..., needs text."),
    ],
)
def test_a_message_says_place_found_value_and_what_is_needed(write: Any, line: str, message: str) -> None:
    assert refusals(write(f"{SMALLEST}\n{line}\n")) == [f"r.yaml:7: {message}"]


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (
            "data: {train: x.jsonl}",
            ["3: data.train: found 'x.jsonl', needs keys of its own. Write {path: x.jsonl}."],
        ),
        ("data:\n  train:", [f"4: data.train: found null, {NEEDS_SOURCE}"]),
        (
            "data: {}",
            [
                f"3: data.train: is missing: {TRAIN_HELP}. "
                "Add it, as in `data: {train: {path: chats.jsonl}}`."
            ],
        ),
        (
            "data:\n  train:\n    limit: 3",
            [f"4: data.train.path: is missing: {PATH_HELP}. Add it, as in `path: chats.jsonl`."],
        ),
        (
            "data:\n  train: {path: x}\n  eval: y.jsonl",
            ["5: data.eval: found 'y.jsonl', needs keys of its own. Write {path: y.jsonl}."],
        ),
        (
            "data:\n  train: {path: x}\n  eval:\n    fraction: 0.1\n    path: y",
            ["7: data.eval.path: unknown key. It belongs to data.train: data.train.path."],
        ),
        (
            "data:\n  train:\n    - path: x\n    - {path: y, wieght: 2}\n    - y.jsonl\n    - limit: 3",
            [
                "6: data.train[1].wieght: unknown key. Did you mean 'weight'?",
                "7: data.train[2]: found 'y.jsonl', needs keys of its own. Write {path: y.jsonl}.",
                f"8: data.train[3].path: is missing: {PATH_HELP}. Add it, as in `path: chats.jsonl`.",
            ],
        ),
        ("data:\n  train: []", ["4: data.train: found [], needs at least one source."]),
        (
            "data:\n  train: [{path: a/b}, {path: c.jsonl,\n    split: test}]",
            [
                "5: data.train[1].split: 'test' is for a data set on the hub; c.jsonl is a file or folder. "
                "Remove it, or give the data set as org/name."
            ],
        ),
    ],
)
def test_messages_about_data(write: Any, data: str, messages: list[str]) -> None:
    assert refusals(write(f"version: 1\nname: phi\n{data}\n")) == [
        f"r.yaml:{message}" for message in messages
    ]


def test_missing_keys_are_placed_at_the_file(write: Any) -> None:
    assert refusals(write("model: {}\n")) == [
        "r.yaml: version: is missing: format of this file. Add the line `version: 1`.",
        "r.yaml: name: is missing: names the run's folder. Add a line such as `name: my-run`.",
        "r.yaml: data: is missing: what it is trained on. "
        "Add a line such as `data: {train: {path: chats.jsonl}}`.",
    ]


MANY = """\
version: 2
name: phi
model:
  double_quant: yes
  bse: x
adapter:
  targets:
    - qkv_proj
    - q_prj
  rank: 8
  rank: 16
data: {train: {path: &here x}}
track: !!seq []
export: *here
train: {epochs: 0,
        packing: true}
"""


def test_all_problems_at_once_in_the_order_of_the_file(write: Any) -> None:
    found = refusals(write(MANY), "train.lr=1", "foo", "evaluate.samples=0")
    assert [message.partition(". ")[0] for message in found] == [
        "r.yaml:1: version: found 2, needs 1, the only format so far.",
        "r.yaml:4: model.double_quant: found 'yes', needs true or false",
        "r.yaml:5: model.bse: unknown key",
        "r.yaml:9: adapter.targets[1]: 'q_prj' is not a Phi-3 projection",
        "r.yaml:11: adapter.rank: the key stands twice, first in line 10",
        "r.yaml:12: data.train.path: anchors and aliases are not supported",
        "r.yaml:13: track: tags are not supported",
        "r.yaml:14: export: anchors and aliases are not supported",
        "r.yaml:15: train.epochs: found 0, must be 1 or more.",
        "r.yaml:16: train.packing: unknown key",
        "command line: 'foo' is not key=value",
        "command line: train.lr: unknown key",
        "command line: evaluate.samples: found 0, must be 1 or more.",
    ]


def test_contradictions_have_their_line(write: Any) -> None:
    text = f"{SMALLEST}train:\n  micro_batch: 5\n  warmup: 2.5\n"
    assert [message.partition(": t")[0] for message in refusals(write(text))] == ["r.yaml:7", "r.yaml:8"]


def test_an_unknown_key_is_told_even_where_its_value_is_refused(write: Any) -> None:
    assert refusals(write(f"{SMALLEST}nme: !!str x\n")) == [
        "r.yaml:6: nme: tags are not supported. Remove the part that begins with `!`.",
        "r.yaml:6: nme: unknown key. Did you mean 'name'?",
    ]


def test_a_refused_value_is_blamed_once(write: Any) -> None:
    text = f"{SMALLEST}  eval: &e {{path: e.jsonl}}\nevaluate: {{metrics: [exact_match]}}\n"
    assert refusals(write(text)) == [
        "r.yaml:6: data.eval: anchors and aliases are not supported. Write the value out."
    ]


# What is no recipe at all


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "r.yaml: holds no mapping of keys to values. Start it with `version: 1`."),
        (b"# todo\n", "r.yaml: holds no mapping of keys to values. Start it with `version: 1`."),
        (b"- version: 1\n", "r.yaml: holds no mapping of keys to values. Start it with `version: 1`."),
        (b"a: caf\xe9\n", "r.yaml: not UTF-8 text (byte 6). Save it as UTF-8."),
        (SMALLEST.encode("utf-16"), "r.yaml: not UTF-8 text (byte 0). Save it as UTF-8."),
        (b"a: \x00\n", "r.yaml:1: the character U+0000 cannot stand in YAML. Remove it."),
        (b"a: " + b"[" * 10_000, "r.yaml:1: not valid YAML: nested more than 32 deep. Mend the line."),
        (
            b"description: " + b"x" * 5_000_000,
            "r.yaml: is 5.0 MB, too much for a recipe. Data goes into a file of its own: data.train.path.",
        ),
    ],
    ids=["empty", "comments", "list", "latin-1", "utf-16", "NUL", "deep", "large"],
)
def test_no_recipe(write: Any, content: bytes, message: str) -> None:
    assert refusals(write(content)) == [message]


def test_a_folder_and_a_missing_file_cannot_be_read(tmp_path: Path) -> None:
    assert refusals(tmp_path) == [f"{tmp_path.name}: cannot be read: Is a directory. Check the path."]
    assert refusals(tmp_path / "no.yaml") == [
        "no.yaml: cannot be read: No such file or directory. Check the path."
    ]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_cannot_be_read(write: Any) -> None:
    path = write(SMALLEST)
    path.chmod(0)
    assert refusals(path) == ["r.yaml: cannot be read: Permission denied. Check the path."]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + SMALLEST.encode(),
        SMALLEST.replace("\n", "\r\n").encode(),
        SMALLEST.rstrip().encode(),
    ],
    ids=["byte order mark", "CRLF", "no last newline"],
)
def test_recipes_of_other_editors(write: Any, content: bytes) -> None:
    assert load_recipe(write(content)) == load_recipe(write(SMALLEST))


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("adapter.rank=012", 12),
        ("train.learning_rate=2e-4", 2e-4),
        ("train.learning_rate= 1e-4 ", 1e-4),
        ("model.double_quant=false", False),
        ("adapter.targets=[qkv_proj, o_proj]", ("qkv_proj", "o_proj")),
        ("adapter.targets=all-linear", "all-linear"),
        ("model.revision=", None),
        ("model.revision=null", None),
        ("model.revision='1234567'", "1234567"),
        ("name=no", "no"),
        ("description=a=b", "a=b"),
        ("description='#x: y'", "#x: y"),
        ("description=ü 😀", "ü 😀"),
        ("data.train.path=/a=b.jsonl", "/a=b.jsonl"),
        ("data.eval.path=/e.jsonl", "/e.jsonl"),
        ("evaluate.metrics=[]", ()),
        ("train.max_steps=7", 7),
    ],
)
def test_overrides(write: Any, override: str, value: Any) -> None:
    recipe = load_recipe(write(f"{SMALLEST}train: {{max_steps: 3}}\nmodel: {{revision: abc}}\n"), [override])
    key, _, _ = override.partition("=")
    assert reduce(getattr, key.split("."), recipe) == value


def test_an_override_equals_the_same_line_in_the_file(write: Any) -> None:
    written = load_recipe(write(f"{SMALLEST}adapter: {{rank: 8}}\n"))
    assert load_recipe(write(SMALLEST), ["adapter.rank=8"]) == written
    assert load_recipe(write(SMALLEST), ["adapter={rank: 8}"]) == written
    assert load_recipe(write(f"{SMALLEST}adapter: {{rank: sixteen}}\n"), ["adapter.rank=8"]) == written


def test_a_part_is_replaced_whole_and_a_key_alone(write: Any) -> None:
    path = write(f"{SMALLEST}adapter: {{rank: 8, alpha: 9}}\n")
    assert load_recipe(path, ["adapter.rank=4"]).adapter.alpha == 9
    assert (
        load_recipe(path, ["adapter={rank: 4}"]).adapter.alpha == Recipe.model_fields["adapter"].default.alpha
    )


def test_the_last_override_wins(write: Any) -> None:
    path = write(SMALLEST)
    assert load_recipe(path, ["adapter.rank=2", "adapter={alpha: 3}", "adapter.alpha=4"]).adapter.alpha == 4
    assert load_recipe(path, ["adapter.rank=x", "adapter.rank=2"]).adapter.rank == 2


@pytest.mark.parametrize("parent", ["", "data.eval", "model"])
def test_a_part_that_is_absent_or_null_is_made(write: Any, parent: str) -> None:
    text = {"": SMALLEST, "data.eval": f"{SMALLEST}  eval: null\n", "model": f"{SMALLEST}model:\n"}[parent]
    recipe = load_recipe(write(text), ["data.eval.path=/e", "data.eval.limit=3", "model.base=a/b"])
    assert recipe.model.base == "a/b"
    assert recipe.model_dump()["data"]["eval"] == {
        "path": "/e",
        "format": "auto",
        "split": "train",
        "subset": None,
        "revision": None,
        "limit": 3,
        "weight": 1.0,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=x", "adapter.rank: found 'x', needs a whole number."),
        ("adapter.rank=", "adapter.rank: found null, needs a whole number."),
        ("adapter={rank: x}", "adapter.rank: found 'x', needs a whole number."),
        ("name=", "name: found null, needs text."),
        ("name=12", "name: found 12, needs text. Quote it."),
        ("description=a: b", "description: found {a: b}, needs text."),
        ("model=", f"model: found null, needs keys of its own. They are {MODEL_KEYS}."),
        ("nam=x", "nam: unknown key. Did you mean 'name'?"),
        ("rank=8", "rank: unknown key. It belongs to adapter: adapter.rank."),
        ("adapter.rnk=8", "adapter.rnk: unknown key. Did you mean 'rank'?"),
        ("adaptr.rank=8", "adaptr: unknown key. Did you mean 'adapter'?"),
        ("x.y.z=8", f"x: unknown key. Allowed: {TOP_KEYS}."),
        ("data.train.paht=x", "data.train.paht: unknown key. Did you mean 'path'?"),
        (
            "data={}",
            f"data.train: is missing: {TRAIN_HELP}. Add it, as in `data: {{train: {{path: chats.jsonl}}}}`.",
        ),
        (
            "data.eval.limit=1",
            f"data.eval.path: is missing: {PATH_HELP}. Add it, as in `path: chats.jsonl`.",
        ),
        (
            "evaluate.metrics=[los]",
            "evaluate.metrics[0]: 'los' is not allowed. Did you mean 'loss'? "
            "Allowed: loss, perplexity, exact_match, json_match.",
        ),
        ("train.task=dpo", "train.task: 'dpo' is not available yet. Today: 'sft'."),
        (
            "train.micro_batch=3",
            "train.micro_batch: 3 does not divide train.effective_batch 16. Choose a divisor, or auto.",
        ),
        ("name.x=1", "name.x: name is 'phi' and has no keys below it."),
        ("adapter.rank.x=1", "adapter.rank.x: adapter.rank is 8 and has no keys below it."),
        (
            "adapter.rank=[",
            "adapter.rank: not valid YAML: while parsing a flow node expected the node content, "
            "but found '<stream end>'. Close the bracket.",
        ),
        (
            "adapter.rank=" + "[" * 10_000,
            "adapter.rank: not valid YAML: nested more than 32 deep. Mend the line.",
        ),
        ("adapter.rank=&x 3", "adapter.rank: anchors and aliases are not supported. Write the value out."),
        ("adapter={rank: 3, rank: 4}", "adapter.rank: the key stands twice. Keep one."),
        ("name=\udcff", "name: the character U+DCFF cannot stand in YAML. Remove it."),
    ],
)
def test_refused_overrides(write: Any, override: str, message: str) -> None:
    found = refusals(write(f"{SMALLEST}adapter: {{rank: 8}}\n"), override)
    assert found == [f"command line: {message}"]


@pytest.mark.parametrize("target", ["gguf:q4_k_m", "gguf:Q6_K", "q2_k", "gguf:iq4_xs"])
def test_kinds_that_no_run_can_make(write: Any, target: str) -> None:
    [message] = refusals(write(SMALLEST), f"export=[merged, {target}]")
    assert message.startswith(
        f"command line: export[1]: '{target}' is a kind that llama.cpp's own quantizer makes"
    )
    quantizer, allowed = message.split(" Allowed: ")
    assert (
        f"Write gguf:f16, then run `llama-quantize NAME-f16.gguf NAME.gguf {target[-4:].upper()}"[:60]
        in quantizer
    )
    assert "gguf:q8_0" in allowed and "_k" not in allowed and "iq" not in allowed


def test_a_gguf_without_its_kind(write: Any) -> None:
    assert "Did you mean 'gguf:q8_0'?" in refusals(write(SMALLEST), "export=[gguf]")[0]


def test_what_is_no_recipe_at_all_is_told_in_twenty_lines(write: Any) -> None:
    many = "".join(f"key_{i}: {'x' * 40}\n" for i in range(2000))
    found = refusals(write(SMALLEST + many), f"data.train.{'y' * 100_000}=1")
    assert len(found) == 21
    assert found[0].startswith("r.yaml:6: key_0: unknown key.")
    assert found[-1] == "and: 1981 more problems like these."
    [one] = refusals(write(SMALLEST), f"{'y' * 100_000}={'z' * 100_000}")
    assert len(one) < 2500


@pytest.mark.parametrize(
    "text",
    ["foo", "--json", "=3", "a..b=3", ".a=3", "a.=3", "a b=3", "a-b=3", "a[0]=3", "adapter.é=3", ""],
)
def test_what_is_no_override(write: Any, text: str) -> None:
    message = f"command line: '{text}' is not key=value. Write for example train.learning_rate=1e-4."
    assert refusals(write(SMALLEST), text) == [message]


@pytest.mark.parametrize(
    "texts",
    [["train.epochs", "=", "3"], ["train.epochs", "=3"], ["train.epochs = 3"], ["train.epochs", "3"]],
)
def test_spaces_in_an_override_are_told_once(write: Any, texts: list[str]) -> None:
    [message] = refusals(write(SMALLEST), *texts, "adapter.rank=8")
    assert message.endswith("is not key=value. Write train.epochs=3, without spaces.")


def test_a_space_behind_the_sign_and_a_key_without_value(write: Any) -> None:
    assert load_recipe(write(SMALLEST), ["train.epochs=", "3", "adapter.rank=8"]).train.epochs == 3
    [message] = refusals(write(SMALLEST), "train.epochs", "adapter.rank=8")
    assert message.endswith(
        "'train.epochs' is not key=value. Write train.epochs=VALUE, for example train.learning_rate=1e-4."
    )


def test_an_override_does_not_hide_a_fault_of_the_file(write: Any) -> None:
    assert refusals(write(f"{SMALLEST}model: 3\n"), "model.base=a/b") == [
        f"r.yaml:6: model: found 3, needs keys of its own. They are {MODEL_KEYS}.",
        "command line: model.base: model is 3 and has no keys below it.",
    ]
    assert refusals(write(f"{SMALLEST}adapter: {{rank: 1, rank: 2}}\n"), "adapter.rank=3") == [
        "r.yaml:6: adapter.rank: the key stands twice, first in line 6. Keep one."
    ]


# Paths


@pytest.mark.parametrize(
    ("written", "from_folder"),
    [
        ("train.jsonl", "{folder}/train.jsonl"),
        ("./sub/train.jsonl", "{folder}/sub/train.jsonl"),
        ("../train.jsonl", "{parent}/train.jsonl"),
        ("/data/train.jsonl", "/data/train.jsonl"),
        ("~/train.jsonl", "{home}/train.jsonl"),
        ("a b: #1 ü.jsonl", "{folder}/a b: #1 ü.jsonl"),
    ],
)
def test_data_paths(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str, from_folder: str
) -> None:
    """In the file they are relative to the recipe, in an override to the working folder."""
    home, working = tmp_path / "home", tmp_path / "work" / "here"
    working.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(working)
    path = write(
        f"version: 1\nname: a\ndata: {{train: {{path: '{written}'}}, eval: {{path: '{written}'}}}}\n",
        "in/r.yaml",
    )

    def expect(folder: Path) -> str:
        return from_folder.format(folder=folder, parent=folder.parent, home=home)

    recipe = load_recipe(path)
    assert recipe.data.train.path == expect(path.parent)
    assert recipe.model_dump()["data"]["eval"]["path"] == expect(path.parent)
    for override in (f"data.train.path='{written}'", f"data.train={{path: '{written}'}}"):
        recipe = load_recipe(path, [override])
        assert recipe.data.train.path == expect(working)
        assert recipe.model_dump()["data"]["eval"]["path"] == expect(path.parent)
    assert load_recipe(path, [f"data={{train: {{path: '{written}'}}}}"]).data.train.path == expect(working)


def test_paths_in_a_list(write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    working = tmp_path / "work"
    working.mkdir()
    monkeypatch.chdir(working)
    path = write(
        SMALLEST.replace("path: train.jsonl", "- path: a.jsonl\n    - path: ../b.jsonl"), "in/r.yaml"
    )
    sources = load_recipe(path).data.train_sources
    assert [source.path for source in sources] == [str(path.parent / "a.jsonl"), str(tmp_path / "b.jsonl")]
    sources = load_recipe(path, ["data.train=[{path: a.jsonl, weight: 2}]"]).data.train_sources
    assert [(source.path, source.weight) for source in sources] == [(str(working / "a.jsonl"), 2)]
    [message] = refusals(path, "data.train.path=x")
    assert message.startswith("command line: data.train.path: data.train is [")
    assert message.endswith(" and has no keys below it.")


@pytest.mark.parametrize("made", ["file", "folder", None])
def test_org_name_is_a_hub_id_unless_it_is_there(write: Any, made: str | None) -> None:
    path = write(SMALLEST.replace("train.jsonl", "org/name"), "in/r.yaml")
    local = path.parent / "org" / "name"
    if made == "file":
        write("", "in/org/name")
    elif made == "folder":
        local.mkdir(parents=True)
    source = load_recipe(path).data.train_sources[0]
    assert (source.path, source.is_hub) == (("org/name", True) if made is None else (str(local), False))
    source = load_recipe(path, ["data.train.path=./org/name"]).data.train_sources[0]
    assert not source.is_hub and source.path.endswith("/org/name")


def test_a_hub_data_set_survives_being_written_and_read(write: Any, tmp_path: Path) -> None:
    text = (
        "version: 1\nname: a\ndata: {train: {path: org/name, split: train_sft, subset: main, revision: v1}}\n"
    )
    recipe = load_recipe(write(text))
    assert load_recipe(write(dump_recipe(recipe), "copy/r.yaml")) == recipe
    copy_recipe(write(text), None, tmp_path / "plain.yaml")
    assert (tmp_path / "plain.yaml").read_text() == text


def test_a_recipe_named_relative_to_the_working_folder(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(SMALLEST, "in/r.yaml")
    monkeypatch.chdir(path.parent.parent)
    assert load_recipe(Path("in/r.yaml")) == load_recipe(path)


@pytest.mark.parametrize(
    ("base", "anchored"),
    [
        ("microsoft/Phi-3-mini-4k-instruct", None),
        ("builtin:smollm2-135m", None),
        ("me/my-phi3", None),
        ("./phi", "{folder}/phi"),
        ("../phi", "{parent}/phi"),
        (".", "{folder}"),
        ("..", "{parent}"),
        ("/models/phi", "/models/phi"),
        ("~/phi", "{home}/phi"),
    ],
)
def test_model_base(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: str, anchored: str | None
) -> None:
    home, working = tmp_path / "home", tmp_path / "work" / "here"
    working.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(working)

    def expect(folder: Path) -> str:
        return (anchored or base).format(folder=folder, parent=folder.parent, home=home)

    path = write(f"{SMALLEST}model: {{base: {base}}}\n", "in/r.yaml")
    assert load_recipe(path).model.base == expect(path.parent)
    assert load_recipe(path, [f"model.base={base}"]).model.base == expect(working)
    assert load_recipe(path, [f"model={{base: {base}}}"]).model.base == expect(working)


def test_a_path_that_cannot_be_followed(write: Any) -> None:
    [message] = refusals(write(SMALLEST.replace("train.jsonl", "~no_such_user/x.jsonl")), "name=other")
    assert message.startswith("r.yaml:5: data.train.path: '~no_such_user/x.jsonl' leads nowhere: ")
    [message] = refusals(write(SMALLEST), "model.base=~no_such_user/x")
    assert message.startswith("command line: model.base: '~no_such_user/x' leads nowhere: ")


# Where recipes are found


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes in place of the toolkit's own, and an empty working folder."""
    folder = tmp_path / "recipes"
    for name in ("quickstart", "phi3-mini-chat-8gb"):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(SMALLEST)
    (folder / "README.md").touch()
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setattr(recipe_file, "recipes_folder", lambda: folder)
    return folder


def test_recipes_are_listed_and_found_by_name(shelf: Path) -> None:
    assert [path.stem for path in list_recipes()] == ["phi3-mini-chat-8gb", "quickstart"]
    assert find_recipe("quickstart") == shelf / "quickstart.yaml"


def test_recipes_are_found_by_path(shelf: Path) -> None:
    Path("mine.yaml").write_text(SMALLEST)
    Path("mine").write_text(SMALLEST)
    for text in ("mine.yaml", "mine", "./mine.yaml", str(shelf / "quickstart.yaml")):
        assert find_recipe(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "quikstart",
            "quikstart: no recipe of this name. Did you mean 'quickstart'? "
            "Known: phi3-mini-chat-8gb, quickstart; or give the path of a YAML file.",
        ),
        (
            "zzz",
            "zzz: no recipe of this name. "
            "Known: phi3-mini-chat-8gb, quickstart; or give the path of a YAML file.",
        ),
        (
            "quickstart.yaml",
            "quickstart.yaml: no such file. Did you mean 'quickstart'? "
            "List the recipes with `python -m qlora_phi3 recipe`.",
        ),
        (
            "no/such.yml",
            "no/such.yml: no such file. List the recipes with `python -m qlora_phi3 recipe`.",
        ),
        ("../working", "../working: is a folder. List the recipes with `python -m qlora_phi3 recipe`."),
    ],
)
def test_recipes_that_are_not_found(shelf: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe(text)
    assert str(caught.value) == message


def test_the_toolkit_has_a_folder_of_recipes() -> None:
    assert recipe_file.recipes_folder().name == "recipes"


# Back to YAML


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.revision='012'", "model.quantization=none", "model.base=m/m"],
        ["adapter.targets=[o, gate_up_proj]", "adapter.dropout=1e-7"],
        [
            "data.eval={path: e.jsonl, format: messages, limit: 3}",
            "evaluate.metrics=[perplexity, json_match]",
        ],
        ["train.micro_batch=4", "train.warmup=100", "train.max_steps=5", "train.learning_rate=1e-30"],
        ["export=[]", "memory.on_oom=fail"],
    ],
)
def test_a_dumped_recipe_reads_back_equal(write: Any, overrides: list[str]) -> None:
    recipe = load_recipe(write(SMALLEST), overrides)
    text = dump_recipe(recipe)
    assert load_recipe(write(text, "elsewhere/recipe.yaml")) == recipe
    assert dump_recipe(load_recipe(write(text, "elsewhere/recipe.yaml"))) == text


LOOKS_LIKE_ANOTHER = ["no", "null", "~x", "2e-4", "012", "1_000", "true", "2026-01-01"]
PUNCTUATION = ["a: b", "#x", "a #b", "- a", "[a", "&a", "*", "!", "%", "'", '"']
SPACES_AND_UNICODE = ["ü 😀", " a ", "a\nb", "\u2028", "\x85", "\x1b", "x " * 100]


@pytest.mark.parametrize("text", [*LOOKS_LIKE_ANOTHER, *PUNCTUATION, *SPACES_AND_UNICODE])
def test_awkward_text_survives(write: Any, tmp_path: Path, text: str) -> None:
    small = load_recipe(write(SMALLEST))
    source = small.data.train.model_copy(update={"path": f"{tmp_path}/{text}"})
    changes = {"description": text, "data": small.data.model_copy(update={"train": source})}
    if re.fullmatch(r"\w[\w-]*", text, re.ASCII):
        changes["name"] = text
    recipe = small.model_copy(update=changes)
    assert load_recipe(write(dump_recipe(recipe), "elsewhere/recipe.yaml")) == recipe


def test_a_dumped_recipe_has_every_key(write: Any) -> None:
    recipe = load_recipe(write(SMALLEST), ["data.eval.path=e.jsonl"])
    for line in document_keys().splitlines()[2:]:
        key = line.split("`")[1]
        assert f"{key.rpartition('.')[2]}:" in dump_recipe(recipe)


# Copies to edit


@pytest.mark.parametrize(
    ("line", "copied"),
    [
        ("path: train.jsonl", 'path: "{folder}/train.jsonl"'),
        ("path: train.jsonl # mine", 'path: "{folder}/train.jsonl" # mine'),
        ("path: 'my train.jsonl'", 'path: "{folder}/my train.jsonl"'),
        ('path: "a\\tb"', 'path: "{folder}/a\\tb"'),
        ("path:\n      train.jsonl", 'path:\n      "{folder}/train.jsonl"'),
        ("path: a, b\n      c", 'path: "{folder}/a, b c"'),
        ("path: >-\n      a\n      b\n    limit: 3", 'path: "{folder}/a b"\n    limit: 3'),
        ("path: ../train.jsonl", 'path: "{parent}/train.jsonl"'),
        ("path: ~/train.jsonl", 'path: "{home}/train.jsonl"'),
        ("path: /data/train.jsonl", "path: /data/train.jsonl"),
        (
            "path: a # path: a\n  eval: {path: a.jsonl}",
            'path: "{folder}/a" # path: a\n  eval: {path: "{folder}/a.jsonl"}',
        ),
        (
            "- path: a # first\n    - {weight: 2, path: ../b}\n    - path: org/name",
            '- path: "{folder}/a" # first\n    - {weight: 2, path: "{parent}/b"}\n    - path: org/name',
        ),
        ("path: /a\nmodel: {base: ./m}", 'path: /a\nmodel: {base: "{folder}/m"}'),
        ("path: /a\nmodel: {base: m/n}", "path: /a\nmodel: {base: m/n}"),
    ],
)
def test_a_copy_keeps_everything_but_relative_paths(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, copied: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = f"# ü 😀\nversion: 1\nname: phi\ndata:\n  train:\n    {line}\n# end\n"
    path = write(text, "in: #1, {a}/r.yaml")
    copy_recipe(path, None, tmp_path / "copy.yaml")
    names = {"{folder}": path.parent, "{parent}": tmp_path, "{home}": tmp_path / "home"}
    for name, folder in names.items():
        copied = copied.replace(name, str(folder))
    assert (tmp_path / "copy.yaml").read_text(encoding="utf-8") == text.replace(line, copied)
    assert load_recipe(tmp_path / "copy.yaml") == load_recipe(path)


def test_a_copy_with_overrides_has_every_key(write: Any, tmp_path: Path) -> None:
    changed = load_recipe(write(SMALLEST), ["adapter.rank=4"])
    copy_recipe(write(SMALLEST), changed, tmp_path / "copy.yaml")
    assert (tmp_path / "copy.yaml").read_text(encoding="utf-8") == dump_recipe(changed)


def test_a_copy_of_a_file_with_byte_order_mark_and_crlf(write: Any, tmp_path: Path) -> None:
    path = write(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode(), "in/r.yaml")
    copy_recipe(path, None, tmp_path / "copy.yaml")
    assert load_recipe(tmp_path / "copy.yaml") == load_recipe(path)


def test_a_copy_overwrites_nothing(write: Any, tmp_path: Path) -> None:
    path, there = write(SMALLEST), write("mine", "there.yaml")
    with pytest.raises(OutputError, match=r"there\.yaml: exists already"):
        copy_recipe(path, None, there)
    assert there.read_text() == "mine"
    with pytest.raises(OutputError, match=r"cannot be written: No such file or directory"):
        copy_recipe(path, None, tmp_path / "no" / "copy.yaml")


def test_a_broken_recipe_is_not_copied(write: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        copy_recipe(write("version: 2"), None, tmp_path / "copy.yaml")
    assert not (tmp_path / "copy.yaml").exists()


# The table of keys


def leaves(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}.{key}".strip("."))}


def test_the_table_has_every_key_with_its_default_and_help(write: Any) -> None:
    recipe = load_recipe(write(SMALLEST))
    header, rule, *rows = document_keys().splitlines()
    table = {}
    for row in rows:
        left, key, default, text, right = row.split("|")
        assert (left, right) == ("", "")
        assert len(text.strip()) > 5
        table[key.strip(" `")] = default.strip()
    assert (header, rule) == ("| key | default | what it does |", "|---|---|---|")
    assert set(table) == leaves(recipe.model_dump())
    assert {key for key, default in table.items() if default == "*required*"} == {
        "version",
        "name",
        "data.train.path",
    }
    assert table["train.learning_rate"] == "`0.0002`"
    assert table["model.revision"] == "`null`"
    assert table["adapter.split_fused"] == "`true`"
    assert table["adapter.targets"] == "`'all-linear'`"
    assert table["export"] == "`[adapter]`"


def test_reading_a_recipe_imports_nothing_heavy(write: Any) -> None:
    program = (
        "import sys; from pathlib import Path; from qlora_phi3.recipe_file import load_recipe; "
        f"load_recipe(Path({str(write(SMALLEST))!r})); "
        "print({'torch', 'transformers', 'numpy', 'peft', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
