"""A checkpoint of exact sizes and random weights, where the real ones are not at hand.

What it takes to load and train is the same: memory and speed do not depend on what the weights are.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

SHARD_BYTES: Final = 5_000_000_000
"""Largest file, as on the hub."""
BUILTIN: Final = "builtin:smollm2-135m"
"""Whose tokenizer it gets: the vocabulary is another one."""


def write(folder: Path, name: str) -> Path:
    """A checkpoint of `name`'s exact sizes in bfloat16 with random weights, in shards as the hub has them."""
    import torch
    from safetensors.torch import save_file
    from transformers import Phi3Config, Phi3ForCausalLM

    from qlora_phi3 import builtin, phi3

    geometry = phi3.VARIANTS[name]
    config = Phi3Config(
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_kv_heads,
        sliding_window=geometry.sliding_window,
        tie_word_embeddings=geometry.tied_embeddings,
        architectures=["Phi3ForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Phi3ForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    shards = _shards({key: 2 * shape.numel() for key, shape in shapes.items()})
    generator, index = torch.Generator().manual_seed(0), {}
    for number, keys in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {
            key: torch.empty(shapes[key], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for key in keys
        }
        save_file(made, folder / file, {"format": "pt"})
        index |= dict.fromkeys(keys, file)
        del made
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    for file in builtin.ensure(BUILTIN.removeprefix("builtin:")).glob("*"):
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder)
    return folder


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Keys in order, each list of at most SHARD_BYTES."""
    shards, room = [], 0
    for key, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(key)
        room -= size
    return shards
