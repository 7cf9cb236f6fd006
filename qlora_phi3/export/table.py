"""The targets: which function writes each, what it takes of the disk, and what must hold beforehand.

Owns the table, and how the parts that write GGUF are called. Refuses nothing of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from .. import files
from ..errors import ModelError
from ..model import load_tokenizer
from ..weights import Checkpoint
from . import compare, context, merge, merged, ollama, targets
from .options import Options, Say, family
from .source import Source, licence_file, licence_name, tokenizer_bytes

Write = Callable[[Source, Path, Options, Say], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """How one target is made.

    `write` fills an empty folder and returns what is worth knowing of it; `num_bytes` predicts its size;
    `check` refuses what can be told before anything is written. `gate_bytes`: what the check of it writes
    beside it for a while.
    """

    write: Write
    num_bytes: Callable[[Source, Options], int]
    check: Callable[[Source, Options], object]
    gate_bytes: Callable[[Source, Options], int] = lambda source, options: 0


def target_of(name: str) -> Target:
    """The target of a checked name."""
    if family(name) == "gguf":
        kind = name.removeprefix("gguf:")

        def write(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
            return _write_gguf(source, folder, kind, options, say)

        return Target(write, lambda source, options: gguf_bytes(source, kind), _check_gguf)
    return TABLE[name]


def gguf_bytes(source: Source, kind: str) -> int:
    """Of a GGUF of a kind."""
    numbers = merge.Merger(source, "original", torch.bfloat16).num_bytes // 2
    return int(numbers * _BITS[kind] / 8) + 4 * tokenizer_bytes(source)


_BITS: Final[dict[str, float]] = {
    **{"f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5},
}
"""Bits a weight."""


def base_bytes(target: str, checkpoint: Checkpoint) -> int:
    """About what a target needs of the disk, told by the base alone; 0 of those that are small."""
    numbers = checkpoint.geometry.num_parameters
    if target == "merged":
        return 2 * numbers
    kind = "q8_0" if target == "ollama" else target.removeprefix("gguf:")
    return int(numbers * _BITS[kind] / 8) if kind in _BITS else 0


def check_base_for(target: str, checkpoint: Checkpoint) -> None:
    """What a target asks of the base alone.

    Raises:
        InputError: llama.cpp cannot repeat its tokenizer or rotary embedding, or Ollama its template.
    """
    if family(target) not in context.LLAMA_CPP:
        return
    from . import gguf

    context.of_llama_cpp(checkpoint.config, checkpoint.geometry)
    gguf.check_base(checkpoint.config, checkpoint.folder)
    if target == "ollama":
        ollama.take_apart(load_tokenizer(checkpoint.folder), str(checkpoint.folder))


def _context(source: Source) -> int:
    """The context that llama.cpp is to be run with, for the check and by the card."""
    return context.of_llama_cpp(source.checkpoint.config, source.checkpoint.geometry)


def _check_gguf(source: Source, options: Options) -> None:
    """All of the base that has to fit into a GGUF, and the choice of the merge.

    Raises:
        InputError: a tokenizer, template or rotary embedding that llama.cpp cannot repeat; `--merge-base`.
    """
    compare.candidates(source, options.merge_base)
    check_base_for("gguf", source.checkpoint)


def _write_gguf(source: Source, folder: Path, kind: str, options: Options, say: Say) -> dict[str, Any]:
    """The merged model in one file, quantized from float32.

    Raises:
        InputError: `--merge-base` does not fit the adapter.
    """
    from . import gguf

    report = compare.choose(source, options.merge_base, torch.bfloat16, say)
    path = folder / f"{source.file_name}-{kind}.gguf"
    tensors = merge.merged_tensors(source, report.base, torch.float32)
    config, tokenizer = merge.config_of(source, torch.float32), source.checkpoint.folder
    say(f"writing {path.name}")
    stops = source.stop_ids
    gguf.write(path, tensors, config, tokenizer, kind, name=source.name, stop_ids=stops, say=say)
    return {"merge": report.to_json(), "kind": kind, "gguf": path.name, "context": _context(source)}


def write_base_gguf(source: Source, path: Path) -> None:
    """The base alone, as the model that an adapter's GGUF is loaded onto."""
    from . import gguf

    merger = merge.Merger(source, "original", torch.float32, adapted=False)
    tensors = ((name, merger.tensor(name)) for name in merger.shapes)
    config, tokenizer = source.checkpoint.config, source.checkpoint.folder
    gguf.write(path, tensors, config, tokenizer, "f16", name=source.name, stop_ids=source.stop_ids)


def _write_gguf_lora(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """The adapter alone as GGUF, for the base's own GGUF."""
    from . import gguf_lora

    path = folder / f"{source.file_name}-lora.gguf"
    geometry = source.checkpoint.geometry
    gguf_lora.write(path, source.tensors, source.config, geometry, name=source.name)
    return {"gguf": path.name, "context": _context(source)}


def _check_gguf_lora(source: Source, options: Options) -> None:
    """A GGUF adapter has one alpha for all linears, and needs a base that llama.cpp can repeat.

    Raises:
        ModelError: the linears are scaled differently, or the base fits no GGUF.
    """
    from . import gguf_lora

    scales = {f"{pair.scale:.12g}" for pair in merge.fused_pairs(source).values()}
    if len(scales) > 1:
        reason = f"its linears are scaled by {', '.join(sorted(scales))} (alpha_pattern)"
        reason += "; a GGUF adapter has one alpha for all."
        raise ModelError(str(source.folder), reason, "Export gguf:q8_0, with the adapter merged into it.")
    gguf_lora.check_tied(list(merge.fused_pairs(source)), source.checkpoint.geometry, str(source.folder))
    check_base_for("gguf-lora", source.checkpoint)


def _write_ollama(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """A merged GGUF with the Modelfile for `ollama create`."""
    about = _write_gguf(source, folder, options.kind, options, say)
    num_ctx, system = options.num_ctx or about["context"], _system(source)
    if source.system_prompt is not None and system is None:
        say(f"the Modelfile has no SYSTEM: {ollama.UNFIT}")
    made = _modelfile(source, about["gguf"], num_ctx)
    (folder / "Modelfile").write_text(made, encoding="utf-8", newline="")
    return about | {"num_ctx": num_ctx, "context": num_ctx, "system": system is not None}


def _system(source: Source) -> str | None:
    """The system prompt of training, where a Modelfile can hold it."""
    text = source.system_prompt
    return text if text is not None and ollama.fits(text) else None


def _modelfile(source: Source, gguf: str, num_ctx: int) -> str:
    licence = licence_file(source)
    text = files.read_bytes(licence).decode("utf-8", "replace") if licence else licence_name(source)
    told = {"num_ctx": num_ctx, "license": text, "system": _system(source), "stop_ids": source.stop_ids}
    return ollama.modelfile(gguf, source.checkpoint.folder, **told)  # type: ignore[arg-type]


def _check_ollama(source: Source, options: Options) -> None:
    """What a GGUF must be, a template that a Modelfile can say, and a context that the base has.

    Raises:
        InputError: one of these is not so.
    """
    _check_gguf(source, options)
    checkpoint = source.checkpoint
    if options.num_ctx is not None:
        context.check_num_ctx(options.num_ctx, checkpoint.config, checkpoint.geometry, proven=options.gate)
    _modelfile(source, "model.gguf", options.num_ctx or _context(source))


def _check_merged(source: Source, options: Options) -> None:
    compare.candidates(source, options.merge_base)


TABLE: Final[dict[str, Target]] = {
    "adapter": Target(targets.write_adapter, targets.num_bytes, targets.check_adapter),
    "loralib": Target(targets.write_loralib, targets.num_bytes, targets.check_loralib),
    "mlx": Target(targets.write_mlx, targets.num_bytes, targets.check_mlx),
    "vllm": Target(targets.write_vllm, targets.num_bytes, targets.check_vllm),
    "merged": Target(merged.write, merged.num_bytes, _check_merged),
    "gguf-lora": Target(
        _write_gguf_lora,
        targets.num_bytes,
        _check_gguf_lora,
        gate_bytes=lambda source, options: gguf_bytes(source, "f16"),  # the base, for llama.cpp to load it on
    ),
    "ollama": Target(_write_ollama, lambda source, options: gguf_bytes(source, options.kind), _check_ollama),
}
"""Target -> how it is made; `gguf:KIND` is made by its kind, `hub` from what another wrote."""
