"""Find a base checkpoint on the hub, in a folder or built in, and check it before anything is loaded.

Owns where a base comes from, whether it is safe and whole, and its provenance. Refuses code and pickles
in checkpoints, other architectures, and checkpoints that are quantized already. Knows nothing of torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from . import base_names, builtin, files, json_files, phi3, shards, tokenizer_files
from .errors import ModelError, is_file, is_folder
from .recipe import Model
from .shards import tensor_files as tensor_files
from .shards import weight_files as weight_files

Say = Callable[[str], None]

TOKENIZER_PATTERNS: Final = ["*.json", "*.jinja", "tokenizer.model"]
"""What a tokenizer needs, and the small files beside it."""
HUB_PATTERNS: Final = ["*.safetensors", *TOKENIZER_PATTERNS]
"""Files worth downloading: no pickles, no code."""

_OWN_CODE: Final = re.compile(
    r"([\w.-]+/[\w.-]+--)?(configuration_phi3\.Phi3Config|modeling_phi3\.Phi3ForCausalLM)|Xenova/gpt-4o"
)
"""What Microsoft's own checkpoints name in `auto_map`: never run, the native class takes its place."""

_HARMLESS_UNDERSCORE: Final = {"_name_or_path": str, "_attn_implementation_autoset": bool}
"""Underscore keys that older transformers wrote into every config.json, with their type."""


@dataclass(frozen=True)
class Provenance:
    """What exactly was loaded. `revision` is the resolved hub commit; hashes are sha256 in hex."""

    base: str
    source: str
    revision: str | None
    config_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    weights: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a checked Phi-3 checkpoint, not yet loaded."""

    folder: Path
    config: dict[str, Any]
    geometry: phi3.Geometry
    provenance: Provenance


Stamps = dict[str, tuple[int, int, int]]
"""Of files by name: which file it is (inode), its size, and when it was last written."""


def locate(settings: Model, say: Say = lambda _: None, tokenizer: Path | None = None) -> Checkpoint:
    """Find the checkpoint of `model.base` on disk, downloading it where needed, and check it.

    `tokenizer` is what `locate_tokenizer` found: of the hub, the same commit is taken again, since a branch
    may have moved meanwhile.

    Raises:
        ModelError: not found, unreachable, not Phi-3, or not safe to load.
    """
    base = settings.base
    if base.startswith("builtin:"):
        folder, source, revision = builtin.ensure(base.removeprefix("builtin:"), say=say), "builtin", None
    elif Path(base).is_absolute():
        folder, source, revision = _local_folder(base), "folder", None
    else:
        wanted = settings.revision if tokenizer is None else tokenizer.name
        folder, source = _download(base, wanted, say), "hub"
        revision = folder.name
    _check_files(folder, base if source == "folder" else f"model.base: {base}")
    config = read_config(folder)
    geometry = _check_sizes(folder, config)
    return Checkpoint(folder, config, geometry, _provenance(base, source, revision, folder))


def locate_tokenizer(settings: Model, say: Say = lambda _: None) -> Path:
    """Folder with the tokenizer and the checked config of `model.base`, without its weights where it can be.

    Raises:
        ModelError: as `locate`, but for weights.
    """
    base = settings.base
    if base.startswith("builtin:"):
        folder = builtin.ensure(base.removeprefix("builtin:"), say=say)
    elif Path(base).is_absolute():
        folder = _local_folder(base)
        _check_files(folder, base)
        _check_sizes(folder, read_config(folder))
    else:
        folder = _download(base, settings.revision, say, TOKENIZER_PATTERNS)
        config = read_config(folder)
        geometry = phi3.geometry_from_config(config, str(folder / "config.json"))
        tokenizer_files.check(folder, geometry.vocab_size)
    return folder


def stamps(folder: Path) -> Stamps:
    """Which files a checkpoint's folder holds now; compared later, they tell whether one was changed."""
    found: Stamps = {}
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".json", ".jinja", ".model"):
            with suppress(OSError):  # a link to nowhere that nobody asks for
                status = path.stat()
                found[path.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def check_unchanged(checkpoint: Checkpoint, before: Stamps) -> None:
    """Compare a checkpoint's files with their stamps from before the first was read.

    What is recorded of them, hashes included, is then what was loaded.

    Raises:
        ModelError: one was changed, replaced or removed meanwhile.
    """
    now = stamps(checkpoint.folder)
    changed = sorted(name for name, stamp in before.items() if now.get(name) != stamp)
    if changed:
        reason = f"{changed[0]} was changed or removed while the base was being loaded."
        raise ModelError(str(checkpoint.folder), reason, "Run again when nothing writes to it.")


def known_geometry(settings: Model) -> phi3.Geometry | None:
    """Sizes of a base without downloading anything: a known checkpoint or a local folder, else None.

    Raises:
        ModelError: the folder's config.json is missing or refused, no such built-in model, or a name that
            tells of another architecture.
    """
    if Path(settings.base).is_absolute():
        folder = _local_folder(settings.base)
        _check_files(folder, settings.base)
        return _check_sizes(folder, read_config(folder))
    if settings.base.startswith("builtin:"):
        builtin.check_name(settings.base.removeprefix("builtin:"))
    else:
        _check_name(settings)
    return phi3.VARIANTS.get(settings.base)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint, refused when it could make a loader run foreign code.

    Raises:
        ModelError: missing, not JSON, foreign `auto_map`, underscore-internal keys, already quantized.
    """
    path = folder / "config.json"
    config = _read_json(path)
    phi3.check_architecture(config, str(path))
    check_auto_map(config, path)
    tokenizer_config = folder / "tokenizer_config.json"
    if os.path.lexists(tokenizer_config):
        check_auto_map(_read_json(tokenizer_config), tokenizer_config)
    for key, value in config.items():
        if key.startswith("_") and not isinstance(value, _HARMLESS_UNDERSCORE.get(key, ())):
            reason = f"the key {key!r} is internal to transformers and must not come from a checkpoint."
            raise ModelError(str(path), reason, "Choose another checkpoint.")
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        reason = f"the checkpoint is already quantized ({method})."
        raise ModelError(str(path), reason, "Give the original 16-bit checkpoint; NF4 is made while loading.")
    return config


def check_auto_map(config: Mapping[str, Any], path: Path) -> None:
    """Refuse code references other than the ones in Microsoft's own Phi-3 checkpoints (which never run).

    Raises:
        ModelError: `auto_map` names anything else.
    """
    entries = config.get("auto_map") or {}
    names = entries.values() if isinstance(entries, dict) else [entries]
    for name in (part for value in names for part in (value if isinstance(value, list) else [value])):
        if name is not None and not _OWN_CODE.fullmatch(str(name)):
            reason = f"auto_map names code of its own: {name!r}."
            raise ModelError(str(path), reason, "Choose a checkpoint without code.")


def _check_name(settings: Model) -> None:
    """Refuse what the hub cannot have, or has in another architecture, before it is asked."""
    found = base_names.refusal(settings.base)
    if found is not None:
        raise ModelError(f"model.base: {settings.base}", *found)
    if settings.revision is not None and not base_names.is_revision(settings.revision):
        raise ModelError(f"model.revision: {settings.revision}", *base_names.NO_REVISION)


def _local_folder(base: str) -> Path:
    folder = Path(base)
    if not is_folder(folder, ModelError):
        raise ModelError(base, "no such folder.", "Give a folder with config.json, or a hub id.")
    return folder


def _check_files(folder: Path, place: str) -> None:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise ModelError(place, f"cannot be read: {error.strerror}.", "Check who may read it.") from None
    if not any(name.endswith(".safetensors") for name in names):
        other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        reason = f"holds {other[0]} but no safetensors." if other else "holds no *.safetensors."
        raise ModelError(place, reason, "Convert it to safetensors with its own tools first.")
    if "adapter_config.json" in names:
        adapter = folder / "adapter_config.json"
        reason = "stands beside the base: transformers would load the base that this adapter names instead."
        raise ModelError(str(adapter), reason, "Give the folder of a base without an adapter in it.")


def _check_sizes(folder: Path, config: Mapping[str, Any]) -> phi3.Geometry:
    """Sizes of a checkpoint, once its tokenizer and the headers of its weights were found to be of them."""
    geometry = phi3.geometry_from_config(config, str(folder / "config.json"))
    shards.check(folder, geometry)
    tokenizer_files.check(folder, geometry.vocab_size)
    return geometry


def _download(base: str, revision: str | None, say: Say, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """Snapshot folder of a hub model, named after its commit; from the local hub cache when offline."""
    _check_name(Model(base=base, revision=revision))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    place = f"model.base: {base}"
    say(f"looking up {base} on the hub")
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError:
        remedy = "Write org/name, ./folder, or builtin:smollm2-135m."
        raise ModelError(place, "is neither a hub id nor a folder.", remedy) from None
    except Exception as error:  # what its HTTP library raises is no OSError: a connection cut short, a proxy
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise ModelError(place, *_explain_hub(error, status)) from None


def _explain_hub(error: Exception, status: int | None) -> tuple[str, str]:
    if status in (401, 403):
        # 401 is also its answer to an unknown name when nobody is logged in
        remedy = "Check the name; accept its licence on the hub and log in with `hf auth login`."
        return f"the hub refuses access (HTTP {status}): gated, private or no such model.", remedy
    if status == 404:
        return "not on the hub, or no such revision.", "Check model.base and model.revision."
    remedy = "Check the network; a folder (./name) and builtin:smollm2-135m need none."
    said = first_line(error).rstrip(".")
    if re.search(r"name resolution|Name or service|getaddrinfo|nodename nor servname", said):
        said = "its name is not resolved, as without a network"
    return f"the hub cannot be reached and nothing is cached: {said}.", remedy


def _provenance(base: str, source: str, revision: str | None, folder: Path) -> Provenance:
    template = folder / "chat_template.jinja"
    if not is_file(template, ModelError):
        template = folder / "tokenizer_config.json"
    tokenizer = folder / "tokenizer.json"
    weights = [
        {
            "file": path.name,
            "header_sha256": shards.header_sha256(path),
            "bytes": path.stat().st_size,
            "samples_xxh3": shards.samples_xxh3(path),
        }
        for path in weight_files(folder)
    ]
    return Provenance(
        base=base,
        source=source,
        revision=revision,
        config_sha256=_sha256(folder / "config.json"),
        tokenizer_sha256=_sha256(tokenizer),
        chat_template_sha256=_sha256(template),
        weights=tuple(weights),
    )


def _sha256(path: Path) -> str:
    try:
        return files.sha256(path)
    except FileNotFoundError:
        raise ModelError(str(path), "is missing from the checkpoint.", "Download it again.") from None
    except OSError as error:
        reason = f"cannot be read: {json_files.said(error)}."
        raise ModelError(str(path), reason, json_files.way_on(error, "Download it again.")) from None


def _read_json(path: Path) -> dict[str, Any]:
    whole = "Give a folder that holds a whole checkpoint."
    return json_files.read_object(path, ModelError, "Download it again.", missing=whole, strict=True)


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line of at most 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
