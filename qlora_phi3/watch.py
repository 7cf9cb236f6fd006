"""What is counted, shown and written while a model trains, step by step.

Owns the lines of `metrics.jsonl`, the totals of a training, the guard against losses that are not numbers,
and ending after a step when that is asked for. All hear of steps as transformers' callbacks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from .errors import RunError
from .meter import Meter
from .progress import Steps
from .recipe import Recipe
from .units import format_bytes


@dataclass(frozen=True)
class Trained:
    """What the training came to, over all of its steps, whichever of them `metrics.jsonl` has.

    `num_rows`: how often a row was trained on; an epoch's last step may have fewer than the others.
    `num_skipped_steps`: those that changed nothing, since float16's loss scaler found an overflow.
    Units: tokens are non-pad tokens over all epochs; losses, of the first and the last step, in nats.
    """

    num_steps: int
    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    first_loss: float
    last_loss: float
    tokens_per_second: float
    num_skipped_steps: int = 0

    def notes(self) -> list[str]:
        """What a user should know of it."""
        if not self.num_skipped_steps:
            return []
        skipped = f"{self.num_skipped_steps} of {self.num_steps} steps changed nothing"
        return [f"{skipped}: their gradients overflowed float16, and the loss scaler left them out"]


class Before(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are not typed
    """Calls what has to be done before the first step, when layers recompute and the optimizer is there."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._call()


class StopWhen(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are not typed
    """Ends the training after a step when it is asked to."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked():
            control.should_training_stop = True


@dataclass
class _Counts:
    """Sums over optimizer steps. Units: seconds without those of held-out losses."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    loss: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def add(self, other: _Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are not typed
    """Counts every step, stops at a loss that is not a number, moves the bar, and writes metrics.jsonl.

    A line stands for the steps since the one before: their tokens and time together, the mean of their
    losses. The first and the last step have one, whatever `train.log_every`.
    """

    def __init__(
        self,
        recipe: Recipe,
        meter: Meter,
        steps: Steps,
        lines: Any,
        held_out_loss: Callable[[], float] | None,
    ) -> None:
        self._recipe, self._meter, self._steps, self._lines = recipe, meter, steps, lines
        self._held_out_loss = held_out_loss
        self._supervised: list[torch.Tensor] = []
        self._since, self._all = _Counts(), _Counts()
        self._losses: tuple[float, float] | None = None
        self._skipped, self._logs = 0, dict[str, Any]()
        self._begun = time.perf_counter()

    def count(self, num_rows: int, num_tokens: int, num_supervised: torch.Tensor) -> None:
        """Note what one pass had; what is on the device stays there until a line is written."""
        self._since.rows += num_rows
        self._since.tokens += num_tokens
        self._supervised.append(num_supervised)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """A step is done; transformers has waited for its loss and norm, two numbers from the device."""
        if "loss" not in logs:  # the closing summary
            return
        now, loss, step = time.perf_counter(), logs["loss"], state.global_step
        self._since.steps += 1
        self._since.loss += loss
        self._since.seconds += now - self._begun
        self._begun, self._logs = now, logs
        self._losses = (self._losses[0] if self._losses else loss, loss)
        self._skipped += bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        problem = self._problem(loss, logs.get("grad_norm"))
        self._show(step, loss)
        if problem or step in (1, state.max_steps) or step % self._recipe.train.log_every == 0:
            self._write_line(step)
        if problem:
            remedy = "Lower train.learning_rate, or look at the rows with `train.effective_batch=1`."
            raise RunError(f"step {step}", problem, remedy)
        every = self._recipe.train.eval_every
        if self._held_out_loss is not None and every is not None and step % every == 0:
            self._write({"step": step, "eval_loss": self._held_out_loss()})
            self._begun = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps behind the last line, where the training was stopped, have one too."""
        if self._since.steps:
            self._write_line(state.global_step)

    def _problem(self, loss: float, grad_norm: float | None) -> str:
        """Which of the two is not a number; float16's loss scaler makes the norm overflow on purpose."""
        norm_counts = self._recipe.model.compute_dtype != "float16"
        for name, value in (("loss", loss), ("grad_norm", grad_norm if norm_counts else None)):
            if value is not None and not math.isfinite(value):
                return f"{name} is {value}."
        return ""

    def _show(self, step: int, loss: float) -> None:
        peak = format_bytes(self._meter.peak_bytes())
        self._steps.update(step, f"loss {loss:.4f}  {self._since.tokens_per_second:.0f} tok/s  peak {peak}")

    def _write_line(self, step: int) -> None:
        """The line of the steps since the one before, which then count among all."""
        since, self._since = self._since, _Counts()
        since.supervised = sum(int(num) for num in self._supervised)
        self._supervised = []
        self._all.add(since)
        line = {
            "step": step,
            "loss": since.loss / since.steps,
            "learning_rate": self._logs["learning_rate"],
            "grad_norm": self._logs.get("grad_norm"),
            "tokens": since.tokens,
            "supervised_tokens": since.supervised,
            "tokens_per_second": since.tokens_per_second,
            "step_seconds": since.seconds / since.steps,
            "peak_bytes": self._meter.peak_bytes(),
            **self._meter.now(),
        }
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def summary(self) -> Trained:
        assert self._losses is not None, "no step was trained"
        return Trained(
            num_steps=self._all.steps,
            num_rows=self._all.rows,
            num_tokens=self._all.tokens,
            num_supervised_tokens=self._all.supervised,
            first_loss=self._losses[0],
            last_loss=self._losses[1],
            tokens_per_second=self._all.tokens_per_second,
            num_skipped_steps=self._skipped,
        )
