"""LoRA GGUF files in llama.cpp against PEFT, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import checkpoint
from layout_models import adapter

from qlora_phi3.errors import ModelError
from qlora_phi3.export import gguf, gguf_lora
from qlora_phi3.export.consumers import llama_cpp, loralib_file, peft_folder, transformers_folder
from qlora_phi3.export.parity import divergence
from qlora_phi3.layouts import Layout, Tensors, convert, write_adapter
from qlora_phi3.phi3 import Geometry, geometry_from_config
from qlora_phi3.weights import read_config

IDS = [7, 300, 12, 301, 55, 290, 311, 42, 270, 333]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Geometry]]:
    """Folder, GGUF file and sizes of a base by geometry."""
    made: dict[str, tuple[Path, Path, Geometry]] = {}

    def get(kind: str) -> tuple[Path, Path, Geometry]:
        if kind not in made:
            from safetensors.torch import load_file

            folder = checkpoint(tmp_path_factory.mktemp("base") / kind, kind)
            config, path = read_config(folder), folder.parent / "base.gguf"
            weights = load_file(folder / "model.safetensors")
            gguf.write(path, weights.items(), config, folder, "f16", name="tiny")
            made[kind] = folder, path, geometry_from_config(config)
        return made[kind]

    return get


def small(tensors: Tensors) -> Tensors:
    return {key: 0.1 * tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ["mini", "medium", "phi-4-mini"])
@pytest.mark.parametrize(
    ("layout", "names", "settings"),
    [
        ("fused", (), {}),
        ("fused", (), {"use_rslora": True}),
        ("fused", (), {"rank_pattern": {"o_proj": 7}}),
        ("split", (), {}),
        ("split", (), {"use_rslora": True}),
        ("unfused", ("q_proj", "v_proj", "down_proj"), {}),
    ],
    ids=str,
)
def test_it_computes_what_peft_does(
    bases: Callable[[str], tuple[Path, Path, Geometry]],
    tmp_path: Path,
    kind: str,
    layout: Layout,
    names: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    pytest.importorskip("xllamacpp")
    folder, base, sizes = bases(kind)
    made: Layout = "unfused" if layout == "split" else layout
    tensors, config = adapter(sizes, *names, layout=made, **settings)
    tensors = small(tensors)
    if layout == "split":
        tensors, config = convert(tensors, config, "split", sizes)
    write_adapter(tmp_path / "peft", *convert(tensors, config, "split", sizes))
    expected = peft_folder(folder, tmp_path / "peft").log_probs(IDS)
    gguf_lora.write(tmp_path / "lora.gguf", tensors, config, sizes, name="tiny")
    with llama_cpp(base, tmp_path / "lora.gguf", context=256) as program:
        found = program.log_probs(IDS)
    assert divergence(expected, found).max() < 1e-4
    assert divergence(expected, transformers_folder(folder).log_probs(IDS)).max() > 0.01


def test_the_embedding_and_the_head_are_adapted_where_they_are_two(
    bases: Callable[[str], tuple[Path, Path, Geometry]], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    folder, base, sizes = bases("mini")
    tensors, config = adapter(sizes, "embed_tokens", "lm_head", "o_proj")
    write_adapter(tmp_path / "peft", small(tensors), config)
    expected = peft_folder(folder, tmp_path / "peft").log_probs(IDS)
    gguf_lora.write(tmp_path / "lora.gguf", small(tensors), config, sizes, name="tiny")
    with llama_cpp(base, tmp_path / "lora.gguf", context=256) as program:
        assert divergence(expected, program.log_probs(IDS)).max() < 1e-4


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_is_refused(tmp_path: Path, name: str) -> None:
    sizes = Geometry(2, 64, 96, 4, 2, 40, tied_embeddings=True)
    tensors, config = adapter(sizes, name)
    with pytest.raises(ModelError, match="ties embedding and head"):
        gguf_lora.write(tmp_path / "lora.gguf", tensors, config, sizes, name="tiny")
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize(
    "settings",
    [{"alpha_pattern": {"o_proj": 32}}, {"rank_pattern": {"o_proj": 8}, "use_rslora": True}],
    ids=str,
)
def test_several_scales_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    sizes = Geometry(2, 64, 96, 4, 2, 40)
    tensors, config = adapter(sizes, **settings)
    with pytest.raises(ModelError, match="one alpha") as caught:
        gguf_lora.write(tmp_path / "lora.gguf", tensors, config, sizes, name="tiny")
    assert "o_proj" in str(caught.value) and "gguf:q8_0" in str(caught.value)
    assert not (tmp_path / "lora.gguf").exists()


def test_rslora_is_written_as_an_alpha(tmp_path: Path) -> None:
    from gguf import GGUFReader

    sizes = Geometry(2, 64, 96, 4, 2, 40)
    tensors, config = adapter(sizes, rank=4, alpha=8, use_rslora=True)
    gguf_lora.write(tmp_path / "lora.gguf", tensors, config, sizes, name="tiny")
    fields = GGUFReader(tmp_path / "lora.gguf").fields
    assert fields["adapter.lora.alpha"].contents() == pytest.approx(16)
    assert fields["general.type"].contents() == "adapter" and fields["adapter.type"].contents() == "lora"


def test_loralib_itself_computes_what_peft_does(
    bases: Callable[[str], tuple[Path, Path, Geometry]], tmp_path: Path
) -> None:
    pytest.importorskip("loralib")
    folder, _, sizes = bases("medium")
    tensors, config = adapter(sizes, rank_pattern={"o_proj": 7})
    tensors = small(tensors)
    write_adapter(tmp_path / "peft", tensors, config)
    write_adapter(tmp_path / "loralib", *convert(tensors, config, "loralib", sizes))
    expected = peft_folder(folder, tmp_path / "peft").log_probs(IDS)
    found = loralib_file(folder, tmp_path / "loralib", sizes).log_probs(IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
