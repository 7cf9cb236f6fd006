"""Axolotl by its documented keys: what `axolotl train config.yaml` does with pre-tokenized rows.

Written from its public documentation and not run here. One function loads, attaches and trains, so that every
phase's bytes and seconds are those of all three. Its LoRA kernels are left off: they refuse Phi-3's fused
attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import probe

LIBRARIES = ("torch", "axolotl", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    speed = probe.matmul_flops_per_second(job["device"], "bfloat16")
    phases = probe.Phases(job["device"])
    config = Path(job["folder"]) / "config.yaml"
    config.write_text(json.dumps(keys(job)), encoding="utf-8")  # JSON is YAML
    with phases.phase("load"), phases.phase("attach"), phases.phase("train"):
        cfg = load_cfg(str(config))
        train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    from bench.peers.axolotl_watch import WATCHES

    return {**WATCHES[-1].to_json(), **phases.to_json(), "matmul_flops_per_second": speed}


def keys(job: dict[str, Any]) -> dict[str, Any]:
    """Its keys for the job; writes the rows as a JSON file of tokens."""
    content = json.loads(Path(job["stream"]).read_text(encoding="utf-8"))
    rows = Path(job["folder"]) / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for ids, labels in content["rows"]:
            row = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            file.write(json.dumps(row) + "\n")
    return {
        "base_model": job["base"],
        "plugins": ["bench.peers.axolotl_watch.WatchPlugin"],
        "load_in_4bit": True,
        "adapter": "qlora",
        "lora_r": job["rank"],
        "lora_alpha": job["alpha"],
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "datasets": [{"path": str(rows), "ds_type": "json", "type": None}],
        "sequence_len": job["max_length"],
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "output_dir": str(Path(job["folder"]) / "out"),
        "dataset_prepared_path": str(Path(job["folder"]) / "prepared"),
        "micro_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["effective_batch"] // job["micro_batch"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler": "constant",
        "max_grad_norm": job["max_grad_norm"],
        "weight_decay": 0.0,
        "optimizer": job["optimizer"],
        "bf16": True,
        "gradient_checkpointing": job["activations"] == "recompute",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": job["seed"],
        "data_seed": job["data_seed"],
        "logging_steps": 1,
        "save_strategy": "no",
    }
