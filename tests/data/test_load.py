"""What is kept, dropped and counted of the recipe's sources; every count here is made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import phi3_tokenizer

from qlora_phi3.data import Split, draw, load, prepare, prompts
from qlora_phi3.data.read import MAX_PROBLEMS
from qlora_phi3.errors import DataError
from qlora_phi3.recipe import Data, Evaluate, Source, Train

TOKENIZER = phi3_tokenizer()
# <|user|> q... <|end|> <|assistant|> a... <|end|> eos: 5 tokens of the template, 1 of them supervised
FRAME, SUPERVISED_FRAME = 5, 1


def write(folder: Path, *lengths: tuple[int, int], name: str = "train") -> Source:
    """Rows of a question and an answer of so many bytes."""
    path = folder / f"{name}.jsonl"
    rows = [[("user", "q" * asked), ("assistant", "a" * answered)] for asked, answered in lengths]
    messages = [[{"role": role, "content": content} for role, content in row] for row in rows]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))
    return Source(path=str(path))


def lines_of(split: Split) -> list[int]:
    return [int(row.place.rsplit(":", 1)[1]) for row in split.rows]


def test_counts(tmp_path: Path) -> None:
    splits = load(Data(train=write(tmp_path, (3, 2), (10, 4), (1, 1))), TOKENIZER)
    assert splits.eval is None
    assert splits.train.to_json() == {
        "rows": 3,
        "tokens": (3 + 2) + (10 + 4) + (1 + 1) + 3 * FRAME,
        "supervised_tokens": 2 + 4 + 1 + 3 * SUPERVISED_FRAME,
        "longest_row_tokens": 10 + 4 + FRAME,
        "dropped_overlong_rows": 0,
        "truncated_rows": 0,
        "split_rows": 0,
    }


def test_counts_of_two_turns(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    messages = [("system", "Be."), ("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "d")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}))
    found = load(Data(train=Source(path=str(path))), TOKENIZER).train.to_json()
    # system, 2 x (user, assistant): a header and an end each, and the eos
    assert found["tokens"] == 3 + 1 + 2 + 1 + 1 + 5 * 2 + 1
    assert found["supervised_tokens"] == (2 + 1) + (1 + 1)


def test_a_table_gives_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("instruction,input,output\nqqq,,aa\nqqqq,qqqq,aaaa\n")
    found = load(Data(train=Source(path=str(path))), TOKENIZER).train
    wanted = load(Data(train=write(tmp_path, (3, 2), (10, 4))), TOKENIZER).train
    assert found.to_json() == wanted.to_json()
    assert found.rows[0].input_ids == wanted.rows[0].input_ids
    assert [row.place for row in found.rows] == [f"{path}:2", f"{path}:3"]


def test_overlong_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    at_limit = (16 - FRAME - 2, 2)
    source = write(tmp_path, (3, 2), (16 - FRAME - 1, 2), at_limit, (500, 500))
    split = load(Data(train=source, max_length=16), TOKENIZER).train
    assert lines_of(split) == [1, 3]
    assert [talk.place for talk in split.conversations] == [row.place for row in split.rows]
    assert split.to_json() == {
        "rows": 2,
        "tokens": 3 + 2 + FRAME + 16,
        "supervised_tokens": 3 + 3,
        "longest_row_tokens": 16,
        "dropped_overlong_rows": 2,
        "truncated_rows": 0,
        "split_rows": 0,
    }


def test_overlong_rows_are_errors_when_asked(tmp_path: Path) -> None:
    source = write(tmp_path, (3, 2), (10, 2), (9, 2), (20, 2))
    with pytest.raises(DataError) as caught:
        load(Data(train=source, max_length=16, overlong="error"), TOKENIZER)
    assert [(p.place, p.reason) for p in caught.value.problems] == [
        (f"{source.path}:2", "has 17 tokens, data.max_length is 16."),
        (f"{source.path}:4", "has 27 tokens, data.max_length is 16."),
    ]


OVERLONG = [
    pytest.param("truncate", {"rows": 3, "dropped_overlong_rows": 1, "truncated_rows": 2}, id="truncate"),
    pytest.param(
        "split",
        {"rows": 4, "dropped_overlong_rows": 1, "truncated_rows": 1, "split_rows": 1},
        id="split",
    ),
]


@pytest.mark.parametrize(("overlong", "expected"), OVERLONG)
def test_overlong_rows_are_counted(tmp_path: Path, overlong: str, expected: dict[str, int]) -> None:
    """Rows that fit, are cut, have no room for an answer, and hold two exchanges that fit alone."""
    path = Path(write(tmp_path, (3, 2), (9, 9), (20, 2)).path)
    messages = [{"role": role, "content": "abcd"} for role in ("user", "assistant") * 2]
    path.write_text(path.read_text() + json.dumps({"messages": messages}) + "\n")
    data = Data(train=Source(path=str(path)), max_length=16, overlong=overlong)
    split = load(data, TOKENIZER).train
    found = split.to_json()
    names = ("rows", "dropped_overlong_rows", "truncated_rows", "split_rows")
    assert {name: found[name] for name in names if found[name]} == expected
    assert lines_of(split) == ([1, 2, 4] if overlong == "truncate" else [1, 2, 4, 4])
    assert [talk.place for talk in split.conversations] == [row.place for row in split.rows]
    assert found["longest_row_tokens"] <= 16


@pytest.mark.parametrize(("loss_on", "supervised"), [("assistant", 5), ("last", 2), ("all", 19 - 1)])
def test_loss_on(tmp_path: Path, loss_on: str, supervised: int) -> None:
    path = tmp_path / "train.jsonl"
    messages = [("system", "Be."), ("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "d")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}))
    found = load(Data(train=Source(path=str(path)), loss_on=loss_on), TOKENIZER).train.to_json()
    assert found["supervised_tokens"] == supervised


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_no_room_for_any_answer(tmp_path: Path, overlong: str) -> None:
    source = write(tmp_path, (30, 2), (40, 2))
    with pytest.raises(DataError, match=r"all 2 rows are longer .* 16, and none has room for an answer"):
        load(Data(train=source, max_length=16, overlong=overlong), TOKENIZER)


def test_all_rows_dropped(tmp_path: Path) -> None:
    source = write(tmp_path, (30, 2), (40, 2))
    with pytest.raises(DataError, match="all 2 rows are longer than data") as caught:
        load(Data(train=source, max_length=16), TOKENIZER)
    assert caught.value.problems[0].place == source.path


def test_all_held_out_rows_dropped(tmp_path: Path) -> None:
    data = Data(train=write(tmp_path, (3, 2)), eval=write(tmp_path, (30, 2), name="eval"), max_length=16)
    with pytest.raises(DataError, match=r"eval\.jsonl: all 1 rows are longer"):
        load(data, TOKENIZER)


def test_rows_that_cannot_be_masked_are_told_together_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    bad = [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "a"}]
    path.write_text(f"{json.dumps({'messages': bad})}\n" * (MAX_PROBLEMS + 3))
    with pytest.raises(DataError) as caught:
        load(Data(train=Source(path=str(path))), TOKENIZER)
    *rows, rest = caught.value.problems
    assert [p.place for p in rows] == [f"{path}:{line}: messages[0]" for line in range(1, MAX_PROBLEMS + 1)]
    assert str(rest) == f"{path}: and 3 more rows with problems."


def test_held_out_rows(tmp_path: Path) -> None:
    held_out = write(tmp_path, (4, 1), (5, 1), (90, 1), (6, 1), name="eval").model_copy(update={"limit": 3})
    data = Data(train=write(tmp_path, (3, 2)), eval=held_out, max_length=16)
    splits = load(data, TOKENIZER)
    assert lines_of(splits.train) == [1]
    assert splits.eval is not None
    assert lines_of(splits.eval) == [1, 2]
    assert splits.eval.num_dropped == 1
    assert {row.place.rsplit(":", 1)[0] for row in splits.eval.rows} == {held_out.path}


def test_a_truncated_held_out_row_asks_for_the_answer_it_still_has(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    row = [("user", "a"), ("assistant", "bb"), ("user", "c" * 30), ("assistant", "d")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}))
    data = Data(train=write(tmp_path, (3, 2)), eval=Source(path=str(path)), max_length=16)
    held_out = load(data.model_copy(update={"overlong": "truncate"}), TOKENIZER).eval
    assert held_out is not None
    [found] = prompts(held_out, TOKENIZER, 9)
    assert TOKENIZER.decode(found.input_ids) == "<|user|>a<|end|><|assistant|>"
    assert (found.text, found.expected) == ("a", "bb")
    assert held_out.rows[0].input_ids[: len(found.input_ids)] == found.input_ids


# --- prompts


def split_of(folder: Path, *rows: list[tuple[str, str]]) -> Split:
    path = folder / "eval.jsonl"
    messages = [[{"role": role, "content": content} for role, content in row] for row in rows]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))
    return load(Data(train=Source(path=str(path))), TOKENIZER).train


@pytest.mark.parametrize(("limit", "num"), [(1, 1), (2, 2), (9, 2)])
def test_prompts_are_those_of_rows_that_are_drawn(tmp_path: Path, limit: int, num: int) -> None:
    rows = [[("user", f"question {i}"), ("assistant", f"answer {i}")] for i in range(2)]
    split = split_of(tmp_path, *rows)
    found = prompts(split, TOKENIZER, limit)
    chosen = draw(2, limit, seed=42)
    assert len(found) == num and [p.text for p in found] == [f"question {i}" for i in chosen]
    assert [p.expected for p in found] == [f"answer {i}" for i in chosen]
    assert [p.place for p in found] == [split.rows[i].place for i in chosen]
    assert [TOKENIZER.decode(p.input_ids) for p in found] == [
        f"<|user|>question {i}<|end|><|assistant|>" for i in chosen
    ]


@pytest.mark.parametrize(
    ("row", "prompt", "text"),
    [
        pytest.param(
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
            "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>",
            "c",
            id="two turns",
        ),
        pytest.param(
            [("user", "a"), ("assistant", "d"), ("user", "later")],
            "<|user|>a<|end|><|assistant|>",
            "a",
            id="a question after the last answer",
        ),
        pytest.param(
            [("user", "a"), ("assistant", "b"), ("assistant", "d")],
            "<|user|>a<|end|><|assistant|>b<|end|><|assistant|>",
            "a",
            id="two answers",
        ),
        pytest.param(
            [("system", "Count."), ("assistant", "d")],
            "<|system|>Count.<|end|><|assistant|>",
            "Count.",
            id="no question",
        ),
    ],
)
def test_prompt_for_the_last_answer(
    tmp_path: Path, row: list[tuple[str, str]], prompt: str, text: str
) -> None:
    [found] = prompts(split_of(tmp_path, row), TOKENIZER, 1)
    assert (TOKENIZER.decode(found.input_ids), found.text, found.expected) == (prompt, text, "d")


def test_the_doctor_counts_the_answers_that_are_drawn(tmp_path: Path) -> None:
    """Not the first: here every answer of the second half is longer than what is generated."""
    path = tmp_path / "held.jsonl"
    rows = [{"prompt": f"question {i}", "completion": "x" * (2 if i < 20 else 9)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=str(path))
    evaluate = Evaluate(metrics=("exact_match",), samples=6, max_new_tokens=4)
    found = prepare(Data(train=source, eval=source), TOKENIZER, Train(seed=3), evaluate)
    held_out = found.splits().eval
    assert held_out is not None
    drawn = prompts(held_out, TOKENIZER, 6, seed=3)
    num_long = sum(len(one.expected) > 4 for one in drawn)
    (finding,) = found.answers
    assert finding.what.startswith(f"{num_long} of the 6 answers") and 0 < num_long < 6
