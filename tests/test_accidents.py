"""Ordinary accidents while a run is under way: what was trained is there, and nothing of others is touched.

Each through the command line, in a process of its own, at a moment that the test chooses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from warm import Ended, Moment, Running, run

STEP = "qlora_phi3.trainer:PhiTrainer.training_step"
MOMENTS = {
    "before step 2": Moment(STEP, 2),
    "saving": Moment("qlora_phi3.adapters:save"),
    "answering": Moment("qlora_phi3.evaluate:measure", 2),
    "reporting": Moment("qlora_phi3.report:write"),
}
PREPARING = {
    "the tokenizer": Moment("qlora_phi3.model:load_tokenizer"),
    "the rows": Moment("qlora_phi3.data.splits:prepare"),
    "the base": Moment("qlora_phi3.model:load"),
    "the base's answers": Moment("qlora_phi3.evaluate:measure"),
}
BREAKING = ("Traceback", "Error:")


@pytest.fixture
def start(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Running]:
    recipe = write_recipe(train=", log_every: 1")

    def go(*more: object, **accident: Any) -> Running:
        return Running(("recipe", recipe, *more), tmp_path, **accident)

    return go


def check_whole(folder: Path, steps: int) -> dict[str, Any]:
    """The run's folder has a readable adapter, all its lines, and a report; what the report says."""
    assert load_file(folder / "adapter" / "adapter_model.safetensors")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == list(range(1, steps + 1))
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not (folder / "checkpoints").exists()
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert report["training"]["num_steps"] == steps
    return report


def check_words(ended: Ended, code: int, *words: str) -> None:
    assert ended.returncode == code, ended.stderr
    assert [word for word in BREAKING if word in ended.stderr] == []
    assert [word for word in words if word not in ended.stderr] == []


# --- the data


def _move(path: str) -> None:
    Path(path).rename(f"{path}.away")


def _append(path: str) -> None:
    with Path(path).open("a") as file:
        file.write('{"text": "more"}\n')


def _replace(path: str) -> None:
    Path(f"{path}.new").write_text('{"text": "other"}\n')
    Path(f"{path}.new").replace(path)


def _stray(path: str) -> None:
    Path(path).with_name("stray.bak").write_text("x")


@pytest.mark.parametrize(
    ("moment", "act"),
    [(moment, _move) for moment in MOMENTS]
    + [("before step 2", act) for act in (os.unlink, _append, _replace, _stray)],
)
def test_what_becomes_of_the_data_costs_nothing(
    start: Callable[..., Running], tmp_path: Path, chats: Path, moment: str, act: Any
) -> None:
    data = tmp_path / "rows"
    data.mkdir()
    file = Path(shutil.copy(chats, data / "chats.jsonl"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    accident = {"moment": MOMENTS[moment], "act": act, "given": (str(file),)}
    where = f"data.train.path={data}"
    ended = start(where, f"data.eval.path={file}", "--out", "out", **accident).wait()
    check_words(ended, 0)
    report = check_whole(tmp_path / "out", 3)
    assert [one["sha256"] for one in report["data"]["sources"]] == [digest, digest]
    assert [one["name"] for one in report["data"]["sources"]] == ["chats.jsonl", "chats.jsonl"]
    told = [note for note in report["notes"] if digest in note]
    late = moment in ("reporting",) or act is _stray
    assert bool(told) != late
    assert digest in (tmp_path / "out" / "adapter" / "README.md").read_text()


# --- the folder


def test_a_removed_folder_is_made_again(start: Callable[..., Running], tmp_path: Path) -> None:
    accident = {"moment": MOMENTS["before step 2"], "act": shutil.rmtree, "given": (str(tmp_path / "out"),)}
    check_words(start("--out", "out", **accident).wait(), 0)
    check_whole(tmp_path / "out", 3)
    assert (tmp_path / "out" / "recipe.yaml").is_file() and (tmp_path / "out" / "plan.json").is_file()


def _file_in_place_of(folder: str) -> None:
    shutil.rmtree(folder)
    Path(folder).write_text("")


def test_a_folder_that_cannot_be_written_any_more_costs_nothing(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    accident = {"moment": MOMENTS["saving"], "act": _file_in_place_of, "given": (str(tmp_path / "out"),)}
    ended = start("--out", "out", **accident).wait()
    check_words(ended, 1, "out: could not be written", "The whole run, adapter included, is in")
    (moved,) = tmp_path.glob("out-*")
    assert str(moved) in ended.stderr
    check_whole(moved, 3)


def _refuse(*_: str) -> None:
    raise ValueError("a library does not like this place")


def test_whatever_keeps_the_adapter_from_its_place_costs_nothing(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    ended = start("--out", "out", moment=MOMENTS["saving"], act=_refuse).wait()
    assert ended.returncode == 1 and "The whole run, adapter included, is in" in ended.stderr, ended
    (moved,) = tmp_path.glob("out-*")
    check_whole(moved, 3)


def _another_s(folder: str) -> None:
    shutil.rmtree(folder)
    Path(folder).mkdir()
    (Path(folder) / "metrics.jsonl").write_text("another run's")


@pytest.mark.parametrize("moment", [Moment(STEP, 2), Moment("qlora_phi3.pipeline:_save")], ids=str)
def test_a_folder_that_became_another_s_is_left_alone(
    start: Callable[..., Running], tmp_path: Path, moment: Moment
) -> None:
    accident = {"moment": moment, "act": _another_s, "given": (str(tmp_path / "out"),)}
    ended = start("--out", "out", **accident).wait()
    check_words(ended, 1, "was replaced by another", "The whole run, adapter")
    (left,) = (tmp_path / "out").iterdir()
    assert left.read_text() == "another run's"
    (moved,) = tmp_path.glob("out-*")
    check_whole(moved, 3)


def _pipe_in_place_of(claim: str) -> None:
    Path(claim).unlink()
    os.mkfifo(claim)


def test_a_pipe_where_the_claim_was_keeps_nobody_waiting(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    claim = tmp_path / "out" / ".claim.json"
    accident = {"moment": Moment(STEP, 2), "act": _pipe_in_place_of, "given": (str(claim),)}
    check_words(start("--out", "out", **accident).wait(), 1, "The whole run, adapter")
    (moved,) = tmp_path.glob("out-*")
    check_whole(moved, 3)
    assert not (tmp_path / "out" / ".reserve").exists()  # room for the adapter, which went elsewhere


@pytest.mark.parametrize("name", ["eval.json", "metrics.jsonl"])
def test_what_is_damaged_before_the_report_costs_the_page_alone(
    start: Callable[..., Running], tmp_path: Path, name: str
) -> None:
    damaged = tmp_path / "out" / name
    accident = {"moment": MOMENTS["reporting"], "act": _damage, "given": (str(damaged),)}
    ended = start("--out", "out", **accident).wait()
    check_words(ended, 1, f"{name}: is damaged", "out/adapter: is the trained adapter")
    assert load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")


def _damage(path: str) -> None:
    Path(path).write_text("{,")


def _limit(num_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize("num_bytes", [0, 200, 2**20])
def test_without_room_nothing_is_trained(
    start: Callable[..., Running], tmp_path: Path, num_bytes: int
) -> None:
    """The log of the test is a file as well, which has no room either."""
    accident = {"moment": Moment("qlora_phi3.pipeline:write_inputs"), "act": _limit, "given": (num_bytes,)}
    ended = start("--out", "out", **accident).wait()
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


# --- the terminal


def _lose(*descriptors: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(full, descriptor)


def _lose_pipe(*descriptors: int) -> None:
    reads, writes = os.pipe()
    for descriptor in descriptors:
        os.dup2(writes, descriptor)
    os.close(reads)
    os.close(writes)


@pytest.mark.parametrize("lose", [_lose, _lose_pipe])
@pytest.mark.parametrize("descriptors", [(1,), (2,), (1, 2)])
def test_nobody_listens(
    start: Callable[..., Running], tmp_path: Path, lose: Any, descriptors: tuple[int, ...]
) -> None:
    accident = {"moment": MOMENTS["before step 2"], "act": lose, "given": descriptors}
    ended = start("--out", "out", **accident).wait()
    untold = 1 in descriptors
    words = ["standard output: cannot be written", "The run itself is whole"] if descriptors == (1,) else []
    check_words(ended, 1 if untold else 0, *words)
    check_whole(tmp_path / "out", 3)


def test_closed_from_the_start(start: Callable[..., Running], tmp_path: Path) -> None:
    accident = {"moment": Moment("qlora_phi3.cli:main"), "act": _close_streams}
    assert start("--out", "out", **accident).wait().returncode == 0
    check_whole(tmp_path / "out", 3)


def _close_streams() -> None:
    """As Python has them where the shell closed them: `>&- 2>&-`."""
    sys.stdout = sys.stderr = None


# --- signals


def _signal(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("moment", PREPARING)
def test_stopped_before_training_nothing_is_left(
    start: Callable[..., Running], tmp_path: Path, moment: str
) -> None:
    ended = start(moment=PREPARING[moment], act=_signal, given=("SIGINT",)).wait()
    check_words(ended, 130, "stopped by Ctrl-C before training began: nothing is left of it.")
    assert not (tmp_path / "runs").exists()


STOPPED = {
    "calibrating": (Moment("qlora_phi3.trainer:PhiTrainer.calibrate"), 1, "after step 1 of 3"),
    "in step 1": (Moment("qlora_phi3.trainer:PhiTrainer.backward_of", 2), 1, "after step 1 of 3"),
    "in step 2": (Moment(STEP, 2), 2, "after step 2 of 3"),
    "in the last step": (Moment(STEP, 3), 3, "after all 3 steps"),
    "saving": (MOMENTS["saving"], 3, "after all 3 steps"),
    "answering": (MOMENTS["answering"], 3, "after all 3 steps"),
    "reporting": (MOMENTS["reporting"], 3, "after all 3 steps"),
}


@pytest.mark.parametrize("moment", STOPPED)
def test_stopped_while_training_the_adapter_is_saved(
    start: Callable[..., Running], tmp_path: Path, moment: str
) -> None:
    when, steps, words = STOPPED[moment]
    ended = start("--out", "out", moment=when, act=_signal, given=("SIGINT",)).wait()
    check_words(ended, 3, "stopped by Ctrl-C", words, str(Path("out") / "adapter"))
    report = check_whole(tmp_path / "out", steps)
    assert any("stopped by Ctrl-C" in note for note in report["notes"]) or moment == "reporting"
    if moment == "in step 2":
        (words_to_type,) = re.findall(r"`python -m qlora_phi3 (recipe [^`]+)`", ended.stderr)
        again = run(*shlex.split(words_to_type), "--out", "next", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        check_whole(tmp_path / "next", 1)


@pytest.mark.parametrize(("name", "words"), [("SIGTERM", "SIGTERM"), ("SIGHUP", "the terminal was closed")])
def test_other_signals_are_no_different(
    start: Callable[..., Running], tmp_path: Path, name: str, words: str
) -> None:
    ended = start("--out", "out", moment=Moment(STEP, 2), act=_signal, given=(name,)).wait()
    check_words(ended, 3, words)
    check_whole(tmp_path / "out", 2)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_other_commands_end_in_a_sentence(
    start: Callable[..., Running], tmp_path: Path, name: str, code: int
) -> None:
    moment = Moment("qlora_phi3.checkup:check_machine")
    ended = run("doctor", cwd=tmp_path, moment=moment, act=_signal, given=(name,))
    check_words(ended, code, "doctor: stopped by")


@pytest.mark.parametrize(
    "moment", ["report:show", "run_folder:RunFolder.close", "speeds:note", "progress:drop_unwritten"]
)
def test_stopped_when_all_is_there_it_says_so(
    start: Callable[..., Running], tmp_path: Path, moment: str
) -> None:
    when = Moment(f"qlora_phi3.{moment}")
    more = ("train.max_steps=5",) if moment == "speeds:note" else ()
    ended = start("--out", "out", *more, moment=when, act=_signal, given=("SIGHUP",)).wait()
    at_the_very_end = moment == "progress:drop_unwritten"
    check_words(ended, 0 if at_the_very_end else 3, *([] if at_the_very_end else ["the terminal was closed"]))
    check_whole(tmp_path / "out", 5 if more else 3)


def test_after_the_last_word_nothing_changes_how_it_ended(tmp_path: Path) -> None:
    given = (str(tmp_path / "over"),)
    ended = run(
        "schema", cwd=tmp_path, moment=Moment("qlora_phi3.cli:_end"), act=_signal_when_over, given=given
    )
    assert (tmp_path / "over").exists()
    check_words(ended, 0)


def _signal_when_over(told: str) -> None:
    """At the first step of `Interrupts` after the command has ended: between its handlers and none."""
    from qlora_phi3 import interrupts

    ended = interrupts.signal.signal

    def restore(number: int, handler: Any) -> Any:
        Path(told).touch()
        _signal("SIGTERM")
        return ended(number, handler)

    interrupts.signal.signal = restore  # type: ignore[assignment]


def test_a_closing_terminal_tells_twice_and_costs_nothing(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    """The system sends SIGHUP to the group, and the shell to its jobs."""
    accident = {"moment": Moment(STEP, 2), "act": _signal, "given": ("SIGHUP", "SIGHUP")}
    check_words(start("--out", "out", **accident).wait(), 3, "the terminal was closed")
    check_whole(tmp_path / "out", 2)


@pytest.mark.parametrize(
    ("moment", "signals", "code"),
    [("remove", ("SIGINT", "SIGINT"), 2), ("sign", ("SIGTERM",), 143)],
)
def test_no_signal_disturbs_claiming_and_clearing(
    start: Callable[..., Running],
    tmp_path: Path,
    checkpoints: Callable[[], Path],
    moment: str,
    signals: tuple[str, ...],
    code: int,
) -> None:
    wrong = f"adapter.init={checkpoints() / 'model.safetensors'}"  # is refused when the base is there
    when = Moment(f"qlora_phi3.run_folder:RunFolder.{moment}")
    ended = start("--out", "deep/out", wrong, moment=when, act=_signal, given=signals).wait()
    check_words(ended, code)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_a_killed_run_left_is_told_from_a_living_one_s(
    start: Callable[..., Running], tmp_path: Path, moment: str
) -> None:
    """Before it trained there is nothing of worth, and the next run has the folder."""
    when = {"before": Moment("qlora_phi3.model:load"), "after": Moment(STEP, 2)}[moment]
    assert start("--out", "out", moment=when, act=_signal, given=("SIGKILL",)).wait().returncode == -9
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {".claim.json", "recipe.yaml"} <= left
    ended = start("--out", "out").wait()
    if moment == "before":
        check_words(ended, 0)
        check_whole(tmp_path / "out", 3)
    else:
        check_words(ended, 2, "out: holds another run")
        assert {path.name for path in (tmp_path / "out").iterdir()} == left


def test_a_second_ctrl_c_ends_it_at_once(start: Callable[..., Running], tmp_path: Path) -> None:
    ended = start("--out", "out", moment=Moment(STEP, 2), act=_signal, given=("SIGINT", "SIGINT")).wait()
    check_words(ended, 130, "stopped at once by Ctrl-C", "no adapter was saved")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "recipe.yaml",
        "plan.json",
        "metrics.jsonl",
    }


# --- memory


def _no_memory(*errors: str) -> None:
    known = {
        "MemoryError": MemoryError(),
        "ImportError": ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        "OSError": OSError(12, "Cannot allocate memory"),
        "RuntimeError": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    }
    raise known[errors[0]]


@pytest.mark.parametrize("error", ["MemoryError", "ImportError", "OSError", "RuntimeError"])
@pytest.mark.parametrize("command", ["doctor", "recipe"])
def test_memory_that_runs_out_anywhere_is_told_as_that(
    start: Callable[..., Running], tmp_path: Path, command: str, error: str
) -> None:
    moment = {"doctor": "qlora_phi3.checkup:check_machine", "recipe": "qlora_phi3.data:check"}[command]
    accident = {"moment": Moment(moment), "act": _no_memory, "given": (error,)}
    if command == "recipe" and error == "ImportError":
        accident["moment"] = Moment("qlora_phi3.process:quiet")
    if command == "doctor":
        ended = run("doctor", cwd=tmp_path, **accident)
    else:
        ended = start("--out", "out", **accident).wait()
    assert ended.returncode == 4, ended
    check_words(Ended(4, "", ended.stderr.replace(error, "")), 4, ": out of memory", "Close other programs")
    assert not (tmp_path / "out").exists()


# --- several at once


@pytest.mark.parametrize("out", [(), ("--out", "same")], ids=["default names", "one --out"])
def test_runs_that_start_together_do_not_mix(
    start: Callable[..., Running], tmp_path: Path, out: tuple[str, ...]
) -> None:
    both = [start(f"adapter.rank={rank}", *out) for rank in (4, 8)]
    ended = [one.wait() for one in both]
    folders = [tmp_path / "same"] if out else sorted((tmp_path / "runs" / "tiny").iterdir())
    assert sorted(one.returncode for one in ended) == ([0, 2] if out else [0, 0])
    ranks = set()
    for folder in folders:
        rank = check_whole(folder, 3)["recipe"]["adapter"]["rank"]
        assert f"rank: {rank}" in (folder / "recipe.yaml").read_text()
        ranks.add(rank)
    assert len(ranks) == len(folders)


def test_a_refused_run_touches_nothing_of_another(start: Callable[..., Running], tmp_path: Path) -> None:
    good, bad = start("--out", "o"), start("--out", "o", "adapter.init=/none")
    codes = {"good": good.wait().returncode, "bad": bad.wait().returncode}
    assert codes["bad"] == 2
    if codes["good"] == 0:  # else the bad one had the folder when it came
        check_whole(tmp_path / "o", 3)
        assert {"recipe.yaml", "plan.json"} <= {path.name for path in (tmp_path / "o").iterdir()}
    else:
        assert not (tmp_path / "o").exists()
