"""Exports of the adapter alone: PEFT in the layout asked for, loralib, MLX, and vLLM with its rules checked.

Owns their folders: adapter, tokenizer, provenance. Refuses what the consumer would refuse or misread.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from torch.nn import functional

from .. import adapters, files, layouts, phi3
from ..errors import ModelError
from ..layouts.blocks import Pair
from ..layouts.config import PEFT_LAYOUTS
from ..layouts.pairs import describe, render
from ..layouts.settings import to_mlx, to_peft
from . import context
from .merge import fused_pairs
from .options import Options, Say
from .source import Source, copy_tokenizer, tokenizer_bytes

VLLM_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank; 16 is its default. Source: vLLM 0.11 config/lora.py."""
VLLM_DEFAULT_RANK: Final = 16


def num_bytes(source: Source, options: Options) -> int:
    """Of all files: a layout may pad As and Bs to three times as much, and MLX and loralib likewise."""
    return 3 * sum(tensor.nbytes for tensor in source.tensors.values()) + tokenizer_bytes(source)


def write_adapter(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """PEFT, in the layout it was trained in or another.

    Raises:
        ModelError: the layout cannot hold it.
    """
    return _converted(source, folder, _layout(source, options))


def check_adapter(source: Source, options: Options) -> None:
    """Raises ModelError where the layout cannot hold it."""
    _convert(source, _layout(source, options))


def _layout(source: Source, options: Options) -> layouts.Layout:
    own = source.config.layout
    return options.layout or (own if own in PEFT_LAYOUTS else "fused")


def write_loralib(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """A `lora.pt` for loralib's Linear layers in the places of Phi-3's.

    Raises:
        ModelError: an adapter on the embedding or the head of a tied base.
    """
    return _converted(source, folder, "loralib")


def check_loralib(source: Source, options: Options) -> None:
    """Raises ModelError as `write_loralib`."""
    _convert(source, "loralib")


def write_mlx(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """What mlx-lm's `load_adapters` reads.

    Raises:
        ModelError: linears that are scaled differently, or an adapter on a tied embedding or head.
    """
    return _converted(source, folder, "mlx")


def check_mlx(source: Source, options: Options) -> None:
    """Raises ModelError as `write_mlx`."""
    _, config = _convert(source, "mlx")
    to_mlx(config, list(fused_pairs(source)), str(source.folder))


def write_vllm(source: Source, folder: Path, options: Options, say: Say) -> dict[str, Any]:
    """PEFT in fused names with one rank and one alpha for all linears, and the flags that vLLM needs for it.

    Raises:
        ModelError: vLLM would refuse it.
    """
    tensors, config, flags = _for_vllm(source)
    about = _write(source, folder, tensors, config)
    say(f"serve it with vllm serve {source.base_name} {' '.join(flags)}")
    return {"layout": "fused", "flags": flags, **about}


def check_vllm(source: Source, options: Options) -> None:
    """Raises ModelError as `write_vllm`."""
    _for_vllm(source)


def _for_vllm(source: Source) -> tuple[layouts.Tensors, layouts.AdapterConfig, list[str]]:
    """Tensors and config, and the flags to serve them with."""
    pairs = uniform(fused_pairs(source))
    config = describe(pairs, "fused", source.checkpoint.geometry, use_rslora=False, enable_lora={})
    flags, problems = vllm_rules(to_peft(config).to_dict())
    longest = context.of_vllm(source.checkpoint.config, source.checkpoint.geometry)
    flags += [] if longest is None else ["--max-model-len", str(longest)]
    if problems:
        raise ModelError(str(source.folder), f"vLLM would refuse it: {'; '.join(problems)}.", _MERGE)
    return render(pairs, "fused"), config, flags


def uniform(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """The same updates with one rank, by rows and columns of zeros, and one scale.

    vLLM scales every linear by the config's one lora_alpha / r. Where scales differ, as they seldom do, B
    takes the difference, rounded as float32 is.
    """
    rank, scale = max(pair.rank for pair in pairs.values()), next(iter(pairs.values())).scale
    found = {}
    for module, pair in pairs.items():
        more = rank - pair.rank
        b = pair.b if math.isclose(pair.scale, scale, rel_tol=1e-12) else pair.b * (pair.scale / scale)
        found[module] = Pair(functional.pad(pair.a, (0, 0, 0, more)), functional.pad(b, (0, more)), scale)
    return found


_MERGE: Final = "Export merged, which vLLM serves as any model."


def vllm_rules(settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(flags to serve an adapter_config.json with, what vLLM refuses in it).

    Source: as remembered of vLLM's lora/peft_helper.py and config/lora.py, not compared with them; vLLM
    itself has not been run. It scales every linear by lora_alpha / r, and does not read rank_pattern and
    alpha_pattern.
    """
    rank = max([settings["r"], *settings.get("rank_pattern", {}).values()])
    enough = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    problems = [
        meaning
        for wrong, meaning in (
            (enough is None, f"rank {rank} is above {VLLM_RANKS[-1]}, the most it takes"),
            (settings.get("use_dora"), "it has no DoRA"),
            (settings.get("bias", "none") != "none", "it has no biases"),
            (settings.get("modules_to_save"), "it has no modules_to_save"),
            (
                isinstance(settings.get("init_lora_weights"), str),
                f"it does not know the start {settings.get('init_lora_weights')!r}",
            ),
            (
                settings.get("rank_pattern") or settings.get("alpha_pattern"),
                "it has one rank and alpha for all linears, no patterns",
            ),
            (_embeddings(settings), "it adapts neither embedding nor head of Phi-3"),
        )
        if wrong
    ]
    flags = ["--enable-lora", "--lora-modules", "NAME=FOLDER"]
    if rank > VLLM_DEFAULT_RANK:
        flags += ["--max-lora-rank", str(enough)]
    return flags, problems


def _embeddings(settings: dict[str, Any]) -> bool:
    return any(name.rsplit(".", 1)[-1] in phi3.EMBEDDINGS for name in settings.get("target_modules") or ())


def _convert(source: Source, layout: layouts.Layout) -> tuple[layouts.Tensors, layouts.AdapterConfig]:
    geometry = source.checkpoint.geometry
    return layouts.convert(source.tensors, source.config, layout, geometry, str(source.folder))


def _converted(source: Source, folder: Path, layout: layouts.Layout) -> dict[str, Any]:
    return {"layout": layout, **_write(source, folder, *_convert(source, layout))}


def _write(
    source: Source, folder: Path, tensors: layouts.Tensors, config: layouts.AdapterConfig
) -> dict[str, Any]:
    """The adapter with what belongs to it, in a folder that is there and empty, and stays the same one."""
    provenance = source.checkpoint.provenance
    # PEFT's loaders go to the base that is named here, and in that one find a third of these names
    base = None if config.layout == "unfused" else source.base_name
    inside = folder / ".adapter"
    layouts.write_adapter(inside, tensors, config, base=base, revision=provenance.revision if base else None)
    for path in inside.iterdir():
        path.rename(folder / path.name)
    inside.rmdir()
    copy_tokenizer(source, folder)
    note = provenance.to_json() | {"base": source.base_name}
    files.write_json(folder / adapters.PROVENANCE_NAME, note)
    return {"rank": config.rank, "alpha": config.alpha, "tensors": len(tensors)}
