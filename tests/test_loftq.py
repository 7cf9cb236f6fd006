"""loftq.py: the start is the best approximation of what NF4 lost, and the base and its files stay plain."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import load_base
from conftest import GEOMETRIES, make_checkpoint
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from qlora_phi3 import adapters, loftq
from qlora_phi3.errors import ModelError
from qlora_phi3.recipe import Adapter, Data, Recipe, Source
from qlora_phi3.weights import tensor_files

IDS = torch.arange(48).view(2, 24) % 30 + 3


def recipe(**adapter: Any) -> Recipe:
    settings = Adapter(**{"method": "loftq", "rank": 4, "alpha": 8, **adapter})
    return Recipe(version=1, name="t", adapter=settings, data=Data(train=Source(path="unused.jsonl")))


def attached(folder: Path, **adapter: Any) -> Any:
    torch.manual_seed(0)
    return adapters.attach(load_base(folder), recipe(**adapter))


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the checkpoint, PEFT's layer) of every linear that is trained."""
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            yield f"{name}.weight", layer


def dequantized(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.base_layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).double()


def update(layer: Any) -> torch.Tensor:
    """scale * B @ A in float64, as PEFT would merge it."""
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return layer.scaling["default"] * b @ a


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"split_fused": False},
        {"rank": 1, "alpha": 7},
        {"rank": 13},
        {"rank": 32},
        {"rank": 64, "split_fused": False},
        {"targets": ["q", "v", "gate_up_proj", "down"]},
    ],
    ids=str,
)
def test_each_pair_is_the_best_of_its_rank(
    checkpoints: Callable[[str], Path], geometry: str, adapter: dict[str, Any]
) -> None:
    """Against all singular values in float64: no matrix of this rank leaves a smaller error."""
    folder = checkpoints(geometry)
    base = load_base(folder)
    settings, sizes = recipe(**adapter), base.checkpoint.geometry
    torch.manual_seed(0)
    model, weights = adapters.attach(base, settings), checkpoint_tensors(folder)
    for name, layer in layers(model):
        linear = name.split(".")[-2]
        lost = weights[name].double() - dequantized(layer)
        left = lost - update(layer)
        assert left.norm() < lost.norm()
        parts = [part for owner, part in settings.adapter.pairs if owner == linear]
        rows = [(0, len(lost)) if part == linear else sizes.slices(linear)[part] for part in parts]
        for start, stop in rows:
            values = torch.linalg.svdvals(lost[start:stop])
            bound = values[settings.adapter.rank :].norm()
            assert left[start:stop].norm() <= 1.01 * bound + 1e-5 * values[0]
        trained = torch.zeros(len(lost), dtype=torch.bool)
        for start, stop in rows:
            trained[start:stop] = True
        assert not update(layer)[~trained].any()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("split_fused", [True, False])
def test_the_model_is_nearer_to_the_unquantized_one(
    checkpoints: Callable[[str], Path], geometry: str, split_fused: bool
) -> None:
    folder = checkpoints(geometry)
    wanted = logits(load_base(folder, "none", "float32").model)
    model = attached(folder, rank=16, alpha=16, split_fused=split_fused)
    started = (logits(model) - wanted).norm()
    with model.disable_adapter():
        without = (logits(model) - wanted).norm()
    assert started < 0.9 * without


class CudaIsCpu(TorchFunctionMode):
    """PEFT moves to "cuda" by name; here it stays where it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: "cpu" if value == "cuda" else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("rank", "sketched"), [(4, True), (20, False)])
def test_it_is_pefts_own_start(
    checkpoints: Callable[[str], Path], geometry: str, rank: int, sketched: bool
) -> None:
    """PEFT does not divide by alpha / rank, so where that is 1 both are the same."""
    from peft import replace_lora_weights_loftq

    folder = checkpoints(geometry)
    assert (2 * (2 * rank + loftq.OVERSAMPLING) < 64) == sketched
    ours = attached(folder, rank=rank, alpha=rank, split_fused=False)
    theirs = attached(folder, method="lora", rank=rank, alpha=rank, split_fused=False)
    with CudaIsCpu():
        replace_lora_weights_loftq(theirs, str(folder))
    for (name, mine), (_, peft) in zip(layers(ours), layers(theirs), strict=True):
        expected = update(peft)
        error = (update(mine) - expected).norm() / expected.norm()
        assert error < (0.2 if sketched else 1e-4), name
    if not sketched:
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1, 5), (64, 64), (257, 256)])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_a_sketch_is_nearly_as_good_as_the_exact_one(shape: tuple[int, int], rank: int) -> None:
    """Noise, whose singular values lie closest together, and so the hardest case."""
    rank = min(rank, *shape)
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    u, values, vt = loftq.largest_directions(matrix, rank)
    exact = torch.linalg.svdvals(matrix.double())
    removed = matrix.norm() ** 2 - (matrix - u * values @ vt).norm() ** 2
    assert removed >= 0.985 * exact[:rank].norm() ** 2
    assert (u.shape, values.shape, vt.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_directions_without_loss_can_still_learn(scale: float) -> None:
    """A matrix of rank 2 and pairs of rank 5; then nothing lost at all."""
    torch.manual_seed(2)
    lost = torch.randn(40, 2) @ torch.randn(2, 30)
    fresh = torch.randn(5, 30)
    a, b = fresh.clone(), torch.zeros(40, 5)
    loftq.fill(a, b, lost, scale)
    torch.testing.assert_close(scale * b @ a, lost, rtol=1e-4, atol=1e-4)
    assert torch.equal(a[2:], fresh[2:]) and not b[:, 2:].any()
    torch.testing.assert_close(a[:2].norm(), b[:, :2].norm(), rtol=1e-4, atol=0)
    a, b = fresh.clone(), torch.zeros(40, 5)
    loftq.fill(a, b, torch.zeros(40, 30), scale)
    assert torch.equal(a, fresh) and not b.any()


def test_it_is_the_same_for_the_same_seed(checkpoints: Callable[[str], Path]) -> None:
    one, other = (attached(checkpoints("gqa")) for _ in range(2))
    for (name, mine), (_, again) in zip(layers(one), layers(other), strict=True):
        for side in ("lora_A", "lora_B"):
            found, expected = (getattr(layer, side)["default"].weight for layer in (mine, again))
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("split_fused", [True, False])
def test_what_is_saved_fits_a_base_that_nobody_touched(
    checkpoints: Callable[[str], Path], tmp_path: Path, split_fused: bool
) -> None:
    from peft import PeftModel

    folder = checkpoints("gqa")
    torch.manual_seed(0)
    base = load_base(folder)
    before = copy.deepcopy({name: tensor for name, tensor in base.model.state_dict().items()})
    model = adapters.attach(base, recipe(split_fused=split_fused))
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    adapters.save(model, base, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and not config["loftq_config"]
    stock = PeftModel.from_pretrained(load_base(folder).model, tmp_path / "adapter")
    live = logits(model)
    torch.testing.assert_close(logits(stock), live, rtol=1e-4, atol=2e-5)
    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(plain, logits(load_base(folder).model))
    assert not torch.equal(plain, live)


# --- where the weights are ---------------------------------------------------------------------------------


def sharded(folder: Path) -> None:
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3


def without_head(folder: Path) -> None:
    """As `Phi3Model` saves it."""
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})


def in_float32(folder: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def beside_another_file(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(other, folder / "consolidated.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [sharded, without_head, in_float32, beside_another_file])
def test_however_the_weights_are_stored(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = make_checkpoint(tmp_path / "base", "tied")
    expected = [update(layer) for _, layer in layers(attached(folder))]
    change(folder)
    found = [update(layer) for _, layer in layers(attached(folder))]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    folder = make_checkpoint(tmp_path / "base", "gqa")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    tensors[key][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{key} holds NaN or infinity") as caught:
        attached(folder)
    assert caught.value.problems[0].place == str(folder / "model.safetensors")


def test_a_weight_that_is_not_there(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    files = tensor_files(checkpoints("gqa"))
    del files["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(ModelError, match=r"has no tensor model\.layers\.0\.mlp"):
        loftq._find("model.layers.0.mlp.down_proj.weight", files, tmp_path)
