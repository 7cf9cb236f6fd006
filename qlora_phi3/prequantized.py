"""Bases that are quantized already, kept from run to run in `bases/` of the package's cache folder.

Owns which base with which settings an entry is, whether keeping it gains anything, and writing it where the
disk has room. A missing, damaged or foreign entry never changes a model: the checkpoint is loaded instead.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from . import builtin, entries, files, json_files
from .recipe import Model
from .units import format_bytes
from .weights import Checkpoint, Say, first_line, weight_files

MIN_BYTES: Final = 10**9
"""Smaller checkpoints are not kept: seconds, beside a training of minutes. The built-in one, 0.27 GB, took
19 s on two busy cores, and 1.5 s from 112 MB of cache."""
MAX_BYTES: Final = 32 * 2**30
"""All entries together; those used least recently go first. Phi-3-mini is 2.1 GiB, medium 7.1."""
SPARE: Final = 0.2
"""Share of an entry's bytes that must stay free beside it."""

_FORMAT: Final = 1
_FILE_BYTES: Final = 512 * 2**20
"""Of one file: what writing takes of the host's memory when the base is on a GPU."""
_LIBRARIES: Final = ("bitsandbytes", "torch", "transformers")
_ABOUT: Final = "about.json"
_CONFIGS: Final = ("generation_config.json", "config.json")
"""Where transformers looks for the settings of answers, beside the weights; the second where no first is."""


@dataclass(frozen=True)
class Entry:
    """Where a base is kept, whether it is there or not yet; `about` is what its name is the hash of."""

    folder: Path
    about: Mapping[str, Any]
    configs: tuple[Path, ...]


def root() -> Path:
    """Where the entries are."""
    return builtin.cache_root() / "bases"


def entry_of(checkpoint: Checkpoint, settings: Model, device_type: str) -> Entry | None:
    """The entry for this base, loaded so; None where none is kept.

    Unquantized bases are not: a copy of the checkpoint loads no faster. Kernels of devices and versions of
    libraries may round differently, so they count.
    """
    shards = weight_files(checkpoint.folder)
    large = sum(path.stat().st_size for path in shards) >= MIN_BYTES
    if not (settings.cache and settings.quantization == "nf4" and large):
        return None
    known = checkpoint.provenance
    configs = tuple(path for name in _CONFIGS if (path := checkpoint.folder / name).is_file())
    about = {
        "format": _FORMAT,
        "base": known.base,
        "revision": known.revision,
        "configs": {path.name: _sha256(files.read_bytes(path)) for path in configs},
        "weights": [{**one, "modified_ns": _modified_ns(checkpoint, one["file"])} for one in known.weights],
        "settings": settings.model_dump(include={"quantization", "double_quant", "compute_dtype"}),
        "device": device_type,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    return Entry(root() / _sha256(json.dumps(about, sort_keys=True).encode()), about, configs)


def is_whole(entry: Entry, say: Say) -> bool:
    """Whether the entry is there and as it was written; one that is damaged is told and removed."""
    if not entry.folder.is_dir():
        return False
    try:
        entries.check(entry.folder)
        if json_files.load(entry.folder / _ABOUT) != entry.about:
            raise ValueError("it is another base's")
    except (OSError, ValueError) as error:
        remove(entry, str(error), say)
        return False
    say(f"reading the quantized base from {entry.folder}")
    return True


def remove(entry: Entry, reason: str, say: Say) -> None:
    """Tell why an entry cannot be used, and remove it."""
    say(f"the quantized base in {entry.folder} is damaged ({reason}): removed, made again")
    shutil.rmtree(entry.folder, ignore_errors=True)


def keep(model: Any, entry: Entry, say: Say) -> None:
    """Write a base just loaded, before anything has run on it; told beforehand, and told where it cannot be.

    Two runs may write the same at once; the first to finish keeps it.
    """
    from safetensors import SafetensorError

    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        root().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root()).free
        if free < num_bytes * (1 + SPARE):
            sizes = f"{format_bytes(num_bytes)} and {SPARE:.0%} spare needed, {format_bytes(free)} free"
            say(f"the quantized base is not kept for later runs: {sizes} in {root()}")
            return
        say(f"keeping the quantized base for later runs, {format_bytes(num_bytes)} in {entry.folder}")
        _write(tensors, entry)
    except (OSError, SafetensorError) as error:
        say(f"the quantized base is not kept for later runs: {first_line(error)} ({root()})")


def _write(tensors: dict[str, Any], entry: Entry) -> None:
    from huggingface_hub import save_torch_state_dict

    with entries.unfinished(root()) as folder:
        save_torch_state_dict(tensors, folder, max_shard_size=_FILE_BYTES)
        (folder / _ABOUT).write_text(json.dumps(entry.about, indent=2), encoding="utf-8")
        for path in entry.configs:
            shutil.copy(path, folder)
        entries.publish(folder, entry.folder, MAX_BYTES)


def _modified_ns(checkpoint: Checkpoint, name: str) -> int:
    """When a file was written, beside what its provenance tells of it."""
    return (checkpoint.folder / name).stat().st_mtime_ns


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
