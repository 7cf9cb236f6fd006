"""Adapters as strangers bring them, from every tool and in every state: each is merged right, or refused with
what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import attempt, check_refused
from export_models import checkpoint
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

PREFIX = "base_model.model."
VOCAB = 414
SHAPES = {
    "qkv_proj": (192, 64), "o_proj": (64, 64), "gate_up_proj": (256, 64), "down_proj": (64, 128),
    "q_proj": (64, 64), "k_proj": (64, 64), "v_proj": (64, 64), "gate_proj": (128, 64), "up_proj": (128, 64),
}  # fmt: skip
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITHIN = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 64), "v_proj": ("qkv_proj", 128)}
WITHIN |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 128)}

MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": FUSED}
PEFT_0_3 = {
    "auto_mapping": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
    "modules_to_save": None,
    "init_lora_weights": True, "lora_dropout": 0.05, "enable_lora": None, "merge_weights": False,
    "layers_pattern": None, "layers_to_transform": None, "revision": None, "task_type": "CAUSAL_LM",
}  # fmt: skip
PEFT_0_21 = PEFT_0_3 | {
    "peft_version": "0.21.2", "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False,
    "loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core", "qalora_group_size": 16,
    "eva_config": None, "exclude_modules": None, "trainable_token_indices": None, "target_parameters": None,
    "corda_config": None, "lora_bias": False, "use_qalora": False, "ensure_weight_tying": False,
}  # fmt: skip


def path_of(layer: int, name: str) -> str:
    block = "self_attn" if name in ("qkv_proj", "o_proj", *LLAMA[:3]) else "mlp"
    return f"model.layers.{layer}.{block}.{name}"


def pairs(names: list[str] = FUSED, layers: tuple[int, ...] = (0, 1), rank: int = 4) -> Tensors:
    """A and B by PEFT's keys."""
    draw, found = torch.Generator().manual_seed(7), Tensors()
    for layer in layers:
        for name in names:
            (rows, columns), key = SHAPES[name], f"{PREFIX}{path_of(layer, name)}.lora_"
            found[f"{key}A.weight"] = torch.randn(rank, columns, generator=draw) * 0.2
            found[f"{key}B.weight"] = torch.randn(rows, rank, generator=draw) * 0.2
    return found


def renamed(change: Callable[[str], str], tensors: Tensors | None = None) -> Tensors:
    return {change(key): tensor for key, tensor in (tensors or pairs()).items()}


@dataclass
class Adapter:
    """An adapter of somebody's. `scale`: of the update that is expected, of all or by the linear's name;
    `told`: what it is refused with. `spoil` is done to the folder when all is written."""

    tensors: Tensors = field(default_factory=pairs)
    config: dict[str, Any] = field(default_factory=dict)
    scale: float | dict[str, float] = 2.0
    told: tuple[str, ...] = ()
    spoil: Callable[[Path, Path], object] = lambda folder, base: None

    def write(self, folder: Path, base: Path) -> None:
        folder.mkdir(parents=True)
        if self.tensors:
            whole = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
            save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = MINIMAL | {"base_model_name_or_path": str(base)} | self.config
        (folder / "adapter_config.json").write_text(json.dumps(config))
        self.spoil(folder, base)


def whole_head(folder: Path, base: Path, change: Callable[[Any], Any] = lambda weight: weight) -> None:
    """PEFT saves embedding and head beside an adapter of theirs, and where it takes them for trained."""
    path, own = folder / "adapter_model.safetensors", load_file(base / "model.safetensors")
    more = {f"{PREFIX}lm_head.base_layer.weight": change(own["lm_head.weight"])}
    more[f"{PREFIX}model.embed_tokens.weight"] = own["model.embed_tokens.weight"]
    save_file(load_file(path) | more, path, metadata={"format": "pt"})


def as_snapshot(folder: Path, base: Path) -> None:
    """As the hub's cache keeps it: links to blobs."""
    blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "1f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    (folder / "given").symlink_to(snapshot)


def as_mlx(folder: Path, base: Path) -> None:
    """As `mlx_lm.lora` writes it, which names the base `model`."""
    tensors = load_file(folder / "adapter_model.safetensors")
    turned = {
        key.removeprefix(PREFIX)
        .replace(".lora_A.weight", ".lora_a")
        .replace(".lora_B.weight", ".lora_b"): t.T
        for key, t in tensors.items()
    }
    save_file({key: tensor.contiguous() for key, tensor in turned.items()}, folder / "adapters.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    about = {"fine_tune_type": "lora", "model": str(base), "num_layers": 2, "train": True, "seed": 0}
    about["lora_parameters"] = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def as_loralib(folder: Path, base: Path, told: bool = True) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    plain = {key.removeprefix(PREFIX).removesuffix(".weight"): tensor for key, tensor in tensors.items()}
    torch.save(plain, folder / "lora.pt")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    if told:
        about = {"layout": "loralib", "rank": 4, "alpha": 8, "base": str(base)}
        (folder / "loralib_config.json").write_text(json.dumps(about))


def as_checkpoint(folder: Path, base: Path) -> None:
    """As transformers' Trainer leaves one."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"\x80\x02N.")
    (folder / "trainer_state.json").write_text("{}")


def in_trainer_s(folder: Path, base: Path) -> None:
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir()
        for path in [path for path in folder.iterdir() if path.is_file()]:
            shutil.copy(path, folder / f"checkpoint-{step}")
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.unlink()


def raw(content: bytes) -> Callable[[Path, Path], object]:
    return lambda folder, base: (folder / "adapter_model.safetensors").write_bytes(content)


def cut(folder: Path, base: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def pickled(folder: Path, base: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def whole_model(folder: Path, base: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(base, folder)


def model_as_adapter(folder: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", folder / "adapter_model.safetensors")


def failed_run(folder: Path, base: Path) -> None:
    (folder / "recipe.yaml").write_text("version: 1\n")


def one(value: float) -> Tensors:
    """One number that is none."""
    found = pairs()
    next(iter(found.values()))[0, 0] = value
    return found


FIRST = next(iter(pairs()))
BY_RULE = r"(?:model\.)?layers\.\d+\.(?:mlp|self_attn)\.(qkv|o|gate_up|down)_proj"
UNEVEN = {
    "tensors": pairs(["qkv_proj", "o_proj"], rank=8) | pairs(["gate_up_proj", "down_proj"]),
    "scale": {"qkv_proj": 1.0, "o_proj": 1.0, "gate_up_proj": 4.0, "down_proj": 2.0},
}
LLAMA_8B = {key: torch.zeros(2 * tensor.shape[0], 2 * tensor.shape[1]) for key, tensor in pairs().items()}
MISTRAL = pairs(LLAMA) | {f"{PREFIX}{path_of(0, 'k_proj')}.lora_B.weight": torch.zeros(32, 4)}
DEEP = renamed(lambda key: key.replace("layers.1", "layers.39"))
DORA = pairs() | {f"{PREFIX}{path_of(0, 'o_proj')}.lora_magnitude_vector": torch.ones(64)}
HEAD = {
    f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 64),
    f"{PREFIX}lm_head.lora_B.weight": torch.ones(VOCAB, 4),
}

GOOD = {
    "peft 0.21": Adapter(config=PEFT_0_21),
    "peft 0.3": Adapter(config=PEFT_0_3),
    "peft without a prefix": Adapter(renamed(lambda key: key.removeprefix(PREFIX))),
    "a live model's, named default": Adapter(renamed(lambda key: key.replace(".weight", ".default.weight"))),
    "a live model's, named sql-2": Adapter(renamed(lambda key: key.replace(".weight", ".sql-2.weight"))),
    "compiled": Adapter(renamed(lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."))),
    "of DistributedDataParallel": Adapter(renamed(lambda key: f"module.{key}")),
    "bf16 and fp32": Adapter({key: t.bfloat16() if "A" in key else t for key, t in pairs().items()}),
    "fp16": Adapter({key: tensor.half() for key, tensor in pairs().items()}),
    "fp64": Adapter({key: tensor.double() for key, tensor in pairs().items()}),
    "rslora": Adapter(config={"use_rslora": True}, scale=4.0),
    "patterns as names": Adapter(
        **UNEVEN,
        config={
            "rank_pattern": {"self_attn.qkv_proj": 8, "o_proj": 8},
            "alpha_pattern": {"gate_up_proj": 16},
        },
    ),
    "patterns as expressions": Adapter(
        **UNEVEN,
        config={
            "rank_pattern": {r"layers\.\d+\.self_attn\..*": 8},
            "alpha_pattern": {r".*\.gate_up_proj": 16},
        },
    ),
    "targets by an expression": Adapter(config={"target_modules": BY_RULE}),
    "all linears": Adapter(config={"target_modules": "all-linear"}),
    "one layer": Adapter(pairs(layers=(1,)), {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "one left out": Adapter(pairs(FUSED[:3]), {"exclude_modules": ["down_proj"]}),
    "a head and what PEFT saves with it": Adapter(
        pairs() | HEAD, {"target_modules": [*FUSED, "lm_head"]}, spoil=whole_head
    ),
    "started from a normal distribution": Adapter(config={"init_lora_weights": "gaussian"}),
    "started by EVA": Adapter(config={"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
    "unsloth": Adapter(
        pairs(LLAMA),
        PEFT_0_21
        | {
            "target_modules": LLAMA,
            "auto_mapping": {
                "base_model_class": "Phi3ForCausalLM",
                "parent_library": "transformers",
                "unsloth_fixed": True,
            },
        },
    ),
    "axolotl": Adapter(config=PEFT_0_21 | {"target_modules": [*FUSED, *LLAMA[:3]], "lora_dropout": 0.1}),
    "llama-factory": Adapter(
        pairs(["q_proj", "v_proj"]), PEFT_0_21 | {"target_modules": ["v_proj", "q_proj"]}
    ),
    "torchtune": Adapter(
        pairs(["q_proj", "k_proj", "up_proj"]), {"target_modules": ["q_proj", "k_proj", "up_proj"]}
    ),
    "mlx-lm": Adapter(spoil=as_mlx),
    "loralib": Adapter(spoil=as_loralib),
    "the hub's cache": Adapter(spoil=as_snapshot),
    "a trainer's checkpoint": Adapter(spoil=as_checkpoint),
}

BAD = {
    "dora": Adapter(DORA, {"use_dora": True}, told=("is DoRA's, plain LoRA only",)),
    "dora, not told": Adapter(DORA, told=("lora_magnitude_vector: is DoRA's",)),
    "pissa": Adapter(
        config={"init_lora_weights": "pissa_niter_16"}, told=("pissa_niter_16, which moves the base's",)
    ),
    "olora": Adapter(config={"init_lora_weights": "olora"}, told=("olora, which moves",)),
    "loftq": Adapter(
        config={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, told=("loftq, which",)
    ),
    "a start that is not known": Adapter(
        config={"init_lora_weights": "x\x1b[2J"}, told=("'x\\x1b[2J', which is not",)
    ),
    "biases": Adapter(config={"bias": "lora_only"}, told=("trained biases",)),
    "a whole head": Adapter(config={"modules_to_save": ["lm_head"]}, told=("whole weights beside the LoRA",)),
    "a whole head, not told": Adapter(
        pairs() | {f"{PREFIX}lm_head.modules_to_save.weight": torch.ones(VOCAB, 64)}, told=("not a LoRA",)
    ),
    "a trained head": Adapter(
        spoil=lambda f, b: whole_head(f, b, lambda w: w + 1), told=("or it was trained",)
    ),
    "more words": Adapter(
        spoil=lambda f, b: whole_head(f, b, lambda w: torch.cat([w, w[:8]])),
        told=("its vocabulary was resized",),
    ),
    "ia3": Adapter(
        {f"{PREFIX}{path_of(0, 'down_proj')}.ia3_l": torch.ones(1, 128)},
        {"peft_type": "IA3"},
        told=("is an IA3 adapter's",),
    ),
    "prefix tuning": Adapter(
        {"prompt_embeddings": torch.ones(8, 64)}, {"peft_type": "PREFIX_TUNING"}, told=("is prompt tuning's",)
    ),
    "vera": Adapter(
        {"base_model.vera_A": torch.ones(4, 64)}, {"peft_type": "VERA"}, told=("is a VeRA adapter's",)
    ),
    "loha": Adapter(
        {f"{PREFIX}{path_of(0, 'o_proj')}.hada_w1_a": torch.ones(64, 4)},
        {"peft_type": "LOHA"},
        told=("is a LoHa adapter's",),
    ),
    "another kind in LoRA's names": Adapter(config={"peft_type": "XLORA"}, told=("'XLORA', not LORA",)),
    "parameters": Adapter(config={"target_parameters": ["a.b"]}, told=("adapted parameters",)),
    "a key of tomorrow": Adapter(
        config={"use_tomorrow": True}, told=("sets 'use_tomorrow', of which nothing",)
    ),
    "an expression without end": Adapter(
        config={"rank_pattern": {"(.*)*x": 4}}, told=("regular expression",)
    ),
    "an alpha without end": Adapter(
        config={"lora_alpha": 10**400}, told=("adapter_config.json: lora_alpha is 1000",)
    ),
    "more than its config": Adapter(
        config={"target_modules": ["o_proj"]}, told=("which adapter_config.json does not choose",)
    ),
    "more layers than its config": Adapter(
        config={"layers_to_transform": [0]}, told=("tensors for model.layers.1",)
    ),
    "less than its config": Adapter(
        pairs(FUSED[:3]), told=("has no tensors for model.layers.0.mlp.down_proj",)
    ),
    "half a pair": Adapter({k: t for k, t in pairs().items() if k != FIRST}, told=(f"{FIRST}: is missing",)),
    "two of them": Adapter(
        renamed(lambda k: k.replace(".weight", ".a.weight"))
        | renamed(lambda k: k.replace(".weight", ".b.weight")),
        told=("holds several adapters: 'a', 'b'",),
    ),
    "int8": Adapter(
        {key: tensor.char() for key, tensor in pairs().items()}, told=("its tensors are of int8",)
    ),
    "not a number": Adapter(one(float("nan")), told=(f"{FIRST}: holds NaN",)),
    "infinite": Adapter(one(float("inf")), told=(f"{FIRST}: holds NaN or infinity",)),
    "llama's sizes": Adapter(LLAMA_8B, told=("do not fit a linear of 64 to 192",)),
    "mistral's keys and values": Adapter(
        MISTRAL, {"target_modules": LLAMA}, told=("k_proj: A (4, 64) and B (32, 4)",)
    ),
    "more layers": Adapter(DEEP, told=("layer 39 of a base with 2 layers",)),
    "torchtune's own names": Adapter(
        {"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 64)}, told=("torchtune's",)
    ),
    "a whole model": Adapter(spoil=whole_model, told=("holds a whole model, not an adapter",)),
    "a whole model as one": Adapter(
        spoil=model_as_adapter, told=("lm_head.weight: is a whole weight of a model",)
    ),
    "a trainer's folder": Adapter(spoil=in_trainer_s, told=("checkpoint-20 in it does", "checkpoint-20.")),
    "a failed run": Adapter(spoil=failed_run, told=("is a run without an adapter",)),
    "pickled": Adapter(spoil=pickled, told=("adapter_model.bin: is a pickle, which can run code",)),
    "loralib without an alpha": Adapter(
        spoil=lambda f, b: as_loralib(f, b, told=False), told=("loralib_config.json",)
    ),
    "cut short": Adapter(spoil=cut, told=("is cut short",)),
    "of no bytes": Adapter(spoil=raw(b""), told=("is cut short",)),
    "a pointer": Adapter(
        spoil=raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        told=("a pointer of Git LFS", "git lfs pull"),
    ),
    "a web page": Adapter(spoil=raw(b"<!doctype html><title>404</title>"), told=("is a web page",)),
    "of no tensors": Adapter(
        spoil=lambda f, b: save_file({}, f / "adapter_model.safetensors"), told=("no tensors",)
    ),
    "a link to somewhere": Adapter(
        spoil=lambda f, b: (
            (f / "adapter_model.safetensors").unlink(),
            (f / "adapter_model.safetensors").symlink_to(b / "model.safetensors"),
        ),
        told=("is a link out of its folder",),
    ),
    "on no base": Adapter(config={"base_model_name_or_path": None}, told=("do not name the base",)),
    "on a base that is gone": Adapter(
        config={"base_model_name_or_path": "/no/wh\x1bere"}, told=("/no/wh\\x1bere",)
    ),
    "on half a letter": Adapter(
        config={"base_model_name_or_path": "org/\ud800"},
        told=("'org/\\ud800' as its base, which is no name",),
    ),
    "on a llama": Adapter(
        config={"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, told=("of another family",)
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("strangers") / "base", "mini")


def export(folder: Path) -> Any:
    place = folder / "given" if (folder / "given").exists() else folder
    how = ("--to", "merged", "--merge-base", "original", "--no-gate", "--out", folder.parent / "merged")
    return attempt("export", place, *how, cwd=folder.parent)


@pytest.mark.parametrize("name", GOOD)
def test_it_is_merged(base: Path, tmp_path: Path, name: str) -> None:
    given = GOOD[name]
    given.write(tmp_path / "adapter", base)
    done = export(tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(base / "model.safetensors")
    for key in [key for key in given.tensors if "lora_A" in key]:
        linear = key.partition(".lora_A")[0].rpartition(".")[2]
        whole, at = WITHIN.get(linear, (linear, 0))
        layer = f"model.layers.{key.partition('layers.')[2][:1]}."
        scale = given.scale if isinstance(given.scale, float) else given.scale[linear]
        update = scale * given.tensors[key.replace("lora_A", "lora_B")].float() @ given.tensors[key].float()
        (weight,) = [
            w
            for n, w in expected.items()
            if n.endswith(f"{whole}.weight") and (layer in n or linear == "lm_head")
        ]
        weight[at : at + len(update)] += update
    for key, weight in expected.items():
        torch.testing.assert_close(found[key].float(), weight.float(), atol=2e-2, rtol=2e-2, msg=key)


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    given = BAD[name]
    given.write(tmp_path / "adapter", base)
    check_refused(export(tmp_path / "adapter"), *given.told)
    assert not (tmp_path / "merged").exists()
