"""Plots: made of rows alone, the same again, told when stale, legible on white and on black."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_rows import compare_row, context_row

from bench import plots, results


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "plots")

    def write(case: str, *rows: dict[str, Any]) -> None:
        path = tmp_path / "results" / "a-machine" / f"{case}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


COMPARED = [compare_row(name, repeat) for repeat in range(3) for name in ("qlora", "lora-bf16", "trl-qlora")]
CARDS = [
    context_row("qlora", 6, 7552),
    context_row("qlora", 24, 54912),
    context_row("lora-bf16", 6, None),
    context_row("qlora", 6, 8192, how="measured"),
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def test_files_for_what_there_are_rows_for(rows: Any, tmp_path: Path) -> None:
    assert plots.plots() == "Not measured yet.\n" and plots.stale() == []
    rows("context", *CARDS)
    assert plots.stale() == ["context.png", "context.svg"]
    plots.write()
    assert list(files(tmp_path / "plots")) == ["context.png", "context.svg"] and plots.stale() == []
    rows("compare", *COMPARED)
    plots.write()
    found = files(tmp_path / "plots")
    assert len(found) == 8 and all(1000 < len(content) < 150_000 for content in found.values())
    assert plots.plots().count("](plots/") == 4 and plots.stale() == []


def test_a_change_of_a_row_or_a_file_is_stale(rows: Any, tmp_path: Path) -> None:
    rows("compare", *COMPARED)
    plots.write()
    slower = [row | {"step_seconds": [5.0] * 6} if row["method"] == "qlora" else row for row in COMPARED]
    rows("compare", *slower)
    assert plots.stale() == ["speed.png", "speed.svg"]
    rows("compare", *COMPARED)
    (tmp_path / "plots" / "loss.png").unlink()
    (tmp_path / "plots" / "other.svg").write_text("<svg/>")
    assert plots.stale() == ["loss.png", "other.svg"]
    plots.write()
    assert plots.stale() == [] and "other.svg" not in files(tmp_path / "plots")


def test_the_same_rows_give_the_same_bytes(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows("compare", *COMPARED)
    plots.write()
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "again")
    plots.write()
    assert files(tmp_path / "plots") == files(tmp_path / "again")
    assert b"<dc:date>" not in files(tmp_path / "again")["loss.svg"]


def luminance(color: str) -> float:
    """Source: WCAG 2.1, relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_every_color_stands_out_on_both_pages(page: str) -> None:
    def contrast(color: str) -> float:
        low, high = sorted((luminance(color), luminance(page)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(plots.TEXT) >= 4.0
    assert {
        name: round(contrast(color), 1) for name, color in plots.COLORS.items() if contrast(color) < 3
    } == {}
