"""Fill the README's generated parts from the code: `make docs`; `--check` only compares.

Between `<!-- generated: NAME -->` and `<!-- end -->` stands what NAME below gives.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from qlora_phi3 import fit, memory, phi3
from qlora_phi3.recipe_file import document_keys, list_recipes, load_recipe
from qlora_phi3.units import format_bytes

README = Path(__file__).parent.parent / "README.md"
SHOWN = (
    "microsoft/Phi-3-mini-4k-instruct",
    "microsoft/Phi-3.5-mini-instruct",
    "microsoft/Phi-4-mini-instruct",
    "microsoft/Phi-3-medium-4k-instruct",
    "microsoft/phi-4",
)


def recipes() -> str:
    rows = ["| recipe | what for | smallest card, predicted |", "|---|---|---|"]
    for path in list_recipes():
        recipe = load_recipe(path)
        card = fit.smallest_card(recipe, phi3.VARIANTS[recipe.model.base])
        rows.append(f"| `{recipe.name}` | {recipe.description} | {card} GB |")
    return "\n".join(rows) + "\n"


def hardware() -> str:
    """Peak of a training step at micro batch 1, rank 16 on all linears, by row length; no GPU measured it."""
    lengths = (512, 2048, 4096)
    head = " | ".join(f"{n} tokens" for n in lengths)
    rows = [f"| model | base | {head} | smallest card at 2048 |", "|---|---|" + "---|" * (len(lengths) + 1)]
    for base in SHOWN:
        for quantization in ("nf4", "none"):
            rows.append(_hardware_row(base, quantization, lengths))
    return "\n".join(rows) + "\n"


def _hardware_row(base: str, quantization: str, lengths: tuple[int, ...]) -> str:
    path = next(p for p in list_recipes() if p.stem == "phi3-mini-chat-8gb")
    overrides = [
        f"model.base={base}",
        f"model.quantization={quantization}",
        "train.micro_batch=1",
        "data.eval=",
    ]
    recipe = load_recipe(path, [*overrides, "evaluate.metrics=[loss]", "data.max_length=2048"])
    peaks = [
        memory.predict(recipe, phi3.VARIANTS[base], micro_batch=1, row_tokens=n).peak_bytes for n in lengths
    ]
    card = fit.smallest_card(recipe, phi3.VARIANTS[base])
    cells = " | ".join(format_bytes(peak) for peak in peaks)
    return f"| {base.split('/')[1]} | {'NF4' if quantization == 'nf4' else 'bf16'} | {cells} | {card} GB |"


PARTS = {"recipes": recipes, "keys": document_keys, "hardware": hardware}


def fill(text: str) -> str:
    """The README with every generated part made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    current = README.read_text(encoding="utf-8")
    fresh = fill(current)
    if sys.argv[1:] == ["--check"]:
        sys.exit("README.md is stale: run `make docs`." if fresh != current else 0)
    README.write_text(fresh, encoding="utf-8")
