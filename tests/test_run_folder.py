"""A run's folder is one run's: claimed at once or refused, cleaned of its own files, kept once it trained."""

from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qlora_phi3 import files, run_folder
from qlora_phi3.errors import OutputError, RunError
from qlora_phi3.metrics_log import MetricsLog
from qlora_phi3.run_folder import claim


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("out", [None, Path("a/b/out"), Path("empty")], ids=str)
@pytest.mark.parametrize("ends", ["well", "refused"])
def test_twenty_rounds_of_eight_at_once(out: Path | None, ends: str) -> None:
    """Whoever has a folder has it alone, and what was refused or failed leaves no file.

    An empty folder may be left where one made it and another was first to claim it.
    """
    Path("empty").mkdir()
    for _ in range(20):
        together = threading.Barrier(8)

        def one(number: int, together: threading.Barrier = together) -> Path | None:
            together.wait()
            try:
                with claim(out, "tiny") as run:
                    run.write_text("recipe.yaml", str(number))
                    assert (run.path / "recipe.yaml").read_text() == str(number)
                    if ends == "refused":
                        raise ValueError
                    return run.path
            except OutputError:
                return None
            except ValueError:
                return None

        with ThreadPoolExecutor(8) as pool:
            found = [path for path in pool.map(one, range(8)) if path is not None]
        assert len(found) == len(set(found)) == (0 if ends == "refused" else 8 if out is None else 1)
        for path in found:
            assert [file.name for file in path.iterdir()] == ["recipe.yaml"]
            (path / "recipe.yaml").unlink()
            path.rmdir()
        assert not [path for path in Path.cwd().rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("began", [False, True])
@pytest.mark.parametrize("error", [OutputError("a", "b"), KeyboardInterrupt(), OSError(), AssertionError()])
def test_the_phase_decides_what_stays(began: bool, error: BaseException) -> None:
    Path("out").mkdir()
    with pytest.raises(type(error)):
        _end(claim(Path("out"), "tiny"), began, error)
    kept = {"of-the-user", "plan.json"} if began else {"of-the-user"}
    assert {path.name for path in Path("out").iterdir()} == kept


def _end(place: AbstractContextManager[run_folder.RunFolder], began: bool, error: BaseException) -> None:
    with place as run:
        run.write_text("plan.json", "{}")
        run.reserve(1000)
        Path("out/of-the-user").write_text("x")
        run.training_began = began
        raise error


@pytest.mark.parametrize("there", ["recipe.yaml", run_folder.CLAIM, "notes.txt"])
def test_what_is_there_is_left_alone(there: str) -> None:
    Path("out").mkdir()
    (Path("out") / there).write_text("mine")
    why = "is not empty" if there == "notes.txt" else "holds another run"
    with pytest.raises(OutputError, match=why), claim(Path("out"), "tiny"):
        pass
    assert [(path.name, path.read_text()) for path in Path("out").iterdir()] == [(there, "mine")]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere paths are text")
@pytest.mark.parametrize("above", [False, True])
def test_a_path_that_no_library_can_write_to_is_refused(above: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, the adapter could not be saved."""
    bad = Path(os.fsdecode(b"caf\xe9"))
    if above:
        bad.mkdir()
        monkeypatch.chdir(bad)
    with pytest.raises(OutputError, match="is not UTF-8"), claim(None if above else bad / "out", "tiny"):
        pass
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "below a file"])
def test_no_folder_at_all(kind: str) -> None:
    out = Path("out")
    if kind == "loop":
        out.symlink_to("out")
    elif kind == "dangling":
        out.symlink_to("nowhere")
    else:
        out.write_text("")
    with pytest.raises(OutputError) as caught, claim(out / "run" if kind == "below a file" else out, "tiny"):
        pass
    assert "link that leads nowhere" in str(caught.value) or "is a file" in str(caught.value)


def test_room_is_refused_before_and_given_back_after() -> None:
    with claim(Path("out"), "tiny") as run:
        with pytest.raises(RunError, match=r"are needed for the adapter .* nothing was trained yet"):
            run.reserve(2**62)
        run.reserve(10_000)
        assert (run.path / run_folder.RESERVE).stat().st_size == 10_000
        run.release()
        assert not (run.path / run_folder.RESERVE).exists()


def test_a_text_is_whole_or_the_old_one() -> None:
    path = Path("report.html")
    files.write_text(path, "old")
    Path("folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_text(Path("folder"), "new")
    assert path.read_text() == "old"
    assert {one.name for one in Path.cwd().iterdir()} == {"report.html", "folder"}
    files.write_text(path, "half \ud800")
    assert path.read_text() == "half \\ud800"


def test_a_link_is_replaced_and_not_followed() -> None:
    Path("victim").write_text("old")
    Path("report.html").symlink_to("victim")
    files.write_text(Path("report.html"), "new")
    assert Path("victim").read_text() == "old"
    assert Path("report.html").read_text() == "new"


def test_lines_that_could_not_be_written_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("metrics.jsonl")
    with MetricsLog(path) as log:
        log.write("1\n")
        assert log._file is not None
        log._file.close()  # a stand-in for a disk that is full for a while
        log._file = _Full()  # type: ignore[assignment]
        log.write("2\n")
        assert log.trouble is not None
        log.write("3\n")
    assert path.read_text() == "1\n2\n3\n"
    assert log.trouble is None


class _Full:
    def write(self, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = close = lambda self: None


def test_the_claim_names_its_process() -> None:
    with claim(Path("out"), "tiny") as run:
        assert json.loads((run.path / run_folder.CLAIM).read_text())["process"] > 0
