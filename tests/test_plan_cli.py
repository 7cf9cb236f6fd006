"""The plan command through the real command line: its table, its answer for a card, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli_surface import ENVIRONMENT, check_refused, command, output

RECIPE = "phi3-mini-chat-8gb"


def test_every_card_has_a_row() -> None:
    text = output("plan", RECIPE)
    rows = [line.split() for line in text.splitlines() if " GB " in f"{line} "]
    assert [(row[0], row[2]) for row in rows][-1] == ("24", "yes")
    assert [row[0] for row in rows] == ["4", "6", "8", "10", "12", "16", "24"]
    assert "CUDA" in text and "the device needs" in text


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
    assert next(line.split() for line in text.splitlines() if line.split()[:1] == ["here"])[1] == "yes"


def test_it_fits() -> None:
    done = command("plan", RECIPE, "--vram", "8GiB")
    assert done.returncode == 0
    assert "8GiB fits: yes" in done.stdout


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


@pytest.mark.parametrize("vram", ["8 cards", "0", "-8GiB"])
def test_what_is_no_size_is_refused(vram: str) -> None:
    check_refused(command("plan", RECIPE, f"--vram={vram}"), "--vram", "8GiB, 8GB, 512MiB or 8, which is GiB")


def test_an_unknown_base_has_no_plan() -> None:
    check_refused(
        command("plan", RECIPE, "model.base=someone/phi3"),
        "someone/phi3",
        "once its config.json is downloaded",
    )
