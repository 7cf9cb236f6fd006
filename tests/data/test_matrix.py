"""Every format, mask and way of packing, from the file to the passes of a step: ids and labels by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from talks import ASSISTANT, CHATML, CLOSE, END, EOS, PHI3, START, SYSTEM, USER, ids

from qlora_phi3.data import load
from qlora_phi3.data.tokens import IGNORE, LossOn
from qlora_phi3.engine.documents import Documents, Layout
from qlora_phi3.errors import DataError
from qlora_phi3.recipe import Data, Source

Talk = tuple[str | None, list[tuple[str, str]]]
"""System message, and questions with their answers."""

SINGLE: list[Talk] = [(None, [("hi", "yo")]), (None, [("a b", "é")])]
LONGER: list[Talk] = [*SINGLE, ("Sh", [("a", "b")]), (None, [("a", "b"), ("c", "d e")])]
TEXTS = ["hi there", "é"]
MAX_LENGTH = 200
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def messages(talk: Talk) -> list[tuple[str, str]]:
    system, turns = talk
    found = [("system", system)] if system is not None else []
    return found + [pair for asked, said in turns for pair in (("user", asked), ("assistant", said))]


def row(form: str, talk: Any) -> dict[str, Any]:
    if form == "text":
        return {"text": talk}
    if form == "messages":
        return {"messages": [{"role": role, "content": text} for role, text in messages(talk)]}
    if form == "sharegpt":
        return {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in messages(talk)]}
    [(asked, said)] = talk[1]
    if form == "alpaca":
        return {"instruction": asked, "input": "", "output": said}
    return {"prompt": asked, "completion": said}


ROWS = {
    "messages": LONGER,
    "sharegpt": LONGER,
    "alpaca": SINGLE,
    "prompt-completion": SINGLE,
    "text": TEXTS,
}

Pieces = list[tuple[list[int], int | None]]
"""Ids, and the number of the answer that they belong to."""


def phi3(talk: Talk) -> Pieces:
    """Its special tokens swallow the newlines behind them; eos stands behind the last turn."""
    system, turns = talk
    found: Pieces = [] if system is None else [(ids(SYSTEM, system, END), None)]
    for number, (asked, said) in enumerate(turns):
        found += [(ids(USER, asked, END, ASSISTANT), None), (ids(said, END), number)]
    return [*found, ([EOS], None)]


def chatml(talk: Talk) -> Pieces:
    """It inserts a system message where there is none."""
    system, turns = talk
    found: Pieces = [(ids(START, f"system\n{'You help.' if system is None else system}", CLOSE, "\n"), None)]
    for number, (asked, said) in enumerate(turns):
        found.append((ids(START, f"user\n{asked}", CLOSE, "\n", START, "assistant\n"), None))
        found += [(ids(said, CLOSE), number), (ids("\n"), None)]
    return found


def by_hand(template: Any, talk: Any, loss_on: LossOn) -> tuple[list[int], list[int]]:
    """Ids and labels of a row; nothing predicts the first token."""
    if isinstance(talk, str):
        whole = ids(talk, EOS)
        return whole, [IGNORE, *whole[1:]]
    last, whole, labels = len(talk[1]) - 1, list[int](), list[int]()
    for piece, answer in template(talk):
        wanted = {"assistant": answer is not None, "last": answer == last, "all": True}[loss_on]
        whole += piece
        labels += piece if wanted else [IGNORE] * len(piece)
    return whole, [IGNORE, *labels[1:]]


def documents_of(rows: Any, *, packing: bool) -> tuple[int, list[tuple[list[int], list[int]]]]:
    """How many passes the rows make, and each document in them; positions begin anew in each."""
    layout = Layout(1, MAX_LENGTH if packing else None, None)
    passes = [Documents.of(found, torch.device("cpu")) for found in layout.cut(list(rows))]
    return len(passes), [document for one in passes for document in _cut(one)]


def _cut(found: Documents) -> Iterator[tuple[list[int], list[int]]]:
    bounds = found.bounds.tolist()
    for start, stop in pairwise(bounds):
        assert found.position_ids[0, start:stop].tolist() == list(range(stop - start))
        yield found.input_ids[0, start:stop].tolist(), found.labels[0, start:stop].tolist()


CASES = [
    pytest.param(tokenizer, template, form, loss_on, packing, id=f"{name}-{form}-{loss_on}-{packing}")
    for (name, tokenizer, template), form, loss_on, packing in product(
        [("phi3", PHI3, phi3), ("chatml", CHATML, chatml)], ROWS, get_args(LossOn), [True, False]
    )
]


@pytest.mark.parametrize(("tokenizer", "template", "form", "loss_on", "packing"), CASES)
def test_ids_and_labels(
    tmp_path: Path, tokenizer: Any, template: Any, form: str, loss_on: LossOn, packing: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(form, talk)) + "\n" for talk in ROWS[form]), encoding="utf-8")
    data = Data(train=Source(path=str(path)), max_length=MAX_LENGTH, loss_on=loss_on, packing=packing)
    if form == "text" and loss_on == "last":
        with pytest.raises(DataError, match="plain text has no last answer"):
            load(data, tokenizer)
        return
    num_passes, found = documents_of(load(data, tokenizer).train.rows, packing=packing)
    expected = [by_hand(template, talk, loss_on) for talk in ROWS[form]]
    assert sorted(found) == sorted(expected)
    total = sum(len(whole) for whole, _ in expected)
    assert num_passes == (-(-total // MAX_LENGTH) if packing else len(expected))
