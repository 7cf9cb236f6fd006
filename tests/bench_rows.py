"""Made rows of `bench compare` and `bench context`, as those cases write them."""

from __future__ import annotations

from typing import Any

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}
ABOUT = {"machine": "a-machine", "commit": "123456789abc", "versions": VERSIONS}
GIB = 1024**3


def compare_row(method: str, repeat: int = 0, seconds: float = 2.0, **changes: Any) -> dict[str, Any]:
    """Two warm-up steps of 9 s and four timed ones of `seconds`, 200 tokens each, half of them trained on."""
    row = {
        **ABOUT,
        "run": "2026-01-01T00:00:00+00:00",
        "method": method,
        "base": {"lora-bf16": "bfloat16", "lora-fp32": "float32"}.get(method, "nf4"),
        "model": "builtin",
        "weights": "pretrained",
        "device": "cpu",
        "device_name": "a processor",
        "max_length": 256,
        "micro_batch": 8,
        "effective_batch": 8,
        "steps": 6,
        "warmup_steps": 2,
        "repeat": repeat,
        "seed": 42,
        "rank": 16,
        "activations": "keep",
        "group": "one",
        "token_stream": "abc",
        "losses": [1.2, 1.0, 0.8, 0.6, 0.5, 0.4 + repeat / 1000],
        "step_seconds": [9.0, 9.0, *[seconds] * 4],
        "tokens": [200] * 6,
        "supervised_tokens": [100] * 6,
        "load_seconds": 3.0,
        "attach_seconds": 0.1,
        "phases": {"start": GIB // 2, "load": GIB, "attach": GIB, "train": 3 * GIB},
        "allocated": None,
        "linear_bytes": GIB // 4,
        "trained_parameters": 4_000_000,
        "mfu": 0.25,
        "error": None,
    }
    return row | changes


def error_row(method: str, error: str, **changes: Any) -> dict[str, Any]:
    """What is measured is absent."""
    measured = ("device_name", "token_stream", "losses", "step_seconds", "tokens", "supervised_tokens")
    measured += ("load_seconds", "attach_seconds", "phases", "allocated", "linear_bytes", "mfu")
    row = compare_row(method, error=error, **changes)
    return {key: value for key, value in row.items() if key not in measured}


def context_row(method: str, gib: int, longest: int | None, **changes: Any) -> dict[str, Any]:
    row = {
        **ABOUT,
        "method": method,
        "model": "phi3-mini",
        "weights": "random",
        "device": "cuda",
        "how": "predicted",
        "vram_gib": gib,
        "rank": 16,
        "optimizer": "adamw_8bit",
        "activations": "recompute",
        "micro_batch": 1,
        "limit": 131072,
        "max_length": longest,
        "too_long": (longest or 0) + 128,
        "error": None,
    }
    return row | changes
