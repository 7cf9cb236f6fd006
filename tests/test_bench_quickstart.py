"""`python -m bench quickstart`: a row with what a user sees and what the run's files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import results
from bench.__main__ import main


def test_a_row_of_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_recipe: Callable[..., Path]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    assert main(["quickstart", f"--recipe={write_recipe()}", "--steps=1"]) == 0
    [path] = (tmp_path / "results").glob("*/quickstart.jsonl")
    [row] = results.read_file(path)
    assert row["overrides"] == ["train.max_steps=1"] and row["recipe"] == "tiny"
    said = "\n".join(row["lines"])
    assert "train 1/1  loss " in said and "what it took" in said and "report   RUN/report.html" in said
    assert row["seconds"] > row["phases"]["train"]["seconds"] > 0 and row["training"]["num_steps"] == 1
    assert set(row["samples"]) == set(row["metrics"]) == {"base", "tuned"}
    assert row["calibration"]["measured_bytes"] > 0 and "bench-quickstart" not in json.dumps(row)
    assert all("/" not in sample["place"] for sample in row["samples"].values())
    assert str(Path(__file__).parent.parent) not in json.dumps(row)
