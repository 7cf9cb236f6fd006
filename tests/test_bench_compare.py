"""`python -m bench compare`: real processes on a tiny model, and what is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import compare, flops, probe, results, tokens, verdict, worker
from bench.__main__ import main
from qlora_phi3 import phi3, sizes
from qlora_phi3.recipe import Recipe

SMALL = ["--max-length=512", "--micro-batch=2", "--effective-batch=4", "--steps=3", "--learning-rate=1e-2"]
Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.fixture
def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs the command on a tiny checkpoint: exit code, rows, what was printed."""

    def call(*options: str, geometry: str = "gqa") -> tuple[int, list[dict[str, Any]], str]:
        monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
        code = main(["compare", f"--model={checkpoints(geometry)}", *SMALL, *options])
        rows = [row for path in tmp_path.glob("results/*/compare.jsonl") for row in results.read_file(path)]
        return code, rows, capsys.readouterr().out

    return call


def test_methods_take_turns_on_the_same_tokens(
    run: Run, checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows, printed = run("--methods=qlora,trl-qlora", "--repeats=2")
    assert code == 0, printed
    order = [(row["method"], row["repeat"], row["seed"]) for row in rows]
    assert order == [("qlora", 0, 42), ("trl-qlora", 0, 42), ("qlora", 1, 43), ("trl-qlora", 1, 43)]
    assert {row["token_stream"] for row in rows} == {rows[0]["planned_stream"]}
    assert len({row["group"] for row in rows}) == len({row["run"] for row in rows}) == 1
    for row in rows:
        assert row["error"] is None and len(row["losses"]) == len(row["step_seconds"]) == row["steps"] == 3
        assert row["tokens"] == rows[0]["tokens"] and row["supervised_tokens"] == rows[0]["supervised_tokens"]
        assert set(row["phases"]) == {"start", "load", "attach", "train"} and row["allocated"] is None
        assert row["trained_parameters"] == 2 * 16 * ((64 + 128) + (64 + 64) + (64 + 256) + (128 + 64))
        assert row["model_flops"] > 0 < row["mfu"] and row["load_seconds"] > 0 and row["device_name"]
        assert str(checkpoints("gqa")) not in json.dumps(row)
    ours, trl, again, _ = rows
    assert ours["linear_bytes"] == trl["linear_bytes"] > 0
    assert (ours["adapter_dtype"], trl["adapter_dtype"]) == ("float32", "bfloat16")
    assert (ours["process"], trl["process"]) == ("qlora_phi3.process", "defaults")
    assert ours["losses"][0] == again["losses"][0] and ours["losses"][2] != again["losses"][2]
    assert ours["losses"] == pytest.approx(trl["losses"], rel=0.01)
    table = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| `")]
    assert sorted(table) == ["`qlora`", "`trl-qlora`"]

    # the same rows with what must not be compared
    for change, reason in (
        ({"token_stream": "0" * 64}, "different token streams: qlora .*, trl-qlora 000000000000"),
        ({"losses": [loss / 2 for loss in trl["losses"]]}, "at step 1"),
        ({"losses": trl["losses"][:2]}, "trl-qlora: not a loss for every step"),
    ):
        [found] = verdict.refusals([ours, again, {**trl, **change}])
        assert re.search(reason, found)

    # and a real run on the same tokens at a third of the learning rate
    slow = run("--methods=trl-qlora", "--repeats=1", "--learning-rate=3e-3")[1][-1]
    assert ours["group"] != slow["group"] and ours["token_stream"] == slow["token_stream"]
    assert compare.conclude([ours, slow]) == 1
    printed = capsys.readouterr().out
    assert "not comparable" in printed and "at step 2" in printed
    assert "tokens/s" not in printed


@pytest.mark.slow
def test_full_precision_stands_beside(run: Run) -> None:
    code, rows, printed = run("--methods=lora-bf16,lora-fp32", "--repeats=1", "--activations=auto")
    assert code == 0, printed
    half, full = rows
    assert [row["base"] for row in rows] == ["bfloat16", "float32"]
    assert "lora-bf16 less lora-fp32, on other precisions" in printed
    assert {row["activations"] for row in rows} == {"keep"}
    elements = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
    assert (half["linear_bytes"], full["linear_bytes"]) == (2 * elements, 4 * elements)


def test_quantized_linears_take_at_most_0_36_of_bf16() -> None:
    """Tensors as bitsandbytes makes them, of the built-in model's sizes; larger ones by arithmetic."""
    import bitsandbytes
    import torch

    recipe = Recipe.model_validate({"version": 1, "name": "x", "data": {"train": {"path": "x.jsonl"}}})
    shapes = {
        "qkv_proj": (960, 576),
        "o_proj": (576, 576),
        "gate_up_proj": (3072, 576),
        "down_proj": (576, 1536),
    }
    layer, plain = torch.nn.Module(), torch.nn.Module()
    for name, (rows, columns) in shapes.items():
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        plain.add_module(name, linear)
        settings = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
        packed = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, **settings)
        packed.load_state_dict(linear.state_dict())
        layer.add_module(name, packed.to("cpu"))
    num = sum(rows * columns for rows, columns in shapes.values())
    assert probe.linear_bytes(plain) == 2 * num
    assert probe.linear_bytes(layer) == sum(sizes.nf4_bytes(r * c, True) for r, c in shapes.values())
    assert probe.linear_bytes(layer) <= 0.36 * probe.linear_bytes(plain)
    for name in compare.MINI, "microsoft/phi-4":
        geometry = phi3.VARIANTS[name]
        assert sizes.linear_bytes(recipe, geometry) <= 0.36 * 2 * geometry.num_linear_parameters


TINY = {
    "vocab_size": 261, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "max_positions": 512, "original_max_positions": 512, "tied_embeddings": False,
}  # fmt: skip


@pytest.fixture
def asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is written in this process, which has imported what it takes."""
    monkeypatch.setattr(compare, "_ask", lambda what, job, folder: tokens.prepare(job))


@pytest.mark.usefixtures("asked_here")
def test_missing_and_failing_methods_are_rows(run: Run, tmp_path: Path) -> None:
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\necho 'first' >&2\necho 'cannot go on' >&2\nexit 7\n")
    dead.chmod(0o755)
    options = (f"--peer-python=litgpt={dead}", f"--peer-python=torchtune={tmp_path / 'none'}")
    code, rows, printed = run("--methods=unsloth,litgpt,torchtune", "--repeats=1", *options)
    assert code == 1 and "nothing was measured" in printed
    assert [row["method"] for row in rows] == ["unsloth", "litgpt", "torchtune"]
    assert rows[0]["error"].startswith("not installed: no unsloth in this Python")
    assert rows[1]["error"] == "exit code 7: first cannot go on"
    assert rows[2]["error"].startswith("not installed: No such file")
    assert all("losses" not in row and row["group"] == rows[0]["group"] for row in rows)


def test_a_worker_tells_the_end_of_a_message(tmp_path: Path) -> None:
    lost = worker.outcome("trl-qlora", {"device": "cpu", "base": str(tmp_path / "none")})
    assert set(lost) == {"error"} and lost["error"].split(":")[0].endswith("Error")
    assert worker.said(RuntimeError("a\n\nb\nc\nd")) == "RuntimeError: b c d"
    missing = ModuleNotFoundError("No module named 'x'", name="x")
    assert worker.said(missing) == "not installed: No module named 'x'"


@pytest.mark.usefixtures("asked_here")
def test_nothing_starts_when_the_time_is_over(run: Run) -> None:
    code, rows, printed = run("--methods=qlora,unsloth", "--minutes=0")
    assert (code, rows) == (1, []) and "time is over: qlora, repeat 0" in printed


@pytest.mark.usefixtures("asked_here")
def test_rows_are_written_as_they_come(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The third process never begins: the time ended during the second."""
    begun: list[str] = []

    def fake(method: str, job: Any, folder: Path, python: str | None) -> dict[str, Any]:
        begun.append(method)
        if len(begun) == 2:
            monkeypatch.setattr(time, "monotonic", lambda: 1e12)
        return {"error": "made up"} if method == "qlora" else {"error": None, "losses": []}

    monkeypatch.setattr(compare, "_in_a_process", fake)
    _, rows, printed = run("--methods=qlora,unsloth", "--minutes=100")
    assert begun == ["qlora", "unsloth"] and len(rows) == 2
    assert rows[0]["error"] == "made up" and rows[1]["error"].startswith("its adapter found no token_stream")
    assert "time is over: qlora, repeat 1" in printed


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--methods=qlora,slit", "'slit' is none of qlora"),
        ("--peer-python=trl=/x", "is not NAME=PATH"),
        ("--steps=0", "0 is below 1"),
    ],
)
def test_options_are_checked(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare", option])
    assert said in capsys.readouterr().err


# --- the rule on made-up rows


def made(method: str, base: str, *curves: list[float]) -> list[dict[str, Any]]:
    shared = {"method": method, "base": base, "error": None, "token_stream": "s", "steps": len(curves[0])}
    return [{**shared, "losses": curve} for curve in curves]


ONE = [[1.0, 0.90, 0.80, 0.70], [1.0, 0.88, 0.76, 0.66], [1.0, 0.92, 0.84, 0.75]]


@pytest.mark.parametrize(
    ("base", "curves", "comparable"),
    [
        ("nf4", [[x * 1.01 for x in curve] for curve in ONE], True),
        ("nf4", [[1.0, 0.91, 0.815, 0.71]], True),  # one seed: its spread is none, rounding is left
        ("nf4", [[1.0, 0.85, 0.70, 0.55]], False),  # learns faster
        ("nf4", [[1.0, 0.99, 0.97, 0.96], [1.0, 0.2, 0.2, 0.2], [1.0, 0.99, 2.0, 9.0]], False),
        ("nf4", [[x * 1.06 for x in curve] for curve in ONE], False),  # another normalisation
        ("bfloat16", [[0.8 * x for x in curve] for curve in ONE], True),  # NF4 costs something
        ("bfloat16", [[0.5 * x for x in curve] for curve in ONE], False),
        ("bfloat16", [[0.8, 0.5, 0.2, 0.1]] * 3, False),
        ("bfloat16", [[1.0, 1.0, 1.0, 1.1]] * 3, False),  # learns nothing
    ],
)
def test_the_rule(base: str, curves: list[list[float]], comparable: bool) -> None:
    rows = [*made("one", "nf4", *ONE), *made("other", base, *curves)]
    assert (not verdict.refusals(rows)) == comparable
    failed = {"method": "third", "error": "broke"}
    assert (not verdict.refusals([*rows, failed])) == comparable


def test_a_digest_sees_tokens_labels_and_steps_and_no_more() -> None:
    one, other = ([1, 2, 3], [-100, 2, 3]), ([4, 5], [4, 5])
    base = probe.digest([[one, other]])
    assert probe.digest([[other, one]]) == base
    assert probe.digest([[([1, 2, 3], [1, 2, 3]), other]]) == base  # nothing predicts a first token
    assert len({base, probe.digest([[one], [other]]), probe.digest([[one]])}) == 3
    assert probe.digest([[([1, 2, 3], [-100, -100, 3]), other]]) != base


def test_pads_are_no_part_of_what_was_fed() -> None:
    import torch

    fed = probe.Fed()
    fed.begin()
    ids, labels = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[-100, 2, 3], [-100, 5, -100]])
    fed.padded(ids, labels, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    flat = probe.Fed()
    flat.begin()
    row = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[-100, 2, 3, -100, 5]])
    flat.flat(*row, torch.tensor([0, 3, 5]))
    assert fed.to_json() == flat.to_json()
    assert fed.to_json()["tokens"] == [5] and fed.to_json()["supervised_tokens"] == [3]


def test_made_up_tokens_are_of_exact_length_and_the_same_again() -> None:
    rows = tokens.made_up(33, 4, 7)
    assert [len(ids) for ids, _ in rows] == [33] * 4 and rows == tokens.made_up(33, 4, 7)
    assert tokens.runs([-100, 2, 3, -100, 5]) == [(1, 3), (4, 5)]


def test_flops_by_hand() -> None:
    geometry = phi3.Geometry(**{**TINY, "sliding_window": 2})
    row = ([1, 2, 3], [-100, 2, 3])
    linears = 2 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
    # 3 tokens; 2 of them scored; each query sees itself and at most one before it: 5 pairs
    expected = 3 * (4 * linears + 6 * 1000) + 2 * 4 * 261 * 64 + 5 * 12 * 2 * 64
    assert flops.of_rows([row], geometry, 1000) == expected
    assert [flops.pairs(4, None), flops.pairs(4, 2), flops.pairs(4, 9)] == [10, 7, 10]
