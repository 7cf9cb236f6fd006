"""A merged model as one GGUF file for llama.cpp and what is built on it.

Owns names, metadata and the kind of every tensor. Refuses kinds that only llama.cpp's own quantizer makes,
and weights that are not those of the config. Written tensor by tensor: beside one there is a slice of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from .. import phi3
from ..errors import InputError, ModelError
from . import vocabulary
from .context import is_longrope, rope_of

KINDS: Final = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What `gguf` itself can write."""
_SLICE_ELEMENTS: Final = 1 << 24
"""Weights that are converted at once: 64 MiB of float32, and about thrice that while they are quantized."""
_DAMAGED: Final = "Merge again from a whole checkpoint."

NAMES: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""A module of a Phi-3 checkpoint -> llama.cpp's name for it."""
LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""The same inside a layer. No rows change places: llama.cpp reads Phi-3's fused linears as they are."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its shape, `gguf`'s type, and where its bytes begin in the tensors' part."""

    shape: tuple[int, ...]
    type: Any
    num_bytes: int


def check_kind(kind: str) -> None:
    """Refuse a kind that cannot be written here.

    Raises:
        InputError: a k-quant, an i-quant, or no kind at all.
    """
    if kind in KINDS:
        return
    known = f"Choose out of {', '.join(KINDS)}."
    lowered = kind.lower()
    if lowered.startswith("iq") or "_k" in lowered:
        reason = "k-quants and i-quants are made by llama.cpp's own quantizer, which no Python package has."
        remedy = f"{known} Or export gguf:f16 and run `llama-quantize FILE.gguf OUT.gguf {kind.upper()}`."
        raise InputError(f"gguf:{kind}", reason, remedy)
    raise InputError(f"gguf:{kind}", "there is no such kind of GGUF.", known)


def write(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    tokenizer: Path,
    kind: str,
    *,
    name: str,
    context: int | None = None,
    stop_ids: Sequence[int] = (),
    say: Say = lambda _: None,
) -> None:
    """Write a merged model; `config` is config.json's content, `tokenizer` a folder with its files.

    `context` is the context length that the file names, where it is not the base's. `stop_ids` end an answer.
    `say` hears which tensors are kept in f16 because their width fits no block of `kind`. A tied head is left
    out: llama.cpp takes the embedding.

    Raises:
        InputError: a kind that cannot be written.
        ModelError: tensors that are not those of the config, a number that is none, a tokenizer that
            llama.cpp cannot repeat.
    """
    import gguf

    check_kind(kind)
    geometry = phi3.geometry_from_config(config)
    words, tables = check_base(config, tokenizer, stop_ids)
    entries = _entries(geometry, kind, say)
    writer = gguf.GGUFWriter(None, "phi3")
    _add_metadata(writer, config, geometry, kind, words.name(name), context)
    words.write(writer)
    for key in tables:
        entries[f"{key}.weight"] = Entry((len(tables[key]),), gguf.GGMLQuantizationType.F32, 0)
    entries = {key: _sized(entry) for key, entry in entries.items()}
    starts = _begin(writer, path, entries)
    try:
        for key, values in tables.items():
            _put(writer, starts, f"{key}.weight", entries[f"{key}.weight"], [_float32(values)])
        _put_all(writer, starts, entries, tensors, geometry, written={f"{key}.weight" for key in tables})
    finally:
        writer.close()


def check_base(
    config: Mapping[str, Any], tokenizer: Path, stop_ids: Sequence[int] = ()
) -> tuple[vocabulary.Vocabulary, dict[str, list[float]]]:
    """The vocabulary and LongRoPE's tables of a base, which llama.cpp must be able to repeat.

    Raises:
        ModelError: it cannot.
    """
    geometry = phi3.geometry_from_config(config)
    return vocabulary.read(tokenizer, geometry.vocab_size, stop_ids), _rope_tables(config, geometry)


def tensor_name(module: str) -> str | None:
    """llama.cpp's name of a module's weight, without `.weight`; None for one that it does not have."""
    if module in NAMES:
        return NAMES[module]
    layer, _, inside = module.removeprefix("model.layers.").partition(".")
    if not module.startswith("model.layers.") or not layer.isdigit() or inside not in LAYER_NAMES:
        return None
    return f"blk.{int(layer)}.{LAYER_NAMES[inside]}"


def _entries(geometry: phi3.Geometry, kind: str, say: Say) -> dict[str, Entry]:
    """Every weight of the model in llama.cpp's order, embedding first."""
    hidden, found = geometry.hidden_size, dict[str, Entry]()
    matrix = (geometry.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": matrix}
    for layer in range(geometry.num_layers):
        for inside, short in LAYER_NAMES.items():
            linear = inside.rpartition(".")[2]
            is_norm = linear not in phi3.LINEARS
            shapes[f"blk.{layer}.{short}"] = (hidden,) if is_norm else geometry.linear_shape(linear)
    shapes["output_norm"] = (hidden,)
    if not geometry.tied_embeddings:
        shapes["output"] = matrix
    odd = set()
    for name, shape in shapes.items():
        found[f"{name}.weight"] = Entry(shape, _type_of(name, shape, kind), 0)
        if len(shape) == 2 and shape[1] % 32 and kind not in ("f16", "bf16"):
            odd.add(shape[1])
    if odd:
        widths = ", ".join(map(str, sorted(odd)))
        say(f"Widths {widths} are no multiple of 32, {kind}'s block: those matrices are kept in f16.")
    return found


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """gguf's type of a tensor: norms in float32, what fits no block in f16, embedding and head in q8_0.

    llama.cpp's quantizer too keeps the embedding and the head finer than the rest (q6_K, which cannot be made
    here): every token passes both.
    """
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1:
        return Type.F32
    if kind not in ("f16", "bf16"):
        if shape[1] % 32:
            return Type.F16
        if name in ("token_embd", "output"):
            return Type.Q8_0
    return Type[kind.upper()]


def _sized(entry: Entry) -> Entry:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[entry.type]
    return Entry(entry.shape, entry.type, math.prod(entry.shape) // block * block_bytes)


def _add_metadata(
    writer: Any, config: Mapping[str, Any], geometry: phi3.Geometry, kind: str, name: str, context: int | None
) -> None:
    from gguf import LlamaFileType

    types = {"f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
    writer.add_name(name)
    writer.add_type("model")
    writer.add_file_type(types.get(kind) or LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(2)
    writer.add_vocab_size(geometry.vocab_size)
    writer.add_context_length(context or geometry.max_positions)
    writer.add_embedding_length(geometry.hidden_size)
    writer.add_block_count(geometry.num_layers)
    writer.add_feed_forward_length(geometry.intermediate_size)
    writer.add_head_count(geometry.num_heads)
    writer.add_head_count_kv(geometry.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_rope_dimension_count(int(geometry.head_dim * geometry.rotary_fraction))
    writer.add_rope_freq_base(float(rope_of(config).get("rope_theta") or config.get("rope_theta") or 1e4))
    writer.add_rope_scaling_orig_ctx_len(geometry.original_max_positions)
    # 0 says that there is none: without the key llama.cpp takes a model of 32 layers for Phi-3-mini-4k
    writer.add_sliding_window(geometry.sliding_window or 0)
    if is_longrope(config):
        writer.add_rope_scaling_attn_factors(_attention_factor(config, geometry))


def _attention_factor(config: Mapping[str, Any], geometry: phi3.Geometry) -> float:
    """What LongRoPE multiplies sines and cosines with.

    Source: transformers 5.23 modeling_rope_utils.py, _compute_longrope_parameters.
    """
    named = rope_of(config).get("attention_factor")
    factor = geometry.max_positions / geometry.original_max_positions
    if named is not None:
        return float(named)
    return math.sqrt(1 + math.log(factor) / math.log(geometry.original_max_positions)) if factor > 1 else 1.0


def _rope_tables(config: Mapping[str, Any], geometry: phi3.Geometry) -> dict[str, list[float]]:
    """LongRoPE's factors by llama.cpp's name for them; it takes the long ones where its context is longer.

    Raises:
        ModelError: a table that is missing or of another length than half the rotated dimensions.
    """
    if not is_longrope(config):
        return {}
    rope, length = rope_of(config), int(geometry.head_dim * geometry.rotary_fraction) // 2
    tables = {}
    for which in ("long", "short"):
        table = rope.get(f"{which}_factor")
        if not isinstance(table, list) or len(table) != length:
            reason = f"{which}_factor is no list of {length} numbers."
            raise ModelError("config.json: rope_scaling", reason, "Download the checkpoint again.")
        tables[f"rope_factors_{which}"] = [float(value) for value in table]
    return tables


def _begin(writer: Any, path: Path, entries: Mapping[str, Entry]) -> dict[str, int]:
    """Write everything before the tensors; where in the file each of them will stand."""
    import numpy

    for key, entry in entries.items():
        writer.add_tensor_info(key, entry.shape, numpy.dtype("float32"), entry.num_bytes, entry.type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    align = writer.data_alignment
    file, starts = writer.fout[0], {}
    position = writer.ggml_pad(file.tell(), align)
    for key, entry in entries.items():
        starts[key] = position
        position += writer.ggml_pad(entry.num_bytes, align)
    file.truncate(position)
    return starts


def _put_all(
    writer: Any,
    starts: Mapping[str, int],
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Tensor]],
    geometry: phi3.Geometry,
    written: set[str],
) -> None:
    """Every tensor at its place, in whatever order they come.

    Raises:
        ModelError: one that is unknown, comes twice, has another shape, or does not come.
    """
    for given, tensor in tensors:
        name = tensor_name(given.removesuffix(".weight"))
        key = f"{name}.weight"
        if name == "output" and geometry.tied_embeddings:
            continue
        if not given.endswith(".weight") or key not in entries or key in written:
            raise ModelError(given, "is no weight of this Phi-3, or comes twice.", _DAMAGED)
        if tuple(tensor.shape) != entries[key].shape:
            reason = f"is {list(tensor.shape)}, but config.json says {list(entries[key].shape)}."
            raise ModelError(given, reason, _DAMAGED)
        _put(writer, starts, key, entries[key], _slices(tensor, given))
        written.add(key)
    missing = [key for key in entries if key not in written]
    if missing:
        raise ModelError(missing[0], f"{len(missing)} tensors are missing, this the first.", _DAMAGED)


def _slices(tensor: Tensor, place: str) -> Iterator[Any]:
    """A tensor as float32 arrays of some rows each.

    Raises:
        ModelError: a number in it that is none.
    """
    rows = max(1, _SLICE_ELEMENTS // math.prod(tensor.shape[1:]))
    for start in range(0, len(tensor), rows):
        array = tensor.detach()[start : start + rows].float().cpu().contiguous().numpy()
        if not math.isfinite(float(abs(array).max())):
            raise ModelError(place, "holds a number that is not finite.", _DAMAGED)
        yield array


def _float32(values: list[float]) -> Any:
    import numpy

    return numpy.array(values, dtype=numpy.float32)


def _put(writer: Any, starts: Mapping[str, int], key: str, entry: Entry, slices: Iterable[Any]) -> None:
    """Quantize slice by slice and write at the tensor's place."""
    from gguf import quants

    file = writer.fout[0]
    file.seek(starts[key])
    for array in slices:
        file.write(quants.quantize(array, entry.type).tobytes())
    assert file.tell() == starts[key] + entry.num_bytes, key
