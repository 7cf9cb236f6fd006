"""What a run leaves behind: the folder, report.json, report.html, the model card and the closing tables."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_chats
from rich.console import Console

from qlora_phi3 import pipeline, report
from qlora_phi3.errors import InputError, OutputError
from qlora_phi3.progress import Display
from qlora_phi3.recipe import METRICS
from qlora_phi3.recipe_file import load_recipe
from qlora_phi3.report import RunReport, format_metric, rebuild, show, write
from qlora_phi3.units import format_bytes

LINE_KEYS = {
    "step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second",
    "step_seconds", "peak_bytes", "rss_bytes", "allocated_bytes",
}  # fmt: skip
LONG_NAME = "a-recipe-with-quite-a-long-name-for-a-rather-special-purpose"
LONG_ANSWER = "x" * 3000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy core make a tiny model twenty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(
    one_thread: None, checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunReport, Path]:
    """One tiny run: what it came to, and its folder. Do not write into it."""
    place = tmp_path_factory.mktemp("report")
    chats = write_chats(place / "chats.jsonl")
    path = place / "tiny.yaml"
    path.write_text(
        f"version: 1\nname: tiny\ndescription: A tiny run\nmodel: {{base: {checkpoints('gqa')}}}\n"
        f"adapter: {{rank: 4, alpha: 8}}\n"
        f"data:\n  train: {{path: {chats}}}\n  eval: {{path: {chats}, limit: 4}}\n  max_length: 128\n"
        "train: {max_steps: 6, effective_batch: 4, micro_batch: 2, learning_rate: 1.0e-2, eval_every: 3}\n"
        f"evaluate: {{metrics: [{', '.join(METRICS)}], samples: 4, max_new_tokens: 8}}\n"
    )
    silent = Display(Console(file=io.StringIO()))
    return pipeline.run(load_recipe(path), place / "run", silent)


@pytest.fixture
def folder(run: tuple[RunReport, Path], tmp_path: Path) -> Path:
    """A copy of the run's folder, to be changed."""
    return Path(shutil.copytree(run[1], tmp_path / "run"))


def read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def change(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    """Edit a JSON file of a run folder."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """Tags, attributes and text of a page; a tag that is not closed properly is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def curves(self) -> list[list[tuple[float, float]]]:
        """Points of every curve."""
        lines = [(line["points"] or "").split() for line in self.all("polyline")]
        return [[(float(x), float(y)) for x, y in (point.split(",") for point in line)] for line in lines]


def page(folder: Path) -> Page:
    return Page(rebuild(folder).read_text(encoding="utf-8"))


# The folder


def test_the_folder_holds_what_was_promised_and_nothing_else(run: tuple[RunReport, Path]) -> None:
    assert sorted(path.name for path in run[1].iterdir()) == [
        "adapter", "eval.json", "metrics.jsonl", "plan.json", "recipe.yaml", "report.html", "report.json",
    ]  # fmt: skip


def test_the_recipe_in_it_repeats_the_run(run: tuple[RunReport, Path]) -> None:
    done, folder = run
    assert load_recipe(folder / "recipe.yaml").model_dump(mode="json") == done.to_json()["recipe"]


def test_the_plan_is_the_reports(run: tuple[RunReport, Path]) -> None:
    done, folder = run
    assert read_json(folder / "plan.json") == done.memory["predicted"]


def test_a_line_for_every_step_and_every_held_out_loss(run: tuple[RunReport, Path]) -> None:
    lines = metrics_lines(run[1])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == LINE_KEYS for line in steps)
    assert [(set(line), line["step"]) for line in lines if line not in steps] == [
        ({"step", "eval_loss"}, 3), ({"step", "eval_loss"}, 6),
    ]  # fmt: skip


def test_eval_json_has_both_models_and_what_they_answered(run: tuple[RunReport, Path]) -> None:
    done, folder = run
    found = read_json(folder / "eval.json")
    assert {name: part["metrics"] for name, part in found.items()} == done.metrics
    assert [len(part["samples"]) for part in found.values()] == [4, 4]


# report.json


def test_report_json_has_every_field(run: tuple[RunReport, Path]) -> None:
    done, folder = run
    found = read_json(folder / "report.json")
    assert list(found) == [part.name for part in dataclasses.fields(RunReport)]
    assert found == done.to_json()
    assert list(found["metrics"]) == ["base", "tuned"]
    assert all(tuple(metrics) == METRICS for metrics in found["metrics"].values())


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (text for item in value.items() for part in item for text in strings(part))
    elif isinstance(value, list):
        yield from (text for item in value for text in strings(item))
    elif isinstance(value, str):
        yield value


def test_report_json_tells_no_paths_of_the_machine(run: tuple[RunReport, Path]) -> None:
    found = read_json(run[1] / "report.json")
    del found["recipe"], found["base"]["base"]  # what the user wrote
    assert [text for text in strings(found) if os.sep in text or str(Path.home()) in text] == []


def test_a_number_that_is_none_is_null(run: tuple[RunReport, Path], folder: Path) -> None:
    metrics = {"base": {"loss": math.nan}, "tuned": {"loss": math.inf}}
    write(dataclasses.replace(run[0], metrics=metrics), folder)
    assert read_json(folder / "report.json")["metrics"] == {"base": {"loss": None}, "tuned": {"loss": None}}
    assert "not a number" in page(folder).text
    assert "| not a number | not a number |" in (folder / "adapter" / "README.md").read_text()


# report.html


def test_the_page_is_self_contained(folder: Path) -> None:
    found = page(folder)
    assert "http" not in (folder / "report.html").read_text()
    assert {name for name, _ in found.tags} & {"script", "link", "img", "iframe", "object"} == set()
    names = {name for _, attributes in found.tags for name in attributes}
    assert [name for name in names if name in ("src", "href") or name.startswith("on")] == []


def test_the_page_follows_light_and_dark(folder: Path) -> None:
    rebuild(folder)
    style = (folder / "report.html").read_text().partition("</style>")[0]
    assert "color-scheme: light dark" in style and "prefers-color-scheme: dark" in style
    colors = re.findall(r"--(\w+): (#\w+)", style)
    light, dark = dict(colors[: len(colors) // 2]), dict(colors[len(colors) // 2 :])
    assert light.keys() == dark.keys()
    assert all(light[name] != dark[name] for name in light)


def test_the_page_shows_before_and_after(run: tuple[RunReport, Path], folder: Path) -> None:
    text = page(folder).text
    for metrics in run[0].metrics.values():
        assert [name for name in metrics if name not in text] == []
        assert [v for n, v in metrics.items() if format_metric(n, v) not in text] == []
    assert "Before and after, on held-out rows" in text
    assert "lower is better" in text


def test_the_page_says_what_it_took(run: tuple[RunReport, Path], folder: Path) -> None:
    text = " ".join(page(folder).text.split())
    data, training = run[0].data["train"], run[0].training
    assert f"6 steps of 4 rows, out of {data['rows']} training conversations" in text
    assert f"{training['num_tokens']} tokens, {training['num_supervised_tokens']} of them trained on" in text
    assert [name for name in run[0].memory["measured"]["phases"] if name not in text] == []
    assert "peak memory of the process" in text


def test_the_page_draws_the_losses(folder: Path) -> None:
    training, held_out = page(folder).curves()
    assert (len(training), len(held_out)) == (6, 2)
    lines = metrics_lines(folder)
    for curve, key in ((training, "loss"), (held_out, "eval_loss")):
        values = [line[key] for line in lines if key in line]
        # higher losses are drawn higher: y grows downwards
        assert sorted(range(len(values)), key=lambda i: values[i]) == sorted(
            range(len(curve)), key=lambda i: -curve[i][1]
        )
        assert all(50 <= x <= 790 and 10 <= y <= 210 for x, y in curve)


def test_losses_that_are_no_numbers_are_left_out_of_the_curve(folder: Path) -> None:
    lines = metrics_lines(folder)
    lines[1]["loss"], lines[2]["loss"] = math.nan, math.inf
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [len(curve) for curve in page(folder).curves()] == [4, 2]


def test_losses_that_lie_far_apart_have_a_logarithmic_axis(folder: Path) -> None:
    """So that a held-out loss of 0.02 is not the zero line beside a first loss of 5."""
    lines = [{"step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 0.5), (3, 0.05))]
    lines += [{"step": 3, "eval_loss": 0.02}, {"step": 2, "eval_loss": 0.04}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = page(folder)
    (first, middle, last), held_out = (points for points in found.curves())
    assert middle[1] - first[1] == pytest.approx(last[1] - middle[1], abs=0.2)
    assert held_out[0][1] == 210 and held_out[1][1] < 190
    assert all(f"\n{tick}\n" in found.text for tick in ("0.1", "1"))
    assert "held-out (dashed) on 4 rows: 0.02 at step 3, 0.04 at step 2" in found.text


@pytest.mark.parametrize("losses", [[0.0, 0.0], [5.0, 0.0]])
def test_losses_of_zero_are_drawn(folder: Path, losses: list[float]) -> None:
    text = [json.dumps({"step": 1 + i, "loss": loss}) for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(text))
    (curve,) = page(folder).curves()
    assert curve[-1] == (790, 210)


def test_a_single_step_has_no_curve(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5}))
    change(folder, "report.json", lambda r: r["training"].update(num_steps=1, last_loss=2.5))
    found = page(folder)
    assert found.curves() == []
    assert "2.5 at step 1" in found.text and "1 step of 4 rows" in found.text


def test_without_evaluation_there_is_a_page_too(folder: Path) -> None:
    (folder / "eval.json").unlink()
    change(folder, "report.json", lambda r: r.update(metrics={}, notes=[]))
    text = page(folder).text
    assert "Samples" not in text and "Before and after" not in text and "Notes" not in text


@pytest.mark.parametrize(("left", "out"), [("tuned", "base"), ("base", "tuned")])
def test_of_one_model_there_is_one_column(
    run: tuple[RunReport, Path], folder: Path, left: str, out: str
) -> None:
    """The base alone is what a run has that was stopped before the tuned model answered."""
    change(folder, "eval.json", lambda found: found.pop(out))
    change(folder, "report.json", lambda r: r["metrics"].pop(out))
    found = page(folder)
    labels = [cell["data-label"] for cell in found.all("td") if "data-label" in cell]
    assert set(labels) == {"asked", "expected", left}
    assert f"{out}: 0 of 4" not in found.text and f"{left}: 0 of 4" in found.text
    text = shown(dataclasses.replace(run[0], metrics={left: run[0].metrics[left]}), folder)
    assert f": {left} model on held-out rows\n" in text and f"\n  {left}" in text


def test_the_page_says_how_it_was_trained_and_on_what(folder: Path) -> None:
    text = page(folder).text
    for part in ("0.01, ", "rank 4, alpha 8", "chats.jsonl", "learning_rate: 0.01", "max_steps: 6"):
        assert part in text
    assert str(Path.home()) not in text and str(folder.parent.parent) not in text


def test_wrong_answers_come_first_and_are_counted(folder: Path) -> None:
    def mark(content: Any) -> None:
        for number, sample in enumerate(content["tuned"]["samples"]):
            sample.update(prompt=f"question {number}", exact_match=number != 2, stopped=number != 2)

    change(folder, "eval.json", mark)
    found = page(folder)
    assert "tuned: 3 of 4 are exactly as expected, 1 cut at evaluate.max_new_tokens 8" in found.text
    asked = [at for at in map(found.text.find, ("question 2", "question 0", "question 1", "question 3"))]
    assert asked == sorted(asked) and found.text.count("differs, cut") == 1
    assert [row["class"] for row in found.all("tr") if "class" in row] == ["other", *["equal"] * 3]


def test_without_metrics_lines_there_is_a_page_too(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    assert page(folder).curves() == []


def test_nothing_in_a_run_can_become_html(folder: Path) -> None:
    evil = "<script>alert('x')</script><img src=x onerror=y>\"'&"
    before = len(page(folder).tags)

    def put(value: Any) -> Any:
        """The same, with every text replaced."""
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        if isinstance(value, list):
            return [put(item) for item in value]
        return evil if isinstance(value, str) else value

    for name in ("report.json", "eval.json"):
        change(folder, name, lambda content: content.update({k: put(v) for k, v in content.items()}))
    change(folder, "report.json", lambda r: r["memory"]["measured"].update(kind="resident"))
    found = page(folder)
    assert len(found.tags) == before
    assert found.all("script") == found.all("img") == []
    assert found.text.count(evil) > 20


def test_nothing_in_a_run_can_hide_or_turn_what_is_read(folder: Path) -> None:
    answer = "a\x0f\x9b31m\u202eb\u2028c\n\td"
    change(folder, "eval.json", lambda e: [s.update(answer=answer) for s in e["base"]["samples"]])
    found = page(folder)
    assert "a\\x0f\\x9b31m\\u202eb\\u2028c\n\td" in found.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029]", found.text)


def test_long_answers_wrap_and_keep_their_lines(folder: Path) -> None:
    answer = f"{LONG_ANSWER}\n    indented"
    change(folder, "eval.json", lambda e: [s.update(answer=answer) for s in e["base"]["samples"]])
    found = page(folder)
    assert answer in found.text  # whole
    style = (folder / "report.html").read_text().partition("</style>")[0]
    assert re.search(r"\.samples td {[^}]*white-space: pre-wrap; overflow-wrap: anywhere", style)


# Rebuilding


def test_rebuilding_gives_the_same_page(folder: Path) -> None:
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert rebuild(folder) == folder / "report.html"
    assert (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", "{"),
        ("report.json", "[]"),
        ("report.json", "{}"),
        ("report.json", '{"format_version": 1, "name": "x"}'),
        ("report.json", b"\xff"),
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", "[1]"),
        pytest.param("metrics.jsonl", "", id="no lines"),
        ("metrics.jsonl", "{}"),
        ("metrics.jsonl", '{"step": 1}'),
        ("metrics.jsonl", '{"loss": "high"}'),
        ("metrics.jsonl", '{"step": 1, "loss": true}'),
        ("metrics.jsonl", '{"step": "1", "loss": 1.0}'),
        ("metrics.jsonl", '{"step": -1, "loss": 1.0}'),
        pytest.param("metrics.jsonl", f'{{"step": 1, "loss": {"7" * 400}}}', id="a loss of 400 digits"),
        pytest.param("metrics.jsonl", f'{{"step": {"7" * 400}, "loss": 1}}', id="a step of 400 digits"),
        pytest.param("metrics.jsonl", "[" * 100_000, id="deep"),
        pytest.param("eval.json", "[" * 100_000, id="deep answers"),
        ("eval.json", "["),
        ("eval.json", "[]"),
        ("eval.json", "{}"),
        ("eval.json", '{"tuned": {"samples": [{}]}}'),
        ("eval.json", '{"base": {"samples": []}, "tuned": {"samples": [{}]}}'),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = (folder / "report.html").read_bytes()
    with pytest.raises(InputError, match="damaged") as caught:
        rebuild(folder)
    assert (folder / "report.html").read_bytes() == before
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    if name == "metrics.jsonl" and content:
        assert "line 1" in str(caught.value)
    assert caught.value.problems[0].place == str(folder / name) and caught.value.problems[0].remedy


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a loop": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a lost link": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl", "eval.json"])
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_not_passed_over(folder: Path, name: str, what: str) -> None:
    (folder / name).unlink()
    NO_FILES[what](folder / name)
    before = (folder / "report.html").read_bytes()
    with pytest.raises(InputError, match="cannot be read: ") as caught:
        rebuild(folder)
    [problem] = caught.value.problems
    assert problem.place == str(folder / name) and problem.remedy.startswith("Copy it again")
    assert (folder / "report.html").read_bytes() == before


def test_a_damaged_key_is_named(folder: Path) -> None:
    report, answers = read_json(folder / "report.json"), read_json(folder / "eval.json")
    del answers["tuned"]["samples"][1]["prompt"]
    lost, wrong = json.loads(json.dumps(report)), json.loads(json.dumps(report))
    del lost["training"]["num_tokens"]
    wrong["training"]["num_tokens"] = "many"
    cases = [
        ("report.json", lost, "training.num_tokens is missing"),
        ("report.json", wrong, "training.num_tokens is not as a run writes it"),
        ("report.json", report | {"recipe": 5}, "recipe is 5, not an object"),
        ("report.json", None, "it is not a JSON object"),
        ("report.json", report, ""),
        ("eval.json", answers, "tuned: samples[1]: prompt is missing"),
    ]
    for name, content, reason in cases:
        (folder / name).write_text(json.dumps(content))
        if reason:
            with pytest.raises(InputError, match=re.escape(f"{name}: is damaged: {reason}. Copy it again")):
                rebuild(folder)


def test_what_is_missing_is_said(folder: Path) -> None:
    said: list[str] = []
    for name in ("metrics.jsonl", "eval.json"):
        (folder / name).unlink()
    rebuild(folder, said.append)
    assert [text.partition(" is missing: ")[2] for text in said] == [
        "the page has no curve of losses", "the page has no answers",
    ]  # fmt: skip


def test_a_report_of_another_version_is_refused(folder: Path) -> None:
    change(folder, "report.json", lambda r: r.update(format_version=2))
    with pytest.raises(InputError, match="another version"):
        rebuild(folder)


def test_a_page_that_cannot_be_written(folder: Path) -> None:
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(OutputError, match=r"report\.html: cannot be written: Is a directory\. Move that"):
        rebuild(folder)
    assert sorted(folder.iterdir()) == before, "nothing unfinished is left"


def test_a_page_of_steps_and_text_that_no_run_writes(folder: Path) -> None:
    """Step 0 twice, and half of a character beyond UTF-16's first plane, which UTF-8 cannot hold."""
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 2.5}\n{"step": 0, "loss": 0.5}\n')
    change(folder, "eval.json", lambda e: e["tuned"]["samples"][0].update(answer="a\ud800b"))
    found = page(folder)
    assert len(found.curves()) == 1 and "a\\ud800b" in found.text


def test_a_folder_that_cannot_be_read_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "eval.json").unlink()
    (folder / "report.json").unlink()
    (folder / "report.json").mkdir()
    with pytest.raises(InputError, match=r"report\.json: cannot be read: Is a directory"):
        rebuild(folder)


# The model card


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of the adapter's README."""
    text = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    start, front, body = text.split("---\n", 2)
    assert start == "" and body.endswith("\n") and not body.endswith("\n\n")
    return yaml.safe_load(front), body


def test_the_card_names_base_data_and_metrics(run: tuple[RunReport, Path]) -> None:
    done, folder = run
    front, body = card(folder)
    assert front["base_model"] == done.base["base"]
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-generation")
    assert "qlora" in front["tags"]
    assert f"{done.data['train']['rows']} conversations" in body
    assert f"{done.data['train']['supervised_tokens']} of them trained on" in body
    for name in METRICS:
        values = " | ".join(format_metric(name, found[name]) for found in done.metrics.values())
        assert f"{name}: {report.MEANINGS[name]} | {values} |" in body


@pytest.mark.parametrize("base", ["org/name", '/data/it\'s: #1 "best"', "/données/模型"])
def test_the_card_is_valid_for_any_base(run: tuple[RunReport, Path], folder: Path, base: str) -> None:
    write(dataclasses.replace(run[0], base=run[0].base | {"base": base}), folder)
    assert card(folder)[0]["base_model"] == base


def test_the_card_has_a_heading_a_blank_line_apart(run: tuple[RunReport, Path], folder: Path) -> None:
    for metrics in (run[0].metrics, {}):
        write(dataclasses.replace(run[0], metrics=metrics), folder)
        lines = card(folder)[1].splitlines()
        headings = [i for i, line in enumerate(lines) if line.startswith("#") and i > 0]
        assert len(headings) == (3 if metrics else 2), headings
        assert all(lines[i - 1] == "" and lines[i + 1] == "" for i in headings)


def test_the_card_without_evaluation_claims_nothing(run: tuple[RunReport, Path], folder: Path) -> None:
    write(dataclasses.replace(run[0], metrics={}), folder)
    assert "was not measured on held-out rows" in card(folder)[1]


def test_the_cards_code_loads_the_adapter(
    run: tuple[RunReport, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card(run[1])[1], flags=re.DOTALL)
    monkeypatch.chdir(run[1])
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].peft_config["default"].r == 4
    assert names["tokenizer"].chat_template


def test_the_card_of_a_built_in_base_says_how_to_get_it(run: tuple[RunReport, Path], folder: Path) -> None:
    base = run[0].base | {"base": "builtin:smollm2-135m", "source": "builtin"}
    write(dataclasses.replace(run[0], base=base), folder)
    (code,) = re.findall(r"```python\n(.*?)```", card(folder)[1], flags=re.DOTALL)
    compile(code, "card", "exec")
    assert "builtin.ensure()" in code and "builtin:smollm2" not in code


def test_the_card_pins_the_revision_of_a_hub_base(run: tuple[RunReport, Path], folder: Path) -> None:
    write(dataclasses.replace(run[0], base=run[0].base | {"revision": "abc123"}), folder)
    assert 'revision="abc123"' in card(folder)[1]


# The terminal


def shown(done: RunReport, folder: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(done, folder, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["tiny", LONG_NAME])
def test_nothing_is_cut_on_80_columns(run: tuple[RunReport, Path], name: str) -> None:
    big = {"trainable": 111_149_056, "total": 14_659_507_200, "quantized": 13_631_488_000}
    training = run[0].training | {"num_tokens": 123_456_789, "num_supervised_tokens": 98_765_432}
    done = dataclasses.replace(run[0], name=name, parameters=big, training=training)
    text = shown(done, Path("runs") / name / "2026-01-02T03-04-05Z")
    assert "…" not in text
    whole = [
        f"{name}: base and tuned model on held-out rows\n",
        "loss, perplexity, exact_match and json_match on all 4 held-out rows\n",
        *(format_metric(n, v) for found in done.metrics.values() for n, v in found.items()),
        *report.MEANINGS.values(),
        "123,456,789 (98,765,432)",
        "111,149,056 (0.76% of 14,659,507,200)",
        "peak memory of the process",
        f"adapter  runs/{name}/2026-01-02T03-04-05Z/adapter\n",
        f"report   runs/{name}/2026-01-02T03-04-05Z/report.html\n",
    ]
    assert [part for part in whole if part not in text] == []


LOSSES, MATCHES = {"loss": 1.0, "perplexity": 2.7}, {"exact_match": 0.5, "json_match": 0.5}


@pytest.mark.parametrize(
    ("metrics", "on", "said"),
    [
        (LOSSES, (40, 8), "loss and perplexity on all 40 held-out rows"),
        (LOSSES | MATCHES, (40, 40), "loss, perplexity, exact_match and json_match on all 40 held-out rows"),
        (
            LOSSES | MATCHES,
            (40, 32),
            "loss and perplexity on all 40 held-out rows; "
            "exact_match and json_match on 32 of them, drawn by train.seed",
        ),
        ({"exact_match": 0.5}, (40, 32), "exact_match on 32 of all 40 held-out rows, drawn by train.seed"),
        ({"loss": 1.0} | MATCHES, None, "loss, exact_match and json_match on 4 held-out rows"),
    ],
)
def test_every_view_says_on_how_many_rows_a_figure_was_measured(
    run: tuple[RunReport, Path], folder: Path, metrics: Any, on: tuple[int, int] | None, said: str
) -> None:
    numbers = {} if on is None else {"measured_on": dict(zip(("loss", "answers"), on, strict=True))}
    data = {key: value for key, value in run[0].data.items() if key != "measured_on"} | numbers
    if on is not None:
        data["measured_on"]["while_training"] = 0
    done = dataclasses.replace(run[0], metrics={"tuned": metrics}, data=data)
    write(done, folder)
    assert f"{said}\n" in shown(done, folder) and f"{said}\n" in page(folder).text
    assert f"Measured: {said}.\n" in card(folder)[1]


EVIL = "Hi\n\tthere\x1b[2J\u202e\x07 [red]x[/] \ud800 " + "слово " * 100


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("models", [["base", "tuned"], ["tuned"]])
def test_the_terminal_shows_a_few_answers_side_by_side(
    run: tuple[RunReport, Path], folder: Path, models: list[str], encoding: str
) -> None:
    def put(content: Any) -> None:
        for name in {"base", "tuned"} - set(models):
            del content[name]
        for model in models:
            for number, sample in enumerate(content[model]["samples"]):
                same = model == "tuned" and number == 0
                sample.update(answer=f"{model} {number} {EVIL}", exact_match=same, stopped=number != 1)

    change(folder, "eval.json", put)
    done = dataclasses.replace(run[0], metrics={name: run[0].metrics[name] for name in models})
    out = io.BytesIO()
    screen = io.TextIOWrapper(out, encoding, write_through=True)
    show(done, folder, Console(file=screen, width=80))
    text = out.getvalue().decode(encoding)
    block = text[text.index("answers to held-out rows, 3 of 4; all in report.html") : text.index("what it")]
    counts = {label: block.count(f"\n  {label}") for label in ("asked", "expected", "base", "tuned")}
    assert counts == {"asked": 3, "expected": 3, "base": 3 if "base" in models else 0, "tuned": 3}
    assert block.count("tuned (same)") == 1 and block.count("(cut)") == len(models)
    assert "tuned 0 Hi\\n\\tthere\\x1b[2J\\u202e\\x07 [red]x[/] \\ud800" in block.replace("\n" + " " * 16, "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", block)
    assert all(len(line) <= 80 for line in block.splitlines())
    assert len(block.splitlines()) < 3 * (2 * (2 + len(models)) + 1) + 3, "each text has two lines at most"


def test_why_there_are_no_answers_is_said(run: tuple[RunReport, Path], folder: Path) -> None:
    change(folder, "eval.json", lambda e: [e[name].update(samples=[], no_samples="plain text") for name in e])
    assert "\nno answers to show: plain text\n" in shown(run[0], folder)
    assert "None: plain text." in page(folder).text


@pytest.mark.parametrize(("kind", "counted"), [("allocated", "peak_bytes"), ("resident", "needed_bytes")])
def test_the_prediction_stands_beside_what_it_is_of(
    run: tuple[RunReport, Path], kind: str, counted: str
) -> None:
    measured = run[0].memory["measured"] | {"kind": kind}
    done = dataclasses.replace(run[0], memory=run[0].memory | {"measured": measured})
    line = next(line for line in shown(done, Path("run")).splitlines() if "memory, predicted" in line)
    assert format_bytes(done.memory["predicted"][counted]) in line


def test_the_full_pass_stands_beside_its_prediction(run: tuple[RunReport, Path]) -> None:
    found = run[0].memory["calibration"]
    sizes = [report.format_bytes(found[key]) for key in ("predicted_bytes", "measured_bytes")]
    assert re.search(rf"a full pass, predicted -> measured +{' -> '.join(sizes)}", shown(run[0], Path("run")))
    html = (run[1] / "report.html").read_text()
    assert f"A full pass of {found['pass_tokens']} tokens was predicted to take {sizes[0]}" in html
    assert abs(found["drift"]) < 0.25, "a model this small is mostly what no tensor of a layer is"


def test_where_memory_ran_out_stands_in_the_report(folder: Path) -> None:
    event = {"place": "step 3", "change": "train.micro_batch=1 instead of 2", "error": "CUDA"}
    change(folder, "report.json", lambda content: content["memory"].update(adapted=[event]))
    rebuild(folder)
    assert "Out of memory at step 3: train.micro_batch=1 instead of 2" in (folder / "report.html").read_text()
    for key in ("adapted", "calibration"):  # of a run before there were these
        change(folder, "report.json", lambda content, key=key: content["memory"].pop(key))
    rebuild(folder)


def test_markup_in_names_and_notes_is_text(run: tuple[RunReport, Path]) -> None:
    done = dataclasses.replace(run[0], notes=["[red]x[/] [link=y]"], metrics={})
    text = shown(done, Path("[bold]"))
    assert "note: [red]x[/] [link=y]\n" in text and "[bold]/adapter" in text


# Figures


def test_every_metric_has_its_meaning() -> None:
    assert set(report.MEANINGS) == set(METRICS)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 1.23456, "1.235"),
        ("perplexity", 1e300, "1e+300"),
        ("exact_match", 0.75, "75.0%"),
        ("json_match", 0.0, "0.0%"),
        ("loss", math.nan, "not a number"),
        ("exact_match", None, "not a number"),
    ],
)
def test_metrics_for_people(name: str, value: float | None, text: str) -> None:
    assert format_metric(name, value) == text
