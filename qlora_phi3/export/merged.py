"""A checkpoint with the adapter in its weights, as the hub has checkpoints.

Owns which files it has and that what was written is whole. Refuses nothing of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import torch

from .. import files
from ..errors import RunError
from . import compare, context, shards, stops
from .merge import Merger, config_of, merged_tensors
from .options import Options, Say
from .source import Source, copy_tokenizer, licence_file, tokenizer_bytes

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


def num_bytes(source: Source, options: Options) -> int:
    """Of all files, to a few kilobytes."""
    return Merger(source, "original", DTYPES[options.dtype]).num_bytes + tokenizer_bytes(source)


def write(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """Write the merged checkpoint into an empty folder; the merge report.

    Raises:
        InputError: `--merge-base` does not fit the adapter, or `--dtype` not the numbers.
        RunError: what was written reads back differently.
    """
    dtype = DTYPES[options.dtype]
    report = compare.choose(source, options.merge_base, dtype, say)
    merger = Merger(source, report.base, dtype)
    say(f"writing {len(merger.shapes)} tensors")
    paths = shards.write(folder, merged_tensors(source, report.base, dtype), merger.shapes, dtype)
    _check_written(paths, merger)
    files.write_json(folder / "config.json", config_of(source, dtype))
    copy_tokenizer(source, folder)
    files.write_json(folder / stops.NAME, stops.generation_config(source))
    licence = licence_file(source)
    if licence is not None:
        shutil.copyfile(licence, folder / licence.name)
    longest = context.of_vllm(source.checkpoint.config, source.checkpoint.geometry)
    return {"merge": report.to_json(), "dtype": options.dtype, "max_model_len": longest}


def _check_written(paths: list[Path], merger: Merger) -> None:
    """Every tensor is there in its shape, and the smallest of each file as it was computed."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as tensors:
                names = list(tensors.keys())
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
                probe = min(names, key=lambda name: torch.Size(found[name]).numel())
                same = torch.equal(tensors.get_tensor(probe), merger.tensor(probe))
        except (OSError, SafetensorError) as error:
            raise RunError(
                str(path), f"cannot be read back: {error}.", "Check the disk, then again."
            ) from None
        if not same:
            raise RunError(str(path), f"reads back differently: {probe}.", "Check the disk, then again.")
    assert found == merger.shapes, "a tensor is missing"
