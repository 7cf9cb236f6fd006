"""The plan command through the real command line: its table, its answer for a card, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli_surface import ENVIRONMENT, check_refused, command, output, several

RECIPE = "phi3-mini-chat-8gb"


def test_every_card_has_a_row() -> None:
    text = output("plan", RECIPE)
    rows = {line.split()[0]: line for line in text.splitlines() if line.lstrip()[:2].strip().isdigit()}
    assert list(rows) == ["4", "6", "8", "10", "12", "16", "24"]
    assert "recompute, last 15 of 32" in rows["8"] and "1 row    7.83 GiB" in rows["8"]
    assert "all activations kept" in rows["24"] and "2 rows" in rows["24"]
    other = output("plan", RECIPE, "model.base=microsoft/phi-4", "memory.budget=8GiB")
    assert "does not fit" in other and "memory.budget 8GiB is less: " in other
    assert "the least it can do with: 3.33 GiB: offload, embedding on the host, 1 row a pass" in text
    assert "time on a card: not measured" in text and "model.compute_dtype=float16" in text
    assert "allocator slack" not in text  # what it is made of is for who asks


def test_the_parts_where_they_are_asked_for() -> None:
    text = output("plan", RECIPE, "--parts", "--vram", "8GB")
    assert [word for word in ("linears", "adapters", "gradients", "peak", "CUDA") if word not in text] == []
    assert "the device needs 3.33 GiB" in text and "…" not in text


def test_the_card_that_is_here_has_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as nvidia-ml-py would tell of one
    (tmp_path / "pynvml.py").write_text(
        "from types import SimpleNamespace\nNVMLError = OSError\nnvmlInit = lambda: None\n"
        "nvmlDeviceGetHandleByIndex = int\n"
        "nvmlDeviceGetMemoryInfo = lambda card: SimpleNamespace(total=23 * 2**29)\n"
    )
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    text = output("plan", RECIPE)
    assert "here: this computer's card, 11.5 GiB in all" in text
    [row] = [line for line in text.splitlines() if line.split()[:1] == ["here"] and "4096" in line]
    assert "recompute, last" in row and "11.5" not in row


def test_it_fits() -> None:
    done = command("plan", RECIPE, "--vram", "8GiB")
    assert done.returncode == 0
    assert done.stdout.splitlines()[:3] == [
        "8GiB fits: yes (predicted)",
        "on 8GiB: recompute, last 15 of 32 layers kept, 1 row a pass, needs 7.83 GiB of 8.00 GiB",
        "the least it can do with: 3.33 GiB: offload, embedding on the host, 1 row a pass, 2048 tokens a row",
    ]
    found = json.loads(output("plan", RECIPE, "--vram", "8GiB", "--json"))
    assert found["vram"]["chosen"]["kept_layers"] == 15
    assert (
        found["vram"]["least_bytes"] == found["plan"]["needed_bytes"] < found["vram"]["needed_bytes"] < 2**33
    )
    assert found["vram"]["needed_bytes"] == found["cards"][2]["needed_bytes"]


def test_answers_that_take_more_than_training_are_told() -> None:
    keys = ["data.max_length=4096", "evaluate.metrics=[exact_match]"]
    text = output("plan", RECIPE, "--vram", "5.3GB", *keys)
    assert "needs 5.41 GiB of 5.30 GiB\nwhich is more: set train.activations and memory.host" in text


def test_it_does_not_fit_and_what_to_change_does(tmp_path: Path) -> None:
    done = command("plan", RECIPE, "--vram", "4GiB", "train.micro_batch=4", "--json")
    assert done.returncode == 4
    found = json.loads(done.stdout)["vram"]
    assert not found["fits"] and found["headroom_bytes"] < 0
    changes = [change["override"] for change in found["changes"]]
    assert changes[0] == "train.micro_batch=1"
    again = command("plan", RECIPE, "--vram", "4GiB", "train.micro_batch=4", *changes)
    assert again.returncode == 0, again.stdout
    said = command("plan", RECIPE, "--vram", "4GiB", "train.micro_batch=4").stdout
    assert "4GiB fits: no" in said and "change these keys:\n  train.micro_batch=1  -> needs" in said


def test_nothing_helps() -> None:
    done = command("plan", RECIPE, "--vram", "2GiB")
    assert done.returncode == 4
    assert "no change of the recipe's keys makes it fit" in done.stdout


def test_the_document_has_plan_and_cards() -> None:
    found = json.loads(output("plan", RECIPE, "--json"))
    assert found["vram"] is None
    assert [card["gib"] for card in found["cards"]] == [4, 6, 8, 10, 12, 16, 24]
    parts = [part for phase in found["plan"]["phases"] for part in phase["parts"]]
    assert {part["kind"] for part in parts} == {"exact", "replayed"}
    dry = json.loads(output("recipe", RECIPE, "--dry-run", "--json"))
    assert dry["plan"] == found["plan"]
    assert dry["smallest_card_gib"] == next(card["gib"] for card in found["cards"] if card["fits"])


def test_what_is_no_card_is_refused(tmp_path: Path) -> None:
    size = "needs a size such as 8GiB, 8GB, 512MiB or 8, which is GiB"
    said = dict.fromkeys(("8 cards", "0", "-8GiB", "\u0668GiB", "9" * 400), size)
    said |= {"2x24GB": "a run takes one GPU only. Write 24GB.", "2 × 8GiB": "one GPU only. Write 8GiB."}
    said |= {"3060": "is 3060.00 GiB, more than any card has.", "9" * 15: "more than any card has"}
    answers = several([["plan", RECIPE, f"--vram={vram}"] for vram in said], tmp_path)
    for (answer, _), words in zip(answers, said.values(), strict=True):
        check_refused(answer, "--vram: ", words)
        assert len(answer.stderr) < 300


def test_an_unknown_base_has_no_plan() -> None:
    check_refused(
        command("plan", RECIPE, "model.base=someone/phi3"),
        "someone/phi3",
        "once its config.json is downloaded",
    )
