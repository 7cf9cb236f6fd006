"""adapters.py: what is trained is what was asked for, and what is saved is what was trained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import load_base
from conftest import GEOMETRIES
from pairs import every_pair, thinned
from safetensors.torch import load_file, save_file

from qlora_phi3 import phi3
from qlora_phi3.adapters import (
    PROVENANCE_NAME,
    WEIGHTS_NAME,
    attach,
    check_provenance,
    check_saved,
    check_targets,
    save,
    summarize,
    trained_table,
)
from qlora_phi3.errors import ModelError, RunError
from qlora_phi3.model import Base, ParameterCounts, check_dtypes
from qlora_phi3.recipe import Adapter, Data, Model, Recipe, Source
from qlora_phi3.weights import locate

IDS = torch.arange(24).view(2, 12)
QUANTIZATIONS = ["nf4", "none"]
SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(phi3.LINEARS, size)]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What recipes for Llama ask for; PEFT would train o_proj and down_proj and say nothing."""


def recipe(**adapter: Any) -> Recipe:
    settings = Adapter(**{"rank": 4, "alpha": 8, "split_fused": False, **adapter})
    return Recipe(version=1, name="t", adapter=settings, data=Data(train=Source(path="unused.jsonl")))


def tuned(base: Base, **adapter: Any) -> Any:
    """An adapter as after training: B is no longer zero."""
    torch.manual_seed(0)
    model = attach(base, recipe(**adapter))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.fixture
def base(checkpoints: Callable[[str], Path]) -> Base:
    return load_base(checkpoints("gqa"))


# --- what is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "targets"),
    thinned(
        [
            pytest.param(one, targets, id=f"{one}-{'+'.join(targets)}")
            for one in GEOMETRIES
            for targets in SUBSETS
        ],
        lambda geometry, targets: [geometry, *(linear in targets for linear in phi3.LINEARS)],
    ),
)
def test_exactly_the_targets_are_trained(
    checkpoints: Callable[[str], Path], geometry: str, targets: tuple[str, ...]
) -> None:
    base = load_base(checkpoints(geometry))
    sizes = base.checkpoint.geometry
    model = attach(base, recipe(targets=targets))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(targets)
    for name, parameter in trained.items():
        _, linear, matrix, adapter, kind = name.rsplit(".", 4)
        assert linear in targets
        assert matrix in ("lora_A", "lora_B")
        assert (adapter, kind) == ("default", "weight")
        num_out, num_in = sizes.linear_shape(linear)
        assert parameter.shape == ((4, num_in) if matrix == "lora_A" else (num_out, 4))
        assert parameter.dtype == torch.float32
    counts = ParameterCounts.of(model)
    assert counts.trainable == sizes.lora_parameters(targets, rank=4)
    assert counts.total == sizes.num_parameters + counts.trainable
    assert counts.quantized == sizes.num_linear_parameters
    check_dtypes(model, compute=torch.bfloat16, quantized=True)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_trained_table(checkpoints: Callable[[str], Path], geometry: str, quantization: str) -> None:
    base = load_base(checkpoints(geometry), quantization)
    sizes = base.checkpoint.geometry
    table = {row.target: row for row in trained_table(attach(base, recipe(rank=2)))}
    assert set(table) == set(phi3.LINEARS)
    for linear, row in table.items():
        assert (row.out_features, row.in_features) == sizes.linear_shape(linear)
        assert (row.num_modules, row.rank, row.dtype) == (2, 2, "float32")
        assert row.num_parameters == sizes.lora_parameters((linear,), rank=2)
    assert json.loads(json.dumps(table["o_proj"].to_json())) == {
        "target": "o_proj", "part": "o", "num_modules": 2, "in_features": 64, "out_features": 64,
        "rank": 2, "num_parameters": 2 * 2 * 128, "dtype": "float32",
    }  # fmt: skip


def test_nothing_is_trained_before_an_adapter_is_attached(base: Base) -> None:
    assert trained_table(base.model) == []
    assert summarize([]) == []


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, ["q+k+v o gate+up down in 2 layers, rank 4, {} parameters"]),
        ({"split_fused": True}, ["q k v o gate up down in 2 layers, rank 4, {} parameters"]),
        (
            {"split_fused": True, "targets": ["embed_tokens", "q", "lm_head"]},
            ["embed_tokens lm_head, rank 4, {} parameters", "q in 2 layers, rank 4, {} parameters"],
        ),
        (
            {"targets": ["qkv_proj", "o_proj"], "method": "dora"},
            [
                "q+k+v o in 2 layers, rank 4, {} parameters",
                "lengths of qkv_proj o_proj in 2 layers, {} parameters",
            ],
        ),
    ],
)
def test_what_is_trained_is_a_line_for_all_that_is_alike(
    base: Base, settings: dict[str, Any], lines: list[str]
) -> None:
    model = attach(base, recipe(**settings))
    found = summarize(trained_table(model))
    assert [re.sub(r"[\d.,]+( M)? parameters", "{} parameters", line) for line in found] == lines
    model.unload()


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        ("all-linear", phi3.LINEARS),
        (["o"], ["o_proj"]),
        (["down"], ["down_proj"]),
        (["o_proj", "down"], ["o_proj", "down_proj"]),
        (phi3.LINEARS[::-1], phi3.LINEARS),
        *(([name], [name]) for name in phi3.LINEARS),
    ],
    ids=str,
)
def test_names_of_targets(base: Base, targets: Any, trained: list[str]) -> None:
    assert {row.target for row in trained_table(attach(base, recipe(targets=targets)))} == set(trained)


def test_a_new_adapter_changes_nothing(checkpoints: Callable[[str], Path]) -> None:
    before = logits(load_base(checkpoints("gqa")).model)
    assert torch.equal(logits(attach(load_base(checkpoints("gqa")), recipe())), before)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (8, 1)])
def test_the_update_is_scaled_by_alpha_over_rank(
    checkpoints: Callable[[str], Path], rank: int, alpha: int
) -> None:
    model = tuned(load_base(checkpoints("gqa"), "none"), rank=rank, alpha=alpha)
    linear = model.get_submodule("base_model.model.model.layers.1.mlp.gate_up_proj")
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    update = alpha / rank * (x.double() @ a.double().T @ b.double().T)
    expected = x.double() @ linear.base_layer.weight.double().T + update
    torch.testing.assert_close(linear(x).double(), expected, rtol=0.02, atol=0.02)


def test_dropout_acts_on_the_adapter_in_training_only(base: Base) -> None:
    model = tuned(base, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_doras_outputs_have_the_compute_dtype(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT asks for CUDA's autocast only; with that it leaves them float32, as they are before our hook."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: asked(*kind) if kind else True)
    before: set[torch.dtype] = set()
    after: set[torch.dtype] = set()
    model = tuned(base, method="dora")
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda _, __, out: before.add(out.dtype), prepend=True)
            module.register_forward_hook(lambda _, __, out: after.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert (before, after) == ({torch.float32}, {torch.bfloat16})


# --- targets that are not there ----------------------------------------------------------------------------


def test_every_linear_is_found_in_every_layer(base: Base) -> None:
    check_targets(base.model, phi3.LINEARS, 2)


def delete(parent: torch.nn.Module, name: str) -> None:
    delattr(parent, name)


def rename(parent: torch.nn.Module, name: str) -> None:
    parent.add_module("renamed", parent.get_submodule(name))
    delattr(parent, name)


@pytest.mark.parametrize("spoil", [delete, rename])
@pytest.mark.parametrize(("parent", "target"), [("self_attn", "qkv_proj"), ("mlp", "down_proj")])
def test_target_missing_in_one_layer(
    base: Base, spoil: Callable[[torch.nn.Module, str], None], parent: str, target: str
) -> None:
    spoil(base.model.get_submodule(f"model.layers.1.{parent}"), target)
    with pytest.raises(ModelError, match=f"{target} exists in 1 of 2 layers of the base") as caught:
        attach(base, recipe())
    assert caught.value.problems[0].place == "adapter.targets"
    assert trained_table(base.model) == []


@pytest.mark.parametrize("target", ["q_proj", "norm", "proj", "", "q"])
def test_names_that_are_no_linear_of_a_layer(base: Base, target: str) -> None:
    with pytest.raises(ModelError, match=f"^adapter.targets: {target} exists in 0 of 2 layers"):
        check_targets(base.model, ["o_proj", target], 2)


def test_llama_names_mean_all_of_them() -> None:
    assert recipe(targets=LLAMA, split_fused=True).adapter.pairs == recipe(split_fused=True).adapter.pairs


@pytest.mark.parametrize(
    "targets", [LLAMA, ["q_proj"], ["o_proj", "gate_proj"], ["lm_head", "up_proj"]], ids="+".join
)
def test_names_that_passed_the_recipe_by_are_refused_too(base: Base, targets: list[str]) -> None:
    """`model_copy` checks nothing; each target is trained, or none is."""
    unchecked = recipe().adapter.model_copy(update={"targets": tuple(targets)})
    with pytest.raises(ModelError, match="exists in 0 of 2 layers"):
        attach(base, recipe().model_copy(update={"adapter": unchecked}))
    assert trained_table(base.model) == []


# --- saving ------------------------------------------------------------------------------------------------


def test_saved_files(base: Base, tmp_path: Path) -> None:
    save(tuned(base), base, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        WEIGHTS_NAME, PROVENANCE_NAME, "adapter_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", ["qkv_proj"]], ids=str)
def test_saved_weights(base: Base, tmp_path: Path, targets: Any) -> None:
    model = tuned(base, targets=targets)
    save(model, base, tmp_path / "adapter")
    live = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    assert set(saved) == set(live)
    assert all(torch.equal(saved[name], live[name]) for name in live)


def test_saved_config(base: Base, tmp_path: Path) -> None:
    save(tuned(base, rank=4, alpha=8, dropout=0.25), base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.checkpoint.folder)
    assert set(config["target_modules"]) == set(phi3.LINEARS)
    found = [config[key] for key in ("r", "lora_alpha", "lora_dropout", "bias", "task_type", "revision")]
    assert found == [4, 8, 0.25, "none", "CAUSAL_LM", None]


@pytest.mark.parametrize(
    ("name", "revision"),
    [("microsoft/Phi-3-mini-4k-instruct", "0" * 40), ("builtin:smollm2-135m", None)],
)
@pytest.mark.parametrize("decoy", [False, True])
def test_base_is_named_as_the_recipe_names_it(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, revision: str | None, decoy: bool
) -> None:
    """Where it was loaded from on this machine is nobody's business, nor is anything asked of the hub."""
    if decoy:  # a folder that happens to have this name is not looked into
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"model_type": "phi3", "vocab_size": 7}')
    monkeypatch.chdir(tmp_path)
    provenance = dataclasses.replace(base.checkpoint.provenance, base=name, revision=revision)
    base.checkpoint = dataclasses.replace(base.checkpoint, provenance=provenance)
    model = tuned(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (name, revision)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter" / WEIGHTS_NAME))


def test_saved_provenance(base: Base, tmp_path: Path) -> None:
    save(tuned(base), base, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / PROVENANCE_NAME).read_text())
    assert saved == json.loads(json.dumps(base.checkpoint.provenance.to_json()))
    assert saved["base"] == str(base.checkpoint.folder)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_stock_peft_loads_the_very_same_model(
    checkpoints: Callable[[str], Path], tmp_path: Path, geometry: str, quantization: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_base(checkpoints(geometry), quantization)
    untrained = logits(base.model)
    live = tuned(base)
    save(live, base, tmp_path / "adapter")
    if quantization == "nf4":  # bitsandbytes' own packing for inference computes a little differently
        fresh = load_base(checkpoints(geometry)).model
    else:
        fresh = AutoModelForCausalLM.from_pretrained(checkpoints(geometry), dtype=torch.bfloat16)
    reloaded = logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter"))
    assert torch.equal(reloaded, logits(live))
    assert not torch.equal(reloaded, untrained)


def test_saved_tokenizer_is_the_bases(base: Base, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save(tuned(base), base, tmp_path / "adapter")
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    chat = [{"role": "user", "content": "Say ä\n"}, {"role": "assistant", "content": " 1 "}]
    assert saved.apply_chat_template(chat) == base.tokenizer.apply_chat_template(chat)
    assert saved.pad_token == base.tokenizer.pad_token


# --- all or nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_saved(base: Base, tmp_path: Path, value: float) -> None:
    model = tuned(base)
    name, parameter = [(n, p) for n, p in model.named_parameters() if p.requires_grad][-1]
    parameter.data.view(-1)[-1] = value
    with pytest.raises(RunError, match="1 trained weights are not finite") as caught:
        save(model, base, tmp_path / "adapter")
    assert name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_do_not_get_in(base: Base, tmp_path: Path) -> None:
    partial = tmp_path / ".adapter.partial"
    partial.mkdir()
    (partial / "checkpoint.pt").write_text("left over")
    (partial / WEIGHTS_NAME).write_text("half written")
    save(tuned(base), base, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (tmp_path / "adapter" / "checkpoint.pt").exists()


def flip(bit: int) -> Callable[[Path], None]:
    """Flips one bit of the last weight of a saved B."""

    def spoil(path: Path) -> None:
        tensors = load_file(path)
        name = max(name for name in tensors if "lora_B" in name)
        tensors[name].view(torch.int32).view(-1)[-1] ^= torch.tensor(1).bitwise_left_shift(bit).int()
        save_file(tensors, path)

    return spoil


def drop_one(path: Path) -> None:
    save_file(dict(list(load_file(path).items())[1:]), path)


def add_one(path: Path) -> None:
    save_file(load_file(path) | {"surplus": torch.zeros(1)}, path)


def halve_precision(path: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)


def transpose(path: Path) -> None:
    save_file({name: tensor.T.contiguous() for name, tensor in load_file(path).items()}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FAULTS = [
    *(pytest.param(flip(bit), id=f"bit {bit}") for bit in (0, 22, 23, 30, 31)),
    drop_one,
    add_one,
    halve_precision,
    transpose,
    truncate,
    Path.unlink,
]


@pytest.mark.parametrize("b_std", [0.0, 0.1])
@pytest.mark.parametrize("spoil", FAULTS)
def test_what_was_written_is_compared(
    base: Base, tmp_path: Path, spoil: Callable[[Path], None], b_std: float
) -> None:
    model = tuned(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(b_std)  # an untrained B is zero, and minus zero equals zero
    save(model, base, tmp_path / "adapter")
    check_saved(model, tmp_path / "adapter")
    spoil(tmp_path / "adapter" / WEIGHTS_NAME)
    with pytest.raises(RunError) as caught:
        check_saved(model, tmp_path / "adapter")
    assert caught.value.problems[0].place == str(tmp_path / "adapter" / WEIGHTS_NAME)
    assert "\n" not in str(caught.value)


def test_a_bad_disk_leaves_no_adapter(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(base)
    write = model.save_pretrained

    def write_badly(folder: Path, **settings: Any) -> None:
        write(folder, **settings)
        flip(0)(Path(folder) / WEIGHTS_NAME)

    monkeypatch.setattr(model, "save_pretrained", write_badly)
    with pytest.raises(RunError, match="reads back differently"):
        save(model, base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    save(model, base, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- going on from an adapter ------------------------------------------------------------------------------

LAYOUTS = ["fused", "split", "unfused", "loralib", "mlx"]


def written(model: Any, base: Base, layout: Any, folder: Path) -> Path:
    from qlora_phi3 import layouts, loralib_bridge

    tensors, config = loralib_bridge.adapter_of(model, base.checkpoint.geometry)
    tensors, config = layouts.convert(tensors, config, layout, base.checkpoint.geometry)
    layouts.write_adapter(folder, tensors, config)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "adapter", [{}, {"split_fused": True}, {"split_fused": True, "targets": ["q", "down"]}]
)
def test_it_goes_on_from_any_layout(
    checkpoints: Callable[[str], Path], tmp_path: Path, layout: str, adapter: dict[str, Any]
) -> None:
    base = load_base(checkpoints("gqa"), "none")
    model = tuned(base, **adapter)
    live = logits(model)
    folder = written(model, base, layout, tmp_path / "old")
    again = attach(load_base(checkpoints("gqa"), "none"), recipe(init=str(folder), **adapter))
    torch.testing.assert_close(logits(again), live, rtol=1e-2, atol=1e-2)  # a bfloat16 base
    trained = [p for p in again.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [p.shape for p in model.parameters() if p.requires_grad]
    assert all(p.any() for p in trained)


def test_a_fused_adapter_goes_on_as_a_split_one(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(checkpoints("gqa"), "none")
    model = tuned(base)
    save(model, base, tmp_path / "old")
    again = attach(
        load_base(checkpoints("gqa"), "none"), recipe(init=str(tmp_path / "old"), split_fused=True)
    )
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"rank": 8}, r"qkv_proj has rank 4 scaled by 2; the recipe makes that 8 and 1"),
        ({"rank": 8, "split_fused": True}, r"qkv_proj has rank 4 scaled by 2; the recipe makes that 8 and 1"),
        ({"alpha": 4}, r"qkv_proj has rank 4 scaled by 2; the recipe makes that 4 and 1"),
        ({"method": "rslora"}, r"scaled by 2; the recipe makes that 4 and 4"),
        ({"targets": ["o"]}, r"trains down_proj, gate_up_proj, o_proj, qkv_proj, the recipe o_proj"),
        (
            {"targets": ["q", "o", "gate", "down"], "split_fused": True},
            r"outside the blocks that are trained",
        ),
    ],
    ids=str,
)
def test_another_kind_of_adapter_is_refused(
    checkpoints: Callable[[str], Path], tmp_path: Path, adapter: dict[str, Any], reason: str
) -> None:
    base = load_base(checkpoints("gqa"))
    save(tuned(base), base, tmp_path / "old")
    with pytest.raises(ModelError, match=reason):
        attach(load_base(checkpoints("gqa")), recipe(init=str(tmp_path / "old"), **adapter))


def test_an_adapter_of_another_base_is_refused(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(checkpoints("gqa"))
    save(tuned(base), base, tmp_path / "old")
    with pytest.raises(ModelError, match="which is not"):
        attach(load_base(checkpoints("untied")), recipe(init=str(tmp_path / "old")))
    (tmp_path / "old" / PROVENANCE_NAME).unlink()  # then its shapes tell
    with pytest.raises(ModelError, match="qkv_proj"):
        attach(load_base(checkpoints("untied")), recipe(init=str(tmp_path / "old")))
    (tmp_path / "old" / PROVENANCE_NAME).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        attach(load_base(checkpoints("gqa")), recipe(init=str(tmp_path / "old")))


def test_an_adapter_of_a_base_whose_weights_have_changed(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Names, shapes and config stay the same. Notes of older versions tell no values, and say so."""
    folder = Path(shutil.copytree(checkpoints("gqa"), tmp_path / "base"))
    before = locate(Model(base=str(folder)))
    note = tmp_path / PROVENANCE_NAME
    note.write_text(json.dumps(before.provenance.to_json()))
    check_provenance(tmp_path, before)
    weights = load_file(folder / "model.safetensors")
    save_file({k: w / 2 for k, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    after, said = locate(Model(base=str(folder))), []
    with pytest.raises(ModelError, match=r"is not .* as it is here"):
        check_provenance(tmp_path, after, said.append)
    old = before.provenance.to_json()
    for one in old["weights"]:
        del one["samples_xxh3"]
    note.write_text(json.dumps(old))
    check_provenance(tmp_path, after, said.append)
    assert len(said) == 1 and "not whether they are still the same" in said[0]


def test_no_adapter_there(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        attach(load_base(checkpoints("gqa")), recipe(init=str(tmp_path / "nowhere")))


# --- the embedding and the head ----------------------------------------------------------------------------

BESIDE = [["lm_head"], ["embed_tokens"], ["q", "v", "lm_head", "embed_tokens"]]


def trained_all(base: Base, **adapter: Any) -> Any:
    """An adapter as after training: nothing of it is zero."""
    torch.manual_seed(0)
    model = attach(base, recipe(split_fused=True, **adapter))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("targets", BESIDE, ids="+".join)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_table_of_embedding_and_head(
    checkpoints: Callable[[str], Path], geometry: str, targets: list[str]
) -> None:
    base = load_base(checkpoints(geometry))
    sizes = base.checkpoint.geometry
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie_word_embeddings")
        model = attach(base, recipe(targets=targets, split_fused=True))
    table = trained_table(model)
    order = [row.part for row in table]
    assert order == [name for name in ("embed_tokens", "q", "v", "lm_head") if name in targets]
    for row in table:
        assert (row.out_features, row.in_features) == sizes.pair_shape(row.part)
        assert row.num_modules == (2 if row.part in "qv" else 1)
        assert row.num_parameters == sizes.lora_parameters((row.part,), rank=4)
        assert (row.rank, row.dtype) == (4, "float32")
    assert ParameterCounts.of(model).trainable == sum(row.num_parameters for row in table)
    lines = summarize(table)
    assert lines[-1].startswith(f"{table[-1].target}, rank 4, ") or "in 2 layers, rank 4, " in lines[-1]
    check_dtypes(model, compute=torch.bfloat16, quantized=True)


@every_pair("targets, geometry, quantization, method", BESIDE, GEOMETRIES, QUANTIZATIONS, ["lora", "rslora"])
def test_stock_peft_loads_embedding_and_head(
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    geometry: str,
    quantization: str,
    targets: list[str],
    method: str,
) -> None:
    from peft import PeftModel

    base = load_base(checkpoints(geometry), quantization)
    untrained, embedding = logits(base.model), base.model.model.embed_tokens.weight.clone()
    live = trained_all(base, targets=targets, method=method)
    tied = live.get_base_model().lm_head.weight is live.get_base_model().model.embed_tokens.weight
    assert tied == (geometry == "tied")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(live, base, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    assert all(".lora_" in name for name in saved), "no weight of the base"
    fresh = load_base(checkpoints(geometry), quantization).model
    stock = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(stock), logits(live), rtol=1e-2, atol=1e-2)
    assert not torch.equal(logits(live), untrained)
    with live.disable_adapter():
        assert torch.equal(logits(live), untrained)
    assert torch.equal(base.model.model.embed_tokens.weight, embedding)


def test_tied_adapters_are_independent(checkpoints: Callable[[str], Path]) -> None:
    """Logits of both are those of the two updates written into two matrices by hand."""
    base = load_base(checkpoints("tied"), "none")
    base.model.float()
    model = trained_all(base, targets=["embed_tokens", "lm_head"])
    by_hand = load_base(checkpoints("tied"), "none").model.float()
    causal = model.get_base_model()
    head, embedding = causal.lm_head, causal.model.embed_tokens
    weight = by_hand.lm_head.weight.detach()
    for layer, inner in ((by_hand.lm_head, head), (by_hand.model.embed_tokens, embedding)):
        layer.weight = torch.nn.Parameter(weight + inner.get_delta_weight("default"))
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-4, atol=1e-4)


@every_pair("layout, targets, geometry", LAYOUTS, BESIDE, ["gqa", "tied"])
def test_it_goes_on_with_embedding_and_head(
    checkpoints: Callable[[str], Path], tmp_path: Path, layout: str, targets: list[str], geometry: str
) -> None:
    base = load_base(checkpoints(geometry), "none")
    model = trained_all(base, targets=targets)
    live = logits(model)
    if geometry == "tied" and layout in ("loralib", "mlx"):
        with pytest.raises(ModelError, match="ties embedding and head"):
            written(model, base, layout, tmp_path / "old")
        return
    folder = written(model, base, layout, tmp_path / "old")
    settings = recipe(targets=targets, split_fused=True, init=str(folder))
    again = attach(load_base(checkpoints(geometry), "none"), settings)
    torch.testing.assert_close(logits(again), live, rtol=1e-2, atol=1e-2)
    assert all(p.any() and p.dtype == torch.float32 for p in again.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (
            {"targets": ["lm_head"], "rank": 8},
            "lm_head has rank 4 scaled by 2; the recipe makes that 8 and 1",
        ),
        ({"targets": ["lm_head"], "method": "rslora"}, "lm_head has rank 4 scaled by 2; .* 4 and 4"),
        ({"targets": ["embed_tokens"]}, "trains lm_head, the recipe embed_tokens"),
        ({"targets": ["lm_head", "o"]}, "trains lm_head, the recipe lm_head, o_proj"),
    ],
    ids=str,
)
def test_another_adapter_than_that_of_the_head_is_refused(
    checkpoints: Callable[[str], Path], tmp_path: Path, adapter: dict[str, Any], reason: str
) -> None:
    base = load_base(checkpoints("tied"))
    save(trained_all(base, targets=["lm_head"]), base, tmp_path / "old")
    with pytest.raises(ModelError, match=reason):
        attach(load_base(checkpoints("tied")), recipe(init=str(tmp_path / "old"), **adapter))


def test_a_rank_above_the_width_of_the_head(base: Base) -> None:
    with pytest.raises(ModelError, match=r"adapter.rank: 65 is above 64, the smaller side of lm_head"):
        attach(base, recipe(rank=65, targets=["lm_head"]))


def test_a_base_without_a_head(base: Base) -> None:
    del base.model.lm_head
    with pytest.raises(ModelError, match=r"adapter.targets: the base has 0 modules called lm_head, not one"):
        check_targets(base.model, ["o_proj", "lm_head"], 2)
