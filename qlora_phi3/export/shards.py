"""Safetensors files written tensor by tensor as they come, in shards with an index.

Owns the byte layout, since the library's own writer takes all tensors of a file at once and a copy of each.
Refuses tensors other than those announced.

Source: safetensors' README, "Format"; the names of shards and index are transformers' own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

MAX_BYTES: Final = 2 * 10**9
"""Of one file; a single larger tensor has one of its own."""

INDEX: Final = "model.safetensors.index.json"
_NAMES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_ALIGN: Final = 8


def write(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Write `tensors`, which come in the order of `shapes`, holding one at a time; the files, in order."""
    groups = plan(
        {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}, max_bytes
    )
    paths = [folder / _file_name(number, len(groups)) for number in range(1, len(groups) + 1)]
    expected = iter([(path, name) for path, group in zip(paths, groups, strict=True) for name in group])
    headers = {
        path: _header({name: shapes[name] for name in group}, dtype)
        for path, group in zip(paths, groups, strict=True)
    }
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name, tensor in tensors:
            path, wanted = next(expected)
            assert (name, tuple(tensor.shape), tensor.dtype) == (wanted, tuple(shapes[wanted]), dtype), name
            if path not in files:
                stack.pop_all().close()
                files[path] = stack.enter_context(path.open("wb"))
                files[path].write(headers[path])
            files[path].write(tensor.contiguous().view(torch.uint8).numpy().data)
    assert next(expected, None) is None, "a tensor is missing"
    if len(paths) > 1:
        _write_index(folder, paths, groups, dtype, shapes)
    return paths


def plan(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, each list of at most `max_bytes`, or a single larger tensor."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


def _write_index(
    folder: Path,
    paths: list[Path],
    groups: list[list[str]],
    dtype: torch.dtype,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    weight_map = {name: path.name for path, group in zip(paths, groups, strict=True) for name in group}
    sizes = {"total_parameters": total, "total_size": total * dtype.itemsize}
    content = {"metadata": sizes, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
