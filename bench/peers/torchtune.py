"""torchtune's own single-device QLoRA: its recipe `lora_finetune_single_device` with its Phi-3 config.

Only the config is changed, and the recipe's extension points used: a data set of the given rows, a logger
that notes the time. torchtune has no fused linears: it trains an A and B for each of q, k, v, gate and up, so
that more is trained at the same rank. torchtune 0.6.1 wants a torchao of its time: with torch 2.13, 0.10.
"""

from __future__ import annotations

import json
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import probe

LIBRARIES = ("torch", "torchtune", "torchao", "bitsandbytes")
CONFIG = "phi3/mini_qlora_single_device"
PAD = 0


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    made = recipe_class()
    speed = probe.matmul_flops_per_second(job["device"], "bfloat16")
    stock = OmegaConf.load(_recipes() / "configs" / f"{CONFIG}.yaml")
    config = OmegaConf.create({**OmegaConf.to_container(stock), **changed(job)})
    phases, fed = probe.Phases(job["device"]), probe.Fed()
    with phases.phase("load"):
        recipe = made(cfg=config)
        recipe.setup(cfg=config)
    with phases.phase("attach"):
        logger = _watched(recipe, fed, job["effective_batch"] // job["micro_batch"])
    with phases.phase("train"):
        start = time.perf_counter()
        recipe.train()
    ends = [start, *(end for end, _ in logger.lines)]
    return {
        "losses": [loss for _, loss in logger.lines],
        "step_seconds": [round(b - a, 5) for a, b in pairwise(ends)],
        **fed.to_json(),
        **phases.to_json(),
        "linear_bytes": probe.linear_bytes(recipe._model),
        "trained_parameters": probe.trained_parameters(recipe._model),
        "adapter_dtype": probe.adapter_dtype(recipe._model),
        "matmul_flops_per_second": speed,
    }


def recipe_class() -> Any:
    """The recipe of the file that `tune run` would run: torchtune's recipes are files, not a package."""
    from runpy import run_path

    return run_path(str(_recipes() / "lora_finetune_single_device.py"))["LoRAFinetuneRecipeSingleDevice"]


def _recipes() -> Path:
    import torchtune

    return Path(torchtune.__file__).parent.parent / "recipes"


def changed(job: dict[str, Any]) -> dict[str, Any]:
    """Keys of its config that are not as torchtune ships them, each whole."""
    sizes = json.loads((Path(job["base"]) / "config.json").read_text(encoding="utf-8"))
    here, out = "bench.peers.torchtune", str(Path(job["folder"]) / "out")
    return {
        "output_dir": out,
        "model": {
            "_component_": "torchtune.models.phi3._component_builders.lora_phi3",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "lora_rank": job["rank"],
            "lora_alpha": job["alpha"],
            "apply_lora_to_mlp": True,
            "quantize_base": True,
            "vocab_size": sizes["vocab_size"],
            "num_layers": sizes["num_hidden_layers"],
            "num_heads": sizes["num_attention_heads"],
            "num_kv_heads": sizes["num_key_value_heads"],
            "embed_dim": sizes["hidden_size"],
            "intermediate_dim": sizes["intermediate_size"],
            "max_seq_len": sizes["max_position_embeddings"],
            "norm_eps": sizes["rms_norm_eps"],
            "rope_base": int((sizes.get("rope_parameters") or sizes).get("rope_theta", 10_000)),
        },
        "tokenizer": {"_component_": f"{here}.Pads"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "model_type": "PHI3_MINI",
            "recipe_checkpoint": None,
            "checkpoint_dir": str(checkpoint(Path(job["base"]), Path(job["folder"]))),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": out,
        },
        "dataset": {"_component_": f"{here}.Rows", "path": job["stream"]},
        "seed": job["seed"],
        "shuffle": False,  # the rows are in the common order already
        "batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["effective_batch"] // job["micro_batch"],
        "optimizer": {
            "_component_": "bitsandbytes.optim.PagedAdamW8bit",
            "weight_decay": 0.0,
            "lr": job["learning_rate"],
        },
        "lr_scheduler": {"_component_": f"{here}.constant"},
        "clip_grad_norm": job["max_grad_norm"],
        "device": job["device"],
        "enable_activation_checkpointing": job["activations"] == "recompute",
        "metric_logger": {"_component_": f"{here}.Logger"},
        "log_peak_memory_stats": job["device"] == "cuda",
    }


def checkpoint(base: Path, folder: Path) -> Path:
    """The checkpoint in one file, and with a head of its own: torchtune's Phi-3 has no tied one."""
    from safetensors.torch import load_file, save_file

    made = folder / "base"
    made.mkdir()
    tensors = {
        key: value for file in sorted(base.glob("*.safetensors")) for key, value in load_file(file).items()
    }
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    shutil.copy(base / "config.json", made)
    return made


def _watched(recipe: Any, fed: probe.Fed, passes: int) -> Any:
    """Note every pass' tokens; nothing is saved at the end. Returns its logger."""
    step, seen = recipe._loss_step, []

    def noted(batch: dict[str, Any]) -> Any:
        if len(seen) % passes == 0:
            fed.begin()
        seen.append(1)
        tokens, labels = batch["tokens"], batch["labels"]
        kept = (tokens != PAD).flip(1).cumsum(1).flip(1) > 0  # pads are what follows the last token
        fed.padded(tokens, labels.clone(), kept)
        return step(batch)

    recipe._loss_step, recipe.save_checkpoint = noted, lambda epoch: None
    return recipe._metric_logger


# --- components that its config names


class Pads:
    """In the place of a tokenizer: the rows are tokens already, and only padding is asked for."""

    pad_id = PAD


class Rows:
    """The stream in its order."""

    def __init__(self, tokenizer: Any, path: str) -> None:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        self._rows = [content["rows"][i] for i in content["order"]]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        ids, labels = self._rows[at]
        return {"tokens": ids, "labels": labels}


class Logger:
    """When each step was logged, and its loss."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, float]] = []

    def log_dict(self, payload: Any, step: int) -> None:
        self.lines.append((time.perf_counter(), float(payload["loss"])))

    def log(self, name: str, data: Any, step: int) -> None:
        pass

    def log_config(self, config: Any) -> None:
        pass

    def close(self) -> None:
        pass


def constant(optimizer: Any, num_training_steps: int = 0, last_epoch: int = -1, **other: Any) -> Any:
    """A learning rate that stays; torchtune's own schedules all fall."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, lambda step: 1.0, last_epoch)
