"""Plots of what is in bench/results, as SVG and PNG, legible on white and on black pages.

The background is transparent, so every colour stands between: 4:1 against white and against GitHub's dark
page for text, 3:1 for areas and lines (tests/test_bench_report.py). Each file carries a fingerprint of its
data and of this module: that says whether it is stale, whatever version of matplotlib drew it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from . import markdown, tables
from .compare_table import Block, blocks

FOLDER: Final = Path(__file__).parent.parent / "docs" / "plots"
SUFFIXES: Final = (".svg", ".png")
TEXT: Final = "#737a83"
COLORS: Final = {
    "qlora": "#2f7fd0",
    "qlora-native": "#a0522d",
    "lora-bf16": "#c8641e",
    "lora-fp32": "#8b6fc9",
    "trl-qlora": "#2c8c5c",
    "unsloth": "#c2527f",
    "torchtune": "#93791c",
    "axolotl": "#1f8a9a",
    "llamafactory": "#b0564f",
    "litgpt": "#6f7f2a",
}
OTHER: Final = TEXT
GIB: Final = 1024**3
WIDTH: Final = 7.5
"""Inches; text is 9 points."""
STYLE: Final[dict[str, Any]] = {
    "svg.hashsalt": "bench",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 9,
    "axes.edgecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.transparent": True,
    "savefig.dpi": 110,
}

Data = list[dict[str, Any]]
"""One item an axis, of plain JSON: what is drawn and nothing else."""


@dataclass(frozen=True)
class Plot:
    """A picture: its data, and how one item of it is drawn on its axes. Units: `height` in inches an axis."""

    name: str
    alt: str
    data: Callable[[], Data]
    draw: Callable[[Any, dict[str, Any]], None]
    height: float = 2.6

    def fingerprint(self) -> str:
        """Of what is drawn and of how."""
        what = json.dumps(self.data(), sort_keys=True)
        how = Path(__file__).read_text(encoding="utf-8")
        return "data " + hashlib.sha256((what + how).encode()).hexdigest()

    def files(self) -> list[Path]:
        return [FOLDER / f"{self.name}{suffix}" for suffix in SUFFIXES]


def plots() -> str:
    """Markdown of the pictures that there are rows for."""
    there = [plot for plot in PLOTS if plot.data()]
    shown = [f"![{plot.alt}](plots/{plot.name}.svg)\n" for plot in there]
    return "\n".join(shown) or markdown.NONE


def stale() -> list[str]:
    """Names of files that are missing, drawn of other data, or there without data."""
    wanted = {path: plot.fingerprint() for plot in PLOTS if plot.data() for path in plot.files()}
    there = {path for suffix in SUFFIXES for path in FOLDER.glob(f"*{suffix}")}
    found = [path for path in wanted if path not in there or wanted[path].encode() not in path.read_bytes()]
    return sorted(path.name for path in [*found, *(there - set(wanted))])


def write() -> None:
    """Draw what is stale, and remove what has no data."""
    old = stale()
    for plot in PLOTS:
        if plot.data() and any(path.name in old for path in plot.files()):
            _save(plot)
    for name in set(old) - {path.name for plot in PLOTS if plot.data() for path in plot.files()}:
        (FOLDER / name).unlink()


def _save(plot: Plot) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    data, mark = plot.data(), plot.fingerprint()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}):
        size = (WIDTH, plot.height * len(data))
        figure, axes = pyplot.subplots(len(data), 1, figsize=size, squeeze=False, layout="constrained")
        for axis, item in zip(axes[:, 0], data, strict=True):
            axis.set_title(item["title"], loc="left", wrap=True)
            plot.draw(axis, item)
        svg, png = plot.files()
        figure.savefig(svg, metadata={"Description": mark, "Date": None, "Creator": None})
        figure.savefig(png, metadata={"Description": mark, "Software": None})
        pyplot.close(figure)


def _color(method: str) -> str:
    return COLORS.get(method, OTHER)


# --- data: of `bench compare` an item a block


def _blocks() -> Iterator[tuple[dict[str, Any], Block]]:
    for block in blocks():
        if block.summaries:
            yield {"title": f"{block.title}\n{block.machine}"}, block


def memory_data() -> Data:
    return [
        item | {"methods": {one.method: one.phases for one in block.summaries}} for item, block in _blocks()
    ]


def speed_data() -> Data:
    return [
        item
        | {
            "methods": {
                one.method: [round(one.tokens_per_second, 2), *(round(v, 2) for v in one.spread_per_second)]
                for one in block.summaries
            }
        }
        for item, block in _blocks()
    ]


def loss_data() -> Data:
    return [
        item
        | {
            "methods": {
                one.method: [[round(loss, 5) for loss in repeat] for repeat in one.losses]
                for one in block.summaries
            }
        }
        for item, block in _blocks()
    ]


def context_data() -> Data:
    found = []
    for (machine, model), rows in tables.context_rows().items():
        lengths: dict[str, dict[str, int]] = {}
        for row in rows:
            name = f"{row['method']}, {row['how']}"
            lengths.setdefault(name, {})[str(row["vram_gib"])] = row["max_length"] or 0
        found.append({"title": f"{model}\n{machine}", "lengths": lengths})
    return found


# --- drawing: one item on one axis


def draw_memory(axis: Any, item: dict[str, Any]) -> None:
    """A group of bars a phase, a bar a method."""
    methods = item["methods"]
    phases = list(next(iter(methods.values())))
    width = 0.8 / len(methods)
    for at, (method, found) in enumerate(methods.items()):
        heights = [found.get(phase, 0) / GIB for phase in phases]
        places = [number + (at - (len(methods) - 1) / 2) * width for number in range(len(phases))]
        bars = axis.bar(places, heights, width * 0.92, color=_color(method), label=method)
        axis.bar_label(bars, fmt="%.2f", fontsize=7.5, color=TEXT)
    axis.set_xticks(range(len(phases)), phases)
    axis.set_ylabel("peak, GiB")
    axis.margins(y=0.12)
    _legend(axis)


def draw_speed(axis: Any, item: dict[str, Any]) -> None:
    """A bar a method, with the slowest and the fastest repeat."""
    names = list(item["methods"])[::-1]
    for at, name in enumerate(names):
        median, low, high = item["methods"][name]
        ends = [[median - low], [high - median]]
        axis.barh(at, median, 0.62, xerr=ends, color=_color(name), error_kw={"ecolor": TEXT, "capsize": 3})
        axis.annotate(
            f"{median:,.0f}", (high, at), xytext=(6, 0), textcoords="offset points", va="center", color=TEXT
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("tokens/s: median, slowest and fastest repeat")
    axis.margins(x=0.12)


def draw_loss(axis: Any, item: dict[str, Any]) -> None:
    """A line a method: the median of the repeats; from the least to the largest the area around it."""
    dashes = ("-", "--", "-.", ":")
    for at, (method, repeats) in enumerate(item["methods"].items()):
        columns = list(zip(*repeats, strict=False))
        steps = range(1, len(columns) + 1)
        low, high = [min(one) for one in columns], [max(one) for one in columns]
        axis.fill_between(steps, low, high, color=_color(method), alpha=0.2, linewidth=0)
        median = [statistics.median(one) for one in columns]
        axis.plot(steps, median, dashes[at % len(dashes)], color=_color(method), label=method, linewidth=1.5)
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats a token")
    _legend(axis)


def draw_context(axis: Any, item: dict[str, Any]) -> None:
    """A group of bars a card; what is predicted is hatched."""
    lengths = item["lengths"]
    cards = sorted({card for found in lengths.values() for card in found}, key=int)
    width = 0.84 / len(lengths)
    for at, (name, found) in enumerate(lengths.items()):
        method, how = name.split(", ")
        heights = [found.get(card, 0) / 1000 for card in cards]
        places = [number + (at - (len(lengths) - 1) / 2) * width for number in range(len(cards))]
        look = {"color": _color(method)} if how == "measured" else _hatched(_color(method))
        bars = axis.bar(places, heights, width * 0.9, label=name, **look)
        shown = ["" if card not in found else f"{found[card] / 1000:.3g}k" for card in cards]
        axis.bar_label(bars, shown, fontsize=7.5, color=TEXT)
    axis.set_xticks(range(len(cards)), [f"{card} GB" for card in cards])
    axis.set_ylabel("longest row, 1000 tokens")
    axis.margins(y=0.12)
    _legend(axis)


def _hatched(color: str) -> dict[str, Any]:
    return {"facecolor": "none", "edgecolor": color, "hatch": "////"}


def _legend(axis: Any) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


PLOTS: Final[Sequence[Plot]] = (
    Plot("speed", "tokens per second by method", speed_data, draw_speed, 2.0),
    Plot("memory", "peak memory by phase and method", memory_data, draw_memory),
    Plot("loss", "loss curves over each other", loss_data, draw_loss),
    Plot("context", "longest row by card", context_data, draw_context),
)
