"""No number in README or docs/ that no file in bench/results holds.

A figure is a number with a unit of measurement, or a decimal in a sentence about a metric. Outside of
generated parts and of code it has to be held by a row, rounded as it is shown and under a key of its kind; or
its sentence says that it is no measurement: a prediction, somebody's publication, a limit, a setting.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import pages, results

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

UNITS: dict[str, tuple[str, tuple[float, ...]]] = {
    "ms": ("seconds", (1e3,)),
    "s": ("seconds", (1.0,)),
    "sec": ("seconds", (1.0,)),
    "seconds": ("seconds", (1.0,)),
    "min": ("seconds", (1 / 60,)),
    "minutes": ("seconds", (1 / 60,)),
    "hours": ("seconds", (1 / 3600,)),
    "KiB": ("bytes", (2.0**-10,)),
    "MiB": ("bytes", (2.0**-20,)),
    "GiB": ("bytes", (2.0**-30,)),
    "MB": ("bytes", (1e-6, 2.0**-20)),
    "GB": ("bytes", (1e-9, 2.0**-30)),
    "TB": ("bytes", (1e-12, 2.0**-40)),
    "tok/s": ("per_second", (1.0,)),
    "tokens/s": ("per_second", (1.0,)),
    "tokens per second": ("per_second", (1.0,)),
    "rows/s": ("per_second", (1.0,)),
    "rows a second": ("per_second", (1.0,)),
    "TFLOP/s": ("per_second", (1e-12,)),
    "x": ("ratio", (1.0,)),
    "×": ("ratio", (1.0,)),
    "times": ("ratio", (1.0,)),
    "%": ("share", (100.0,)),
    "percent": ("share", (100.0,)),
}
"""Unit -> kind of figure, and what a row's number is multiplied with."""

KEYS = {
    "seconds": r"seconds$",
    "bytes": r"bytes|phases|allocated|reserved",
    "per_second": r"per_second$",
    "ratio": r"^speed_against",
    "share": r"^(exact_match|json_match|mfu|drift)$",
    "metric": r"loss|^(exact_match|json_match)$",
}
"""Kind of figure -> keys of a row that hold one, anywhere on the way to the number."""

ALLOWED = {
    "predicted": r"\bpredict(s|ed|ion|ions)?\b|\bestimated?\b|\barithmetic\b",
    "published": r"\bpublished\b|\breported by\b",
    "limit": r"\blimits?\b|\bat most\b|\bat least\b",
    "setting": r"\bsettings?\b|\bdefault\b|\bslack\b|\bbudget\b",
}
"""Kind of sentence whose figures are no measurements -> how it is told."""

NEVER = re.compile(r"\b(measured|took|ran|reached)\b", re.IGNORECASE)
"""What makes a sentence one about a measurement, whatever else it says."""

CARD = re.compile(r"\b\d+ GB cards?\b")
CODE = re.compile(r"`([^`]*)`")
"""A size on a box is no figure, and code is one only where it is nothing else."""

_UNITS = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
_NUMBER = r"(?<![\w.,/^-])(\d[\d,]*(?:\.\d+)?)"
_FIGURE = re.compile(rf"{_NUMBER}(?:[\s ]|-)?({_UNITS})(?![\w/^])")
_DECIMAL = re.compile(rf"{_NUMBER}(?!\w|,\d|\.\d|[ -]?({_UNITS})\b)")
_METRIC = re.compile(r"\b(loss|losses|exact_match|json_match)\b")

Held = dict[str, set[float]]


@dataclass(frozen=True)
class Figure:
    """A number as it stands in a page, with its unit; "" for a metric's."""

    number: str
    unit: str
    sentence: str

    def is_held(self, held: Held) -> bool:
        kind, factors = UNITS.get(self.unit, ("metric", (1.0,)))
        shown = float(self.number.replace(",", ""))
        digits = len(self.number.partition(".")[2])
        return any(round(value * by, digits) == shown for value in held[kind] for by in factors)


def held_by(rows: list[Any]) -> Held:
    """Every number of the rows, by kind. Of a list only median, least and most: among its many numbers any
    figure would be found."""
    found: Held = defaultdict(set)

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                walk(one, (*path, key))
        elif isinstance(value, list):
            numbers = [one for one in value if isinstance(one, int | float)]
            for number in (statistics.median(numbers), min(numbers), max(numbers)) if numbers else ():
                walk(number, path)
            for one in value:
                if isinstance(one, dict):
                    walk(one, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for kind, pattern in KEYS.items():
                if any(re.search(pattern, key) for key in path):
                    found[kind].add(abs(float(value)))

    for row in rows:
        walk(row, ())
    return found


def sentences(page: str) -> Iterator[str]:
    """Of a page's own text; a line of a table is one."""
    text = pages.PART.sub("\n\n", page)
    text = re.sub(r"^```.*?^```", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=\||- |\d+\. |#)", text):
        yield from re.split(r"(?<=[.!?;])\s+", " ".join(paragraph.split()))


def figures(page: str) -> Iterator[Figure]:
    """Those that need a row."""
    for sentence in sentences(page):
        kinds = {kind for kind, told in ALLOWED.items() if re.search(told, sentence, re.IGNORECASE)}
        if NEVER.search(sentence):
            kinds = set()
        bare = CARD.sub(" ", CODE.sub(lambda code: code[1] if _FIGURE.fullmatch(code[1]) else " ", sentence))
        for match in _FIGURE.finditer(bare):
            speed = UNITS[match[2]][0] == "per_second"  # is never a limit or a setting
            if not kinds - ({"limit", "setting"} if speed else set()):
                yield Figure(match[1], match[2], sentence)
        if _METRIC.search(bare) and not kinds:
            for match in _DECIMAL.finditer(bare):
                if "." in match[1]:
                    yield Figure(match[1], "", sentence)


def unheld(page: str, held: Held) -> list[str]:
    return [f"{one.number} {one.unit}: {one.sentence}" for one in figures(page) if not one.is_held(held)]


@pytest.fixture(scope="module")
def measured() -> Held:
    return held_by([row for path in results.FOLDER.glob("*/*.jsonl") for row in results.read_file(path)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_is_held_by_a_row(page: Path, measured: Held) -> None:
    assert unheld(page.read_text(encoding="utf-8"), measured) == []


@pytest.mark.parametrize(
    "invented",
    [
        "It trains at 12.3 tok/s.",
        "It trains at 12,345 tokens per second on a laptop.",
        "A step takes 0.123 s.",
        "One step took 7,7 ms; that is fast.",
        "The peak is 3.217 GiB.",
        "This is 2.71x as fast.",
        "This is 17 times as fast.",
        "73.9% of all answers are right.",
        "The loss ends at 0.0123456.",
        "- Fast: `9.87 s` a step.",
        "| qlora | 4.321 GiB | 77 tok/s |",
        "That is predicted. Here it is 9.876 GiB.",
        "Predicted were 3.1 GiB, measured 9.876 GiB.",
        "On an 8 GB card it reached 12.3 tok/s.",
        "With the default settings it trains at 12.3 tok/s.",
        "With `train.activations: keep` a step is 0.123 s.",
        "At 8 GB cards it took at most 9.876 GiB.",
    ],
)
def test_an_invented_figure_is_found(invented: str, measured: Held) -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert unheld(f"{text}\n\n{invented}\n", measured), page.name


def test_what_is_held_may_be_written_and_rounded() -> None:
    rows = json.loads(
        '[{"load_seconds": 2.08, "losses": [3, 1.5, 1.2, 0.25], "phases": {"train": 5637144576},'
        '"tokens_per_second": 255.6, "eval": {"exact_match": 0.8125}, "step_seconds": [1, 2, 9, 4, 3]}]'
    )
    held = held_by(rows)
    right = "It took 2.1 s, 5.25 GiB or 5.6 GB, 256 tok/s. The loss ended at 0.25, 81% of exact_match."
    assert unheld(right, held) == []
    wrong = "It took 2.2 s and 5.24 GiB, at 255 tok/s; the loss was 1.5, a step 4 s, its speed 2.08 tok/s."
    assert sorted(one.split(":")[0] for one in unheld(wrong, held)) == [
        "1.5 ",
        "2.08 tok/s",
        "2.2 s",
        "255 tok/s",
        "4 s",
        "5.24 GiB",
    ]


def test_generated_parts_code_and_marked_sentences_need_no_row() -> None:
    page = (
        "<!-- generated: one -->\n1.5 GiB\n<!-- end -->\n\n```\n1.5 GiB\n```\n\n"
        "For an 8 GB card. Predicted are 1.5 GiB. At most 5% are lost. Published: 4.6 GiB.\n"
        "Python 3.11, transformers 5.23, 72 steps, 2048 tokens, 135M parameters, step-9 s.\n"
    )
    assert unheld(page, defaultdict(set)) == []
    assert unheld(page + "\nOthers took 1.5 GiB.\n", defaultdict(set)) == ["1.5 GiB: Others took 1.5 GiB."]


def test_shorter_rows_need_less_in_the_table_of_cards() -> None:
    part = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- generated: hardware -->")[1]
    rows = [line for line in part.split("<!-- end -->")[0].splitlines() if "GiB" in line]
    assert len(rows) == 10
    for row in rows:
        sizes = [float(size) for size in re.findall(r"([\d.]+) GiB", row)]
        assert len(set(sizes)) == 3 and sizes == sorted(sizes), row
