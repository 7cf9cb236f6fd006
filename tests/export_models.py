"""Tiny Phi-3 checkpoints of every geometry, with tokenizers of both kinds, for the tests of exports."""

from __future__ import annotations

import json
from functools import partial
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


PHI_4_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "phi-4": rf"{_SHORT}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "phi-4-mini": (
        rf"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}?|{_WORD}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|"
        rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    ),
}
"""How tiktoken's cl100k and o200k, whose vocabularies these two have, cut text before the merges."""


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if kind in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[kind]), "removed", invert=True)
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, whole]) if kind == "chatml" else whole


def byte_level_tokenizer(kind: str) -> Any:
    """Byte-level BPE as the built-in model ("chatml"), Phi-4 and Phi-4-mini have it, and a plain one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    eos, phi3 = "<|endoftext|>", kind in ("bytes", "phi-4-mini")
    special = ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    special = special if phi3 else ["<|im_start|>", "<|im_sep|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    both = {"lstrip": kind == "phi-4", "rstrip": kind != "chatml"}
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, **both) for t in special])
    template = PHI3_TEMPLATE if phi3 else PHI_4_TEMPLATE if kind == "phi-4" else CHATML_TEMPLATE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, chat_template=template, model_max_length=512
    )


TOKENIZERS = {
    "sentencepiece": sentencepiece_tokenizer,
    **{kind: partial(byte_level_tokenizer, kind) for kind in ("bytes", "chatml", "phi-4", "phi-4-mini")},
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
        end = words.convert_tokens_to_ids("<|im_end|>" if tokenizer in ("chatml", "phi-4") else "<|end|>")
        with torch.no_grad():
            model.lm_head.weight[end] *= eager_end
            if "</s>" in words.get_vocab():  # which ends an answer in llama.cpp whatever the file says
                model.lm_head.weight[words.convert_tokens_to_ids("</s>")] = 0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
