"""Reading, checking and tokenizing many chats: rows a second, peak memory, speed next to the raw tokenizer.

Each step is a process of its own, on chats from a seeded generator. `raw` is `tokenizer(texts)` on the
rendered texts of the same rows, in batches, on all cores; it and ours take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import results

LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")
RAW_BATCH = 1000
SEED = 20
DEFAULT_LENGTH = 2048
"""data.max_length's default; a base with fewer positions has those."""
_CHECKOUT = Path(__file__).parent.parent


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000, help="chats to generate")
    parser.add_argument(
        "--sample", type=int, default=20_000, help="chats of a timed pass next to the raw one"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each")
    parser.add_argument("--base", default="builtin:smollm2-135m", help="whose tokenizer")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run(chosen: argparse.Namespace) -> int:
    if chosen.step:
        print(json.dumps(STEPS[chosen.step](chosen)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        write(Path(folder) / "chats.jsonl", chosen.rows)
        write(Path(folder) / "sample.jsonl", chosen.sample)
        for step in STEPS:
            found = _in_a_process(step, chosen, folder)
            row = {"step": step, "rows": chosen.rows, "base": chosen.base, **found}
            print(json.dumps(row))
            results.append("data", row, LIBRARIES)
    return 0


def chats(rows: int, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Chats of one to four exchanges in words of uneven length, 100 to 200 tokens as a rule."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, range(26, 0, -1), k=draw.randint(1, 9))) for _ in range(20_000)]
    words += ["the", "of", "and", "to", "in", "is", "it"] * 1000 + [
        "é",
        "naïve",
        "12.50",
        "größer",
        "日本",
        "ok!",
    ] * 50

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high))).capitalize() + "."

    for _ in range(rows):
        exchanges = draw.choice((1, 1, 1, 2, 2, 3, 4))
        messages = [{"role": "system", "content": text(4, 8)}] if draw.random() < 0.3 else []
        for _ in range(exchanges):
            messages.append({"role": "user", "content": text(5, 40 // exchanges)})
            messages.append({"role": "assistant", "content": text(5, 60 // exchanges)})
        yield {"messages": messages}


def write(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats(rows))


def _in_a_process(step: str, chosen: argparse.Namespace, folder: str) -> dict[str, Any]:
    line = [sys.executable, "-m", "bench", "data", "--step", step, "--folder", folder]
    line += [f"--{name}={getattr(chosen, name)}" for name in ("rows", "sample", "repeats", "base")]
    cache = Path(folder) / ("cache of doctor" if step == "doctor" else "cache")
    environment = os.environ | {"QLORA_PHI3_CACHE": _empty(cache, chosen.base)}
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=_CHECKOUT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _empty(cache: Path, base: str) -> str:
    """A cache with no more in it than the built-in model, so that no entry of an earlier run is timed."""
    from qlora_phi3 import builtin

    cache.mkdir(exist_ok=True)
    if base.startswith("builtin:") and not (cache / "builtin").exists():
        builtin.ensure(base.removeprefix("builtin:"))
        (cache / "builtin").symlink_to(builtin.cache_root() / "builtin")
    return str(cache)


# --- steps, each in a process of its own


def _recipe(chosen: argparse.Namespace, file: str) -> Any:
    from qlora_phi3 import weights
    from qlora_phi3.recipe import Model, Recipe

    known = weights.known_geometry(Model(base=chosen.base))
    longest = known.max_positions if known is not None else DEFAULT_LENGTH
    data = {"train": {"path": str(chosen.folder / file)}, "max_length": min(DEFAULT_LENGTH, longest)}
    return Recipe.model_validate(
        {"version": 1, "name": "bench", "model": {"base": chosen.base}, "data": data}
    )


def _tokenizer(chosen: argparse.Namespace) -> Any:
    from qlora_phi3 import model, weights

    return model.load_tokenizer(weights.locate_tokenizer(_recipe(chosen, "chats.jsonl").model))


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def _peak_bytes() -> int:
    """Of this process and of its largest child; Linux counts in KiB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(one).ru_maxrss for one in who) * 1024


def doctor(chosen: argparse.Namespace) -> dict[str, Any]:
    """`doctor` as the command does it, nothing cached."""
    from qlora_phi3 import checkup

    recipe = _recipe(chosen, "chats.jsonl")
    seconds, found = _timed(lambda: checkup.check_recipe(recipe, 0, lambda text: None))
    codes = {one.code: one.num_places for one in found.findings}
    return _rate(seconds, chosen.rows) | {"findings": codes}


def tokenize(chosen: argparse.Namespace) -> dict[str, Any]:
    """The rows as `recipe` gets them, its checks with them; the second time they come from the cache."""
    return _load(chosen)


def cached(chosen: argparse.Namespace) -> dict[str, Any]:
    return _load(chosen)


def _load(chosen: argparse.Namespace) -> dict[str, Any]:
    from qlora_phi3 import data

    recipe, tokenizer = _recipe(chosen, "chats.jsonl"), _tokenizer(chosen)
    seconds, (splits, _) = _timed(lambda: data.check(recipe, tokenizer))
    return _rate(seconds, chosen.rows) | {"tokens": splits.train.num_tokens}


def _rate(seconds: float, rows: int) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 3),
        "rows_per_second": round(rows / seconds),
        "peak_bytes": _peak_bytes(),
    }


def ratio(chosen: argparse.Namespace) -> dict[str, Any]:
    """Ours and the raw tokenizer by turns on the sample; ours reads, renders, marks and checks besides."""
    from qlora_phi3.data import parts
    from qlora_phi3.data.tokens import Turns

    recipe, tokenizer = _recipe(chosen, "sample.jsonl"), _tokenizer(chosen)
    settings = (recipe.data, recipe.train, recipe.evaluate, tokenizer, Turns.of(tokenizer))
    reading = parts.Reading("train", *settings, num_kept=0)
    lines = (chosen.folder / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]

    def raw() -> int:
        batches = (texts[i : i + RAW_BATCH] for i in range(0, len(texts), RAW_BATCH))
        encoded = (tokenizer(batch, add_special_tokens=False)["input_ids"] for batch in batches)
        return sum(len(row) for batch in encoded for row in batch)

    def ours() -> int:
        return parts.build(reading)["train"].rows.num_tokens

    pairs = [(_timed(raw), _timed(ours)) for _ in range(chosen.repeats + 1)][1:]  # the first warms up
    assert all(one[1] == other[1] for one, other in pairs), "not the same tokens"
    seconds = {"raw": [one[0] for one, _ in pairs], "ours": [other[0] for _, other in pairs]}
    ratios = [raw_seconds / our_seconds for raw_seconds, our_seconds in zip(*seconds.values(), strict=True)]
    return {
        "sample_rows": len(texts),
        "sample_tokens": pairs[0][0][1],
        **{f"{name}_seconds": [round(one, 3) for one in found] for name, found in seconds.items()},
        "speed_against_raw": round(statistics.median(ratios), 3),
        "speed_against_raw_all": [round(one, 3) for one in ratios],
    }


STEPS = {"ratio": ratio, "doctor": doctor, "tokenize": tokenize, "cached": cached}
