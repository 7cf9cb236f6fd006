"""How long a conversation an export is right for, where a program computes other than transformers beyond.

Owns the context that llama.cpp and Ollama are run with, and the words for LongRoPE and the sliding window;
both by the base's own numbers. Refuses contexts that give other answers than were trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import InputError, ModelError, shown
from ..phi3 import Geometry
from . import vocabulary

if TYPE_CHECKING:
    from .source import Source

DEFAULT: Final = 4096
"""More takes memory from the start; a user may give all that the base has. Units: tokens."""
LLAMA_CPP: Final = ("gguf", "gguf-lora", "ollama")
STEP: Final = 256
"""llama.cpp rounds a context up to a multiple of this (llama-context.cpp, GGML_PAD)."""


OTHER_TEMPLATE: Final = (
    "The adapter came with a chat template of its own, other than its base's. This has the base's: where the "
    "adapter was trained with the other one, replace it."
)


def is_longrope(config: Mapping[str, Any]) -> bool:
    """Whether positions are scaled as the 128k models' are.

    Raises:
        ModelError: another kind of scaling.
    """
    rope = rope_of(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "longrope", "su"):
        reason = f"the rope scaling {kind!r} is not one of Phi-3's."
        raise ModelError("config.json: rope_scaling", reason, "Export it as merged safetensors instead.")
    return str(kind) != "default"


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's settings of rotary embeddings, in the spelling of transformers 4 or 5."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def of_llama_cpp(config: Mapping[str, Any], geometry: Geometry) -> int:
    """The context to run a GGUF with: 4096, or all that a smaller base has. Units: tokens.

    llama.cpp chooses LongRoPE's factors once, by the context it is started with: beyond the base's original
    one it takes the long ones for short prompts too, where transformers takes the short ones.

    Raises:
        ModelError: LongRoPE whose original context is smaller than llama.cpp's smallest.
    """
    if not is_longrope(config):
        return min(DEFAULT, geometry.max_positions)
    original = geometry.original_max_positions
    if original < STEP:
        reason = (
            f"the base's original context is {original}, and llama.cpp's smallest {STEP}: it would take "
            "LongRoPE's long factors for every prompt."
        )
        raise ModelError("config.json", reason, "Export it as merged safetensors instead.")
    return min(DEFAULT, original // STEP * STEP)


def check_num_ctx(num_ctx: int, config: Mapping[str, Any], geometry: Geometry, *, proven: bool) -> None:
    """Refuse a context for which the model has no positions, or which changes what it computes.

    `proven`: the export is to be compared with the model as trained; without that LongRoPE's long factors may
    be had, and the card says so.

    Raises:
        InputError: it is too large, or too small for a question and its answer.
    """
    if num_ctx < STEP:
        reason = f"{num_ctx} is below {STEP}, the smallest context of llama.cpp."
        raise InputError("--num-ctx", reason, f"Give {STEP} or more, or leave it out.")
    if num_ctx > geometry.max_positions:
        reason = f"{num_ctx} is above {geometry.max_positions}, all positions that the base has."
        raise InputError("--num-ctx", reason, f"Give {geometry.max_positions} or less.")
    most = of_llama_cpp(config, geometry)
    if proven and is_longrope(config) and -(-num_ctx // STEP) * STEP > geometry.original_max_positions:
        reason = (
            f"{num_ctx} is above {geometry.original_max_positions}, the base's original context: llama.cpp "
            "then takes LongRoPE's long factors for short prompts too, and answers other than was trained."
        )
        remedy = f"Give {most} or less; with --no-gate it is written unproven."
        raise InputError("--num-ctx", reason, remedy)


def of_vllm(config: Mapping[str, Any], geometry: Geometry) -> int | None:
    """vLLM's --max-model-len for LongRoPE's short factors, which it too chooses at its start; else None.

    Source: vLLM rotary_embedding/phi3_long_rope_scaled_rope.py, as read elsewhere; it has not been run here.
    """
    original = geometry.original_max_positions
    return original if is_longrope(config) and original < geometry.max_positions else None


def window_of(geometry: Geometry) -> int | None:
    """The sliding window, where the base has one that is shorter than its texts may be. Units: tokens."""
    window = geometry.sliding_window
    return window if window is not None and window < geometry.max_positions else None


def limits(family: str, config: Mapping[str, Any], geometry: Geometry, context: int | None) -> list[str]:
    """What a program of a target's computes otherwise than was trained, and from where on; sentences.

    `context`: what llama.cpp is run with.
    """
    found = []
    in_llama_cpp = family in LLAMA_CPP
    window, original = window_of(geometry), geometry.original_max_positions
    if is_longrope(config) and in_llama_cpp and context is not None:
        found.append(_longrope_in_llama_cpp(family, context, original))
    if of_vllm(config, geometry) is not None and family in ("vllm", "merged"):
        found.append(
            f"vLLM chooses LongRoPE's factors by `--max-model-len`: above {original}, the base's original "
            "context, it takes the long ones for short prompts too, which is not what was trained."
        )
    if is_longrope(config) and family in ("mlx", "merged"):
        found.append(
            "mlx-lm computes with LongRoPE's long factors at any length, which the base has for texts of "
            f"more than {original} tokens: what it makes of shorter ones is not quite what was trained."
        )
    if window is not None and family in (*LLAMA_CPP, "mlx", "merged"):
        program = "llama.cpp" if in_llama_cpp else "mlx-lm"
        found.append(
            f"{program} leaves out the base's sliding window of {window} tokens: up to {window} tokens it "
            "computes what was trained, beyond them it also looks at what the model was never shown so far "
            "back, and nothing was checked there."
        )
    return found


def limits_of(source: Source, target: str, context: int | None, other_texts: Sequence[str] = ()) -> list[str]:
    """`limits` of a target, as the command names it; `other_texts`: what the gate found other ids of."""
    base, family = source.checkpoint, target.partition(":")[0]
    found = limits(family, base.config, base.geometry, context)
    if source.other_template:
        found.append(OTHER_TEMPLATE)
    if family in LLAMA_CPP:
        found += vocabulary.differences(base.folder, source.stop_ids)
        other = vocabulary.unexplained(base.folder, other_texts)
        found += [f"llama.cpp makes other tokens of {', '.join(map(shown, other[:8]))}."] if other else []
    return found


def not_asked(source: Source, target: str, context: int | None, *, long: bool) -> list[str]:
    """What the gate leaves out of what a user may do with an export, in words.

    `long`: a text beyond the sliding window was asked.
    """
    family, window = target.partition(":")[0], window_of(source.checkpoint.geometry)
    found = ["sampled answers: each was the likeliest token by token"]
    if family == "vllm":
        found.append("vLLM itself, which is not run here: its files were read by transformers and PEFT")
    if family == "ollama":
        found.append(
            "Ollama itself, which is not run here: the GGUF was asked in llama.cpp, with the base's template"
        )
    if window is not None and not long:
        found.append(f"texts of more than {window} tokens, the base's sliding window")
    if context is not None:
        found.append(f"conversations of more than {context} tokens")
    return found


def _longrope_in_llama_cpp(family: str, context: int, original: int) -> str:
    how = "`num_ctx`" if family == "ollama" else "`-c`"
    if context > original:
        return (
            f"The context of {context} is above {original}, the base's original one: llama.cpp takes "
            "LongRoPE's long factors for every prompt, and short ones are answered other than was trained."
        )
    return (
        f"{how} must not be left out or raised above {original}, the base's original context: llama.cpp "
        "chooses LongRoPE's factors by it and not by the prompt, and with more it takes the long ones for "
        f"short prompts too, which is not what was trained. It was checked with {context}."
    )
