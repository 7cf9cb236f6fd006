"""One pass of the built-in model, step by step from transformers and PEFT to our engine: what each one gives.

Seconds, the peak of tensors, and products with the weights. The ways take turns in one process, on the same
rows of the quickstart's chats, and come to the same loss. A pass is a forward and backward without the
optimizer's step. `linear_flops` are those of products with a layer's weights, per token and weight: 2 is a
forward, 4 a forward and the gradients of inputs, 6 with all of the forward computed again; pads are no
tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal

from . import results

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Way:
    """How a pass goes. `padded`: rows in a rectangle, through transformers' attention; `whole_loss`: its loss
    too, over every position; `columns`: of the intermediate, computed at once."""

    engine: Literal["reference", "native"]
    keep: str
    columns: int | None = None
    padded: bool = False
    whole_loss: bool = False


WAYS: Final = {
    "transformers + PEFT, recompute": Way("reference", "recompute", padded=True, whole_loss=True),
    "with the loss of supervised tokens only": Way("reference", "recompute", padded=True),
    "reference, recompute": Way("reference", "recompute"),
    "native, recompute": Way("native", "input"),
    "native, recompute in slices of 512": Way("native", "input", 512),
    "native, attention kept": Way("native", "attention"),
    "reference, keep": Way("reference", "keep"),
    "native, keep": Way("native", "all"),
}
RECIPE: Final[dict[str, Any]] = {
    "version": 1,
    "name": "bench",
    "model": {"base": "builtin:smollm2-135m"},
    "adapter": {"rank": 16, "alpha": 32, "split_fused": False},
    "data": {"train": {"path": "recipes/data/orders/train.jsonl"}, "packing": False},
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=8, help="chats of the pass")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes of each way")


def run(chosen: argparse.Namespace) -> int:
    from qlora_phi3 import process

    process.prepare()
    process.quiet()
    made = Pass(chosen.rows)
    counted = {name: made.counted(name) for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(chosen.repeats):
        for name in WAYS:
            seconds[name].append(made.seconds(name))
    begun = {
        "rows": chosen.rows,
        "tokens": made.tokens,
        "padded_tokens": made.padded["input_ids"].numel(),
        "supervised_tokens": made.supervised,
    }
    for name in WAYS:
        row = {"way": name, **begun, "seconds": [round(one, 4) for one in seconds[name]], **counted[name]}
        results.append("engine", row, LIBRARIES)
        print(json.dumps({"way": name, "median_seconds": statistics.median(seconds[name]), **counted[name]}))
    return 0


class Pass:
    """The built-in model with adapters, and the documents of one pass."""

    def __init__(self, num_rows: int) -> None:
        import torch

        from qlora_phi3 import adapters, data, model, weights
        from qlora_phi3.engine import attention
        from qlora_phi3.engine.documents import Documents
        from qlora_phi3.engine.loss import IGNORE
        from qlora_phi3.recipe import Recipe

        checkout = Path(__file__).parent.parent
        path = str(checkout / RECIPE["data"]["train"]["path"])
        self.recipe = Recipe.model_validate(RECIPE | {"data": {"train": {"path": path}, "packing": False}})
        checkpoint = weights.locate(self.recipe.model)
        base = model.load(checkpoint, self.recipe.model, torch.device("cpu"), attention.register())
        torch.manual_seed(0)
        self.model = adapters.attach(base, self.recipe).train()
        splits, _ = data.check(self.recipe, base.tokenizer)
        rows = [splits.train.rows[i] for i in range(num_rows)]
        self.documents = Documents.of(rows, torch.device("cpu"))
        self.padded = _padded(rows)
        self.tokens = self.documents.num_tokens
        self.supervised = int((self.documents.labels != IGNORE).sum())
        self.geometry = checkpoint.geometry

    def backward(self, way: Way) -> float:
        """One forward and backward; returns the loss, in nats per supervised token."""
        import torch

        from qlora_phi3.trainer import PhiTrainer

        trainer: Any = SimpleNamespace(compute_dtype=torch.bfloat16, logit_tokens=1024)
        if way.padded:
            loss = self._padded_loss(way.whole_loss)
        else:
            loss = PhiTrainer.nll(trainer, self.model, self.documents) / self.supervised
        loss.backward()
        return float(loss.detach())

    def _padded_loss(self, whole: bool) -> Any:
        import torch

        from qlora_phi3.engine.loss import supervised_nll

        causal, rows = self.model.get_base_model(), self.padded
        inputs = {
            "input_ids": rows["input_ids"],
            "attention_mask": rows["attention_mask"],
            "use_cache": False,
        }
        with torch.autocast("cpu", torch.bfloat16):
            if whole:
                return causal(**inputs, labels=rows["labels"]).loss
            hidden = causal.model(**inputs).last_hidden_state
            return supervised_nll(hidden, rows["labels"], causal.lm_head.weight) / self.supervised

    def through(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives while the layers go that way, without gradients from before."""
        from qlora_phi3.engine.native import Native
        from qlora_phi3.engine.policy import Policy
        from qlora_phi3.engine.stock import RECOMPUTING

        way, causal = WAYS[name], self.model.get_base_model()
        self.model.zero_grad()
        if way.engine == "native":
            layers = causal.config.num_hidden_layers
            native = Native(causal, Policy((way.keep,) * layers, slice_columns=way.columns))
            try:
                return work()
            finally:
                native.remove()
        if way.keep == "keep":
            return work()
        ours = causal.config._attn_implementation
        causal.set_attn_implementation("sdpa" if way.padded else ours)
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=RECOMPUTING)
        self.model.enable_input_require_grads()
        try:
            return work()
        finally:
            self.model.disable_input_require_grads()
            self.model.activation_checkpointing_disable()
            causal.set_attn_implementation(ours)

    def seconds(self, name: str) -> float:
        """Of one pass."""

        def timed() -> float:
            start = time.perf_counter()
            self.backward(WAYS[name])
            return time.perf_counter() - start

        found: float = self.through(name, timed)
        return found

    def counted(self, name: str) -> dict[str, Any]:
        """Bytes of a pass' tensors at their highest beside the model, and operations with the weights."""
        from qlora_phi3.tracked import TrackedBytes, model_tensors

        from .linear_flops import LinearFlops

        tracked = TrackedBytes()
        tracked.claim("model", model_tensors(self.model))
        tracked.claim("model", self.model.parameters())

        def watched() -> int:
            with LinearFlops(self.geometry) as counter:
                self.backward(way)
            return counter.total

        def measured() -> float:
            with tracked:
                return self.backward(way)

        way, weights = WAYS[name], self.tokens * self.geometry.num_linear_parameters
        # a slice has not the shape of a weight
        flops = round(self.through(name, watched) / weights, 4) if way.columns is None else None
        loss = self.through(name, measured)
        peak = tracked.peak_bytes - tracked.at_peak["model"]
        return {"loss": round(loss, 5), "peak_bytes": peak, "linear_flops": flops}


def _padded(rows: Sequence[Any]) -> dict[str, Any]:
    """As a collator pads rows: on the right, to the longest; nothing is trained on pads."""
    import torch

    from qlora_phi3.engine.loss import IGNORE

    def rectangle(parts: Iterable[Any], fill: int) -> Any:
        tensors = [torch.as_tensor(part, dtype=torch.int64) for part in parts]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)

    return {
        "input_ids": rectangle((row.input_ids for row in rows), 0),
        "attention_mask": rectangle((torch.ones(len(row.input_ids)) for row in rows), 0),
        "labels": rectangle((row.labels for row in rows), IGNORE),
    }
