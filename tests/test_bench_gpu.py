"""`python -m bench gpu`: everything within its minutes, the rest of a step's time for those behind it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.__main__ import CASES, main


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--minutes=9"]) == 2
    assert "No CUDA device" in capsys.readouterr().err


def test_the_plan_names_commands_of_this_suite() -> None:
    assert [step.words[0] for step in gpu.PLAN][:2] == ["compare", "context"]
    for step in gpu.PLAN:
        if step.words[0] in CASES:  # as the commands themselves understand their words
            parser = gpu.argparse.ArgumentParser()
            CASES[step.words[0]].options(parser)
            chosen = parser.parse_args(step.line(60, Path("base"))[1:])
            told = vars(chosen).get(step.base.removeprefix("--").replace("-", "_"), "")
            assert str(told) == ("base" if step.base else "")


def test_time_is_shared_and_what_is_left_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [1000.0], []

    def call(words: list[str], seconds: float) -> int:
        given.append((*words, round(seconds)))
        now[0] += {"a": 10.0, "b": 200.0, "c": 300.0, "d": 1.0}[words[0]]
        return int(words[0] == "b")

    monkeypatch.setattr(gpu, "call", call)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    plan = [gpu.Step((name,), share) for name, share in (("a", 2), ("b", 1), ("c", 1), ("d", 1))]
    assert gpu.go_through(plan, 500, Path("made")) == 1
    base = "--random-base=made"
    assert given == [  # nothing was left for d
        ("a", base, "--minutes=3.33", 210),
        ("b", base, "--minutes=2.72", 173),
        ("c", base, "--minutes=2.42", 155),
    ]


def test_a_command_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, popen = tmp_path / "said", subprocess.Popen
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(said)!r}, 'w').write(f'{{child.pid}} {{sys.argv[1:]}}')\ntime.sleep(60)\n"
    )

    def stand_in(line: list[str], **settings: Any) -> Any:
        return popen([sys.executable, "-c", code, *line[3:]], **settings)

    monkeypatch.setattr(gpu.subprocess, "Popen", stand_in)
    started = time.monotonic()
    assert gpu.call(["context", "--vram=8"], 3.0) != 0
    assert time.monotonic() - started < 20
    child, words = said.read_text().split(" ", 1)
    assert words == "['context', '--vram=8']"
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the command had started still runs")
