"""Fill generated parts of README.md and of these pages: `make docs`; `--check` only compares.

They come from the code, tables of measurements and the plots from what is in bench/results.
"""

from __future__ import annotations

import sys

from bench import pages, plots, report
from qlora_phi3 import fit, memory, phi3
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import document_keys, list_recipes, load_recipe
from qlora_phi3.units import format_bytes

PAGES = report.PAGES
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
    keys = [f"model.base={base}", f"model.quantization={quantization}", "train.micro_batch=1"]
    keys += ["train.activations=recompute", "data.eval=", "evaluate.metrics=[loss]"]
    # rows are packed up to max_length: a shorter row alone would make no smaller pass
    found = {n: load_recipe(path, [*keys, f"data.max_length={n}"]) for n in (*lengths, 2048)}
    geometry = phi3.VARIANTS[base]
    peaks = [memory.predict(found[n], geometry, micro_batch=1).peak_bytes for n in lengths]
    card = fit.smallest_card(found[2048], geometry)
    cells = " | ".join(format_bytes(peak) for peak in peaks)
    return f"| {base.split('/')[1]} | {'NF4' if quantization == 'nf4' else 'bf16'} | {cells} | {card} GB |"


LLAMA_3B = phi3.Geometry(
    num_layers=28,
    hidden_size=3072,
    intermediate_size=8192,
    num_heads=24,
    num_kv_heads=8,
    vocab_size=128256,
    tied_embeddings=True,
)
"""Llama-3.2-3B's sizes: what the prediction says of a model of another family."""

PHI_35 = phi3.VARIANTS["microsoft/Phi-3.5-mini-instruct"]
PUBLISHED = (
    ("torchtune, Llama-3.2-3B QLoRA", "4.6 GiB", LLAMA_3B, "nf4", "recompute", 8, 1, 2048),
    ("torchtune, Llama-3.2-3B LoRA", "8.5 GiB", LLAMA_3B, "none", "recompute", 8, 1, 2048),
    ("Unsloth, Phi-3.5-mini QLoRA", "3.342 GB reserved", PHI_35, "nf4", "offload", 16, 2, 2048),
    ("litgpt, Phi-3-mini QLoRA", "19.13 GB", phi3.VARIANTS[SHOWN[0]], "nf4", "recompute", 8, 1, 512),
    ("litgpt, Phi-3-mini LoRA", "19.75 GB", phi3.VARIANTS[SHOWN[0]], "none", "recompute", 8, 1, 512),
)
"""Run, its published figure, geometry, base, activations, rank, rows in a pass, their tokens, as set here."""


def published() -> str:
    """Others' published figures beside what this engine is predicted to take."""
    rows = [
        "| run | published | ours, tensors | ours, with 5% slack | rank, rows x tokens |",
        "|---|---|---|---|---|",
    ]
    for name, figure, geometry, quantization, activations, rank, micro_batch, tokens in PUBLISHED:
        base = [f"model.quantization={quantization}", f"adapter.rank={rank}"]
        train = [f"train.micro_batch={micro_batch}", f"train.activations={activations}"]
        recipe = _plain([*base, *train])
        plan = memory.predict(recipe, geometry, micro_batch=micro_batch, row_tokens=tokens)
        reserved = plan.needed_bytes - memory.CONTEXT_BYTES
        sizes = f"{format_bytes(plan.peak_bytes)} | {format_bytes(reserved)}"
        rows.append(f"| {name} | {figure} | {sizes} | r{rank}, {micro_batch} x {tokens} |")
    return "\n".join(rows) + "\n"


def parts() -> str:
    """Every part of phi3-mini-chat-8gb's plan in training, recomputed, and how it comes about."""
    path = next(p for p in list_recipes() if p.stem == "phi3-mini-chat-8gb")
    overrides = ["train.activations=recompute", "memory.host=[]"]
    plan = fit.planned(load_recipe(path, overrides), phi3.VARIANTS[SHOWN[0]])
    rows = ["| part | bytes | sure | how |", "|---|---|---|---|"]
    train = next(phase for phase in plan.phases if phase.name == "train")
    for part in (*train.parts, *plan.outside):
        rows.append(f"| {part.name} | {format_bytes(part.num_bytes)} | {part.kind} | {part.formula} |")
    return "\n".join([*rows, f"| **the device needs** | **{format_bytes(plan.needed_bytes)}** | | |"]) + "\n"


def adapter_sizes() -> str:
    """Fused and split adapters of Phi-3-mini at rank 16: what is trained and what is saved."""
    geometry, rank = phi3.VARIANTS[SHOWN[0]], 16
    fused = geometry.lora_parameters(phi3.LINEARS, rank)
    split = geometry.lora_parameters(tuple(phi3.PROJECTIONS), rank)
    ranks = {name: rank * len(phi3.inside(name)) for name in phi3.LINEARS}
    saved = sum(geometry.lora_parameters((name,), own) for name, own in ranks.items())
    in_file = ", ".join(f"`{name}` {own}" for name, own in ranks.items())
    rows = ["| | trained parameters | saved, float32 | rank in the saved file |", "|---|---|---|---|"]
    for name, trained, kept, words in (("fused", fused, fused, str(rank)), ("split", split, saved, in_file)):
        rows.append(f"| {name} | {trained:,} | {format_bytes(4 * kept)} | {words} |")
    return "\n".join(rows) + "\n"


def _plain(overrides: list[str]) -> Recipe:
    """phi3-mini-chat-8gb without packing and evaluation."""
    path = next(p for p in list_recipes() if p.stem == "phi3-mini-chat-8gb")
    keys = ["data.packing=false", "data.eval=", "evaluate.metrics=[loss]", "train.optimizer=paged_adamw_8bit"]
    return load_recipe(path, [*keys, *overrides])


PARTS = {
    "recipes": recipes,
    "keys": document_keys,
    "hardware": hardware,
    "parts": parts,
    "published": published,
    "adapter_sizes": adapter_sizes,
    **report.TABLES,
}


def main(check: bool) -> None:
    if check and (old := plots.stale()):
        sys.exit(f"docs/plots/{old[0]} is stale: run `make docs`.")
    if not check:
        plots.write()
    for page in PAGES:
        current = page.read_text(encoding="utf-8")
        fresh = pages.fill(current, PARTS)
        if check and fresh != current:
            sys.exit(f"{page.name} is stale: run `make docs`.")
        if not check:
            page.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] == ["--check"])
