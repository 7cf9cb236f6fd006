"""The adapter in the weights: W + scale * B @ A in float32, one matrix at a time, never a whole model.

Owns which W is meant. `dequant` is what the adapter was trained against: the checkpoint's matrix quantized to
NF4 and back, in the recipe's dtype, with the same kernels. `original` is the checkpoint's own. Refuses
numbers that the dtype asked for cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .. import layouts, model, phi3, weights
from ..errors import InputError, ModelError
from ..layouts.blocks import Pair
from ..layouts.names import is_embedding
from ..layouts.pairs import parse
from ..sizes import MERGE_CHUNK
from .options import MergeBase
from .source import Source

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"


def merged_tensors(source: Source, base: MergeBase, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged checkpoint, in the base's order and under its names, on the CPU.

    A tied base whose embedding or head has an adapter of its own gets a head at the end: the two differ now.

    Raises:
        InputError: a number is too large for `dtype`.
    """
    merger = Merger(source, base, dtype)
    for name in merger.shapes:
        yield name, merger.tensor(name)


class Merger:
    """Single matrices of a merged checkpoint by name; reading one holds no other.

    `adapted`: false for the base alone.
    """

    def __init__(self, source: Source, base: MergeBase, dtype: torch.dtype, *, adapted: bool = True) -> None:
        self.source, self.base, self.dtype = source, base, dtype
        self.device = model.device_for_run()
        self._files: dict[str, Path] = weights.tensor_files(source.checkpoint.folder)
        self._pairs = fused_pairs(source) if adapted else {}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name, in the order of the checkpoint's files."""
        from safetensors import safe_open

        found: dict[str, tuple[int, ...]] = {}
        for path in dict.fromkeys(self._files.values()):
            with safe_open(path, framework="pt") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if self._pairs and unties(self.source) and HEAD not in found:
            found[HEAD] = found[EMBEDDING]
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * self.dtype.itemsize

    def tensor(self, name: str) -> Tensor:
        """One tensor of the merged checkpoint, in memory of its own.

        Raises:
            InputError: a number is too large for the dtype.
        """
        weight = self._read(name if name in self._files else EMBEDDING)
        if self.base == "dequant":
            weight = self._as_trained(name, weight)
        pair = self._pairs.get(name.removesuffix(".weight"))
        merged = weight.to(self.dtype, copy=True) if pair is None else self._merged(name, weight, pair)
        if not all(bool(part.isfinite().all()) for part in torch.split(merged.view(-1), MERGE_CHUNK)):
            if not weight.isfinite().all():
                reason = f"{name} holds NaN or infinity in the base itself."
                raise ModelError(str(self.source.checkpoint.folder), reason, "Download it again.")
            if self.dtype == torch.float16:
                reason = f"{name} holds numbers that float16 cannot."
                raise InputError("--dtype", reason, "Give --dtype bf16, whose range is float32's.")
            reason = f"added to {name} it gives numbers beyond those of float32."
            raise InputError(str(self.source.folder), reason, "Train it again with a lower learning rate.")
        return merged

    def _read(self, name: str) -> Tensor:
        """Opened anew each time: what a mapped file showed stays resident until it is closed."""
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found

    def _as_trained(self, name: str, weight: Tensor) -> Tensor:
        """What the model computed with in training."""
        settings = self.source.model
        weight = weight.to(model.DTYPES[settings.compute_dtype])
        if settings.quantization == "none" or name.split(".")[-2] not in phi3.LINEARS:
            return weight
        # bitsandbytes 0.50, nn/modules.py, Params4bit._quantize, as transformers 5.23 calls it
        import bitsandbytes as bnb

        packed, state = bnb.functional.quantize_4bit(
            weight.to(self.device).contiguous(), compress_statistics=settings.double_quant, quant_type="nf4"
        )
        found: Tensor = bnb.functional.dequantize_4bit(packed, state).cpu()
        return found

    def _merged(self, name: str, weight: Tensor, pair: Pair) -> Tensor:
        """The sum, rows of about 8 M elements at a time.

        Shape: weight (out, in); an embedding's pair is of its transpose, a (r, vocab), b (hidden, r).
        """
        turned = is_embedding(name.removesuffix(".weight"))
        left, right = (pair.a.T.float(), pair.b.T.float()) if turned else (pair.b.float(), pair.a.float())
        merged = torch.empty(weight.shape, dtype=self.dtype)
        rows = max(1, MERGE_CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            merged[part] = torch.addmm(weight[part].float(), left[part], right, alpha=pair.scale)
        return merged


def fused_pairs(source: Source) -> dict[str, Pair]:
    """An A/B pair for each linear of the base that has one, by path."""
    geometry = source.checkpoint.geometry
    tensors, config = layouts.convert(source.tensors, source.config, "fused", geometry, str(source.folder))
    return parse(tensors, config, geometry, str(source.folder))


def unties(source: Source) -> bool:
    """Whether embedding and head are one matrix in the base and two after merging."""
    adapted = any(module.rsplit(".", 1)[-1] in phi3.EMBEDDINGS for module in fused_pairs(source))
    return source.checkpoint.geometry.tied_embeddings and adapted


def config_of(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the merged checkpoint: the base's own keys and their spelling.

    Consumers read different spellings (mlx-lm only the legacy `rope_scaling`), so none is translated. What
    names code, this machine or a quantization goes.
    """
    dropped = ("auto_map", "quantization_config")
    kept = {k: v for k, v in source.checkpoint.config.items() if k not in dropped and not k.startswith("_")}
    spelled = [key for key in ("torch_dtype", "dtype") if key in kept] or ["dtype"]
    kept |= dict.fromkeys(spelled, str(dtype).removeprefix("torch."))
    return kept | ({"tie_word_embeddings": False} if unties(source) else {})
