"""QLoRA against full-precision LoRA and against other toolkits, on the same tokens.

Each method and repeat is a process of its own, the methods by turns; a row as soon as it ends, also for one
that failed or is not installed. What each was fed is hashed in its own process. Where tokens or losses differ
more than verdict.refusals allows, nothing is ranked and the exit code is 1.
Our processes are set up as the command line sets them up (qlora_phi3.process); peers have the machine's
defaults, and all have the same number of threads.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qlora_phi3 import phi3, weights
from qlora_phi3.recipe import Model
from qlora_phi3.report import VERSIONED

from . import compare_table, flops, probe, random_base, results, tokens, verdict, worker

PEERS: Final = ("unsloth", "torchtune", "axolotl", "llamafactory", "litgpt")
"""Methods whose package is called as they are, in a Python of their own or in this one."""
METHODS: Final = ("qlora", "qlora-native", "lora-bf16", "lora-fp32", "trl-qlora", *PEERS)
"""Ours run on the reference engine, but for the one that says native."""
DEFAULT: Final = METHODS[:5]
BASES: Final = {"lora-bf16": "bfloat16", "lora-fp32": "float32"}
"""What the frozen linears are kept in; of the others NF4."""
MINI: Final = "microsoft/Phi-3-mini-4k-instruct"
RANK, ALPHA, MAX_GRAD_NORM, OPTIMIZER = 16, 32, 1.0, "paged_adamw_8bit"
SEED: Final = 42
"""Of the order of the rows, the same in all; the adapters of repeat i start from SEED + i."""
EQUAL: Final = (
    "model", "weights", "device", "max_length", "micro_batch", "effective_batch", "steps", "rank", "alpha",
    "learning_rate", "max_grad_norm", "optimizer", "activations",
)  # fmt: skip
"""What rows of a group have in common, beside the tokens."""
MEASURED: Final = (
    "token_stream", "losses", "step_seconds", "tokens", "supervised_tokens", "load_seconds", "attach_seconds",
    "phases", "allocated", "reserved", "process_bytes", "linear_bytes", "trained_parameters",
    "matmul_flops_per_second",
)  # fmt: skip
"""What every row without an error has from its process."""
_CHECKOUT = Path(__file__).parent.parent


def options(parser: argparse.ArgumentParser) -> None:
    add, known = parser.add_argument, ",".join(METHODS)
    add(
        "--model",
        default="builtin",
        help="builtin, phi3-mini (random weights where none are at hand), a folder",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--methods", type=_methods, default=DEFAULT, help=f"some of {known}; default the first five")
    add(
        "--max-length",
        type=_positive,
        default=256,
        help="tokens of the longest row; of made-up rows, of each",
    )
    add("--micro-batch", type=_positive, default=8, help="rows a pass")
    add("--effective-batch", type=_positive, help="rows an optimizer step; default: one pass")
    add("--steps", type=_positive, default=6, help="optimizer steps of a run")
    add("--warmup-steps", type=int, default=1, help="first steps that are not timed")
    add("--repeats", type=_positive, default=5, help="runs of each method")
    add("--learning-rate", type=float, default=2e-4, help="constant")
    add(
        "--activations",
        choices=("keep", "recompute", "auto"),
        default="recompute",
        help="of all; auto: our plan's",
    )
    add("--minutes", type=float, help="start no process after so many")
    add(
        "--peer-python",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a peer's own Python",
    )
    add(
        "--random-base",
        type=Path,
        metavar="FOLDER",
        help="where phi3-mini's random weights are kept, or found",
    )


def run(chosen: argparse.Namespace) -> int:
    until = time.monotonic() + 60 * chosen.minutes if chosen.minutes is not None else float("inf")
    with tempfile.TemporaryDirectory(prefix="bench-compare-") as name:
        folder = Path(name)
        job = _job(chosen, folder)
        rows = []
        for row in measured(chosen, job, folder, until):
            print(json.dumps(_short(row)), flush=True)
            results.append("compare", row, VERSIONED)
            rows.append(row)
    return conclude(rows)


def conclude(rows: list[dict[str, Any]]) -> int:
    """Print what the rows come to; the exit code."""
    for method, error in {row["method"]: row["error"] for row in rows if row["error"]}.items():
        print(f"{method}: not measured: {error}")
    if all(row["error"] for row in rows):
        print("nothing was measured")
        return 1
    reasons = verdict.refusals(rows)
    if reasons:
        print("not comparable:", *reasons, sep="\n  ")
        return 1
    print(compare_table.of_run(rows), *verdict.notes(rows), sep="\n")
    if any(row["weights"] == "random" for row in rows):
        print(
            "random weights of the exact sizes: memory and speed are those of the real ones, losses are not"
        )
    return 0


def measured(
    chosen: argparse.Namespace, job: Mapping[str, Any], folder: Path, until: float
) -> Iterator[dict[str, Any]]:
    """A row for each process, methods by turns; none that would begin too late."""
    pythons = dict(chosen.peer_python)
    planned = tokens.steps(Path(job["stream"]), job["effective_batch"])
    common = _common(job, planned)
    for repeat, method in schedule(chosen.methods, chosen.repeats):
        if time.monotonic() > until:
            print(f"time is over: {method}, repeat {repeat} and what follows are not measured", flush=True)
            return
        one = {**job, "method": method, "repeat": repeat, "seed": SEED + repeat}
        found = _in_a_process(method, one, folder, pythons.get(method))
        yield _row(common, one, found, planned)


def schedule(methods: tuple[str, ...], repeats: int) -> Iterator[tuple[int, str]]:
    """A B A B: (repeat, method)."""
    return ((repeat, method) for repeat in range(repeats) for method in methods)


# --- the job


def _job(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every method gets, in a form that a worker reads; writes the stream."""
    base, kind = _base(chosen, folder)
    effective = chosen.effective_batch or chosen.micro_batch
    if effective % chosen.micro_batch:
        raise SystemExit(
            f"--effective-batch {effective} is no multiple of --micro-batch {chosen.micro_batch}"
        )
    if not 0 <= chosen.warmup_steps < chosen.steps:
        raise SystemExit(f"--warmup-steps {chosen.warmup_steps} leaves none of {chosen.steps} steps to time")
    job = {
        "base": str(base),
        "model": chosen.model if chosen.model in ("builtin", "phi3-mini") else base.name,
        "weights": kind,
        "made_up": chosen.model == "phi3-mini",
        "device": chosen.device,
        "max_length": chosen.max_length,
        "micro_batch": chosen.micro_batch,
        "effective_batch": effective,
        "steps": chosen.steps,
        "warmup_steps": chosen.warmup_steps,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": chosen.learning_rate,
        "max_grad_norm": MAX_GRAD_NORM,
        "optimizer": OPTIMIZER,
        "data_seed": SEED,
        "activations": chosen.activations,
        "stream": str(folder / "stream.json"),
    }
    _ask("prepare", job, folder)
    if chosen.activations == "auto":
        job |= _ask("activations", {**job, "method": "qlora"}, folder)
    return job


def _ask(what: str, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A question that takes torch, in a process of its own: this one stays small beside what is measured."""
    found = _in_a_process(what, {**job, "repeat": 0}, folder, None)
    if found["error"] is not None:
        raise SystemExit(f"{what}: {found['error']}")
    return {key: value for key, value in found.items() if key != "error"}


def _base(chosen: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """Folder of the checkpoint, and whether its weights are "pretrained" or "random"."""
    if chosen.model == "builtin":
        return weights.locate(Model(base=random_base.BUILTIN)).folder, "pretrained"
    if chosen.model != "phi3-mini":
        settings = Model(base=str(Path(chosen.model).absolute()))
        weights.known_geometry(settings)
        return Path(settings.base), "pretrained"
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(MINI, "model.safetensors.index.json")
    if isinstance(config, str):
        return Path(config).parent, "pretrained"
    base = chosen.random_base or folder / "base"
    if not (base / "config.json").is_file():  # it is written last but for the tokenizer
        print("phi3-mini: no weights at hand, random ones of its exact sizes are made", flush=True)
        random_base.write(base, MINI)
    return base, "random"


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METHODS)}")
    return names


def _peer(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with one of {', '.join(PEERS)}")
    return name, path


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


# --- one process


def _in_a_process(method: str, job: Mapping[str, Any], folder: Path, python: str | None) -> dict[str, Any]:
    """What the worker says; an error where it could not begin, or ended without a word."""
    if python is None and method in PEERS and importlib.util.find_spec(method) is None:
        return {"error": f"not installed: no {method} in this Python, and no --peer-python {method}=PATH"}
    own = Path(tempfile.mkdtemp(prefix=f"{method}-", dir=folder))
    files = [own / "job.json", own / "result.json"]
    files[0].write_text(json.dumps({**job, "folder": str(own)}), encoding="utf-8")
    line = [python or sys.executable, "-m", "bench.worker", method, *map(str, files)]
    try:
        done = subprocess.run(
            line,
            env=_environment(job, folder),
            cwd=_CHECKOUT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        return {"error": f"not installed: {error.strerror}: {Path(line[0]).name}"}
    (own / "stderr.txt").write_text(done.stderr, encoding="utf-8")
    if files[1].is_file():
        found: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
    else:
        last = [text for text in done.stderr.splitlines() if text.strip()][-worker.ERROR_LINES :]
        found = {"error": f"exit code {done.returncode}: {' '.join(last)}"}
    if found["error"] is not None:
        sys.stderr.write(done.stderr)
        found["error"] = _anywhere(found["error"], folder)
    return found


def _environment(job: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The same threads for all, one card or none, and a cache of quantized bases that begins empty."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(_cores())
    return os.environ | {
        "OMP_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "" if job["device"] == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
        "QLORA_PHI3_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _anywhere(text: str, folder: Path) -> str:
    """A message without this machine's folders."""
    for place, name in (
        (folder, "FOLDER"),
        (_CHECKOUT, "CHECKOUT"),
        (Path(sys.prefix), "PYTHON"),
        (Path.home(), "~"),
    ):
        text = text.replace(str(place), name)
    return text


# --- rows


def _common(job: Mapping[str, Any], planned: list[list[probe.Row]]) -> dict[str, Any]:
    """Keys that all rows of this comparison share."""
    stream = probe.digest(planned)
    equal = {key: job[key] for key in EQUAL}
    return {
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **equal,
        "warmup_steps": job["warmup_steps"],
        "planned_stream": stream,
        "group": hashlib.sha256(json.dumps([equal, stream], sort_keys=True).encode()).hexdigest(),
    }


def _row(
    common: Mapping[str, Any],
    job: Mapping[str, Any],
    found: Mapping[str, Any],
    planned: list[list[probe.Row]],
) -> dict[str, Any]:
    method = job["method"]
    missing = [key for key in MEASURED if key not in found]
    if found["error"] is None and missing:  # a toolkit whose log changed: a row, and the bench goes on
        found = {"error": f"its adapter found no {', '.join(missing)}"}
    row = {"method": method, "repeat": job["repeat"], "seed": job["seed"], **common}
    row |= {"base": BASES.get(method, "nf4"), "process": _process(method), **found}
    if found["error"] is not None:
        return row
    skip = job["warmup_steps"]
    config = json.loads((Path(job["base"]) / "config.json").read_text(encoding="utf-8"))
    fed = [one for rows in planned[skip:] for one in rows]
    row["model_flops"] = flops.of_rows(fed, phi3.geometry_from_config(config), row["trained_parameters"])
    row["mfu"] = round(row["model_flops"] / sum(verdict.timed(row)) / row["matmul_flops_per_second"], 4)
    return row


def _process(method: str) -> str:
    return "qlora_phi3.process" if worker.MODULES[method] == "ours" else "defaults"


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed of a row while it runs."""
    kept = ("method", "repeat", "error", "losses", "step_seconds", "load_seconds", "phases", "mfu")
    return {key: row[key] for key in kept if key in row}
