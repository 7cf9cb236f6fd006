"""Load a Phi-3 base in NF4 or unquantized, with the native class and our own dtype policy.

Owns the load, from the checkpoint or as `prequantized.py` kept it, which dtype every tensor has, and logical
parameter counts. Refuses weights that do not fill the model, and a dtype that the device does not have.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from . import config_values, ladder, prequantized, shards, template_limits, tokenizer_files
from .errors import ModelError, is_file
from .recipe import Model
from .weights import Checkpoint, Say, first_line, read_config

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Base:
    """A loaded base model with its tokenizer; `model` is a frozen `Phi3ForCausalLM`."""

    model: Any
    tokenizer: Any
    checkpoint: Checkpoint
    compute_dtype: torch.dtype
    quantized: bool


@dataclass(frozen=True)
class ParameterCounts:
    """Logical parameters: a packed 4-bit weight counts what it stands for, not its bytes."""

    total: int
    quantized: int
    trainable: int

    @classmethod
    def of(cls, model: nn.Module) -> ParameterCounts:
        counts = [(p, logical_numel(p)) for p in model.parameters()]
        return cls(
            total=sum(n for _, n in counts),
            quantized=sum(n for p, n in counts if is_packed(p)),
            trainable=sum(n for p, n in counts if p.requires_grad),
        )


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether a parameter holds bitsandbytes 4-bit data, two weights in a byte."""
    return getattr(parameter, "quant_state", None) is not None


def logical_numel(parameter: nn.Parameter) -> int:
    """Number of weights; `numel()` of a packed 4-bit weight is half of it."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(parameter.shape if state is None else state.shape).numel())


def device_for_run() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(folder: Path) -> Any:
    """Tokenizer of a checkpoint, with a chat template and a pad token.

    Raises:
        ModelError: it cannot be read, has no chat template, no token to pad with, or more tokens than the
            embedding has rows.
    """
    from transformers import AutoTokenizer

    tokenizer_files.check_settings(folder)
    known = is_file(folder / "config.json", ModelError)  # not of a tokenizer by itself, as an export has it
    config = _native_config(read_config(folder), folder) if known else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises nothing more specific
        reason = f"the tokenizer cannot be read: {first_line(error).rstrip('.')}."
        raise ModelError(str(folder), reason, "Download the tokenizer files again.") from None
    if not tokenizer.chat_template:
        raise ModelError(str(folder), "the tokenizer has no chat template.", "Choose an instruct checkpoint.")
    several = isinstance(tokenizer.chat_template, dict)
    for template in tokenizer.chat_template.values() if several else [tokenizer.chat_template]:
        template_limits.check(template, str(folder))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(str(folder), "the tokenizer has neither pad nor eos token.", "Set one in it.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    highest = max((*tokenizer.added_tokens_decoder, len(tokenizer) - 1))
    if config is not None and highest >= config.vocab_size:
        added = str(tokenizer.convert_ids_to_tokens(highest))
        raise tokenizer_files.beyond(folder, highest, added, config.vocab_size)
    return tokenizer


def load(
    checkpoint: Checkpoint,
    settings: Model,
    device: torch.device,
    attention: str = "sdpa",
    say: Say = lambda _: None,
) -> Base:
    """Load the frozen base under our dtype policy.

    Embeddings, norms and head are in `compute_dtype` (PEFT's k-bit preparation would make them float32,
    376 MiB more on Phi-3-mini), decoder linears in NF4 or `compute_dtype`. A large quantized base is kept for
    later loads, which read it bit by bit as it was.

    Raises:
        ModelError: weights missing, of another shape, or without safetensors; bf16 unsupported here.
    """
    dtype = DTYPES[settings.compute_dtype]
    _check_device(dtype, device)
    quantized = settings.quantization == "nf4"
    if quantized and device.type == "cpu":
        _check_cpu_widths(checkpoint)
    model = _load_weights(checkpoint, settings, device, attention, say)
    model.requires_grad_(False)
    model.config.use_cache = False
    if quantized:
        _keep_differentiable(model)
    base = Base(model, load_tokenizer(checkpoint.folder), checkpoint, dtype, quantized)
    check_dtypes(model, compute=dtype, quantized=quantized)
    return base


def check_dtypes(model: nn.Module, *, compute: torch.dtype, quantized: bool) -> None:
    """Assert the dtype policy: base in `compute` or packed NF4, everything trainable in float32.

    Run again after the trainer is built: TRL casts adapters of quantized models to bfloat16, in which
    updates below 1/256 of a weight vanish.

    Raises:
        AssertionError: our bug, or a library changed what it does to dtypes.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, f"{name} is trained in {parameter.dtype}"
        elif is_packed(parameter):
            assert quantized, f"{name} is packed, but the base is not quantized"
        else:
            assert parameter.dtype == compute, f"{name} is {parameter.dtype}, policy says {compute}"


def packed_linears(model: nn.Module) -> Iterator[Any]:
    """The bitsandbytes 4-bit linears of a model."""
    import bitsandbytes as bnb

    return (module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))


def _keep_differentiable(model: nn.Module) -> None:
    # bitsandbytes 0.50, CPUs with AVX512-BF16: the first eval-mode forward repacks each weight for
    # inference, and its matmul is not differentiable from then on. Training after an evaluation would go
    # on with wrong gradients and learn nothing.
    for module in packed_linears(model):
        module.support_avx512bf16_for_cpu = False


def _check_device(dtype: torch.dtype, device: torch.device) -> None:
    bf16_on_gpu = device.type == "cuda" and dtype == torch.bfloat16
    if bf16_on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ModelError(
            "model.compute_dtype", f"{name} has no bfloat16.", "Set model.compute_dtype=float16."
        )
    if device.type == "cpu" and dtype == torch.float16:
        remedy = "Set model.compute_dtype=bfloat16 or float32."
        raise ModelError("model.compute_dtype", "float16 training needs a GPU.", remedy)


def _check_cpu_widths(checkpoint: Checkpoint) -> None:
    # bitsandbytes 0.50 dequantizes such weights wrongly on a CPU: errors of 1.24 of a block's largest
    # weight were measured at width 96, where 0.15 is NF4's own.
    widths = {checkpoint.geometry.hidden_size, checkpoint.geometry.intermediate_size}
    if any(width % 64 for width in widths):
        reason = f"a width of {sorted(widths)} is no multiple of 64: NF4 is wrong for it on a CPU."
        raise ModelError(str(checkpoint.folder), reason, "Set model.quantization=none, or use a GPU.")


def _load_weights(
    checkpoint: Checkpoint, settings: Model, device: torch.device, attention: str, say: Say
) -> Any:
    """The model with its weights: as an earlier load kept them, else from the checkpoint and kept."""
    entry = prequantized.entry_of(checkpoint, settings, device.type)
    if entry is not None and prequantized.is_whole(entry, say):
        try:
            return _read(entry.folder, checkpoint, settings, device, attention)
        except ModelError as error:  # another run removed it meanwhile, or it never was what we write
            prequantized.remove(entry, error.problems[0].reason, say)
    shards.check_finite(checkpoint.folder)
    model = _read(checkpoint.folder, checkpoint, settings, device, attention)
    if settings.quantization == "nf4":
        _leave_files(model)
    if entry is not None:
        prequantized.keep(model, entry, say)
    return model


def _leave_files(model: nn.Module) -> None:
    """Copies in place of a CPU's views of the checkpoint's files, of which 4-bit weights need nothing more.

    While the embedding is one, all that was read stays resident: 256 MiB of the built-in model.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not is_packed(parameter):
            parameter.data = parameter.data.clone()


def _read(folder: Path, checkpoint: Checkpoint, settings: Model, device: torch.device, attention: str) -> Any:
    """The model with the weights in `folder`, the checkpoint's own or quantized ones.

    transformers 5.23 reads and quantizes one matrix after the other: beside what is loaded there is one in
    its own dtype, and what bitsandbytes takes to quantize it.
    """
    from transformers import Phi3ForCausalLM

    config, nf4 = native_config(checkpoint), _nf4(settings)
    _check_generation(checkpoint.folder)
    if nf4 is not None and folder != checkpoint.folder:  # quantized already: transformers reads that here
        config.quantization_config, nf4 = nf4.to_dict(), None
    try:
        model, loading = Phi3ForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[settings.compute_dtype],
            quantization_config=nf4,
            device_map={"": device},
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # _check_complete refuses them, and can name one
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors and torch: each has kinds of its own
        if isinstance(error, MemoryError) or ladder.ran_out(error):
            raise
        if os.strerror(errno.ENOMEM) in str(error):  # a file that could not be mapped
            raise MemoryError(first_line(error)) from None
        reason = f"the weights cannot be loaded: {first_line(error)}"
        raise ModelError(str(folder), reason, "Download the checkpoint again.") from error
    _check_complete(loading, folder)
    _check_packed_shapes(model, folder)
    _check_tied(model, checkpoint)
    model.name_or_path = model.config.name_or_path = str(checkpoint.folder)
    model.generation_config = _ids_alone(model.generation_config)
    return model


def _ids_alone(found: Any) -> Any:
    """A base's settings of answers without all that would steer ours, which are greedy.

    What `generate` is not told it takes from there: a penalty, other stops, beams, an assistant.
    """
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(found, name) for name in names})


def _check_generation(folder: Path) -> None:
    """Read the settings of answers as transformers does in a load, whose error would be one of the weights.

    Raises:
        ModelError: they cannot be used.
    """
    from transformers import GenerationConfig

    path = folder / tokenizer_files.GENERATION
    if not is_file(path, ModelError):
        return
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its checks raise many kinds
        reason = f"transformers refuses it: {first_line(error).rstrip('.')}."
        raise ModelError(str(path), reason, "Mend it, or remove it.") from error


def _nf4(settings: Model) -> Any:
    """transformers' settings for NF4; None for an unquantized base."""
    from transformers import BitsAndBytesConfig

    if settings.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=DTYPES[settings.compute_dtype],
    )


def native_config(checkpoint: Checkpoint) -> Any:
    """config.json as transformers' own class, without what is none of this architecture's keys.

    Raises:
        ModelError: transformers refuses it.
    """
    return _native_config(checkpoint.config, checkpoint.folder)


def _native_config(config: Mapping[str, Any], folder: Path) -> Any:
    from transformers import Phi3Config

    kept = config_values.known(config)
    kept |= {key: _as_longrope(kept[key]) for key in ("rope_scaling", "rope_parameters") if key in kept}
    try:
        return Phi3Config.from_dict(kept)
    except Exception as error:  # its validation raises many kinds, some of them plain Exceptions
        reason = f"transformers refuses it: {' '.join(str(error).split())[:300]}."
        raise ModelError(str(folder / "config.json"), reason, "Download the checkpoint again.") from error


def _as_longrope(rope: Any) -> Any:
    """The name that the first 128k checkpoints have for LongRoPE, as transformers 5.23 can read it.

    It renames "su" itself, but only once it has looked for the original context under the new name.
    """
    named = rope if isinstance(rope, Mapping) else {}
    return {**named, **{key: "longrope" for key in ("type", "rope_type") if named.get(key) == "su"}} or rope


def _check_complete(loading: Mapping[str, Any], folder: Path) -> None:
    """`shards.check` has found the files complete; transformers must have read them so."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for one in sorted(map(str, loading[kind])):
            reason = f"transformers {version('transformers')} reads it otherwise than its headers say: "
            raise ModelError(str(folder), f"{reason}{kind} has {one}.", "Install the pinned versions.")


def _check_packed_shapes(model: nn.Module, folder: Path) -> None:
    # transformers 5.23 packs a 4-bit weight in the shape it finds, and never compares that to the module's
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            raise _wrong_shape(
                folder, f"{name}.weight", state.shape, (module.out_features, module.in_features)
            )


def _wrong_shape(folder: Path, name: str, found: Iterable[int], expected: Iterable[int]) -> ModelError:
    reason = f"{name} is {list(found)}, but config.json says {list(expected)}."
    return ModelError(str(folder), reason, "Give the config.json that belongs to these weights.")


def _check_tied(model: Any, checkpoint: Checkpoint) -> None:
    # transformers then keeps both matrices, while counts and memory plans take them for one
    if checkpoint.geometry.tied_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise shards.other_head(checkpoint.folder)
