"""Tiny checkpoints of the family's geometries and trained-looking adapters on them, as runs leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import phi3_tokenizer, write_chats

from qlora_phi3 import adapters, model, strict_yaml, weights
from qlora_phi3.recipe import Recipe

LEGACY_ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 512}
LONG = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
FAMILY: dict[str, dict[str, Any]] = {
    "mini": {"num_key_value_heads": 4, "tie_word_embeddings": False, **LEGACY_ROPE},
    "medium": {"num_key_value_heads": 2, "tie_word_embeddings": False, **LEGACY_ROPE},
    "phi-4-mini": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        **LEGACY_ROPE,
    },
    "mini-128k": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
        "rope_scaling": LONG,
        **LEGACY_ROPE,
        "original_max_position_embeddings": 300,
    },
}
"""Keys of config.json in the spelling of Microsoft's own checkpoints."""


def make_base(folder: Path, kind: str, seed: int = 0) -> Path:
    """A random checkpoint with a tokenizer, whose config.json has the hub's legacy spelling."""
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = phi3_tokenizer()
    torch.manual_seed(seed)
    written = {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "model_type": "phi3",
        "vocab_size": len(tokenizer) + 11,  # as Phi-3 has rows to spare, which GGUF needs
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "sliding_window": None,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        **FAMILY[kind],
    }
    config = Phi3Config.from_dict({k: v for k, v in written.items() if k != "auto_map"})
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(written))
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def make_run(home: Path, base: Path, **keys: dict[str, Any]) -> Path:
    """A run folder as if trained: recipe.yaml and adapter/, its Bs random. `keys`: model and adapter."""
    run = home / "run"
    run.mkdir(parents=True)
    chats = write_chats(home / "chats.jsonl")
    recipe = Recipe.model_validate(
        {
            "version": 1,
            "name": "lab",
            "model": {"base": str(base), "compute_dtype": "float32", **keys.get("model", {})},
            "adapter": {"rank": 4, "alpha": 8, **keys.get("adapter", {})},
            "data": {
                "train": {"path": str(chats)},
                "eval": {"path": str(chats), "limit": 4},
                "max_length": 128,
            },
        }
    )
    loaded = model.load(weights.locate(recipe.model), recipe.model, torch.device("cpu"))
    torch.manual_seed(1)
    tuned = adapters.attach(loaded, recipe)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lora_embedding" in name):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapters.save(tuned, loaded, run / "adapter")
    (run / "recipe.yaml").write_text(strict_yaml.dump(recipe.model_dump(mode="json")))
    return run
