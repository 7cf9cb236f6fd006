"""Adapters on disk: read from a folder or file that nobody vouches for, write all or nothing.

Owns the file names of each layout. Refuses pickles other than tensors under `weights_only`, links that lead
out of the folder, and files that are cut short.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from .. import files, json_files
from ..errors import ModelError, OutputError, RunError
from ..phi3 import Geometry
from ..weights import first_line
from .blocks import same_bits
from .chosen import check_any, check_chosen, chooser
from .config import PEFT_LAYOUTS, AdapterConfig, by_path, check_config, to_json
from .names import (
    PEFT_PREFIX,
    Tensors,
    find_style,
    key_of,
    known_keys,
    linear_shapes,
    style_of,
    unfused_shapes,
    usual_keys,
)
from .pairs import DTYPES, describe, detect, parse
from .settings import from_loralib, from_mlx, from_peft, to_mlx, to_peft

PEFT_WEIGHTS: Final = "adapter_model.safetensors"
MLX_WEIGHTS: Final = "adapters.safetensors"
LORALIB_WEIGHTS: Final = "lora.pt"
CONFIG_NAME: Final = "adapter_config.json"
LORALIB_CONFIG: Final = "loralib_config.json"

_AGAIN: Final = "Copy or download the adapter again."


def read_adapter(
    path: Path,
    geometry: Geometry,
    *,
    config: AdapterConfig | None = None,
    base_weight: Callable[[str], Tensor] | None = None,
) -> tuple[Tensors, AdapterConfig]:
    """Read an adapter in whatever layout it is, checked against the base's sizes.

    `path` is an adapter folder, its safetensors file, or a loralib `.pt`. A `.pt` of loralib's own holds
    neither alpha nor which blocks of a MergedLinear are on: give them as `config`, its targets empty.
    `base_weight` gives the base's own weight of a module: PEFT saves the whole embedding or head beside its
    adapter, which is left out where it is the base's. Tensors of several types become float32.

    Raises:
        ModelError: not found, not safe to read, not whole, or not of this base.
    """
    weights = _find_weights(path)
    place = str(weights)
    tensors = _load_pickle(weights) if weights.suffix == ".pt" else _load_safetensors(weights)
    names = usual_keys(tensors, place)
    tensors = {names[key]: tensor for key, tensor in tensors.items()}
    tensors = _of_one_type(tensors if base_weight is None else _without_base(tensors, base_weight, place))
    style = find_style(tensors, geometry, place)
    layout = detect(tensors, geometry, place) if style == "peft" else None
    if config is None:
        config = _read_config(weights, tensors, geometry, style)
    elif style != style_of(config.layout):
        raise ModelError(place, f"is in {style} names; the config says {config.layout}.", "Correct it.")
    if layout and config.layout in PEFT_LAYOUTS:
        config = replace(config, layout=layout)
    if style == "mlx":
        tensors = _narrowed(tensors, config)
    pairs = parse(tensors, config, geometry, place)
    enable_lora = {m: config.blocks_of(m) for m in pairs if config.blocks_of(m)}
    found = describe(pairs, config.layout, geometry, use_rslora=config.use_rslora, enable_lora=enable_lora)
    return tensors, found


_WHOLE: Final = re.compile(rf"{re.escape(PEFT_PREFIX)}(lm_head|model\.embed_tokens)(?:\.base_layer)?\.weight")


def _without_base(tensors: Tensors, base_weight: Callable[[str], Tensor], place: str) -> Tensors:
    """Without whole weights that are the base's own.

    Raises:
        ModelError: one of them is another's.
    """
    kept = {}
    for key, tensor in tensors.items():
        found = _WHOLE.fullmatch(key)
        if found is None:
            kept[key] = tensor
            continue
        own = base_weight(found[1])
        if own.shape != tensor.shape:
            rows = tensor.shape[:1].numel()
            reason = f"has {rows} rows, and the base's own {len(own)}: its vocabulary was resized."
            raise ModelError(f"{place}: {key}", reason, "Merge it with the tool that made it.")
        if not torch.equal(own.to(tensor.dtype), tensor):
            reason = "is a whole weight of a base, and not this one's: another base's, or it was trained."
            raise ModelError(f"{place}: {key}", reason, "Give the base that the adapter was trained on.")
    return kept


def _of_one_type(tensors: Tensors) -> Tensors:
    """Tensors of several floating types as the one that holds all of their numbers."""
    types = {tensor.dtype for tensor in tensors.values()}
    if len(types) < 2 or not types <= set(DTYPES):
        return tensors
    widest = torch.float64 if torch.float64 in types else torch.float32
    return {key: tensor.to(widest) for key, tensor in tensors.items()}


def _find_weights(path: Path) -> Path:
    """The one file with tensors.

    Raises:
        ModelError: none, several, a pickle, or a link that leads out of the folder.
    """
    if path.is_dir():
        names = (PEFT_WEIGHTS, MLX_WEIGHTS, LORALIB_WEIGHTS)
        found = [path / name for name in names if (path / name).is_symlink() or (path / name).exists()]
        if len(found) != 1:
            raise _no_weights(path, found)
        path = found[0]
    if path.suffix not in (".safetensors", ".pt"):
        raise ModelError(str(path), "is no .safetensors file, nor loralib's .pt.", _pickle_remedy(path))
    _check_inside(path)
    return path


def _no_weights(folder: Path, found: list[Path]) -> ModelError:
    if found:
        names = " and ".join(path.name for path in found)
        return ModelError(str(folder), f"holds {names}.", "Name the file that is meant.")
    pickled = folder / "adapter_model.bin"
    if pickled.exists():
        return ModelError(str(pickled), "is a pickle, which can run code.", _pickle_remedy(pickled))
    return ModelError(str(folder), f"holds no {PEFT_WEIGHTS}.", "Give the folder of a LoRA adapter.")


def _pickle_remedy(path: Path) -> str:
    if path.suffix in (".bin", ".pth", ".ckpt", ".pkl"):
        return "Save it as safetensors with the tool that made it."
    return "Give an adapter folder, its safetensors, or a loralib .pt."


def _check_inside(path: Path) -> None:
    """A file must be a regular one of its own folder or of the hub's cache around it, wherever links lead."""
    if not path.exists():
        raise ModelError(str(path), "does not exist.", "Check the path.")
    if path.resolve().parent not in (path.parent.resolve(), _blobs(path)):
        reason = f"is a link out of its folder, to {path.resolve()}."
        raise ModelError(str(path), reason, "Copy the file itself into the folder (cp -L).")
    if not path.is_file():
        raise ModelError(str(path), "is no regular file.", _AGAIN)


def _blobs(path: Path) -> Path | None:
    """Where the hub's cache keeps the files that its snapshots/COMMIT/NAME are links to."""
    snapshots = path.parent.resolve().parent
    return snapshots.parent / "blobs" if snapshots.name == "snapshots" else None


def _load_safetensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(str(path), *_why_unreadable(path, error)) from None


def _why_unreadable(path: Path, error: Exception) -> tuple[str, str]:
    """(reason, remedy) of a file that is no safetensors."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}.", "Check who may read it."
    if "\udc80" <= max(str(path)) <= "\udcff":
        return "its path is no UTF-8, and safetensors opens no other.", "Rename the folder."
    try:
        with files.open_file(path) as file:
            begins = file.read(64)
    except OSError as failure:
        return f"cannot be read: {failure.strerror}.", "Check who may read it."
    if begins.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself.", "Run `git lfs pull` there, or download it."
    if begins.lstrip()[:1] == b"<":
        return "is a web page, not safetensors.", "Download the file itself."
    return f"is cut short or no safetensors file: {first_line(error)}.", _AGAIN


def _load_pickle(path: Path) -> Tensors:
    """A loralib state dict: tensors by name and nothing else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a spoiled or hostile pickle makes the restricted reader raise anything
        # what torch says names the switch that lets a pickle run code
        reason = f"is cut short or holds more than tensors ({type(error).__name__})."
        raise ModelError(str(path), reason, "Save `lora.lora_state_dict(model)` alone.") from None
    whole = isinstance(found, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    )
    if not whole:
        reason = f"holds a {type(found).__name__} other than tensors by name."
        raise ModelError(str(path), reason, "Save `lora.lora_state_dict(model)` alone.")
    for key, value in found.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise ModelError(f"{path}: {key}", "is no ordinary tensor.", "Save dense tensors.")
    return {key: value.detach() for key, value in found.items()}


def _read_config(weights: Path, tensors: Tensors, geometry: Geometry, style: str) -> AdapterConfig:
    path = weights.with_name(LORALIB_CONFIG if style == "loralib" else CONFIG_NAME)
    if style == "loralib" and not path.exists():
        remedy = "Give a config with rank, alpha and, for MergedLinear, enable_lora."
        raise ModelError(str(weights), "a loralib file does not say its alpha.", remedy)
    found = _read_json(path)
    if style == "loralib":
        return from_loralib(found, str(path))
    if style == "mlx":
        known = known_keys(linear_shapes(geometry), "mlx")
        ranks = {known[k][0]: t.shape[0] for k, t in tensors.items() if known[k][1] == "B" and t.ndim == 2}
        return from_mlx(found, ranks, str(path))
    config = from_peft(found, "fused", str(path))
    whole, apart = linear_shapes(geometry), unfused_shapes(geometry)
    every = known_keys([*whole, *apart], "peft")
    modules = list(dict.fromkeys(every[key][0] for key in tensors if key in every))
    chooses = chooser(found, str(path))
    if chooses is not None:
        shapes = whole if all(module in whole for module in modules) else apart
        check_any(found, [*whole, *apart], chooses, str(path))
        check_chosen(modules, shapes, chooses, str(weights), path.name)
    return replace(
        config,
        rank_pattern=by_path(config.rank_pattern, modules),
        alpha_pattern=by_path(config.alpha_pattern, modules),
    )


def _read_json(path: Path) -> dict[str, Any]:
    _check_inside(path)
    return json_files.read_object(path, ModelError, _AGAIN)


def write_adapter(
    folder: Path,
    tensors: Tensors,
    config: AdapterConfig,
    *,
    base: str | None = None,
    revision: str | None = None,
) -> None:
    """Write an adapter as its layout's consumer reads it; all or nothing.

    The folder appears under its name only after the tensors were read back equal. `base` and `revision` are
    what PEFT loads the adapter onto when nothing else is said.

    Raises:
        OutputError: there is something under this name already.
        ModelError: a number that is none, or MLX cannot say these scales.
        RunError: a tensor reads back differently.
    """
    if folder.exists() or folder.is_symlink():
        raise OutputError(str(folder), "exists already.", "Name another folder, or move this one away.")
    _check_writable(tensors, config, str(folder))
    tensors = _of_one_rank(tensors) if config.layout == "mlx" else tensors
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        weights = _write_files(partial, tensors, config, base, revision)
        _check_written(weights, tensors)
        give_usual_modes(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)


def give_usual_modes(folder: Path) -> None:
    """Give every file of a folder the mode of any new file there.

    safetensors writes into a temporary file, which is its owner's alone, and renames it. The umask is read
    off a file, since asking for it means to set it, for all threads.
    """
    handle = os.open(probe := folder / f".mode-{os.getpid()}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _check_writable(tensors: Tensors, config: AdapterConfig, place: str) -> None:
    check_config(config, place)
    bad = [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad or not tensors:
        reason = f"{bad[0]} holds NaN or infinity." if bad else "there is no tensor to write."
        raise ModelError(place, reason, "Train the adapter again; nothing was written.")


def _write_files(
    folder: Path, tensors: Tensors, config: AdapterConfig, base: str | None, revision: str | None
) -> Path:
    if style_of(config.layout) == "loralib":
        _save_pickle(tensors, folder / LORALIB_WEIGHTS)
        _write_json(folder / LORALIB_CONFIG, to_json(config))
        return folder / LORALIB_WEIGHTS
    if config.layout == "mlx":
        return _write_mlx(folder, tensors, config)
    from safetensors.torch import save_file

    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    settings = to_peft(config, inference_mode=True, base_model_name_or_path=base, revision=revision)
    settings.save_pretrained(folder)
    return folder / PEFT_WEIGHTS


def _save_pickle(tensors: Tensors, path: Path) -> None:
    """Raises RunError where the disk does not take it: torch tells that as an error of its own."""
    try:
        torch.save(tensors, path)
    except RuntimeError as error:
        reason = f"cannot be written: {first_line(error)}."
        raise RunError(str(path), reason, "Look at the disk's space and limits (`ulimit -f`).") from None


def _write_mlx(folder: Path, tensors: Tensors, config: AdapterConfig) -> Path:
    from safetensors.torch import save_file

    end = len(key_of("", "A", "mlx"))
    modules = sorted({key[:-end] for key in tensors})
    settings = to_mlx(config, modules, CONFIG_NAME)
    save_file(tensors, folder / MLX_WEIGHTS, metadata={"format": "mlx"})
    _write_json(folder / CONFIG_NAME, settings)
    return folder / MLX_WEIGHTS


def _rank_dim(key: str) -> int:
    """Which dimension of an MLX tensor is the rank: A is (in, rank), B (rank, out)."""
    return 1 if key.endswith(key_of("", "A", "mlx")) else 0


def _of_one_rank(tensors: Tensors) -> Tensors:
    """MLX's pairs with zeros up to the widest: mlx-lm makes all of one rank and loads no others.

    Source: mlx-lm 0.32 tuner/utils.py, load_adapters.
    """
    widest = max(tensor.shape[_rank_dim(key)] for key, tensor in tensors.items())
    padded = {}
    for key, tensor in tensors.items():
        missing = widest - tensor.shape[_rank_dim(key)]
        padded[key] = functional.pad(tensor, (0, missing) if _rank_dim(key) else (0, 0, 0, missing))
    return padded


def _narrowed(tensors: Tensors, config: AdapterConfig) -> Tensors:
    """MLX's pairs of the ranks that the config says, where all behind is zero."""
    found = dict(tensors)
    for key, tensor in tensors.items():
        rank, dim = config.rank_of(key.rpartition(".")[0]), _rank_dim(key)
        if tensor.ndim == 2 and tensor.shape[dim] > rank:  # what has another shape is refused by parse
            own, rest = tensor.tensor_split((rank,), dim)
            found[key] = tensor if rest.any() else own.contiguous()
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_written(path: Path, tensors: Tensors) -> None:
    saved = _load_pickle(path) if path.suffix == ".pt" else _load_safetensors(path)
    wrong = [key for key in tensors if key not in saved or not same_bits(tensors[key].cpu(), saved[key])]
    if wrong or len(saved) != len(tensors):
        reason = f"reads back differently: {(wrong or ['surplus tensors'])[0]}."
        raise RunError(str(path), reason, "Check the disk, then write it again.")
