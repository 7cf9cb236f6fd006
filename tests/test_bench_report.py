"""`python -m bench report`: tables of what is in the results, and a page that must not lag behind them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench_rows import context_row

from bench import pages, plots, quality, quality_table, report, results
from bench.__main__ import main

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}
RANKS = {"fused": 12, "split": 10, "qv": 53, "qlora": 16, "lora-bf16": 16, "full": 0}


def row(variant: str, seed: int, loss: float, right: float, **changes: Any) -> dict[str, Any]:
    found = {
        "machine": "a-machine",
        "commit": "123456789abc",
        "versions": VERSIONS,
        "recipe": "quickstart",
        "recipe_sha256": "now",
        "variant": variant,
        "seed": seed,
        "overrides": [*quality.SHARED, *quality.VARIANTS[variant]],
        "rank": RANKS[variant],
        "trained_parameters": 3_000_000 + RANKS[variant],
        "eval_samples": 32,
        "eval": {"loss": loss, "exact_match": right, "json_match": 1.0},
    }
    return found | changes


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    def write(*rows: dict[str, Any], machine: str = "a-machine") -> None:
        path = tmp_path / machine / "quality.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))

    return write


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "ADAPTERS", ("fused", "split"))


ORIGIN = (
    "each measured on 32 held-out rows; commit 123456789abc; "
    "torch 2.13.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2."
)


def test_median_spread_and_every_seed_that_is_complete(write: Any, two: None) -> None:
    write(
        row("split", 44, 0.025, 0.8125),
        row("fused", 43, 0.02, 0.75),
        row("split", 42, 0.0125, 0.5),
        row("fused", 44, 0.04, 1.0),
        row("split", 43, 0.05, 0.78125),
        row("fused", 42, 0.03, 0.5),
        row("fused", 45, 0.0, 0.0),
    )
    by_seed = "seeds 42, 43, 44"
    assert quality_table.adapters().splitlines() == [
        f"| variant | rank | trained parameters | loss: median | spread | {by_seed} "
        f"| exact_match: median | spread | {by_seed} |",
        "|---|---|---|---|---|---|---|---|---|",
        "| `fused` | 12 | 3,000,012 | 0.03 | 0.02 | 0.03, 0.02, 0.04 "
        "| 75.0% | 50.0% | 50.0%, 75.0%, 100.0% |",
        "| `split` | 10 | 3,000,010 | 0.025 | 0.0375 | 0.0125, 0.05, 0.025 "
        "| 78.1% | 31.2% | 50.0%, 78.1%, 81.2% |",
        "",
        f"6 runs on a-machine, {ORIGIN}",
    ]


def test_only_what_can_be_compared_stands_in_a_table(write: Any, two: None) -> None:
    tried_out = [*quality.SHARED, "train.max_steps=2", *quality.VARIANTS["fused"]]
    other_rank = [*quality.SHARED, "adapter.split_fused=false", "adapter.rank=99"]
    both = [row(name, 42, 0.5, 1.0) for name in ("fused", "split")]
    write(
        *(row(name, 1, 9.0, 0.0, recipe_sha256="of other rows") for name in ("fused", "split")),
        *(row(name, 2, 9.0, 0.0, recipe="another") for name in ("fused", "split")),
        row("split", 3, 9.0, 0.0),
        row("fused", 3, 9.0, 0.0, overrides=tried_out, recipe_sha256="of two steps"),
        row("split", 4, 9.0, 0.0),
        row("fused", 4, 9.0, 0.0, overrides=other_rank),
        *both,
        row("qlora", 42, 9.0, 0.0, recipe_sha256="of a later day"),
        row("fused", 5, 9.0, 0.0, recipe="another", recipe_sha256="newest"),
    )
    assert quality_table.adapters().splitlines()[2:] == [
        "| `fused` | 12 | 3,000,012 | 0.5 | - | 0.5 | 100.0% | - | 100.0% |",
        "| `split` | 10 | 3,000,010 | 0.5 | - | 0.5 | 100.0% | - | 100.0% |",
        "",
        f"2 runs on a-machine, {ORIGIN}",
    ]


def test_versions_that_differ_are_all_named(write: Any, two: None) -> None:
    newer = {"commit": "abc", "versions": VERSIONS | {"torch": "2.14.0"}}
    write(row("fused", 1, 0.5, 1.0), row("split", 1, 0.5, 1.0, **newer))
    origin = quality_table.adapters().splitlines()[-1]
    assert "commit 123456789abc and abc" in origin
    assert "torch 2.13.0, transf" in origin and "and torch 2.14.0, transf" in origin


def test_a_table_for_each_machine_and_none_without_rows(write: Any, two: None) -> None:
    assert quality_table.adapters() == "Not measured yet.\n"
    write(row("fused", 1, 0.5, 1.0), row("split", 2, 0.5, 1.0))
    assert quality_table.adapters() == "Not measured yet.\n"
    for machine in ("b", "a"):
        write(*(row(name, 1, 0.5, 1.0, machine=machine) for name in ("split", "fused")), machine=machine)
    found = [line[:8] for line in quality_table.adapters().splitlines() if line.startswith(("| `", "2 runs"))]
    assert found == ["| `fused", "| `split", "2 runs o"] * 2


def test_full_fine_tuning_stands_beside_them_where_it_is_there(write: Any) -> None:
    both = [row("qlora", 1, 0.5, 1.0), row("lora-bf16", 1, 0.4, 1.0, rank=16)]
    write(*both)
    assert quality_table.precision().count("| `") == 2
    write(*both, row("full", 1, 0.3, 1.0, rank=None))
    assert "| `full` | - | " in quality_table.precision() and quality_table.precision().count("| `") == 3


def test_a_page_keeps_what_is_written_by_hand() -> None:
    text = "a\n<!-- generated: one -->\nold\nolder\n<!-- end -->\nb <!-- end -->\n"
    filled = "a\n<!-- generated: one -->\nnew\n<!-- end -->\nb <!-- end -->\n"
    assert pages.fill(text, {"one": lambda: "new\n"}) == filled
    with pytest.raises(KeyError):
        pages.fill(text, {})


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/generate.py, with one page of a table of results."""
    path = Path(__file__).parent.parent / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("docs_generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = tmp_path / "adapters.md"
    page.write_text("# Title\n\n<!-- generated: adapters -->\n<!-- end -->\n\nText.\n")
    monkeypatch.setattr(module, "PAGES", (page,))
    monkeypatch.setattr(report, "PAGES", (page,))
    monkeypatch.setattr(plots, "FOLDER", tmp_path / "plots")
    return module


def test_a_stale_table_fails_the_check(write: Any, two: None, generate: ModuleType, tmp_path: Path) -> None:
    first = [row(name, 1, 0.5, 1.0) for name in ("fused", "split")]
    write(*first)
    with pytest.raises(SystemExit, match=r"adapters\.md is stale: run `make docs`"):
        generate.main(check=True)
    assert main(["report"]) == 0
    generate.main(check=True)
    write(*first, *(row(name, 2, 0.7, 0.5) for name in ("fused", "split")))
    with pytest.raises(SystemExit, match="stale"):
        generate.main(check=True)
    generate.main(check=False)
    generate.main(check=True)
    text = (tmp_path / "adapters.md").read_text()
    assert text.startswith("# Title") and text.endswith("Text.\n") and "| 0.6 | 0.2 | 0.5, 0.7 |" in text


def test_a_stale_plot_fails_the_check(write: Any, generate: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a-machine" / "context.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(context_row("qlora", 8, 12800)) + "\n")
    generate.main(check=False)
    generate.main(check=True)
    path.write_text(json.dumps(context_row("qlora", 8, 12928)) + "\n")
    with pytest.raises(SystemExit, match=r"docs/plots/context\.png is stale: run `make docs`"):
        generate.main(check=True)


def test_a_report_leaves_parts_of_others_as_they_are(
    write: Any, generate: ModuleType, tmp_path: Path
) -> None:
    other = "<!-- generated: recipes -->\nkept\n<!-- end -->\n"
    (tmp_path / "adapters.md").write_text(other)
    assert main(["report"]) == 0
    assert (tmp_path / "adapters.md").read_text() == other


def test_every_part_of_the_pages_is_made_by_somebody(generate: ModuleType) -> None:
    for page in (Path(__file__).parent.parent / "docs").glob("*.md"):
        names = [match[2] for match in pages.PART.finditer(page.read_text(encoding="utf-8"))]
        assert set(names) <= set(generate.PARTS)
