"""Tiny Phi-3 checkpoints with a tokenizer whose special tokens behave like Phi-3's, made on the spot."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("QLORA_PHI3_OWN_THREADS", os.environ.get("OMP_NUM_THREADS", ""))  # what a user has
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_collection_finish() -> None:
    """Modules are never garbage: each training collects it, and would look through all of torch for some."""
    gc.collect()
    gc.freeze()


PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "gqa": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


def phi3_tokenizer() -> Any:
    """Byte-level tokenizer with Phi-3's special tokens: all but the eos swallow whitespace after them."""
    return _byte_tokenizer(
        ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
        "<|endoftext|>",
        PHI3_TEMPLATE,
    )


def chatml_tokenizer() -> Any:
    """Byte-level tokenizer with ChatML and a template that inserts a default system message."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_tokenizer(special, "<|endoftext|>", CHATML_TEMPLATE, swallow=False)


def _byte_tokenizer(special: list[str], eos: str, template: str, *, swallow: bool = True) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(t, special=True, normalized=False, rstrip=swallow and t != eos) for t in special]
    tokenizer.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, chat_template=template, model_max_length=512
    )


def make_checkpoint(folder: Path, geometry: str = "gqa", tokenizer: Any = None, seed: int = 0) -> Path:
    """A random `Phi3ForCausalLM` of 2 layers with its tokenizer, saved as a user would have it."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = tokenizer or phi3_tokenizer()
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        sliding_window=None,
        initializer_range=0.2,
        **GEOMETRIES[geometry],
    )
    model = Phi3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint by geometry, made once a session; do not write into it."""
    made: dict[str, Path] = {}

    def get(geometry: str = "gqa") -> Path:
        if geometry not in made:
            made[geometry] = make_checkpoint(tmp_path_factory.mktemp("base") / geometry, geometry)
        return made[geometry]

    return get


def write_chats(path: Path, rows: int = 12, *, turns: int = 1) -> Path:
    """A JSONL file of short conversations of varying length."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            messages = [{"role": "system", "content": "Count."}] if i % 3 == 0 else []
            for turn in range(turns):
                messages.append({"role": "user", "content": f"say {i} " + "x" * (i % 5) + "?" * turn})
                messages.append({"role": "assistant", "content": f"{i}" * (1 + i % 4)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl")


@pytest.fixture
def write_recipe(tmp_path: Path, checkpoints: Callable[[str], Path], chats: Path) -> Callable[..., Path]:
    """Writes a small, runnable recipe; keyword `lines` adds or replaces top-level YAML lines."""

    def write(name: str = "tiny", *, geometry: str = "gqa", extra: str = "", train: str = "") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"version: 1\nname: {name}\n"
            f"model: {{base: {checkpoints(geometry)}}}\n"
            f"adapter: {{rank: 4, alpha: 8}}\n"
            f"data:\n  train: {{path: {chats}}}\n  eval: {{path: {chats}, limit: 4}}\n  max_length: 128\n"
            f"train: {{max_steps: 3, effective_batch: 4, micro_batch: 2, learning_rate: 1.0e-2{train}}}\n"
            f"evaluate: {{metrics: [loss, exact_match, json_match], samples: 4, max_new_tokens: 8}}\n{extra}",
            encoding="utf-8",
        )
        return path

    return write
