"""memory.py: what is in memory together in each phase, and the micro batch that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from memory_lab import recipe

from qlora_phi3 import memory, phases, phi3
from qlora_phi3.errors import RecipeError
from qlora_phi3.memory import StepRows
from qlora_phi3.phi3 import Geometry
from qlora_phi3.recipe import Recipe

MINI = phi3.VARIANTS["microsoft/Phi-3-mini-4k-instruct"]
GIB, MIB = 1024**3, 1024**2


def part(phase: memory.Phase, name: str) -> int:
    return next(part.num_bytes for part in phase.parts if part.name == name)


def phase(plan: memory.Plan, name: str) -> memory.Phase:
    return next(phase for phase in plan.phases if phase.name == name)


def training(settings: Recipe, geometry: Geometry = MINI, **keys: Any) -> memory.Phase:
    return phase(memory.predict(settings, geometry, **{"micro_batch": 1, **keys}), "train")


def test_embedding_and_head_of_phi_3_mini_take_188_mib_each() -> None:
    train = training(recipe())
    assert [round(part(train, name) / MIB) for name in ("embedding", "head")] == [188, 188]


def test_tied_head_is_counted_once() -> None:
    names = [p.name for p in training(recipe(), phi3.VARIANTS["microsoft/Phi-4-mini-instruct"]).parts]
    assert "embedding" in names
    assert "head" not in names


def test_adapters_and_gradients_of_phi_3_mini() -> None:
    assert part(training(recipe()), "adapters") == part(training(recipe()), "gradients") == 96 * MIB


def test_layer_inputs_of_phi_3_mini_take_192_kib_a_token() -> None:
    train = training(recipe(), row_tokens=1000)
    assert part(train, "layer inputs") == 1000 * 192 * 1024


def test_a_nf4_run_takes_less_than_half_of_a_bf16_one() -> None:
    nf4 = memory.predict(recipe(), MINI, micro_batch=1)
    bf16 = memory.predict(recipe(model__quantization="none"), MINI, micro_batch=1)
    assert nf4.peak_bytes / GIB == pytest.approx(3.1, abs=0.2)  # the 3.2 GiB of performance.md's tier T0
    assert 2 * nf4.peak_bytes < bf16.peak_bytes


@pytest.mark.parametrize("activations", ["recompute", "keep", "offload"])
def test_activations_grow_with_tokens_and_never_shrink(activations: str) -> None:
    settings = recipe(train__activations=activations)
    peaks = [training(settings, row_tokens=n).peak_bytes for n in (128, 512, 1024, 2048, 4096)]
    assert peaks == sorted(set(peaks))


@pytest.mark.parametrize("name", ["layer inputs", "working set"])
def test_activations_are_linear_in_long_rows_without_a_mask(name: str) -> None:
    geometry = replace(MINI, sliding_window=None, max_positions=131072)
    one, two, three = (part(training(recipe(), geometry, row_tokens=n * 8192), name) for n in (1, 2, 3))
    assert three - two == two - one > 0


def offloaded(**keys: Any) -> memory.Plan:
    return memory.predict(recipe(train__activations="offload"), MINI, micro_batch=1, **keys)


def test_offloading_takes_layer_inputs_off_the_card() -> None:
    """Of 32 inputs of 12 MiB three stay; the host has the others, each in 16 MiB, pinned."""
    plan, recomputed = offloaded(), training(recipe(train__activations="recompute"))
    assert part(phase(plan, "train"), "layer inputs") == 3 * 12 * MIB
    assert recomputed.peak_bytes - phase(plan, "train").peak_bytes >= 29 * 12 * MIB
    assert {found.name: found.num_bytes for found in plan.host}["offloaded inputs"] == 31 * 16 * MIB


def test_offloading_on_a_cpu_gains_nothing() -> None:
    there = phase(offloaded(device="cpu"), "train")
    assert part(there, "offloaded inputs") == 31 * 12 * MIB
    assert there.peak_bytes >= training(recipe(train__activations="recompute"), device="cpu").peak_bytes
    assert memory.Ways(recipe(), MINI, device="cpu").fastest(0).activations == "recompute"


def test_auto_activations_are_recomputed() -> None:
    assert training(recipe()) == training(recipe(train__activations="recompute"))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_no_mask_of_all_pairs_from_the_window_on(device: memory.Device) -> None:
    """Beyond the window a token more costs the same as before, on CUDA; on a CPU blocks share masks."""
    long = replace(MINI, max_positions=131072)
    peaks = [training(recipe(), long, row_tokens=n, device=device).peak_bytes for n in (16384, 32768, 65536)]
    assert peaks[2] - peaks[1] <= 2.01 * (peaks[1] - peaks[0])


@pytest.mark.parametrize(
    ("effective", "micro", "row_tokens", "expected"),
    [(4, 1, 300, 1200), (4, 2, 300, 1200), (16, 1, 300, 2048), (16, 2, 300, 4096), (4, 1, 2048, 2048)],
)
def test_packing_fills_a_pass_up_to_its_rows_or_the_whole_step(
    effective: int, micro: int, row_tokens: int, expected: int
) -> None:
    settings = recipe(data__packing=True, train__effective_batch=effective)
    plan = memory.predict(settings, MINI, micro_batch=micro, row_tokens=row_tokens)
    assert (plan.pass_tokens, plan.row_tokens) == (expected, row_tokens)


def test_gradients_of_a_step_in_one_pass_replace_layer_inputs() -> None:
    one = training(recipe(train__effective_batch=1), row_tokens=256)
    whole = 96 * MIB * 31 // 32
    assert part(one, "gradients") == whole
    assert part(one, "layer inputs") == 256 * 3072 * 2  # all but the first layer's are gone by then
    assert part(training(recipe(train__effective_batch=2), row_tokens=256), "gradients") == 96 * MIB


# Phases


def test_evaluation_is_planned_only_with_held_out_rows() -> None:
    names = [p.name for p in memory.predict(recipe(), MINI, micro_batch=1).phases]
    assert names == ["load", "attach", "first step", "train", "save"]
    with_eval = memory.predict(recipe(data__eval={"path": "eval.jsonl"}), MINI, micro_batch=1)
    assert [p.name for p in with_eval.phases] == ["load", "attach", "first step", "train", "evaluate", "save"]
    assert "KV cache" not in [p.name for p in with_eval.phases[-2].parts]


def test_fewer_tokens_that_are_trained_on_need_fewer_logits() -> None:
    settings = recipe(train__effective_batch=4)
    rows = (900, 500, 100)
    plans = [
        memory.predict(settings, MINI, micro_batch=2, known=StepRows(rows, counted))
        for counted in ((), (900, 500, 100), (40, 30, 20))
    ]
    whole, all_of_them, few = (phase(plan, "train").peak_bytes for plan in plans)
    assert few < whole <= all_of_them


def test_adapters_then_a_pass_then_optimizer_states() -> None:
    plan = memory.predict(recipe(), MINI, micro_batch=1, row_tokens=256)
    attach, first, later = (phase(plan, name) for name in ("attach", "first step", "train"))
    assert attach.peak_bytes + part(first, "working set") < first.peak_bytes
    assert first.peak_bytes + part(later, "optimizer states") == later.peak_bytes


def test_answers_need_a_cache() -> None:
    """For as many prompts as 4096 tokens hold with their answers, and for no more than are answered."""
    keys = {"data__eval": {"path": "eval.jsonl"}, "evaluate__metrics": ["exact_match"]}
    for row_tokens, samples, at_once in ((2048, 32, 1), (1024, 32, 3), (256, 32, 10), (256, 2, 2)):
        settings = recipe(**keys, evaluate__samples=samples, evaluate__max_new_tokens=128)
        plan = memory.predict(settings, MINI, micro_batch=1, row_tokens=row_tokens)
        assert phases.answer_tokens(settings, MINI, row_tokens) == 4096
        tokens = at_once * (row_tokens + 128)
        assert part(phase(plan, "evaluate"), "KV cache") == tokens * 32 * 2 * 3072 * 2


def test_plan_as_json() -> None:
    plan = memory.predict(recipe(), MINI, micro_batch=2, row_tokens=700)
    found = json.loads(json.dumps(plan.to_json()))
    assert (found["version"], found["micro_batch"], found["row_tokens"]) == (1, 2, 700)
    assert found["peak_bytes"] == plan.peak_bytes == max(p["peak_bytes"] for p in found["phases"])
    for shown in found["phases"]:
        assert shown["peak_bytes"] == sum(p["bytes"] for p in shown["parts"])
        assert all(p["name"] and p["formula"] for p in shown["parts"])
    assert "estimate" in found["covers"]


def test_rows_are_max_length_until_measured() -> None:
    assert memory.predict(recipe(data__max_length=512), MINI, micro_batch=1).row_tokens == 512


@pytest.mark.parametrize(
    ("packing", "micro", "longest", "expected"),
    [
        (False, 2, [900, 500, 100], 1400),  # the two longest
        (False, 4, [900, 500, 100], 1600),  # and one more of 100
        (False, 1, [900, 500], 900),
        (True, 1, [900, 500, 100], 1024),  # as full as max_length allows
        (True, 2, [300, 200, 100], 700),  # the whole step: 300, 200, 100, 100
        (True, 1, [1500], 1500),
    ],
)
def test_rows_that_are_known_make_the_pass(
    packing: bool, micro: int, longest: list[int], expected: int
) -> None:
    settings = recipe(train__effective_batch=4, data__packing=packing, data__max_length=1024)
    plan = memory.predict(settings, MINI, micro_batch=micro, row_tokens=2000, known=StepRows(tuple(longest)))
    assert (plan.pass_tokens, plan.row_tokens) == (expected, 2000)


# Choosing


def way(settings: Recipe, geometry: Geometry, usable: int, **keys: Any) -> memory.Way:
    return memory.Ways(settings, geometry, **keys).fastest(usable)


def chosen(settings: Recipe, geometry: Geometry, usable: int, **keys: Any) -> int:
    return way(settings, geometry, usable, **keys).micro_batch


def test_micro_batch_is_the_largest_divisor_that_fits() -> None:
    settings = recipe(train__effective_batch=12, train__activations="recompute", memory__host=[])
    peaks = {n: training(settings, micro_batch=n, row_tokens=512).peak_bytes for n in (1, 2, 3, 4, 6, 12)}
    for size, free in peaks.items():
        assert chosen(settings, MINI, free, known=StepRows((512,))) == size
    assert chosen(settings, MINI, peaks[6] - 1, known=StepRows((512,))) == 4
    assert chosen(settings, MINI, 10**15, known=StepRows((512,))) == 12


def test_micro_batch_is_never_below_one() -> None:
    assert chosen(recipe(), MINI, 0) == 1


def test_micro_batch_is_not_held_down_by_the_evaluation() -> None:
    keys = {"data__eval": {"path": "eval.jsonl"}, "evaluate__metrics": ["exact_match"]}
    assert chosen(recipe(**keys), MINI, 8 * GIB) == chosen(recipe(), MINI, 8 * GIB)


def test_explicit_settings_stay() -> None:
    assert chosen(recipe(train__micro_batch=8), MINI, 0) == 8
    kept = recipe(train__micro_batch=8, train__activations="keep")
    assert way(kept, MINI, 0).activations == "keep"
    assert way(recipe(train__activations="recompute"), MINI, 10**15).activations == "recompute"


def peak_and_cost(settings: Recipe, way: memory.Way, device: memory.Device) -> tuple[int, float]:
    """What a run with these settings would be measured by."""
    fixed = settings.settled(**way.keys)
    only = memory.Ways(fixed, MINI, known=StepRows((300,)), device=device).fastest(0)
    train = training(fixed, micro_batch=way.micro_batch, row_tokens=300, device=device)
    assert only.peak_bytes == train.peak_bytes
    return only.peak_bytes, only.cost


@pytest.mark.parametrize("engine", ["reference", "native"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("effective_batch", [1, 6])
def test_the_choice_is_the_fastest_way_that_fits(
    device: memory.Device, effective_batch: int, engine: str
) -> None:
    """Against every way there is, at budgets between the least and the most."""
    asked = recipe(train__effective_batch=effective_batch, train__engine=engine)
    every, hosts = [], memory.host_choices(asked, MINI, device)
    assert len(hosts) == (1 if device == "cpu" else 3 if engine == "native" else 2)
    native = engine == "native"
    for policy, size, kept, attention, columns, host in product(
        ("recompute", "offload") if device == "cuda" else ("recompute",),
        [n for n in range(1, effective_batch + 1) if effective_batch % n == 0],
        range(0, 33, 4),
        [False, True] if native else [False],
        ["all", 2048] if native else ["all"],
        hosts,
    ):
        if attention and policy == "offload":
            continue
        way = memory.Way(policy, size, kept, attention, columns, 0, 0.0, host)
        every.append((*peak_and_cost(asked, way, device), way))
    ways = memory.Ways(asked, MINI, known=StepRows((300,)), device=device)
    most, least = (pick(peak for peak, _, _ in every) for pick in (max, min))
    assert ways.fastest(most).activations == "keep"
    for usable in [least + (most - least) * n // 7 for n in range(8)]:
        found = ways.fastest(usable)
        assert found.peak_bytes <= usable
        assert found.cost <= min(cost for peak, cost, _ in every if peak <= usable) + 1e-9
    assert ways.fastest(0).peak_bytes == least


def test_the_embedding_is_on_the_host_where_nothing_fits_otherwise() -> None:
    settings, known = recipe(train__micro_batch=1, train__activations="offload"), StepRows((2048,))
    least = memory.Ways(settings.settled(host=()), MINI, known=known).fastest(0).peak_bytes
    assert way(settings, MINI, least, known=known).host == ()
    found = way(settings, MINI, least - 1, known=known)
    assert found.host == ("embedding",) and found.peak_bytes < least
    assert found.words == "offloading activations, embedding in host memory"
    assert way(settings, MINI, least - 1, known=known, device="cpu").host == ()
    assert way(settings.settled(host=("embedding",)), MINI, 10**15, known=known).host == ("embedding",)


@pytest.mark.parametrize("keys", [{}, {"model__quantization": "none"}, {"model__compute_dtype": "float32"}])
def test_an_embedding_on_the_host_is_counted_there(keys: dict[str, Any]) -> None:
    without = memory.predict(recipe(memory__host=[], **keys), MINI, micro_batch=1)
    with_it = memory.predict(recipe(memory__host=["embedding"], **keys), MINI, micro_batch=1)
    size = part(phase(without, "train"), "embedding")
    for name in ("first step", "train", "save"):
        assert phase(without, name).peak_bytes - phase(with_it, name).peak_bytes == size
    for name in ("load", "attach"):  # it is read onto the device, and leaves then
        assert phase(without, name) == phase(with_it, name)
    [there] = [part for part in with_it.host if part.name == "offloaded embedding"]
    assert size <= there.num_bytes < 2 * size
    assert there not in without.host


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_layers_on_the_host_are_counted_there_and_two_on_the_device(quantization: str) -> None:
    keys = {"model__quantization": quantization, "train__engine": "native", "train__activations": "recompute"}
    without = memory.predict(recipe(memory__host=[], **keys), MINI, micro_batch=1)
    with_it = memory.predict(recipe(memory__host=["layers"], **keys), MINI, micro_batch=1)
    size = part(phase(without, "train"), "linears")
    saved = phase(without, "train").peak_bytes - phase(with_it, "train").peak_bytes
    assert size * 30 // 32 <= saved <= size
    assert part(phase(with_it, "train"), "linears") == size * 2 // 32
    assert phase(without, "save").peak_bytes - phase(with_it, "save").peak_bytes == size
    assert phase(without, "load") == phase(with_it, "load")
    [there] = [part for part in with_it.host if part.name == "offloaded linears"]
    assert size <= there.num_bytes < 2 * size
    on_cpu = memory.predict(recipe(memory__host=["layers"], **keys), MINI, micro_batch=1, device="cpu")
    assert part(phase(on_cpu, "train"), "offloaded linears") == size
    assert part(phase(on_cpu, "train"), "linears") == size * 2 // 32


def test_layers_are_on_the_host_where_nothing_fits_otherwise() -> None:
    settings, known = recipe(train__micro_batch=1, train__engine="native"), StepRows((2048,))
    ways = memory.Ways(settings.settled(host=("embedding",)), MINI, known=known)
    least = ways.fastest(0).peak_bytes
    assert "layers" not in way(settings, MINI, least, known=known).host
    assert way(settings, MINI, least - 1, known=known).host == ("embedding", "layers")
    reference = settings.settled(engine="reference")
    assert way(reference, MINI, least - 1, known=known).host == ("embedding",)
    tied = phi3.VARIANTS["microsoft/Phi-4-mini-instruct"]
    assert memory.host_choices(settings, tied, "cuda") == ((), ("layers",))


def test_on_a_cpu_an_embedding_on_the_host_is_counted_all_the_same() -> None:
    without, with_it = (training(recipe(memory__host=host), device="cpu") for host in ([], ["embedding"]))
    assert part(with_it, "offloaded embedding") == part(without, "embedding")
    assert with_it.peak_bytes == without.peak_bytes


def test_an_embedding_that_is_the_head_stays() -> None:
    tied = phi3.VARIANTS["microsoft/Phi-4-mini-instruct"]
    assert memory.host_choices(recipe(), tied, "cuda") == ((),)
    assert memory.host_choices(recipe(adapter__targets=["q", "embed_tokens"]), MINI, "cuda") == ((),)
    with pytest.raises(
        RecipeError, match=r"memory\.host: 'embedding': this base's embedding is its head too"
    ):
        memory.host_choices(recipe(memory__host=["embedding"]), tied, "cpu")


def test_layers_are_kept_as_far_as_memory_goes() -> None:
    settings, known = recipe(train__micro_batch=1), StepRows((2048,))
    kept = [way(settings, MINI, room * GIB, known=known).kept_layers for room in (4, 6, 8, 10, 12)]
    assert kept == sorted(kept)
    assert 0 < kept[1] < kept[2] < 32
    more = way(settings, MINI, 8 * GIB, known=known)
    one_more = settings.settled(**more.keys | {"kept_layers": more.kept_layers + 1})
    assert training(one_more, row_tokens=2048).peak_bytes > 8 * GIB >= more.peak_bytes


def test_long_documents_keep_attention_before_layers() -> None:
    """What it costs to compute again grows with their length, what it takes to keep does not."""
    long = replace(MINI, sliding_window=None, max_positions=131072)
    found = [
        way(recipe(train__engine="native"), long, usable * GIB, known=StepRows((length,)))
        for length, usable in ((512, 4), (32768, 20))
    ]
    assert [one.keep_attention for one in found] == [False, True]


def test_an_explicit_micro_batch_is_kept_where_it_fits_so() -> None:
    settings = recipe(train__micro_batch=4)
    keep = training(recipe(train__activations="keep"), micro_batch=4).peak_bytes
    assert way(settings, MINI, keep).activations == "keep"
    assert way(settings, MINI, keep - 1).kept_layers == 31


def test_settings_of_a_recipe_stay() -> None:
    fixed = dict(train__activations="recompute", train__kept_layers=3, train__engine="native")
    found = way(recipe(**fixed, train__keep_attention=True, train__slice_columns=1024), MINI, 80 * GIB)
    assert (found.activations, found.kept_layers, found.keep_attention) == ("recompute", 3, True)
    assert found.slice_columns == 1024
    assert way(recipe(train__activations="recompute"), MINI, 80 * GIB).kept_layers == 0
    assert way(recipe(train__kept_layers=5), MINI, 80 * GIB).kept_layers == 5


def test_the_choice_in_words() -> None:
    def said(policy: str, *keys: Any) -> str:
        return memory.Way(policy, 4, *keys, 3 * GIB, 5.0).of(11 * GIB)

    end = ", micro batch 4: 3.00 GiB of 11.00 GiB"
    assert said("keep", 32, False, "all") == "keeping activations" + end
    assert said("offload", 0, False, "all") == "offloading activations" + end
    assert said("recompute", 12, False, "all") == "recomputing activations but for 12 layers" + end
    words = "recomputing activations in slices of 2048 but for 3 layers and attention outputs"
    assert said("recompute", 3, True, 2048) == words + end


def test_fewer_logit_tokens_take_less() -> None:
    keys = {"adapter__targets": ["o_proj"], "train__effective_batch": 1}  # where the loss is the fullest
    big = replace(MINI, vocab_size=400_000)
    peaks = [training(recipe(**keys, train__logit_tokens=n), big).peak_bytes for n in (1024, 512, 256)]
    assert peaks[0] - peaks[1] == 512 * 400_000 * (4 + 2)
    assert peaks[1] > peaks[2]


def test_a_first_pass_has_no_optimizer_states() -> None:
    settings = recipe(train__effective_batch=1)
    case = memory.training_case(settings, MINI, 1, StepRows((500,)), "cuda")
    train = training(settings, row_tokens=500)
    assert phases.pass_phase(case).peak_bytes == train.peak_bytes - part(train, "optimizer states")


def test_what_is_beside_the_tensors() -> None:
    cuda, cpu = (memory.predict(recipe(), MINI, micro_batch=1, device=d) for d in ("cuda", "cpu"))
    assert [p.name for p in cuda.outside] == ["CUDA context", "allocator slack"]
    assert [p.name for p in cpu.outside] == ["imports", "heap"]
    assert (len(cuda.host), len(cpu.host)) == (2, 0)
    assert [p.name for p in cuda.merge.parts] == ["adapter file", "one matrix"]
    assert cuda.merge.peak_bytes < cpu.merge.peak_bytes < 1.2 * 1024**3  # which quantizes in that memory
    for plan in (cuda, cpu):
        assert plan.needed_bytes == plan.peak_bytes + sum(p.num_bytes for p in plan.outside)
        assert {p.kind for p in plan.outside} == {"estimate"}
    needs = cuda.needed_bytes - memory.CONTEXT_BYTES
    assert memory.usable_bytes(needs) == pytest.approx(cuda.peak_bytes, abs=2)


def test_saving_on_a_cpu_holds_the_adapter_once_more() -> None:
    cuda, cpu = (memory.predict(recipe(), MINI, micro_batch=1, device=d) for d in ("cuda", "cpu"))
    assert phase(cpu, "save").peak_bytes - phase(cuda, "save").peak_bytes == 96 * MIB


def test_no_torch_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, qlora_phi3.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
