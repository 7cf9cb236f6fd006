"""The recipe: everything a run depends on, in one immutable, strictly checked document.

Owns every key, its default (once, on the field), its help text and the checks between keys. Refuses
unknown, duplicate and mistyped keys, and settings whose feature is not built yet, all at once and each
with its place. Knows nothing of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from . import phi3
from .units import HOW_TO_WRITE, parse_bytes


@dataclass(frozen=True)
class Today:
    """Marks a key whose feature is still being built: these values work, any other is refused by name."""

    values: tuple[Any, ...]
    instead: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "literal" and self.values:  # a misspelled name is told today's names only
            today = " or ".join(repr(value) for value in self.values)
            schema = core_schema.custom_error_schema(
                schema, "literal_error", custom_error_context={"expected": today}
            )
        return core_schema.no_info_after_validator_function(self._check, schema)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        today = [list(value) if isinstance(value, tuple) else value for value in self.values]
        return {**handler(schema), **({"enum": today} if today else {"not": {}})}

    def _check(self, value: Any) -> Any:
        if value in self.values:
            return value
        detail = {"today": list(self.values), "hint": self.instead}
        raise PydanticCustomError("not_available", "not available yet", detail)


def _check_version(value: Any) -> Any:
    if type(value) is int and value == 1:
        return value
    raise PydanticCustomError("expected", "needs 1, the only format so far")


def _auto_or_positive(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise PydanticCustomError("expected", "needs `auto` or a positive whole number")


def _auto_or_size(value: Any) -> Any:
    text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    if isinstance(text, str) and text != "auto":
        try:
            parse_bytes(text)
        except ValueError:
            raise PydanticCustomError("expected", f"needs `auto`, or {HOW_TO_WRITE}") from None
    return text


def _size_schema(schema: dict[str, Any]) -> None:
    """What `_auto_or_size` accepts."""
    size = r"^(auto|\s*\d+(\.\d+)?\s*([KMGTkmgt]([Ii]?[Bb])?)?\s*)$"
    text = {"type": schema.pop("type"), "pattern": size}
    schema["anyOf"] = [text, {"type": "number", "exclusiveMinimum": 0}]


def _check_target(name: Any) -> Any:
    """A linear or a projection inside one; `o` and `down` are linears, q_proj is what Llama calls q."""
    if not isinstance(name, str):
        raise PydanticCustomError("expected", "needs the name of a linear")
    if name in TARGETS:
        return {"o": "o_proj", "down": "down_proj"}.get(name, name)
    if name in phi3.LLAMA_NAMES:
        return phi3.LLAMA_NAMES[name]
    if name == "all-linear":
        raise PydanticCustomError("expected", "needs to stand alone, outside a list")
    if name in phi3.EMBEDDINGS:
        raise PydanticCustomError("not_available", "not available yet", {"today": list(TARGETS)})
    raise PydanticCustomError("target", "is not a Phi-3 projection", {"allowed": [*TARGETS, "all-linear"]})


def _check_targets(value: Any) -> Any:
    """A list; a name that stands alone gets the message of its own fault first."""
    if isinstance(value, str):
        _check_target(value)
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("expected", "needs all-linear, or a list such as [q, v]")
    return value


def _kind_of_targets(value: Any) -> str:
    return "<name>" if value == "all-linear" else "<list>"


TARGETS: Final = (*phi3.PROJECTIONS, *phi3.LINEARS)
METRICS: Final = ("loss", "perplexity", "exact_match", "json_match")
GENERATION_METRICS: Final = ("exact_match", "json_match")
"""Metrics that need answers; the others need one forward pass."""

Target = Annotated[
    str, BeforeValidator(_check_target), Field(json_schema_extra={"enum": [*TARGETS, *phi3.LLAMA_NAMES]})
]
Targets = Annotated[
    Annotated[Literal["all-linear"], Tag("<name>")]
    | Annotated[tuple[Target, ...], Field(strict=False), BeforeValidator(_check_targets), Tag("<list>")],
    Discriminator(_kind_of_targets),
]
Metric = Annotated[Literal["loss", "perplexity", "exact_match", "json_match", "rouge"], Today(METRICS)]


class _Part(BaseModel):
    """A mapping of the recipe: immutable, no unknown keys, no coercion, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(_Part):
    """The base model."""

    base: str = Field(
        default="microsoft/Phi-3-mini-4k-instruct",
        min_length=1,
        description="hub id, local folder (./ or / in front), or builtin:smollm2-135m, which needs no hub",
    )
    revision: str | None = Field(
        default=None, description="hub commit or tag; what it resolved to is recorded"
    )
    quantization: Literal["nf4", "none"] = Field(
        default="nf4", description="nf4: 4-bit base (QLoRA); none: full-precision LoRA in compute_dtype"
    )
    double_quant: bool = Field(default=True, description="quantize NF4's scales too: 0.37 bit a weight less")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="dtype of activations, norms, embeddings and of an unquantized base"
    )


class Adapter(_Part):
    """What is trained."""

    method: Annotated[
        Literal["lora", "rslora", "dora", "pissa", "olora", "loftq"],
        Today(
            ("lora", "rslora", "dora"),
            "pissa, olora and loftq change the base's weights, which no other copy of the base has.",
        ),
    ] = Field(
        default="lora",
        description="lora; rslora: scaled by alpha / sqrt(rank); dora: trains each output's length too",
    )
    rank: int = Field(default=16, ge=1, description="rank r of each A/B pair")
    alpha: int = Field(default=32, ge=1, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="dropout on the adapter's input while training"
    )
    targets: Targets = Field(
        default="all-linear",
        description="all-linear, or a list out of q k v o gate up down, or of the linears that hold them: "
        "qkv_proj o_proj gate_up_proj down_proj",
    )
    split_fused: bool = Field(
        default=True,
        description="one A/B pair per q, k, v, gate, up instead of one for the fused matrix; "
        "saved as plain PEFT of three or two times the rank",
    )

    init: str | None = Field(
        default=None,
        min_length=1,
        description="adapter to go on from: a folder or file of PEFT's, loralib's or MLX's, relative to the "
        "recipe's folder",
    )

    @property
    def trained(self) -> dict[str, tuple[str, ...]]:
        """Linears that get adapters, in the order of the forward pass -> the projections trained in each."""
        names = phi3.LINEARS if isinstance(self.targets, str) else self.targets
        found = {
            linear: tuple(p for p in phi3.inside(linear) if linear in names or p in names)
            for linear in phi3.LINEARS
        }
        return {linear: projections for linear, projections in found.items() if projections}

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(linear, part) of every A/B pair in a layer; the part is a projection, or the linear itself."""
        return tuple(
            (linear, part)
            for linear, projections in self.trained.items()
            for part in (projections if self.split_fused and linear in phi3.FUSED else (linear,))
        )


class Source(_Part):
    """Where rows come from: a file, a folder of files, or a data set on the hub."""

    path: str = Field(
        min_length=1,
        description="a JSONL, JSON, CSV, Parquet or .txt file or a folder of them, relative to the recipe's "
        "folder; or org/name, a data set on the hub (./org/name: a folder)",
    )
    format: Annotated[
        Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference"],
        Today(
            ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"),
            "Its rows are for train.task dpo; to train on the chosen answers, write prompt-completion rows.",
        ),
    ] = Field(
        default="auto",
        description="layout of a row; auto looks at the keys of the first. text: plain text, one document "
        "a row or .txt file, every token trained on",
    )
    split: str = Field(default="train", min_length=1, description="split of a hub data set")
    subset: str | None = Field(default=None, min_length=1, description="configuration of a hub data set")
    revision: str | None = Field(default=None, min_length=1, description="hub commit or tag of a data set")
    limit: int | None = Field(default=None, ge=1, description="use the first N rows only")
    weight: float = Field(
        default=1.0,
        gt=0.0,
        le=100.0,
        description="how often an epoch takes each row: 2 twice, 0.5 half of the rows, "
        "1.5 all and half of them again; which ones depends on their content and train.seed",
    )

    @property
    def is_hub(self) -> bool:
        """Whether `path` is a hub id; load_recipe has made the path of whatever exists absolute."""
        return is_hub_id(self.path)


class Fraction(_Part):
    """A held-out share of the training rows."""

    fraction: float = Field(
        gt=0.0,
        lt=1.0,
        description="share of the training rows held out, chosen by content and train.seed: equal rows stay "
        "together, and new ones move none",
    )


def is_hub_id(path: str) -> bool:
    """Whether text has the form org/name; names that end as data files do are files."""
    return bool(_HUB_ID.fullmatch(path)) and not path.lower().endswith(FILE_SUFFIXES)


_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
FILE_SUFFIXES: Final = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md", ".xlsx"),
    *(".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".yaml", ".yml"),
)
"""What a file of data is called, of kinds that can be read or not: a missing one is no hub id."""


def _kind_of_sources(value: Any) -> str:
    if isinstance(value, Fraction) or (isinstance(value, dict) and "fraction" in value):
        return "<fraction>"
    return "<sources>" if isinstance(value, (list, tuple)) else "<source>"


def _check_sources(value: Any) -> Any:
    """Not `min_length`: pydantic counts what is valid, and would blame the list for its only item too."""
    if not value:
        raise PydanticCustomError("expected", "needs at least one source")
    return value


def _kind_of_training_sources(value: Any) -> str:
    return "<sources>" if isinstance(value, (list, tuple)) else "<source>"


OneSource = Annotated[Source, Tag("<source>")]
Sources = Annotated[
    tuple[Source, ...],
    Field(strict=False, json_schema_extra={"minItems": 1}),
    BeforeValidator(_check_sources),
    Tag("<sources>"),
]
TrainSources = Annotated[OneSource | Sources, Discriminator(_kind_of_training_sources)]
EvalSources = Annotated[
    OneSource | Sources | Annotated[Fraction, Tag("<fraction>")], Discriminator(_kind_of_sources)
]


ARMS: Final[dict[str, type[BaseModel] | None]] = {
    "<source>": Source,
    "<sources>": Source,
    "<fraction>": Fraction,
    "<name>": None,
    "<list>": None,
}
"""Tag of a union's arm, which pydantic puts into the place of an error -> the part it, or an item, is."""


class Data(_Part):
    """What it is trained on, and how rows become tokens."""

    train: TrainSources = Field(description="training rows; or a list of such sources, with weights")
    eval: EvalSources | None = Field(
        default=None,
        description="held-out rows, written as data.train is; or {fraction: 0.05} of the training rows; "
        "null: no evaluation",
    )
    max_length: int = Field(default=2048, ge=8, description="longest row in tokens")
    overlong: Literal["drop", "truncate", "split", "error"] = Field(
        default="drop",
        description="longer rows: drop, error, truncate (answers still end), split (between turns); counted",
    )
    packing: bool = Field(
        default=True,
        description="fill forward passes with as many rows as fit max_length; no row sees another",
    )
    loss_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="tokens trained on: assistant turns; each row's last one; all. End-of-turn included; "
        "plain text has no turns, and all of it is trained on (last is refused)",
    )

    @property
    def train_sources(self) -> tuple[Source, ...]:
        return (self.train,) if isinstance(self.train, Source) else self.train

    @property
    def eval_sources(self) -> tuple[Source, ...]:
        """Sources of held-out rows; none where there are no such rows, or they are a share of training's."""
        if self.eval is None or isinstance(self.eval, Fraction):
            return ()
        return (self.eval,) if isinstance(self.eval, Source) else self.eval

    def sources(self) -> Iterator[tuple[tuple[str | int, ...], Source]]:
        """(path of keys, source) of all of them."""
        named = (("train", self.train, self.train_sources), ("eval", self.eval, self.eval_sources))
        for name, written, found in named:
            for i, source in enumerate(found):
                yield ("data", name, *(() if isinstance(written, Source) else (i,))), source


class Train(_Part):
    """How it is trained."""

    task: Annotated[Literal["sft", "dpo"], Today(("sft",))] = Field(
        default="sft", description="training task"
    )
    engine: Annotated[Literal["auto", "native", "reference"], Today(("auto", "reference"))] = Field(
        default="auto", description="reference: transformers + PEFT layers; auto: the fastest that is proven"
    )
    activations: Annotated[
        Literal["auto", "keep", "recompute", "offload"], Today(("auto", "recompute", "keep"))
    ] = Field(default="auto", description="recompute: gradient checkpointing; keep: faster, more memory")
    epochs: int = Field(default=1, ge=1, description="passes over the training rows, unless max_steps is set")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; wins over epochs")
    effective_batch: int = Field(
        default=16,
        ge=1,
        description="rows per optimizer step over all processes; never changed behind your back",
    )
    micro_batch: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)], BeforeValidator(_auto_or_positive)
    ] = Field(
        default="auto", description="rows of max_length per forward pass; passes per step follow from it"
    )
    learning_rate: float = Field(default=2.0e-4, gt=0.0, lt=1.0, description="peak learning rate")
    lora_plus_ratio: float | None = Field(
        default=None, ge=1.0, description="LoRA+: B learns this many times faster than A; 16 is its paper's"
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="after the warm-up"
    )
    warmup: float = Field(default=0.03, ge=0.0, description="below 1: fraction of the steps; from 1: steps")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="gradient clipping")
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"] = Field(
        default="paged_adamw_8bit", description="paged: states move to host memory under pressure (CUDA)"
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="seed of adapter init, data order and dropout")
    log_every: int = Field(default=1, ge=1, description="steps between lines in metrics.jsonl")
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between losses on the held-out rows"
    )
    save_every: Annotated[int | None, Today((None,))] = Field(
        default=None, description="steps between verified checkpoints"
    )
    keep_checkpoints: Annotated[int, Today((2,))] = Field(
        default=2, ge=1, description="newest checkpoints kept"
    )


class Memory(_Part):
    """The memory budget."""

    budget: Annotated[str, BeforeValidator(_auto_or_size)] = Field(
        default="auto",
        description="auto: what is free now; or 8GiB, of the device, and no more is taken",
        json_schema_extra=_size_schema,
    )
    on_oom: Annotated[Literal["adapt", "fail"], Today(("fail",))] = Field(
        default="fail", description="adapt: halve the micro batch and go on; fail: stop with exit code 4"
    )


class Evaluate(_Part):
    """Metrics on the held-out rows."""

    metrics: Annotated[tuple[Metric, ...], Field(strict=False)] = Field(
        default=("loss",), description="out of loss, perplexity, exact_match, json_match"
    )
    samples: int = Field(default=32, ge=1, description="held-out rows that are answered and compared")
    max_new_tokens: int = Field(default=128, ge=1, description="longest generated answer in tokens")
    compare_base: bool = Field(default=True, description="measure the base model too, before training")


class Recipe(_Part):
    """A fine-tuning run of one Phi-3 model."""

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = Field(description="format of this file")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80, description="names the run's folder"
    )
    description: str = Field(default="", description="one line: what it is for")
    model: Model = Field(default=Model(), description="the base model")
    adapter: Adapter = Field(default=Adapter(), description="what is trained")
    data: Data = Field(description="what it is trained on")
    train: Train = Field(default=Train(), description="how it is trained")
    memory: Memory = Field(default=Memory(), description="the memory budget")
    evaluate: Evaluate = Field(default=Evaluate(), description="metrics on the held-out rows")
    export: Annotated[tuple[str, ...], Field(strict=False), Today((("adapter",), ()))] = Field(
        default=("adapter",),
        description="what to write for other programs; the PEFT adapter is always written",
    )
    track: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...],
        Field(strict=False),
        Today(((),), "Every logged step is in the run folder's metrics.jsonl."),
    ] = Field(default=(), description="experiment trackers")

    def settled(self, micro_batch: int) -> Recipe:
        """The same recipe with `auto` replaced by what was chosen, so that it repeats anywhere."""
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch": micro_batch})})


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
            adapter.init is not None and adapter.method == "dora",
            ("adapter", "init"),
            "adapters with DoRA's lengths are not read yet.",
            "Remove it, or set adapter.method to lora or rslora.",
        ),
        (
            train.warmup >= 1 and train.warmup != int(train.warmup),
            ("train", "warmup"),
            f"{train.warmup} is neither a fraction below 1 nor a whole number of steps.",
            "Write 0.03 for 3% of the steps, or 100 for 100 steps.",
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
    for key, source in data.sources():
        found += _source_problems(source, key)
    return found + _text_problems(recipe)


def _named_twice(targets: Sequence[str]) -> bool:
    """Whether a projection is meant by two names, as q is by [qkv_proj, q]."""
    meant = [p for name in targets for p in (phi3.inside(name) if name in phi3.LINEARS else (name,))]
    return len(set(meant)) < len(meant)


def _source_problems(source: Source, key: tuple[str | int, ...]) -> Iterator[KeyProblem]:
    """Keys of hub data sets beside a file, which has none of them."""
    for name in () if source.is_hub else ("split", "subset", "revision"):
        value = getattr(source, name)
        if value != Source.model_fields[name].default:
            reason = f"{value!r} is for a data set on the hub; {source.path} is a file or folder."
            yield (*key, name), reason, "Remove it, or give the data set as org/name."


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
