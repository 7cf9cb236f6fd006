"""GGUF files in llama.cpp itself: the same ids and the same function as transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import FAMILY, TOKENIZERS, checkpoint

from qlora_phi3.errors import InputError, ModelError
from qlora_phi3.export import gguf
from qlora_phi3.export.consumers import gguf_reader_limit, llama_cpp, transformers_folder, transformers_gguf
from qlora_phi3.export.parity import PROBES, divergence

pytest.importorskip("xllamacpp")

IDS = [7, 300, 12, 301, 55, 290, 311, 42, 270, 333]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def export(folder: Path, target: Path, kind: str = "f16", **changes: Any) -> Path:
    """The GGUF file of a checkpoint; `changes` replace arguments of `gguf.write`."""
    arguments = {"tensors": weights_of(folder).items(), "config": config_of(folder), "tokenizer": folder}
    arguments |= {"kind": kind, "name": "tiny", **changes}
    gguf.write(target, **arguments)
    return target


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str = "mini", tokenizer: str = "sentencepiece") -> Path:
        if (kind, tokenizer) not in made:
            folder = tmp_path_factory.mktemp("base") / kind
            made[kind, tokenizer] = checkpoint(folder, kind, tokenizer)
        return made[kind, tokenizer]

    return get


@pytest.mark.parametrize("kind", FAMILY)
def test_every_geometry_computes_in_llama_cpp_what_it_does_in_transformers(
    bases: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    path = export(bases(kind), tmp_path / "model.gguf")
    expected = transformers_folder(bases(kind)).log_probs(IDS)
    with llama_cpp(path, context=256) as program:
        assert divergence(expected, program.log_probs(IDS)).max() < 1e-4


def test_longrope_takes_the_long_table_beyond_the_original_context(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    path = export(bases("mini-128k"), tmp_path / "model.gguf")
    ids = [3 + i % 250 for i in range(300)]
    model = transformers_folder(bases("mini-128k"))
    with llama_cpp(path, context=512) as program:
        found = program.log_probs(ids, 1)
    assert divergence(model.log_probs(ids, 1), found).max() < 1e-4
    assert divergence(model.log_probs(ids[-200:], 1), found).max() > 0.1  # the short table's


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("bf16", 0, 2e-3),
        ("q8_0", 1e-5, 1e-2),
        ("q5_1", 1e-3, 0.2),
        ("q5_0", 1e-3, 0.2),
        ("q4_1", 1e-3, 0.5),
        ("q4_0", 1e-3, 0.5),
    ],
)
def test_quantized_kinds_stay_near(
    bases: Callable[..., Path], tmp_path: Path, kind: str, least: float, most: float
) -> None:
    path = export(bases(), tmp_path / "model.gguf", kind)
    expected = transformers_folder(bases()).log_probs(IDS)
    with llama_cpp(path, context=256) as program:
        kl = divergence(expected, program.log_probs(IDS)).mean()
    assert least < kl < most


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_templates_and_tokenizers_of_every_kind_give_the_same_ids(
    bases: Callable[..., Path], tmp_path: Path, tokenizer: str
) -> None:
    folder = bases("mini", tokenizer)
    model = transformers_folder(folder)
    texts = ["", " ", "\n\n 1\n", "a  b", "12345 x\t\ty", "don't <|end|> \n<|user|>\n\n x", "é\u2028 👍"]
    with llama_cpp(export(folder, tmp_path / "model.gguf"), context=256) as program:
        for messages in PROBES:
            assert program.tokens(messages) == model.tokens(messages)
        for text in texts:
            messages = [{"role": "user", "content": text}]
            assert program.tokens(messages) == model.tokens(messages), text


def test_transformers_reads_it_back(bases: Callable[..., Path], tmp_path: Path) -> None:
    path = export(bases(), tmp_path / "model.gguf")
    model = transformers_folder(bases())
    read = transformers_gguf(path, model.tokenizer)
    assert divergence(model.log_probs(IDS), read.log_probs(IDS)).max() < 1e-4


@pytest.mark.parametrize("kind", FAMILY)
def test_what_transformers_loses_is_said(bases: Callable[..., Path], kind: str) -> None:
    said = gguf_reader_limit(config_of(bases(kind)))
    assert (said is None) == (kind in ("mini", "medium")), said


def test_a_width_that_fits_no_block_is_kept_in_f16_and_said(tmp_path: Path) -> None:
    folder, said = checkpoint(tmp_path / "base", "mini", width=48), list[str]()
    path = export(folder, tmp_path / "model.gguf", "q4_0", say=said.append)
    assert len(said) == 1 and "48" in said[0] and "f16" in said[0]
    expected = transformers_folder(folder).log_probs(IDS)
    with llama_cpp(path, context=256) as program:
        assert divergence(expected, program.log_probs(IDS)).mean() < 0.5


def test_tensors_may_come_in_any_order(bases: Callable[..., Path], tmp_path: Path) -> None:
    weights = list(weights_of(bases()).items())
    one = export(bases(), tmp_path / "one.gguf", tensors=weights)
    other = export(bases(), tmp_path / "other.gguf", tensors=reversed(weights))
    assert one.read_bytes() == other.read_bytes()


def test_a_tied_head_is_left_out(bases: Callable[..., Path], tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = export(bases("phi-4-mini"), tmp_path / "model.gguf")
    names = {tensor.name for tensor in GGUFReader(path).tensors}
    assert "token_embd.weight" in names and "output.weight" not in names


@pytest.mark.parametrize(
    ("name", "tokenizer", "kept"),
    [
        ("my phi3 model", "sentencepiece", "my phi3 model"),
        ("tiny", "sentencepiece", "Phi-3 tiny"),
        ("my Phi-3 model", "chatml", "my phi_3 model"),
    ],
)
def test_the_name_says_whether_special_tokens_swallow_whitespace(
    bases: Callable[..., Path], tmp_path: Path, name: str, tokenizer: str, kept: str
) -> None:
    from gguf import GGUFReader

    path = export(bases("mini", tokenizer), tmp_path / "model.gguf", name=name)
    assert GGUFReader(path).fields["general.name"].contents() == kept


@pytest.mark.parametrize("kind", ["q4_k_m", "Q6_K", "iq4_xs"])
def test_k_quants_are_refused_with_the_way_on(bases: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match="llama-quantize") as caught:
        export(bases(), tmp_path / "model.gguf", kind)
    assert "q8_0" in str(caught.value) and not (tmp_path / "model.gguf").exists()


def test_unknown_kinds_are_refused(bases: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such kind"):
        export(bases(), tmp_path / "model.gguf", "f8")


def test_weights_that_are_not_those_of_the_config_are_refused(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    weights = weights_of(bases())
    norm = "model.norm.weight"
    faults: dict[str, dict[str, torch.Tensor]] = {
        "missing": {key: value for key, value in weights.items() if key != norm},
        "no weight of this": {**weights, "model.layers.9.mlp.down_proj.weight": weights[norm]},
        "config.json says": {**weights, norm: weights[norm][:-1]},
        "not finite": {**weights, norm: weights[norm] * float("nan")},
    }
    for said, tensors in faults.items():
        with pytest.raises(ModelError, match=said):
            export(bases(), tmp_path / "model.gguf", tensors=tensors.items())


def test_tables_and_scalings_that_are_not_phi_3s_are_refused(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    config = config_of(bases("mini-128k"))
    for rope, said in (({"rope_type": "yarn"}, "yarn"), ({"long_factor": [1.0]}, "long_factor")):
        changed = {**config, "rope_parameters": {**config["rope_parameters"], **rope}}
        with pytest.raises(ModelError, match=said):
            export(bases("mini-128k"), tmp_path / "model.gguf", config=changed)


def test_special_tokens_of_two_minds_are_refused(bases: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "words"
    TOKENIZERS["sentencepiece"]().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    next(token for token in content["added_tokens"] if token["content"] == "<|user|>")["rstrip"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="only some of the special tokens"):
        export(bases(), tmp_path / "model.gguf", tokenizer=folder)


def test_an_unknown_pre_tokenizer_is_refused(bases: Callable[..., Path], tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import Whitespace

    words = TOKENIZERS["chatml"]()
    words.backend_tokenizer.pre_tokenizer = Whitespace()
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(ModelError, match="no pre-tokenizer like"):
        export(bases("mini", "chatml"), tmp_path / "model.gguf", tokenizer=tmp_path / "words")


@pytest.mark.slow
def test_the_built_in_model_answers_alike_in_q8_0(tmp_path: Path) -> None:
    from qlora_phi3.recipe import Model
    from qlora_phi3.weights import locate

    base = locate(Model(base="builtin:smollm2-135m"))
    path = export(base.folder, tmp_path / "model.gguf", "q8_0", name="SmolLM2")
    model = transformers_folder(base.folder)
    with llama_cpp(path, context=512) as program:
        for question in ("What is the capital of France?", "What is 2 plus 2?"):
            ids = model.tokens([{"role": "user", "content": question}])
            assert program.tokens([{"role": "user", "content": question}]) == ids
            assert program.generate(ids, 12) == model.generate(ids, 12)
        assert divergence(model.log_probs(ids, 1), program.log_probs(ids, 1)).max() < 0.02
