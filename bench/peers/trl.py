"""Vanilla TRL + PEFT + bitsandbytes QLoRA: SFTTrainer as TRL 1.16's own documentation sets it up.

Nothing is overridden. From the libraries' documentation: NF4 with double quantization and bf16 compute, LoRA
on all linears, bf16, non-reentrant checkpointing, paged 8-bit AdamW. What TRL then does by itself stays:
adapters in bfloat16 (it casts those of quantized models), its fused head loss, padded passes (padding-free
needs FlashAttention), and no `prepare_model_for_kbit_training`, which SFTTrainer 1.16 does not call. The rows
come tokenized and labelled, so that nobody's chat template decides what is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import probe

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, attach and train as the job says; the keys of a result."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTTrainer

    from bench.peers.transformers_loop import Watch

    speed = probe.matmul_flops_per_second(job["device"], "bfloat16")
    phases, watch = probe.Phases(job["device"]), Watch(job["device"])
    with phases.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(
            job["base"],
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            dtype=torch.bfloat16,
            device_map={"": job["device"]},
        )
        tokenizer = AutoTokenizer.from_pretrained(job["base"])
    with phases.phase("attach"):
        trainer = SFTTrainer(
            model=model,
            args=arguments(job),
            train_dataset=dataset(job),
            processing_class=tokenizer,
            peft_config=lora(job),
            callbacks=[watch],
        )
    with phases.phase("train"):
        trainer.train()
    return {
        **watch.to_json(),
        **phases.to_json(),
        "linear_bytes": probe.linear_bytes(trainer.model),
        "trained_parameters": probe.trained_parameters(trainer.model),
        "adapter_dtype": probe.adapter_dtype(trainer.model),
        "matmul_flops_per_second": speed,
    }


def lora(job: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def arguments(job: dict[str, Any]) -> Any:
    """The seed starts the adapters; the order of the rows has a seed of its own, equal for all methods."""
    from trl import SFTConfig

    recompute = job["activations"] == "recompute"
    return SFTConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["effective_batch"] // job["micro_batch"],
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=job["max_grad_norm"],
        weight_decay=0.0,
        optim=job["optimizer"],
        bf16=True,
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        seed=job["seed"],
        data_seed=job["data_seed"],
        use_cpu=job["device"] == "cpu",
        max_length=None,  # the rows are no longer than --max-length already
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def dataset(job: dict[str, Any]) -> Any:
    from datasets import Dataset

    rows = json.loads(Path(job["stream"]).read_text(encoding="utf-8"))["rows"]
    return Dataset.from_dict(
        {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    )
