"""Tiny bases, each read from its checkpoint once a process and given out as copies."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from qlora_phi3.model import Base, load
from qlora_phi3.recipe import Model
from qlora_phi3.weights import locate


@lru_cache(maxsize=16)
def _loaded(settings: Model, attention: str) -> Base:
    return load(locate(settings), settings, torch.device("cpu"), attention)


def load_base(
    folder: Path, quantization: str = "nf4", dtype: str = "bfloat16", attention: str = "sdpa"
) -> Base:
    """What `model.load` makes of a checkpoint that no test changes; the caller may change what it gets."""
    settings = Model(base=str(folder), quantization=quantization, compute_dtype=dtype)
    base = _loaded(settings, attention)
    model, tokenizer = copy.deepcopy((base.model, base.tokenizer))
    return replace(base, model=model, tokenizer=tokenizer)
