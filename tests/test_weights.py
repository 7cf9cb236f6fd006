"""weights.py: where a base comes from, what is refused before anything is loaded, and its provenance."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_phi3 import builtin, phi3
from qlora_phi3.errors import ModelError, Problem
from qlora_phi3.recipe import Model
from qlora_phi3.weights import first_line, known_geometry, locate, read_config, tensor_files

REPOSITORY = Path(builtin.__file__).parents[1]
HUB_ID = "org/tiny-phi3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GQA = phi3.Geometry(
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=261,
    max_positions=512,
    original_max_positions=512,
)
"""Sizes of conftest's "gqa" checkpoint."""


@pytest.fixture
def folder(checkpoints: Callable[[str], Path], tmp_path: Path) -> Path:
    """A whole checkpoint that a test may spoil."""
    return Path(shutil.copytree(checkpoints("gqa"), tmp_path / "base"))


def edit(path: Path, **keys: Any) -> None:
    """Add or replace keys of a JSON file."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(found | keys), encoding="utf-8")


def refusal(base: str | Path, revision: str | None = None) -> Problem:
    with pytest.raises(ModelError) as caught:
        locate(Model(base=str(base), revision=revision))
    [problem] = caught.value.problems
    assert problem.remedy
    assert "\n" not in str(problem)
    return problem


# --- folders and built-in models ---------------------------------------------------------------------------


def test_folder(folder: Path) -> None:
    found = locate(Model(base=str(folder)))
    assert found.folder == folder
    assert found.geometry == GQA
    assert found.config["model_type"] == "phi3"
    assert (found.provenance.base, found.provenance.source) == (str(folder), "folder")
    assert found.provenance.revision is None


def test_builtin(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(builtin.CACHE_ENV, str(tmp_path / "cache"))
    sizes = {path.name: {"bytes": path.stat().st_size} for path in folder.iterdir()}
    edit(folder / builtin.PROVENANCE, format_version=builtin.FORMAT_VERSION, files=sizes)
    shutil.copytree(folder, tmp_path / "cache" / "builtin" / "smollm2-135m")
    found = locate(Model(base="builtin:smollm2-135m"))
    assert found.folder == tmp_path / "cache" / "builtin" / "smollm2-135m"
    assert (found.provenance.base, found.provenance.source) == ("builtin:smollm2-135m", "builtin")
    assert found.provenance.revision is None


def test_unknown_builtin() -> None:
    problem = refusal("builtin:smollm3")
    assert problem.place == "builtin:smollm3"
    assert "smollm2-135m" in problem.remedy


def test_missing_folder(tmp_path: Path) -> None:
    problem = refusal(tmp_path / "nowhere")
    assert problem.place == str(tmp_path / "nowhere")
    assert problem.reason == "no such folder."


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_named_instead_of_read(folder: Path, pickled: str) -> None:
    (folder / "model.safetensors").rename(folder / pickled)
    problem = refusal(folder)
    assert (problem.place, problem.reason) == (str(folder), f"holds {pickled} but no safetensors.")


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder).reason == "holds no *.safetensors."


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    problem = refusal(folder)
    assert problem.place == str(folder / name)
    assert "missing" in problem.reason


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[]", "is not a JSON object."),
        (b'"phi3"', "is not a JSON object."),
        (b"null", "is not a JSON object."),
        (b'{"a":' * 100_000, "cannot be read"),
    ],
)
def test_files_that_are_no_json_object(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / name).write_bytes(content)
    problem = refusal(folder)
    assert problem.place == str(folder / name)
    assert problem.reason.startswith(reason)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("phi3small", "Phi-3-small is another architecture"),
        ("phi3_v", "Phi-3-vision is another architecture"),
        ("llama", "only the Phi-3 architecture is supported"),
        (None, "only the Phi-3 architecture is supported"),
    ],
)
def test_other_architectures(folder: Path, model_type: str | None, reason: str) -> None:
    edit(folder / "config.json", model_type=model_type)
    problem = refusal(folder)
    assert problem.place == str(folder / "config.json")
    assert reason in problem.reason


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", -64), ("num_hidden_layers", 10**9), ("vocab_size", 10**400), ("rope_theta", "abc")],
)
def test_values_that_make_no_sense(folder: Path, key: str, value: Any) -> None:
    edit(folder / "config.json", **{key: value})
    assert key in refusal(folder).reason
    with pytest.raises(ModelError, match=f"config.json: {key} is "):
        known_geometry(Model(base=str(folder)))


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda p: cut(p, 0), id="empty"),
        pytest.param(lambda p: cut(p, 5), id="within the length"),
        pytest.param(lambda p: cut(p, 500), id="within the header"),
        pytest.param(lambda p: cut(p, p.stat().st_size - 1), id="last byte"),
        pytest.param(lambda p: p.write_bytes(b"PK\x03\x04" + p.read_bytes()[4:]), id="a zip file"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:8] + b"?" * 9000), id="header is no JSON"),
    ],
)
def test_damaged_safetensors(folder: Path, spoil: Callable[[Path], object]) -> None:
    spoil(folder / "model.safetensors")
    problem = refusal(folder)
    assert problem.place == str(folder / "model.safetensors")
    assert problem.reason.startswith("is truncated or no safetensors file")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.symlink_to("nowhere"), "cannot be read: No such file or directory."),
        (lambda p: os.mkfifo(p), "cannot be read: Not a regular file."),
        (
            lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "is no safetensors file: it is Git LFS's note of a file",
        ),
        (lambda p: p.write_text("<!DOCTYPE html><html>"), "is no safetensors file: it is a web page."),
    ],
    ids=["a link to nowhere", "pipe", "LFS", "web page"],
)
def test_no_weights_under_their_name(folder: Path, make: Callable[[Path], object], reason: str) -> None:
    path = folder / "model.safetensors"
    path.rename(folder / "other.safetensors")
    make(path)
    assert reason in str(refusal(folder))


def test_provenance_names_what_is_loaded(folder: Path) -> None:
    before = provenance(folder)
    add_tensor(folder)  # into a file of its own, which nobody loads
    assert provenance(folder) == before
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(saved_names(shard), shard.name)}))
    assert [one["file"] for one in provenance(folder)["weights"]] == [shard.name]
    assert set(tensor_files(folder).values()) == {shard}


@pytest.mark.parametrize(
    "named", ["evil.bin", "../secret.safetensors", "/secret.safetensors", "gone.safetensors", 5, None, []]
)
def test_an_index_names_safetensors_of_its_folder(folder: Path, named: object) -> None:
    """What is checked, loaded and recorded is one list."""
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    for name in ("evil.bin", "../secret.safetensors"):
        (folder / name).write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": named}})
    )
    problem = refusal(folder)
    assert problem.place.endswith("model.safetensors.index.json")
    assert "which is" in problem.reason


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', None])
def test_weights_that_nothing_names(folder: Path, index: str | None) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    reason = refusal(folder).reason
    assert ("has no weight_map" if index else "holds neither model.safetensors nor") in reason


def saved_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        return list(tensors.keys())


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"bits": 4}, "unknown"),
        ({}, "unknown"),
        ("awq", "awq"),
    ],
)
def test_quantized_already(folder: Path, quantization: Any, method: str) -> None:
    edit(folder / "config.json", quantization_config=quantization)
    problem = refusal(folder)
    assert problem.place == str(folder / "config.json")
    assert problem.reason == f"the checkpoint is already quantized ({method})."


def test_adapter_in_the_folder(folder: Path) -> None:
    """transformers would load the base which that adapter names, in place of this one."""
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="/somewhere/else")
    problem = refusal(folder)
    assert problem.place == str(folder / "adapter_config.json")
    with pytest.raises(ModelError):
        known_geometry(Model(base=str(folder)))


# --- code in checkpoints -----------------------------------------------------------------------------------

FOREIGN = [
    {"AutoModelForCausalLM": "modeling_evil.Evil"},
    {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM.evil"},
    {"AutoModelForCausalLM": "evil/repo--modeling_evil.Evil"},
    {"AutoModelForCausalLM": "a/b--c/d--modeling_phi3.Phi3ForCausalLM"},
    {"AutoConfig": "configuration_phi3.Phi3Config\n"},
    {"AutoTokenizer": ["tokenization_evil.Evil", None]},
    {"AutoTokenizer": [None, "tokenization_evil.Evil"]},
    {"AutoTokenizer": [["tokenization_evil.Evil"]]},
    {"AutoModel": {"x": "evil.Evil"}},
    ["tokenization_evil.Evil", None],
    "evil.Evil",
    1,
]
"""Values of `auto_map` that name code of the checkpoint's own, in every shape that JSON has."""


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("auto_map", FOREIGN, ids=str)
def test_foreign_code(folder: Path, name: str, auto_map: Any) -> None:
    edit(folder / name, auto_map=auto_map)
    problem = refusal(folder)
    assert problem.place == str(folder / name)
    assert problem.reason.startswith("auto_map names code of its own: ")


@pytest.mark.parametrize("prefix", ["", "microsoft/Phi-3-mini-4k-instruct--", "microsoft/Phi-3.5_mini--"])
def test_names_of_microsofts_own_code_are_passed_over(folder: Path, prefix: str) -> None:
    own = {
        "AutoConfig": f"{prefix}configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": f"{prefix}modeling_phi3.Phi3ForCausalLM",
    }
    edit(folder / "config.json", auto_map=own)
    assert locate(Model(base=str(folder))).geometry == GQA


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": "Xenova/gpt-4o"}, {"AutoTokenizer": [None, None]}, {}, None]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_auto_maps_that_name_no_code(folder: Path, name: str, auto_map: Any) -> None:
    edit(folder / name, auto_map=auto_map)
    assert locate(Model(base=str(folder))).geometry == GQA


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation_internal", "evil/kernel"),
        ("_attn_implementation_internal", None),
        ("_attn_implementation_internal_x", {"": "evil/kernel"}),
        ("_attn_implementation", "evil/kernel"),
        ("_attn_implementation_autoset", "evil/kernel"),
        ("_experts_implementation_internal", "evil/kernel"),
        ("_commit_hash", "main"),
        ("_auto_class", "AutoModel"),
        ("_name_or_path", ["evil"]),
        ("__class__", "evil"),
        ("_", 1),
    ],
)
def test_keys_internal_to_transformers(folder: Path, key: str, value: Any) -> None:
    edit(folder / "config.json", **{key: value})
    problem = refusal(folder)
    assert problem.place == str(folder / "config.json")
    assert f"{key!r} is internal to transformers" in problem.reason


def test_what_older_transformers_wrote_into_every_config(folder: Path) -> None:
    edit(
        folder / "config.json",
        _name_or_path="Phi-3-mini-4k-instruct",
        _attn_implementation_autoset=True,
        quantization_config=None,
    )
    assert read_config(folder)["_attn_implementation_autoset"] is True
    assert locate(Model(base=str(folder))).geometry == GQA


# --- the hub -----------------------------------------------------------------------------------------------


ERROR_CODES = {401: "RepoNotFound", 403: "GatedRepo", 404: "RevisionNotFound"}
"""What the hub says beside the status: private or unknown, licence not accepted, unknown revision."""


class FakeHub(ThreadingHTTPServer):
    """As much of the hub's API as a download needs; serves one repository, or fails as told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder = folder
        self.fails: int | str | None = None
        self.downloaded: set[str] = set()


class _HubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.fails == "drop":
            self.close_connection = True
        elif isinstance(self.server.fails, int):
            self.answer(self.server.fails, b"", **{"X-Error-Code": ERROR_CODES.get(self.server.fails, "")})
        elif path == f"/api/models/{HUB_ID}/revision/v1":
            self.answer(200, json.dumps({"id": HUB_ID, "sha": COMMIT}).encode())
        elif path == f"/api/models/{HUB_ID}/tree/{COMMIT}":
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name}
                for p in self.server.folder.iterdir()
            ]
            self.answer(200, json.dumps(files).encode())
        elif path.startswith(f"/{HUB_ID}/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            self.server.downloaded.add(name)
            self.answer(200, (self.server.folder / name).read_bytes(), ETag=name)
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; nothing of the user's own is in the way."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def fake_hub(folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that is reachable, on this machine."""
    from huggingface_hub import close_session, constants

    hub = FakeHub(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    close_session()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()
    close_session()


DOWNLOAD = f"""
import json
from qlora_phi3.recipe import Model
from qlora_phi3.weights import locate
said = []
found = locate(Model(base={HUB_ID!r}, revision="v1"), said.append)
print(json.dumps({{"folder": str(found.folder), "said": said, **found.provenance.to_json()}}))
"""


def test_download_takes_neither_pickles_nor_code(fake_hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "modeling_phi3.py", "README.md"):
        (folder / name).write_text("never needed")
    settings = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{fake_hub.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "downloads"),
    }
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD],
        cwd=REPOSITORY,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert fake_hub.downloaded == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert {path.name for path in Path(found["folder"]).iterdir()} == fake_hub.downloaded
    assert tmp_path / "downloads" in Path(found["folder"]).parents
    assert (found["base"], found["source"], found["revision"]) == (HUB_ID, "hub", COMMIT)
    assert any(HUB_ID in text for text in found["said"])


@pytest.fixture
def cached(folder: Path, hub_cache: Path) -> Path:
    """The snapshot of a repository that was downloaded before."""
    repository = hub_cache / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repository / "snapshots" / COMMIT))


def test_cached_download_needs_no_hub(cached: Path) -> None:
    found = locate(Model(base=HUB_ID))
    assert (found.folder, found.geometry) == (cached, GQA)
    assert (found.provenance.source, found.provenance.revision) == ("hub", COMMIT)


def test_hub_repository_without_safetensors(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    problem = refusal(HUB_ID)
    assert (problem.place, problem.reason) == (f"model.base: {HUB_ID}", "holds no *.safetensors.")


@pytest.mark.parametrize(
    ("fails", "reason", "remedy"),
    [
        (401, "refuses access (HTTP 401)", "hf auth login"),
        (403, "refuses access (HTTP 403)", "hf auth login"),
        (404, "not on the hub, or no such revision.", "model.revision"),
        (500, "cannot be reached and nothing is cached", "builtin:smollm2-135m"),
        ("drop", "cannot be reached and nothing is cached", "builtin:smollm2-135m"),
    ],
)
def test_hub_that_fails(fake_hub: FakeHub, fails: int | str, reason: str, remedy: str) -> None:
    fake_hub.fails = fails
    problem = refusal(HUB_ID, "v1")
    assert problem.place == f"model.base: {HUB_ID}"
    assert reason in problem.reason
    assert remedy in problem.remedy


def test_a_name_that_the_hub_hides_may_be_misspelt(fake_hub: FakeHub) -> None:
    fake_hub.fails = 401  # the hub's answer to anyone not logged in, for private and for unknown names
    assert "no such model" in refusal(HUB_ID).reason


def test_hub_that_is_not_there(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of `discard`: nobody listens
    start = time.monotonic()
    problem = refusal(HUB_ID)
    assert "cannot be reached and nothing is cached" in problem.reason
    assert time.monotonic() - start < 8


def test_offline_and_nothing_cached(hub_cache: Path) -> None:
    import huggingface_hub  # noqa: F401  # its import is not what is timed

    start = time.monotonic()
    problem = refusal("microsoft/Phi-3-mini-4k-instruct")
    assert time.monotonic() - start < 8
    assert problem.place == "model.base: microsoft/Phi-3-mini-4k-instruct"
    assert "cannot be reached and nothing is cached" in problem.reason
    assert "builtin:smollm2-135m need none" in problem.remedy


@pytest.mark.parametrize("base", ["a/b/c", "./here", "~/here", "two words", " ", "org/na--me", "x" * 100])
def test_neither_hub_id_nor_folder(base: str) -> None:
    problem = refusal(base)
    assert problem.place == f"model.base: {base}"
    assert problem.reason == "is neither a hub id nor a folder."


# --- sizes without a download ------------------------------------------------------------------------------


@pytest.mark.parametrize("base", phi3.VARIANTS)
def test_sizes_of_known_checkpoints(base: str) -> None:
    assert known_geometry(Model(base=base)) == phi3.VARIANTS[base]


def test_sizes_of_a_folder(folder: Path) -> None:
    assert known_geometry(Model(base=str(folder))) == GQA


def test_sizes_of_an_unknown_hub_model_are_not_asked_for(fake_hub: FakeHub) -> None:
    assert known_geometry(Model(base=HUB_ID)) is None
    assert fake_hub.downloaded == set()


def test_sizes_of_a_folder_that_is_refused(folder: Path, tmp_path: Path) -> None:
    edit(folder / "config.json", auto_map="evil.Evil")
    for base in (folder, tmp_path / "nowhere"):
        with pytest.raises(ModelError):
            known_geometry(Model(base=str(base)))


# --- provenance --------------------------------------------------------------------------------------------


def add_tensor(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({}, folder / "model-2.safetensors", {"format": "pt"})


def halve(folder: Path) -> None:
    """All weights, by their exponents: names, shapes and sizes stay."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    begins = 8 + int.from_bytes(content[:8], "little")
    for at in range(begins + 1, len(content), 2):
        content[at] = content[at] & 0x80 | max(content[at] & 0x7F, 1) - 1
    path.write_bytes(content)


def append(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes() + b"\n")

    return change


def provenance(folder: Path) -> dict[str, Any]:
    return locate(Model(base=str(folder))).provenance.to_json()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param(append("config.json"), "config_sha256", id="config"),
        pytest.param(append("tokenizer.json"), "tokenizer_sha256", id="tokenizer"),
        pytest.param(append("chat_template.jinja"), "chat_template_sha256", id="template"),
        pytest.param(halve, "weights", id="values of the weights"),
    ],
)
def test_provenance_tells_checkpoints_apart(folder: Path, change: Callable[[Path], None], field: str) -> None:
    before = provenance(folder)
    change(folder)
    after = provenance(folder)
    assert [key for key in before if before[key] != after[key]] == [field]


def test_provenance_stays_where_nothing_matters(folder: Path) -> None:
    before = provenance(folder)
    (folder / "README.md").write_text("another card")
    (folder / "config.json").touch()
    assert provenance(folder) == before


def test_template_inside_the_tokenizers_config(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=template)
    before = provenance(folder)
    edit(folder / "tokenizer_config.json", chat_template=template + " ")
    after = provenance(folder)
    assert [key for key in before if before[key] != after[key]] == ["chat_template_sha256"]


def test_provenance_as_json(folder: Path) -> None:
    found = json.loads(json.dumps(provenance(folder)))
    assert list(found) == [
        "base", "source", "revision", "config_sha256", "tokenizer_sha256", "chat_template_sha256", "weights"
    ]  # fmt: skip
    [file] = found["weights"]
    assert file["file"] == "model.safetensors"
    assert file["bytes"] == (folder / "model.safetensors").stat().st_size
    assert len(file["header_sha256"]) == 64


# --- small things ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("\n\n one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (OSError("  \n "), "OSError"),
        (ValueError("x" * 301), "x" * 300),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_checking_a_folder_needs_no_torch(checkpoints: Callable[[str], Path]) -> None:
    code = (
        "import sys; from qlora_phi3.recipe import Model; from qlora_phi3.weights import locate;"
        f"locate(Model(base={str(checkpoints('gqa'))!r}));"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
