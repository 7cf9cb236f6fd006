"""What other trainers call our keys and values: names that people bring along from their recipes.

Owns the table for messages alone: no other name is ever accepted. Of transformers, PEFT, TRL, axolotl,
LLaMA-Factory, torchtune and Unsloth.
"""

from __future__ import annotations

from typing import Final

_BATCH: Final = "train.effective_batch (rows a step) or train.micro_batch (rows a pass)"
_NAMES: Final[dict[str, str]] = {
    "model.base": "model_name model_name_or_path base_model model_id "
    "pretrained_model_name_or_path model_path",
    "model.quantization": "load_in_4bit load_in_8bit quantization_bit quantize bnb_4bit_quant_type qlora",
    "model.double_quant": "bnb_4bit_use_double_quant double_quantization use_double_quant",
    "model.compute_dtype": "bf16 fp16 torch_dtype dtype bnb_4bit_compute_dtype mixed_precision precision",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target lora_target_modules lora_target_linear lora_attn_modules",
    "adapter.method": "use_rslora use_dora peft_type adapter_type lora_type",
    "adapter.init": "lora_model_dir adapter_path adapter_name_or_path init_lora_weights resume_adapter",
    "data.train.path": "datasets dataset dataset_name dataset_path train_file train_data data_path "
    "data_files training_data training_file",
    "data.train.format": "dataset_format",
    "data.train.limit": "max_samples max_train_samples",
    "data.eval.path": "eval_file eval_data eval_dataset validation_file validation_data val_file val_data "
    "test_file test_datasets eval_path",
    "data.eval.fraction": "val_set_size val_size test_size validation_split eval_split_ratio",
    "data.max_length": "max_seq_length max_seq_len sequence_len sequence_length seq_len seq_length "
    "cutoff_len max_len model_max_length context_length block_size",
    "data.packing": "sample_packing pack packed pack_sequences",
    "data.loss_on": "train_on_inputs assistant_only_loss completion_only_loss train_on_responses_only "
    "train_on_prompt",
    "train.epochs": "num_train_epochs num_epochs n_epochs",
    "train.max_steps": "max_train_steps num_steps num_train_steps steps iters",
    "train.effective_batch": "total_batch_size global_batch_size",
    "train.micro_batch": "per_device_train_batch_size micro_batch_size train_batch_size device_batch_size",
    "train.learning_rate": "lr learning_rate_init max_lr peak_lr",
    "train.scheduler": "lr_scheduler_type lr_scheduler lr_schedule",
    "train.warmup": "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps",
    "train.optimizer": "optim",
    "train.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm gradient_clip_val",
    "train.log_every": "logging_steps log_interval log_every_n_steps",
    "train.eval_every": "eval_steps evals_per_epoch eval_interval",
    "train.save_every": "save_steps saves_per_epoch save_interval checkpointing_steps",
    "train.keep_checkpoints": "save_total_limit",
    "train.seed": "random_seed data_seed random_state",
    "train.lora_plus_ratio": "loraplus_lr_ratio lora_plus loraplus_ratio",
    "train.activations": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing "
    "enable_activation_checkpointing",
    "train.task": "stage rl trainer_type",
    "memory.budget": "vram max_memory gpu_memory_limit",
    "track": "report_to wandb wandb_project use_wandb logger",
    "name": "run_name experiment_name",
}
ALIASES: Final = {alias: key for key, names in _NAMES.items() for alias in names.split()}
"""Name elsewhere -> our dotted key."""

SENTENCES: Final = {
    "batch_size": f"Here that is {_BATCH}.",
    "gradient_accumulation_steps": "Here train.effective_batch has the rows of a whole step, in passes of "
    "train.micro_batch.",
    "output_dir": "It is --out DIR on the command line.",
    "push_to_hub": "`export RUN --to hub` does it, once a run is done.",
    "trust_remote_code": "A checkpoint's code never runs: remove it.",
    "deepspeed": "A run takes one GPU: remove it.",
    "attn_implementation": "It is chosen by itself: remove it.",
}
for _like, _names in {
    "batch_size": "batch bs batchsize",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation grad_accumulation_steps",
    "output_dir": "output out out_dir output_path save_dir",
    "push_to_hub": "hub_model_id hub_token",
    "deepspeed": "fsdp ddp num_gpus devices world_size tensor_parallel",
    "attn_implementation": "flash_attention use_flash_attention flash_attn xformers_attention sdp_attention",
}.items():
    SENTENCES |= dict.fromkeys(_names.split(), SENTENCES[_like])  # type: ignore[misc]  # a table being made

VALUES: Final = {
    **dict.fromkeys(("accuracy", "acc", "em", "exact", "f1"), "exact_match"),
    **dict.fromkeys(("ppl", "eval_loss"), "perplexity"),
    **dict.fromkeys(("json", "valid_json", "json_valid"), "json_match"),
    **dict.fromkeys(("fp16", "half"), "float16"),
    **dict.fromkeys(("fp32", "float"), "float32"),
    **dict.fromkeys(("4bit", "4-bit", "int4", "qlora", "bnb"), "nf4"),
    **dict.fromkeys(("completion", "instruction", "prompt_completion"), "prompt-completion"),
    "gguf": "gguf:q8_0",
    "hf": "merged",
    **dict.fromkeys(("chatml", "openai", "chat", "conversation"), "messages"),
    **dict.fromkeys(("adamw", "adamw_hf", "adamw_torch_fused"), "adamw_torch"),
}
"""Value elsewhere -> ours, where a key takes that."""
