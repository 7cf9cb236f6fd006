"""Batched answers are those of a plain greedy loop over one prompt, cut where the first stop token stands."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_checkpoint, phi3_tokenizer

from qlora_phi3 import generate
from qlora_phi3.generate import Answer, answer, stop_ids

TOKENIZER = phi3_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|end|>")
NEW = 8
PROMPTS = [TOKENIZER.encode(text) for text in ["hello there", "a", "what?", "x" * 40, "bb", "yes or no"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With this seed it answers every prompt with several different tokens."""
    return make_checkpoint(tmp_path_factory.mktemp("talkative") / "base", "untied", seed=6)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """In float32, in which padding changes no greedy choice; its random weights never stop by themselves."""
    from transformers import Phi3ForCausalLM

    return Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def greedy(model: Any) -> list[list[int]]:
    """Each prompt's next NEW tokens: one prompt, no padding, no cache."""
    found = []
    model.eval()
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def cut(ids: list[int], stops: list[int], limit: int) -> Answer:
    """The answer that greedy `ids` stand for."""
    ids = ids[:limit]
    at = next((i for i, token in enumerate(ids) if token in stops), None)
    text = TOKENIZER.decode(ids[:at], skip_special_tokens=True)
    return Answer(text, len(ids) if at is None else at + 1, at is not None)


def test_the_random_model_says_different_things(greedy: list[list[int]]) -> None:
    """Otherwise the tests below would not see a wrong order or a wrong prompt."""
    assert len({tuple(ids) for ids in greedy}) == len(PROMPTS)
    assert all(len(set(ids)) > 1 for ids in greedy)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 4096])
@pytest.mark.parametrize("limit", [1, 5, NEW])
def test_batched_answers(model: Any, greedy: list[list[int]], batch_tokens: int, limit: int) -> None:
    stops = [TOKENIZER.eos_token_id, END]  # the eos pads, too: the mask must not be guessed from it
    found = answer(model, TOKENIZER, PROMPTS, stops=stops, max_new_tokens=limit, batch_tokens=batch_tokens)
    assert found == [cut(ids, stops, limit) for ids in greedy]
    assert all(given.num_tokens == limit and not given.stopped for given in found)


@pytest.mark.parametrize("at", [0, 3, NEW - 1])
def test_stop_tokens_end_an_answer(model: Any, greedy: list[list[int]], at: int) -> None:
    stops = sorted({greedy[0][at], greedy[2][1]})
    found = answer(model, TOKENIZER, PROMPTS, stops=stops, max_new_tokens=NEW, batch_tokens=4096)
    assert found == [cut(ids, stops, NEW) for ids in greedy]
    assert found[0].stopped
    assert found[0].num_tokens <= at + 1
    assert {given.stopped for given in found} == {True, False}, "others go on in the same batch"


@pytest.mark.parametrize("at", [0, 2])
def test_nothing_is_computed_after_the_last_stop(model: Any, greedy: list[list[int]], at: int) -> None:
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        [found] = answer(
            model, TOKENIZER, PROMPTS[:1], stops=[greedy[0][at]], max_new_tokens=NEW, batch_tokens=4096
        )
    finally:
        hook.remove()
    assert len(passes) == found.num_tokens == greedy[0].index(greedy[0][at]) + 1


def test_the_end_of_turn_stops_and_is_not_shown(folder: Path, greedy: list[list[int]]) -> None:
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = greedy[0]
    at = next(i for i in range(1, NEW) if ids[i] not in ids[:i])
    head = model.lm_head.weight.data
    head[[END, ids[at]]] = head[[ids[at], END]]  # now it says <|end|> in that place
    [found] = answer(model, TOKENIZER, PROMPTS[:1], stops=[END], max_new_tokens=NEW, batch_tokens=4096)
    assert found == Answer(TOKENIZER.decode(ids[:at], skip_special_tokens=True), at + 1, True)
    [found] = answer(
        model,
        TOKENIZER,
        PROMPTS[:1],
        stops=[TOKENIZER.eos_token_id],
        max_new_tokens=at + 1,
        batch_tokens=4096,
    )
    assert (found.num_tokens, found.stopped) == (at + 1, False)
    assert "<|end|>" not in found.text


def test_spaces_of_an_answer_are_kept() -> None:
    ids = TOKENIZER.encode(" a , b .\n do n't ")
    assert generate._decode(TOKENIZER, [*ids, END, 7], [END]) == Answer(
        " a , b .\n do n't ", len(ids) + 1, True
    )


@pytest.mark.parametrize("batch_tokens", [1, 30, 60, 200, 10_000])
def test_batches(batch_tokens: int) -> None:
    """Every prompt once, no batch above the limit unless it is a single prompt, none that could be joined."""
    batches = list(generate._batches(PROMPTS, NEW, batch_tokens))

    def size(batch: list[int]) -> int:
        return len(batch) * (max(len(PROMPTS[i]) for i in batch) + NEW)

    assert sorted(i for batch in batches for i in batch) == list(range(len(PROMPTS)))
    assert all(len(batch) == 1 or size(batch) <= batch_tokens for batch in batches)
    assert all(size([*batch, following[0]]) > batch_tokens for batch, following in pairwise(batches))


def test_what_may_outgrow_longropes_context_is_answered_alone() -> None:
    batches = list(generate._batches(PROMPTS, NEW, 10_000, context=len(PROMPTS[0]) + NEW - 1))
    assert [len(batch) for batch in batches] == [4, 1, 1]
    assert batches[1:] == [[0], [3]]


def test_done_hears_of_every_batch(model: Any) -> None:
    sizes = [len(batch) for batch in generate._batches(PROMPTS, 1, 40)]
    assert len(sizes) > 1
    heard: list[int] = []
    answer(model, TOKENIZER, PROMPTS, stops=[END], max_new_tokens=1, batch_tokens=40, done=heard.append)
    assert heard == [sum(sizes[: i + 1]) for i in range(len(sizes))]


def test_no_prompts(model: Any) -> None:
    assert answer(model, TOKENIZER, [], stops=[END], max_new_tokens=NEW, batch_tokens=4096) == []


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(model: Any, training: bool) -> None:
    def fail(num_done: int) -> None:
        raise KeyboardInterrupt

    model.train(training)
    answer(model, TOKENIZER, PROMPTS[:1], stops=[END], max_new_tokens=1, batch_tokens=4096)
    assert model.training is training
    with pytest.raises(KeyboardInterrupt):
        answer(model, TOKENIZER, PROMPTS[:1], stops=[END], max_new_tokens=1, batch_tokens=4096, done=fail)
    assert model.training is training


def test_dropout_is_off(model: Any, greedy: list[list[int]]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3ForCausalLM

    copy = Phi3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    config = LoraConfig(r=4, lora_dropout=0.9, target_modules=["qkv_proj"], init_lora_weights=False)
    tuned = get_peft_model(copy, config).train()
    first, second = (
        answer(tuned, TOKENIZER, PROMPTS, stops=[END], max_new_tokens=NEW, batch_tokens=4096)
        for _ in range(2)
    )
    assert first == second
    assert first != [cut(ids, [END], NEW) for ids in greedy], "the adapter says something else"
    with tuned.disable_adapter():
        base = answer(tuned, TOKENIZER, PROMPTS, stops=[END], max_new_tokens=NEW, batch_tokens=4096)
    assert base == [cut(ids, [END], NEW) for ids in greedy]
    assert tuned.training


@pytest.mark.parametrize(
    ("eos", "from_model", "end", "stops"),
    [
        (256, 256, 259, [256, 259]),
        (256, [256, 5, 259], 259, [5, 256, 259]),
        (None, [5], 259, [5, 259]),
        (None, None, 259, [259]),
        (256, None, 256, [256]),
    ],
)
def test_stop_ids(eos: int | None, from_model: Any, end: int, stops: list[int]) -> None:
    tokenizer = SimpleNamespace(eos_token_id=eos)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=from_model))
    assert stop_ids(tokenizer, model, end) == stops


def test_stop_ids_of_a_checkpoint(model: Any) -> None:
    assert stop_ids(TOKENIZER, model, END) == sorted({TOKENIZER.eos_token_id, END})


def test_the_head_gets_its_input_in_one_piece(model: Any) -> None:
    # of a slice, torch on a CPU makes a copy of the head for each prompt
    head, pieces = model.get_output_embeddings(), []
    seen = head.register_forward_hook(lambda _, args, out: pieces.append(args[0].is_contiguous()))
    try:
        answer(model, TOKENIZER, PROMPTS, stops=[END], max_new_tokens=2, batch_tokens=10_000)
        assert pieces and all(pieces)
        model(torch.tensor([PROMPTS[0]] * 2), logits_to_keep=1)
        assert not pieces[-1], "without us, it would be a slice still"
    finally:
        seen.remove()
    assert not head._forward_pre_hooks
