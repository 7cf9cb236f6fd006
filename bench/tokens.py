"""The token stream that all methods of a comparison are fed, made once and read by every worker.

A file of rows {"rows": [[ids, labels], ...], "order": [...]}: one optimizer step after the other takes its
rows in that order, which is the permutation that transformers' Trainer makes of `data_seed`. A method that
takes rows in any other is found out, as its own record of what it was fed has another hash.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from . import probe

ORDERS = Path(__file__).parent.parent / "recipes" / "data" / "orders" / "train.jsonl"
RANDOM_IDS = (3, 32000)
"""Range of made-up tokens: every vocabulary of the family has them, and none of its special ones is there."""


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Write the stream of a job."""
    num_rows = job["steps"] * job["effective_batch"]
    if job["made_up"]:
        found = made_up(job["max_length"], num_rows, job["data_seed"])
    else:
        found = chats(Path(job["base"]), job["max_length"], num_rows)
    write(Path(job["stream"]), found, job["data_seed"])
    return {}


def chats(base: Path, max_length: int, num_rows: int) -> list[probe.Row]:
    """Rows of the quickstart's orders through our own data pipeline, from the start again when they end.

    Raises:
        DataError: no row is short enough.
    """
    from qlora_phi3 import data, model
    from qlora_phi3.recipe import Data

    settings = Data.model_validate({"train": {"path": str(ORDERS)}, "max_length": max_length})
    found = data.load(settings, model.load_tokenizer(base)).train.rows
    return [(row.input_ids, row.labels) for row in (found[i % len(found)] for i in range(num_rows))]


def made_up(length: int, num_rows: int, seed: int) -> list[probe.Row]:
    """Seeded random tokens, every row of exactly `length`, all trained on."""
    draw = random.Random(seed)
    rows = [[draw.randrange(*RANDOM_IDS) for _ in range(length)] for _ in range(num_rows)]
    return [(row, row) for row in rows]


def order(num_rows: int, data_seed: int) -> list[int]:
    """The permutation of one epoch. Source: accelerate 1.15 SeedableRandomSampler, torch's RandomSampler."""
    import torch

    found: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(data_seed)).tolist()
    return found


def write(path: Path, rows: list[probe.Row], data_seed: int) -> None:
    content = {"rows": rows, "order": order(len(rows), data_seed)}
    path.write_text(json.dumps(content), encoding="utf-8")


def steps(path: Path, effective_batch: int) -> list[list[probe.Row]]:
    """Rows of each optimizer step."""
    content = json.loads(path.read_text(encoding="utf-8"))
    ordered = [content["rows"][i] for i in content["order"]]
    return [ordered[at : at + effective_batch] for at in range(0, len(ordered), effective_batch)]


def rows(path: Path) -> Any:
    """The rows as our trainer takes them."""
    from qlora_phi3.data.store import RowsBuilder
    from qlora_phi3.data.tokens import Marked

    builder = RowsBuilder()
    for number, (ids, labels) in enumerate(json.loads(path.read_text(encoding="utf-8"))["rows"]):
        builder.add(Marked(ids, runs(labels), f"row {number}"))
    return builder.finish()


def runs(labels: list[int]) -> list[tuple[int, int]]:
    """[start, stop) of every run of labels that are trained on."""
    found: list[tuple[int, int]] = []
    for at, label in enumerate(labels):
        if label == probe.IGNORE:
            continue
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
    return found
