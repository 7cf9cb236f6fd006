"""prequantized.py: a kept base is the loaded one bit by bit, and whatever is wrong with it, none is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GEOMETRIES, make_checkpoint

from qlora_phi3 import model, pipeline, prequantized
from qlora_phi3.model import Base, load
from qlora_phi3.recipe import Model
from qlora_phi3.recipe_file import load_recipe
from qlora_phi3.weights import locate

CPU = torch.device("cpu")
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def _keeps_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PHI3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prequantized, "MIN_BYTES", 0)


@pytest.fixture
def folder(checkpoints: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil, with answers' settings of its own."""
    made = Path(shutil.copytree(checkpoints("gqa"), tmp_path / "base"))
    (made / "generation_config.json").write_text('{"eos_token_id": [256, 3], "do_sample": false}')
    return made


def settings_of(folder: Path, **settings: Any) -> Model:
    return Model(base=str(folder), **settings)


def load_base(folder: Path, **settings: Any) -> tuple[Base, str]:
    """The base, and what was said."""
    chosen, said = settings_of(folder, **settings), list[str]()
    return load(locate(chosen), chosen, CPU, say=said.append), "\n".join(said)


def kept() -> list[Path]:
    return sorted(prequantized.root().iterdir()) if prequantized.root().exists() else []


def entry_of(folder: Path, **settings: Any) -> Path:
    chosen = settings_of(folder, **settings)
    found = prequantized.entry_of(locate(chosen), chosen, "cpu")
    assert found is not None
    return found.folder


def loss(base: Base) -> torch.Tensor:
    return base.model.train()(IDS, labels=IDS).loss.detach()


def check_same(one: Base, other: Base) -> None:
    """Every tensor, its dtype and quant state, the settings around them and the loss; no tolerance."""
    first, second = one.model.state_dict(keep_vars=True), other.model.state_dict(keep_vars=True)
    assert list(first) == list(second)
    for name, tensor in first.items():
        found = second[name]
        assert (type(found), found.dtype, found.requires_grad) == (type(tensor), tensor.dtype, False), name
        assert torch.equal(found, tensor), name
        assert found.is_contiguous()
    for mine, theirs in zip(*map(model.packed_linears, (one.model, other.model)), strict=True):
        assert theirs.weight.quant_state is theirs.quant_state
        check_same_state(mine.weight.quant_state, theirs.weight.quant_state)
        for key in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized"):
            assert getattr(mine.weight, key) == getattr(theirs.weight, key), key
        assert mine.compute_dtype == theirs.compute_dtype
        assert theirs.support_avx512bf16_for_cpu is False
    tied = [base.model.lm_head.weight is base.model.model.embed_tokens.weight for base in (one, other)]
    assert tied == [one.checkpoint.geometry.tied_embeddings] * 2
    assert one.model.config.to_dict() == other.model.config.to_dict()
    assert one.model.generation_config.to_dict() == other.model.generation_config.to_dict()
    assert one.model.name_or_path == other.model.name_or_path == str(one.checkpoint.folder)
    for flag in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        assert getattr(one.model, flag) == getattr(other.model, flag), flag
    assert torch.equal(loss(one), loss(other))


def check_same_state(one: Any, other: Any) -> None:
    assert vars(one).keys() == vars(other).keys()
    for name, mine in vars(one).items():
        theirs = getattr(other, name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
        elif name == "state2" and mine is not None:
            check_same_state(mine, theirs)
        else:
            assert mine == theirs, name


# --- what is kept is what was loaded -----------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_later_load_is_the_first(
    checkpoints: Callable[[str], Path], geometry: str, double_quant: bool, dtype: str
) -> None:
    chosen = {"double_quant": double_quant, "compute_dtype": dtype}
    stock, nothing = load_base(checkpoints(geometry), cache=False, **chosen)
    first, said = load_base(checkpoints(geometry), **chosen)
    later, read = load_base(checkpoints(geometry), **chosen)
    [entry] = kept()
    assert nothing == ""
    assert said.startswith("keeping the quantized base for later runs, ") and said.endswith(str(entry))
    assert read == f"reading the quantized base from {entry}"
    check_same(stock, first)
    check_same(first, later)


def test_generation_settings_are_the_checkpoint_s(folder: Path) -> None:
    first, later = load_base(folder)[0], load_base(folder)[0]
    assert later.model.generation_config.eos_token_id == [256, 3]
    check_same(first, later)


def test_a_checkpoint_without_generation_settings(folder: Path) -> None:
    """transformers then takes them from config.json, of the folder that it reads."""
    (folder / "generation_config.json").unlink()
    first, later = load_base(folder)[0], load_base(folder)[0]
    check_same(first, later)
    assert later.model.generation_config.eos_token_id == 256


@pytest.mark.parametrize("num_bytes", [20_000, 1])
def test_several_files(folder: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(prequantized, "_FILE_BYTES", num_bytes)
    first, later = load_base(folder)[0], load_base(folder)[0]
    [entry] = kept()
    assert len(list(entry.glob("*.safetensors"))) > 3
    check_same(first, later)


def test_a_sharded_checkpoint(folder: Path) -> None:
    from transformers import Phi3ForCausalLM

    whole = load_base(folder, cache=False)[0]
    original = Phi3ForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    original.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    first, later = load_base(folder)[0], load_base(folder)[0]
    check_same(first, later)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, later.model.state_dict()[name]), name


def test_a_run_on_a_kept_base_is_the_run_on_the_loaded_one(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, gradients and answers of whole runs, to the last digit; each says where its base is from."""
    recipe, found, said = load_recipe(write_recipe()), [], []
    for name in ("first", "later"):
        report, folder = pipeline.run(recipe, tmp_path / name)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
        found.append((steps, report.metrics))
        said.append(capsys.readouterr().err)
    assert found[0] == found[1] and len(found[0][0]) == 3
    assert "keeping the quantized base" in said[0] and "reading the quantized base" in said[1]


# --- what is not kept --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{"cache": False}, {"quantization": "none"}], ids=str)
def test_not_kept_by_choice(folder: Path, chosen: dict[str, Any]) -> None:
    assert load_base(folder, **chosen)[1] == ""
    assert kept() == []


def test_small_checkpoints_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(prequantized, "MIN_BYTES", size + 1)
    assert load_base(folder)[1] == "" and kept() == []
    monkeypatch.setattr(prequantized, "MIN_BYTES", size)
    assert "keeping" in load_base(folder)[1] and len(kept()) == 1


def test_a_disk_without_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_base(folder)
    [entry] = kept()
    num_bytes = sum(p.numel() * p.element_size() for p in _tensors(entry).values())
    shutil.rmtree(entry)
    usage = shutil._ntuple_diskusage  # type: ignore[attr-defined]
    needed = int(1.2 * num_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    base, said = load_base(folder)
    assert "is not kept" in said and "20% spare" in said and str(prequantized.root()) in said
    assert kept() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed + 1))
    assert "keeping" in load_base(folder)[1] and kept() == [entry]
    check_same(base, load_base(folder)[0])


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    base, said = load_base(folder)
    assert said.startswith("the quantized base is not kept for later runs: ") and "\n" not in said
    assert model.ParameterCounts.of(base.model).quantized > 0


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors tells a full disk with an error of its own."""
    import huggingface_hub
    from safetensors import SafetensorError

    def fail(tensors: Any, folder: Path, **options: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "save_torch_state_dict", fail)
        assert "No space left" in load_base(folder)[1]
    assert kept() == []


# --- when a kept base is another ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen",
    [{"double_quant": False}, {"compute_dtype": "float32"}, {"revision": None}],
    ids=str,
)
def test_settings_that_matter(folder: Path, chosen: dict[str, Any]) -> None:
    same = entry_of(folder, **chosen) == entry_of(folder)
    assert same == (chosen == {"revision": None})


def test_devices_and_versions_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings_of(folder)
    checkpoint = locate(chosen)
    names = {prequantized.entry_of(checkpoint, chosen, device).folder for device in ("cpu", "cuda")}  # type: ignore[union-attr]
    monkeypatch.setattr(prequantized, "version", lambda name: "0.50.99")
    names.add(entry_of(folder))
    assert len(names) == 3


@pytest.mark.parametrize("keep_time", [True, False])
def test_other_weights_of_the_same_shapes(folder: Path, tmp_path: Path, keep_time: bool) -> None:
    """Names, shapes and size are what they were; only the content tells, also when its time is set back."""
    load_base(folder)
    before = (folder / "model.safetensors").stat()
    other = make_checkpoint(tmp_path / "other", "gqa", seed=1) / "model.safetensors"
    assert other.stat().st_size == before.st_size
    shutil.copyfile(other, folder / "model.safetensors")
    if keep_time:
        os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    changed, said = load_base(folder)
    assert "keeping" in said and len(kept()) == 2
    check_same(load_base(folder, cache=False)[0], changed)


def test_one_weight_changed_in_place(folder: Path) -> None:
    """Samples may miss it; the time of the write does not."""
    load_base(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "keeping" in load_base(folder)[1]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_other_configs(folder: Path, name: str) -> None:
    before = entry_of(folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"bos_token_id": 1}))
    assert entry_of(folder) != before


def test_answers_settings_that_appear(folder: Path) -> None:
    before = entry_of(folder)
    (folder / "generation_config.json").unlink()
    assert entry_of(folder) != before


# --- what is wrong with a kept base ------------------------------------------------------------------------


def weights_of(entry: Path) -> Path:
    [found] = entry.glob("*.safetensors")
    return found


def flip_a_bit(entry: Path) -> None:
    path = weights_of(entry)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(entry: Path) -> None:
    os.truncate(weights_of(entry), 1000)


def lose_the_weights(entry: Path) -> None:
    weights_of(entry).unlink()


def lose_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def spoil_the_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_bytes(b"\xff[]")


def add_a_file(entry: Path) -> None:
    (entry / "adapter_config.json").write_text("{}")


def be_another_s(entry: Path) -> None:
    """Whole, but under a wrong name."""
    other = entry_of(Path(json.loads((entry / "about.json").read_text())["base"]), double_quant=False)
    load_base(Path(json.loads((entry / "about.json").read_text())["base"]), double_quant=False)
    shutil.rmtree(entry)
    other.rename(entry)


def hold_other_tensors(entry: Path) -> None:
    """Whole by its hashes, and still not what we write."""
    from safetensors.torch import load_file, save_file

    from qlora_phi3 import entries

    tensors = load_file(weights_of(entry))
    tensors.pop("model.norm.weight")
    save_file(tensors, weights_of(entry), {"format": "pt"})
    (entry / "manifest.json").write_text(json.dumps(entries._hashes(entry)))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        cut,
        lose_the_weights,
        lose_the_manifest,
        spoil_the_manifest,
        add_a_file,
        be_another_s,
        hold_other_tensors,
    ],
)
def test_damage_is_told_removed_and_mended(folder: Path, damage: Callable[[Path], None]) -> None:
    first, _ = load_base(folder)
    [entry] = kept()
    damage(entry)
    mended, said = load_base(folder)
    told, *others = [line for line in said.splitlines() if "reading" not in line]
    assert told.startswith(f"the quantized base in {entry} is damaged (") and "removed" in told
    assert len(others) == 1 and others[0].startswith("keeping")
    check_same(first, mended)
    later, read = load_base(folder)
    assert read == f"reading the quantized base from {entry}"
    check_same(first, later)


def test_removed_between_check_and_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another run does that makes room."""
    first, _ = load_base(folder)

    def vanish(entry: prequantized.Entry, say: Any) -> bool:
        shutil.rmtree(entry.folder)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(prequantized, "is_whole", vanish)
        check_same(first, load_base(folder)[0])
    assert "reading" in load_base(folder)[1]


def test_a_base_in_use_may_be_deleted(folder: Path) -> None:
    first, later = load_base(folder)[0], load_base(folder)[0]
    shutil.rmtree(prequantized.root())
    check_same(first, later)


def test_two_runs_at_once(folder: Path) -> None:
    """Both write; they cannot load in one process, for which transformers changes the default dtype."""
    loaded, chosen = [load_base(folder, cache=False)[0] for _ in range(2)], settings_of(folder)
    entry = prequantized.entry_of(locate(chosen), chosen, "cpu")
    assert entry is not None
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda base: prequantized.keep(base.model, entry, print), loaded))
    assert kept() == [entry.folder]  # nothing unfinished
    later, read = load_base(folder)
    assert "reading" in read
    check_same(loaded[0], later)


def test_what_was_used_least_recently_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_base(folder), load_base(folder, double_quant=False)
    first, second = entry_of(folder), entry_of(folder, double_quant=False)
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr(prequantized, "MAX_BYTES", int(2.8 * size))
    os.utime(first, (1000, 1000)), os.utime(second, (2000, 2000))
    load_base(folder)  # used again, and so it stays
    load_base(folder, compute_dtype="float32")
    assert set(kept()) == {first, entry_of(folder, compute_dtype="float32")}


def _tensors(entry: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(weights_of(entry))
