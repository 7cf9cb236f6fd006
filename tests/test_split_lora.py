"""Split LoRA is what separate adapters by hand are, and what is saved of it is plain PEFT."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
from conftest import make_checkpoint
from pairs import every_pair
from safetensors.torch import load_file
from torch import nn

from qlora_phi3 import adapters, phi3, sizes
from qlora_phi3.errors import ModelError
from qlora_phi3.model import Base
from qlora_phi3.recipe import Adapter, Data, Model, Recipe, Source
from qlora_phi3.split_lora import blocks
from qlora_phi3.weights import locate

IDS = torch.arange(48).view(2, 24) % 30 + 3
GEOMETRIES = ["untied", "gqa", "tied"]


def recipe(**adapter: Any) -> Recipe:
    settings = Adapter(**{"rank": 4, "alpha": 8, **adapter})
    return Recipe(version=1, name="t", adapter=settings, data=Data(train=Source(path="unused.jsonl")))


def load_base(folder: Path, quantization: str = "none") -> Base:
    return bases.load_base(folder, quantization, "float32")


def tuned(base: Base, **adapter: Any) -> Any:
    """An adapter as after training."""
    torch.manual_seed(0)
    model = adapters.attach(base, recipe(**adapter))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


class ByHand(nn.Module):
    """A frozen linear and separate LoRAs on some of its blocks of rows, written out."""

    def __init__(self, base: nn.Module, starts: list[Any], scale: float) -> None:
        super().__init__()
        self.base, self.scale, self.starts = base, scale, [slice(*rows) for rows, _, _ in starts]
        self.a = nn.ParameterList(a.detach().clone() for _, a, _ in starts)
        self.b = nn.ParameterList(b.detach().clone() for _, _, b in starts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x).clone()
        for rows, a, b in zip(self.starts, self.a, self.b, strict=True):
            out[..., rows] += (x @ a.T @ b.T) * self.scale
        return out


def by_hand(model: Any, geometry: phi3.Geometry, scale: float) -> nn.Module:
    """The same model without PEFT and without a fused adapter."""
    found = copy.deepcopy(model).get_base_model()
    for name, module in list(found.named_modules()):
        if not hasattr(module, "lora_A"):
            continue
        linear = name.rsplit(".", 1)[-1]
        trained = getattr(module.lora_B["default"], "trained", (True,))
        rows = [at for at, on in zip(geometry.slices(linear).values(), trained, strict=True) if on]
        a, b = (blocks(side["default"]) for side in (module.lora_A, module.lora_B))
        pairs = zip(rows, a, b, strict=True)
        found.set_submodule(name, ByHand(module.base_layer, list(pairs), scale))
    return found


def train(model: Any, make: Callable[..., Any], steps: int = 15) -> list[float]:
    """Losses of full-batch steps with clipping and two accumulated passes."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(parameters, lr=2e-4, weight_decay=0.1)
    model.train()
    losses = []
    for _ in range(steps):
        total = 0.0
        for row in IDS:
            loss = model(input_ids=row[None], labels=row[None]).loss / len(IDS)
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def optimizers() -> dict[str, Any]:
    import bitsandbytes as bnb

    return {
        "adamw_torch": torch.optim.AdamW,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("optimizer", "geometry", "adapter"),  # every pair of two
    [
        ("adamw_torch", "untied", {}),
        ("adamw_torch", "gqa", {"targets": ["q", "v", "up"]}),
        ("adamw_torch", "gqa", {"method": "rslora", "targets": ["qkv_proj", "down"]}),
        ("adamw_8bit", "gqa", {}),
        ("adamw_8bit", "untied", {"targets": ["q", "v", "up"]}),
        ("adamw_8bit", "untied", {"method": "rslora", "targets": ["qkv_proj", "down"]}),
        ("paged_adamw_8bit", "gqa", {}),
        ("paged_adamw_8bit", "gqa", {"targets": ["q", "v", "up"]}),
        ("paged_adamw_8bit", "untied", {"method": "rslora", "targets": ["qkv_proj", "down"]}),
    ],
    ids=str,
)
def test_it_trains_as_separate_adapters_do(
    checkpoints: Callable[[str], Path], optimizer: str, geometry: str, adapter: dict[str, Any]
) -> None:
    """Rank 64 makes tensors of 4096 elements and more, from which on bitsandbytes' states are 8-bit.

    Fifteen steps: a fault shows in the first, and beyond thirty the last bits of some processors' products
    have grown to 2e-5 by way of the 8-bit states.
    """
    base = load_base(checkpoints(geometry))
    rank = 32 if geometry == "gqa" else 64
    torch.manual_seed(3)
    ours = adapters.attach(base, recipe(rank=rank, alpha=16, **adapter))
    scale = 16 / (math.sqrt(rank) if adapter.get("method") == "rslora" else rank)
    theirs = by_hand(ours, base.checkpoint.geometry, scale)
    found, expected = (train(model, optimizers()[optimizer]) for model in (ours, theirs))
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.1
    trained = {p for names in recipe(**adapter).adapter.trained.values() for p in names}
    for name, weight in ours.state_dict().items():
        linear = name.split(".")[-4]
        if "lora_B" in name and linear in phi3.FUSED:
            check_off_diagonal(weight, linear, base.checkpoint.geometry, trained)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("targets", ["all-linear", ["q", "v", "up"]], ids=str)
def test_resumed_training_is_exact(checkpoints: Callable[[str], Path], optimizer: str, targets: Any) -> None:
    """Four steps, adapter and optimizer states into a fresh model and optimizer, four more; or eight at once.

    With train's weight decay; rank 64 makes tensors that are large enough for 8-bit states.
    """

    def fresh(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        base = load_base(checkpoints("untied"))
        torch.manual_seed(seed)
        model = adapters.attach(base, recipe(rank=64, targets=targets))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return model, optimizers()[optimizer](parameters, lr=1e-3, weight_decay=0.1)

    def go_on(model: Any, made: torch.optim.Optimizer, steps: int) -> list[float]:
        return train(model, lambda *_, **__: made, steps)

    geometry = locate(Model(base=str(checkpoints("untied")))).geometry
    whole, states = fresh(0)
    expected = go_on(whole, states, 8)
    first, states = fresh(0)
    found = go_on(first, states, 4)
    weights = {n: t.clone() for n, t in first.state_dict().items() if "lora_" in n}
    saved = copy.deepcopy(states.state_dict())
    again, states = fresh(1)
    assert not again.load_state_dict(weights, strict=False).unexpected_keys
    states.load_state_dict(saved)
    found += go_on(again, states, 4)
    assert found == expected
    trained = {p for names in recipe(targets=targets).adapter.trained.values() for p in names}
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
        linear = name.split(".")[-4]
        if "lora_B" in name and linear in phi3.FUSED:
            check_off_diagonal(weight, linear, geometry, trained)


def check_off_diagonal(weight: torch.Tensor, linear: str, geometry: phi3.Geometry, trained: set[str]) -> None:
    blocks = geometry.slices(linear)
    rank = weight.shape[1] // len(blocks)
    for i, (name, (start, stop)) in enumerate(blocks.items()):
        own = weight[start:stop, i * rank : (i + 1) * rank]
        assert bool(own.any()) == (name in trained)
        rest = weight[start:stop].clone()
        rest[:, i * rank : (i + 1) * rank] = 0
        assert not rest.any(), "exactly zero"


@every_pair(
    "geometry, quantization, adapter",
    GEOMETRIES,
    ["nf4", "none"],
    [
        {},
        {"targets": ["q", "v"]},
        {"method": "rslora"},
        {"method": "dora"},
        {"dropout": 0.1},
        {"split_fused": False},
    ],
)
def test_what_is_saved_loads_in_stock_peft(
    tmp_path: Path,
    checkpoints: Callable[[str], Path],
    geometry: str,
    quantization: str,
    adapter: dict[str, Any],
) -> None:
    from peft import PeftModel

    base = load_base(checkpoints(geometry), quantization)
    model = tuned(base, **adapter)
    adapters.save(model, base, tmp_path / "adapter")
    live = logits(model)
    stock = PeftModel.from_pretrained(
        load_base(checkpoints(geometry), quantization).model, tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(stock), live, rtol=1e-4, atol=2e-5)
    assert not torch.equal(live, logits(load_base(checkpoints(geometry), quantization).model))
    assert {type(m).__name__ for m in stock.modules()} & {"StackedA", "DiagonalB"} == set()


@pytest.mark.parametrize(
    ("targets", "rows"),
    [
        (["q"], ["q"]),
        (["v", "q"], ["q", "v"]),
        (["q_proj", "k_proj", "v_proj"], ["q", "k", "v"]),
        (["gate_proj", "o"], ["o", "gate"]),
        (["qkv_proj", "up"], ["q", "k", "v", "up"]),
        ("all-linear", ["q", "k", "v", "o", "gate", "up", "down"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_table_names_exactly_the_projections(
    checkpoints: Callable[[str], Path], geometry: str, targets: Any, rows: list[str]
) -> None:
    base = load_base(checkpoints(geometry))
    model = adapters.attach(base, recipe(targets=targets))
    table = adapters.trained_table(model)
    geometry_of_base = base.checkpoint.geometry
    assert [row.part for row in table] == rows
    assert all((row.out_features, row.in_features) == geometry_of_base.pair_shape(row.part) for row in table)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(row.num_parameters for row in table) == sum(p.numel() for p in trainable)
    assert sizes.adapter_elements(recipe(targets=targets), geometry_of_base) == sum(
        p.numel() for p in trainable
    )


def test_projections_that_are_not_trained_stay_as_they_are(checkpoints: Callable[[str], Path]) -> None:
    base = load_base(checkpoints("gqa"))
    model = tuned(base, targets=["q", "v"])
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj")
    x = torch.randn(3, 64)
    changed = (layer(x) - layer.base_layer(x)).abs().amax(dim=0) > 0
    q, k, v = (changed[start:stop] for start, stop in base.checkpoint.geometry.slices("qkv_proj").values())
    assert q.all() and v.all() and not k.any()


def test_dora_trains_lengths_too(checkpoints: Callable[[str], Path]) -> None:
    base = load_base(checkpoints("gqa"), "nf4")
    settings = recipe(method="dora")
    model = adapters.attach(base, settings)
    lengths = [row for row in adapters.trained_table(model) if row.part == "lengths"]
    assert [row.target for row in lengths] == list(phi3.LINEARS)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.adapter_elements(settings, base.checkpoint.geometry) == trainable


def test_a_state_dict_is_that_of_the_fused_pair_and_back(checkpoints: Callable[[str], Path]) -> None:
    one = tuned(load_base(checkpoints("gqa")), targets=["q", "up"])
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    other = adapters.attach(load_base(checkpoints("gqa")), recipe(targets=["q", "up"]))
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(one))
    b = next(name for name in state if "qkv_proj.lora_B" in name)
    state[b][70, 0] = 1.0  # a row of k
    with pytest.raises(RuntimeError, match="outside the blocks that are trained"):
        other.load_state_dict(state)
    state[b] = state[b][:, 1:]
    with pytest.raises(RuntimeError, match=r"is \[128, 11\], not \[128, 12\]"):
        other.load_state_dict(state)
    del state[b]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_a_saved_adapter_is_stacked_and_block_diagonal(
    tmp_path: Path, checkpoints: Callable[[str], Path]
) -> None:
    base = load_base(checkpoints("gqa"))
    model = tuned(base)
    adapters.save(model, base, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / adapters.WEIGHTS_NAME)
    assert {name.split(".")[-2] for name in saved} == {"lora_A", "lora_B"}
    for name, weight in saved.items():
        linear = name.split(".")[-3]
        if linear in phi3.FUSED and ".lora_B." in name:
            check_off_diagonal(weight, linear, base.checkpoint.geometry, set(phi3.PROJECTIONS))


@pytest.mark.parametrize(("rank", "part"), [(33, "k"), (65, "q")])
def test_a_rank_above_a_projections_size(checkpoints: Callable[[str], Path], rank: int, part: str) -> None:
    targets = ["q", "k"] if part == "k" else ["q"]
    with pytest.raises(ModelError, match=rf"adapter.rank: {rank} is above \d+, the smaller side of {part}"):
        adapters.attach(load_base(checkpoints("gqa")), recipe(rank=rank, targets=targets))


def test_partial_rotary_and_tied(tmp_path: Path) -> None:
    """Phi-4-mini's kind of geometry."""
    base = load_base(make_checkpoint(tmp_path / "base", "tied"))
    assert base.checkpoint.geometry.tied_embeddings
    model = tuned(base, targets=["k"])
    assert not torch.equal(logits(model), logits(load_base(tmp_path / "base").model))
