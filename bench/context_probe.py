"""What `bench context` trains, and one try of a length, in a process of its own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

from qlora_phi3 import memory
from qlora_phi3.recipe import Recipe

METHODS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "qlora": ("nf4", {"engine": "reference", "activations": "recompute"}),
    "lora-bf16": ("none", {"engine": "reference", "activations": "recompute"}),
    "qlora-native": ("nf4", {"engine": "native", "activations": "offload", "slice_columns": 2048}),
}
"""Method -> `model.quantization`, and keys of `train`; all else is the same."""

GIB: Final = 1024**3
NUM_STEPS: Final = 2

Row = dict[str, Any]


def recipe_of(base: str, method: str, length: int) -> Recipe:
    """What is trained: rows of `length` tokens one at a time, no layer kept, steps of two passes.

    With a pass a step there would be no gradients yet where activations are most; longer runs have them.
    The optimizer is not the paged one: its states are taken past the allocator, whose share is what counts.
    """
    quantization, train = METHODS[method]
    keys = {
        "version": 1,
        "name": "bench-context",
        "model": {"base": base, "quantization": quantization},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": {"path": "made.jsonl"}, "max_length": length, "packing": False},
        "train": {
            "max_steps": NUM_STEPS,
            "effective_batch": 2,
            "micro_batch": 1,
            "optimizer": "adamw_8bit",
            "warmup": 0,
            **train,
        },
        "memory": {"on_oom": "fail"},
    }
    return Recipe.model_validate(keys)


def probe(base: str, method: str, length: int, gib: int, device: str) -> Row:
    """Two steps on rows of `length` tokens through the trainer of a real run.

    Out of memory is an answer; any other error is raised. On a CPU nothing is capped: only to test it.

    Units: bytes as CUDA's allocator counts them; seconds of a step.
    """
    import torch

    from qlora_phi3 import ladder
    from qlora_phi3.errors import FitError

    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        cap(gib)
    try:
        found = ladder.tried(lambda: _train(recipe_of(base, method, length), place))
        said = found.said if isinstance(found, ladder.RanOut) else None
    except FitError as error:
        said = str(error)
    used: Row = {} if said is not None else {"step_seconds": found}
    if device == "cuda":
        used |= {
            "device_name": torch.cuda.get_device_name(0),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"fits": said is None, "said": said, **used}


def cap(gib: int) -> None:
    """Let the allocator have no more than it could get on a card of so many GiB, its context taken off.

    Raises:
        SystemExit: this card is smaller.
    """
    import torch

    total = torch.cuda.mem_get_info()[1]
    if gib * GIB > total:
        raise SystemExit(f"this card has {total / GIB:.1f} GiB, less than {gib}.")
    torch.cuda.set_per_process_memory_fraction((gib * GIB - memory.CONTEXT_BYTES) / total)


def _train(recipe: Recipe, device: Any) -> float:
    """Seconds of the last step."""
    import torch

    from qlora_phi3 import adapters, model, trainer, weights
    from qlora_phi3.engine import attention
    from qlora_phi3.meter import Meter
    from qlora_phi3.progress import Display

    display = Display()
    checkpoint = weights.locate(recipe.model, display.say)
    base = model.load(checkpoint, recipe.model, device, attention.register(), display.say)
    torch.manual_seed(recipe.train.seed)
    tuned, meter = adapters.attach(base, recipe), Meter(device.type)
    split = _made_rows(recipe, checkpoint.geometry.vocab_size)
    with tempfile.TemporaryDirectory(prefix="bench-context-") as out, meter.phase("train"):
        trainer.train(tuned, base, split, recipe, Path(out), meter=meter, display=display)
        lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["step_seconds"])


def _made_rows(recipe: Recipe, vocab_size: int) -> Any:
    """Random tokens, all but the first of each row trained on, as many rows as the steps take."""
    import numpy as np

    from qlora_phi3.data import Split
    from qlora_phi3.data.store import RowsBuilder
    from qlora_phi3.data.tokens import Marked

    draw, length, builder = np.random.default_rng(0), recipe.data.max_length, RowsBuilder()
    for number in range(NUM_STEPS * recipe.train.effective_batch):
        ids = draw.integers(3, vocab_size, length).tolist()
        builder.add(Marked(ids, [(1, length)], f"made:{number}"))
    return Split(builder.finish(), [], 0)
