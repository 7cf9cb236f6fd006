"""Merging an adapter into a checkpoint: seconds and peak memory, in a process of its own.

`random-phi3-mini` is a checkpoint of Phi-3-mini's exact sizes with random weights; it and a random adapter on
all linears are made for the measurement and removed after it. Nothing is compared or gated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from . import results
from .startup import RANDOM, _base, _peak_anonymous, _status_bytes

LIBRARIES: Final = ("torch", "transformers", "bitsandbytes", "safetensors")
_CHECKOUT = Path(__file__).parent.parent


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=RANDOM, help=f"builtin, {RANDOM}, or a checkpoint's folder")
    parser.add_argument("--merge-base", default="dequant", choices=("dequant", "original"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile; default the system's")
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)


def run(chosen: argparse.Namespace) -> int:
    if chosen.merge:
        print(json.dumps(_merge(chosen)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=chosen.folder) as folder:
        base = _base(chosen.model, Path(folder))
        _make_adapter(base, Path(folder) / "adapter", chosen.rank)
        line = [sys.executable, "-m", "bench", "merge", "--merge", folder, "--merge-base", chosen.merge_base]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, cwd=_CHECKOUT)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row = {"model": Path(chosen.model).name, "rank": chosen.rank, "merge_base": chosen.merge_base, **found}
    print(json.dumps(row))
    results.append("merge", row, LIBRARIES)
    return 0


def _make_adapter(base: str, folder: Path, rank: int) -> None:
    """A random adapter on all linears, as PEFT writes it."""
    import torch

    from qlora_phi3 import phi3, weights
    from qlora_phi3.layouts import AdapterConfig, write_adapter
    from qlora_phi3.layouts.names import key_of, linear_shapes
    from qlora_phi3.recipe import Model

    geometry = weights.locate(Model(base=base)).geometry
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module, (num_out, num_in) in linear_shapes(geometry).items():
        if ".layers." in module:
            for side, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
                tensors[key_of(module, side, "peft")] = torch.randn(shape, generator=generator) * 0.01
    write_adapter(folder, tensors, AdapterConfig(rank, 2 * rank, phi3.LINEARS), base=base)


# --- one merge, in a process of its own


def _merge(chosen: argparse.Namespace) -> dict[str, Any]:
    """Reading base and adapter, merging, and writing the shards."""
    import torch

    from qlora_phi3.export import merge, shards
    from qlora_phi3.export.source import open_source

    start = time.perf_counter()
    with _peak_anonymous() as peak:
        source = open_source(chosen.merge / "adapter")
        merger = merge.Merger(source, chosen.merge_base, torch.bfloat16)
        tensors = ((name, merger.tensor(name)) for name in merger.shapes)
        (chosen.merge / "merged").mkdir()
        paths = shards.write(chosen.merge / "merged", tensors, merger.shapes, torch.bfloat16)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "bytes": sum(path.stat().st_size for path in paths),
        "files": len(paths),
        "peak_anonymous_bytes": max(peak),
        "peak_resident_bytes": _status_bytes("VmHWM"),
    }
