"""Out of memory: what is tried next, that nothing of a try stays, that the losses are the settled run's."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_lab import recipe as in_memory
from pairs import every_pair
from rich.console import Console
from test_pipeline import KEPT
from test_trainer import quiet, ready

from qlora_phi3 import cli, evaluate, generate, pipeline, trainer
from qlora_phi3.engine.documents import Documents, hidden_states
from qlora_phi3.engine.offload import Parking
from qlora_phi3.errors import FitError
from qlora_phi3.ladder import Adapted, Halving, Ladder, RandomState, RanOut, lower, ran_out, tried
from qlora_phi3.meter import Meter
from qlora_phi3.progress import Display
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import load_recipe

# Which errors mean it


def real_error() -> RuntimeError:
    """What torch says when the computer has no more memory."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "means_it"),
    [
        (real_error(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_which_errors_mean_out_of_memory(error: Exception, means_it: bool) -> None:
    assert ran_out(error) == means_it


def test_other_errors_go_on_their_way() -> None:
    def wrong() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        tried(wrong)


def test_a_failed_try_holds_no_tensor() -> None:
    alive: list[Any] = []

    def work() -> None:
        large = torch.zeros(100)
        alive.append(weakref.ref(large))
        torch.empty(2**56, dtype=torch.uint8)

    found = tried(work)
    assert isinstance(found, RanOut) and "can't allocate memory" in found.said
    assert alive[0]() is None


def test_a_failed_backward_holds_no_tensor() -> None:
    """Tasks that torch had queued when it failed would hold the branches that were not gone through."""
    alive: list[Any] = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            always()

    def work() -> None:
        start = torch.ones(100, requires_grad=True)
        saved = start.exp()
        alive.append(weakref.ref(saved))
        branch = saved.sin()
        (branch + Fails.apply(start)).sum().backward()

    with torch.inference_mode():  # as where an evaluation fails
        assert isinstance(tried(lambda: always()), RanOut)
    assert isinstance(tried(work), RanOut)
    assert alive[0]() is None


# The order


def rungs(settings: Recipe, *, host_apart: bool = True) -> list[str]:
    found = []
    while (lowered := lower(settings, host_apart=host_apart)) is not None:
        settings, change = lowered
        found.append(change)
        assert settings.train.effective_batch % int(settings.train.micro_batch) == 0
    return found


@pytest.mark.parametrize(
    ("effective", "micro", "sizes"),
    [(16, 16, [8, 4, 2, 1]), (12, 12, [6, 3, 1]), (9, 9, [3, 1]), (7, 7, [1]), (15, 5, [1]), (4, 1, [])],
)
def test_the_micro_batch_goes_down_to_divisors_then_the_rest(
    effective: int, micro: int, sizes: list[int]
) -> None:
    settings = in_memory(
        train__effective_batch=effective, train__micro_batch=micro, train__activations="keep"
    )
    before = [micro, *sizes]
    assert rungs(settings) == [
        *(f"train.micro_batch={new} instead of {old}" for old, new in zip(before, sizes, strict=False)),
        "train.activations=recompute instead of keep",
        "train.activations=offload instead of recompute",
        "train.logit_tokens=256 instead of 1024",
    ]
    assert rungs(settings, host_apart=False) == [rung for rung in rungs(settings) if "offload" not in rung]


def test_fewer_layers_are_kept_before_anything_is_offloaded() -> None:
    keys = {"train__effective_batch": 1, "train__micro_batch": 1, "train__logit_tokens": 256}
    settings = in_memory(**keys, train__activations="keep", train__kept_layers=5, train__engine="native")
    assert rungs(settings) == [
        "train.activations=recompute instead of keep, train.kept_layers=2 instead of 5",
        "train.kept_layers=1 instead of 2",
        "train.kept_layers=0 instead of 1",
        "train.activations=offload instead of recompute",
    ]
    attention = settings.settled(activations="recompute", kept_layers=0, keep_attention=True)
    assert rungs(attention)[0] == "train.keep_attention=False instead of True"


def test_what_is_low_already_stays() -> None:
    low = {"train__micro_batch": 1, "train__activations": "offload"}
    assert rungs(in_memory(**low, train__logit_tokens=256)) == []
    assert rungs(in_memory(**low, train__logit_tokens=100)) == []
    assert rungs(in_memory(**low)) == ["train.logit_tokens=256 instead of 1024"]


# A try leaves nothing behind


def test_random_numbers_are_given_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    state = RandomState.now()
    first = draw()
    state.restore()
    assert draw() == first


def test_every_try_begins_alike_and_the_ladder_stays_down() -> None:
    settings = in_memory(train__micro_batch=4, train__effective_batch=4)
    told: list[tuple[Adapted, int]] = []
    ladder = Ladder(settings, lambda event, new: told.append((event, int(new.train.micro_batch))))
    drawn: list[float] = []
    forgotten: list[None] = []

    def work() -> int:
        drawn.append(float(torch.rand(())))
        if int(ladder.recipe.train.micro_batch) > 1:
            raise torch.OutOfMemoryError("full\nof words")
        return 7

    assert ladder.take("step 3", work, lambda: forgotten.append(None)) == 7
    assert drawn == [drawn[0]] * 3
    assert len(forgotten) == 2
    assert [size for _, size in told] == [2, 1]
    assert told[0][0] == Adapted("step 3", "train.micro_batch=2 instead of 4", "full")
    assert ladder.take("step 4", work, lambda: forgotten.append(None)) == 7
    assert len(told) == 2 and drawn[-1] != drawn[0]


def always(*_: Any) -> Any:
    raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"memory__on_oom": "fail"}, "step 3: out of memory: full Lower train.micro_batch"),
        ({}, "step 3: out of memory with one row, offloaded, and 256 tokens' logits at once: full"),
    ],
)
def test_where_nothing_smaller_is_left_or_wanted_it_ends(keys: dict[str, Any], said: str) -> None:
    whole = {"train__micro_batch": 4, "train__effective_batch": 4, "train__activations": "keep"}
    ladder = Ladder(in_memory(**whole, **keys), lambda *_: None)
    with pytest.raises(FitError) as caught:
        ladder.take("step 3", always, lambda: None)
    assert str(caught.value).startswith(said)
    assert caught.value.exit_code == 4


# Evaluations


def cut(rest: Any, size: int) -> Iterator[Any]:
    for at in range(0, len(rest), size):
        yield rest[at : at + size]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("size", [1, 4, 11, 20])
def test_halving_takes_every_item_once_in_order(size: int, most: int) -> None:
    told: list[int] = []
    halving = Halving(size, lambda smaller, said: told.append(smaller))
    tries: list[int] = []

    def take(group: list[int]) -> list[int]:
        tries.append(len(group))
        return group if len(group) <= most else always()

    found = list(halving.each(list(range(11)), cut, take))
    assert [item for group in found for item in group] == list(range(11))
    assert max(map(len, found)) <= most
    assert told == sorted(told, reverse=True)
    assert sum(n > most for n in tries) == len(told), "a size that failed is not tried again"
    assert list(halving.each([0] * 5, cut, take)) and sum(n > most for n in tries) == len(told)


@pytest.mark.parametrize("halving", [Halving(4), Halving.of(4), Halving(4, lambda *_: None)])
def test_halving_ends_at_one_item_or_where_it_is_not_wanted(halving: Halving) -> None:
    with pytest.raises(FitError, match="evaluation: out of memory"):
        list(halving.each([1, 2, 3, 4, 5], cut, always))


# Real training


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        plain = ["data.packing=false", "train.effective_batch=8", "train.micro_batch=8", "train.max_steps=5"]
        return load_recipe(write_recipe(), [*plain, *overrides])

    return make


class Limit:
    """Takes the place of `hidden_states` in the trainer: out of memory, after a forward, above a limit."""

    def __init__(self, too_much: Callable[[int, trainer.PhiTrainer], bool]) -> None:
        self.too_much, self.failed = too_much, 0
        self.trainer: Any = None

    def __call__(self, causal: Any, documents: Documents) -> torch.Tensor:
        found = hidden_states(causal, documents)
        if self.too_much(documents.num_tokens, self.trainer):
            torch.rand(3), random.random(), np.random.random()  # a try may draw what it likes
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return found


def failing(step: int, times: int) -> Limit:
    """Out of memory so often after as many steps."""
    limit = Limit(lambda _, made: made.state.global_step == step and limit.failed < times)
    return limit


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[list[dict[str, Any]], list[Adapted], Recipe]]:
    """Trains with a `Limit`: the lines of metrics.jsonl, what happened, the recipe as it ended."""
    runs = iter(range(100))

    def run(
        settings: Recipe, limit: Limit | None = None, change: Callable[[Any], None] | None = None
    ) -> tuple[list[dict[str, Any]], list[Adapted], Recipe]:
        out = tmp_path / f"run{next(runs)}"
        out.mkdir()
        tuned, base, splits = ready(settings)
        events: list[Adapted] = []
        recipes = [settings]
        build = trainer.build

        def built(*arguments: Any) -> Any:
            made = build(*arguments)
            if limit is not None:
                limit.trainer = made
            if change is not None:
                change(made)
            return made

        def adapted(event: Adapted, new: Recipe) -> None:
            events.append(event)
            recipes.append(new)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "build", built)
            patch.setattr(trainer, "hidden_states", limit or hidden_states)
            meter = Meter("cpu")
            with meter.phase("train"):
                trainer.train(
                    tuned, base, splits.train, settings, out, meter=meter, display=quiet(), adapted=adapted
                )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return lines, events, recipes[-1]

    return run


FLOAT32 = ["model.compute_dtype=float32", "model.quantization=none", "train.optimizer=adamw_torch"]
QLORA = ["train.optimizer=adamw_8bit", "adapter.rank=16"]
BASES = {"float32": FLOAT32, "nf4": QLORA}
ROW_BY_ROW = ["train.effective_batch=2", "train.micro_batch=1", "train.max_steps=4", "adapter.dropout=0.3"]
COUNTS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens")


def curve(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in COUNTS) for line in lines]


def full_pass(settings: Recipe) -> int:
    """Tokens of the fullest pass of these rows at the recipe's micro batch."""
    _, _, splits = ready(settings)
    lengths = sorted((len(row.input_ids) for row in splits.train.rows), reverse=True)
    return sum(lengths[: int(settings.train.micro_batch)])


@every_pair("base, dropout, activations", BASES, [0.0, 0.3], ["keep", "recompute"])
def test_from_before_step_1_the_run_is_the_settled_one(
    recipe: Callable[..., Recipe], train: Any, base: str, dropout: float, activations: str
) -> None:
    settings = recipe(*BASES[base], f"adapter.dropout={dropout}", f"train.activations={activations}")
    most = full_pass(settings.settled(micro_batch=2))
    limit = Limit(lambda tokens, _: tokens > most)
    lines, events, settled = train(settings, limit)
    assert [event.place for event in events] == ["before step 1"] * 2 and limit.failed == 2
    assert settled == settings.settled(micro_batch=2)
    again, nothing, _ = train(settled)
    assert nothing == [] and curve(lines) == curve(again)
    if dropout:
        assert curve(lines) != curve(train(settings)[0]), "the size of passes decides what is dropped"


@every_pair("base, packing", BASES, ["true", "false"])
def test_from_the_middle_on_the_run_is_one_that_changed_there(
    recipe: Callable[..., Recipe], train: Any, base: str, packing: str
) -> None:
    """Steps 1 and 2 as before, from step 3 on as if the smaller passes had been set between the two."""
    keys = ["adapter.dropout=0.3", "data.max_length=100", f"data.packing={packing}"]
    settings = recipe(*BASES[base], *keys)
    smaller = settings.settled(micro_batch=4)

    def too_much(tokens: int, made: trainer.PhiTrainer) -> bool:
        return bool(made.state.global_step == 2 and made.layout.micro_batch == 8)

    def change(made: trainer.PhiTrainer) -> None:
        begin = made.watch.on_step_end

        def on_step_end(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begin(args, state, control, **kwargs)
            if state.global_step == 2:
                made.settle(smaller)

        made.watch.on_step_end = on_step_end  # type: ignore[method-assign]

    lines, events, settled = train(settings, Limit(too_much))
    assert events == [
        Adapted(
            "step 3",
            "train.micro_batch=4 instead of 8",
            "CUDA out of memory. Tried to allocate 1.00 GiB.",
        )
    ]
    assert settled == smaller
    assert curve(lines) == curve(train(settings, change=change)[0])
    plain = curve(train(settings)[0])
    assert curve(lines)[:2] == plain[:2]
    if packing == "false":  # packed, the step's rows fit into half of the room as well
        assert curve(lines)[2:] != plain[2:], "dropout differs by how rows pass"


def test_fewer_kept_layers_change_no_loss(recipe: Callable[..., Recipe], train: Any) -> None:
    keys = ["train.activations=keep", "train.kept_layers=2", "train.engine=reference"]
    settings = recipe(*FLOAT32, *ROW_BY_ROW, *keys)
    limit = failing(2, times=2)
    lines, events, settled = train(settings, limit)
    assert [event.change for event in events] == [
        "train.activations=recompute instead of keep, train.kept_layers=1 instead of 2",
        "train.kept_layers=0 instead of 1",
    ]
    assert settled == settings.settled(activations="recompute", kept_layers=0)
    half = settings.settled(activations="recompute", kept_layers=1)
    assert curve(lines) == curve(train(settings)[0]) == curve(train(settled)[0]) == curve(train(half)[0])


@pytest.mark.parametrize("base", BASES)
def test_the_last_rungs_change_no_loss(recipe: Callable[..., Recipe], train: Any, base: str) -> None:
    """Recomputing is bit-equal, from the first step or from a later one; chunks of logits are rows of one."""
    settings = recipe(*BASES[base], *ROW_BY_ROW, "train.activations=keep")
    expected = settings.settled(activations="recompute", logit_tokens=256)
    plain = curve(train(settings)[0])
    assert plain == curve(train(expected)[0])
    for step in (0, 2):
        limit = failing(step, times=2)
        lines, events, settled = train(settings, limit)
        assert [event.change.split("=")[0] for event in events] == ["train.activations", "train.logit_tokens"]
        assert settled == expected and curve(lines) == plain
        assert limit.trainer.model.is_activation_checkpointing


@pytest.mark.parametrize("base", BASES)
def test_offloading_changes_no_loss(recipe: Callable[..., Recipe], train: Any, base: str) -> None:
    """As a rung from the full pass or a later step on, and from the beginning; as on a card."""
    settings = recipe(*BASES[base], *ROW_BY_ROW, "train.activations=recompute")
    expected = settings.settled(activations="offload")
    plain = curve(train(settings)[0])
    assert plain == curve(train(expected)[0])
    for step in (0, 2):
        limit = failing(step, times=1)
        lines, events, settled = train(settings, limit, lambda made: setattr(made.ladder, "host_apart", True))
        assert [event.change for event in events] == ["train.activations=offload instead of recompute"]
        assert settled == expected and curve(lines) == plain
        layers = limit.trainer.model.get_base_model().model.layers
        assert all(isinstance(layer._gradient_checkpointing_func, Parking) for layer in layers)


def test_the_full_pass_before_step_1_leaves_nothing(
    recipe: Callable[..., Recipe], train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against runs without it, in every dtype, with dropout."""
    for base in (FLOAT32, QLORA, ["model.compute_dtype=float32"]):
        settings = recipe(*base, "adapter.dropout=0.3")
        with_it = curve(train(settings)[0])
        with monkeypatch.context() as patch:
            patch.setattr(trainer.PhiTrainer, "calibrate", lambda self: setattr(self, "calibration", None))
            assert curve(train(settings)[0]) == with_it


def test_fail_ends_before_the_first_step(recipe: Callable[..., Recipe], train: Any) -> None:
    with pytest.raises(FitError, match=r"before step 1: out of memory: CUDA out of memory\. Tried"):
        train(recipe("memory.on_oom=fail"), Limit(lambda *_: True))
    with pytest.raises(FitError, match="with one row, recomputed, and 256 tokens' logits at once"):
        train(recipe(), Limit(lambda *_: True))


class Full(torch.optim.AdamW):
    """Runs out of memory where states are made."""

    def step(self, closure: Any = None) -> None:
        always()


def test_the_optimizers_step_has_nothing_smaller(
    recipe: Callable[..., Recipe], train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(self: Any, model: Any = None) -> Any:
        self.optimizer = Full([p for p in self.model.parameters() if p.requires_grad])
        return self.optimizer

    monkeypatch.setattr(trainer.PhiTrainer, "create_optimizer", create)
    with pytest.raises(FitError, match="step 1: out of memory in the optimizer's step: full No smaller pass"):
        train(recipe())


# Evaluations of a real model


def test_a_loss_is_the_same_however_often_it_is_halved(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, _, splits = ready(recipe(*FLOAT32))
    rows = splits.train.rows
    whole = evaluate.mean_loss(tuned, rows, 12)
    told: list[int] = []
    most = 3 * max(len(row.input_ids) for row in rows)

    def limited(causal: Any, documents: Documents) -> torch.Tensor:
        return hidden_states(causal, documents) if documents.num_tokens <= most else always()

    monkeypatch.setattr(evaluate, "hidden_states", limited)
    halving = Halving(12, lambda size, _: told.append(size))
    assert evaluate.mean_loss(tuned, rows, halving) == pytest.approx(whole, rel=1e-6)
    assert told and halving.size == told[-1] <= 6
    assert tuned.training
    with pytest.raises(FitError, match="evaluation: out of memory"):
        evaluate.mean_loss(tuned, rows, 12)


def test_answers_are_the_same_however_often_they_are_halved(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base, splits = ready(recipe(*FLOAT32))
    assert splits.eval is not None

    def measure(at_once: int | Halving) -> evaluate.Measured:
        settings = recipe().evaluate
        end = splits.turns.end
        return evaluate.measure(
            tuned, base.tokenizer, splits.eval, settings, end, batch_rows=2, batch_tokens=at_once
        )

    whole, told, tries = measure(4096), [], []
    answer = generate._answer_batch

    def limited(model: Any, tokenizer: Any, prompts: Any, *others: Any) -> Any:
        tries.append(len(prompts))
        return answer(model, tokenizer, prompts, *others) if len(prompts) < 2 else always()

    monkeypatch.setattr(generate, "_answer_batch", limited)
    assert measure(Halving(4096, lambda size, _: told.append(size))) == whole
    assert len(told) == 2 and tries == [4, 2, 1, 1, 1, 1]


# Through the command line


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process, so that its passes can be limited; its exit code."""
    monkeypatch.setattr(sys, "argv", ["qlora-phi3", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_fail_exits_4_with_the_plan(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "hidden_states", Limit(lambda *_: True))
    out = tmp_path / "out"
    code = run_cli(monkeypatch, "recipe", write_recipe(), "memory.on_oom=fail", "--out", out)
    said = capsys.readouterr().err
    assert code == 4 and "Traceback" not in said
    assert "before step 1: out of memory" in said and "set memory.on_oom to adapt" in said
    assert f"{out / 'plan.json'}: predicted" in said and "kept activations" in said
    assert (out / "plan.json").exists() and not (out / "adapter").exists()


def test_what_was_settled_is_written_and_repeats_the_run(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = ["adapter.dropout=0.2", "data.packing=false", "train.micro_batch=4"]
    original = load_recipe(write_recipe(), keys)
    most = full_pass(original.settled(micro_batch=2))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "hidden_states", Limit(lambda tokens, _: tokens > most))
        out = tmp_path / "out"
        assert run_cli(patch, "recipe", write_recipe(), *keys, "--out", out) == 0
    said = capsys.readouterr()
    sentence = "before step 1: out of memory; taken again with train.micro_batch=2 instead of 4"
    assert sentence in said.err and f"note: {sentence}" in said.out
    settled = load_recipe(out / "recipe.yaml")
    assert settled == original.settled(micro_batch=2, engine="native", **KEPT)
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"]["train"]["micro_batch"] == 2
    assert [event["change"] for event in report["memory"]["adapted"]] == ["train.micro_batch=2 instead of 4"]
    assert sentence in report["notes"]
    assert run_cli(monkeypatch, "recipe", out / "recipe.yaml", "--out", tmp_path / "again") == 0
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "again")
    ]
    assert curve(lines[0]) == curve(lines[1])
    adapters = [folder / "adapter/adapter_model.safetensors" for folder in (out, tmp_path / "again")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_evaluations_adapt_too_and_stay_small(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, tries = generate._answer_batch, []

    def limited(model: Any, tokenizer: Any, prompts: Any, *others: Any) -> Any:
        tries.append(len(prompts))
        return answer(model, tokenizer, prompts, *others) if len(prompts) < 3 else always()

    monkeypatch.setattr(generate, "_answer_batch", limited)
    display = Display(Console(file=io.StringIO()))
    done, folder = pipeline.run(load_recipe(write_recipe()), tmp_path / "out", display)
    assert tries == [4, 2, 2, 2, 2], "halved once, before training; after it the size is known"
    (event,) = done.memory["adapted"]
    assert event["place"] == "evaluation" and "tokens of prompts and answers at once" in event["change"]
    assert load_recipe(folder / "recipe.yaml").train.micro_batch == 2
    with pytest.raises(FitError, match="evaluation: out of memory"):
        pipeline.run(load_recipe(write_recipe(), ["memory.on_oom=fail"]), tmp_path / "fails", display)


LIMITED = """
import resource, sys
from pathlib import Path
from qlora_phi3 import cli, trainer

def all_but(room, compare=trainer.compare):
    def limited(*arguments):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))
        return compare(*arguments)
    return limited

trainer.compare = all_but(int(sys.argv.pop(1)))
cli.main()
"""
"""The command, to which the system gives no more than so many bytes once training begins."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_a_computer_out_of_memory(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Really: rows whose pass takes hundreds of megabytes, in a process that may not have them."""
    long = tmp_path / "long.jsonl"
    talk = [{"role": "user", "content": "x" * 240}, {"role": "assistant", "content": "y" * 240}]
    long.write_text((json.dumps({"messages": talk}) + "\n") * 96)
    keys = [f"data.train.path={long}", "data.eval=", "evaluate.metrics=[loss]", "data.max_length=512"]
    keys += ["train.effective_batch=96", "train.micro_batch=96", "train.max_steps=1", "data.packing=false"]
    arguments = ["recipe", str(write_recipe()), *keys, "--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(150 * 2**20), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "before step 1: out of memory; taken again with train.micro_batch=48 instead of 96" in done.stderr
    assert int(load_recipe(tmp_path / "out" / "recipe.yaml").train.micro_batch) <= 48
    first = json.loads(done.stdout)["memory"]["adapted"][0]
    said = ("DefaultCPUAllocator: can't allocate memory", "could not create a primitive")
    assert any(words in first["error"] for words in said)  # torch's allocator's, or oneDNN's
