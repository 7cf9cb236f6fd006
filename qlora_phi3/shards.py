"""The safetensors files of a checkpoint: which they are, what their headers say, and what their numbers are.

Owns the one list of files that is checked, hashed and loaded, and whether it holds the model that config.json
describes. Refuses pickles, files outside the folder, quantized and cut ones, and numbers that are none. No
torch: a header is read in a millisecond, before anything else is.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import xxhash

from . import json_files, phi3
from .errors import ModelError, is_file, shown
from .files import open_file

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

MAX_HEADER_BYTES: Final = 100_000_000
"""Of safetensors itself: longer headers are refused there too."""

_AGAIN: Final = "Download it again."
_WHOLE: Final = "Give a folder that holds a whole checkpoint."
_TAKEN: Final = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of a number, of the dtypes that weights may have."""
_INFINITY: Final = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "BF16": 0x7F80, "F16": 0x7C00}
"""Infinity's bits as a whole number: in size above all finite numbers, below every NaN."""

_QUANTIZED: Final = "Give the original 16-bit checkpoint; NF4 is made while loading."
_NO_BUFFERS: Final = re.compile(r"rotary_emb\.inv_freq$")
"""What transformers 5.23 passes over: older versions wrote it into every layer."""
_UNFUSED: Final = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight$")

_NUM_SAMPLES, _SAMPLE_BYTES = 64, 2**16
_BLOCK: Final = 2**20


@dataclass(frozen=True)
class Stored:
    """A tensor as its file's header describes it; `start` and `stop` are bytes of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads a checkpoint's weights from, and no others that lie beside them.

    Raises:
        ModelError: the index of a sharded checkpoint is missing, or names anything but files of the folder.
    """
    whole = folder / WEIGHTS
    there = os.path.lexists(whole)  # a pipe, or a link to nowhere, is told as what it is
    return [whole] if there else [folder / name for name in sorted({*_weight_map(folder).values()})]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor of a checkpoint -> the file that transformers loads it from.

    Raises:
        ModelError: as `read`.
    """
    return {name: stored.file for name, stored in read(folder).items()}


def read(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, out of the headers alone.

    Raises:
        ModelError: a file is missing, cut or none, or the index says otherwise than the files.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for name, stored in _header(path).items():
            if name in found:
                reason = f"holds {name}, and so does {found[name].file.name}."
                raise ModelError(str(path), reason, _AGAIN)
            found[name] = stored
    named = {} if (folder / WEIGHTS) in {one.file for one in found.values()} else _weight_map(folder)
    for name, file in named.items():
        if name not in found or found[name].file.name != file:
            raise ModelError(str(folder / INDEX), f"says that {name} is in {file}, where it is not.", _AGAIN)
    return found


def check(folder: Path, geometry: phi3.Geometry) -> None:
    """Compare what the files hold with what config.json describes, before any of it is loaded.

    Raises:
        ModelError: a tensor is missing, too many, of another shape, or of a dtype that weights do not have.
    """
    found = {name: one for name, one in read(folder).items() if not _NO_BUFFERS.search(name)}
    expected = geometry.tensor_shapes()
    for name, stored in found.items():
        if stored.dtype not in _TAKEN:
            reason = f"{name} is stored as {shown(stored.dtype)}; weights are one of {', '.join(_TAKEN)}."
            raise ModelError(str(stored.file), reason, _QUANTIZED)
    missing = sorted(expected.keys() - found.keys())
    optional = {phi3.HEAD_WEIGHT: (geometry.vocab_size, geometry.hidden_size)}  # of a tied base: a copy
    surplus = sorted(found.keys() - expected.keys() - optional.keys())
    unfused = next(filter(_UNFUSED.search, surplus), None)
    if missing and unfused is not None:
        reason = f"holds {shown_name(unfused)}, a linear as Llama has it: Phi-3's are fused."
        raise ModelError(str(folder), reason, "Give a checkpoint with qkv_proj and gate_up_proj.")
    if missing:
        reason = f"{len(missing)} weights are missing, {missing[0]} the first: they would be random."
        raise ModelError(str(folder), reason, "Give these weights' own config.json, or download them again.")
    if surplus:
        reason = f"{len(surplus)} weights fit nowhere in Phi-3, {shown_name(surplus[0])} the first."
        raise ModelError(str(folder), reason, "Give a full Phi3ForCausalLM checkpoint, and its config.json.")
    for name, shape in (optional | expected).items():
        if name in found and found[name].shape != shape:
            reason = f"{name} is {list(found[name].shape)}, but config.json says {list(shape)}."
            raise ModelError(str(folder), reason, "Give the config.json that belongs to these weights.")
    if geometry.tied_embeddings and phi3.HEAD_WEIGHT in found:
        _check_tied(folder, found[phi3.HEAD_WEIGHT], found[phi3.EMBEDDING_WEIGHT])


def _check_tied(folder: Path, head: Stored, embedding: Stored) -> None:
    """Refuse a head of its own where config.json says that it is the embedding; a copy of that is none.

    A few MiB strewn over both tell; the load compares all numbers, and those of two dtypes.
    """
    if head.dtype == embedding.dtype and _samples(head) != _samples(embedding):
        raise other_head(folder)


def other_head(folder: Path) -> ModelError:
    reason = "tie_word_embeddings is true, but the weights hold a head that is not the embedding."
    return ModelError(str(folder / "config.json"), reason, "Set tie_word_embeddings to false there.")


def _samples(stored: Stored) -> str:
    digest, size = xxhash.xxh3_128(), stored.stop - stored.start
    with _opened(stored.file) as file:
        for i in range(_NUM_SAMPLES):
            at = stored.start + i * size // _NUM_SAMPLES
            file.seek(at)
            digest.update(file.read(min(_SAMPLE_BYTES, stored.stop - at)))
    return digest.hexdigest()


def shown_name(name: str) -> str:
    """A tensor's name, cut for a message."""
    return name if len(name) <= 120 else f"{name[:117]}..."


def check_finite(folder: Path) -> None:
    """Refuse weights that hold NaN or infinity, which NF4 would hide and every loss would show.

    All bytes are read once, 1.4 GB a second out of the page cache on two cores that ten others shared: the
    largest number, as signed and as unsigned whole numbers, tells of a block.

    Raises:
        ModelError: the first tensor that does, or a file that cannot be read.
    """
    for name, stored in read(folder).items():
        try:
            finite = _is_finite(stored)
        except OSError as error:
            raise _unreadable(stored.file, error) from None
        if not finite:
            reason = f"{shown_name(name)} holds NaN or infinity: it would spoil every answer and loss."
            raise ModelError(str(stored.file), reason, _AGAIN)


def _is_finite(stored: Stored) -> bool:
    """By the bits of each number: as a whole number infinity's are the first that is too large.

    Signed ones find positive numbers, unsigned ones negative ones, whose sign is the highest bit.
    """
    import numpy as np

    size, limit = _TAKEN[stored.dtype], _INFINITY[stored.dtype]
    buffer = memoryview(bytearray(min(_BLOCK, stored.stop - stored.start)))
    with open_file(stored.file) as file:
        file.seek(stored.start)
        for at in range(stored.start, stored.stop, _BLOCK):
            block = buffer[: stored.stop - at]
            if file.readinto(block) < len(block):
                raise OSError(errno.EIO, "It became shorter", str(stored.file))
            bits = np.frombuffer(block, f"<u{size}")
            if int(bits.view(f"<i{size}").max()) >= limit or int(bits.max()) >= limit | 1 << (8 * size - 1):
                return False
    return True


def header_sha256(path: Path) -> str:
    """Hash of a safetensors header: names, shapes, dtypes; cheap on a 5 GB file, and so is its length."""
    with _opened(path) as file:
        return hashlib.sha256(_header_bytes(path, file)).hexdigest()


def samples_xxh3(path: Path) -> str:
    """Hash of a few MiB strewn over a file: names, shapes and sizes stay when weights change.

    All of it is not read: on a disk that takes longer than the load it saves.
    """
    digest = xxhash.xxh3_128()
    with _opened(path) as file:
        size = path.stat().st_size
        for i in range(_NUM_SAMPLES):
            file.seek(i * size // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file of a sharded checkpoint: each a safetensors file in the folder itself.

    Raises:
        ModelError: the index is missing, is none, or names anything else.
    """
    path = folder / INDEX
    if not os.path.lexists(path):
        reason = f"holds neither {WEIGHTS} nor {INDEX}, from which the weights would be loaded."
        raise ModelError(str(folder), reason, _WHOLE)
    found = json_files.read_object(path, ModelError, _AGAIN, strict=True).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelError(str(path), "has no weight_map.", _AGAIN)
    there: set[str] = set()
    for name in found.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            reason = f"names {shown(name)}, which is no safetensors file of this folder."
            raise ModelError(str(path), reason, "Choose a checkpoint whose weights are all in its folder.")
        if name not in there and not is_file(folder / name, ModelError):
            raise ModelError(
                str(path), f"names {shown(name)}, which is not there.", "Download the checkpoint again."
            )
        there.add(name)
    return found


def _opened(path: Path) -> BinaryIO:
    try:
        return open_file(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        str(path), f"cannot be read: {json_files.said(error)}.", json_files.way_on(error, _AGAIN)
    )


def _spoiled(path: Path, why: str) -> ModelError:
    return ModelError(str(path), f"is truncated or no safetensors file: {why}.", _AGAIN)


def _header_bytes(path: Path, file: BinaryIO) -> bytes:
    """The JSON at the beginning of a file that was just opened."""
    start = file.read(8)
    what = json_files.other_format(start + file.read(64))
    if what is not None:
        raise ModelError(str(path), f"is no safetensors file: {what}.", _AGAIN)
    length = int.from_bytes(start, "little")
    file.seek(8)
    content = file.read(length) if len(start) == 8 and length <= MAX_HEADER_BYTES else b""
    if not content or len(content) < length:
        raise _spoiled(path, "its header is longer than the file" if start else "it is empty")
    return content


def _header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, as its library checks it: contiguous, and as long as the file."""
    with _opened(path) as file:
        content = _header_bytes(path, file)
    try:
        header = json_files.parse(content.decode("utf-8"))
    except ValueError as error:
        raise _spoiled(path, f"its header cannot be read, {error}") from None
    if not isinstance(header, dict):
        raise _spoiled(path, "its header is not a JSON object")
    begins = 8 + len(content)
    found = {
        name: _stored(path, name, entry, begins) for name, entry in header.items() if name != "__metadata__"
    }
    stop = begins
    for name, stored in sorted(found.items(), key=lambda one: (one[1].start, one[1].stop)):
        if stored.start != stop:
            raise _spoiled(path, f"{shown_name(name)} does not begin where the one before it ends")
        stop = stored.stop
    if stop != (size := path.stat().st_size):
        raise _spoiled(path, f"its header speaks of {stop:,} bytes, and it has {size:,}")
    return found


def _stored(path: Path, name: str, entry: Any, begins: int) -> Stored:
    entry = entry if isinstance(entry, Mapping) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _spoiled(path, f"{shown_name(name)} has no dtype, shape and data_offsets")
    start, stop = offsets
    if dtype in _TAKEN and stop - start != math.prod(shape) * _TAKEN[dtype]:
        raise _spoiled(path, f"{shown_name(name)} has {stop - start:,} bytes, not those of its shape")
    return Stored(path, dtype, tuple(shape), begins + start, begins + stop)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)
