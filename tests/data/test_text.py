"""Plain text becomes rows of tokens that are all trained on; every id here is written by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talks import EOS, PHI3, TEXT, ids

from qlora_phi3.data import load
from qlora_phi3.data.overlong import Fitted
from qlora_phi3.data.rows import Text
from qlora_phi3.data.text import fit_text, mark_text
from qlora_phi3.data.tokens import IGNORE, Turns
from qlora_phi3.errors import DataError, ModelError
from qlora_phi3.recipe import Data, Source

TURNS = Turns.of(PHI3)


def fit(text: str, overlong: str = "drop", limit: int = 8) -> Fitted:
    data = Data(train=Source(path="x"), max_length=limit, overlong=overlong)
    document = Text(text, "f:1")
    return fit_text(document, mark_text(document, PHI3, TURNS), data)


def ids_of(found: Fitted) -> list[list[int]]:
    for _, row in found.rows:
        assert row.row().labels == [IGNORE, *row.input_ids[1:]]
        assert row.num_supervised >= 1
    return [row.input_ids for _, row in found.rows]


def test_every_token_but_the_first_is_trained_on_and_the_end_of_text_too() -> None:
    row = mark_text(Text("ab\n é", "f:1"), PHI3, TURNS).row()
    assert row.input_ids == ids("ab\n é", EOS)
    assert row.labels == [IGNORE, *ids("b\n é", EOS)]
    assert row.place == "f:1"


@pytest.mark.parametrize("token", ["<|end|>", "<|endoftext|>"])
def test_special_tokens_are_refused(token: str) -> None:
    with pytest.raises(DataError, match=r"f:1: contains the special token"):
        mark_text(Text(f"a{token}b", "f:1"), PHI3, TURNS)


def test_a_tokenizer_without_an_end_of_text() -> None:
    from conftest import phi3_tokenizer

    tokenizer = phi3_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        mark_text(Text("a", "f:1"), tokenizer, TURNS)


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split", "error"])
def test_text_that_fits_is_kept_whole(overlong: str) -> None:
    assert ids_of(fit("abcdefg", overlong)) == [ids("abcdefg", EOS)]
    assert fit("abcdefg", overlong).num_split == 0


@pytest.mark.parametrize(
    ("text", "overlong", "rows", "counts"),
    [
        ("abcdefgh", "drop", [], {"num_dropped": 1}),
        ("abcdefgh", "truncate", [ids("abcdefg", EOS)], {"num_truncated": 1}),
        ("abcdefgh" * 9, "truncate", [ids("abcdefg", EOS)], {"num_truncated": 1}),
        ("abcdefgh", "split", [ids("abcdefgh"), ids("h", EOS)], {"num_split": 1}),
        ("abcdefghi", "split", [ids("abcdefgh"), ids("hi", EOS)], {"num_split": 1}),
        ("abcdefghijklmn", "split", [ids("abcdefgh"), ids("hijklmn", EOS)], {"num_split": 1}),
        (
            "abcdefghijklmno",
            "split",
            [ids("abcdefgh"), ids("hijklmno"), ids("o", EOS)],
            {"num_split": 1},
        ),
    ],
)
def test_overlong(text: str, overlong: str, rows: list[list[int]], counts: dict[str, int]) -> None:
    found = fit(text, overlong)
    assert ids_of(found) == rows
    names = ("num_dropped", "num_truncated", "num_split")
    assert {name: getattr(found, name) for name in names if getattr(found, name)} == counts


def test_an_overlong_error() -> None:
    with pytest.raises(DataError, match=r"f:1: has 9 tokens, data\.max_length is 8\..*data\.overlong"):
        fit("abcdefgh", "error")


@given(TEXT.filter(bool), st.integers(8, 20))
def test_split_text_is_predicted_once_token_by_token(text: str, limit: int) -> None:
    rows = ids_of(fit(text, "split", limit))
    assert all(len(row) <= limit for row in rows)
    assert all(before[-1] == after[0] for before, after in pairwise(rows))
    assert rows[0] + [token for row in rows[1:] for token in row[1:]] == ids(text, EOS)


def test_documents_in_a_folder_and_their_counts(tmp_path: Path) -> None:
    for name, text in {"b.txt": "abcdefghi", "a.txt": "ab", "README.md": "not data"}.items():
        (tmp_path / name).write_text(text)
    split = load(Data(train=Source(path=str(tmp_path)), max_length=8, overlong="split"), PHI3).train
    assert [Path(row.place).name for row in split.rows] == ["a.txt", "b.txt", "b.txt"]
    found: dict[str, Any] = split.to_json()
    assert (found["rows"], found["split_rows"], found["longest_row_tokens"]) == (3, 1, 8)
    assert (found["tokens"], found["supervised_tokens"]) == (3 + 8 + 3, 2 + 7 + 2)
