"""Held-out quality of adapter variants on a recipe, over seeds.

Each run is a process of its own through the command line, the variants by turns within a seed, and a row as
soon as it ends. A run whose row is there already, of whatever commit, is not made again, so that an
interrupted measurement goes on; to measure it anew, remove the row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import find_recipe, load_recipe
from qlora_phi3.report import VERSIONED

from . import results

ADAPTERS = ("fused", "split", "qv")
"""Variants of equal cost: 3.04 or 3.05 million trained parameters of the built-in model."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "fused": ("adapter.split_fused=false", "adapter.rank=12", "adapter.alpha=24"),
    "split": ("adapter.rank=10", "adapter.alpha=20"),
    "qv": ("adapter.targets=[q, v]", "adapter.rank=53", "adapter.alpha=106"),
    "qlora": ("adapter.rank=16", "adapter.alpha=32"),
    "lora-bf16": ("model.quantization=none", "adapter.rank=16", "adapter.alpha=32"),
    "full": ("model.quantization=none", "train.learning_rate=1e-4"),
}
"""Name -> what it changes in the recipe; all else is the recipe's. full: every weight, by plain transformers
(full.py), at a learning rate usual for that; it is not tuned, nor is any other's."""

SHARED = ("evaluate.compare_base=false",)
"""The base model is the same for all, and measuring it takes time."""

_CHECKOUT = Path(__file__).parent.parent


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="quickstart", help="name or path")
    parser.add_argument("--seeds", type=_seeds, default=(42, 43, 44), help="of train.seed, as in 42,43")
    known = f"some of {','.join(VARIANTS)}; default {','.join(ADAPTERS)}"
    parser.add_argument("--variants", type=_variants, default=ADAPTERS, help=known)
    parser.add_argument("--steps", type=int, help="train.max_steps instead of the recipe's, to try it out")


def run(chosen: argparse.Namespace) -> int:
    path = find_recipe(chosen.recipe)
    shared = SHARED if chosen.steps is None else (*SHARED, f"train.max_steps={chosen.steps}")
    recipe = load_recipe(path, shared)
    task = {"recipe": recipe.name, "recipe_sha256": fingerprint(recipe), "steps": chosen.steps}
    there = {_key(row) for row in results.read("quality")}
    for seed in chosen.seeds:
        for variant in chosen.variants:
            row = {**task, "variant": variant, "seed": seed, "overrides": [*shared, *VARIANTS[variant]]}
            if _key(row) in there:
                print(f"{variant}, seed {seed}: measured before; remove its row to repeat it", flush=True)
                continue
            work = measure_full if variant == "full" else measure
            row |= work(path, [*row["overrides"], f"train.seed={seed}"])
            print(json.dumps(row), flush=True)
            results.append("quality", row, VERSIONED)
    return 0


def measure(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """One run of the recipe from the command line; what it came to.

    Units: losses in nats per trained token; seconds of the whole process, and of the training in it.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as folder:
        line = [sys.executable, "-m", "qlora_phi3", "recipe", str(path.resolve()), *overrides]
        line += ["--out", str(Path(folder) / "run"), "--json"]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, cwd=_CHECKOUT)
    report = json.loads(done.stdout)
    phases = report["memory"]["measured"]["phases"]
    return {
        "rank": report["recipe"]["adapter"]["rank"],
        "trained_parameters": sum(part["num_parameters"] for part in report["trained"]),
        "training": report["training"],
        "eval_samples": report["data"]["eval_samples"],
        "eval": report["metrics"]["tuned"],
        "seconds": round(time.perf_counter() - start, 1),
        "train_seconds": round(phases["train"]["seconds"], 1),
        "peak_bytes": max(phase["peak_bytes"] for phase in phases.values()),
    }


def measure_full(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    """The same of full fine-tuning."""
    start = time.perf_counter()
    line = [sys.executable, "-m", "bench.full", str(path.resolve()), *overrides]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, cwd=_CHECKOUT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of the keys that are not at their default, files of rows by what is in them.

    Equal wherever the checkout stands, and it outlives keys that are added to the format; a default that
    changes it does not see.
    """
    keys = recipe.model_dump(mode="json", exclude_defaults=True)
    for place, source in recipe.data.sources():
        found = keys
        for step in place:
            found = found[step]
        if Path(source.path).is_file():
            found["path"] = hashlib.sha256(Path(source.path).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes two runs the same one."""
    return (row["recipe_sha256"], str(row["seed"]), *row["overrides"])


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(seed) for seed in text.split(","))


def _variants(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return names
