"""layouts/files.py and settings.py: nothing unsafe or unwhole is read, nothing half is written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_models import FAMILY, adapter, geometry
from safetensors.torch import load_file, save_file

from qlora_phi3.errors import InputError, ModelError, OutputError, RunError
from qlora_phi3.layouts import LAYOUTS, AdapterConfig, Layout, convert, files, read_adapter, write_adapter
from qlora_phi3.layouts.blocks import same_bits
from qlora_phi3.layouts.files import (
    CONFIG_NAME,
    LORALIB_CONFIG,
    LORALIB_WEIGHTS,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
)
from qlora_phi3.layouts.names import linear_shapes
from qlora_phi3.loralib_bridge import loralib_config

MINI = geometry("mini")


def write(tmp_path: Path, layout: Layout = "fused", name: str = "adapter") -> Path:
    write_adapter(tmp_path / name, *convert(*adapter(MINI), layout, MINI))
    return tmp_path / name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FAMILY)
def test_what_is_written_is_read(tmp_path: Path, kind: str, layout: Layout, rslora: bool) -> None:
    sizes = geometry(kind)
    names = ("gate_up_proj", "o_proj") if layout == "loralib_merged" and kind != "mini" else ()
    tensors, config = convert(*adapter(sizes, *names, use_rslora=rslora), layout, sizes)
    write_adapter(tmp_path / "adapter", tensors, config)
    read, found = read_adapter(tmp_path / "adapter", sizes)
    assert found == config
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[key], tensors[key]) for key in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_patterns_are_read(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"model.layers.1.mlp.down_proj": 2}, "alpha_pattern": {"qkv_proj": 3}}
    for layout in ("fused", "unfused", "loralib", "loralib_merged"):
        tensors, config = convert(*adapter(MINI, **settings), layout, MINI)
        write_adapter(tmp_path / layout, tensors, config)
        assert read_adapter(tmp_path / layout, MINI)[1] == config


def test_a_file_of_a_folder_can_be_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert read_adapter(folder / PEFT_WEIGHTS, MINI)[1] == read_adapter(folder, MINI)[1]


def test_mlx_knows_one_scale(tmp_path: Path) -> None:
    tensors, config = convert(*adapter(MINI, alpha_pattern={"o_proj": 3}), "mlx", MINI)
    with pytest.raises(ModelError, match=r"scaled by 0.75, 2; MLX has one"):
        write_adapter(tmp_path / "adapter", tensors, config)
    assert list(tmp_path.iterdir()) == []
    ranks = adapter(MINI, rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 4})
    write_adapter(tmp_path / "adapter", *convert(*ranks, "mlx", MINI))
    settings = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert settings["lora_parameters"]["scale"] == 2
    assert "self_attn.qkv_proj" in settings["lora_parameters"]["keys"]
    assert read_adapter(tmp_path / "adapter", MINI)[1].rank_pattern == {"o_proj": 2}


def test_mlx_has_one_rank(tmp_path: Path) -> None:
    """mlx-lm makes all pairs of one rank, and loads tensors of no other shape."""
    settings = {"rank_pattern": {"qkv_proj": 12}, "alpha_pattern": {"qkv_proj": 24}}
    tensors, config = convert(*adapter(MINI, **settings), "mlx", MINI)
    write_adapter(tmp_path / "a", tensors, config)
    saved = load_file(tmp_path / "a" / MLX_WEIGHTS)
    ranks = {t.shape[1 if key.endswith("lora_a") else 0] for key, t in saved.items()}
    written = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert ranks == {written["lora_parameters"]["rank"]} == {12}
    key = "model.layers.0.mlp.down_proj.lora_"
    assert not saved[f"{key}a"][:, 4:].any() and not saved[f"{key}b"][4:].any()
    found, described = read_adapter(tmp_path / "a", MINI)
    assert described == config
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], t) for k, t in tensors.items())


@pytest.mark.parametrize(
    ("note", "match"),
    [
        ({"down_proj": 0}, "holds other than ranks"),
        ({"down_proj": "4"}, "holds other than ranks"),
        ([4], "unpadded_ranks is"),
        ({"down_proj": 3}, "rank 12, but the config says 3"),
        ({"down_proj": 13}, "rank 12, but the config says 13"),
    ],
    ids=str,
)
def test_notes_about_ranks_that_are_not_true(tmp_path: Path, note: Any, match: str) -> None:
    settings = {"rank_pattern": {"qkv_proj": 12}, "alpha_pattern": {"qkv_proj": 24}}
    write_adapter(tmp_path / "a", *convert(*adapter(MINI, **settings), "mlx", MINI))
    path = tmp_path / "a" / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "unpadded_ranks": note}))
    with pytest.raises(ModelError, match=match):
        read_adapter(tmp_path / "a", MINI)


def test_the_base_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", *adapter(MINI), base="microsoft/Phi-3-mini-4k-instruct", revision="abc")
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (
        "microsoft/Phi-3-mini-4k-instruct", "abc",
    )  # fmt: skip


# --- loralib's own files -----------------------------------------------------------------------------------


def test_a_bare_loralib_file_needs_a_config(tmp_path: Path) -> None:
    tensors, _ = adapter(MINI, layout="loralib")
    torch.save(tensors, tmp_path / "mine.pt")
    with pytest.raises(ModelError, match="does not say its alpha"):
        read_adapter(tmp_path / "mine.pt", MINI)
    found = read_adapter(tmp_path / "mine.pt", MINI, config=loralib_config(8, 4))[1]
    assert (found.alpha, found.rank, found.layout) == (8, 4, "loralib")
    with pytest.raises(ModelError, match="rank 4, but the config says 3"):
        read_adapter(tmp_path / "mine.pt", MINI, config=loralib_config(8, 3))
    with pytest.raises(ModelError, match="is in loralib names; the config says fused"):
        read_adapter(tmp_path / "mine.pt", MINI, config=AdapterConfig(4, 8, ()))


class Evil:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_run_nothing(tmp_path: Path, dump: Callable[[Any, Path], Any]) -> None:
    dump({"model.layers.0.self_attn.o_proj.lora_A": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="holds more than tensors"):
        read_adapter(tmp_path / "evil.pt", MINI, config=loralib_config(8, 4))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [[1], {"a": 1}, {1: torch.zeros(1)}, torch.zeros(2), {"a": {"b": torch.zeros(1)}}, None],
    ids=str,
)
def test_not_tensors_by_name(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match="tensors"):
        read_adapter(tmp_path / "odd.pt", MINI, config=loralib_config(8, 4))


def test_sparse_and_meta_tensors(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.o_proj.lora_A"
    for odd in (torch.eye(64).to_sparse(), torch.zeros(4, 64, device="meta")):
        torch.save({key: odd}, tmp_path / "odd.pt")
        with pytest.raises(ModelError):
            read_adapter(tmp_path / "odd.pt", MINI, config=loralib_config(8, 4))


def test_a_huge_stretched_tensor_is_refused_by_its_shape(tmp_path: Path) -> None:
    tensors, _ = adapter(MINI, "o_proj", layout="loralib")
    key = next(key for key in tensors if key.endswith("lora_A"))
    tensors[key] = torch.zeros(1).expand(1 << 40, 64)
    torch.save(tensors, tmp_path / "stretched.pt")
    with pytest.raises(ModelError):
        read_adapter(tmp_path / "stretched.pt", MINI, config=loralib_config(8, 4))


# --- foreign folders ---------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def remove(path: Path) -> None:
    path.unlink()


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def outside(path: Path) -> None:
    target = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def upwards(path: Path) -> None:
    shutil.move(path, path.parent.parent / path.name)
    path.symlink_to(f"../{path.name}")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGE = [cut, empty, garbage, remove, as_folder, outside, upwards, dangling]


@pytest.mark.parametrize("spoil", DAMAGE)
@pytest.mark.parametrize("layout", ["fused", "mlx", "loralib"])
@pytest.mark.parametrize("part", ["weights", "config"])
def test_damaged_folders(tmp_path: Path, layout: Layout, part: str, spoil: Callable[[Path], None]) -> None:
    folder = write(tmp_path, layout)
    names = {
        "fused": (PEFT_WEIGHTS, CONFIG_NAME),
        "mlx": (MLX_WEIGHTS, CONFIG_NAME),
        "loralib": (LORALIB_WEIGHTS, LORALIB_CONFIG),
    }[layout]
    spoil(folder / names[part == "config"])
    with pytest.raises(InputError) as caught:
        read_adapter(folder, MINI)
    for problem in caught.value.problems:
        assert str(folder) in problem.place
        assert problem.reason
        assert problem.remedy
        assert "\n" not in str(problem)


def test_a_link_inside_the_folder_is_fine(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / PEFT_WEIGHTS).rename(folder / "real.safetensors")
    (folder / PEFT_WEIGHTS).symlink_to("real.safetensors")
    read_adapter(folder, MINI)


def test_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    made, cache = write(tmp_path), tmp_path / "models--me--lora"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in made.iterdir():
        path.rename(cache / "blobs" / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-of-{path.name}")
    read_adapter(snapshot, MINI)
    (cache / "blobs").rename(cache / "other")
    (snapshot / PEFT_WEIGHTS).unlink()
    (snapshot / PEFT_WEIGHTS).symlink_to(f"../../other/hash-of-{PEFT_WEIGHTS}")
    with pytest.raises(ModelError, match="is a link out of its folder"):
        read_adapter(snapshot, MINI)


def test_tensors_of_several_types_become_one_that_holds_them(tmp_path: Path) -> None:
    folder = write(tmp_path)
    tensors = load_file(folder / PEFT_WEIGHTS)
    mixed = {key: tensor.bfloat16() if "lora_A" in key else tensor for key, tensor in tensors.items()}
    save_file(mixed, folder / PEFT_WEIGHTS)
    found, _ = read_adapter(folder, MINI)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[key], mixed[key].float()) for key in mixed)


@pytest.mark.parametrize(
    "pattern",
    [
        {r"layers\.1\.self_attn\.(q|k)kv_proj": 6, ".*down_proj": 2},
        {r"model.layers.[0-1].mlp.down_proj$": 6, "o_proj|down_proj": 2},
        {r"^model\.layers\.\d+\.mlp\.gate_up_proj": 3, "proj": 5},
        {r".*\.(?:self_attn)\..*qkv_proj": 7},
    ],
)
def test_patterns_that_are_expressions_mean_what_they_mean_in_peft(
    tmp_path: Path, pattern: dict[str, int]
) -> None:
    from peft.utils.other import get_pattern_key

    modules = [module for module in linear_shapes(MINI) if ".layers." in module]
    ranks = {m: pattern.get(get_pattern_key(pattern, m), 4) for m in modules}
    assert set(ranks.values()) > {4} or len(pattern) == 2
    tensors, config = adapter(MINI, rank_pattern={f"^{m}": r for m, r in ranks.items()})
    write_adapter(tmp_path / "adapter", tensors, config)
    path = tmp_path / "adapter" / CONFIG_NAME
    settings = json.loads(path.read_text()) | {"r": 4, "rank_pattern": pattern}
    path.write_text(json.dumps(settings | {"alpha_pattern": dict.fromkeys(pattern, 16)}))
    _, found = read_adapter(tmp_path / "adapter", MINI)
    assert {m: found.rank_of(m) for m in modules} == ranks
    alphas = {m: 16 if get_pattern_key(pattern, m) in pattern else 8 for m in modules}
    assert {m: found.alpha_of(m) for m in modules} == alphas


def test_pickled_adapters(tmp_path: Path) -> None:
    folder = write(tmp_path)
    torch.save(load_file(folder / PEFT_WEIGHTS), folder / "adapter_model.bin")
    (folder / PEFT_WEIGHTS).unlink()
    for path in (folder, folder / "adapter_model.bin"):
        with pytest.raises(ModelError, match="Save it as safetensors"):
            read_adapter(path, MINI)


def test_two_adapters_in_one_folder(tmp_path: Path) -> None:
    folder = write(tmp_path)
    shutil.copy(folder / PEFT_WEIGHTS, folder / MLX_WEIGHTS)
    with pytest.raises(ModelError, match="Name the file"):
        read_adapter(folder, MINI)


@pytest.mark.parametrize("name", ["", "nothing", "nothing.safetensors", "nothing.pt"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError):
        read_adapter(tmp_path / name, MINI)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "not LORA"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "whole weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "OLoRA"}, "olora"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"ensure_weight_tying": True}, "tied adapters"),
        ({"r": 5}, "rank 4, but the config says 5"),
        ({"r": None}, "r is None"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 0}, "json: r is 0, not a positive"),
        ({"lora_alpha": 0}, "json: lora_alpha is 0, not a positive"),
        ({"lora_alpha": -8}, "json: lora_alpha is -8, not a positive"),
        ({"alpha_pattern": {"o_proj": 0}}, "json: alpha_pattern: 'o_proj' is 0, not a positive"),
        ({"rank_pattern": {"o_proj": -1}}, "json: rank_pattern: 'o_proj' is -1, not a positive"),
        ({"target_modules": "(o_proj"}, "json: target_modules is '.o_proj', which is no regular"),
        ({"target_modules": "(.*)*x["}, "json: target_modules is .*, which is no regular"),
        ({"exclude_modules": "*"}, "json: exclude_modules is '.', which is no regular"),
        ({"target_modules": "nothing"}, "json: matches no linear of the base: target_modules 'nothing'"),
        (
            {"exclude_modules": ".*"},
            "json: matches no linear of the base: target_modules .*, exclude_modules",
        ),
        ({"target_modules": ["o_proj", 7]}, "target_modules is no list of names"),
        ({"target_modules": ["o_proj", "lm_head"]}, "has no tensors for lm_head"),
        ({"rank_pattern": ["a"]}, "rank_pattern is"),
        ({"rank_pattern": {"(.*)*": 4}}, "regular expression"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ],
)
def test_configs_of_other_adapters(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    folder = write(tmp_path)
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=match) as caught:
        read_adapter(folder, MINI)
    assert str(folder) in caught.value.problems[0].place


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '"x"', "{}", " " * (1 << 20) + "{}"], ids=len)
def test_configs_that_are_none(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path)
    (folder / CONFIG_NAME).write_text(text)
    with pytest.raises(ModelError):
        read_adapter(folder, MINI)


@pytest.mark.parametrize("change", [{"fine_tune_type": "dora"}, {"lora_parameters": None}])
def test_other_mlx_adapters(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write(tmp_path, "mlx")
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | change))
    with pytest.raises(ModelError):
        read_adapter(folder, MINI)


@pytest.mark.parametrize("change", [{"layout": "fused"}, {"enable_lora": {"qkv_proj": [1, 1, 1]}}])
def test_other_loralib_configs(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write(tmp_path, "loralib_merged")
    config = json.loads((folder / LORALIB_CONFIG).read_text())
    (folder / LORALIB_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ModelError):
        read_adapter(folder, MINI)


def test_weights_of_another_base(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(ModelError, match="Give an adapter made for this base"):
        read_adapter(folder, geometry("medium"))


@pytest.mark.parametrize("layout", ["fused", "unfused", "loralib", "loralib_merged"])
def test_a_missing_layer(tmp_path: Path, layout: Layout) -> None:
    """A whole pair that is gone leaves no half behind; the config still names it."""
    tensors, config = convert(*adapter(MINI), layout, MINI)
    gone = {key: tensor for key, tensor in tensors.items() if ".layers.1.mlp.down_proj" not in key}
    write_adapter(tmp_path / "adapter", gone, config)
    with pytest.raises(ModelError, match=r"no tensors for model.layers.1.mlp.down_proj"):
        read_adapter(tmp_path / "adapter", MINI)


def test_not_a_number_on_disk(tmp_path: Path) -> None:
    folder = write(tmp_path)
    tensors = load_file(folder / PEFT_WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / PEFT_WEIGHTS)
    with pytest.raises(ModelError, match="NaN"):
        read_adapter(folder, MINI)


def test_stock_peft_with_its_whole_embedding(tmp_path: Path) -> None:
    folder = write(tmp_path)
    tensors = load_file(folder / PEFT_WEIGHTS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = torch.zeros(40, 64)
    save_file(tensors, folder / PEFT_WEIGHTS)
    with pytest.raises(ModelError, match="save_embedding_layers=False"):
        read_adapter(folder, MINI)
    found, _ = read_adapter(folder, MINI, base_weight=lambda module: torch.zeros(40, 64).bfloat16())
    assert len(found) == len(tensors) - 1
    with pytest.raises(ModelError, match="whole weight of a base, and not this one's"):
        read_adapter(folder, MINI, base_weight=lambda module: torch.ones(40, 64))


# --- writing -----------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = write(tmp_path)
    before = (folder / PEFT_WEIGHTS).read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write(tmp_path)
    assert (folder / PEFT_WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_written(tmp_path: Path, value: float) -> None:
    tensors, config = adapter(MINI)
    next(iter(tensors.values()))[0, 0] = value
    with pytest.raises(ModelError, match="nothing was written"):
        write_adapter(tmp_path / "adapter", tensors, config)
    with pytest.raises(ModelError, match="no tensor"):
        write_adapter(tmp_path / "adapter", {}, config)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_do_not_get_in(tmp_path: Path) -> None:
    (tmp_path / ".adapter.partial").mkdir()
    (tmp_path / ".adapter.partial" / "old.bin").write_text("left over")
    assert {path.name for path in write(tmp_path).iterdir()} == {PEFT_WEIGHTS, CONFIG_NAME}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    real = files._write_files

    def badly(*args: Any) -> Path:
        path = real(*args)
        if path.suffix == ".pt":
            tensors = torch.load(path, weights_only=True)
            next(iter(tensors.values()))[0, 0] += 1
            torch.save(tensors, path)
        else:
            tensors = load_file(path)
            tensors.pop(next(iter(tensors)))
            save_file(tensors, path)
        return path

    monkeypatch.setattr(files, "_write_files", badly)
    with pytest.raises(RunError, match="reads back differently"):
        write(tmp_path, layout)
    assert list(tmp_path.iterdir()) == []
