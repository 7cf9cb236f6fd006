"""Watches a transformers Trainer, whoever built it: seconds and losses of steps, and what the model gets."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from bench import probe
from bench.probe import Fed


class Clock(TrainerCallback):
    """Seconds and loss of every optimizer step, from the end of one to the end of the next.

    Units: seconds, with the data and what is logged; nats per supervised token of the step.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._last = 0.0
        self.step_seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._now()
        self.step_seconds.append(now - self._last)
        self._last = now

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def _now(self) -> float:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def to_json(self) -> dict[str, Any]:
        return {"step_seconds": [round(one, 5) for one in self.step_seconds], "losses": self.losses}


class Watch(Clock):
    """Clock, and every pass that goes into the model by its keyword arguments."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.fed = Fed()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._note, with_kwargs=True)
        super().on_train_begin(args, state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fed.begin()

    def _note(self, module: Any, positional: Any, named: dict[str, Any]) -> None:
        self.fed.padded(named["input_ids"], named["labels"], named.get("attention_mask"))

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), **self.fed.to_json()}


class Kept(Watch):
    """Watch, where the toolkit keeps its model to itself: what the model is, is read when training begins."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.about: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.about = {
            "linear_bytes": probe.linear_bytes(model),
            "trained_parameters": probe.trained_parameters(model),
            "adapter_dtype": probe.adapter_dtype(model),
        }
        super().on_train_begin(args, state, control, **kwargs)

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), **self.about}
