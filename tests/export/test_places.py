"""Where exports go: what can be refused first is, and nothing of others, living or killed, is lost."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import warm
from export_lab import make_base, make_run
from test_cli_surface import listing

from qlora_phi3 import export
from qlora_phi3.errors import FitError, InputError, OutputError, RunError
from qlora_phi3.export import merged


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("places")
    make_run(place, make_base(place / "base", "mini"))
    return place


@pytest.fixture
def run(lab: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab / "run", tmp_path / "run"))


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("target", ["loralib", "mlx", "merged"])
def test_a_disk_that_takes_no_more_is_told(run: Path, tmp_path: Path, target: str) -> None:
    done = warm.run(
        *("export", run, "--to", target, "--no-gate"),
        cwd=tmp_path,
        moment=warm.Moment("qlora_phi3.export.destination:unfinished"),
        act=small_files,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert target in done.stderr.splitlines()[-1] and not (run / "exports").exists()


def test_places_that_would_fail_later_are_refused_first(run: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (run / "exports").mkdir()
    for name in ("adapter", "mlx"):
        (run / "exports" / name).symlink_to(tmp_path / "big")
    before = listing(tmp_path)
    wrong = {
        "File name too long": ["--to", "adapter", "--out", "y" * 240],
        "cannot be used: ": ["--to", "adapter", "--out", "/proc/x"],
        "its path is no UTF-8": ["--to", "adapter", "--out", "x\udcff"],
        "is where a disk is mounted": ["--to", "adapter", "--out", "/dev/shm"],
        "is the place of adapter too, by a link": ["--to", "adapter", "--to", "mlx"],
        "HF_TOKEN: is not set": ["--to", "merged", "--to", "hub", "--what", "merged", "--repo", "a/b"],
    }
    for words, more in wrong.items():
        done = warm.run("export", run, *more, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "exporting" not in done.stderr, done
    assert [name for name in listing(tmp_path) if not name.startswith((".out", ".err"))] == before


def test_what_a_stranger_named_like_ours_stays(run: Path) -> None:
    failed = run / "exports" / "adapter.failed"
    failed.mkdir(parents=True)
    (failed / "mine.txt").write_text("x")
    export.export(run, "adapter", options=export.Options(gate=False))
    assert (failed / "mine.txt").is_file()


def test_an_export_that_was_moved_aside_by_a_killed_one_comes_back(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "[x]"
    first = export.export(run, "adapter", out=place, options=export.Options(gate=False))
    first.folder.rename(tmp_path / ".[x].replaced-1")  # the process of this number lives, and is another's
    (tmp_path / ".[x].unfinished-1").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        export.export(run, "adapter", out=place)
    assert (place / "export.json").is_file() and not list(tmp_path.glob(".[[]x]*"))


def test_of_two_at_once_the_second_is_told_before_its_work(run: Path) -> None:
    def second(text: str) -> None:
        if text.startswith("not proven"):
            with pytest.raises(OutputError, match="is being written by another export"):
                export.export(run, "adapter", say=said.append)

    said: list[str] = []
    export.export(run, "adapter", say=second, options=export.Options(gate=False))
    assert said == [] and [path.name for path in (run / "exports").iterdir()] == ["adapter"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), MemoryError()], ids=repr)
def test_what_the_system_refuses_is_told_with_what_is_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(merged.shards, "write", fail)
    said: list[str] = []
    options = export.Options(merge_base="dequant", gate=False)
    wanted = ["adapter", "merged", "loralib", "mlx"]
    with pytest.raises((RunError, FitError), match="Nothing is left of this export") as caught:
        export.export_all(run, wanted, options=options, say=said.append)
    assert str(caught.value).startswith("merged: ") and said[-2].startswith("whole all the same: adapter ")
    assert said[-1] == "not tried: loralib, mlx"
    assert [path.name for path in (run / "exports").iterdir()] == ["adapter"]


def test_names_of_others_reach_a_terminal_as_text(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "a\x1b[31m\u202e[bold]\nb"
    done = warm.run("export", run, "--to", "adapter", "--no-gate", "--json", "--out", place, cwd=tmp_path)
    assert done.returncode == 0 and "a\\x1b[31m\\u202e[bold]\\nb" in done.stderr
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert json.loads(done.stdout)["exports"][0]["folder"] == str(place)


def test_what_the_exports_of_a_run_need_is_told_by_the_base_alone(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_phi3 import weights
    from qlora_phi3.recipe import Model

    base, targets = Path(shutil.copytree(lab / "base", tmp_path / "base")), ["adapter", "merged", "ollama"]
    checkpoint = weights.locate(Model(base=str(base)))
    export.check_base(targets, checkpoint, tmp_path)
    free = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    export.check_base(["adapter"], checkpoint, tmp_path)
    with pytest.raises(OutputError, match=r"exports: needs .* and the disk has 1\.00 MiB free"):
        export.check_base(targets, checkpoint, tmp_path)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content']", "message['content'] | trim"))
    with pytest.raises(InputError, match="more than put text around turns"):
        export.check_base(targets, checkpoint, tmp_path)
    (base / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match="holds no settings"):
        export.check_base(["merged"], checkpoint, tmp_path)
