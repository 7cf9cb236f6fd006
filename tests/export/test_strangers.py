"""Exports as they are met by who has only the folder: where they stop, in which context, who may read."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from export_lab import make_base, make_run
from test_cli_surface import command

from qlora_phi3 import export, weights
from qlora_phi3.errors import InputError, ModelError, RunError
from qlora_phi3.export import context, gguf, merge, merged, stops, vocabulary
from qlora_phi3.phi3 import Geometry

UNQUANTIZED = {"model": {"quantization": "none"}}


def only_eos(base: Path, settings: dict[str, Any] | None) -> None:
    """Have the base name its eos alone, as some do, or have no settings of answering at all."""
    path = base / stops.NAME
    path.unlink() if settings is None else path.write_text(json.dumps(settings))


def eager(base: Path) -> None:
    """Make the end of a turn likely, so that the model, as one that was trained, ends its answers."""
    from safetensors.torch import load_file, save_file

    tensors, path = load_file(base / "model.safetensors"), base / "model.safetensors"
    config = json.loads((base / "config.json").read_text())
    words = open_tokenizer(base)
    tensors["lm_head.weight"][words.convert_tokens_to_ids("<|end|>")] *= 3
    assert not config["tie_word_embeddings"]
    save_file(tensors, path, metadata={"format": "pt"})


def open_tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    base = make_base(tmp_path / "base", "mini")
    eager(base)
    return make_run(tmp_path, base, **UNQUANTIZED)


@pytest.mark.parametrize("settings", [None, {"eos_token_id": 256, "_from_model_config": True, "top_k": 5}])
def test_a_merged_model_stops_in_plain_transformers(
    run: Path, tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    from transformers import AutoModelForCausalLM

    only_eos(tmp_path / "base", settings)
    done = export.export(run, "merged")
    assert done.parity is not None and done.parity["verdict"] == "passed" and done.parity["stops"] is True
    written = json.loads((done.folder / stops.NAME).read_text())
    words = open_tokenizer(done.folder)
    ends = words.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert written["eos_token_id"] == sorted(ends) and "_from_model_config" not in written
    assert written.get("top_k") == (settings or {}).get("top_k")
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype="auto")
    assert model.generation_config.eos_token_id == sorted(ends)


def test_the_gate_sees_stops_that_are_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "generation_config", lambda source: {"eos_token_id": 256})
    with pytest.raises(RunError, match="an answer does not end as the model as trained"):
        export.export(run, "merged")


def test_settings_that_plain_transformers_cannot_answer_with_are_named(run: Path, tmp_path: Path) -> None:
    ends = json.loads((tmp_path / "base" / stops.NAME).read_text())["eos_token_id"]
    only_eos(tmp_path / "base", {"eos_token_id": ends, "repetition_penalty": -1.0})
    with pytest.raises(ModelError, match=r"generation_config\.json: transformers cannot answer with these"):
        export.export(run, "merged")


@pytest.mark.parametrize(("recipe", "told"), [("builtin:smollm2-135m", "org/a"), ("org/b", "org/a")])
def test_two_names_of_a_base_are_compared_before_any_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, told: str
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        f"version: 1\nname: lab\nmodel: {{base: '{recipe}'}}\n"
        f"data: {{train: {{path: {tmp_path}/chats.jsonl}}}}\n"
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": told}))
    monkeypatch.setattr(weights, "locate", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ModelError, match=f"was trained on {told!r}, and .*recipe.yaml names {recipe!r}"):
        export.export(tmp_path, "merged")


@pytest.mark.parametrize("name", [stops.NAME, "config.json"])
def test_half_a_character_in_a_base_is_refused_before_any_work(run: Path, tmp_path: Path, name: str) -> None:
    """Half a surrogate pair, which UTF-8 cannot say and JSON can."""
    path = tmp_path / "base" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"x": "\ud800"}))
    with pytest.raises(ModelError, match=f"{name}: cannot be read: it holds half of a character"):
        export.export(run, "merged")
    assert not (run / "exports").exists()


def test_an_adapter_s_own_template_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "bare")
    path, said = tmp_path / "bare" / "chat_template.jinja", list[str]()
    path.write_text(path.read_text().replace("<|user|>", "<|user|>You: "))
    options = export.Options(gate=False)
    done = export.export(tmp_path / "bare", "adapter", options=options, say=said.append)
    assert said[0].startswith("The adapter came with a chat template of its own")
    assert "a chat template of its own" in (done.folder / "README.md").read_text()
    assert (
        "template of its own"
        not in (export.export(run, "adapter", options=options).folder / "README.md").read_text()
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "<|end|>"}', '{"eos_token_id": [true]}'])
def test_settings_of_a_base_that_cannot_be_read(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "base" / stops.NAME).write_text(text)
    with pytest.raises(ModelError, match=rf"{stops.NAME}: .* Download it again"):
        export.export(run, "merged")
    assert not (run / "exports").exists()


# Contexts


def geometry(original: int, most: int, window: int | None = None) -> Geometry:
    sizes = {"max_positions": most, "original_max_positions": original, "sliding_window": window}
    return Geometry(2, 64, 96, 4, 4, 40, **sizes)


LONG = {"rope_scaling": {"type": "longrope"}}


def test_the_context_is_the_base_s_own() -> None:
    assert context.of_llama_cpp({}, geometry(4096, 4096)) == 4096
    assert context.of_llama_cpp({}, geometry(16384, 16384)) == 4096
    assert context.of_llama_cpp({}, geometry(2048, 2048)) == 2048
    assert context.of_llama_cpp(LONG, geometry(4096, 131072)) == 4096
    assert context.of_llama_cpp(LONG, geometry(1000, 131072)) == 768  # 1000 would be rounded up to 1024
    with pytest.raises(ModelError, match=r"original context is 200, and llama\.cpp's smallest 256"):
        context.of_llama_cpp(LONG, geometry(200, 1000))


@pytest.mark.parametrize(
    ("num_ctx", "config", "sizes", "words"),
    [
        (8192, LONG, geometry(4096, 131072), "above 4096, the base's original context.*Give 4096 or less"),
        (8192, {}, geometry(4096, 4096), "above 4096, all positions"),
        (100, {}, geometry(4096, 4096), "below 256"),
        (1001, LONG, geometry(1000, 131072), "Give 768 or less"),
    ],
)
def test_contexts_that_change_what_is_computed(
    num_ctx: int, config: dict[str, Any], sizes: Geometry, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        context.check_num_ctx(num_ctx, config, sizes, proven=True)


def test_others_pass() -> None:
    context.check_num_ctx(8192, {}, geometry(16384, 16384), proven=True)
    context.check_num_ctx(4096, LONG, geometry(4096, 131072), proven=True)
    context.check_num_ctx(8192, LONG, geometry(4096, 131072), proven=False)


def said(target: str, window: int | None, most: int = 4096) -> str:
    return " ".join(context.limits(target, {}, geometry(4096, most, window), 4096))


def test_the_window_is_told_by_its_number_and_only_where_there_is_one() -> None:
    for target in ("gguf", "ollama", "gguf-lora", "mlx", "merged"):
        assert "sliding window of 2047 tokens" in said(target, 2047)
        assert said(target, None) == said(target, 262144, 131072) == ""
    assert said("adapter", 2047) == said("vllm", 2047) == ""
    assert context.of_vllm({}, geometry(4096, 4096)) is None


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a base whose long factors answer otherwise than its short ones, original context 300."""
    place = tmp_path_factory.mktemp("long")
    return make_run(place, make_base(place / "base", "mini-128k"), **UNQUANTIZED)


@pytest.mark.parametrize("target", ["gguf:f16", "ollama", "gguf-lora"])
def test_what_the_card_says_is_what_was_checked(long_run: Path, target: str) -> None:
    pytest.importorskip("xllamacpp")
    options = export.Options(kind="f16")
    done = export.export(long_run, target, options=options)
    assert done.parity is not None and done.parity["verdict"] == "passed"
    assert done.details["context"] == 256
    text = (done.folder / "README.md").read_text()
    assert "300, the base's original context" in text and "It was checked with 256." in text
    if target == "ollama":
        assert "PARAMETER num_ctx 256\n" in (done.folder / "Modelfile").read_text()
    else:
        assert re.search(r"^llama-cli .* -c 256 -cnv$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("target", ["vllm", "merged"])
def test_vllm_is_told_how_long_the_short_factors_hold(long_run: Path, tmp_path: Path, target: str) -> None:
    done = export.export(long_run, target, out=tmp_path / "x", options=export.Options(gate=False))
    text = (done.folder / "README.md").read_text()
    assert re.search(r"vllm serve .* --max-model-len 300\b", text)
    assert "vLLM chooses LongRoPE's factors" in text


def test_with_the_long_factors_it_would_have_drifted(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(context, "of_llama_cpp", lambda *_: 512)
    with pytest.raises(RunError, match="does not compute what was trained"):
        export.export(long_run, "gguf:f16", out=tmp_path / "x")


def test_a_longer_context_is_had_unproven_only(long_run: Path, tmp_path: Path) -> None:
    told = ("export", str(long_run), "--to", "ollama", "--num-ctx", "512", "--out", str(tmp_path / "x"))
    done = command(*told)
    assert done.returncode == 2 and "--num-ctx: 512 is above 300" in done.stderr
    assert command(*told, "--no-gate").returncode == 0
    text = (tmp_path / "x" / "README.md").read_text()
    assert "512 is above 300" in text and "short ones are answered other than was trained" in text


def test_held_out_rows_that_do_not_fit_the_context_are_not_asked(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    run = make_run(tmp_path, make_base(tmp_path / "base", "mini-128k"), **UNQUANTIZED)
    long = {"messages": [{"role": "user", "content": "x" * 280}, {"role": "assistant", "content": "1"}]}
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(long)}\n" for _ in range(4)))
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("max_length: 128", "max_length: 512"))
    done = export.export(run, "gguf:f16")
    assert done.parity is not None and done.parity["verdict"] == "passed" and done.parity["num_prompts"] == 3


def test_what_llama_cpp_makes_of_other_tokens_is_told(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from tokenizers import AddedToken

    base = make_base(tmp_path / "base", "mini")
    words = open_tokenizer(base)
    words.add_tokens([AddedToken("<|doc|>", special=True, normalized=False)], special_tokens=True)
    words.add_tokens([AddedToken("<ci`te>", normalized=False)])
    words.save_pretrained(base)
    user = words.convert_tokens_to_ids("<|user|>")
    settings = json.loads((base / stops.NAME).read_text())
    settings["eos_token_id"].append(user)
    (base / stops.NAME).write_text(json.dumps(settings))
    done = export.export(make_run(tmp_path, base, **UNQUANTIZED), "gguf:f16")
    assert done.parity is not None and done.parity["stops"] is True
    assert done.parity["num_texts"] > 20 and not any(
        "<|end|>" in one["prompt"] for one in done.parity["other_texts"]
    )
    other = {one["prompt"] for one in done.parity["other_texts"]}
    assert {"a <|doc|> b", "a <ci`te>\n\nb", "\u3000a"} <= other and "a <|doc|>b" not in other
    assert vocabulary.unexplained(base, [*other, "odd"]) == ["odd"]
    text = html.unescape((done.folder / "README.md").read_text())
    assert "Not compared: sampled answers" in text and "conversations of more than 512 tokens" in text
    tokens = r"<code><|doc|></code>, <code><ci\x60te></code>"
    assert f"drops white space right behind {tokens}, where" in text and "White space beyond ASCII" in text
    assert vocabulary.read(base, 300, done.details["stop_ids"]).ids["eom"] == user
    more = vocabulary.differences(base, [user, words.convert_tokens_to_ids("<|system|>")])
    assert more[-1] == "A GGUF has no place for all stops: have llama.cpp stop at `<|system|>` too."


def test_a_question_longer_than_the_window_is_asked_of_programs_that_heed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "mini")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"sliding_window": 100}))
    eager(base)
    run = make_run(tmp_path, base, **UNQUANTIZED)
    done = export.export(run, "merged")
    assert done.parity is not None and done.parity["verdict"] == "passed" and done.parity["num_prompts"] == 5
    assert not any("sliding window" in one for one in done.parity["not_asked"])
    asked = export.export(run, "mlx").parity
    assert asked is not None and asked["num_prompts"] == 4
    assert any("more than 100 tokens" in one for one in asked["not_asked"])
    config_of = merge.config_of
    monkeypatch.setattr(merged, "config_of", lambda *told: config_of(*told) | {"sliding_window": None})
    with pytest.raises(RunError, match="does not compute what was trained"):
        export.export(run, "merged", out=tmp_path / "x")


# Who may read


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_has_the_mode_of_a_new_one(tmp_path: Path, umask: int) -> None:
    run = make_run(tmp_path, make_base(tmp_path / "base", "mini"), **UNQUANTIZED)
    targets = ["adapter", "loralib", "mlx", "vllm", "merged", "gguf:q8_0", "gguf-lora", "ollama"]
    export.export_all(run, targets, options=export.Options(gate=False))
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 40
    wrong = {str(path): oct(path.stat().st_mode) for path in files if mode(path) != 0o666 & ~umask}
    assert wrong == {}
    folders = [path for path in run.rglob("*") if path.is_dir()]
    assert {mode(path) for path in folders} == {0o777 & ~umask}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Everything is checked before anything is written


def report(run: Path, content: object) -> None:
    (run / "report.json").write_text(json.dumps(content))


def no_spare_rows(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = run.parent / "base"
    config = json.loads((base / "config.json").read_text())
    size = config["vocab_size"] - 11
    tensors = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:size].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    (run / "adapter" / "base_provenance.json").unlink()


def no_plain_template(run: Path) -> None:
    base = run.parent / "base"
    path = base / "chat_template.jinja"
    path.write_text(path.read_text().replace("message['content']", "message['content'] | trim"))


def dangling(run: Path) -> None:
    (run / "exports").mkdir()
    (run / "exports" / "merged").symlink_to("nowhere")


def looping(run: Path) -> None:
    (run / "exports").symlink_to("exports")


UNFIT: dict[str, tuple[Any, list[str], str]] = {
    "spare rows": (no_spare_rows, ["merged", "gguf:q8_0"], "rows to spare"),
    "template": (no_plain_template, ["merged", "ollama"], "more than put text around turns"),
    "report is a list": (lambda run: report(run, []), ["merged"], "report.json: is not a JSON object"),
    "report is empty": (lambda run: report(run, {}), ["merged"], "report.json: is no report of a run"),
    "report of another": (lambda run: report(run, {"recipe": 5}), ["merged"], "report.json: is no report"),
    "dangling link": (dangling, ["merged"], "exports/merged is a link that leads nowhere"),
    "looping link": (looping, ["merged"], "exports is a link that leads nowhere"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_nothing_is_written_before_all_is_checked(run: Path, name: str) -> None:
    spoil, targets, words = UNFIT[name]
    spoil(run)
    before = sorted(path for path in run.rglob("*"))
    said: list[str] = []
    with pytest.raises(InputError, match=words):
        export.export_all(run, targets, options=export.Options(merge_base="original"), say=said.append)
    assert not any("exporting" in one for one in said) and sorted(path for path in run.rglob("*")) == before


@pytest.mark.parametrize("target", ["gguf:q4_k_m", "gguf:Q5_K_S", "q6_k", "gguf:iq4_xs"])
def test_kinds_of_the_quantizer_s_are_refused_with_the_way_to_them(tmp_path: Path, target: str) -> None:
    done = command("export", str(tmp_path), "--to", "merged", "--to", target)
    kind = target.rpartition(":")[2].upper()
    assert done.returncode == 2 and f"`llama-quantize NAME-f16.gguf NAME.gguf {kind}`" in done.stderr
    plain = command("export", str(tmp_path), "--to", "gguf")
    assert "Did you mean 'gguf:q8_0'?" in plain.stderr and "_k" not in plain.stderr
    assert {name.removeprefix("gguf:") for name in export.TARGETS if "gguf:" in name} == set(gguf.KINDS)


def test_a_folder_of_any_name_and_a_place_that_cannot_be(run: Path, tmp_path: Path) -> None:
    odd = tmp_path / ("a b'\n`" + "x" * 200)
    (run / "adapter").rename(odd)
    options = export.Options(merge_base="original", gate=False)
    done = export.export(odd, "gguf:q8_0", options=options, out=tmp_path / "x")
    assert (tmp_path / "x" / f"a-b-{'x' * 96}-q8_0.gguf").is_file() and len(done.files) == 4
    with pytest.raises(InputError, match="File name too long"):
        export.export(odd, "merged", options=options, out=tmp_path / ("y" * 300))


def test_the_base_of_another_tool_s_adapter_has_to_be_a_phi_3(run: Path, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    path = run / "adapter" / "adapter_config.json"
    (run / "adapter" / "base_provenance.json").unlink()
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "llama")}
    path.write_text(json.dumps(settings))
    (run / "recipe.yaml").unlink()
    with pytest.raises(ModelError, match="write the name of the Phi-3 checkpoint"):
        export.export(run / "adapter", "merged")


def test_a_link_to_another_disk_stays_and_its_folder_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (run / "exports").mkdir()
    (run / "exports" / "adapter").symlink_to(tmp_path / "big")
    for force in (False, True):
        export.export(run, "adapter", force=force, options=export.Options(gate=False))
        assert (run / "exports" / "adapter").is_symlink() and (tmp_path / "big" / "export.json").is_file()
    assert not [path for path in tmp_path.rglob(".*") if "replaced" in path.name]


def test_an_export_that_came_meanwhile_is_not_replaced(run: Path) -> None:
    def other(text: str) -> None:
        if not (run / "exports" / "adapter").exists():
            export.export(run, "adapter", options=export.Options(gate=False))

    with pytest.raises(InputError, match="exists already"):
        export.export(run, "adapter", options=export.Options(gate=False), say=other)
    assert (run / "exports" / "adapter" / "export.json").is_file()
