"""One pass of the built-in model through both engines: seconds, tensors' peak, products with the weights.

The ways take turns in one process, on the same rows of the quickstart's chats. A pass is a forward and
backward without the optimizer's step. `linear_flops` are those of products with a layer's weights, per token
and weight: 2 is a forward, 4 a forward and the gradients of inputs, 6 with all of the forward computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from . import results

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
WAYS: Final = {
    "reference, recompute": ("reference", "recompute", None),
    "native, recompute": ("native", "input", None),
    "native, recompute in slices of 512": ("native", "input", 512),
    "native, attention kept": ("native", "attention", None),
    "reference, keep": ("reference", "keep", None),
    "native, keep": ("native", "all", None),
}
"""Name -> engine, what is kept, intermediate columns computed at once."""
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
    begun = {"rows": chosen.rows, "tokens": made.tokens, "supervised_tokens": made.supervised}
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
        self.tokens = self.documents.num_tokens
        self.supervised = int((self.documents.labels != IGNORE).sum())
        self.geometry = checkpoint.geometry

    def backward(self) -> None:
        """One forward and backward."""
        from types import SimpleNamespace

        import torch

        from qlora_phi3.trainer import PhiTrainer

        trainer: Any = SimpleNamespace(compute_dtype=torch.bfloat16, logit_tokens=1024)
        (PhiTrainer.nll(trainer, self.model, self.documents) / self.supervised).backward()

    def through(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives while the layers go that way, without gradients from before."""
        from qlora_phi3.engine.native import Native
        from qlora_phi3.engine.policy import Policy
        from qlora_phi3.engine.stock import RECOMPUTING

        engine, keep, columns = WAYS[name]
        causal = self.model.get_base_model()
        self.model.zero_grad()
        if engine == "native":
            layers = causal.config.num_hidden_layers
            native = Native(causal, Policy((keep,) * layers, slice_columns=columns))
            try:
                return work()
            finally:
                native.remove()
        if keep == "keep":
            return work()
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=RECOMPUTING)
        self.model.enable_input_require_grads()
        try:
            return work()
        finally:
            self.model.disable_input_require_grads()
            self.model.activation_checkpointing_disable()

    def seconds(self, name: str) -> float:
        """Of one pass."""

        def timed() -> float:
            start = time.perf_counter()
            self.backward()
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
                self.backward()
            return counter.total

        def measured() -> None:
            with tracked:
                self.backward()

        weights = self.tokens * self.geometry.num_linear_parameters
        whole = WAYS[name][2] is None  # a slice has not the shape of a weight
        flops = round(self.through(name, watched) / weights, 4) if whole else None
        self.through(name, measured)
        return {"peak_bytes": tracked.peak_bytes - tracked.at_peak["model"], "linear_flops": flops}
