"""Checks between the keys of a recipe: settings that are right alone and cannot run together.

Owns every such pair, each told with the path of the key to change, the reason and the remedy. Knows
nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from . import base_names, phi3
from .errors import ModelError, Problem, RecipeError, is_file, is_folder, shown
from .recipe import GENERATION_METRICS, Adapter, Evaluate, Fraction, Recipe, Source

KeyProblem = tuple[tuple[str | int, ...], str, str]
"""(path of keys, reason, remedy)."""


def cross_problems(recipe: Recipe) -> list[KeyProblem]:
    """What single keys cannot see: (path, reason, remedy) of every pair of settings that cannot run."""
    adapter, train, evaluate, data = recipe.adapter, recipe.train, recipe.evaluate, recipe.data
    checks: Sequence[tuple[bool, tuple[str | int, ...], str, str]] = (
        (
            train.micro_batch != "auto" and train.effective_batch % int(train.micro_batch) != 0,
            ("train", "micro_batch"),
            f"{train.micro_batch} does not divide train.effective_batch {train.effective_batch}.",
            "Choose a divisor, or auto.",
        ),
        (
            train.engine == "native" and adapter.method == "dora",
            ("train", "engine"),
            "native has no DoRA.",
            "Set train.engine=auto, or adapter.method=lora.",
        ),
        (
            train.engine == "reference"
            and (train.keep_attention is True or isinstance(train.slice_columns, int)),
            ("train", "engine"),
            "reference neither keeps attention outputs alone nor recomputes in slices.",
            "Set train.engine=native, or train.keep_attention and train.slice_columns to auto.",
        ),
        (
            not adapter.targets,
            ("adapter", "targets"),
            "is empty: nothing would be trained.",
            "Write all-linear, or name linears.",
        ),
        (
            adapter.targets != "all-linear" and _named_twice(adapter.targets),
            ("adapter", "targets"),
            f"names a projection twice: {', '.join(adapter.targets)}.",
            "Keep one.",
        ),
        (
            not adapter.split_fused and bool(set(adapter.targets) & set(phi3.PROJECTIONS)),
            ("adapter", "targets"),
            "names a projection inside a fused linear, but adapter.split_fused is false.",
            f"Set adapter.split_fused to true, or choose out of {', '.join(phi3.LINEARS)}.",
        ),
        (
            adapter.method == "dora" and bool(adapter.embeddings),
            ("adapter", "method"),
            f"dora on {' and '.join(adapter.embeddings)} would build a whole matrix of the vocabulary in "
            "every pass, for the lengths of its rows.",
            "Choose lora or rslora, or adapter.targets without them.",
        ),
        (
            adapter.init is not None and adapter.method == "dora",
            ("adapter", "init"),
            "adapters with DoRA's lengths are not read yet.",
            "Remove it, or set adapter.method to lora or rslora.",
        ),
        (
            adapter.init is not None and adapter.method == "loftq",
            ("adapter", "init"),
            "says where training starts, and so does adapter.method loftq.",
            "Remove it, or set adapter.method to lora.",
        ),
        (
            recipe.model.quantization == "none" and adapter.method == "loftq",
            ("adapter", "method"),
            "'loftq' starts from what quantization lost, and with model.quantization none nothing is lost.",
            "Set it to lora, or model.quantization to nf4.",
        ),
        (
            adapter.method == "dora" and bool(set(recipe.export) - {"adapter"}),
            ("export",),
            f"{', '.join(recipe.export)}: DoRA's lengths fit no other form than PEFT's own.",
            "Write [adapter], or set adapter.method to lora or rslora.",
        ),
        (
            len(set(recipe.export)) < len(recipe.export),
            ("export",),
            f"names a target twice: {', '.join(recipe.export)}.",
            "Keep one.",
        ),
        (
            "embedding" in recipe.memory.host and "embed_tokens" in adapter.embeddings,
            ("memory", "host"),
            "embedding has an adapter, which is trained on the device.",
            "Leave embedding out, or embed_tokens out of adapter.targets.",
        ),
        (
            "layers" in recipe.memory.host and (train.engine == "reference" or adapter.method == "dora"),
            ("memory", "host"),
            "layers come and go on the native engine only, which "
            + ("has no DoRA." if adapter.method == "dora" else "train.engine says not to take."),
            "Leave layers out, or set "
            + ("adapter.method to lora." if adapter.method == "dora" else "train.engine to native."),
        ),
        (
            recipe.memory.host != "auto" and len(set(recipe.memory.host)) < len(recipe.memory.host),
            ("memory", "host"),
            f"names a part twice: {', '.join(recipe.memory.host)}.",
            "Keep one.",
        ),
        (
            train.warmup >= 1 and train.warmup != int(train.warmup),
            ("train", "warmup"),
            f"{train.warmup} is neither a fraction below 1 nor a whole number of steps.",
            "Write 0.03 for 3% of the steps, or 100 for 100 steps.",
        ),
        (
            len(set(evaluate.metrics)) < len(evaluate.metrics),
            ("evaluate", "metrics"),
            f"names a metric twice: {', '.join(evaluate.metrics)}.",
            "Keep one.",
        ),
        (
            data.eval is None and not set(evaluate.metrics) <= set(Evaluate().metrics),
            ("evaluate", "metrics"),
            f"{', '.join(evaluate.metrics)} asked for, but data.eval is null.",
            "Set data.eval, or remove evaluate.metrics.",
        ),
        (
            data.eval is None and train.eval_every is not None,
            ("train", "eval_every"),
            "asks for losses on held-out rows, but data.eval is null.",
            "Set data.eval, or remove train.eval_every.",
        ),
    )
    found = [(path, reason, remedy) for wrong, path, reason, remedy in checks if wrong]
    found += _base_problems(recipe)
    found += _export_problems(recipe)
    known = phi3.VARIANTS.get(recipe.model.base)
    found += beyond_base(recipe, known) if known is not None else []
    for key, source in data.sources():
        found += _source_problems(source, key)
    return found + _text_problems(recipe)


def beyond_base(recipe: Recipe, geometry: phi3.Geometry) -> list[KeyProblem]:
    """What a recipe asks of its base that a model of these sizes does not have."""
    most, data, evaluate = geometry.max_positions, recipe.data, recipe.evaluate
    found = list(rank_problems(recipe.adapter, geometry))
    if data.max_length > most:
        reason = f"{data.max_length} is beyond the {most} positions of {recipe.model.base}."
        found.append((("data", "max_length"), reason, f"Set it to {most} or less, or take a base with more."))
    kept = recipe.train.kept_layers
    if isinstance(kept, int) and kept > geometry.num_layers:
        reason = f"{kept} is more than the {geometry.num_layers} layers of {recipe.model.base}."
        found.append((("train", "kept_layers"), reason, f"Set it to {geometry.num_layers} or less."))
    alone = [target for target in ONE_MATRIX if target in recipe.export]
    if alone and geometry.tied_embeddings and recipe.adapter.embeddings:
        module = recipe.adapter.embeddings[0]
        reason = f"{alone[0]} cannot adapt {module} alone: this base ties embedding and head."
        found.append((("export",), reason, "Write merged instead, or leave it out of adapter.targets."))
    answers = data.eval is not None and set(GENERATION_METRICS) & set(evaluate.metrics)
    if answers and evaluate.max_new_tokens >= most:
        reason = f"{evaluate.max_new_tokens} leaves no room for a prompt in the {most} positions of "
        remedy = f"Set it to {most // 2} or less."
        found.append((("evaluate", "max_new_tokens"), f"{reason}{recipe.model.base}.", remedy))
    return found


def rank_problems(settings: Adapter, geometry: phi3.Geometry) -> Iterator[KeyProblem]:
    """A rank above a matrix's smaller side adds parameters and nothing that they could express."""
    limits = {part: min(geometry.pair_shape(part)) for part in settings.parts}
    part = min(limits, key=limits.__getitem__, default="")
    if part and settings.rank > (limit := limits[part]):
        reason = f"{settings.rank} is above {limit}, the smaller side of {part}."
        yield ("adapter", "rank"), reason, f"Choose {limit} or less."


def check_base(recipe: Recipe, geometry: phi3.Geometry) -> None:
    """Refuse what `beyond_base` finds, once the sizes of a folder or of a download are known.

    Raises:
        RecipeError: all of it.
    """
    found = [Problem(".".join(map(str, path)), *why) for path, *why in beyond_base(recipe, geometry)]
    if found:
        raise RecipeError.of(found)


def _named_twice(targets: Sequence[str]) -> bool:
    """Whether a projection is meant by two names, as q is by [qkv_proj, q]."""
    meant = [p for name in targets for p in (phi3.inside(name) if name in phi3.LINEARS else (name,))]
    return len(set(meant)) < len(meant)


def _base_problems(recipe: Recipe) -> Iterator[KeyProblem]:
    """A base whose name tells that it cannot be one, so that nobody plans for it or downloads it first."""
    refused = base_names.refusal(recipe.model.base)
    if refused is not None:
        yield ("model", "base"), f"{shown(recipe.model.base)} {refused[0]}", refused[1]
    elif recipe.model.revision is not None and not base_names.is_hub_name(recipe.model.base):
        reason = f"{shown(recipe.model.revision)} is for a model on the hub; {recipe.model.base} is none."
        yield ("model", "revision"), reason, "Remove it, or give the base as org/name."
    elif recipe.model.revision is not None and not base_names.is_revision(recipe.model.revision):
        reason, remedy = base_names.NO_REVISION
        yield ("model", "revision"), f"{shown(recipe.model.revision)} {reason}", remedy


VLLM_RANK: Final = 512
"""The largest rank that vLLM serves, of which a split fused linear has several in its file."""

ONE_MATRIX: Final = ("loralib", "mlx", "gguf-lora")
"""Exports that cannot adapt the embedding or the head alone where they are one matrix."""


def _export_problems(recipe: Recipe) -> Iterator[KeyProblem]:
    """Exports that no adapter of this recipe can become, which the run would tell at its end."""
    adapter = recipe.adapter
    if "vllm" not in recipe.export or adapter.method == "dora" or not adapter.targets:
        return
    if adapter.embeddings:
        reason = f"vllm adapts neither embedding nor head of Phi-3, and {adapter.embeddings[0]} is trained."
        yield ("export",), reason, "Write merged instead, or leave it out of adapter.targets."
    linears = [linear for linear, _ in adapter.pairs]
    rank = adapter.rank * max((linears.count(linear) for linear in linears), default=1)
    if rank > VLLM_RANK:
        reason = f"vllm takes ranks up to {VLLM_RANK}, and {rank} is saved."
        yield ("export",), reason, "Write merged instead, or lower adapter.rank."


def _source_problems(source: Source, key: tuple[str | int, ...]) -> Iterator[KeyProblem]:
    """Keys of hub data sets beside a file, which has none of them."""
    for name in () if source.is_hub else ("split", "subset", "revision"):
        value = getattr(source, name)
        if value != Source.model_fields[name].default:
            reason = f"{value!r} is for a data set on the hub; {source.path} is a file or folder."
            yield (*key, name), reason, "Remove it, or give the data set as org/name."
    if source.is_hub and source.revision is not None and not base_names.is_revision(source.revision):
        reason, remedy = base_names.NO_REVISION
        yield (*key, "revision"), f"{shown(source.revision)} {reason}", remedy


def _text_problems(recipe: Recipe) -> list[KeyProblem]:
    """Settings that need turns, where a source is known to have none."""
    data = recipe.data
    plain = [key for key, source in data.sources() if source.format == "text"]
    held_out = [key for key in plain if key[1] == "eval" or isinstance(data.eval, Fraction)]
    found: list[KeyProblem] = []
    if plain and data.loss_on == "last":
        found.append((("data", "loss_on"), NO_LAST_ANSWER, "Write all."))
    if held_out and set(GENERATION_METRICS) & set(recipe.evaluate.metrics):
        found.append((("evaluate", "metrics"), NO_ANSWERS, "Use loss and perplexity."))
    return found


NO_LAST_ANSWER: Final = "'last' is for conversations: plain text has no last answer."
NO_ANSWERS: Final = f"{' and '.join(GENERATION_METRICS)} compare answers, and plain text has none."


def check_init(init: Path) -> None:
    """Whether there may be an adapter to go on from; what is in its file, the run reads.

    Raises:
        ModelError: there is none.
    """
    place = f"adapter.init: {init}"
    if is_file(init, ModelError):
        if init.suffix not in (".safetensors", ".pt"):
            remedy = "Give the folder of an adapter, its .safetensors, or loralib's .pt."
            raise ModelError(place, "is no adapter.", remedy)
    elif not is_folder(init, ModelError):
        raise ModelError(place, "no such file or folder.", "Give an adapter's, or remove it.")
    elif is_folder(init / "adapter", ModelError):
        raise ModelError(place, "is a run; its adapter is inside.", f"Write {init / 'adapter'}.")
    elif not any(path.suffix in (".safetensors", ".pt", ".bin") for path in init.iterdir()):
        raise ModelError(place, "holds no adapter.", "Give the folder that adapter_config.json is in.")
