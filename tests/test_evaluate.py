"""The loss is transformers' own, weighted by tokens; the other metrics follow their definitions by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import phi3_tokenizer, write_chats

from qlora_phi3 import data, evaluate, generate
from qlora_phi3.data import Split, TokenRow
from qlora_phi3.engine import attention
from qlora_phi3.errors import FitError
from qlora_phi3.evaluate import json_shape, mean_loss, measure
from qlora_phi3.recipe import Data, Evaluate, Source

TOKENIZER = phi3_tokenizer()
END, ASSISTANT = TOKENIZER.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path]) -> Any:
    from transformers import Phi3ForCausalLM

    return Phi3ForCausalLM.from_pretrained(
        checkpoints("gqa"), dtype=torch.float32, attn_implementation=attention.register()
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """12 rows of different lengths, two answers each."""
    path = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", turns=2)
    return data.load(Data(train=Source(path=str(path))), TOKENIZER).train


def loss_of_transformers(model: Any, rows: list[TokenRow]) -> float:
    """Row by row, without padding: the library's mean times its number of tokens, over all tokens."""
    total, count = 0.0, 0
    model.eval()
    for row in rows:
        num = sum(label != -100 for label in row.labels[1:])
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
        total, count = total + float(out.loss) * num, count + num
    return total / count


# --- loss


@pytest.mark.parametrize("batch_rows", [1, 2, 5, 12, 100])
def test_loss_is_that_of_transformers(model: Any, split: Split, batch_rows: int) -> None:
    lengths = [len(row.input_ids) for row in split.rows]
    assert lengths != sorted(lengths), "rows are reordered inside"
    expected = loss_of_transformers(model, split.rows)
    assert mean_loss(model, split.rows, batch_rows) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 3])
def test_loss_across_chunks_of_logits(
    model: Any, split: Split, monkeypatch: pytest.MonkeyPatch, offset: int, chunks: int
) -> None:
    rows = split.rows[:4]
    num = sum(row.num_supervised for row in rows)
    monkeypatch.setattr(evaluate, "LOGIT_TOKENS", num // chunks + offset)
    assert mean_loss(model, rows, 4) == pytest.approx(loss_of_transformers(model, rows), abs=1e-5)


def test_loss_weighs_tokens_not_rows(model: Any, split: Split) -> None:
    rows = sorted(split.rows, key=lambda row: row.num_supervised)
    rows = [rows[0], rows[-1]]
    each = [loss_of_transformers(model, [row]) for row in rows]
    assert mean_loss(model, rows, 1) == pytest.approx(loss_of_transformers(model, rows), abs=1e-5)
    assert abs(sum(each) / 2 - loss_of_transformers(model, rows)) > 1e-3, "the two means must differ here"


def test_first_token_is_predicted_by_nothing(model: Any) -> None:
    ids = TOKENIZER.encode("abcd")
    whole, later = (TokenRow(ids, labels, "x:1") for labels in (list(ids), [-100, *ids[1:]]))
    assert mean_loss(model, [whole], 1) == mean_loss(model, [later], 1)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(model: Any, split: Split, training: bool) -> None:
    model.train(training)
    mean_loss(model, split.rows[:2], 2)
    assert model.training is training
    with pytest.raises(IndexError):  # an id that the model does not have
        mean_loss(model, [TokenRow([1, 99_999], [1, 99_999], "x:1")], 1)
    assert model.training is training


@pytest.mark.parametrize("targets", [["qkv_proj", "down_proj"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("geometry", ["gqa", "tied"])
def test_loss_through_an_adapter(
    checkpoints: Callable[[str], Path], split: Split, geometry: str, targets: list[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3ForCausalLM

    base = Phi3ForCausalLM.from_pretrained(
        checkpoints(geometry), dtype=torch.float32, attn_implementation=attention.register()
    )
    expected_base = loss_of_transformers(base, split.rows)
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(0)
    tuned = get_peft_model(base, config).train()
    found = mean_loss(tuned, split.rows, 3)
    with tuned.disable_adapter():
        found_base = mean_loss(tuned, split.rows, 3)
    assert tuned.training
    assert found_base == pytest.approx(expected_base, abs=1e-5)
    assert found == pytest.approx(loss_of_transformers(tuned, split.rows), abs=1e-5)
    assert abs(found - found_base) > 1e-2


def test_model_trains_after_its_loss_was_measured(model: Any, split: Split) -> None:
    """Nothing made in inference mode stays behind in the model."""
    mean_loss(model, split.rows, 4)
    row = split.rows[0]
    model.train()
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    model(input_ids=ids, labels=labels).loss.backward()
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    model.zero_grad()


# --- shapes of JSON


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ('{"a": 1, "b": 2}', ("dict", {"a", "b"})),
        ('{"b": null,\n "a": [1]}', ("dict", {"a", "b"})),
        (' {"a": {"c": 1}} \n', ("dict", {"a"})),
        ('{"é": 1}', ("dict", {"é"})),
        ('{"\\u00e9": 1}', ("dict", {"é"})),
        ("{}", ("dict", set())),
        ("[]", ("list", set())),
        ('[{"a": 1}, 2]', ("list", set())),
        ("7", ("int", set())),
        ("7.0", ("float", set())),
        ("true", ("bool", set())),
        ("null", ("NoneType", set())),
        ('"text"', ("str", set())),
    ],
)
def test_json_shape(text: str, shape: tuple[str, set[str]]) -> None:
    assert json_shape(text) == shape


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "text",
        "{'a': 1}",
        '{"a": 1',
        '{"a": 1,}',
        '{"a": 1} done',
        '{"a": 1}{"b": 2}',
        '```json\n{"a": 1}\n```',
        '{"a": 1, "a": 1}',
        '{"b": {"a": 1, "a": 2}}',
        "NaN",
        '{"a": NaN}',
        "[Infinity]",
        "-Infinity",
        "[" * 100_000,
        pytest.param("7" * 5000, id="more digits than Python reads"),
        "\ufeff{}",
    ],
)
def test_not_json(text: str) -> None:
    assert json_shape(text) is None


# --- metrics, with a model that always answers "{}"


@pytest.fixture(scope="module")
def parrot(checkpoints: Callable[[str], Path]) -> Any:
    """Layers that add nothing and a head that knows one successor: <|assistant|> -> { -> } -> <|end|>."""
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(
        checkpoints("untied"), dtype=torch.float32, attn_implementation=attention.register()
    )
    chain = [ASSISTANT, *TOKENIZER.encode("{}"), END]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, successor in pairwise(chain):
            model.lm_head.weight[successor] = model.model.embed_tokens.weight[token]
    return model


def answers(folder: Path, *expected: str) -> Split:
    """One row per expected answer."""
    path = folder / "eval.jsonl"
    rows = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": text}]
        for i, text in enumerate(expected)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return data.load(Data(train=Source(path=str(path))), TOKENIZER).train


def measured(model: Any, split: Split, *metrics: str, samples: int = 32, limit: int = 8) -> Any:
    settings = Evaluate(metrics=metrics, samples=samples, max_new_tokens=limit)
    return measure(model, TOKENIZER, split, settings, END, batch_rows=2, batch_tokens=4096)


@pytest.mark.parametrize(
    ("expected", "exact", "shape"),
    [
        ("{}", True, True),
        (" \n{} \t\n", True, True),
        ("{ }", False, True),
        ('{"a": 1}', False, False),
        ("[]", False, False),
        ("hello", False, False),
        ("{}{}", False, False),
    ],
)
def test_matches(parrot: Any, tmp_path: Path, expected: str, exact: bool, shape: bool) -> None:
    found = measured(parrot, answers(tmp_path, expected), "exact_match", "json_match")
    assert found.metrics == {"exact_match": float(exact), "json_match": float(shape)}
    [sample] = found.samples
    assert (sample.answer, sample.expected, sample.stopped) == ("{}", expected, True)
    assert (sample.exact_match, sample.json_match) == (exact, shape)
    assert sample.prompt == "question 0"
    assert sample.place == f"{tmp_path / 'eval.jsonl'}:1"


def test_answer_that_is_no_json_matches_nothing(parrot: Any, tmp_path: Path) -> None:
    """Cut after one token it is `{`: equal to the expected text, but no JSON."""
    found = measured(parrot, answers(tmp_path, "{", "hello"), "exact_match", "json_match", limit=1)
    assert found.metrics == {"exact_match": 0.5, "json_match": 0.0}
    assert [sample.stopped for sample in found.samples] == [False, False]


def test_shares(parrot: Any, tmp_path: Path) -> None:
    split = answers(tmp_path, "{}", "[]", "{ }", "no", "{}")
    assert measured(parrot, split, "exact_match", "json_match").metrics == {
        "exact_match": 2 / 5,
        "json_match": 3 / 5,
    }


@pytest.mark.parametrize(
    "metrics",
    [
        ("loss",),
        ("perplexity",),
        ("exact_match",),
        ("json_match", "loss"),
        ("perplexity", "json_match", "loss", "exact_match"),
    ],
)
def test_metrics_are_those_asked_for_in_order(parrot: Any, tmp_path: Path, metrics: tuple[str, ...]) -> None:
    found = measured(parrot, answers(tmp_path, "{}", "[]"), *metrics)
    assert list(found.metrics) == list(metrics)
    assert len(found.samples) == 2 and not found.no_samples
    assert found.to_json()["metrics"] == found.metrics
    assert json.loads(json.dumps(found.to_json()))["samples"] == [vars(sample) for sample in found.samples]


@pytest.mark.parametrize("samples", [1, 32])
def test_the_loss_is_of_all_rows_whatever_is_answered(model: Any, split: Split, samples: int) -> None:
    heard: list[int] = []
    settings = Evaluate(metrics=("loss", "perplexity"), samples=samples, max_new_tokens=2)
    at_once = {"batch_rows": 5, "batch_tokens": 4096}
    found = measure(model, TOKENIZER, split, settings, END, **at_once, scored=heard.append).metrics
    assert found["loss"] == pytest.approx(loss_of_transformers(model, split.rows), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert heard[-1] == len(split.rows) == 12


# --- which rows are answered


def test_the_seed_draws_the_rows_that_are_answered(parrot: Any, tmp_path: Path) -> None:
    split = answers(tmp_path, *(str(number) for number in range(40)))

    def drawn(seed: int, samples: int = 5) -> list[int]:
        settings = Evaluate(metrics=("exact_match",), samples=samples, max_new_tokens=1)
        at_once = {"batch_rows": 1, "batch_tokens": 4096}
        found = measure(parrot, TOKENIZER, split, settings, END, **at_once, seed=seed)
        return [int(sample.expected) for sample in found.samples]

    first, second = drawn(1), drawn(2)
    assert first == drawn(1) == sorted(first) and len(set(first)) == 5
    assert first != second and first != list(range(5))
    assert set(first) < set(drawn(1, samples=9)), "more samples hold the fewer"
    assert drawn(1, samples=99) == list(range(40))


@pytest.mark.parametrize(("samples", "num"), [(1, 3), (5, 5), (32, 8)])
def test_without_metrics_of_answers_a_few_are_made_to_look_at(
    parrot: Any, tmp_path: Path, samples: int, num: int
) -> None:
    split = answers(tmp_path, *["{}"] * 20)
    found = measured(parrot, split, "loss", samples=samples, limit=4)
    assert [sample.answer for sample in found.samples] == ["{}"] * num
    assert list(found.metrics) == ["loss"] and found.no_samples == ""


def test_why_there_are_no_answers_to_look_at(
    parrot: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "Once upon a time."}\n')
    plain = data.load(Data(train=Source(path=str(path))), TOKENIZER).train
    assert "plain text" in measured(parrot, plain, "loss").no_samples

    split = answers(tmp_path, "{}")
    settings = Evaluate(metrics=("loss",), max_new_tokens=64)
    at_once = {"batch_rows": 1, "batch_tokens": 70}
    assert "leaves room" in measure(parrot, TOKENIZER, split, settings, END, **at_once).no_samples

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(generate, "_answer_batch", full)
    found = measured(parrot, split, "loss")
    assert found.samples == () and "out of memory" in found.to_json()["no_samples"]
    with pytest.raises(FitError, match="out of memory"):
        measured(parrot, split, "loss", "exact_match")


def test_a_loss_in_the_middle_of_a_training_is_of_a_bounded_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = answers(tmp_path, *(str(number) for number in range(9)))
    assert list(evaluate.scored_rows(split, 1)) == list(split.rows)
    monkeypatch.setattr(evaluate, "SCORED_ROWS", 4)
    found = [row.place for row in evaluate.scored_rows(split, 1)]
    assert len(set(found)) == 4 and found != [row.place for row in evaluate.scored_rows(split, 2)]


# --- what limits a metric


LONG = "x" * 9


@pytest.mark.parametrize(
    ("metrics", "expected", "notes"),
    [
        (["exact_match", "json_match"], ["{}", '{"a": 1}'], []),
        (["loss"], [LONG], []),
        (
            ["exact_match"],
            [LONG, LONG + "yz"],
            [
                "exact_match can only be 0%: all 2 expected answers are longer than "
                "evaluate.max_new_tokens 8: the longest has 11 tokens. Raise it to 12."
            ],
        ),
        (
            ["exact_match", "json_match"],
            ['{"a": 12}', "[]", "[]", "{}"],
            [
                "exact_match can be 75.0% at most and json_match hardly more: 1 of 4 expected answers is "
                "longer than evaluate.max_new_tokens 8: the longest has 9 tokens. Raise it to 10."
            ],
        ),
        (
            ["json_match"],
            ["no", "{}"],
            ["json_match can be 50.0% at most: 1 of 2 expected answers is not JSON"],
        ),
        (["json_match"], ["no"], ["json_match can only be 0%: the expected answer is not JSON"]),
    ],
)
def test_a_metric_that_cannot_be_reached_says_why(
    parrot: Any, tmp_path: Path, metrics: list[str], expected: list[str], notes: list[str]
) -> None:
    found = measured(parrot, answers(tmp_path, *expected), *metrics)
    settings = Evaluate(metrics=tuple(metrics), max_new_tokens=8)
    assert evaluate.reservations(found, settings) == notes


def test_cut_answers_and_endless_perplexities_are_told(parrot: Any, tmp_path: Path) -> None:
    found = measured(parrot, answers(tmp_path, "{", "{"), "perplexity", "exact_match", limit=1)
    found = replace(found, metrics=found.metrics | {"perplexity": evaluate._exp(1000.0)})
    settings = Evaluate(metrics=("perplexity", "exact_match"), max_new_tokens=1)
    endless, cut = evaluate.reservations(found, settings)
    assert "perplexity is more than a number can hold" in endless
    assert cut == "2 of 2 answers of the tuned model were cut at evaluate.max_new_tokens 1"
    assert found.to_json()["metrics"] == {"perplexity": None, "exact_match": 1.0}


def test_progress_counts_answers(parrot: Any, tmp_path: Path) -> None:
    heard: list[int] = []
    settings = Evaluate(metrics=("exact_match",), max_new_tokens=4)
    measure(
        parrot,
        TOKENIZER,
        answers(tmp_path, "a", "b", "c"),
        settings,
        END,
        batch_rows=1,
        batch_tokens=4096,
        done=heard.append,
    )
    assert heard[-1] == 3
