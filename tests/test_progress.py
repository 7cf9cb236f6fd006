"""Plain lines where nobody watches, a bar on a terminal; the last step is shown in both."""

from __future__ import annotations

import re
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console

from qlora_phi3 import progress
from qlora_phi3.progress import Display


def plain() -> tuple[Display, StringIO]:
    out = StringIO()
    return Display(Console(file=out, force_terminal=False, width=80)), out


def terminal() -> tuple[Display, StringIO]:
    out = StringIO()
    return Display(Console(file=out, force_terminal=True, width=120, color_system=None)), out


def run(
    display: Display, steps: list[int], total: int, figures: str = "loss 1.5", title: str = "train"
) -> None:
    with display.steps(title, total) as shown:
        for step in steps:
            shown.update(step, figures)


# --- plain


@pytest.mark.parametrize(
    ("seconds", "steps", "lines"),
    [
        (3600.0, [1, 2, 3, 4, 5], [1, 5]),
        (0.0, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        (3600.0, [2, 4, 5], [2, 5]),
        (3600.0, [5], [5]),
        (3600.0, [1, 2], [1]),
    ],
    ids=["first and last", "all when slow", "the first may be a batch", "only the last", "broken off"],
)
def test_lines(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: list[int], lines: list[int]) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", seconds)
    display, out = plain()
    run(display, steps, total=5)
    found = out.getvalue().splitlines()
    known = [step for step in steps if step == 5 or steps.index(step) >= 2]
    assert [re.sub(r"\d+ s left", "N s left", line) for line in found] == [
        f"train {step}/5  loss 1.5{'  N s left' if step in known else ''}" for step in lines
    ]


def test_the_first_step_is_no_measure_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took 100 s, the others 10 each."""
    times = iter([100.0, 110.0, 120.0, 130.0])
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    display, out = plain()
    run(display, [1, 2, 3, 4], total=10)
    assert [line.partition("1.5")[2] for line in out.getvalue().splitlines()] == [
        "", "", "  70 s left", "  60 s left",
    ]  # fmt: skip


def test_nothing_is_left_after_the_last_step() -> None:
    display, out = plain()
    run(display, [7], total=7)
    assert out.getvalue() == "train 7/7  loss 1.5  0 s left\n"


def test_lines_are_not_wrapped_or_marked_up() -> None:
    display, out = plain()
    run(display, [3], total=3, figures="[bold]loss[/] " + "x" * 200, title="evaluate [base]")
    assert out.getvalue() == f"evaluate [base] 3/3  [bold]loss[/] {'x' * 200}  0 s left\n"


def test_sentences() -> None:
    display, out = plain()
    display.say("loading [4-bit] " + "x" * 200)
    assert out.getvalue() == f"loading [4-bit] {'x' * 200}\n"


def test_sentences_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Display().say("loading")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "loading\n")


# --- terminal


def test_bar() -> None:
    display, out = terminal()
    run(display, [1, 2, 3], total=3, figures="loss 1.25")
    last = out.getvalue().rsplit("\r", 1)[-1]
    assert re.search(r"train .* 3/3 loss 1\.25", last)


def test_bar_shows_brackets_as_they_are() -> None:
    display, out = terminal()
    run(display, [3], total=3, figures="[bold]loss[/] [/nan]", title="evaluate [base]")
    assert "evaluate [base]" in out.getvalue()
    assert "[bold]loss[/] [/nan]" in out.getvalue()


def test_error_ends_the_bar() -> None:
    display, out = terminal()
    with pytest.raises(TypeError), display.steps("train", 9) as shown:
        shown.update("not a number", "loss 2")  # type: ignore[arg-type]
    assert out.getvalue().endswith("\x1b[?25h"), "the cursor is back"
    before = len(out.getvalue())
    display.say("failed")
    assert out.getvalue()[before:] == "failed\n"
    run(display, [1], total=1)
    assert "1/1" in out.getvalue()


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"\\xe9 \\u65e5"), ("latin-1", b"\xe9 \\u65e5")])
def test_what_an_encoding_lacks_is_written_as_escapes(encoding: str, written: bytes) -> None:
    file = BytesIO()
    stream = TextIOWrapper(file, encoding=encoding)
    progress.forgive(stream)
    stream.write("é 日")
    stream.flush()
    assert file.getvalue() == written
    progress.forgive(None)  # as where Python was started without a terminal
