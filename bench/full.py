"""Full fine-tuning of a recipe's model by plain transformers: what adapters are told against in quality.

`python -m bench.full RECIPE [key=value ...]` prints one JSON document, with the keys that `bench quality`
takes of a report. Same rows, steps, schedule and evaluation; the weights are float32, all of them trained.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_phi3.meter import Meter
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import load_recipe


def main(arguments: list[str]) -> int:
    recipe = load_recipe(Path(arguments[0]), arguments[1:])
    print(json.dumps(measure(recipe)))
    return 0


def measure(recipe: Recipe) -> dict[str, Any]:
    """Train and evaluate. Units: losses in nats; seconds of the training; peak bytes of the process."""
    import torch
    from transformers import Phi3ForCausalLM

    from qlora_phi3 import data, evaluate, model, weights
    from qlora_phi3.engine import attention

    device = model.device_for_run()
    checkpoint, meter = weights.locate(recipe.model), Meter(device.type)
    tokenizer = model.load_tokenizer(checkpoint.folder)
    splits, _ = data.check(recipe, tokenizer)
    assert splits.eval is not None
    torch.manual_seed(recipe.train.seed)
    with meter.phase("load"):
        whole = Phi3ForCausalLM.from_pretrained(
            checkpoint.folder, dtype=torch.float32, attn_implementation=attention.register()
        ).to(device)
        whole.config.use_cache = False
    with meter.phase("train"):
        start = time.perf_counter()
        losses = _train(whole, tokenizer, splits.train.rows, recipe)
        seconds = time.perf_counter() - start
    with meter.phase("evaluate tuned"):
        found = evaluate.measure(
            whole,
            tokenizer,
            splits.eval,
            recipe.evaluate,
            splits.turns.end,
            batch_rows=recipe.train.effective_batch,
            batch_tokens=4096,
            seed=recipe.train.seed,
        )
    return {
        "rank": None,
        "trained_parameters": sum(p.numel() for p in whole.parameters()),
        "training": {"num_steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]},
        "eval_samples": min(recipe.evaluate.samples, len(splits.eval.rows)),
        "eval": found.metrics,
        "train_seconds": round(seconds, 1),
        "peak_bytes": max(phase.peak_bytes for phase in meter.phases.values()),
    }


def _train(model: Any, tokenizer: Any, rows: Any, recipe: Recipe) -> list[float]:
    """Loss of every step, per supervised token of the step."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    train = recipe.train
    made = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    with tempfile.TemporaryDirectory(prefix="bench-full-") as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=train.effective_batch,
            max_steps=train.max_steps or -1,
            num_train_epochs=train.epochs,
            learning_rate=train.learning_rate,
            lr_scheduler_type="constant_with_warmup" if train.scheduler == "constant" else train.scheduler,
            warmup_steps=train.warmup,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim="adamw_torch",
            seed=train.seed,
            data_seed=train.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
        trainer = Trainer(model, settings, collator, Dataset.from_list(made))
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
