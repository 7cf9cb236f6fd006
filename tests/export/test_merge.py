"""export/merge.py, merged.py, shards.py, compare.py: the merged checkpoint is the model as it was trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_lab import FAMILY, make_base, make_run
from memory_lab import allocated_bytes
from safetensors.torch import load_file, save_file

from qlora_phi3 import loralib_bridge, model, phi3, sizes
from qlora_phi3.errors import InputError
from qlora_phi3.export import compare, merge, merged, shards
from qlora_phi3.export.options import Options
from qlora_phi3.export.source import Source, open_source

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
"""Logits are of the order of 10: float32 sums in another order differ by 3e-5, another base by over 1."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home, made = tmp_path_factory.mktemp("bases"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_base(home / kind, kind)
        return made[kind]

    return get


def source_of(home: Path, base: Path, **keys: Any) -> Source:
    return open_source(make_run(home, base, **keys))


def live(source: Source, *, quantized: bool = True) -> Any:
    """The model as trained: PEFT on the base as `model.load` gives it."""
    settings = source.model.model_copy(update={} if quantized else {"quantization": "none"})
    base = model.load(source.checkpoint, settings, CPU)
    geometry = source.checkpoint.geometry
    return loralib_bridge.attach_adapter(base.model, source.tensors, source.config, geometry).eval()


@torch.no_grad()
def logits(causal: Any) -> torch.Tensor:
    return causal(IDS).logits.float()


def write(source: Source, folder: Path, base: str, dtype: torch.dtype = torch.float32) -> Any:
    """A merged checkpoint as transformers loads it, in float32 so that nothing is rounded away."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    merger = merge.Merger(source, base, dtype)  # type: ignore[arg-type]
    shards.write(folder, merge.merged_tensors(source, base, dtype), merger.shapes, dtype)  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(merge.config_of(source, dtype)))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("base", ["dequant", "original"])
@pytest.mark.parametrize("kind", FAMILY)
def test_merged_computes_what_the_live_model_does(bases: Any, tmp_path: Path, kind: str, base: str) -> None:
    source = source_of(tmp_path, bases(kind))
    found, expected = (
        logits(write(source, tmp_path / "out", base)),
        logits(live(source, quantized=base == "dequant")),
    )
    torch.testing.assert_close(found, expected, **CLOSE)
    other = logits(live(source, quantized=base != "dequant"))
    assert (found - other).abs().max() > 1e-2  # the two bases do differ


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", ["mini", "phi-4-mini"])
def test_memory_of_each_matrix_is_as_planned(
    bases: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    quantization: str,
    compute_dtype: str,
) -> None:
    for room in (merge, sizes):
        monkeypatch.setattr(room, "MERGE_CHUNK", 2**12)  # several chunks in a tiny matrix
    keys = {"quantization": quantization, "compute_dtype": compute_dtype, "double_quant": kind == "mini"}
    targets = ["qkv_proj", "o", "gate_up_proj", "embed_tokens"]
    source = source_of(tmp_path, bases(kind), model=keys, adapter={"targets": targets, "split_fused": True})
    assert source.recipe is not None
    geometry = source.checkpoint.geometry
    merger = merge.Merger(source, "dequant" if quantization == "nf4" else "original", torch.bfloat16)
    read = load_file(source.checkpoint.folder / "model.safetensors")  # mapped, torch counts the whole file
    monkeypatch.setattr(merger, "_read", lambda name: read[name].clone())
    for name in (*phi3.LINEARS, "embed_tokens"):
        full = next(one for one in merger.shapes if one.split(".")[-2] == name)
        made = allocated_bytes(lambda full=full: merger.tensor(full))
        planned = sizes.merging_bytes(source.recipe, geometry, name, "cpu")
        assert made == pytest.approx(planned, rel=0.02), name
    saved = sum(tensor.nbytes for tensor in source.tensors.values())
    assert sizes.saved_adapter_bytes(source.recipe, geometry) == saved


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["q", "embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", ["phi-4-mini", "mini"])
def test_an_adapter_on_a_tied_matrix_unties_it(
    bases: Any, tmp_path: Path, kind: str, targets: list[str]
) -> None:
    source = source_of(tmp_path, bases(kind), adapter={"targets": targets})
    made = write(source, tmp_path / "out", "dequant")
    torch.testing.assert_close(logits(made), logits(live(source)), **CLOSE)
    assert made.config.tie_word_embeddings is False
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("kind", FAMILY)
def test_every_tensor_of_the_checkpoint_is_there(bases: Any, tmp_path: Path, kind: str) -> None:
    source = source_of(tmp_path, bases(kind))
    stock = load_file(source.checkpoint.folder / "model.safetensors")
    found = dict(merge.merged_tensors(source, "original", torch.bfloat16))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in stock.items()}
    changed = {name for name in found if not torch.equal(found[name], stock[name])}
    assert changed == {f"{name}.weight" for name in merge.fused_pairs(source)}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_dequant_is_bit_by_bit_what_training_had(
    bases: Any, tmp_path: Path, compute: str, double_quant: bool
) -> None:
    import bitsandbytes as bnb

    settings = {"compute_dtype": compute, "double_quant": double_quant}
    source = source_of(tmp_path, bases("medium"), model=settings)
    base = model.load(source.checkpoint, source.model, CPU)
    merger = merge.Merger(source, "dequant", torch.float32)
    merger._pairs = {}
    for name, module in base.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            wanted = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(merger.tensor(f"{name}.weight"), wanted.float()), name


@pytest.mark.parametrize("method", ["rslora", "lora"])
@pytest.mark.parametrize("split_fused", [True, False])
def test_any_scale_and_split(bases: Any, tmp_path: Path, method: str, split_fused: bool) -> None:
    adapter = {"method": method, "split_fused": split_fused, "alpha": 5}
    source = source_of(tmp_path, bases("medium"), adapter=adapter)
    found = logits(write(source, tmp_path / "out", "dequant"))
    torch.testing.assert_close(found, logits(live(source)), **CLOSE)


# The whole target


def test_the_folder_is_a_checkpoint_with_the_bases_own_keys(bases: Any, tmp_path: Path) -> None:
    source = source_of(tmp_path, bases("mini-128k"), model={"compute_dtype": "bfloat16"})
    (tmp_path / "out").mkdir()
    details = merged.write(source, tmp_path / "out", Options(merge_base="dequant"), lambda _: None)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    written, stock = json.loads((tmp_path / "out" / "config.json").read_text()), source.checkpoint.config
    assert written == {k: v for k, v in stock.items() if k != "auto_map"}
    assert written["rope_scaling"]["long_factor"] and "rope_parameters" not in written
    assert details["merge"]["base"] == "dequant"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == model.load_tokenizer(source.checkpoint.folder).chat_template
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert made.dtype == torch.bfloat16 and made.generation_config.eos_token_id == ends
    assert made.config.rope_parameters["rope_type"] == "longrope"


def test_auto_takes_the_nearer_merge_and_reports_both(bases: Any, tmp_path: Path) -> None:
    source = source_of(tmp_path, bases("medium"))
    said: list[str] = []
    report = compare.choose(source, "auto", torch.bfloat16, said.append)
    assert set(report.merges) == {"dequant", "original"} and report.rows == 4 and report.tokens > 10
    assert report.base == "dequant" and report.reason == "nearest to the model as trained"
    assert report.merges["dequant"].kl_mean < 0.05 * report.merges["original"].kl_mean
    assert report.live_loss == pytest.approx(report.merges["dequant"].loss, rel=0.02)
    assert json.dumps(report.to_json())


@pytest.mark.parametrize("kind", FAMILY)
def test_the_streamed_figures_are_those_of_the_whole_model(bases: Any, tmp_path: Path, kind: str) -> None:
    source = source_of(tmp_path, bases(kind), adapter={"targets": ["q", "down", "embed_tokens"]})
    whole = logits(write(source, tmp_path / "out", "original"))
    from qlora_phi3.engine import attention
    from qlora_phi3.engine.documents import Documents, hidden_states

    attention.register()
    rows = [type("Row", (), {"input_ids": row.tolist(), "labels": row.tolist()}) for row in IDS]
    with compare.streamed(merge.Merger(source, "original", torch.float32)) as causal, torch.no_grad():
        found = causal.lm_head(hidden_states(causal, Documents.of(rows, CPU)))  # type: ignore[arg-type]
        assert all(p.is_meta for p in causal.model.layers.parameters())
    torch.testing.assert_close(found.view_as(whole), whole, **CLOSE)


def test_an_unquantized_run_has_only_the_original_to_merge_into(bases: Any, tmp_path: Path) -> None:
    source = source_of(tmp_path, bases("mini"), model={"quantization": "none"})
    report = compare.choose(source, "auto", torch.float32, lambda _: None)
    assert report.base == "original" and set(report.merges) == {"original"}
    assert report.merges["original"].kl_max < 1e-5
    with pytest.raises(InputError, match="--merge-base: dequant is for adapters trained on NF4"):
        compare.choose(source, "dequant", torch.float32, lambda _: None)


def test_rows_that_are_gone_are_told(bases: Any, tmp_path: Path) -> None:
    source = source_of(tmp_path, bases("mini"))
    (tmp_path / "chats.jsonl").unlink()
    report = compare.choose(source, "auto", torch.bfloat16, lambda _: None)
    assert report.base == "dequant" and not report.merges
    assert "cannot be read again" in report.reason and "no such file" in report.reason


def test_an_adapter_without_its_run_must_be_told_what_it_was_trained_on(bases: Any, tmp_path: Path) -> None:
    make_run(tmp_path, bases("mini"))
    (tmp_path / "run" / "adapter").rename(tmp_path / "alone")
    source = open_source(tmp_path / "alone")
    assert source.recipe is None and source.report is None and source.name == "alone"
    with pytest.raises(InputError, match="--merge-base: nothing says what"):
        compare.choose(source, "auto", torch.bfloat16, lambda _: None)
    assert compare.choose(source, "original", torch.bfloat16, lambda _: None).base == "original"


def test_numbers_beyond_float16_are_refused(bases: Any, tmp_path: Path) -> None:
    source = source_of(tmp_path, bases("mini"))
    large = {k: t * 1e7 if "lora_B" in k else t for k, t in source.tensors.items()}
    source = dataclasses.replace(source, tensors=large)
    with pytest.raises(InputError, match=r"--dtype: .* holds numbers that float16 cannot"):
        list(merge.merged_tensors(source, "original", torch.float16))


# Files


@pytest.mark.parametrize("max_bytes", [1, 5000, 40000, 10**9])
def test_shards_read_back_as_the_library_writes_them(tmp_path: Path, max_bytes: int) -> None:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(3 + i, 64).bfloat16() for i in range(20)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    paths = shards.write(tmp_path, iter(tensors.items()), shapes, torch.bfloat16, max_bytes)
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in tensors)
    if len(paths) == 1:
        assert paths[0].name == "model.safetensors" and not (tmp_path / shards.INDEX).exists()
    else:
        index = json.loads((tmp_path / shards.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert {n: tmp_path / f for n, f in index["weight_map"].items()} == {
            n: path for path in paths for n in load_file(path)
        }


def test_a_sharded_merge_loads(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path, bases("medium"))
    monkeypatch.setattr(shards.write, "__defaults__", (60_000,))
    found = logits(write(source, tmp_path / "out", "dequant"))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(found, logits(live(source)), **CLOSE)


def test_a_merge_holds_one_matrix(tmp_path: Path) -> None:
    """Of a checkpoint of 16 matrices, in several files, never more than a few are alive at once."""
    import gc

    base, most = make_base(tmp_path / "base", "mini"), 0
    source = source_of(tmp_path, base)
    big = dataclasses.replace(source)
    sizes = [t.nbytes for _, t in merge.merged_tensors(big, "dequant", torch.bfloat16)]
    gc.collect()

    def alive() -> int:
        gc.collect()
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        return sum(found.values())

    def tensors() -> list[torch.Tensor]:
        return [one for one in gc.get_objects() if type(one) is torch.Tensor]

    before = alive()
    for _ in merge.merged_tensors(big, "dequant", torch.bfloat16):
        most = max(most, alive() - before)
    pairs = sum(pair.a.nbytes + pair.b.nbytes for pair in merge.fused_pairs(source).values())
    assert most <= pairs + 2 * max(sizes) < pairs + sum(sizes) / 2


def test_files_of_several_shards_are_read(bases: Any, tmp_path: Path) -> None:
    """A base in shards, as the hub has them."""
    import shutil

    base = Path(shutil.copytree(bases("mini"), tmp_path / "sharded"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    index = {}
    for i, group in enumerate((list(tensors)[:5], list(tensors)[5:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in group}, base / file, {"format": "pt"})
        index |= dict.fromkeys(group, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    source = source_of(tmp_path, base)
    found = logits(write(source, tmp_path / "out", "original"))
    torch.testing.assert_close(found, logits(live(source, quantized=False)), **CLOSE)
