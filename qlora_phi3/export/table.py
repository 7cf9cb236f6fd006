"""The targets: which function writes each, what it takes of the disk, and what must hold beforehand.

Owns the table, and how the parts that write GGUF are called. Refuses nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ..errors import ModelError
from ..recipe_values import K_QUANTS
from . import compare, merge, merged, targets
from .options import Options, Say, family
from .source import Source, licence_file, licence_name, tokenizer_bytes

Write = Callable[[Source, Path, Options, Say], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """How one target is made.

    `write` fills an empty folder and returns what is worth knowing of it; `num_bytes` predicts its size;
    `check` refuses what can be told before anything is written.
    """

    write: Write
    num_bytes: Callable[[Source, Options], int]
    check: Callable[[Source], None] = lambda source: None


def target_of(name: str) -> Target:
    """The target of a checked name."""
    if family(name) == "gguf":
        kind = name.removeprefix("gguf:")

        def write(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
            return _write_gguf(source, folder, kind, options, say)

        return Target(write, lambda source, options: gguf_bytes(source, kind))
    return TABLE[name]


def gguf_bytes(source: Source, kind: str) -> int:
    """Of a GGUF of a kind, and for k-quants of the 16-bit one that the quantizer reads."""
    numbers = merge.Merger(source, "original", torch.bfloat16).num_bytes // 2
    beside = 2 * numbers if kind in K_QUANTS else 0
    return int(numbers * _BITS[kind] / 8) + beside + 4 * tokenizer_bytes(source)


_BITS: Final[dict[str, float]] = {
    **{"f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5},
    **{"q6_k": 6.6, "q5_k_m": 6, "q5_k_s": 6, "q4_k_m": 5.2, "q4_k_s": 5, "q3_k_m": 4.3, "q2_k": 3.5},
}
"""Bits a weight; of k-quants upper bounds, since they mix kinds."""


def _write_gguf(source: Source, folder: Path, kind: str, options: Options, say: Say) -> dict[str, Any]:
    """The merged model in one file, quantized from float32.

    Raises:
        InputError: `--merge-base` does not fit the adapter, or a k-quant and no quantizer.
    """
    from . import gguf

    report = compare.choose(source, options.merge_base, torch.bfloat16, say)
    path = folder / f"{source.name}-{kind}.gguf"
    tensors = merge.merged_tensors(source, report.base, torch.float32)
    config, tokenizer = merge.config_of(source, torch.float32), source.checkpoint.folder
    say(f"writing {path.name}")
    gguf.write(path, tensors, config, tokenizer, kind, name=source.name, say=say)
    return {"merge": report.to_json(), "kind": kind, "gguf": path.name}


def write_base_gguf(source: Source, path: Path) -> None:
    """The base alone, as the model that an adapter's GGUF is loaded onto."""
    from . import gguf

    merger = merge.Merger(source, "original", torch.float32, adapted=False)
    tensors = ((name, merger.tensor(name)) for name in merger.shapes)
    config, tokenizer = source.checkpoint.config, source.checkpoint.folder
    gguf.write(path, tensors, config, tokenizer, "f16", name=source.name)


def _write_gguf_lora(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """The adapter alone as GGUF, for the base's own GGUF."""
    from . import gguf_lora

    path = folder / f"{source.name}-lora.gguf"
    geometry = source.checkpoint.geometry
    gguf_lora.write(path, source.tensors, source.config, geometry, name=source.name)
    return {"gguf": path.name}


def _write_ollama(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """A merged GGUF with the Modelfile for `ollama create`."""
    from . import ollama

    about = _write_gguf(source, folder, options.kind, options, say)
    licence = licence_file(source)
    text = licence.read_text(encoding="utf-8") if licence is not None else licence_name(source)
    tokenizer = source.checkpoint.folder
    num_ctx = options.num_ctx or ollama.context_of(source.checkpoint.geometry)
    made = ollama.modelfile(about["gguf"], tokenizer, num_ctx=num_ctx, license=text)
    (folder / "Modelfile").write_text(made, encoding="utf-8")
    return about | {"num_ctx": num_ctx}


def _check_gguf_lora(source: Source) -> None:
    """A GGUF adapter has one alpha for all linears.

    Raises:
        ModelError: the linears are scaled differently.
    """
    scales = {f"{pair.scale:.12g}" for pair in merge.fused_pairs(source).values()}
    if len(scales) > 1:
        reason = f"its linears are scaled by {', '.join(sorted(scales))} (alpha_pattern)"
        reason += "; a GGUF adapter has one alpha for all."
        raise ModelError(str(source.folder), reason, "Export gguf:q8_0, with the adapter merged into it.")


def _lora_bytes(source: Source, options: Options) -> int:
    return targets.num_bytes(source, options)


TABLE: Final[dict[str, Target]] = {
    "adapter": Target(targets.write_adapter, targets.num_bytes),
    "loralib": Target(targets.write_loralib, targets.num_bytes),
    "mlx": Target(targets.write_mlx, targets.num_bytes),
    "vllm": Target(targets.write_vllm, targets.num_bytes),
    "merged": Target(merged.write, merged.num_bytes),
    "gguf-lora": Target(_write_gguf_lora, _lora_bytes, _check_gguf_lora),
    "ollama": Target(_write_ollama, lambda source, options: gguf_bytes(source, options.kind)),
}
"""Target -> how it is made; `gguf:KIND` is made by its kind, `hub` from what another wrote."""
