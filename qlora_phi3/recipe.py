"""The recipe: everything a run depends on, in one immutable, strictly checked document.

Owns every key, its default (once, on the field) and its help text. Refuses unknown and mistyped keys, and
settings whose feature is not built yet, all at once and each with its place. Knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

from . import phi3
from .recipe_values import (
    EXPORTS,
    TARGETS,
    Method,
    Today,
    auto_or_count,
    auto_or_positive,
    auto_or_size,
    auto_or_switch,
    check_base,
    check_export,
    check_host,
    check_method,
    check_sources,
    check_target,
    check_targets,
    check_version,
    columns,
    is_hub_id,
    size_schema,
)


def _kind_of_targets(value: Any) -> str:
    return "<name>" if value == "all-linear" else "<list>"


def _kind_of_host(value: Any) -> str:
    return "<name>" if value == "auto" else "<list>"


METRICS: Final = ("loss", "perplexity", "exact_match", "json_match")
GENERATION_METRICS: Final = ("exact_match", "json_match")

MOST: Final = 10**12
"""Of anything that is counted: more is a slip of the hand, and beyond what libraries count."""

SCORED_ROWS: Final = 256
"""Held-out rows whose loss is measured in the middle of a training: it waits for them."""

SHOWN_ANSWERS: Final = 8
"""Held-out rows that are answered to be looked at, where no metric compares answers."""
"""Metrics that need answers; the others need one forward pass."""

Target = Annotated[
    str, BeforeValidator(check_target), Field(json_schema_extra={"enum": [*TARGETS, *phi3.LLAMA_NAMES]})
]
Targets = Annotated[
    Annotated[Literal["all-linear"], Tag("<name>")]
    | Annotated[tuple[Target, ...], Field(strict=False), BeforeValidator(check_targets), Tag("<list>")],
    Discriminator(_kind_of_targets),
]
HostPart = Literal["embedding", "layers"]
Host = Annotated[
    Annotated[Literal["auto"], Tag("<name>")]
    | Annotated[tuple[HostPart, ...], Field(strict=False), Tag("<list>")],
    Discriminator(_kind_of_host),
    BeforeValidator(check_host),
]
AutoOrCount = Annotated[Literal["auto"] | Annotated[int, Field(ge=0)], BeforeValidator(auto_or_count)]
Export = Annotated[str, BeforeValidator(check_export), Field(json_schema_extra={"enum": list(EXPORTS)})]
Metric = Annotated[Literal["loss", "perplexity", "exact_match", "json_match", "rouge"], Today(METRICS)]


class _Part(BaseModel):
    """A mapping of the recipe: immutable, no unknown keys, no coercion, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(_Part):
    """The base model."""

    base: Annotated[str, BeforeValidator(check_base)] = Field(
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
    cache: bool = Field(
        default=True,
        description="keep the NF4 form of a base of 1 GB or more in the cache folder (2.1 GiB for "
        "Phi-3-mini), so that later runs need not quantize it again",
    )


@cache  # a plan asks thousands of times
def _trained(targets: str | tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(linear, projections trained in it), in the order of the forward pass."""
    names = phi3.LINEARS if isinstance(targets, str) else targets
    found = [
        (linear, tuple(p for p in phi3.inside(linear) if linear in names or p in names))
        for linear in phi3.LINEARS
    ]
    return tuple((linear, projections) for linear, projections in found if projections)


@cache
def _pairs(targets: str | tuple[str, ...], split: bool) -> tuple[tuple[str, str], ...]:
    return tuple(
        (linear, part)
        for linear, projections in _trained(targets)
        for part in (projections if split and linear in phi3.FUSED else (linear,))
    )


class Adapter(_Part):
    """What is trained."""

    method: Annotated[Method, BeforeValidator(check_method)] = Field(
        default="lora",
        description="lora; rslora: scaled by alpha / sqrt(rank); dora: trains each output's length too; "
        "loftq: lora that starts from what nf4 lost of the weights",
    )
    rank: int = Field(default=16, ge=1, description="rank r of each A/B pair")
    alpha: int = Field(default=32, ge=1, le=1_000_000, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="dropout on the adapter's input while training; embed_tokens', which are ids, have none",
    )
    targets: Targets = Field(
        default="all-linear",
        description="all-linear (of the decoder), or a list out of q k v o gate up down, of the linears that "
        "hold them: qkv_proj o_proj gate_up_proj down_proj, and of embed_tokens lm_head",
    )
    split_fused: bool = Field(
        default=True,
        description="one A/B pair per q, k, v, gate, up instead of one for the fused matrix; "
        "saved as plain PEFT of three or two times the rank",
    )

    init: str | None = Field(
        default=None,
        min_length=1,
        description="adapter to go on from: a folder or file of PEFT's, loralib's or MLX's; a relative path "
        "is as data.train.path's",
    )

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Which of the embedding and the head get an adapter: one each, outside of the layers."""
        names = () if isinstance(self.targets, str) else self.targets
        return tuple(name for name in phi3.EMBEDDINGS if name in names)

    @property
    def trained(self) -> dict[str, tuple[str, ...]]:
        """Linears that get adapters, in the order of the forward pass -> the projections trained in each."""
        return dict(_trained(self.targets))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(linear, part) of every A/B pair in a layer; the part is a projection, or the linear itself."""
        return _pairs(self.targets, self.split_fused)

    @property
    def parts(self) -> tuple[str, ...]:
        """What has an A/B pair: projections and linears in every layer, then the embedding and the head."""
        return (*(part for _, part in self.pairs), *self.embeddings)


class Source(_Part):
    """Where rows come from: a file, a folder of files, or a data set on the hub."""

    path: str = Field(
        min_length=1,
        description="a JSONL, JSON, CSV, Parquet or .txt file or a folder of them, relative to the recipe's "
        "folder or, on the command line, to the current one; or org/name, a data set on the hub "
        "(./org/name: a folder)",
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
        "a row or .txt file, every token trained on. preference: not yet",
    )
    split: str = Field(default="train", min_length=1, description="split of a hub data set")
    subset: str | None = Field(default=None, min_length=1, description="configuration of a hub data set")
    revision: str | None = Field(default=None, min_length=1, description="hub commit or tag of a data set")
    limit: int | None = Field(default=None, ge=1, le=MOST, description="use the first N rows only")
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


def _kind_of_sources(value: Any) -> str:
    if isinstance(value, Fraction) or (isinstance(value, dict) and "fraction" in value):
        return "<fraction>"
    return "<sources>" if isinstance(value, (list, tuple)) else "<source>"


def _kind_of_training_sources(value: Any) -> str:
    return "<sources>" if isinstance(value, (list, tuple)) else "<source>"


OneSource = Annotated[Source, Tag("<source>")]
Sources = Annotated[
    tuple[Source, ...],
    Field(strict=False, json_schema_extra={"minItems": 1}),
    BeforeValidator(check_sources),
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
        default="sft", description="training task; dpo: not yet"
    )
    engine: Literal["auto", "native", "reference"] = Field(
        default="auto",
        description="native: our own layers, forward and backward written out; reference: transformers and "
        "PEFT's layers; auto: native where it is proven, which is on a CPU and without DoRA",
    )
    activations: Literal["auto", "keep", "recompute", "offload"] = Field(
        default="auto",
        description="keep: faster, more memory; recompute: gradient checkpointing; offload: recompute, the "
        "layers' inputs in host memory meanwhile (CUDA); auto: the fastest mix of these that fits",
    )
    kept_layers: AutoOrCount = Field(
        default="auto",
        description="where activations are recomputed or offloaded, so many of the last layers keep theirs; "
        "auto: as many as fit where activations is auto, else none",
    )
    keep_attention: Annotated[Literal["auto"] | bool, BeforeValidator(auto_or_switch)] = Field(
        default="auto",
        description="layers that recompute keep their attention's output (native engine, not with offload); "
        "auto: where activations is auto and it is faster so, else no",
    )
    slice_columns: Annotated[
        Literal["auto", "all"] | Annotated[int, Field(ge=64, multiple_of=64)], BeforeValidator(columns)
    ] = Field(
        default="auto",
        description="columns of the intermediate, and of queries, keys and values, that a layer has at once "
        "where it recomputes (native engine); auto: all, or 2048 where nothing fits otherwise",
    )
    epochs: int = Field(
        default=1, ge=1, le=MOST, description="passes over the training rows, unless max_steps is set"
    )
    max_steps: int | None = Field(
        default=None, ge=1, le=MOST, description="optimizer steps; wins over epochs"
    )
    effective_batch: int = Field(
        default=16,
        ge=1,
        le=100_000,
        description="rows per optimizer step over all processes; never changed behind your back",
    )
    micro_batch: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)], BeforeValidator(auto_or_positive)
    ] = Field(
        default="auto", description="rows of max_length per forward pass; passes per step follow from it"
    )
    logit_tokens: int = Field(
        default=1024,
        ge=1,
        le=MOST,
        description="supervised tokens whose logits exist at once in the loss; fewer take less memory",
    )
    learning_rate: float = Field(default=2.0e-4, gt=0.0, lt=1.0, description="peak learning rate")
    lora_plus_ratio: float | None = Field(
        default=None,
        ge=1.0,
        le=1024.0,
        description="LoRA+: B learns this many times faster than A; 16 is its paper's",
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="after the warm-up"
    )
    warmup: float = Field(
        default=0.03, ge=0.0, le=MOST, description="below 1: fraction of the steps; from 1: steps"
    )
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="decoupled weight decay")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="gradient clipping")
    optimizer: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"] = Field(
        default="paged_adamw_8bit", description="paged: states move to host memory under pressure (CUDA)"
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="seed of adapter init, data order and dropout")
    log_every: int = Field(
        default=1,
        ge=1,
        le=MOST,
        description="steps between lines in metrics.jsonl; a line has the tokens and time of all steps since "
        "the one before, and the mean of their losses",
    )
    eval_every: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="steps between losses on the held-out rows, all of them or "
        f"{SCORED_ROWS} drawn by train.seed",
    )
    save_every: Annotated[int | None, Today((None,))] = Field(
        default=None, description="not yet: steps between verified checkpoints"
    )
    keep_checkpoints: Annotated[int, Today((2,))] = Field(
        default=2, ge=1, description="not yet: newest checkpoints kept"
    )


class Memory(_Part):
    """The memory budget, and what may leave the device for it."""

    budget: Annotated[str, BeforeValidator(auto_or_size)] = Field(
        default="auto",
        description="auto: what is free now; or 8GiB, of the device, and no more is taken",
        json_schema_extra=size_schema,
    )
    on_oom: Literal["adapt", "fail"] = Field(
        default="adapt",
        description="out of memory: adapt takes the same rows again with a smaller micro_batch, then with "
        "fewer layers that keep activations, on CUDA then offloading, then with fewer logit_tokens; fail "
        "stops with exit code 4",
    )
    host: Host = Field(
        default="auto",
        description="frozen weights in the computer's memory (CUDA): embedding, looked up there; layers, "
        "whose linears come to the device one layer ahead (native engine); auto: where it does not fit "
        "otherwise, or pays; []: none",
    )


class Evaluate(_Part):
    """Metrics on the held-out rows."""

    metrics: Annotated[tuple[Metric, ...], Field(strict=False)] = Field(
        default=("loss",), description="out of loss, perplexity, exact_match, json_match; rouge: not yet"
    )
    samples: int = Field(
        default=32,
        ge=1,
        le=MOST,
        description="held-out rows that are answered, drawn by train.seed, where a metric compares answers; "
        f"else up to {SHOWN_ANSWERS} are, to be looked at. The loss is of all rows",
    )
    max_new_tokens: int = Field(
        default=128, ge=1, le=131_072, description="longest generated answer in tokens"
    )
    compare_base: bool = Field(default=True, description="measure the base model too, before training")

    @property
    def compares_answers(self) -> bool:
        """Whether a metric needs answers; else they are made for people to look at."""
        return bool(set(GENERATION_METRICS) & set(self.metrics))

    @property
    def num_answered(self) -> int:
        """The most held-out rows that are answered."""
        return self.samples if self.compares_answers else max(3, min(self.samples, SHOWN_ANSWERS))


class Recipe(_Part):
    """A fine-tuning run of one Phi-3 model."""

    version: Annotated[Literal[1], BeforeValidator(check_version)] = Field(description="format of this file")
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80, description="names the run's folder"
    )
    description: str = Field(default="", description="one line: what it is for")
    model: Model = Field(default=Model(), description="the base model")
    adapter: Adapter = Field(default=Adapter(), description="what is trained")
    data: Data = Field(description="what it is trained on")
    train: Train = Field(default=Train(), description="how it is trained")
    memory: Memory = Field(default=Memory(), description="the memory budget, and what leaves the device")
    evaluate: Evaluate = Field(default=Evaluate(), description="metrics on the held-out rows")
    export: Annotated[tuple[Export, ...], Field(strict=False)] = Field(
        default=("adapter",),
        description="what to write for other programs when the run is done, into its folder exports/: "
        "merged, gguf:q8_0 and other kinds, gguf-lora, ollama, mlx, loralib, vllm; the PEFT adapter is "
        "always written",
    )
    track: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...],
        Field(strict=False),
        Today(((),), "Every logged step is in the run folder's metrics.jsonl."),
    ] = Field(default=(), description="not yet: experiment trackers")

    def settled(self, *, host: tuple[HostPart, ...] | None = None, **chosen: Any) -> Recipe:
        """The same recipe with keys of `train`, and `memory.host`, replaced by what was chosen, so that it
        repeats anywhere."""
        found = self.model_copy(update={"train": self.train.model_copy(update=chosen)})
        if host is None:
            return found
        return found.model_copy(update={"memory": self.memory.model_copy(update={"host": host})})
