"""litgpt's own QLoRA: `litgpt finetune_lora --quantize bnb.nf4-dq`, called as its Python function.

litgpt splits q, k, v, gate and up, and has models by name only: the checkpoint is converted by its own
script, as Phi-3-mini or, the built-in model, as the Llama that it was made from. One function loads, attaches
and trains, so that every phase's bytes and seconds are those of all three. Up to its model this has run; the
rest needs a GPU, as litgpt's quantization does.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

from bench import probe

LIBRARIES = ("torch", "litgpt", "lightning", "bitsandbytes")
NAMES = {"builtin": "SmolLM2-135M-Instruct", "phi3-mini": "Phi-3-mini-4k-instruct"}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune.lora import setup
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    if job["model"] not in NAMES:
        raise ValueError(f"litgpt has models by name only, and none called {job['model']}")
    speed = probe.matmul_flops_per_second(job["device"], "bfloat16")
    folder = unfused(job) if job["model"] == "builtin" else linked(job)
    convert_hf_checkpoint(folder, model_name=NAMES[job["model"]], dtype="bfloat16")
    out, phases = Path(job["folder"]) / "out", probe.Phases(job["device"])
    module = data(job)
    with phases.phase("load"), phases.phase("attach"), phases.phase("train"):  # one function does all
        setup(
            checkpoint_dir=folder,
            out_dir=out,
            precision="bf16-true",
            quantize="bnb.nf4-dq",
            lora_r=job["rank"],
            lora_alpha=job["alpha"],
            lora_dropout=0.0,
            lora_key=True,
            lora_projection=True,
            lora_mlp=True,
            data=module,
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=job["effective_batch"],
                micro_batch_size=job["micro_batch"],
                lr_warmup_steps=0,
                epochs=1,
                max_steps=job["steps"],
                max_norm=job["max_grad_norm"],
            ),
            eval=EvalArgs(interval=10**9, max_iters=0, initial_validation=False, final_validation=False),
            optimizer={
                "class_path": "bitsandbytes.optim.PagedAdamW8bit",
                "init_args": {"lr": job["learning_rate"], "weight_decay": 0.0},
            },
            seed=job["seed"],
        )
    return {
        **logged(out, job),
        **module.fed.to_json(),
        **phases.to_json(),
        **saved(out),
        "matmul_flops_per_second": speed,
    }


def saved(out: Path) -> dict[str, Any]:
    """What the adapter it saved has; the function keeps its model to itself."""
    import torch

    tensors = torch.load(out / "final" / "lit_model.pth.lora", weights_only=True)
    trained = [one for name, one in tensors.get("model", tensors).items() if "lora_" in name]
    return {"trained_parameters": sum(one.numel() for one in trained), "linear_bytes": None}


def logged(out: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Losses and seconds of steps from the lines that its CSV logger wrote, one for each pass."""
    [path] = out.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line.get("loss")]
    passes = job["effective_batch"] // job["micro_batch"]
    groups = [lines[at : at + passes] for at in range(0, len(lines), passes)]
    return {
        "losses": [float(group[-1]["loss"]) for group in groups],
        "step_seconds": [sum(float(line["iter_time"]) for line in group) for group in groups],
    }


def data(job: dict[str, Any]) -> Any:
    """The stream as a data module of litgpt's; what its loader takes is noted."""
    from litgpt.data import DataModule
    from litgpt.data.base import get_sft_collate_fn
    from torch.utils.data import DataLoader

    content = json.loads(Path(job["stream"]).read_text(encoding="utf-8"))
    ordered = [content["rows"][i] for i in content["order"]]
    passes = job["effective_batch"] // job["micro_batch"]

    class Rows(DataModule):
        def __init__(self) -> None:
            super().__init__()
            self.fed, self._seen = probe.Fed(), 0

        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: Any = None) -> None:
            self._collate = get_sft_collate_fn(
                max_seq_length=max_seq_length or -1, pad_id=0, ignore_index=-100
            )

        def train_dataloader(self) -> Any:
            return DataLoader(ordered, batch_size=job["micro_batch"], shuffle=False, collate_fn=self._noted)

        def val_dataloader(self) -> Any:
            return DataLoader(ordered[:1], batch_size=1, collate_fn=self._noted)

        def _noted(self, rows: Any) -> Any:
            import torch

            if self._seen % passes == 0:
                self.fed.begin()
            self._seen += 1
            for ids, labels in rows:
                self.fed.padded(torch.tensor([ids]), torch.tensor([labels]), None)
            kind = {"dtype": torch.int64}
            made = [
                {"input_ids": torch.tensor(ids, **kind), "labels": torch.tensor(labels, **kind)}
                | {"token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)}}
                for ids, labels in rows
            ]
            return self._collate(made)

    return Rows()


def linked(job: dict[str, Any]) -> Path:
    """A folder of its own beside the checkpoint, as the conversion writes into it."""
    folder = Path(job["folder"]) / NAMES[job["model"]]
    folder.mkdir()
    for file in Path(job["base"]).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def unfused(job: dict[str, Any]) -> Path:
    """The built-in model under Llama's names: rows of the fused matrices, as they lie in them."""
    import torch
    from safetensors.torch import load_file, save_file

    base, folder = Path(job["base"]), Path(job["folder"]) / NAMES[job["model"]]
    folder.mkdir()
    sizes = json.loads((base / "config.json").read_text(encoding="utf-8"))
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    keys, hidden = sizes["num_key_value_heads"] * head, sizes["hidden_size"]
    blocks = {
        "qkv_proj": (("q_proj", "k_proj", "v_proj"), (hidden, keys, keys)),
        "gate_up_proj": (("gate_proj", "up_proj"), (sizes["intermediate_size"],) * 2),
    }
    made = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        fused = next((one for one in blocks if f".{one}." in name), None)
        if fused is None:
            made[name] = tensor
            continue
        parts, rows = blocks[fused]
        for part, block in zip(parts, torch.split(tensor, list(rows)), strict=True):
            made[name.replace(fused, part)] = block.contiguous()
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    for file in base.glob("*.json"):
        if file.name != "config.json":
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({**sizes, "model_type": "llama"}), encoding="utf-8")
    return folder
