"""LLaMA-Factory by its documented keys: what `llamafactory-cli train config.yaml` does with a tokenized set.

Written from its public documentation and not run here. One function loads, attaches and trains, so that every
phase's bytes and seconds are those of all three.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import probe

LIBRARIES = ("torch", "llamafactory", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from llamafactory.train.tuner import run_exp

    from bench.peers.transformers_loop import Kept

    speed = probe.matmul_flops_per_second(job["device"], "bfloat16")
    phases, watch = probe.Phases(job["device"]), Kept(job["device"])
    settings = keys(job)
    with phases.phase("load"), phases.phase("attach"), phases.phase("train"):
        run_exp(settings, callbacks=[watch])
    return {**watch.to_json(), **phases.to_json(), "matmul_flops_per_second": speed}


def keys(job: dict[str, Any]) -> dict[str, Any]:
    """Its keys for the job; writes the rows as it keeps tokenized ones."""
    from datasets import DatasetDict

    from bench.peers.trl import dataset

    made = Path(job["folder"]) / "tokenized"
    rows = dataset(job)
    masks = [[1] * len(ids) for ids in rows["input_ids"]]
    DatasetDict({"train": rows.add_column("attention_mask", masks)}).save_to_disk(str(made))
    return {
        "model_name_or_path": job["base"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": job["rank"],
        "lora_alpha": job["alpha"],
        "lora_dropout": 0.0,
        "quantization_method": "bnb",
        "quantization_bit": 4,
        "double_quantization": True,
        "template": "phi",
        "tokenized_path": str(made),
        "cutoff_len": job["max_length"],
        "output_dir": str(Path(job["folder"]) / "out"),
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["effective_batch"] // job["micro_batch"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": job["max_grad_norm"],
        "optim": job["optimizer"],
        "bf16": True,
        "disable_gradient_checkpointing": job["activations"] == "keep",
        "seed": job["seed"],
        "data_seed": job["data_seed"],
        "use_cpu": job["device"] == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
