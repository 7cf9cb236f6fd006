"""fit.py: which cards a recipe fits, how far it can grow there, what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from memory_lab import recipe

from qlora_phi3 import fit, memory, phi3, recipe_file
from qlora_phi3.recipe import Recipe

MINI = phi3.VARIANTS["microsoft/Phi-3-mini-4k-instruct"]
GIB = 1024**3


def shipped(name: str, overrides: Sequence[str] = ()) -> Recipe:
    return recipe_file.load_recipe(recipe_file.find_recipe(name), overrides)


@pytest.mark.parametrize(
    ("keys", "variant", "card"),
    [
        ({}, "builtin:smollm2-135m", 4),
        ({"data__max_length": 1024}, "microsoft/Phi-3-mini-4k-instruct", 4),
        ({"train__micro_batch": 16}, "microsoft/Phi-3-mini-4k-instruct", 10),
        (
            {"train__micro_batch": 16, "train__activations": "recompute"},
            "microsoft/Phi-3-mini-4k-instruct",
            16,
        ),
        ({"model__quantization": "none"}, "microsoft/Phi-3-mini-4k-instruct", 10),
        ({}, "microsoft/phi-4", 10),
        ({"model__quantization": "none"}, "microsoft/phi-4", 32),
        ({"model__quantization": "none", "train__activations": "keep"}, "microsoft/phi-4", 80),
        ({"train__micro_batch": 16, "train__activations": "keep"}, "microsoft/phi-4", None),
    ],
)
def test_smallest_card(keys: dict[str, Any], variant: str, card: int | None) -> None:
    assert fit.smallest_card(recipe(**keys), phi3.VARIANTS[variant]) == card


def test_a_card_says_what_predict_says() -> None:
    settings = recipe()
    plan = memory.predict(settings.settled(activations="offload", host=("embedding",)), MINI, micro_batch=1)
    for gib in fit.SHOWN_GIB:
        found = fit.card(settings, MINI, gib)
        assert found.headroom_bytes == gib * GIB - plan.needed_bytes
        assert found.fits == (found.headroom_bytes >= 0)


@pytest.mark.parametrize("gib", [3, 4, 6, 8])
def test_the_largest_fits_and_the_next_does_not(gib: int) -> None:
    settings = recipe()
    length = fit.largest_length(settings, MINI, gib * GIB)
    micro_batch = fit.largest_micro_batch(settings, MINI, gib * GIB)

    def needs(max_length: int, size: int) -> int:
        least = {"train__micro_batch": size, "train__activations": "offload"}
        changed = recipe(data__max_length=max_length, **least)
        return memory.predict(changed, MINI, micro_batch=size).needed_bytes

    if length is not None:
        assert needs(length, 1) <= gib * GIB
        assert length == 4096 or needs(length + 64, 1) > gib * GIB
    if micro_batch is None:
        assert needs(2048, 1) > gib * GIB
    else:
        assert needs(2048, micro_batch) <= gib * GIB
        assert micro_batch == 16 or needs(2048, 2 * micro_batch) > gib * GIB


@pytest.mark.parametrize("gib", fit.SHOWN_GIB)
def test_what_auto_becomes_on_a_card_fits_it(gib: int) -> None:
    settings = recipe(data__max_length=1024)
    found = fit.card(settings, MINI, gib)
    keys = {"train__activations": found.way.activations, "train__micro_batch": found.way.micro_batch}
    assert (fit.planned(recipe(data__max_length=1024, **keys), MINI).needed_bytes <= gib * GIB) == found.fits


def test_no_change_where_it_fits() -> None:
    assert fit.advise(shipped("phi3-mini-chat-8gb"), MINI, 8 * GIB) == ()


@pytest.mark.parametrize(
    ("overrides", "gib", "first"),
    [
        ([], 3.3, "data.max_length=1024"),
        (["train.micro_batch=4"], 4.5, "train.micro_batch=1"),
        (["train.activations=keep"], 5, "train.activations=recompute"),
        (["train.activations=keep"], 3.5, "train.activations=offload"),
        (["train.activations=recompute"], 3.5, "train.activations=offload"),
        (["memory.host=[]"], 3.5, "memory.host=[embedding]"),
        (["model.quantization=none"], 6, "model.quantization=nf4"),
        (["train.optimizer=adamw_torch"], 3.4, "train.optimizer=paged_adamw_8bit"),
    ],
)
def test_the_smallest_change_comes_first(overrides: list[str], gib: float, first: str) -> None:
    found = fit.advise(shipped("phi3-mini-chat-8gb", overrides), MINI, int(gib * GIB))
    assert found is not None
    assert found[0].override == first


@pytest.mark.parametrize("gib", [3.1, 3.3, 3.6, 4, 6, 9])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.micro_batch=16", "train.activations=keep"],
        ["model.quantization=none", "train.optimizer=paged_adamw_32bit"],
        ["adapter.rank=256", "adapter.targets=[qkv_proj,gate_up_proj]", "data.packing=false"],
        ["model.double_quant=false", "model.compute_dtype=float16"],
    ],
)
def test_a_recipe_changed_as_advised_fits(overrides: list[str], gib: float) -> None:
    room = int(gib * GIB)
    found = fit.advise(shipped("phi3-mini-chat-8gb", overrides), MINI, room)
    assert found is not None
    changed = shipped("phi3-mini-chat-8gb", [*overrides, *(change.override for change in found)])
    assert fit.planned(changed, MINI).needed_bytes <= room
    assert fit.advise(changed, MINI, room) == ()
    if found:
        assert found[-1].needed_bytes == fit.planned(changed, MINI).needed_bytes
    for left_out in found if len(found) > 1 else ():
        fewer = [c.override for c in found if c is not left_out]
        assert fit.planned(shipped("phi3-mini-chat-8gb", [*overrides, *fewer]), MINI).needed_bytes > room


def test_nothing_helps_where_the_weights_alone_do_not_fit() -> None:
    assert fit.advise(recipe(), MINI, 2 * GIB) is None
