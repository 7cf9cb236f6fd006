"""Files that are no JSON, or no files: each is refused with its own reason, and none is waited for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_phi3 import json_files
from qlora_phi3.errors import DataError, ModelError

ALL = Path("qlora_phi3")


def holds(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def is_link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda path: None, "is missing.", id="missing"),
        pytest.param(is_link_to("nowhere"), "is a link to a file that is not there.", id="dangling link"),
        pytest.param(is_link_to("f.json"), "cannot be read: Too many levels of symbolic links.", id="loop"),
        pytest.param(lambda path: os.mkfifo(path), "cannot be read: Not a regular file.", id="pipe"),
        pytest.param(is_link_to("/dev/zero"), "cannot be read: Not a regular file.", id="device"),
        pytest.param(lambda path: path.mkdir(), "cannot be read: Is a directory.", id="folder"),
        pytest.param(holds(b""), "cannot be read: it is empty.", id="empty"),
        pytest.param(holds(b" \n\t"), "cannot be read: it is empty.", id="blank"),
        pytest.param(holds(b"\xef\xbb\xbf{}"), "begins with a byte order mark.", id="byte order mark"),
        pytest.param(holds("{}".encode("utf-16")), "it is UTF-16, not UTF-8.", id="UTF-16"),
        pytest.param(holds(b'{"a": "\xe4"}'), "it is not UTF-8.", id="Latin-1"),
        pytest.param(holds(b"<!DOCTYPE html>"), "it is a web page.", id="web page"),
        pytest.param(
            holds(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "git lfs pull",
            id="LFS",
        ),
        pytest.param(holds(b"{"), "it is not JSON: Expecting property name", id="cut"),
        pytest.param(holds(b"{}\n{}"), "it is not JSON: Extra data at line 2 column 1.", id="lines"),
        pytest.param(holds(b'{"a":' * 100_000), "it is nested too deeply.", id="deep"),
        pytest.param(
            holds(b'{"a": {"b": 1, "b": 2}}'), "it names the key 'b' twice in one object.", id="twice"
        ),
        pytest.param(
            holds(b'{"a": ' + b"7" * 5000 + b"}"), "a number in it has too many digits.", id="endless number"
        ),
        pytest.param(holds(b'{"a": NaN}'), "it holds NaN, which is no number of JSON.", id="NaN"),
        pytest.param(holds(b'{"a": -Infinity}'), "it holds -Infinity, which is no", id="infinity"),
        pytest.param(holds(b'{"a": "\\ud800"}'), "it holds half of a character", id="half a pair"),
        pytest.param(holds(b"[]"), "is not a JSON object.", id="list"),
        pytest.param(holds(b"null"), "is not a JSON object.", id="null"),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "f.json"
    make(path)
    with pytest.raises(ModelError) as caught:
        json_files.read_object(path, ModelError, "Copy it again.", strict=True)
    (problem,) = caught.value.problems
    assert problem.place == str(path) and problem.remedy == "Copy it again."
    assert reason in problem.reason and len(str(problem)) < 400


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(f'"{"x" * 998}"')
    assert json_files.load(path, 1000) == "x" * 998
    with pytest.raises(ValueError, match="it is larger than 999 B"):
        json_files.load(path, 999)
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on a disk, and all of the memory to read
    with pytest.raises(DataError, match=r"it is larger than 100\.00 MiB"):
        json_files.read(path, DataError, "Copy it again.")


def test_a_file_of_somebody_else_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.json"
    path.write_text("{}")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read all

        def denied(*_: object) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(json_files, "read_bytes", denied)
    with pytest.raises(ModelError, match=r"cannot be read: Permission denied\. Check who may read it\.$"):
        json_files.read_object(path, ModelError, "Download it again.")


def test_our_own_files_may_hold_what_python_writes(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"loss": NaN}')
    assert set(json_files.load(path)) == {"loss"}


def test_no_module_reads_json_in_a_way_of_its_own() -> None:
    """`json.loads` of a text in memory is another matter; of a file it forgets nine of ten ways to fail."""
    reading = re.compile(r"json\.load\(|json\.loads\([^)]*\.?(read_text|read_bytes|open)\(")
    found = {
        path.relative_to(ALL).as_posix(): hits
        for path in sorted(ALL.rglob("*.py"))
        if (hits := reading.findall(path.read_text(encoding="utf-8")))
    }
    ours = {"export/llama_cpp.py", "template_limits.py"}  # answers to us, and what we ask a child
    assert set(found) <= ours, found


def test_no_module_waits_for_what_stands_in_a_file_s_place() -> None:
    """Whatever is read goes through `files.open_file`: of a pipe, `Path.open` waits for ever."""
    reading = re.compile(r"\.read_text\((?:encoding|\))|\.read_bytes\(\)|\.open\((?:\"rb?t?\"|encoding=|\))")
    found = {
        path.relative_to(ALL).as_posix(): hits
        for path in sorted(ALL.rglob("*.py"))
        if (hits := reading.findall(path.read_text(encoding="utf-8")))
    }
    ours = {"environment.py"}  # the constraints.txt of a checkout
    assert set(found) == ours, found
