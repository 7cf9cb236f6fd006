"""Tiny Phi-3 checkpoints of every geometry, with tokenizers of both kinds, for the tests of exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import CHATML_TEMPLATE, PHI3_TEMPLATE

TEXTS = [
    "Hello there, how are you today? I would like 3 pizzas and 12 beers, please.\n\nThanks a lot!",
    "  def f(x):\n    return x + 1\n",
    'The order is ready: {"item": "tea", "count": 2}. Say hello to the other one.',
    "It's what we'll count: 1 2 3, 100 200.",
]
SPARE_ROWS = 8
"""Rows of the embedding beyond the tokenizer's ids, as real checkpoints have."""

_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
FAMILY: dict[str, dict[str, Any]] = {
    "mini": {"num_key_value_heads": 4},
    "mini-128k": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            **_LONG,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [1.0 + 0.7 * i for i in range(8)],
        },
    },
    "medium": {"num_key_value_heads": 2},
    "phi-4-mini": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
}


def sentencepiece_tokenizer() -> Any:
    """Phi-3's kind: BPE over words with a space in front, bytes for what it does not know."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []  # bytes are ordinary pieces in the real one
    tokenizer = Tokenizer.from_str(json.dumps(content))
    plain = ["<unk>", "<s>", "<|endoftext|>"]
    eating = ["</s>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in plain])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=True) for t in eating])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=PHI3_TEMPLATE,
        model_max_length=512,
    )


def byte_level_tokenizer(*, chatml: bool) -> Any:
    """Byte-level BPE: the built-in model's, with ChatML and digits apart, or with Phi-3's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, whole]) if chatml else whole
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    eos = "<|endoftext|>"
    special = (
        ["<|im_start|>", "<|im_end|>"] if chatml else ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    )
    tokenizer.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    added = [AddedToken(t, special=True, normalized=False, rstrip=not chatml) for t in special]
    tokenizer.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=eos,
        chat_template=CHATML_TEMPLATE if chatml else PHI3_TEMPLATE,
        model_max_length=512,
    )


TOKENIZERS = {
    "sentencepiece": sentencepiece_tokenizer,
    "bytes": lambda: byte_level_tokenizer(chatml=False),
    "chatml": lambda: byte_level_tokenizer(chatml=True),
}


def checkpoint(
    folder: Path,
    kind: str,
    tokenizer: str = "sentencepiece",
    *,
    width: int = 64,
    eager_end: float = 0.0,
    seed: int = 0,
) -> Path:
    """A random float32 checkpoint; `eager_end` makes the token that ends a turn likelier.

    Its answers then end after a few tokens, as a trained model's do.
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    words = TOKENIZERS[tokenizer]()
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(words) + SPARE_ROWS,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "original_max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "sliding_window": None,
        "initializer_range": 0.2,
    }
    model = Phi3ForCausalLM(Phi3Config(**(settings | FAMILY[kind]))).eval()
    if eager_end:
        end = words.convert_tokens_to_ids("<|im_end|>" if tokenizer == "chatml" else "<|end|>")
        with torch.no_grad():
            model.lm_head.weight[end] *= eager_end
            if "</s>" in words.get_vocab():  # which ends an answer in llama.cpp whatever the file says
                model.lm_head.weight[words.convert_tokens_to_ids("</s>")] = 0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
