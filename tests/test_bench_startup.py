"""The load benchmark: its checkpoint is what it says, and each kind of load leaves its row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench import random_base, results, startup
from bench.__main__ import main
from qlora_phi3 import builtin, phi3

MINI = "microsoft/Phi-3-mini-4k-instruct"


def test_every_load_leaves_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert main(["startup", "--repeats=1", "--cold", f"--model={checkpoints('gqa')}"]) == 0
    [path] = tmp_path.glob("*/startup.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["load"] for row in rows] == ["first", "later"]
    assert rows[0]["speed_against_first"] == 1.0
    for row in rows:
        [one] = row["loads"]
        assert row["load_seconds"] == one["load_seconds"] > 0
        assert one["anonymous_bytes_before"] > 2**25
        assert one["peak_resident_bytes"] > row["peak_anonymous_bytes"] > one["anonymous_bytes_before"]
        assert row["entry_bytes"] > 100_000
        assert row["model"] == "gqa" and str(checkpoints("gqa")) not in json.dumps(row)


def test_random_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads whole, in several files of bounded size, and is the same again."""
    import torch
    from conftest import phi3_tokenizer
    from safetensors.torch import load_file

    from qlora_phi3 import model, weights
    from qlora_phi3.recipe import Model

    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_layers": 3}
    small = replace(phi3.VARIANTS[MINI], num_heads=4, num_kv_heads=2, **sizes)
    monkeypatch.setitem(phi3.VARIANTS, MINI, small)
    monkeypatch.setattr(random_base, "SHARD_BYTES", 9_000_000)
    phi3_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(builtin, "ensure", lambda name: tmp_path / "tokenizer")

    folder = random_base.write(tmp_path / "base", MINI)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2 and all(file.stat().st_size < 9_000_000 + 5_000 for file in files)
    settings = Model(base=str(folder), quantization="none")
    checkpoint = weights.locate(settings)
    assert replace(small, max_positions=4096) == checkpoint.geometry
    base = model.load(checkpoint, settings, torch.device("cpu"))
    assert model.ParameterCounts.of(base.model).total == small.num_parameters
    again = random_base.write(tmp_path / "again", MINI)
    for file in files:
        one, other = load_file(file), load_file(again / file.name)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_shards_of_phi_3_mini_are_the_hub_s() -> None:
    """4.97 and 2.67 GB, in the order of the model's own keys."""
    geometry, embedding = phi3.VARIANTS[MINI], 2 * 32064 * 3072
    order = ("o_proj", "qkv_proj", "gate_up_proj", "down_proj")
    layer = [2 * rows * columns for rows, columns in map(geometry.linear_shape, order)]
    sizes = {"embedding": embedding}
    sizes |= {f"{i}.{name}": size for i in range(32) for name, size in zip(order, layer, strict=True)}
    sizes |= {"head": embedding}
    found = [sum(sizes[key] for key in shard) for shard in random_base._shards(sizes)]
    assert [round(size / 1e9, 2) for size in found] == [4.97, 2.67]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux counts private memory apart")
def test_peak_of_private_memory_leaves_mapped_files_out(tmp_path: Path) -> None:
    """64 MiB of our own for a moment, and a file of 192 MiB that is mapped and read."""
    code = (
        "import mmap, sys, time\nfrom bench import startup\n"
        "with startup._peak_anonymous() as found:\n"
        "    with open(sys.argv[1], 'rb') as file:\n"
        "        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "        total = sum(mapped[i] for i in range(0, len(mapped), 4096))\n"
        "    block = bytearray(b'x') * 2**26\n    time.sleep(0.1)\n    del block\n    time.sleep(0.1)\n"
        "print(max(found) - found[0], max(found) - startup._status_bytes('RssAnon'))\n"
    )
    file = tmp_path / "large"
    file.write_bytes(b"y" * (192 * 2**20))
    line = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(
        line, capture_output=True, text=True, check=True, cwd=Path(startup.__file__).parents[1]
    )
    rose, fell = map(int, done.stdout.split())
    assert 2**26 <= rose < 2**26 * 1.5 and fell > 2**26 * 0.9
