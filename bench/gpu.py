"""The whole CUDA story in one bounded command: compare, context and startup, the most important first.

Each step is a command of this suite in a process of its own, which writes its rows as it goes: what a run
that is cut off has measured stays.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import startup

_CHECKOUT = Path(__file__).parent.parent
GRACE_SECONDS: Final = 10.0
"""After its time a command that knows it may finish its row."""


@dataclass(frozen=True)
class Step:
    """A command, and its share of the time against those behind it.

    `bounded`: it takes `--minutes`. `base`: how it is told the folder of the random weights, which are made
    once for all; empty: it needs none.
    """

    words: tuple[str, ...]
    share: float
    bounded: bool = True
    base: str = "--random-base"

    def line(self, seconds: float, base: Path) -> list[str]:
        """Its arguments, where it has so many seconds."""
        minutes = [f"--minutes={seconds / 60:.2f}"] if self.bounded else []
        return [*self.words, *([f"{self.base}={base}"] if self.base else []), *minutes]


def _compare(methods: str, max_length: int, micro_batch: int, activations: str, share: float) -> Step:
    words = ["compare", "--model=phi3-mini", "--device=cuda", f"--methods={methods}", "--repeats=2"]
    words += [f"--max-length={max_length}", f"--micro-batch={micro_batch}", "--steps=25"]
    return Step((*words, f"--activations={activations}"), share)


PLAN: Final = (
    _compare("qlora-native,qlora,lora-bf16,trl-qlora", 2048, 1, "recompute", 3.0),
    Step(("context", "--device=cuda", "--methods=qlora", "--vram=8,24,6,12,16", "--tolerance=0.05"), 2.5),
    _compare("qlora-native,qlora,lora-bf16,trl-qlora", 512, 4, "recompute", 1.5),
    _compare("qlora-native,qlora,trl-qlora", 4096, 1, "recompute", 1.0),
    Step(("context", "--device=cuda", "--methods=qlora-native", "--vram=4,8,12", "--tolerance=0.05"), 1.5),
    _compare("qlora-native,qlora,trl-qlora", 2048, 1, "keep", 1.0),
    Step(("context", "--device=cuda", "--methods=lora-bf16", "--vram=24,16,12", "--tolerance=0.05"), 0.5),
    Step(("startup", "--repeats=1"), 0.5, bounded=False, base="--model"),
    Step(("kernels", "--device=cuda", "--repeats=20"), 0.3, bounded=False, base=""),
)
"""What is measured, by importance. What a step leaves of its time goes to those behind it."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole takes no longer")


def run(chosen: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device here: there is nothing to measure.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        return go_through(PLAN, 60 * chosen.minutes, Path(folder) / startup.RANDOM)


def go_through(plan: Sequence[Step], seconds: float, base: Path) -> int:
    """Every step within its share of what is left; 1 where one of them failed or had no time."""
    deadline, whole = time.monotonic() + seconds, True
    for number, step in enumerate(plan):
        left = deadline - time.monotonic()
        own = left * step.share / sum(one.share for one in plan[number:])
        if own < 1:
            print(f"no time left for {' '.join(step.words)}", flush=True)
            whole = False
            continue
        print(f"{own / 60:.1f} min for {' '.join(step.words)}", flush=True)
        code = call(step.line(own, base), min(own + GRACE_SECONDS, left))
        if code:
            print(f"ended with {code}: {' '.join(step.words)}", flush=True)
            whole = False
    return 0 if whole else 1


def call(words: Sequence[str], seconds: float) -> int:
    """Exit code of a command of this suite, which is ended after so many seconds."""
    line = [sys.executable, "-m", "bench", *words]
    process = subprocess.Popen(line, cwd=_CHECKOUT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        # with the processes it has started, which would keep the card
        os.killpg(process.pid, signal.SIGTERM)
        return process.wait()
