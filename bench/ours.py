"""Our own methods, through the trainer that users run, with nothing but watchers added.

Imported in a worker only, after qlora_phi3.process has prepared it as the command line does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from qlora_phi3 import process

process.quiet()

import torch  # noqa: E402

from qlora_phi3 import adapters, memory, model, settle, trainer, weights  # noqa: E402
from qlora_phi3.data import Split  # noqa: E402
from qlora_phi3.engine import attention  # noqa: E402
from qlora_phi3.engine.documents import Documents  # noqa: E402
from qlora_phi3.meter import Meter  # noqa: E402
from qlora_phi3.progress import Display  # noqa: E402
from qlora_phi3.recipe import Recipe  # noqa: E402

from . import probe, tokens  # noqa: E402
from .peers.transformers_loop import Clock  # noqa: E402

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def recipe(job: dict[str, Any]) -> Recipe:
    """The job as a recipe.

    Fused pairs, so that as much is trained as with PEFT's own LoRA of that rank; no packing, so that a pass
    has as many rows as the others'; and a run that does not fit ends, instead of going on as another one.
    """
    quantization, dtype = {
        "qlora": ("nf4", "bfloat16"),
        "qlora-native": ("nf4", "bfloat16"),
        "lora-bf16": ("none", "bfloat16"),
        "lora-fp32": ("none", "float32"),
    }[job["method"]]
    return Recipe.model_validate(
        {
            "version": 1,
            "name": job["method"],
            "model": {"base": job["base"], "quantization": quantization, "compute_dtype": dtype},
            "adapter": {"rank": job["rank"], "alpha": job["alpha"], "split_fused": False},
            "data": {
                "train": {"path": job["stream"]},
                "max_length": job["max_length"],
                "packing": False,
            },
            "train": {
                "max_steps": job["steps"],
                "effective_batch": job["effective_batch"],
                "micro_batch": job["micro_batch"],
                "activations": job["activations"],
                "engine": "native" if job["method"] == "qlora-native" else "reference",
                "learning_rate": job["learning_rate"],
                "scheduler": "constant",
                "warmup": 0.0,
                "max_grad_norm": job["max_grad_norm"],
                "optimizer": job["optimizer"],
                "seed": job["data_seed"],
            },
            "memory": {"on_oom": "fail"},
        }
    )


def activations(job: dict[str, Any]) -> dict[str, Any]:
    """What `auto` means for all methods: what our plan for this job has, on this device, now."""
    settings, device = recipe(job), torch.device(job["device"])
    geometry, kind = weights.locate(settings.model).geometry, settle.device_kind(device)
    known = tokens.rows(Path(job["stream"])).fullest_step(settings.train.effective_batch)
    usable = memory.usable_bytes(settle.allowed_bytes(settings, device))
    # measure() leaves all weights on the device
    way = memory.Ways(settings.settled(host=()), geometry, known=known, device=kind).fastest(usable)
    return {"activations": way.activations}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, attach and train as the job says; the keys of a result."""
    settings, device, display = recipe(job), torch.device(job["device"]), Display()
    split = Split(tokens.rows(Path(job["stream"])), [], 0)
    checkpoint = weights.locate(settings.model)
    _import_what_loads()
    speed = probe.matmul_flops_per_second(job["device"], settings.model.compute_dtype)
    phases, watch, fed, said = probe.Phases(job["device"]), Clock(job["device"]), probe.Fed(), list[str]()
    with phases.phase("load"):
        base = model.load(checkpoint, settings.model, device, attention.register(), said.append)
    with phases.phase("attach"):
        torch.manual_seed(job["seed"])
        tuned = adapters.attach(base, settings)
    meter, folder = Meter(device.type), Path(job["folder"])
    with phases.phase("train"), meter.phase("train"):
        trainer.train(
            tuned,
            base,
            split,
            settings,
            folder,
            meter=meter,
            display=display,
            built=partial(_watch, watch=watch, fed=fed),
        )
    return {
        **watch.to_json(),
        **fed.to_json(),
        **phases.to_json(),
        "load": [line.split()[0] for line in said],
        "linear_bytes": probe.linear_bytes(tuned),
        "trained_parameters": probe.trained_parameters(tuned),
        "adapter_dtype": probe.adapter_dtype(tuned),
        "matmul_flops_per_second": speed,
    }


def _import_what_loads() -> None:
    """Imports are no part of the load, here as in the peers' adapters."""
    import bitsandbytes  # noqa: F401
    from transformers.models.phi3 import modeling_phi3  # noqa: F401


def _watch(built: Any, watch: Clock, fed: probe.Fed) -> None:
    """Time the steps, and note the documents of every pass that a step makes its gradients of."""
    take, step = built.backward_of, built.training_step

    def noted(model: Any, documents: Documents, num_items: Any) -> Any:
        if fed.begun:  # before the first step a full pass is only measured
            fed.flat(documents.input_ids, documents.labels, documents.bounds)
        return take(model, documents, num_items)

    def begun(*arguments: Any, **named: Any) -> Any:
        fed.begin()
        return step(*arguments, **named)

    built.backward_of, built.training_step = noted, begun
    built.add_callback(watch)
