"""Weights and shares depend on the rows' content alone: exact or, by lot, close to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import phi3_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_phi3.data import load
from qlora_phi3.data.mix import Sampler, draw, is_held_out, num_copies
from qlora_phi3.data.read import EVALUATE, TRAIN, stream_splits
from qlora_phi3.data.rows import Conversation, Example, Message, Text
from qlora_phi3.errors import DataError, Problem
from qlora_phi3.recipe import Data, Evaluate, Fraction, Source, Train

SEEDS = st.integers(0, 2**32 - 1)
DOCUMENTS = [Text(f"document {i}", f"f:{i}") for i in range(2000)]


# --- lots


@given(st.integers(1, 100), SEEDS, st.text())
def test_whole_weights_are_exact(weight: int, seed: int, text: str) -> None:
    assert num_copies(Text(text, "f:1"), float(weight), seed) == weight


@given(st.floats(0.001, 100, allow_nan=False), SEEDS, st.text())
def test_copies_are_the_weight_rounded_up_or_down(weight: float, seed: int, text: str) -> None:
    assert abs(num_copies(Text(text, "f:1"), weight, seed) - weight) < 1


@settings(max_examples=20)
@given(st.floats(0.05, 3), SEEDS)
def test_an_epoch_has_about_weight_times_the_rows(weight: float, seed: int) -> None:
    total = sum(num_copies(row, weight, seed) for row in DOCUMENTS)
    assert total / len(DOCUMENTS) == pytest.approx(weight, abs=0.06)  # 5 standard deviations


@settings(max_examples=20)
@given(st.floats(0.01, 0.99), SEEDS)
def test_about_the_share_is_held_out(fraction: float, seed: int) -> None:
    held_out = sum(is_held_out(row, fraction, seed) for row in DOCUMENTS)
    assert held_out / len(DOCUMENTS) == pytest.approx(fraction, abs=0.06)


@given(st.text(), st.floats(0.01, 0.99), SEEDS)
def test_equal_rows_stay_together_wherever_they_stand(text: str, fraction: float, seed: int) -> None:
    one, other = Text(text, "a.jsonl:1"), Text(text, "b.parquet: row 9")
    assert is_held_out(one, fraction, seed) == is_held_out(other, fraction, seed)
    assert num_copies(one, fraction, seed) == num_copies(other, fraction, seed)


@given(st.floats(0.01, 0.49), SEEDS)
def test_a_larger_share_keeps_what_a_smaller_one_held_out(fraction: float, seed: int) -> None:
    small = {row.text for row in DOCUMENTS[:200] if is_held_out(row, fraction, seed)}
    assert small <= {row.text for row in DOCUMENTS[:200] if is_held_out(row, 2 * fraction, seed)}


def test_weight_and_share_and_seed_draw_lots_of_their_own() -> None:
    half = [num_copies(row, 0.5, 1) == 1 for row in DOCUMENTS]
    held_out = [is_held_out(row, 0.5, 1) for row in DOCUMENTS]
    other_seed = [is_held_out(row, 0.5, 2) for row in DOCUMENTS]
    for a, b in ((half, held_out), (held_out, other_seed)):
        assert sum(x and y for x, y in zip(a, b, strict=True)) / len(a) == pytest.approx(0.25, abs=0.05)


def test_what_makes_rows_equal() -> None:
    talk = Conversation((Message("user", "a"), Message("assistant", "b")), "f:1")
    others = [
        Conversation((Message("user", "a"), Message("assistant", "c")), "f:1"),
        Conversation((Message("system", "a"), Message("assistant", "b")), "f:1"),
        Conversation(talk.messages, "f:1", tools_json='[{"name": "f"}]'),
        Text("a", "f:1"),
    ]
    assert len({row.canonical for row in [talk, *others]}) == 5
    assert talk.canonical == Conversation(talk.messages, "g:2").canonical


def test_the_lot_is_the_same_on_every_machine() -> None:
    """Written down once: a changed hash would mix held-out rows of earlier runs into training."""
    assert [i for i in range(40) if is_held_out(DOCUMENTS[i], 0.1, 42)] == HELD_OUT


HELD_OUT = [14, 18, 37]


# --- sources


def write(folder: Path, name: str, *texts: str) -> Source:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(path=str(path))


def read_splits(data: Data, train: Train = TRAIN, evaluate: Evaluate = EVALUATE) -> dict[str, list[Example]]:
    """All rows by split, or all problems."""
    found: dict[str, list[Example]] = {"train": [], "eval": []} if data.eval else {"train": []}
    problems = []
    for split, row in stream_splits(data, train, evaluate):
        if isinstance(row, Problem):
            problems.append(row)
        else:
            found[split].append(row)
    if problems:
        raise DataError.of(problems)
    return found


def texts_of(rows: list[object]) -> list[str]:
    return [row.text for row in rows if isinstance(row, Text)]


def weighted(source: Source, weight: float) -> Source:
    return source.model_copy(update={"weight": weight})


def test_sources_follow_each_other_and_copies_each_other(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", "1", "2"), write(tmp_path, "b", "3")
    rows = read_splits(Data(train=[weighted(a, 2), b]))
    assert texts_of(rows["train"]) == ["1", "1", "2", "2", "3"]
    assert set(rows) == {"train"}


def test_sources_of_several_formats_are_mixed(tmp_path: Path) -> None:
    chat = tmp_path / "c.jsonl"
    chat.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    rows = read_splits(Data(train=[write(tmp_path, "a", "1"), Source(path=str(chat))]))["train"]
    assert [type(row) for row in rows] == [Text, Conversation]


def test_limit_is_of_each_source_and_before_its_weight(tmp_path: Path) -> None:
    a = write(tmp_path, "a", *map(str, range(9))).model_copy(update={"limit": 2, "weight": 2.0})
    b = write(tmp_path, "b", "x", "y").model_copy(update={"limit": 1})
    assert texts_of(read_splits(Data(train=[a, b]))["train"]) == ["0", "0", "1", "1", "x"]


def test_weights_of_held_out_sources(tmp_path: Path) -> None:
    train, held_out = write(tmp_path, "a", "1"), write(tmp_path, "b", "2")
    rows = read_splits(Data(train=train, eval=[weighted(held_out, 2), train]))
    assert texts_of(rows["eval"]) == ["2", "2", "1"]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_weight_that_leaves_nothing_is_refused(tmp_path: Path, split: str) -> None:
    a, b = write(tmp_path, "a", "1"), weighted(write(tmp_path, "b", "2", "3"), 0.001)
    data = Data(train=[a, b]) if split == "train" else Data(train=a, eval=[a, b])
    with pytest.raises(DataError, match=r"b\.jsonl: weight 0\.001 takes none of its 2 rows"):
        read_splits(data)


# --- a share of the training rows


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=3).filter(str.strip), min_size=1, max_size=30),
    st.lists(st.text(min_size=1, max_size=3).filter(str.strip), max_size=30),
    SEEDS,
)
def test_appended_rows_move_none(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], more: list[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")

    def split(*texts: str) -> list[tuple[str, str]]:
        data = Data(train=write(folder, "a", *texts), eval=Fraction(fraction=0.3))
        found = stream_splits(data, Train(seed=seed))
        return [(name, row.text) for name, row in found if isinstance(row, Text)]

    before, after = split(*rows), split(*rows, *more)
    assert after[: len(before)] == before
    assert [text for _, text in after] == [*rows, *more]  # each once, in order
    sides = {text: name for name, text in after}
    assert all(sides[text] == name for name, text in after)


def test_held_out_rows_are_taken_once_whatever_their_weight(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(200)]
    a = write(tmp_path, "a", *texts)
    plain = read_splits(Data(train=a, eval=Fraction(fraction=0.2)))
    triple = read_splits(Data(train=weighted(a, 3), eval=Fraction(fraction=0.2)))
    half = read_splits(Data(train=weighted(a, 0.5), eval=Fraction(fraction=0.2)))
    assert texts_of(triple["eval"]) == texts_of(plain["eval"])
    assert len(triple["train"]) == 3 * len(plain["train"])
    assert set(texts_of(half["eval"])) < set(texts_of(plain["eval"]))
    assert not set(texts_of(half["eval"])) & set(texts_of(half["train"]))


def test_equal_rows_of_two_sources_never_part(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(100)]
    data = Data(
        train=[write(tmp_path, "a", *texts), write(tmp_path, "b", *reversed(texts))],
        eval=Fraction(fraction=0.3),
    )
    rows = read_splits(data)
    assert not set(texts_of(rows["train"])) & set(texts_of(rows["eval"]))
    assert len(rows["train"]) + len(rows["eval"]) == 200


@pytest.mark.parametrize(
    ("fraction", "words"),
    [(1e-6, "holds out none of the 5 rows"), (1 - 1e-6, "holds out all 5 rows: none is left to train on")],
)
def test_an_empty_side_is_refused(tmp_path: Path, fraction: float, words: str) -> None:
    data = Data(train=write(tmp_path, "a", *"abcde"), eval=Fraction(fraction=fraction))
    with pytest.raises(DataError, match=words) as caught:
        read_splits(data)
    [problem] = caught.value.problems
    assert problem.place == f"data.eval.fraction: {fraction}"


def test_a_bad_row_is_told_once_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nnot JSON\n')
    found = list(stream_splits(Data(train=Source(path=str(path)), eval=Fraction(fraction=1e-6))))
    assert [(split, row.place) for split, row in found if isinstance(row, Problem)] == [
        ("train", f"{path}:2")
    ]


def test_bad_rows_of_both_splits_are_told_together(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("not JSON\n")
    a, b = (Source(path=str(tmp_path / f"{name}.jsonl")) for name in "ab")
    with pytest.raises(DataError) as caught:
        load(Data(train=a, eval=b), phi3_tokenizer())
    assert [p.place for p in caught.value.problems] == [f"{a.path}:1", f"{b.path}:1"]


# --- rows that a run has no use for


@pytest.mark.parametrize(
    ("data", "metrics", "words"),
    [
        ({"loss_on": "last"}, ["loss"], "data.loss_on: 'last' is for conversations"),
        ({"eval": Fraction(fraction=0.5)}, ["exact_match"], "evaluate.metrics: exact_match and json_match"),
    ],
)
def test_text_where_answers_are_asked_for(
    tmp_path: Path, data: dict[str, object], metrics: list[str], words: str
) -> None:
    source = write(tmp_path, "a", *"abcdefgh")
    with pytest.raises(DataError) as caught:
        read_splits(Data(train=source, **data), Train(), Evaluate(metrics=metrics))
    [problem] = caught.value.problems
    assert problem.place == f"{source.path}:1"
    assert problem.reason.startswith(words)
    assert problem.remedy


def test_preferences_are_refused_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9)
    with pytest.raises(DataError) as caught:
        read_splits(Data(train=Source(path=str(path))))
    [problem] = caught.value.problems
    assert problem.place == f"{path}:1"
    assert "train.task: sft cannot learn from" in problem.reason
    assert "prompt-completion" in problem.remedy


def test_a_share_is_loaded_as_a_file_would_be(tmp_path: Path) -> None:
    source = write(tmp_path, "a", *(f"row {i}" for i in range(50)))
    splits = load(Data(train=source, eval=Fraction(fraction=0.2)), phi3_tokenizer())
    assert splits.eval is not None
    assert len(splits.train.rows) + len(splits.eval.rows) == 50
    assert 0 < len(splits.eval.rows) < 25


# --- draws


@given(st.integers(0, 40), st.integers(1, 40), SEEDS)
def test_a_draw_is_in_order_and_part_of_every_larger_one(num: int, limit: int, seed: int) -> None:
    found = draw(num, limit, seed)
    assert found == sorted(set(found)) and len(found) == min(num, limit)
    assert set(found) <= set(draw(num, limit + 1, seed)) <= set(range(num))


def test_draws_are_even() -> None:
    counts = [0] * 10
    for seed in range(2000):
        for number in draw(10, 3, seed):
            counts[number] += 1
    assert all(abs(count - 600) < 100 for count in counts)


@pytest.mark.parametrize(("size", "num"), [(0, 5), (3, 2), (3, 3), (50, 5000)])
def test_a_stream_is_drawn_from_as_a_whole(size: int, num: int) -> None:
    kept = Sampler[int](size)
    for number in range(num):
        kept.add(number)
    found = kept.finish()
    assert found == sorted(set(found)) and len(found) == min(size, num)
    if num > size > 0:
        assert abs(sum(found) / size - num / 2) < num / 6, "the end of a file counts as its beginning"
