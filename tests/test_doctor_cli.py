"""`doctor` as a user meets it: what is printed where, exit codes, the JSON document, samples."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_chats
from test_cli_surface import COMMAND, ENVIRONMENT, Answer, check_refused, command, listing, several

SECRET = "hf_ThisIsNobodysToken0123456789abcd"


def line(*messages: str) -> str:
    parts = (message.split(": ", 1) for message in messages)
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in parts]})


BAD = {
    "special.jsonl": [line("user: say <|end|>", "assistant: no no"), line("user: b", "assistant: bb")],
    "odd.jsonl": [line("user: say 2  xX", "assistant: cafÃ©"), line("user: a", "user: b", "assistant: 1")],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Path:
    """A folder with a recipe and data of several kinds."""
    place = tmp_path_factory.mktemp("doctor")
    write_chats(place / "chats.jsonl")
    (place / "heldout.jsonl").write_text(line("user: what [b] is it", "assistant: it is é") + "\n")
    (place / "tiny.yaml").write_text(
        f"version: 1\nname: tiny\nmodel: {{base: {checkpoints('gqa')}}}\n"
        "data:\n  train: {path: chats.jsonl}\n  eval: {path: heldout.jsonl}\n  max_length: 128\n"
        "train: {effective_batch: 2, micro_batch: 2}\n"
    )
    for name, lines in BAD.items():
        (place / name).write_text("\n".join(lines))
    (place / "broken.jsonl").write_text("{\n" + line("user: a", "assistant: b"))
    (place / "nothing.jsonl").write_text("{\n")
    (place / "labels.csv").write_text("text,label,id\ngood film,1,7\nbad film,0,8\n")
    (place / "escapes.jsonl").write_text(line("user: a \x1b[2J b", "assistant: \u202eabc") + "\n")
    (place / "splits").mkdir()
    for name in ("train", "valid", "test"):
        write_chats(place / "splits" / f"{name}.jsonl", 2)
    return place


COMMANDS = {
    "clean": ["tiny.yaml"],
    "clean as JSON": ["tiny.yaml", "--json"],
    "samples": ["tiny.yaml", "data.train.path=heldout.jsonl", "data.eval=", "--samples", "2"],
    "samples as JSON": ["tiny.yaml", "--samples", "1", "--json"],
    "errors": ["tiny.yaml", "data.train.path=special.jsonl"],
    "errors as JSON": ["tiny.yaml", "data.train.path=special.jsonl", "--json"],
    "warnings": [
        "tiny.yaml",
        "data.train.path=odd.jsonl",
        "data.eval.path=chats.jsonl",
        "train.effective_batch=4",
        "evaluate.metrics=[exact_match]",
        "evaluate.max_new_tokens=1",
    ],
    "auto": ["tiny.yaml", "train.micro_batch=auto", "train.effective_batch=4", "--json"],
    "unreadable": ["tiny.yaml", "data.train.path=broken.jsonl"],
    "nothing read": ["tiny.yaml", "data.train.path=nothing.jsonl", "data.eval="],
    "labels": ["tiny.yaml", "data.train.path=labels.csv"],
    "labels left out": ["tiny.yaml", "data.train.path=labels.csv", "data.train.format=text", "data.eval="],
    "escapes": ["tiny.yaml", "data.train.path=escapes.jsonl", "--samples", "1"],
    "escapes as JSON": ["tiny.yaml", "data.train.path=escapes.jsonl", "--samples", "1", "--json"],
    "splits": ["tiny.yaml", "data.train.path=splits"],
    "missing": ["tiny.yaml", "data.train.path=none.jsonl"],
    "no name": ["--samples", "2"],
    "unknown recipe": ["quikstart"],
}


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, Answer]:
    before = listing(place)
    found = several([["doctor", *arguments] for arguments in COMMANDS.values()], cwd=place)
    assert listing(place) == before
    return {name: answer for name, (answer, _) in zip(COMMANDS, found, strict=True)}


def document(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def codes(answer: Answer) -> list[tuple[str, str, int]]:
    return [(one["grade"], one["code"], one["num_places"]) for one in document(answer)["findings"]]


def test_clean_data(answers: dict[str, Answer]) -> None:
    done = answers["clean"]
    assert (done.returncode, done.stderr) == (0, "")
    assert [
        word for word in ("longest row", "padding at micro batch 2", "#") if word not in done.stdout
    ] == []
    assert "  4 more" not in done.stdout
    assert done.stdout.endswith("tiny: 0 errors, 0 warnings, 1 note\n")  # answers of one digit are short


def test_clean_data_as_json(answers: dict[str, Answer]) -> None:
    done = answers["clean as JSON"]
    found = document(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(found) == {"name", "machine", "splits", "findings", "samples"}
    assert found["splits"]["eval"]["rows"] == 1 and found["splits"]["train"]["rows"] == 12
    # 14 + 7 characters, one of them of two bytes, 2 x 2 tokens of roles and ends, eos
    assert (found["splits"]["eval"]["tokens"], found["splits"]["eval"]["supervised_tokens"]) == (27, 9)
    assert codes(done) == [("note", "short-answer", 3)]


def test_samples_have_brackets_where_no_terminal_is(answers: dict[str, Answer]) -> None:
    done = answers["samples"]
    assert done.returncode == 0
    text = "<|user|>what [b] is it<|end|><|assistant|>[it is é<|end|>]<|endoftext|>"
    assert f"heldout.jsonl:1: 27 tokens, 9 trained on\n{text}\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_samples_as_json_have_every_token(answers: dict[str, Answer]) -> None:
    (sample,) = document(answers["samples as JSON"])["samples"]
    assert sample["place"].endswith("chats.jsonl:1")
    texts = [
        "<|system|>",
        *"Count.",
        "<|end|>",
        "<|user|>",
        *"say 0 ",
        "<|end|>",
        "<|assistant|>",
        "0",
        "<|end|>",
    ]
    assert [piece["text"] for piece in sample["pieces"]] == [*texts, "<|endoftext|>"]
    assert [piece["text"] for piece in sample["pieces"] if piece["trained"]] == ["0", "<|end|>"]


def test_errors_are_all_printed_and_exit_with_2(answers: dict[str, Answer]) -> None:
    done = answers["errors"]
    assert (done.returncode, done.stderr) == (2, "")
    assert "error: special-token: " in done.stdout
    assert (
        "\n  special.jsonl:1: messages[0]: <|end|>\n  -> Text that a chat template has rendered"
        in done.stdout
    )
    assert done.stdout.endswith("tiny: 1 error, 1 warning, 0 notes\n")
    as_json = answers["errors as JSON"]
    assert (as_json.returncode, as_json.stderr) == (2, "")
    assert codes(as_json) == [("error", "special-token", 1), ("warning", "large-batch", 1)]
    assert document(as_json)["splits"]["train"]["rows"] == 1


def test_rows_that_cannot_be_read_are_findings_with_their_lines(answers: dict[str, Answer]) -> None:
    done = answers["unreadable"]
    assert (done.returncode, done.stderr) == (2, "")
    assert "error: unreadable: The row cannot be read, or the run has no use for it.\n" in done.stdout
    assert "\n  broken.jsonl:1: not valid JSON" in done.stdout


def test_errors_come_first_and_figures_only_of_what_was_read(answers: dict[str, Answer]) -> None:
    assert answers["unreadable"].stdout.startswith("error: unreadable: ")
    done = answers["nothing read"]
    assert done.returncode == 2
    assert "longest row" not in done.stdout and "rows by length" not in done.stdout


def test_a_label_that_nobody_trains_on_is_refused_unless_the_format_is_named(
    answers: dict[str, Answer],
) -> None:
    done = answers["labels"]
    assert (done.returncode, done.stderr) == (2, "")
    assert "labels.csv:2: `label` would be left out ('1'): that looks like a label." in done.stdout
    assert "rename `text` to `prompt` and `label` to `completion`" in done.stdout
    done = answers["labels left out"]
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning: unused-columns: " in done.stdout and "`label`, `id`." in done.stdout
    assert "  labels.csv:2: `label`: '1', in 2 rows\n" in done.stdout


def test_text_of_a_row_does_not_drive_the_terminal(answers: dict[str, Answer]) -> None:
    done = answers["escapes"]
    assert done.returncode == 0
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert "<|user|>a \\x1b[2J b<|end|>" in done.stdout and "[\\u202eabc<|end|>]" in done.stdout
    as_json = answers["escapes as JSON"]
    assert as_json.stdout.isascii()
    (sample,) = document(as_json)["samples"]
    assert "\u202eabc" in "".join(piece["text"] for piece in sample["pieces"])


def test_warnings_do_not_fail(answers: dict[str, Answer]) -> None:
    done = answers["warnings"]
    assert (done.returncode, done.stderr) == (0, "")
    found = [row.split(":")[1].strip() for row in done.stdout.splitlines() if row.startswith("warning: ")]
    assert found == ["turn-order", "garbled", "large-batch", "answers-cut", "overlap"]
    assert "chats.jsonl:3 (as " in done.stdout and "'Ã©'" in done.stdout


def test_an_automatic_micro_batch_is_settled_as_a_run_would(answers: dict[str, Answer]) -> None:
    found = document(answers["auto"])["splits"]
    assert {split["micro_batch"] for split in found.values()} <= {1, 2, 4}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ["data.train.path: ", "/none.jsonl: no such file. ", "In its folder: broken.jsonl, "]),
        (
            "splits",
            ["/splits: holds files of several splits: test.jsonl, train.jsonl, valid.jsonl.", "Name the"],
        ),
        ("no name", ["--samples: is for one recipe, and none was named. Write `doctor NAME` before it."]),
        ("unknown recipe", ["quikstart: no recipe of this name. Did you mean 'quickstart'?"]),
    ],
)
def test_what_cannot_be_read_is_refused(answers: dict[str, Answer], name: str, words: list[str]) -> None:
    check_refused(answers[name], *words)


@pytest.mark.parametrize(
    ("more", "coloured"), [({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)]
)
def test_a_terminal_gets_colours_unless_told_not_to(
    place: Path, more: dict[str, str], coloured: bool
) -> None:
    done = doctor("tiny.yaml", "--samples", "1", cwd=place, **more)
    assert done.returncode == 0, done.stderr
    assert ("[0<|end|>]" in done.stdout) is not coloured
    assert ("\x1b[30;42m" in done.stdout) is coloured  # black on green


# The machine


def doctor(*arguments: str, cwd: Path, **more: str) -> Answer:
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in ("HF_TOKEN", "NO_COLOR")}
    line = (*COMMAND, "doctor", *arguments)
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment | more, timeout=120)


def test_the_machine_as_json(tmp_path: Path) -> None:
    done = doctor("--json", cwd=tmp_path, HF_TOKEN=SECRET)
    assert done.stderr == ""
    found = document(done)
    assert done.returncode == (2 if any(one["grade"] == "error" for one in found["findings"]) else 0)
    assert found["machine"]["hub_token"] is True
    assert SECRET not in done.stdout
    assert found["machine"]["versions"]["torch"] and found["machine"]["memory_free_bytes"] > 0
    assert set(found["machine"]["disk_free_bytes"]) == {"our cache", "working folder", "hub cache"}
    assert found["machine"]["bitsandbytes_errors"]["matmul"] <= 0.02
    assert found["splits"] == {} and found["samples"] == []


def test_the_machine_without_a_token(tmp_path: Path) -> None:
    done = doctor(cwd=tmp_path, HF_HOME=str(tmp_path))
    assert done.returncode in (0, 2) and done.stderr == ""
    rows = [" ".join(row.split()) for row in done.stdout.splitlines()]
    assert "hub token no" in rows and any(row.startswith("device ") for row in rows)
    assert rows[-1].startswith("this machine: ")


def test_a_broken_library_is_said_and_not_thrown(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.99: no such file')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = doctor(cwd=tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stderr) == (2, "")
    assert "error: bitsandbytes-broken: " in done.stdout and "libcudart.so.99: no such file" in done.stdout


def test_the_help_needs_no_torch(tmp_path: Path) -> None:
    (answer, heavy), *_ = several([["doctor", "--help"]], cwd=tmp_path)
    assert (answer.returncode, heavy) == (0, [])
    assert "--samples" in answer.stdout


def test_an_unknown_option_is_refused() -> None:
    check_refused(command("doctor", "--sample", "2"), "No such option: --sample", "--help", lines=4)
