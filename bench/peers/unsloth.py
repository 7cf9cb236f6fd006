"""Unsloth by its documented interface: FastLanguageModel around TRL's SFTTrainer.

Written from its public documentation and not run here: it needs a GPU. Its own checkpointing is what its
documentation advises for `recompute`.
"""

from __future__ import annotations

from typing import Any

from bench import probe

LIBRARIES = ("torch", "unsloth", "transformers", "trl", "peft", "bitsandbytes", "accelerate")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Its models have no fused linears."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # before the libraries that it changes

    from trl import SFTTrainer  # isort: skip

    from bench.peers.transformers_loop import Watch
    from bench.peers.trl import arguments, dataset

    speed = probe.matmul_flops_per_second(job["device"], "bfloat16")
    phases, watch = probe.Phases(job["device"]), Watch(job["device"])
    with phases.phase("load"):
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=job["base"], max_seq_length=job["max_length"], dtype=None, load_in_4bit=True
        )
    with phases.phase("attach"):
        model = FastLanguageModel.get_peft_model(
            model,
            r=job["rank"],
            lora_alpha=job["alpha"],
            lora_dropout=0,
            bias="none",
            target_modules=list(TARGETS),
            use_gradient_checkpointing="unsloth" if job["activations"] == "recompute" else False,
            random_state=job["seed"],
        )
        trainer = SFTTrainer(
            model=model,
            args=arguments(job),
            train_dataset=dataset(job),
            processing_class=tokenizer,
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
