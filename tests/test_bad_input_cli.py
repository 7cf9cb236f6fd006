"""Whatever data a user may have by accident: exit code 2, and one short message that says where and what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli_surface import Answer, check_refused, command, listing, several

from qlora_phi3.data.look import MAX_ROWS

USER = {"role": "user", "content": "hi"}
GOOD = {"messages": [USER, {"role": "assistant", "content": "yo"}]}
MEGABYTE = "x" * 1_000_000
LONGEST_MESSAGE = 700


def lines(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def parquet(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


def messages(*found: Any) -> dict[str, Any]:
    return {"messages": list(found)}


def asking(content: str) -> dict[str, Any]:
    return messages({**USER, "content": content}, GOOD["messages"][1])


WHOLE = parquet({"prompt": ["a"] * 9, "completion": ["b"] * 9})
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}

FILES: dict[str, tuple[bytes, list[str]]] = {
    # file: its content, and words of the message
    "cut.parquet": (WHOLE[: len(WHOLE) // 2], ["cut.parquet: not a whole Parquet file: "]),
    "numbers.parquet": (
        parquet({"prompt": ["a"], "completion": [1]}),
        ["numbers.parquet: row 1: completion is a number, not text."],
    ),
    "lists.parquet": (parquet({"messages": [["a"]]}), ["row 1: messages[0]: is text, not an object."]),
    "types.jsonl": (
        lines(GOOD, messages(USER, {"role": "assistant", "content": 7}), GOOD),
        ["types.jsonl:2: messages[1]: content is a number, not text."],
    ),
    "types.csv": (b"prompt,completion\na,b\nc\n", ["types.csv:3: has 1 cells, the header names 2."]),
    "nul.jsonl": (lines(GOOD) + b"\n" + b"\0" * 9, ["nul.jsonl:2: has a NUL byte (character 1 of the line)"]),
    "nul.csv": (b"prompt,completion\na,b\0\n", ["nul.csv:2: has a NUL byte"]),
    "nul.json": (b"[\0]", ["nul.json:1: has a NUL byte"]),
    "nul.txt": (b"a\n\0", ["nul.txt:2: has a NUL byte"]),
    "latin.jsonl": (lines(GOOD) + b'\n{"text": "caf\xe9"}', ["latin.jsonl:2: not UTF-8 text (byte 14"]),
    "latin.txt": (b"caf\xe9", ["latin.txt:1: not UTF-8 text (byte 4 of the line)."]),
    "utf16.csv": ("prompt,completion\na,b\n".encode("utf-16"), ["utf16.csv:1: not UTF-8 text"]),
    "object.jsonl": (lines({"messages": USER}), ["object.jsonl:1: messages is not a list with messages."]),
    "nested.jsonl": (lines({"messages": [[USER]]}), ["messages[0]: is a list, not an object."]),
    "inside.jsonl": (lines({"data": GOOD}), ["has no format that is known (found keys 'data')."]),
    "deep.jsonl": (b"[" * 100_000, ["deep.jsonl:1: not valid JSON: nested too deeply."]),
    "list.jsonl": (lines([[1]]), ["list.jsonl:1: has no format that is known (found a list)."]),
    "object.json": (
        json.dumps(GOOD, indent=1).encode(),
        ["object.json: is a JSON object, not a list of rows."],
    ),
    "table.json": (
        lines({"prompt": {"0": "a"}, "completion": {"0": "b"}}),
        ["table.json: is one object, a table as pandas writes it.", 'orient="records"'],
    ),
    "packed.jsonl": (b"\x1f\x8b\x08\0\0", ["packed.jsonl: is a gzip archive", "Unpack it"]),
    "page.csv": (b"<!doctype html>\n<title>Log in</title>", ["page.csv: is a web page (HTML)"]),
    "twice.jsonl": (
        b'{"prompt": "a", "completion": "b", "prompt": "c"}',
        ["twice.jsonl:1: names the key 'prompt' twice in one object"],
    ),
    "names.jsonl": (
        lines(messages({**USER, "name": "Ada"}, GOOD["messages"][1])),
        ["names.jsonl:1: messages[0]: 'name' is not available yet.", 'Write who speaks into content ("Ada'],
    ),
    "tree.jsonl": (
        lines({"message_id": "a", "parent_id": None, "role": "prompter", "text": "hi"}),
        ["tree.jsonl:1: `message_id` and `role` would be left out", "Write a conversation as one row"],
    ),
    "summary.jsonl": (
        lines({"text": "a long text", "summary": "text", "title": "Act 1"}),
        ["summary.jsonl:1: `summary` would be left out", "rename `text` to `prompt` and `summary` to"],
    ),
    "thought.jsonl": (
        lines({"prompt": "2+2?", "reasoning": "two and two", "response": "4"}),
        ["thought.jsonl:1: `reasoning` would be left out", "put it into `response`, in front"],
    ),
    "open.json": (
        lines([GOOD])[:-1],
        ["row 1: not valid JSON after this row: the file ends inside"],
    ),
    "empty.jsonl": (lines(GOOD, messages()), ["empty.jsonl:2: messages is not a list with messages."]),
    "silent.jsonl": (
        lines(messages(USER, {"role": "assistant", "content": ""})),
        ["the assistant says nothing"],
    ),
    "roles.jsonl": (
        lines(GOOD, messages(USER, {"role": "narrator", "content": "b"})),
        ["roles.jsonl:2: messages[1]: role 'narrator' is unknown. Use one of system, user, assistant, tool."],
    ),
    "line.jsonl": (lines(json.dumps({"text": MEGABYTE})[:-2]), ["line.jsonl:1: not valid JSON: "]),
    "role.jsonl": (lines(messages({"role": MEGABYTE, "content": "a"})), ["role 'xxx", "xxx... is unknown."]),
    "key.jsonl": (lines({MEGABYTE: 1}), ["has no format that is known (found keys 'xxx", "xxx...')."]),
    "more.jsonl": (
        lines(messages({**USER, MEGABYTE: "y"})),
        ["messages[0]: 'xxx", "xxx... is not available"],
    ),
    "header.csv": (
        f"{MEGABYTE},{MEGABYTE}\na,b\n".encode(),
        ["header.csv:1: the header names 'xxx", "twice"],
    ),
    "calls.jsonl": (
        lines(messages(USER, CALL)),
        ["calls.jsonl:1: messages[1]: the model's chat template leaves out `tool_calls`."],
    ),
    "tools.jsonl": (
        lines({**GOOD, "tools": [{"name": "f"}]}),
        ["the model's chat template leaves out `tools`."],
    ),
    "pairs.jsonl": (
        lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ["pairs.jsonl:1: is a preference", "train.task: sft cannot learn from", "prompt-completion"],
    ),
    "special.txt": (b"a <|end|> b", ["special.txt: contains the special token '<|end|>'."]),
}
OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "hub data set without network": (
        ["data.train={path: org/name, split: train_sft}"],
        ["org/name[train_sft]: no such file or folder, and the hub cannot be reached: HF_HUB_OFFLINE is"],
    ),
    "held-out hub data set without network": (
        ["data.eval={path: org/name, subset: main}"],
        ["org/name/main[train]: no such file or folder, and the hub cannot be reached: "],
    ),
    "text without a last answer": (
        ["data.train.path=good.txt", "data.loss_on=last"],
        ["good.txt: data.loss_on: 'last' is for conversations", "Set data.loss_on to all."],
    ),
    "text without answers": (
        ["data.eval={path: good.txt}", "evaluate.metrics=[exact_match]"],
        ["good.txt: evaluate.metrics: exact_match and json_match compare answers", "metrics=[loss]"],
    ),
    "a share that is empty": (
        ["data.eval={fraction: 0.000001}"],
        ["data.eval.fraction: 1e-06: holds out none of the 3 rows"],
    ),
    "a weight that leaves nothing": (
        ["data.train=[{path: good.jsonl}, {path: good.txt, weight: 0.000001}]"],
        ["good.txt: weight 1e-06 takes none of its 1 rows"],
    ),
}
AT_ONCE: dict[str, tuple[list[str], list[str]]] = {
    "split of a file": (
        ["data.train.split=test"],
        ["command line: data.train.split: 'test' is for a data set on the hub; ", "Remove it"],
    ),
    "no source": (["data.train=[]"], ["command line: data.train: found [], needs at least one source."]),
    "a missing one of several": (
        ["data.train=[{path: good.jsonl}, {path: sub/gone.jsonl}]"],
        ["/sub/gone.jsonl: no such file."],
    ),
    "preferences by name": (
        ["data.train.format=preference"],
        ["data.train.format: 'preference' is not available yet.", "train.task dpo", "prompt-completion"],
    ),
    "a file of documentation": (["data.train.path=notes.md"], ["/notes.md: .md is not available yet."]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Path:
    place = tmp_path_factory.mktemp("bad")
    for name, (content, _) in FILES.items():
        (place / name).write_bytes(content)
    (place / "good.jsonl").write_bytes(
        lines(*(messages({**USER, "content": x}, GOOD["messages"][1]) for x in "abc"))
    )
    (place / "good.txt").write_text("a document")
    (place / "notes.md").write_text("# notes")
    (place / "tiny.yaml").write_text(
        f"version: 1\nname: tiny\nmodel: {{base: {checkpoints('gqa')}}}\n"
        "data:\n  train: {path: good.jsonl}\n  max_length: 128\n"
        "train: {effective_batch: 1, micro_batch: 1}\n"
    )
    return place


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, Answer]:
    """What `recipe` answers to each, from one process; nothing is left behind."""
    wanted = {name: [f"data.train.path={name}"] for name in FILES}
    wanted |= {name: overrides for name, (overrides, _) in OVERRIDES.items()}
    before = listing(place)
    found = several([["recipe", "tiny.yaml", *overrides] for overrides in wanted.values()], cwd=place)
    assert listing(place) == before
    return {name: answer for name, (answer, _) in zip(wanted, found, strict=True)}


CASES = {name: words for name, (_, words) in (FILES | OVERRIDES).items()}


@pytest.mark.parametrize("name", CASES)
def test_refused(answers: dict[str, Answer], name: str) -> None:
    done = answers[name]
    message = "\n".join(row for row in done.stderr.splitlines() if not row.startswith("looking up"))
    check_refused(Answer([], done.returncode, done.stdout, message), *CASES[name])
    assert len(message) < LONGEST_MESSAGE


NEED_TOKENS = ("calls.jsonl", "tools.jsonl", "special.txt")
"""Refused by the chat template or the tokenizer, which a dry run does not load."""


def test_a_dry_run_refuses_the_same_rows_in_the_same_words(place: Path, answers: dict[str, Answer]) -> None:
    wanted = {name: [f"data.train.path={name}"] for name in FILES if name not in NEED_TOKENS}
    wanted |= {name: overrides for name, (overrides, _) in OVERRIDES.items() if "hub" not in name}
    found = several([["recipe", "tiny.yaml", *words, "--dry-run"] for words in wanted.values()], cwd=place)
    told = {
        name: (answer.returncode, answer.stdout, answer.stderr)
        for name, (answer, _) in zip(wanted, found, strict=True)
    }
    assert told == {name: (2, "", answers[name].stderr) for name in wanted}
    assert all("torch" not in heavy for _, heavy in found)


def test_a_dry_run_says_what_it_looked_at(place: Path) -> None:
    (place / "late.jsonl").write_bytes(lines(*[GOOD] * MAX_ROWS, "broken"))
    overrides = {
        "all": ["data.eval=[{path: good.jsonl}, {path: org/name}]"],
        "a part": ["data.train.path=late.jsonl"],
        "as JSON": ["--json"],
    }
    found = several([["recipe", "tiny.yaml", *words, "--dry-run"] for words in overrides.values()], cwd=place)
    (whole, part, as_json), heavy = zip(*found, strict=True)
    assert [one.returncode for one in (whole, part, as_json)] == [0, 0, 0]
    assert "data.train: good.jsonl: all 3 rows looked at\n" in whole.stdout
    assert "data.eval: org/name: not read, it is on the hub\n" in whole.stdout
    assert "data.train: late.jsonl: only the first 20,000 rows looked at\n" in part.stdout
    [looked] = json.loads(as_json.stdout)["rows_looked_at"]
    assert looked == {"used_for": "train", "path": str(place / "good.jsonl"), "rows": 3, "all": True}
    assert not any(heavy)


def test_the_doctor_finds_the_same_unreadable_rows(place: Path) -> None:
    names = ["cut.parquet", "nul.jsonl", "roles.jsonl", "pairs.jsonl", "role.jsonl"]
    found = several([["doctor", "tiny.yaml", f"data.train.path={name}"] for name in names], cwd=place)
    for name, (answer, _) in zip(names, found, strict=True):
        assert (answer.returncode, answer.stderr) == (2, "")
        told = answer.stdout.replace("\n  -> ", " ")
        assert "error: unreadable: " in told
        assert [word for word in FILES[name][1] if word not in told] == []
        assert len(told) < 2 * LONGEST_MESSAGE


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_without_reading(place: Path, name: str) -> None:
    overrides, words = AT_ONCE[name]
    check_refused(command("recipe", "tiny.yaml", *overrides, "--dry-run", cwd=place), *words)


def test_a_line_of_a_megabyte_is_read(place: Path) -> None:
    (place / "long.jsonl").write_bytes(
        lines(messages({**USER, "content": MEGABYTE}, GOOD["messages"][1]), GOOD)
    )
    [(answer, _)] = several([["doctor", "tiny.yaml", "data.train.path=long.jsonl", "--json"]], cwd=place)
    found = json.loads(answer.stdout)
    assert (answer.returncode, found["splits"]["train"]["rows"]) == (0, 2)
    assert found["splits"]["train"]["longest_row_tokens"] > 1_000_000


def test_a_mix_with_a_share_is_examined(place: Path) -> None:
    (place / "many.jsonl").write_bytes(lines(*({"text": f"document {i}"} for i in range(40))))
    overrides = [
        "data.train=[{path: good.jsonl}, {path: many.jsonl, weight: 2}]",
        "data.eval={fraction: 0.25}",
    ]
    [(answer, _)] = several([["doctor", "tiny.yaml", *overrides, "--json"]], cwd=place)
    found = json.loads(answer.stdout)
    sizes = {name: split["rows"] for name, split in found["splits"].items()}
    assert answer.returncode == 0
    assert 40 < sizes["train"] < 83 and 0 < sizes["eval"] < 25
    assert [one["code"] for one in found["findings"]] in ([], ["short-answer"])


# Adapters to go on from


def saved_adapter(base: Path, folder: Path) -> Path:
    """A trained adapter of rank 4 on o_proj and the head, as a run saves it."""
    import torch

    from qlora_phi3 import adapters, model, weights
    from qlora_phi3.recipe import Adapter, Data, Model, Recipe, Source

    settings = Model(base=str(base), quantization="none")
    loaded = model.load(weights.locate(settings), settings, torch.device("cpu"))
    adapter = Adapter(rank=4, alpha=8, targets=("o_proj", "lm_head"))
    recipe = Recipe(version=1, name="t", adapter=adapter, data=Data(train=Source(path="unused.jsonl")))
    tuned = adapters.attach(loaded, recipe)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters.save(tuned, loaded, folder)
    return folder


WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
Spoil = Callable[[Path], None]


def tensors(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return spoil


def settings(**values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        found = json.loads((folder / SETTINGS).read_text())
        (folder / SETTINGS).write_text(json.dumps(found | values))

    return spoil


HEAD = "base_model.model.lm_head.lora_{}.weight"


def widen(found: dict[str, Any]) -> None:
    found[HEAD.format("A")] = found[HEAD.format("A")].repeat(17, 1)
    found[HEAD.format("B")] = found[HEAD.format("B")].repeat(1, 17).contiguous()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def linked(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return spoil


def of_another_base(folder: Path) -> None:
    note = json.loads((folder / "base_provenance.json").read_text())
    (folder / "base_provenance.json").write_text(json.dumps({**note, "config_sha256": "0" * 64}))


ADAPTERS: dict[str, tuple[Spoil, list[str]]] = {
    "other": (of_another_base, ["other: the adapter was trained on", "Set model.base to that one."]),
    "half": (
        tensors(lambda found: found.pop(HEAD.format("B"))),
        [f"{HEAD.format('B')}: is missing beside its other half."],
    ),
    "nan": (
        tensors(lambda found: found[HEAD.format("A")].view(-1)[-1:].fill_(float("nan"))),
        [f"{HEAD.format('A')}: holds NaN or infinity."],
    ),
    "cut": (cut, [f"cut/{WEIGHTS}: is cut short or no safetensors file: "]),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b"") and None, ["is cut short"]),
    "pickled": (pickled, ["adapter_model.bin: is a pickle, which can run code."]),
    "linked": (
        linked(WEIGHTS, f"../good/{WEIGHTS}"),
        [f"linked/{WEIGHTS}: ", "Copy the file itself into the folder (cp -L)."],
    ),
    "linked-settings": (
        linked(SETTINGS, f"../good/{SETTINGS}"),
        [f"linked-settings/{SETTINGS}: ", "Copy the file itself into the folder (cp -L)."],
    ),
    "loose": (linked(WEIGHTS, "nowhere"), [f"loose/{WEIGHTS}: "]),
    "wide": (tensors(widen), ["lm_head: rank 68 is above 64, the most that a linear of 64 to 261 can use."]),
    "vera": (settings(peft_type="VERA"), ["peft_type is 'VERA', not LORA."]),
    "dora": (settings(use_dora=True), ["the adapter uses DoRA, which is no plain LoRA."]),
    "list": (lambda folder: (folder / SETTINGS).write_text("[]") and None, ["is not a JSON object."]),
    "scaled": (settings(lora_alpha=16), ["scaled by 4; the recipe makes that 4 and 2."]),
}
"""Folder: what is wrong with its adapter, and words of the message."""

INITS: dict[str, tuple[list[str], list[str]]] = {
    "nowhere": (["adapter.init=nowhere"], ["/nowhere: "]),
    "up and out": (
        ["adapter.init=good/../.."],
        ["holds no adapter. Give the folder that adapter_config.json is in."],
    ),
    "a text": (["adapter.init=notes.md"], ["/notes.md: is no adapter. Give the folder of an adapter"]),
    "a rank above the width": (
        ["adapter.init=good", "adapter.rank=65"],
        ["adapter.rank: 65 is above 64, the smaller side of o_proj."],
    ),
    "other targets": (["adapter.init=good", "adapter.targets=[o]"], ["good: trains lm_head, o_proj, the"]),
}


@pytest.fixture(scope="module")
def inits(place: Path, checkpoints: Callable[[str], Path]) -> dict[str, Answer]:
    """What `recipe` answers to each adapter, from one process; nothing is left behind."""
    good = saved_adapter(checkpoints("gqa"), place / "good")
    for name, (spoil, _) in ADAPTERS.items():
        spoil(shutil.copytree(good, place / name))
    wanted = {name: [f"adapter.init={name}"] for name in ADAPTERS}
    wanted |= {name: overrides for name, (overrides, _) in INITS.items()}
    own = ["adapter.rank=4", "adapter.alpha=8", "adapter.targets=[o, lm_head]", "model.quantization=none"]
    before = listing(place)
    runs = [["recipe", "tiny.yaml", *own, *overrides] for overrides in wanted.values()]
    found = several(runs, cwd=place)
    assert listing(place) == before
    return {name: answer for name, (answer, _) in zip(wanted, found, strict=True)}


@pytest.mark.parametrize("name", [*ADAPTERS, *INITS])
def test_adapters_that_cannot_be_gone_on_from(inits: dict[str, Answer], name: str) -> None:
    done, words = inits[name], (ADAPTERS | INITS)[name][1]  # type: ignore[operator]
    progress = ("looking up", "keeping activations", "loading", "Loading")
    message = "\n".join(row for row in done.stderr.splitlines() if not row.startswith(progress))
    check_refused(Answer([], done.returncode, done.stdout, message), *words)
    assert len(message) < LONGEST_MESSAGE


def test_a_method_that_nobody_knows_is_refused_at_once(place: Path) -> None:
    done = command("recipe", "tiny.yaml", "adapter.method=vera", "adapter.init=good", "--dry-run", cwd=place)
    check_refused(done, "command line: adapter.method: 'vera' is not allowed", "lora, rslora, dora")
