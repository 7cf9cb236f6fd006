"""The mapping from recipe to TRL, and the invariants of training: what must not change the losses."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import every_pair
from rich.console import Console
from transformers import TrainerCallback

from qlora_phi3 import adapters, data, evaluate, model, progress, trainer, weights
from qlora_phi3.engine import attention
from qlora_phi3.errors import RunError
from qlora_phi3.meter import Meter
from qlora_phi3.progress import Display
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import load_recipe
from qlora_phi3.watch import Watch

CPU = torch.device("cpu")


def ready(recipe: Recipe) -> tuple[Any, model.Base, data.Splits]:
    checkpoint = weights.locate(recipe.model)
    base = model.load(checkpoint, recipe.model, CPU, attention.register())
    torch.manual_seed(recipe.train.seed)
    return adapters.attach(base, recipe), base, data.load(recipe.data, base.tokenizer)


def quiet() -> Display:
    return Display(Console(file=io.StringIO()))


def run(
    recipe: Recipe, out: Path, *, before: Callable[..., None] | None = None, **beside: Any
) -> list[dict[str, Any]]:
    """Train and give back the lines of metrics.jsonl."""
    summary(recipe, out, before=before, **beside)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(
    recipe: Recipe,
    out: Path,
    *,
    before: Callable[..., None] | None = None,
    display: Display | None = None,
    **beside: Any,
) -> trainer.Trained:
    """Train and give back what it came to."""
    out.mkdir(parents=True, exist_ok=True)
    tuned, base, splits = ready(recipe)
    if before is not None:
        before(tuned, base, splits)
    meter, display = Meter("cpu"), display or quiet()
    with meter.phase("train"):
        found, _ = trainer.train(
            tuned, base, splits.train, recipe, out, meter=meter, display=display, **beside
        )
    return found


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(*overrides: str, geometry: str = "gqa") -> Recipe:
        return load_recipe(write_recipe(geometry=geometry), overrides)

    return make


def test_a_line_has_the_promised_keys_and_true_counts(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = recipe()
    lines = run(settings, tmp_path / "a")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(line) == {
            "step",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens",
            "supervised_tokens",
            "tokens_per_second",
            "step_seconds",
            "peak_bytes",
            "rss_bytes",
            "allocated_bytes",
        }
        assert 0 < line["supervised_tokens"] < line["tokens"]
        assert line["peak_bytes"] > 10**8
    _, _, splits = ready(settings)  # 12 rows in 3 steps of 4: every row once
    assert sum(line["tokens"] for line in lines) == splits.train.num_tokens
    assert sum(line["supervised_tokens"] for line in lines) == splits.train.num_supervised


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch"])
def test_training_learns(
    recipe: Callable[..., Recipe], tmp_path: Path, quantization: str, optimizer: str
) -> None:
    settings = recipe(
        f"model.quantization={quantization}", f"train.optimizer={optimizer}", "train.max_steps=20"
    )
    found = losses(run(settings, tmp_path / "a"))
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_accumulation_does_not_change_the_losses(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plain = ["model.compute_dtype=float32", "model.quantization=none", "train.optimizer=adamw_torch"]
    whole, halves, ones = (
        losses(run(recipe(*plain, f"train.micro_batch={n}"), tmp_path / str(n))) for n in (4, 2, 1)
    )
    assert halves == pytest.approx(whole, rel=2e-5)
    assert ones == pytest.approx(whole, rel=2e-5)


def test_recomputing_does_not_change_the_losses(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    keep, recompute = (
        losses(run(recipe(f"train.activations={name}"), tmp_path / name)) for name in ("keep", "recompute")
    )
    assert keep == recompute


def test_the_same_seed_gives_the_same_losses_and_another_does_not(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    dropout = "adapter.dropout=0.2"
    one, again, other = (
        losses(run(recipe(dropout, f"train.seed={seed}"), tmp_path / name))
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert one == again
    assert one != other


def test_evaluating_before_training_changes_nothing(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def look(tuned: Any, base: model.Base, splits: data.Splits) -> None:
        assert splits.eval is not None
        settings = recipe().evaluate
        evaluate.measure(
            tuned, base.tokenizer, splits.eval, settings, splits.turns.end, batch_rows=2, batch_tokens=4096
        )

    plain = losses(run(recipe("train.max_steps=8"), tmp_path / "a"))
    looked = losses(run(recipe("train.max_steps=8"), tmp_path / "b", before=look))
    assert plain == looked


def test_step_loss_is_the_token_mean_over_the_whole_effective_batch(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Rows of unequal length: a mean of micro-batch means would differ."""
    plain = ["model.compute_dtype=float32", "model.quantization=none", "train.optimizer=adamw_torch"]
    settings = recipe(*plain, "train.effective_batch=12", "train.max_steps=1", "train.micro_batch=1")
    (line,) = run(settings, tmp_path / "a")
    tuned, _, splits = ready(settings)
    assert line["loss"] == pytest.approx(evaluate.mean_loss(tuned, splits.train.rows, 12), rel=1e-5)
    means = [evaluate.mean_loss(tuned, [row], 1) for row in splits.train.rows]
    assert abs(line["loss"] - sum(means) / len(means)) > 1e-3


def built(settings: Recipe, out: Path) -> tuple[trainer.PhiTrainer, Any, data.Splits]:
    """A trainer that has not begun, on a model whose adapters are no longer zero."""
    tuned, base, splits = ready(settings)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    meter = Meter("cpu")
    with meter.phase("x"), quiet().steps("t", 1) as steps:
        watch = Watch(settings, meter, steps, io.StringIO(), None)
        return trainer.build(tuned, base, splits.train, settings, out, watch), tuned, splits


def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    """A batch as everybody makes it."""
    width = max(len(row.input_ids) for row in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.input_ids), torch.tensor(row.labels), 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


EXACT = ["model.compute_dtype=float32", "model.quantization=none", "train.optimizer=adamw_torch"]


@every_pair(
    "packing, micro_batch, window, geometry",
    ["packing=true", "packing=false"],
    [1, 4],
    [None, 7],
    ["gqa", "untied"],
)
def test_a_step_is_that_of_stock_transformers(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    packing: str,
    micro_batch: int,
    window: int | None,
    geometry: str,
) -> None:
    """Loss and every gradient of one optimizer step against a padded batch through `model(labels=...)`."""
    keys = [f"data.{packing}", f"train.micro_batch={micro_batch}", "data.max_length=100"]
    settings = recipe(*EXACT, *keys, geometry=geometry)
    ours, tuned, splits = built(settings, tmp_path)
    tuned.config.sliding_window = window
    check_step(ours, tuned, splits)


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch"])
@pytest.mark.parametrize("split_fused", ["true", "false"])
def test_lora_plus_trains_b_faster(
    recipe: Callable[..., Recipe], tmp_path: Path, optimizer: str, split_fused: str
) -> None:
    keys = [f"train.optimizer={optimizer}", f"adapter.split_fused={split_fused}", "train.weight_decay=0.1"]
    ours, tuned, _ = built(recipe(*keys, "train.lora_plus_ratio=8"), tmp_path)
    names = {id(p): name for name, p in tuned.named_parameters() if p.requires_grad}
    groups = ours.create_optimizer().param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            faster = "lora_B" in names[id(parameter)]
            assert group["lr"] == pytest.approx(8e-2 if faster else 1e-2)
            assert group["weight_decay"] == 0.1
    plain, plus = (
        losses(run(recipe(*keys, f"train.lora_plus_ratio={ratio}"), tmp_path / name))
        for ratio, name in (("", "a"), ("8", "b"))
    )
    assert plain[0] == plus[0]
    assert plain[2] != plus[2]  # the first step of a warm-up has learning rate 0


# The embedding and the head


BESIDE = "adapter.targets=[embed_tokens, q, v, down, lm_head]"


@every_pair(
    "targets, split_fused, method, geometry",
    [BESIDE, "adapter.targets=[lm_head]", "adapter.targets=[embed_tokens]"],
    ["true", "false"],
    ["lora", "rslora"],
    ["untied", "tied"],
)
def test_a_step_with_embedding_and_head_is_that_of_stock_transformers(
    recipe: Callable[..., Recipe], tmp_path: Path, targets: str, split_fused: str, method: str, geometry: str
) -> None:
    if split_fused == "false":
        targets = targets.replace("q, v", "qkv_proj")
    keys = [targets, f"adapter.split_fused={split_fused}", f"adapter.method={method}", "train.micro_batch=2"]
    settings = recipe(*EXACT, *keys, geometry=geometry)
    ours, tuned, splits = built(settings, tmp_path)
    torch.manual_seed(5)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    check_step(ours, tuned, splits)


def check_step(ours: trainer.PhiTrainer, tuned: Any, splits: data.Splits) -> None:
    """Loss and every gradient of one optimizer step against a padded batch through `model(labels=...)`."""
    trained = [p for p in tuned.parameters() if p.requires_grad]
    tuned.set_attn_implementation("eager")
    stock = tuned(**padded(list(splits.train.rows[:4]))).loss
    expected = torch.autograd.grad(stock, trained)
    tuned.set_attn_implementation(attention.NAME)
    batch = trainer.Rows(splits.train.rows)([{"row": i} for i in range(4)])
    loss = ours.training_step(tuned, batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(loss, stock.detach(), rtol=1e-5, atol=1e-6)
    for parameter, other in zip(trained, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(parameter.grad, other, rtol=1e-5, atol=1e-5)


def stock_losses(settings: Recipe, tuned: Any, splits: data.Splits, steps: int) -> list[float]:
    """A plain loop of full batches over PEFT's modules with transformers' loss and torch's AdamW."""
    tuned.set_attn_implementation("eager")
    tuned.train()
    optimizer = torch.optim.AdamW(
        [p for p in tuned.parameters() if p.requires_grad], lr=settings.train.learning_rate, weight_decay=0.0
    )
    found = []
    for _ in range(steps):
        loss = tuned(**padded(list(splits.train.rows))).loss
        loss.backward()
        norm = settings.train.max_grad_norm
        torch.nn.utils.clip_grad_norm_([p for p in tuned.parameters() if p.requires_grad], norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("geometry", ["gqa", "tied"])
def test_twenty_steps_with_embedding_and_head_are_those_of_a_plain_loop(
    recipe: Callable[..., Recipe], tmp_path: Path, quantization: str, geometry: str
) -> None:
    keys = ["train.scheduler=constant", "train.warmup=0", "train.effective_batch=12", "train.micro_batch=3"]
    keys += ["train.max_steps=20", "train.weight_decay=0", f"model.quantization={quantization}", BESIDE]
    exact = [key for key in EXACT if "quantization" not in key]
    settings = recipe(*exact, *keys, geometry=geometry)
    found = losses(run(settings, tmp_path / "a"))
    tuned, _, splits = ready(settings)
    expected = stock_losses(settings, tuned, splits, 20)
    assert found == pytest.approx(expected, rel=2e-3)
    assert found[:5] == pytest.approx(expected[:5], rel=2e-5)
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_reaches_the_embedding_too(
    recipe: Callable[..., Recipe], tmp_path: Path, dropout: float
) -> None:
    found = []
    for policy in ("keep", "recompute"):
        settings = recipe(*EXACT, BESIDE, f"adapter.dropout={dropout}", f"train.activations={policy}")
        ours, tuned, splits = built(settings, tmp_path)
        if policy == "recompute":
            tuned.enable_input_require_grads()
            tuned.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        embedding = tuned.get_base_model().model.embed_tokens
        torch.manual_seed(3)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        batch = trainer.Rows(splits.train.rows)([{"row": i} for i in range(4)])
        ours.training_step(tuned, batch, num_items_in_batch=40)
        assert embedding.lora_embedding_A["default"].grad.any()
        assert embedding.lora_embedding_B["default"].grad.any()
        found.append([p.grad for p in tuned.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("targets", ["[lm_head]", "[embed_tokens]", "[embed_tokens, o, lm_head]"])
def test_recomputing_with_embedding_and_head_does_not_change_the_losses(
    recipe: Callable[..., Recipe], tmp_path: Path, targets: str
) -> None:
    keep, recompute = (
        losses(run(recipe(f"adapter.targets={targets}", f"train.activations={name}"), tmp_path / name))
        for name in ("keep", "recompute")
    )
    assert keep == recompute
    assert keep[0] != keep[-1]


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw_torch"])
def test_lora_plus_trains_the_embedding_at_the_recipes_rate(
    recipe: Callable[..., Recipe], tmp_path: Path, optimizer: str
) -> None:
    settings = recipe(f"train.optimizer={optimizer}", "train.lora_plus_ratio=8", BESIDE)
    ours, tuned, _ = built(settings, tmp_path)
    names = {id(p): name for name, p in tuned.named_parameters() if p.requires_grad}
    rates = {
        names[id(p)]: group["lr"] for group in ours.create_optimizer().param_groups for p in group["params"]
    }
    assert len(rates) == len(names)
    for name, rate in rates.items():
        faster = "lora_B" in name
        assert rate == pytest.approx(8e-2 if faster else 1e-2)
    assert sum("embedding" in name for name in rates) == 2


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("geometry", ["gqa", "tied"])
def test_8_bit_states_of_embedding_and_head_and_the_way_to_disk_and_back(
    recipe: Callable[..., Recipe], tmp_path: Path, geometry: str
) -> None:
    """Rank 16 makes tensors of 4096 elements, from which on bitsandbytes' states are 8-bit."""
    targets = ["adapter.targets=[embed_tokens, lm_head]", "adapter.rank=16", "adapter.alpha=16"]
    settings = recipe(*targets, "train.optimizer=paged_adamw_8bit", geometry=geometry)
    tuned, base, splits = ready(settings)
    meter = Meter("cpu")
    (tmp_path / "checkpoints").mkdir()
    before = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    with meter.phase("x"), quiet().steps("t", 3) as steps:
        watch = Watch(settings, meter, steps, io.StringIO(), None)
        ours = trainer.build(tuned, base, splits.train, settings, tmp_path, watch)
        ours.train()
    optimizer = ours.optimizer.optimizer
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            wanted = torch.uint8 if parameter.numel() >= 4096 else torch.float32
            assert state["state1"].dtype == state["state2"].dtype == wanted
            assert not torch.equal(parameter, before[name])
    adapters.save(tuned, base, tmp_path / "adapter")
    live = evaluate.mean_loss(tuned, splits.train.rows, 4)
    again, _, _ = ready(recipe(*targets, f"adapter.init={tmp_path / 'adapter'}", geometry=geometry))
    assert evaluate.mean_loss(again, splits.train.rows, 4) == live
    plain, _, _ = ready(recipe(*targets, geometry=geometry))
    assert evaluate.mean_loss(plain, splits.train.rows, 4) != live


def test_packing_does_not_change_the_losses(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    keys = [*EXACT, "train.max_steps=6", "data.max_length=100", "train.micro_batch=1"]
    packed, plain = (
        losses(run(recipe(*keys, f"data.packing={packing}"), tmp_path / packing))
        for packing in ("true", "false")
    )
    assert packed == pytest.approx(plain, rel=2e-5)


def test_packing_takes_fewer_passes(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    counts = []
    for packing in ("true", "false"):
        keys = ["data.max_length=128", "train.micro_batch=1", f"data.packing={packing}"]
        ours, _, splits = built(recipe(*keys), tmp_path)
        counts.append(len(ours.layout.cut(splits.train.rows[:4])))
    assert counts[0] < counts[1] == 4


def test_dtypes_hold_after_the_trainer_is_built(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = recipe()
    tuned, base, splits = ready(settings)
    before = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    with Meter("cpu").phase("x"), quiet().steps("t", 1) as steps:
        watch = Watch(settings, Meter("cpu"), steps, io.StringIO(), None)
        trainer.build(tuned, base, splits.train, settings, tmp_path, watch)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])


def test_a_loss_that_is_not_a_number_stops_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def poison(tuned: Any, base: model.Base, splits: data.Splits) -> None:
        with torch.no_grad():
            next(p for n, p in tuned.named_parameters() if "lora_B" in n).fill_(float("nan"))

    with pytest.raises(RunError, match=r"step 1: loss is nan"):
        run(recipe(), tmp_path / "a", before=poison)
    assert math.isnan(json.loads((tmp_path / "a" / "metrics.jsonl").read_text())["loss"])


EVERY = [1, 3, 10]


def test_log_every_decides_the_lines_and_nothing_else(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 rows in steps of 8 and 4, twice: four steps, of which the last has a line of its own."""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    keys = ["train.max_steps=", "train.epochs=2", "train.effective_batch=8", "train.eval_every=3"]
    found, lines, said = [], [], []
    for every in EVERY:
        out, screen = tmp_path / str(every), io.StringIO()
        settings = recipe(*keys, f"train.log_every={every}")
        display = Display(Console(file=screen))
        found.append(summary(settings, out, display=display, held_out_loss=lambda: 0.5))
        lines.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
        said.append([line.split("  ")[:2] for line in screen.getvalue().splitlines()])
    each = [line for line in lines[0] if "loss" in line]
    tokens = [sum(line[key] for line in each) for key in ("tokens", "supervised_tokens")]
    for one in found:
        assert (one.num_steps, one.num_rows, one.num_tokens, one.num_supervised_tokens) == (4, 24, *tokens)
        assert (one.first_loss, one.last_loss) == (each[0]["loss"], each[-1]["loss"])
        assert one.tokens_per_second > 0
    assert [[line["step"] for line in one if "loss" in line] for one in lines] == [
        [1, 2, 3, 4], [1, 3, 4], [1, 4],
    ]  # fmt: skip
    assert all([line["step"] for line in one if "eval_loss" in line] == [3] for one in lines)
    assert said[0] == said[1] == said[2] and said[0][-1][0] == "train 4/4"
    rarely = [line for line in lines[-1] if "loss" in line]
    assert [sum(line[key] for line in rarely) for key in ("tokens", "supervised_tokens")] == tokens
    assert rarely[1]["loss"] == pytest.approx(sum(line["loss"] for line in each[1:]) / 3)


def test_a_training_that_is_stopped_between_two_lines_has_a_last_one(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    asked = iter([False, False, True])
    settings = recipe("train.log_every=10", "train.max_steps=9")
    found = summary(settings, tmp_path, stop=lambda: next(asked))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, found.num_steps] == [1, 3]
    assert sum(line["tokens"] for line in lines) == found.num_tokens


def test_a_step_without_a_line_is_looked_at_too(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    class Poison(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are not typed
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(float("nan"))

    with pytest.raises(RunError, match=r"step 2: loss is nan"):
        run(recipe("train.log_every=10"), tmp_path, built=lambda made: made.add_callback(Poison()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and math.isnan(lines[1]["loss"])


def test_held_out_losses_are_written_and_change_nothing(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = recipe("train.eval_every=2", "train.max_steps=4")
    out = tmp_path / "a"
    out.mkdir()
    tuned, base, splits = ready(settings)
    meter = Meter("cpu")
    with meter.phase("train"):
        trainer.train(
            tuned,
            base,
            splits.train,
            settings,
            out,
            meter=meter,
            display=quiet(),
            held_out_loss=lambda: evaluate.mean_loss(tuned, splits.train.rows, 2),
        )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    trained = [line for line in lines if "loss" in line]
    plain = run(recipe("train.max_steps=4"), tmp_path / "b")
    assert losses(trained) == losses(plain)
    first, second = (line["eval_loss"] for line in lines if "eval_loss" in line)
    assert first != second


@pytest.mark.parametrize(
    ("overrides", "rows", "steps"),
    [
        (["train.max_steps=7"], 12, 7),
        (["train.max_steps=", "train.epochs=2"], 12, 6),
        (["train.max_steps=", "train.epochs=1"], 13, 4),
        (["train.max_steps=", "train.epochs=3"], 2, 3),
    ],
)
def test_num_steps(recipe: Callable[..., Recipe], overrides: list[str], rows: int, steps: int) -> None:
    assert trainer.num_steps(recipe(*overrides), rows) == steps


def test_a_remainder_is_trained_too(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = recipe("train.max_steps=", "train.epochs=2", "train.effective_batch=8", "train.micro_batch=2")
    lines = run(settings, tmp_path / "a")  # 12 rows: 8 and 4, twice
    _, _, splits = ready(settings)
    assert len(lines) == trainer.num_steps(settings, 12) == 4
    assert sum(line["tokens"] for line in lines) == 2 * splits.train.num_tokens
