"""Rows come back from flat arrays as they were put in: from memory, from a folder, and in slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_phi3.data import store
from qlora_phi3.data.store import PlacesBuilder, Rows, RowsBuilder
from qlora_phi3.data.tokens import Marked, TokenRow
from qlora_phi3.errors import OutputError


@st.composite
def rows(draw: st.DrawFn) -> Marked:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
    edges = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=6)))
    place = draw(
        st.sampled_from(["a.jsonl:1", "a.jsonl:20", "b.parquet: row 3", "b: row 03", "x:0", "none", ""])
    )
    return Marked(ids, list(zip(edges[::2], edges[1::2], strict=False)), place)


def built(found: list[Marked], folder: Path | None = None) -> Rows:
    builder = RowsBuilder(folder)
    for row in found:
        builder.add(row)
    return builder.finish()


def check(found: Rows, expected: list[TokenRow]) -> None:
    assert list(found) == expected
    assert len(found) == len(expected)
    assert found.lengths.tolist() == [len(row.input_ids) for row in expected]
    assert found.num_tokens == sum(len(row.input_ids) for row in expected)
    assert found.num_supervised == sum(row.num_supervised for row in expected)
    assert list(found.places) == [row.place for row in expected]
    most = found.fullest_step(3)
    assert (most is None) == (not expected)
    if most is not None:
        assert list(most.longest) == sorted((len(row.input_ids) for row in expected), reverse=True)[:3]
        assert list(most.supervised) == sorted((row.num_supervised for row in expected), reverse=True)[:3]


@settings(max_examples=200, deadline=None, database=None)
@given(found=st.lists(rows(), max_size=8), start=st.integers(-9, 9), stop=st.integers(-9, 9))
def test_rows_and_slices(found: list[Marked], start: int, stop: int) -> None:
    expected = [row.row() for row in found]
    whole = built(found)
    check(whole, expected)
    part = whole[start:stop]
    assert isinstance(part, Rows)
    check(part, expected[start:stop])
    nested = part[1:]
    assert isinstance(nested, Rows)
    check(nested, expected[start:stop][1:])
    assert list(whole[::-2]) == expected[::-2]
    assert [whole[i] for i in range(-len(found), 0)] == expected


def test_a_row_behind_the_last() -> None:
    with pytest.raises(IndexError):
        built([Marked([1], [], "x:1")])[1]


@pytest.mark.parametrize("spill", [1, 5, 1000])
def test_rows_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spill: int) -> None:
    monkeypatch.setattr(store, "SPILL", spill)
    found = [Marked(list(range(i, 3 * i + 1)), [(0, i)] if i else [], f"x:{i}") for i in range(7)]
    made = built(found, tmp_path)
    made.save(tmp_path)
    expected = [row.row() for row in found]
    check(made, expected)
    opened = Rows.open(tmp_path)
    check(opened, expected)
    assert isinstance(opened.ids, np.memmap)


def test_no_rows(tmp_path: Path) -> None:
    made = built([], tmp_path)
    made.save(tmp_path)
    check(Rows.open(tmp_path), [])
    check(built([]), [])


def test_ids_that_do_not_fit_the_rows(tmp_path: Path) -> None:
    built([Marked([1, 2, 3], [], "x:1")], tmp_path).save(tmp_path)
    (tmp_path / "ids.int32").write_bytes(b"\0" * 8)
    with pytest.raises(ValueError, match="not as many"):
        Rows.open(tmp_path)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = RowsBuilder(tmp_path)
    builder.add(Marked([1], [], "x:1"))
    (tmp_path / "ids.int32").unlink()
    (tmp_path / "ids.int32").mkdir()
    with pytest.raises(OutputError, match=r"cannot be written: .*QLORA_PHI3_CACHE"):
        builder.finish()


def test_many_rows_of_a_file_share_its_name() -> None:
    builder = PlacesBuilder()
    for i in range(1000):
        builder.add(f"data/chats.jsonl:{i}")
    found = builder.finish()
    assert found.prefixes == ("data/chats.jsonl:",)
    assert list(found[500:502]) == ["data/chats.jsonl:500", "data/chats.jsonl:501"]


@settings(max_examples=200, deadline=None, database=None)
@given(places=st.lists(st.text(alphabet="a:/ 019٣²", max_size=24)))
def test_places_come_back_letter_by_letter(places: list[str]) -> None:
    builder = PlacesBuilder()
    for place in places:
        builder.add(place)
    assert list(builder.finish()) == places
