"""Pushing an export through the command line and huggingface_hub's own client, to a hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_lab import make_base, make_run
from safetensors.torch import load

from qlora_phi3 import export
from qlora_phi3.export import destination

REPO, TOKEN, COMMIT = "me/model", "hf_of_the_test", "c0ffee" * 6 + "c0ff"


class UploadHub(ThreadingHTTPServer):
    """As much of the hub's API as an upload needs: large files by their hash, small ones in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.cards: list[dict[str, Any]] = []
        self.large: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.fails: int | None = None


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.fails is not None:
            self.answer({"error": f"no right to write with {TOKEN}"}, hub.fails)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer({"url": f"{hub.address}/{REPO}", "name": REPO})
        elif self.path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            hub.cards.append(yaml.safe_load(front))
            self.answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPO}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            self.answer({"files": files})
        elif self.path == f"/{REPO}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            where = {one["oid"]: {"upload": {"href": f"{hub.address}/put/{one['oid']}"}} for one in wanted}
            self.answer({"transfer": "basic", "objects": [o | {"actions": where[o["oid"]]} for o in wanted]})
        elif self.path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            self.answer(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.address}/{REPO}/commit/{COMMIT}"}
            )
        else:
            self.answer({"error": f"what is {self.path}?"}, 404)

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/put/")
        self.server.large[self.path.removeprefix("/put/")] = content
        self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": REPO, "sha": COMMIT, "siblings": []} if REPO in self.path else {}, 200)

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with UploadHub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its adapter exported."""
    place = tmp_path_factory.mktemp("hub")
    folder = make_run(place, make_base(place / "base", "mini"))
    export.export(folder, "adapter")
    return folder


def push(hub: UploadHub, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "qlora_phi3", "export", str(run), "--to", "hub", "--repo", REPO, *more]
    there = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(line, env=os.environ | there, text=True, capture_output=True, timeout=120)


def test_what_arrives_is_the_export_without_its_local_notes(hub: UploadHub, run: Path) -> None:
    done = push(hub, run, "--json")
    assert done.returncode == 0, done.stderr
    folder = destination.folder_of(run, run / "adapter", "adapter")
    here = {name: (folder / name).read_bytes() for name in destination.files_of(folder)}
    here = {name: content for name, content in here.items() if name not in ("export.json", "parity.json")}
    assert hub.files == here and {"README.md", "adapter_config.json"} < set(here)
    assert load(hub.files["adapter_model.safetensors"])
    assert [(one["name"], one["visibility"]) for one in hub.created] == [("model", "private")]
    assert {card["library_name"] for card in hub.cards} == {"peft"}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    assert f"sent to {hub.address}/{REPO}" in done.stderr


def test_a_dry_run_asks_the_hub_nothing(hub: UploadHub, run: Path) -> None:
    done = push(hub, run, "--dry-run")
    assert done.returncode == 0 and not hub.tokens
    assert "nothing was sent" in done.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_repository_and_no_token(hub: UploadHub, run: Path, status: int) -> None:
    hub.fails = status
    done = push(hub, run)
    assert done.returncode == 1 and not hub.files
    assert f"--repo {REPO}: the hub refused it: " in done.stderr and "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
