"""A Llama-style chat model in Phi-3's architecture: the same function, under other names.

Owns which Llamas Phi-3's architecture can hold, and the tokenizer that goes with the built-in one. Refuses
the others; where a model comes from and where the result is kept is `builtin`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, Phi3Config, PreTrainedModel, PreTrainedTokenizerFast

END = "<|im_end|>"
PAD = "<|endoftext|>"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SAME_IN_BOTH = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_dropout", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Keys that mean the same in LlamaConfig and Phi3Config."""


@dataclass(frozen=True)
class Source:
    """A fetched Llama-style checkpoint, and what the provenance records about it."""

    folder: Path
    gguf_file: str | None
    facts: dict[str, Any]


def convert(source: Source, target: Path) -> None:
    """Write the Llama-style chat model of `source` into the new folder `target` as Phi-3 in bfloat16.

    Raises:
        ModelError: Phi-3's architecture cannot hold the source, or its turns end with another token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(source.folder, **options)
    if source.gguf_file:
        # transformers 5.23 keeps GGUF blocks packed by default where it knows the architecture.
        options["quantization_config"] = GgufConfig(dequantize=True)
    llama = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16, **options)
    tokenizer = to_chat_tokenizer(tokenizer, max_tokens=llama.config.max_position_embeddings)
    phi3 = to_phi3(llama)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    phi3.config.update(ids)
    phi3.generation_config = GenerationConfig(**ids)
    target.mkdir()
    phi3.save_pretrained(target)
    tokenizer.save_pretrained(target)


def to_chat_tokenizer(tokenizer: PreTrainedTokenizerFast, *, max_tokens: int) -> PreTrainedTokenizerFast:
    """The source's tokenizer with the split of digits that a GGUF loses, and padding apart from the end.

    Raises:
        ModelError: turns do not end with `<|im_end|>`, or there is no `<|endoftext|>` to pad with.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    if tokenizer.eos_token != END or PAD not in tokenizer.get_vocab():
        reason = f"{tokenizer.eos_token!r} ends turns; expected {END!r}, and {PAD!r} in the vocabulary."
        raise ModelError("tokenizer_config.json: eos_token", reason)
    backend = tokenizer.backend_tokenizer
    # transformers 5.23 does not know the GGUF's pre-tokenizer "smollm" and takes plain GPT-2's: "\n\n1" gives
    # \n, \n, 1 where the model learned \n\n, 1. llama.cpp (llama-vocab.cpp, SMOLLM) splits digits first.
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=END,
        unk_token=tokenizer.unk_token,
        # The source pads with <|im_end|>: a loss that masks padding by id would never teach a turn to end.
        pad_token=PAD,
        model_max_length=max_tokens,
        chat_template=tokenizer.chat_template,
    )


def to_phi3(llama: PreTrainedModel) -> PreTrainedModel:
    """The same function as a `Phi3ForCausalLM`, with bit-identical logits in the same dtype.

    Checked on CPU in float32 and bfloat16. At an intermediate size that is no multiple of 32, torch's silu
    rounds a strided row's tail differently, and logits then agree only to rounding.

    Raises:
        ModelError: the model is no Llama, or has biases, another rope, or heads of another size.
    """
    from transformers import Phi3ForCausalLM

    phi3, loading = Phi3ForCausalLM.from_pretrained(
        None,
        config=_phi3_config(llama.config),
        state_dict=fuse(llama.state_dict()),
        dtype=llama.dtype,
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    return phi3


def fuse(llama: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's tensors under Phi-3's names: fused linears stacked row-wise, all others shared.

    Shape: `qkv_proj` [(heads + 2 * kv_heads) * head_dim, hidden], `gate_up_proj` [2 * intermediate, hidden].
    Source: transformers 5.23, `modeling_phi3.py`, Phi3Attention.forward and Phi3MLP.forward.
    """
    import torch

    tensors = dict(llama)
    for name in llama:
        for fused, parts in FUSED.items():
            if name.endswith(f".{parts[0]}.weight"):
                owner = name.removesuffix(f"{parts[0]}.weight")
                rows = [tensors.pop(f"{owner}{part}.weight") for part in parts]
                tensors[f"{owner}{fused}.weight"] = torch.cat(rows)
    return tensors


def _phi3_config(llama: LlamaConfig) -> Phi3Config:
    """Phi-3's config with the Llama's sizes and ids; ModelError for what it has no place for."""
    from transformers import Phi3Config

    rope = dict(getattr(llama, "rope_parameters", None) or {})
    needed = {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
    needed |= {"head_dim": llama.hidden_size // llama.num_attention_heads}
    needed |= {"rope_parameters": rope | {"rope_type": "default"}}
    for key, value in needed.items():
        if (found := getattr(llama, key, None)) != value:
            raise ModelError(f"config.json: {key}", f"is {found!r}; only {value!r} converts to Phi-3.")
    return Phi3Config(
        **{key: getattr(llama, key) for key in SAME_IN_BOTH},
        rope_parameters=rope,
        original_max_position_embeddings=llama.max_position_embeddings,
        sliding_window=None,
    )
