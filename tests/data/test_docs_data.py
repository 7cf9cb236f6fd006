"""Every row in docs/data.md is read by the real reader, in the format that the page gives it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from qlora_phi3.data.formats import FORMATS, ROLES, detect
from qlora_phi3.data.read import read
from qlora_phi3.data.sources import READERS, rows_of
from qlora_phi3.recipe import Data, Source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = re.findall(r"```(json|csv) ([a-z-]+)\n(.*?)```", PAGE, re.DOTALL)
RECIPES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("kind", "name", "block"), ROWS)
def test_the_rows_of_the_page_are_read(tmp_path: Path, kind: str, name: str, block: str) -> None:
    path = tmp_path / f"rows.{'jsonl' if kind == 'json' else kind}"
    path.write_text(block, encoding="utf-8")
    rows = list(rows_of([path]))
    assert [detect(row, place) for place, row in rows] == [name] * len(rows)
    found = read(Source(path=str(path)))
    assert len(found) == len(block.splitlines()) - (kind == "csv")
    assert not any(row.unused for row in found)


def test_the_page_shows_every_format_but_preferences() -> None:
    assert {name for kind, name, _ in ROWS if kind == "json"} == set(FORMATS) - {"preference"}
    assert not [line for line in PAGE.splitlines() if line.startswith("{") and not json.loads(line)]


def test_the_table_of_keys_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (`.*?) \| `([a-z-]+)` \|", PAGE, re.MULTILINE)
    assert [name for _, name in rows] == list(FORMATS)
    for keys, name in rows:
        assert all(f"`{key}`" in keys for group in FORMATS[name].keys for key in group)


def test_the_page_names_every_kind_of_file_and_speaker() -> None:
    assert not [word for word in (*READERS, *ROLES) if f"`{word}`" not in PAGE]


@pytest.mark.parametrize("block", RECIPES)
def test_the_recipes_of_the_page_are_valid(block: str) -> None:
    Data.model_validate(yaml.safe_load(block)["data"])
