"""The one mapping from recipe to TRL.

Owns the trainer's arguments, the passes an optimizer step is made of, and the loss' normalisation. The loop
itself is TRL's, which gets the rows of a whole optimizer step at once: the loss is summed over their
supervised tokens and divided by the number of those, however the step is cut into passes.
What is counted and written meanwhile is watch.py's; where memory runs out, ladder.py says how a step is cut
next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from .calibration import Calibration, compare
from .data import Split, TokenRow
from .data.store import Rows as RowArrays
from .engine import stock
from .engine.documents import Documents, Layout, hidden_states
from .engine.loss import IGNORE, HeadLora, supervised_nll
from .engine.native import Native
from .engine.policy import Policy
from .engine.residency import Residency
from .errors import FitError
from .ladder import Adapted, Ladder, RandomState, RanOut, tried
from .meter import Meter
from .metrics_log import MetricsLog
from .model import Base, check_dtypes
from .phi3 import Geometry
from .progress import Display
from .recipe import Recipe
from .watch import Before, StopWhen, Trained, Watch

OPTIMIZERS: Final = {
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "adamw_8bit": "adamw_bnb_8bit",
    "adamw_torch": "adamw_torch",
}
"""Recipe's optimizer -> transformers' name of it."""


def arguments(recipe: Recipe, out: Path, device: torch.device) -> SFTConfig:
    """TRL's arguments for a settled recipe (`micro_batch` is a number)."""
    train = recipe.train
    return SFTConfig(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=train.effective_batch,  # training_step cuts it into passes
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.scheduler == "constant" else train.scheduler,
        warmup_steps=train.warmup,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=OPTIMIZERS[train.optimizer],
        seed=train.seed,
        data_seed=train.seed,
        bf16=False,  # PhiTrainer.compute_loss has its own autocast, without accelerate's wrapped forward
        fp16=recipe.model.compute_dtype == "float16",  # for the loss scaler
        use_cpu=device.type == "cpu",
        activation_checkpointing=stock_recomputes(recipe),
        activation_checkpointing_kwargs=stock.RECOMPUTING if stock_recomputes(recipe) else None,
        logging_steps=1,  # the watch looks at every step, and chooses those that get a line
        logging_nan_inf_filter=False,  # it would show a NaN loss as 0.0 and let the run end "well"
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,  # rows are cut in data/, counted there; TRL's default would cut at 1024 in silence
        packing=False,
        dataloader_pin_memory=device.type == "cuda",
    )


def stock_recomputes(recipe: Recipe) -> bool:
    """Whether torch's checkpoint recomputes; the native layers do that themselves."""
    return recipe.train.activations != "keep" and recipe.train.engine != "native"


def policy_of(recipe: Recipe, causal: Any) -> Policy:
    """What each of its layers keeps."""
    return Policy.of(recipe, causal.config.num_hidden_layers)


def num_steps(recipe: Recipe, num_rows: int) -> int:
    """Optimizer steps of a run; the last one of an epoch takes the rows that are left."""
    return recipe.train.max_steps or recipe.train.epochs * math.ceil(num_rows / recipe.train.effective_batch)


def train(
    model: Any,
    base: Base,
    split: Split,
    recipe: Recipe,
    out: Path,
    *,
    meter: Meter,
    display: Display,
    resident: Residency | None = None,
    held_out_loss: Callable[[], float] | None = None,
    adapted: Callable[[Adapted, Recipe], None] = lambda event, recipe: None,
    built: Callable[[PhiTrainer], None] = lambda trainer: None,
    log: MetricsLog | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Trained, Calibration]:
    """Train the adapters of `model` in place and write `metrics.jsonl` into `out`, or into `log`.

    `resident` is what of the model is on the host. `adapted` hears where memory ran out, and the recipe as it
    went on from there. `built` gets the trainer
    before it starts, for who wants to watch it. `stop` is asked after each step: whether to end here.

    Raises:
        RunError: a loss or gradient norm is not a number -> the step it came with.
        FitError: memory ran out where nothing smaller helps, or is not wanted -> the step.
    """
    total = num_steps(recipe, len(split.rows))
    with display.steps("train", total) as steps, log or MetricsLog(out / "metrics.jsonl") as lines:
        watch = Watch(recipe, meter, steps, lines, held_out_loss)
        trainer = build(model, base, split, recipe, out, watch, adapted, resident)
        trainer.add_callback(StopWhen(stop))
        built(trainer)
        try:
            found = tried(trainer.train)
        finally:
            with suppress(OSError):  # somebody removed it, or put something into it
                (out / "checkpoints").rmdir()  # transformers makes it; saving steps is not available yet
    if isinstance(found, RanOut):
        # its passes have a ladder of their own: what is left are the gradients' norm and the states
        place, reason = f"step {trainer.state.global_step + 1}", "out of memory in the optimizer's step"
        remedy = "No smaller pass helps: choose train.optimizer=paged_adamw_8bit, or lower adapter.rank."
        raise FitError(place, f"{reason}: {found.said}", remedy)
    _unwrap(trainer)
    if trainer.native is not None:
        trainer.native.remove()
    return watch.summary(), trainer.calibration


def build(
    model: Any,
    base: Base,
    split: Split,
    recipe: Recipe,
    out: Path,
    watch: Watch,
    adapted: Callable[[Adapted, Recipe], None] = lambda event, recipe: None,
    resident: Residency | None = None,
) -> PhiTrainer:
    """The trainer, with the dtypes as our policy has them."""
    missing = resident is None and isinstance(recipe.memory.host, tuple) and recipe.memory.host
    assert not missing, f"{recipe.memory.host} of a settled recipe is not on the host"
    kept = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    with _plain_head(model.get_base_model()):
        trainer = PhiTrainer(
            model=model,
            args=arguments(recipe, out, base.model.device),
            train_dataset=Dataset.from_dict({"row": range(len(split.rows))}),
            data_collator=Rows(split.rows),
            processing_class=base.tokenizer,
            callbacks=[Before(lambda: trainer.calibrate()), watch],
        )
    trainer.remove_callback(PrinterCallback)
    trainer.watch, trainer.compute_dtype = watch, base.compute_dtype
    trainer.rows, trainer.geometry = split.rows, base.checkpoint.geometry
    on_card = base.model.device.type == "cuda"
    causal = model.get_base_model()
    native = recipe.train.engine == "native"
    trainer.resident = resident
    trainer.native = Native(causal, policy_of(recipe, causal), resident) if native else None
    trainer.ladder, trainer.adapted = Ladder(recipe, trainer.go_lower, host_apart=on_card), adapted
    trainer.settle(recipe)
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]  # TRL cast it to bfloat16
    check_dtypes(model, compute=base.compute_dtype, quantized=base.quantized)
    return trainer


@contextmanager
def _plain_head(causal: Any) -> Iterator[None]:
    """The head without its adapter, while TRL 1.16 looks: its own loss would leave the adapter out, so it
    refuses one. `PhiTrainer.nll` does not use that loss."""
    head = causal.lm_head
    causal.lm_head = getattr(head, "base_layer", head)
    try:
        yield
    finally:
        causal.lm_head = head


def _unwrap(trainer: PhiTrainer) -> None:
    # with float16, accelerate left an autocast and a cast to float32 around the model's forward
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


@dataclass(frozen=True)
class Rows:
    """The rows of an optimizer step, by their numbers, and their labels, which transformers counts."""

    rows: Sequence[TokenRow]

    def __call__(self, chosen: Sequence[dict[str, int]]) -> dict[str, Any]:
        found = [self.rows[one["row"]] for one in chosen]
        return {"rows": found, "labels": Documents.of(found, torch.device("cpu")).labels}


class PhiTrainer(SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    """TRL's trainer, with steps cut into passes without padding and the loss of supervised tokens only."""

    watch: Watch
    compute_dtype: torch.dtype
    rows: RowArrays
    geometry: Geometry
    layout: Layout
    logit_tokens: int
    native: Native | None
    resident: Residency | None
    ladder: Ladder
    adapted: Callable[[Adapted, Recipe], None]
    calibration: Calibration

    def settle(self, recipe: Recipe) -> None:
        """Cut steps, and compute their loss, as the recipe says."""
        self.layout = Layout.of(recipe, self.model)
        self.logit_tokens = recipe.train.logit_tokens

    def go_lower(self, event: Adapted, recipe: Recipe) -> None:
        """Go on as a recipe says that has less in memory at once."""
        self.settle(recipe)
        self.recompute(recipe)
        self.adapted(event, recipe)

    def recompute(self, recipe: Recipe) -> None:
        """Have layers recomputed as the recipe says, from when transformers has set its own way on."""
        policy = policy_of(recipe, self.model.get_base_model())
        if self.native is not None:
            self.native.policy = policy
        else:
            stock.follow(self.model, policy)

    def forget(self) -> None:
        """Drop what a pass that failed has left on the device."""
        self.model.zero_grad()
        if self.resident is not None:
            self.resident.forget()

    def calibrate(self) -> None:
        """One pass as full as this data makes it, before the first step, of which nothing stays.

        What the data's longest rows need is known then, not in the middle of a run.
        """
        self.recompute(self.ladder.recipe)
        before = RandomState.now()
        self.model.train()
        self.calibration = self.ladder.take("before step 1", self._full_pass, self.forget)
        self.model.zero_grad()
        before.restore()

    def _full_pass(self) -> Calibration:
        recipe = self.ladder.recipe
        chosen = self.layout.fullest(self.rows.lengths, recipe.train.effective_batch)
        documents = Documents.of([self.rows[i] for i in chosen], self.args.device)
        return compare(
            recipe, self.geometry, self.model, documents, lambda: self.backward_of(self.model, documents, 1)
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """The recipe's, or with LoRA+ PEFT's grouping of it. Source: Hayou et al. 2024, arXiv 2402.12354."""
        ratio = self.ladder.recipe.train.lora_plus_ratio
        if ratio is None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=self.args.weight_decay,
            loraplus_lr_embedding=self.args.learning_rate,  # PEFT's own, 1e-6, would hardly train them
            **settings,
        )
        return self.optimizer

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Gradients of one optimizer step; returns its loss.

        In place of transformers' own, which would take the same number of passes for every step.
        """
        assert num_items_in_batch is not None, "transformers no longer counts the tokens of a whole step"
        model.train()
        place = f"step {self.state.global_step + 1}"
        work = partial(self._passes, model, inputs["rows"], num_items_in_batch)
        total, counts = self.ladder.take(place, work, self.forget)
        for count in counts:
            self.watch.count(*count)
        return total

    def _passes(
        self, model: Any, rows: Sequence[TokenRow], num_items: torch.Tensor | int
    ) -> tuple[torch.Tensor, list[tuple[int, int, torch.Tensor]]]:
        """All passes of a step: its loss, and (rows, tokens, supervised tokens) of each pass."""
        total, counts = torch.zeros((), device=self.args.device), []
        for group in self.layout.cut(rows):
            documents = Documents.of(group, self.args.device)
            total += self.backward_of(model, documents, num_items)
            counts.append((len(group), documents.num_tokens, (documents.labels != IGNORE).sum()))
        return total, counts

    def backward_of(self, model: Any, documents: Documents, num_items: torch.Tensor | int) -> torch.Tensor:
        """Add a pass' gradients to those there are; returns its share of the step's loss."""
        loss = self.nll(model, documents) / num_items
        self.accelerator.backward(loss)
        return loss.detach()

    def nll(self, model: Any, documents: Documents) -> torch.Tensor:
        """Summed loss of one pass, in nats."""
        causal = model.get_base_model()
        with torch.autocast(
            causal.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32
        ):
            hidden = hidden_states(causal, documents)
            head = causal.lm_head
            lora = HeadLora.of(head)
            return supervised_nll(hidden, documents.labels, head.weight, lora, self.logit_tokens)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere about a user's run."""
