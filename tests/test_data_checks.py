"""A run makes the doctor's checks before it loads weights: errors end it, the rest stands in its report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_weights import COMMIT, HUB_ID, FakeHub

from qlora_phi3 import checkup, model, pipeline, weights
from qlora_phi3.errors import DataError, ModelError
from qlora_phi3.recipe import Model, Recipe
from qlora_phi3.recipe_file import load_recipe


def line(*messages: str) -> str:
    parts = (message.split(": ", 1) for message in messages)
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in parts]}) + "\n"


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Recipe:
    return load_recipe(write_recipe())


def forbid(*arguments: Any, **settings: Any) -> Any:
    raise AssertionError("the weights were loaded")


REFUSED = {
    "unreadable": ("{", "not valid JSON"),
    "special token": (line("user: <|end|>", "assistant: b"), r"contains the special token '<\|end\|>'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_errors_leave_nothing_behind(
    recipe: Recipe, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bad, reason = REFUSED[kind]
    with chats.open("a") as file:
        file.write(bad)
    monkeypatch.setattr(model, "load", forbid)
    monkeypatch.setattr(weights, "locate", forbid)
    with pytest.raises(DataError, match=reason) as caught:
        pipeline.run(recipe, tmp_path / "run")
    assert caught.value.exit_code == 2
    assert caught.value.problems[0].place.startswith(f"{chats}:13")
    assert not (tmp_path / "run").exists()


def test_findings_that_only_the_doctor_has_end_a_run_too(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_phi3.data import doctor

    def sign(*arguments: Any) -> Any:
        yield "no-stop", "chats.jsonl:1"

    monkeypatch.setattr(doctor, "row_signs", sign)
    monkeypatch.setattr(model, "load", forbid)
    with pytest.raises(DataError, match=r"chats\.jsonl:1: A trained answer does not end .* Mend the chat"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tokens_without_a_row_in_the_embedding_are_refused_before_the_weights(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were added to the tokenizer alone; torch would read behind the embedding's end."""
    folder = shutil.copytree(recipe.model.base, tmp_path / "base")
    tokenizer = model.load_tokenizer(folder)
    tokenizer.add_tokens(["[SKU]"])
    tokenizer.save_pretrained(folder)
    added = recipe.model_copy(update={"model": Model(base=str(folder))})
    monkeypatch.setattr(model, "load", forbid)
    for check in (pipeline.run, lambda one, _: checkup.check_recipe(one, 0, print)):
        with pytest.raises(ModelError, match=r"262 tokens, the embedding 261 rows \('\[SKU\]' has none\)"):
            check(added, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_report_has_the_system_message_of_all_rows(recipe: Recipe, chats: Path, tmp_path: Path) -> None:
    chats.write_text("".join(line("system: Count.", f"user: {i}", f"assistant: {i}!") for i in range(4)))
    found, _ = pipeline.run(recipe, tmp_path / "run")
    assert found.data["system_prompt"] == "Count."


def test_warnings_and_notes_stand_in_the_report(recipe: Recipe, chats: Path, tmp_path: Path) -> None:
    with chats.open("a") as file:
        file.write(line("user: a", "user: b", "assistant: cafÃ©"))
    found, folder = pipeline.run(recipe, tmp_path / "run")
    notes = [note for note in found.notes if note.startswith(("warning: ", "note: "))]
    expected = ["Two messages of the same role", "Text was decoded wrongly", "A held-out row asks"]
    assert [word for word in expected if not any(word in note for note in notes)] == []
    assert any("(chats.jsonl:13: messages[1]: user after user" in note for note in notes)
    assert not any(str(chats.parent) in note for note in notes)
    assert json.loads((folder / "report.json").read_text())["notes"] == found.notes


def test_long_rows_are_told_once(recipe: Recipe, chats: Path, tmp_path: Path) -> None:
    with chats.open("a") as file:
        file.write(line("user: a", "assistant: " + "b" * 500))
    found, _ = pipeline.run(recipe, tmp_path / "run")
    assert [note for note in found.notes if "data.max_length" in note] == [
        "1 training rows were longer than data.max_length and dropped"
    ]


def test_a_run_and_the_doctor_hold_out_what_the_seed_draws(recipe: Recipe) -> None:
    from qlora_phi3 import data
    from qlora_phi3.data.read import stream_splits
    from qlora_phi3.recipe import Fraction, Source

    assert isinstance(recipe.data.train, Source)
    source = recipe.data.train.model_copy(update={"weight": 1.5})
    shares = recipe.data.model_copy(update={"train": (source,), "eval": Fraction(fraction=0.4)})
    tokenizer = model.load_tokenizer(weights.locate_tokenizer(recipe.model))
    drawn = []
    for seed in (1, 2):
        train = recipe.train.model_copy(update={"seed": seed})
        seeded = recipe.model_copy(update={"data": shares, "train": train})
        splits, _ = data.check(seeded, tokenizer)
        assert splits.eval is not None
        places = {
            "train": [row.place for row in splits.train.rows],
            "eval": [r.place for r in splits.eval.rows],
        }
        expected = list(stream_splits(shares, train))
        assert places == {name: [row.place for side, row in expected if side == name] for name in places}
        found = checkup.check_recipe(seeded, 0, lambda text: None)
        assert {name: split.rows for name, split in found.splits.items()} == {
            name: len(rows) for name, rows in places.items()
        }
        drawn.append(places)
    assert drawn[0] != drawn[1]


# --- a tokenizer without its weights


DOWNLOAD = f"""
from qlora_phi3 import model
from qlora_phi3.recipe import Model
from qlora_phi3.weights import locate_tokenizer
found = locate_tokenizer(Model(base={HUB_ID!r}, revision="v1"))
print(found.name, bool(model.load_tokenizer(found).chat_template))
"""


def test_the_tokenizer_of_a_hub_model_comes_alone(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """In another process: huggingface_hub reads its address once, when it is imported."""
    hub = FakeHub(checkpoints("gqa"))
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    settings = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "downloads"),
    }
    try:
        line = [sys.executable, "-c", DOWNLOAD]
        done = subprocess.run(line, env=os.environ | settings, capture_output=True, text=True, check=True)
    finally:
        hub.shutdown()
        hub.server_close()
    assert done.stdout.split() == [COMMIT, "True"]
    assert {"config.json", "tokenizer.json"} <= hub.downloaded
    assert not any(name.endswith(".safetensors") for name in hub.downloaded)


def test_a_local_folder_is_checked_as_for_a_run(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoints("gqa")
    assert weights.locate_tokenizer(Model(base=str(folder))) == folder
    with pytest.raises(ModelError, match="holds no"):
        weights.locate_tokenizer(Model(base=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(ModelError):
        weights.locate_tokenizer(Model(base=str(tmp_path)))
