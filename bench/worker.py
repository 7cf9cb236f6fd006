"""One process, one method, one repeat: `python -m bench.worker METHOD job.json result.json`.

Runs in whatever Python has the method's libraries; imports nothing but the method.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from bench import probe

MODULES = dict.fromkeys(("qlora", "qlora-native", "lora-bf16", "lora-fp32"), "ours")
MODULES["trl-qlora"] = "peers.trl"
MODULES |= {name: f"peers.{name}" for name in ("unsloth", "torchtune", "axolotl", "llamafactory", "litgpt")}
"""Method -> module of this package that measures it."""
QUESTIONS = {"activations": "ours", "prepare": "tokens"}
"""What the parent asks before it starts -> module whose function of that name answers."""
ERROR_LINES = 3
"""Of a message that a row keeps, from its end."""


def main(arguments: list[str]) -> int:
    method, job, result = arguments
    found = outcome(method, json.loads(Path(job).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(found), encoding="utf-8")
    return 0


def outcome(method: str, job: dict[str, Any]) -> dict[str, Any]:
    """What the method measured, or the error that ended it."""
    from importlib import import_module

    try:
        if method in QUESTIONS:
            answer: dict[str, Any] = getattr(import_module(f"bench.{QUESTIONS[method]}"), method)(job)
            return {**answer, "error": None}
        module = import_module(f"bench.{MODULES[method]}")
        measured = module.measure(job)
        about = {
            "device_name": probe.device_name(job["device"]),
            "method_versions": probe.versions(module.LIBRARIES),
        }
        return {**measured, **about, "error": None}
    except BaseException as error:  # a row says what it was, whatever a toolkit raises or exits with
        traceback.print_exc()
        return {"error": said(error)}


def said(error: BaseException) -> str:
    """Kind and last lines of an error; of a package that is missing, that it is."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"not installed: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = "" if error.__cause__ is None else f" (from {said(error.__cause__)})"
    return f"{type(error).__name__}: {' '.join(lines[-ERROR_LINES:])}{cause}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
