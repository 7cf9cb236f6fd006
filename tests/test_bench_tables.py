"""Tables of compare, context, data, startup and the quickstart: what of the rows stands in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_rows import ABOUT, GIB, VERSIONS, compare_row, context_row, error_row

from bench import compare_table, results, tables

NONE = "Not measured yet.\n"


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(results, "FOLDER", tmp_path)

    def write(case: str, *rows: dict[str, Any], machine: str = "a-machine") -> None:
        path = tmp_path / machine / f"{case}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def only() -> compare_table.Block:
    [block] = compare_table.blocks()
    return block


def test_a_block_as_a_table(rows: Any) -> None:
    by_turns = [
        compare_row(name, repeat, seconds)
        for repeat in range(3)
        for name, seconds in (("qlora", 2.0), ("trl-qlora", 3.0 + repeat))
    ]
    rows("compare", *by_turns)
    assert compare_table.compare().splitlines() == [
        "**builtin, a processor, rows of at most 256 tokens, 8 rows a pass, 8 a step, activations kept**",
        "",
        "| method | step, s: median (p10-p90) | tokens/s | trained on, tokens/s | against trl-qlora "
        "| peak above the loaded model | peak, whole | load, s | linears | MFU | last loss (spread) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        "| `qlora` | 2.00 (2.00-2.00) | 100 | 50 | 2.00x | 2.00 GiB | 3.00 GiB | 3.00 "
        "| 256.00 MiB | 25.0% | 0.4010 (0.0020) |",
        "| `trl-qlora` | 4.00 (3.00-5.00) | 50 | 25 | 1.00x | 2.00 GiB | 3.00 GiB | 3.00 "
        "| 256.00 MiB | 25.0% | 0.4010 (0.0020) |",
        "",
        "3 repeats of 6 steps, the first 2 not timed, on a-machine; commit 123456789abc; "
        "torch 2.13.0, transformers 5.23.0, peft 0.21.2, bitsandbytes 0.50.2.",
    ]
    assert "| `qlora` | 100 | 2.00x | 3.00 GiB | 256.00 MiB | 0.4010 (0.0020) |" in compare_table.brief()


def test_warm_up_steps_are_not_timed(rows: Any) -> None:
    rows("compare", compare_row("qlora", seconds=0.25, warmup_steps=2))
    [summary] = only().summaries
    assert summary.step_seconds == (0.25, 0.25, 0.25) and summary.tokens_per_second == 800
    rows("compare", compare_row("qlora", seconds=0.25, warmup_steps=0))
    [summary] = only().summaries
    assert summary.step_seconds[2] == 9.0 and summary.tokens_per_second < 70


def test_an_error_is_a_line_that_says_so(rows: Any) -> None:
    rows("compare", compare_row("qlora"), error_row("unsloth", "not installed: No module named 'unsloth'"))
    assert "`unsloth` was not measured: not installed: No module named 'unsloth'" in compare_table.compare()
    assert [one.method for one in only().summaries] == ["qlora"]
    rows("compare", error_row("unsloth", "not installed"))
    assert "`unsloth` was not measured: not installed\n" in compare_table.compare()
    assert compare_table.compare().startswith("**builtin,") and "| method" not in compare_table.compare()


def test_some_repeats_that_failed_are_counted(rows: Any) -> None:
    rows("compare", compare_row("qlora"), error_row("qlora", "killed", repeat=1), compare_row("qlora", 2))
    assert "`qlora` was not measured 1 of 3 times: killed" in compare_table.compare()
    assert [one.repeats for one in only().summaries] == [2]


def test_a_table_is_one_run_with_the_most_methods_of_such_the_newest(rows: Any) -> None:
    def run(name: str, seconds: float, *methods: str) -> list[dict[str, Any]]:
        return [compare_row(method, seconds=seconds, run=name) for method in methods]

    rows(
        "compare",
        *run("1", 9.0, "qlora", "trl-qlora"),
        *run("2", 4.0, "trl-qlora", "qlora"),
        *run("3", 1.0, "qlora"),
        error_row("trl-qlora", "broken", run="3"),
    )
    assert [(one.method, one.tokens_per_second) for one in only().summaries] == [
        ("trl-qlora", 50),
        ("qlora", 50),
    ]
    assert not only().notes


def test_another_token_stream_is_refused(rows: Any) -> None:
    other = compare_row("trl-qlora", token_stream="of other rows")
    rows("compare", compare_row("qlora"), other, compare_row("lora-bf16"))
    found = compare_table.compare()
    assert "| method |" not in found and only().summaries == ()
    streams = "qlora abc, trl-qlora of other row, lora-bf16 abc"
    assert f"Refused, not comparable: different token streams: {streams}." in found


def test_another_loss_is_refused(rows: Any) -> None:
    halved = compare_row("trl-qlora", losses=[0.6, 0.5, 0.4, 0.3, 0.25, 0.2])
    rows("compare", compare_row("qlora"), halved)
    found = compare_table.compare()
    assert (
        "| method |" not in found and "Refused, not comparable: qlora and trl-qlora: median losses" in found
    )


def test_settings_have_blocks_of_their_own(rows: Any) -> None:
    changes = (
        {},
        {"max_length": 512},
        {"activations": "recompute"},
        {"model": "phi3-mini", "weights": "random"},
    )
    rows("compare", *(compare_row("qlora", run=str(at), **change) for at, change in enumerate(changes)))
    rows("compare", compare_row("qlora"), machine="b-machine")
    found = compare_table.compare()
    assert found.count("| method |") == 5 and "phi3-mini (random weights)" in found
    assert compare_table.brief().count("| method |") == 3  # a machine and model each


def test_on_cuda_memory_is_the_allocator_s(rows: Any) -> None:
    allocated = {"start": 0, "load": 2 * GIB, "attach": 2 * GIB, "train": 4 * GIB}
    rows("compare", compare_row("qlora", device="cuda", allocated=allocated, mfu=None))
    [summary] = only().summaries
    assert (summary.peak_bytes, summary.above_model_bytes) == (4 * GIB, 2 * GIB)
    assert "| - | 0.4000 (0.0000) |" in compare_table.compare()


def test_context_by_card(rows: Any) -> None:
    rows(
        "context",
        context_row("qlora", 8, 1),
        context_row("qlora", 8, 12800),
        context_row("qlora", 24, 131072, too_long=None),
        context_row("lora-bf16", 8, None),
        context_row("qlora", 8, 13056, how="measured", stopped=True),
        context_row("qlora", 24, None, how="measured", error="RuntimeError: broken"),
    )
    assert tables.context().splitlines()[:7] == [
        "| method | how | 8 GB card | 24 GB card |",
        "|---|---|---|---|",
        "| `qlora` | predicted | 12,800 | 131,072 (the model's limit) |",
        "| `lora-bf16` | predicted | none fits |  |",
        "| `qlora` | measured | at least 13,056 | error |",
        "",
        "`qlora` at 24 GB, measured: RuntimeError: broken",
    ]
    rows("context", context_row("qlora", 8, 12800), machine="b-machine")
    assert tables.context().count("12,800") == 1  # a prediction is the same everywhere


def test_data_and_startup(rows: Any) -> None:
    about = {**ABOUT, "versions": VERSIONS | {"tokenizers": "0.23.3"}}
    step = {**about, "step": "doctor", "rows": 1000, "seconds": 2.04, "rows_per_second": 490}
    ratio = {**about, "step": "ratio", "rows": 1000, "sample_rows": 200, "speed_against_raw": 0.806}
    rows(
        "data",
        step | {"rows": 10, "peak_bytes": 1},
        step | {"peak_bytes": GIB},
        ratio | {"ours_seconds": [1.0, 2.0, 3.0]},
    )
    assert tables.data().splitlines()[2:4] == [
        "| `doctor` | 1,000 | 490 rows/s | 2.0 s | 1.00 GiB |",
        "| `ratio` | 200 | 0.81x of the raw tokenizer's speed, median of 3 |  |  |",
    ]
    load = {
        **ABOUT,
        "model": "builtin",
        "cold": True,
        "load": "later",
        "load_seconds": 1.462,
        "loads": [{}, {}],
    }
    load |= {"speed_against_first": 13.1, "peak_anonymous_bytes": GIB, "entry_bytes": 2 * GIB}
    rows("startup", load)
    assert tables.startup().splitlines()[2] == (
        "| builtin | later, files not in memory | 1.46 s | 2 | 13.1x | 1.00 GiB | 2.00 GiB |"
    )


def test_kernels(rows: Any) -> None:
    row = {
        **ABOUT,
        "operation": "rope.rotate_",
        "shape": [512, 32, 96],
        "backend": "torch",
        "device": "cpu",
        "milliseconds": 2.046,
        "p10_milliseconds": 1.0,
        "p90_milliseconds": 3.0,
        "gigabytes_per_second": 9.87,
        "repeats": 20,
        "model": "microsoft/Phi-3-mini-4k-instruct",
    }
    rows("kernels", row | {"milliseconds": 99.0}, row, row | {"backend": "triton", "milliseconds": 0.5})
    lines = tables.kernels().splitlines()
    assert lines[2:4] == [
        "| `rope.rotate_` | 512 x 32 x 96 | torch, cpu | 2.05 (1.00-3.00) | 9.9 |",
        "| `rope.rotate_` | 512 x 32 x 96 | triton, cpu | 0.50 (1.00-3.00) | 9.9 |",
    ]
    assert "20 calls each" in lines[-1]


QUICKSTART = {
    **ABOUT,
    "utc": "2026-01-02T00:00:00+00:00",
    "recipe": "quickstart",
    "overrides": [],
    "seconds": 300.0,
    "model_was_there": False,
    "lines": [
        "loading",
        "base: loss 1",
        *(f"train {n}/5  loss" for n in range(1, 6)),
        "what it took",
        "report   RUN/report.html",
    ],
    "calibration": {"measured_bytes": GIB, "predicted_bytes": GIB + GIB // 100, "drift": -0.008},
    "samples": {
        "base": {"prompt": "write:\n43 rugs", "answer": "I'm `sorry`\n" + "x" * 999},
        "tuned": {"prompt": "write:\n43 rugs", "answer": '{"item": "rug"}'},
    },
}


def test_the_newest_quickstart_is_shown(rows: Any) -> None:
    old = QUICKSTART | {"utc": "2026-01-01T00:00:00+00:00", "seconds": 999.0}
    tried_out = QUICKSTART | {"utc": "2026-01-03T00:00:00+00:00", "overrides": ["train.max_steps=1"]}
    rows("quickstart", QUICKSTART, old, tried_out)
    assert tables.quickstart().splitlines() == [
        "What it printed on a-machine, 5.0 min from start to end, fetching the model included:",
        "",
        "```",
        "loading",
        "base: loss 1",
        "train 1/5  loss",
        "...",
        "train 3/5  loss",
        "...",
        "train 5/5  loss",
        "what it took",
        "```",
    ]
    answers = tables.quickstart_answers().splitlines()
    assert answers[2] == "| prompt | `write: 43 rugs` |" and answers[4] == '| tuned | `{"item": "rug"}` |'
    assert answers[3].startswith("| base | `I'm 'sorry' xxx") and answers[3].endswith("x ...` |")
    said = "On the quickstart, 1.00 GiB of tensors were 0.8% fewer than predicted"
    assert tables.calibration() == f"{said} (a-machine, commit 123456789abc).\n"


@pytest.mark.parametrize(
    "make",
    [
        compare_table.compare,
        compare_table.brief,
        tables.context,
        tables.data,
        tables.startup,
        tables.quickstart,
        tables.quickstart_answers,
        tables.calibration,
    ],
)
def test_without_rows_nothing_is_said(make: Any, rows: Any) -> None:
    assert make() == NONE
