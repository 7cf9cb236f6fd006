"""The `export` command: what it leaves, what it refuses, and that nothing half-done looks done."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from export_lab import make_base, make_run
from test_cli_surface import ENVIRONMENT, Answer, check_refused, command, listing, several

from qlora_phi3 import export, pipeline
from qlora_phi3.errors import InputError, OutputError, RunError
from qlora_phi3.export import consumers, destination, gates, hub
from qlora_phi3.recipe_file import load_recipe

QUIET = lambda text: None  # noqa: E731


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run on it, and what is wrong in other ways."""
    place = tmp_path_factory.mktemp("exports")
    run = make_run(place, make_base(place / "base", "mini"))
    shutil.copytree(run / "adapter", place / "bare")
    (place / "failed").mkdir()
    shutil.copy(run / "recipe.yaml", place / "failed")
    (place / "loop").mkdir()
    shutil.copy(run / "recipe.yaml", place / "loop")
    (place / "loop" / "adapter").symlink_to("adapter")
    shutil.copytree(run, place / "null")
    (place / "null" / "report.json").write_text("null")
    (place / "notes").mkdir()
    (place / "notes" / "a.txt").touch()
    shutil.copytree(run, place / "dora")
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (place / "dora" / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    shutil.copytree(run, place / "patterned")
    uneven = settings | {"alpha_pattern": {**settings["alpha_pattern"], "o_proj": 3}}
    (place / "patterned" / "adapter" / "adapter_config.json").write_text(json.dumps(uneven))
    shutil.copytree(place / "base", place / "mute")
    (place / "mute" / "tokenizer.json").unlink()
    shutil.copytree(run, place / "untold")
    recipe = (run / "recipe.yaml").read_text().replace(str(place / "base"), str(place / "mute"))
    (place / "untold" / "recipe.yaml").write_text(recipe)
    return place


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


# What it leaves


def test_all_of_them_in_one_command(run: Path) -> None:
    targets = ["adapter", "loralib", "mlx", "vllm", "merged"]
    done = command("export", str(run), *(word for t in targets for word in ("--to", t)), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["exports"]
    assert [one["target"] for one in found] == targets
    for one in found:
        folder = Path(one["folder"])
        assert folder == run / "exports" / one["target"]
        on_disk = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert on_disk == one["files"]
        assert {"README.md", "export.json", "parity.json"} <= set(on_disk)
        assert json.loads((folder / "export.json").read_text())["target"] == one["target"]
    assert set(found[-1]["details"]["merge"]["merges"]) == {"dequant", "original"}
    assert "exporting merged" in done.stderr
    assert listing(run / "exports") == sorted(p for p in listing(run / "exports") if "unfinished" not in p)


def test_targets_of_one_command_share_the_merges_measure(run: Path) -> None:
    import torch

    from qlora_phi3.export import compare
    from qlora_phi3.export.source import open_source

    source, said = open_source(run), list[str]()
    one = compare.choose(source, "auto", torch.bfloat16, said.append)
    assert compare.choose(source, "auto", torch.bfloat16, said.append) is one
    assert sum(line.startswith("measuring the merge") for line in said) == 1
    assert compare.choose(open_source(run), "auto", torch.bfloat16, said.append) is not one


@pytest.mark.parametrize("layout", ["fused", "split", "unfused"])
def test_the_adapter_in_a_layout(run: Path, layout: str) -> None:
    import torch

    from qlora_phi3 import layouts
    from qlora_phi3.export.merge import fused_pairs
    from qlora_phi3.export.source import open_source

    source = open_source(run)
    done = export.export(run, "adapter", options=export.Options(layout=layout))  # type: ignore[arg-type]
    tensors, config = layouts.read_adapter(done.folder, source.checkpoint.geometry)
    assert config.layout == ("split" if layout == "fused" else layout)  # its blocks tell that it was split
    again = layouts.convert(tensors, config, "fused", source.checkpoint.geometry)[0]
    pairs = fused_pairs(source)
    assert all(torch.equal(again[f"base_model.model.{m}.lora_A.weight"], p.a) for m, p in pairs.items())
    assert "runs" not in (done.folder / "adapter_config.json").read_text()


def test_an_adapter_folder_is_enough(place: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(place / "bare", tmp_path / "bare"))
    done = export.export(bare, "merged", options=export.Options(merge_base="original"))
    assert done.folder == tmp_path / "exports" / "merged"
    assert "the adapter came without its run" in (done.folder / "README.md").read_text()


def test_vllm_gets_one_rank_and_the_same_function(run: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20).view(1, 20)

    def logits(folder: Path) -> Any:
        base = AutoModelForCausalLM.from_pretrained(run.parent / "base_of", dtype=torch.float32)
        with torch.no_grad():
            return PeftModel.from_pretrained(base, folder).eval()(ids).logits

    from qlora_phi3.export.source import open_source

    (run.parent / "base_of").symlink_to(open_source(run).checkpoint.folder)
    done = export.export(run, "vllm")
    settings = json.loads((done.folder / "adapter_config.json").read_text())
    assert not settings["rank_pattern"] and not settings["alpha_pattern"]
    assert settings["r"] == 12 and done.details["flags"] == ["--enable-lora", "--lora-modules", "NAME=FOLDER"]
    torch.testing.assert_close(logits(done.folder), logits(run / "adapter"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"r": 640}, "rank 640 is above 512"),
        ({"use_dora": True}, "no DoRA"),
        ({"bias": "all"}, "no biases"),
        ({"modules_to_save": ["lm_head"]}, "no modules_to_save"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"rank_pattern": {"o_proj": 4}}, "no patterns"),
        ({"target_modules": ["lm_head"]}, "neither embedding nor head"),
    ],
)
def test_vllm_s_rules(settings: dict[str, Any], word: str) -> None:
    from qlora_phi3.export.targets import vllm_rules

    flags, problems = vllm_rules({"r": 48, "init_lora_weights": True, **settings})
    assert len(problems) == 1 and word in problems[0]
    assert vllm_rules({"r": 48}) == ([*flags[:3], "--max-lora-rank", "64"], [])


# What it refuses


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no folder": (["nowhere", "--to", "adapter"], ["nowhere: no such folder."]),
    "no adapter": (["notes", "--to", "adapter"], ["notes: holds no adapter_config.json."]),
    "a run without adapter": (["failed", "--to", "merged"], ["failed: is a run without an adapter"]),
    "an adapter that is a loop": (["loop", "--to", "merged"], ["loop/adapter: is a link", "leads to itself"]),
    "a report of null": (["null", "--to", "adapter"], ["null/report.json: is not a JSON object."]),
    "dora": (["dora", "--to", "gguf-lora"], ["the adapter uses DoRA, which is no plain LoRA."]),
    "alpha pattern": (["patterned", "--to", "gguf-lora"], ["(alpha_pattern); a GGUF adapter has one alpha"]),
    "one scale": (["patterned", "--to", "mlx"], ["MLX has one scale for all"]),
    "no tokenizer": (["untold", "--to", "merged"], ["tokenizer"]),
    "a place that is taken": (["run", "--to", "adapter", "--out", "notes"], ["notes: is not empty."]),
    "no export to replace": (
        ["run", "--to", "adapter", "--out", "notes", "--force"],
        ["notes: holds something that is no export, which --force would delete."],
    ),
    "one place for two": (
        ["run", "--to", "adapter", "--to", "merged", "--out", "x"],
        ["--out: is for one target; these are adapter, merged."],
    ),
    "hub without export": (["run", "--to", "hub", "--repo", "a/b"], ["there is no export of adapter here."]),
    "bare adapter": (["bare", "--to", "merged"], ["--merge-base: nothing says what"]),
}
AT_ONCE: dict[str, tuple[list[str], list[str]]] = {
    "unknown target": (["run", "--to", "mergd"], ["--to: 'mergd' is unknown. Did you mean 'merged'?"]),
    "unknown kind": (["run", "--to", "gguf:q8"], ["Did you mean 'gguf:q8_0'?"]),
    "twice": (["run", "--to", "mlx", "--to", "mlx"], ["--to: names a target twice"]),
    "another target's option": (
        ["run", "--to", "merged", "--layout", "split"],
        ["--layout: is for adapter, not for merged."],
    ),
    "unknown value": (["run", "--to", "merged", "--merge-base", "dequan"], ["Did you mean 'dequant'?"]),
    "hub without repo": (["run", "--to", "hub"], ["--repo: is missing"]),
}


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, tuple[Answer, list[str]]]:
    wanted = AT_ONCE | REFUSED
    before = listing(place)
    found = several([["export", *arguments] for arguments, _ in wanted.values()], cwd=place)
    assert listing(place) == before  # nothing is left behind
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", [*AT_ONCE, *REFUSED])
def test_refused(answers: dict[str, tuple[Answer, list[str]]], name: str) -> None:
    done, heavy = answers[name]
    progress = ("exporting", "measuring", "merging", "Loading")
    message = "\n".join(line for line in done.stderr.splitlines() if not line.startswith(progress))
    check_refused(Answer([], done.returncode, done.stdout, message), *(AT_ONCE | REFUSED)[name][1])
    assert name in REFUSED or heavy == []


def test_an_export_is_replaced_only_with_force(run: Path) -> None:
    first = export.export(run, "adapter")
    with pytest.raises(OutputError, match=r"exists already\. Give --force"):
        export.export(run, "adapter")
    (first.folder / "stray").touch()
    export.export(run, "adapter", force=True)
    assert not (first.folder / "stray").exists() and (first.folder / "export.json").exists()
    assert [path.name for path in (run / "exports").iterdir()] == ["adapter"]


def test_a_full_disk_is_told_before_anything_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(run)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(destination, "unfinished", None)
    with pytest.raises(OutputError, match=r"exports/merged: needs .* and the disk has 1\.00 MiB free"):
        export.export(run, "merged")
    assert not (run / "exports").exists()


def test_the_predicted_size_is_that_of_the_files(run: Path) -> None:
    from qlora_phi3.export.source import open_source
    from qlora_phi3.export.table import target_of

    source = open_source(run)
    for target, options in (("adapter", {}), ("mlx", {}), ("merged", {"merge_base": "dequant"})):
        predicted = target_of(target).num_bytes(source, export.Options())
        done = export.export(run, target, options=export.Options(**options))
        assert predicted * (1 + destination.SPARE) + 2**20 > sum(done.files.values()), target


WAITS = """
import sys, time
from pathlib import Path
from qlora_phi3.export import export, gates

def wait(*_, **__):
    print("written", flush=True)
    time.sleep(60)

gates.Gates.check = wait
export(Path(sys.argv[1]), "adapter")
"""


def test_a_killed_export_leaves_nothing_that_looks_finished(run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(run)], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = (run / "exports").iterdir()
    assert left.name.startswith(".adapter.unfinished-") and not (left / "export.json").exists()
    export.export(run, "adapter")
    assert [path.name for path in (run / "exports").iterdir()] == ["adapter"]


def test_a_failing_export_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gates.Gates, "check", fail)
    with pytest.raises(KeyboardInterrupt):
        export.export(run, "adapter")
    assert not (run / "exports").exists()


def test_what_its_program_cannot_load_is_removed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("__init__() missing 'rms_norm_eps'\nmore")

    monkeypatch.setattr(consumers, "peft_folder", fail)
    words = (
        r"adapter: the program that it is for cannot load it: TypeError: __init__\(\) missing 'rms_norm_eps'"
    )
    with pytest.raises(RunError, match=words):
        export.export(run, "adapter")
    assert listing(run / "exports") == []
    assert export.export(run, "adapter", options=export.Options(gate=False)).parity is not None


def test_drift_keeps_only_what_the_gate_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"verdict": "drift", "consumer": "a program", "reasons": ["mean KL 2"]}
    monkeypatch.setattr(gates.Gates, "_measure", lambda *_: (found, "token 3 of the prompt is 7, not 9"))
    with pytest.raises(RunError, match=r"not compute what was trained: mean KL 2\. token 3 of the prompt"):
        export.export(run, "adapter")
    assert listing(run / "exports") == ["adapter.failed", "adapter.failed/parity.json"]
    monkeypatch.undo()
    export.export(run, "adapter")
    assert [path.name for path in (run / "exports").iterdir()] == ["adapter"]


def test_the_gate_can_be_left_out_and_it_shows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates.Gates, "_measure", None)
    done = export.export(run, "adapter", options=export.Options(gate=False))
    assert done.parity is not None and done.parity["reasons"] == ["switched off with --no-gate"]
    assert json.loads((done.folder / "parity.json").read_text())["verdict"] == "skipped"


# The hub


def test_a_dry_run_lists_the_files_and_sends_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_upload", None)
    said: list[str] = []
    options = export.Options(repo="me/model", dry_run=True)
    *_, done = export.export_all(run, ["adapter", "hub"], options=options, say=said.append)
    assert "README.md" in done.files and "export.json" not in done.files and "parity.json" not in done.files
    assert all(any(line.startswith(f"{name}  ") for line in said) for name in done.files)
    assert said[-1].endswith("for me/model; nothing was sent")


def test_the_token_comes_from_the_environment_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(hub, "_upload", lambda *arguments: sent.append(arguments) or "there")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    options = export.Options(repo="me/model")
    export.export(run, "adapter")
    with pytest.raises(InputError, match=r"HF_TOKEN: is not set\."):
        export.export_all(run, ["hub"], options=options)
    monkeypatch.setenv("HF_TOKEN", "secret")
    export.export_all(run, ["hub"], options=options)
    assert sent[0][1] == "me/model" and sent[0][3] == "secret"


SPOILED = {
    "pickle": ("optimizer.pt", "x", "is a pickle"),
    "token": ("README.md", "use hf_" + "a" * 30, "looks like an access token"),
    "path": ("adapter_config.json", '{"base": "/home/someone/models/phi"}', "a path of this machine"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_for_others_is_refused(run: Path, name: str) -> None:
    file, text, words = SPOILED[name]
    folder = export.export(run, "adapter").folder
    (folder / file).write_text(text)
    with pytest.raises(OutputError, match=f"{file}: .*{words}"):
        hub.check(folder, "adapter", "me/model")


def test_no_export_names_a_path_of_this_machine(run: Path) -> None:
    options = export.Options(merge_base="dequant")
    for target in ("adapter", "vllm", "mlx", "merged"):
        folder = export.export(run, target, options=options if target == "merged" else None).folder
        hub.check(folder, "adapter", "me/model")
        texts = [p for p in folder.iterdir() if p.suffix in (".json", ".md") and p.name != "export.json"]
        assert [p.name for p in texts if str(run.parent) in p.read_text()] == []


# At the end of a run


def test_a_recipe_exports_at_its_end(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe(extra="export: [adapter, mlx, merged]\n")
    done = command("recipe", str(path), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert f"merged  {tmp_path / 'out' / 'exports' / 'merged'}  " in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(one["target"], one["folder"]) for one in report["exports"]] == [
        ("mlx", "exports/mlx"),
        ("merged", "exports/merged"),
    ]
    merge = report["exports"][1]["details"]["merge"]
    card = (tmp_path / "out" / "exports" / "merged" / "README.md").read_text()
    assert merge["merges"]["dequant"]["kl_mean"] < merge["merges"]["original"]["kl_mean"]
    assert f"| dequant (this one) | {merge['merges']['dequant']['loss']:.4f} |" in card
    assert f"sha256 `{report['data']['sources'][0]['sha256']}`" in card
    assert str(tmp_path) not in card and "learning_rate: 0.01" in card


def test_a_failing_export_never_takes_the_run_with_it(
    write_recipe: Callable[..., Path], checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """The base is removed when the training is over."""
    base = shutil.copytree(checkpoints("gqa"), tmp_path / "base")
    path = write_recipe(extra="export: [merged]\n")
    done = warm.run(
        *("recipe", path, f"model.base={base}", "--out", "out"),
        cwd=tmp_path,
        moment=warm.Moment("qlora_phi3.export:export_all"),
        act=shutil.rmtree,
        given=(str(base),),
    )
    assert done.returncode == 1, done.stderr
    assert "the run is whole, only its exports are missing" in done.stderr
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "report.json").is_file() and not (tmp_path / "out" / "exports").exists()


@pytest.mark.parametrize("target", ["gguf:q8_0", "gguf-lora", "ollama"])
def test_an_export_that_the_base_does_not_allow_is_refused_before_training(
    write_recipe: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    path = write_recipe(
        extra=f"export: [merged, {target}]\n"
    )  # whose base has no rows to spare for llama.cpp
    done = warm.run("recipe", path, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "rows to spare" in done.stderr
    assert "loading" not in done.stderr and not (tmp_path / "out").exists()


def test_what_was_exported_before_a_failure_is_in_the_report(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("no such layer")

    monkeypatch.setattr(consumers, "transformers_folder", fail)
    recipe = load_recipe(write_recipe(extra="export: [vllm, merged, loralib]\n"))
    with pytest.raises(RunError) as caught:
        pipeline.run(recipe, tmp_path / "out")
    first, second, *_ = caught.value.problems
    assert "merged: the program that it is for cannot load it: TypeError: no such layer." in str(first)
    assert "the run is whole, 2 of its exports are missing." in str(second)
    assert "--to merged --to loralib`" in str(second)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [one["folder"] for one in report["exports"]] == ["exports/vllm"]
    assert listing(tmp_path / "out" / "exports")[0] == "vllm"
