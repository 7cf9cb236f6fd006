"""Folders that people give as a base: what Microsoft and others publish, and what becomes of a download.

Each either trains, or is refused in words that name the file; a dry run and a plan refuse what a run would
refuse without torch. One tiny checkpoint, changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt, check_refused
from conftest import write_chats
from warm import Ended

Change = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, SETTINGS, TOKENIZER = "config.json", "tokenizer_config.json", "tokenizer.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4972489328\n"


def edit(name: str, **keys: Any) -> Change:
    """Add or replace keys of a JSON file; of `...` remove them."""

    def change(folder: Path) -> None:
        path = folder / name
        found = (json.loads(path.read_text()) if path.exists() else {}) | keys
        path.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return change


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def drop(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return changed


def of_dtype(name: str) -> Change:
    import torch

    dtype = getattr(torch, name)
    return tensors(lambda found: found.update({key: one.to(dtype) for key, one in found.items()}))


def sharded(folder: Path) -> None:
    """Two files and their index, as everything above 5 GB is published."""
    from safetensors.torch import load_file, save_file

    found = load_file(folder / WEIGHTS)
    names = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(sorted(found))}
    for name in names:
        save_file({key: found[key] for key in found if where[key] == name}, folder / name, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def mapped(**files: str) -> Change:
    """The index of shards with other files for some tensors."""

    def change(folder: Path) -> None:
        sharded(folder)
        found = json.loads((folder / INDEX).read_text())
        found["weight_map"] |= {key.replace("__", "."): file for key, file in files.items()}
        (folder / INDEX).write_text(json.dumps(found))

    return change


def unfused(folder: Path) -> None:
    """The same weights under Llama's names, as re-uploads for other trainers have them."""

    def change(found: dict[str, Any]) -> None:
        for i in range(2):
            layer = f"model.layers.{i}"
            q, k, v = found.pop(f"{layer}.self_attn.qkv_proj.weight").split([64, 32, 32])
            for name, part in zip("qkv", (q, k, v), strict=True):
                found[f"{layer}.self_attn.{name}_proj.weight"] = part.clone()
            gate, up = found.pop(f"{layer}.mlp.gate_up_proj.weight").chunk(2)
            found[f"{layer}.mlp.gate_proj.weight"] = gate.clone()
            found[f"{layer}.mlp.up_proj.weight"] = up.clone()

    tensors(change)(folder)


def snapshot(folder: Path) -> None:
    """As the hub's cache has it: a folder of links into blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../blobs/{i}")


def add_token(folder: Path) -> None:
    found = json.loads((folder / TOKENIZER).read_text())
    more = found["added_tokens"][-1] | {"id": 261, "content": "[SKU]"}
    found["added_tokens"].append(more)
    (folder / TOKENIZER).write_text(json.dumps(found))


def without_special_positions(found: dict[str, Any]) -> None:
    import torch

    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


head_of_float32 = tensors(lambda found: found.update({"lm_head.weight": found["lm_head.weight"].float()}))


def spoiled(value: float) -> Change:
    return tensors(lambda found: found["model.layers.1.mlp.down_proj.weight"].view(-1)[77].fill_(value))


OWN_CODE = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
FACTORS = [1.0 + i / 8 for i in range(8)]
SU = {"type": "su", "short_factor": FACTORS, "long_factor": FACTORS}
"""Of heads 16 wide, as the first 128k models named it."""

TRAINS: dict[str, tuple[str, Change]] = {
    "Phi-3-mini, as Microsoft publishes it": (
        "untied",
        both(
            edit(
                CONFIG,
                _name_or_path="Phi-3-mini-4k-instruct",
                auto_map=OWN_CODE,
                attention_bias=False,
                to_dict="no method of ours",
                torch_dtype="bfloat16",
                dtype=...,
                rope_scaling=None,
                rope_theta=10000.0,
                rope_parameters=...,
                transformers_version="4.40.2",
            ),
            edit(SETTINGS, model_max_length=4096, legacy=False, add_eos_token=False, sp_model_kwargs={}),
            write("modeling_phi3.py", "raise SystemExit('ran')"),
            write("configuration_phi3.py", "raise SystemExit('ran')"),
            write("README.md", "---\nlicense: mit\n---\n"),
        ),
    ),
    "128k, its RoPE still called su": (
        "gqa",
        edit(
            CONFIG,
            rope_scaling=SU,
            rope_theta=10000.0,
            rope_parameters=...,
            max_position_embeddings=1024,
            original_max_position_embeddings=512,
        ),
    ),
    "Phi-4-mini: tied, rotary on a part": (
        "tied",
        edit(CONFIG, partial_rotary_factor=0.75, rope_theta=10000.0, rope_parameters=..., rope_scaling=None),
    ),
    "shards in the hub's cache": ("gqa", both(sharded, snapshot)),
    "float16, and buffers of old versions": (
        "gqa",
        both(of_dtype("float16"), tensors(without_special_positions)),
    ),
    "float32, read-only, with pickles and ONNX beside": (
        "gqa",
        both(
            of_dtype("float32"),
            write("pytorch_model.bin", b"never read"),
            write("model.onnx", b"never read"),
            lambda folder: (folder / "x.json").symlink_to("/" + "x" * 300),
            lambda folder: [path.chmod(0o444) for path in folder.iterdir() if not path.is_symlink()],
            lambda folder: folder.chmod(0o555),
        ),
    ),
}

REFUSED: dict[str, tuple[Change, list[str]]] = {
    # Other models, other forms
    "Llama": (
        edit(CONFIG, model_type="llama", architectures=["LlamaForCausalLM"]),
        [CONFIG, "model_type is 'llama': only the Phi-3 architecture"],
    ),
    "Mistral, as Unsloth's first copies": (
        edit(CONFIG, model_type="mistral", architectures=["MistralForCausalLM"]),
        [CONFIG, "model_type is 'mistral'"],
    ),
    "Llama's linears under Phi-3's config": (unfused, ["a linear as Llama has it", "qkv_proj"]),
    "Phi-3-small": (edit(CONFIG, model_type="phi3small"), ["Phi-3-small is another architecture"]),
    "Phi-3-vision": (edit(CONFIG, model_type="phi3_v"), ["Phi-3-vision is another architecture"]),
    "Phi-3.5-MoE": (edit(CONFIG, model_type="phimoe"), ["Phi-3.5-MoE is another architecture"]),
    "Phi-2": (edit(CONFIG, model_type="phi"), ["Phi-1 and Phi-2 are another architecture"]),
    "a classifier": (
        edit(CONFIG, architectures=["Phi3ForSequenceClassification"]),
        ["not Phi3ForCausalLM"],
    ),
    "GPTQ": (
        edit(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["already quantized (gptq)"],
    ),
    "AWQ": (edit(CONFIG, quantization_config={"quant_method": "awq"}), ["already quantized (awq)"]),
    "bitsandbytes": (
        edit(CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["already quantized (bitsandbytes)"],
    ),
    "fp8, which config.json does not say": (
        of_dtype("float8_e4m3fn"),
        [WEIGHTS, "is stored as 'F8_E4M3'", "16-bit"],
    ),
    "int8": (of_dtype("int8"), [WEIGHTS, "is stored as 'I8'"]),
    "uint8, NF4 by its look": (of_dtype("uint8"), [WEIGHTS, "is stored as 'U8'"]),
    "bool": (of_dtype("bool"), [WEIGHTS, "is stored as 'BOOL'"]),
    "complex": (of_dtype("complex64"), [WEIGHTS, "is stored as 'C64'"]),
    "GGUF alone": (both(drop(WEIGHTS), write("phi3-q4.gguf", b"GGUF")), ["holds no *.safetensors"]),
    "pickles alone": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        ["holds pytorch_model.bin but no safetensors"],
    ),
    "ONNX alone": (both(drop(WEIGHTS), write("model.onnx", b"\x08")), ["holds no *.safetensors"]),
    "MLX, 4 bits": (
        both(of_dtype("uint8"), edit(CONFIG, quantization={"group_size": 64, "bits": 4})),
        ["is stored as 'U8'"],
    ),
    "a LoRA adapter": (
        lambda folder: (
            [path.unlink() for path in folder.iterdir()]
            and [
                write("adapter_config.json", "{}")(folder),
                write("adapter_model.safetensors", b"")(folder),
            ]
        ),
        ["adapter_config.json"],
    ),
    "a base with an adapter in it": (edit("adapter_config.json", peft_type="LORA"), ["adapter_config.json"]),
    "an empty folder": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        ["holds no *.safetensors"],
    ),
    # Code
    "code of its own": (
        edit(CONFIG, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}),
        [CONFIG, "names code of its own"],
    ),
    # Sizes that do not belong together
    "more layers than weights": (
        edit(CONFIG, num_hidden_layers=3),
        ["6 weights are missing", "model.layers.2."],
    ),
    "fewer layers than weights": (
        edit(CONFIG, num_hidden_layers=1),
        ["6 weights fit nowhere", "model.layers.1."],
    ),
    "a billion layers": (edit(CONFIG, num_hidden_layers=10**9), [CONFIG, "num_hidden_layers is 1000000000"]),
    "a size of 400 digits": (edit(CONFIG, vocab_size=10**400), [CONFIG, "vocab_size is 1000"]),
    "another vocabulary": (
        edit(CONFIG, vocab_size=32064),
        ["is [261, 64], but config.json says [32064, 64]"],
    ),
    "another width": (edit(CONFIG, hidden_size=128), ["but config.json says", "128"]),
    "other heads": (edit(CONFIG, num_key_value_heads=4), ["qkv_proj.weight is [128, 64]", "[192, 64]"]),
    "no head": (
        tensors(lambda found: found.pop("lm_head.weight")),
        ["1 weights are missing, lm_head.weight"],
    ),
    "a prefix before all names": (
        tensors(lambda found: [found.update({f"module.{key}": found.pop(key)}) for key in list(found)]),
        ["15 weights are missing"],
    ),
    "a tokenizer of more tokens": (
        add_token,
        ["the tokenizer has 262 tokens, the embedding 261 rows ('[SKU]'"],
    ),
    # Downloads that went wrong
    "cut weights": (
        lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 9),
        [WEIGHTS, "is truncated"],
    ),
    "empty weights": (write(WEIGHTS, b""), [WEIGHTS, "is truncated", "it is empty"]),
    "Git LFS's notes": (write(WEIGHTS, POINTER), [WEIGHTS, "Git LFS's note of a file", "git lfs pull"]),
    "Git LFS's note of the tokenizer": (write(TOKENIZER, POINTER), [TOKENIZER, "Git LFS's note"]),
    "a web page as weights": (write(WEIGHTS, "<!DOCTYPE html>"), [WEIGHTS, "it is a web page"]),
    "a web page as config": (write(CONFIG, "<html>sign in</html>"), [CONFIG, "it is a web page"]),
    "an empty config": (write(CONFIG, ""), [CONFIG, "it is empty"]),
    "no config": (drop(CONFIG), [CONFIG, "is missing"]),
    "UTF-16, as an editor saved it": (
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding="utf-16"),
        [CONFIG, "it is UTF-16"],
    ),
    "a byte order mark": (
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text(), encoding="utf-8-sig"),
        [CONFIG, "byte order mark"],
    ),
    "a key twice": (write(CONFIG, '{"model_type": "phi3", "model_type": "phi3"}'), ["'model_type' twice"]),
    "a config without end": (write(CONFIG, '{"a":' * 100_000), [CONFIG, "nested too deeply"]),
    "a pipe as config": (
        lambda folder: ((folder / CONFIG).unlink(), os.mkfifo(folder / CONFIG)),
        [CONFIG, "Not a regular file"],
    ),
    "a pipe as weights": (
        lambda folder: (
            shutil.copy(folder / WEIGHTS, folder / "other.safetensors"),
            (folder / WEIGHTS).unlink(),
            os.mkfifo(folder / WEIGHTS),
        ),
        [WEIGHTS, "Not a regular file"],
    ),
    "links into nowhere": (
        both(snapshot, lambda folder: shutil.rmtree(folder.parent / "blobs")),
        [CONFIG, "is a link to a file"],
    ),
    "a link to itself": (
        lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).symlink_to(CONFIG)),
        [CONFIG, "symbolic links"],
    ),
    # Shards
    "a shard that is missing": (
        both(sharded, drop("model-2-of-2.safetensors")),
        [INDEX, "model-2-of-2.safetensors", "not there"],
    ),
    "an index of pickles": (mapped(lm_head__weight="pytorch_model.bin"), [INDEX, "no safetensors file"]),
    "an index that leaves the folder": (
        mapped(lm_head__weight="../x.safetensors"),
        [INDEX, "of this folder"],
    ),
    "an index that names another file": (
        mapped(lm_head__weight="model-2-of-2.safetensors"),
        [INDEX, "lm_head.weight", "where it is not"],
    ),
    "an index of tensors that nobody has": (
        mapped(extra__weight="model-1-of-2.safetensors"),
        [INDEX, "extra.weight", "where it is not"],
    ),
    "a tensor in two shards": (
        both(
            sharded,
            lambda folder: shutil.copy(
                folder / "model-1-of-2.safetensors", folder / "model-2-of-2.safetensors"
            ),
        ),
        ["and so does model-1-of-2.safetensors"],
    ),
    "weights, and no index": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors"),
        [f"holds neither {WEIGHTS} nor {INDEX}"],
    ),
    # Tokenizers
    "no tokenizer": (drop(TOKENIZER), [TOKENIZER, "is missing"]),
    "a tokenizer without vocabulary": (
        edit(TOKENIZER, model={"type": "BPE"}),
        [TOKENIZER, "no model with a vocab"],
    ),
    "half a character": (edit(SETTINGS, more="\ud800"), [SETTINGS, "half of a character"]),
    "a note of added tokens that is none": (
        write("added_tokens.json", "[]"),
        ["added_tokens.json", "JSON object"],
    ),
    "a length in words": (edit(SETTINGS, model_max_length="long"), [SETTINGS, "model_max_length is 'long'"]),
    "a token that is a number": (edit(SETTINGS, eos_token=7), [SETTINGS, "eos_token is 7"]),
    "a template that is a number": (edit(SETTINGS, chat_template=7), [SETTINGS, "chat_template is 7"]),
    "a stop in words": (
        edit("generation_config.json", eos_token_id="end"),
        ["generation_config.json", "'end'"],
    ),
    "values of no kind": (
        edit(CONFIG, rms_norm_eps="small", rope_theta="abc", use_cache=5),
        [CONFIG, "rms_norm_eps is 'small'", "rope_theta is 'abc'"],
    ),
    "dropout in attention": (
        edit(CONFIG, attention_dropout=0.1),
        [CONFIG, "attention_dropout is 0.1, needs 0: attention drops nothing here"],
    ),
    "a factor of 0": (
        edit(CONFIG, rope_scaling={**SU, "long_factor": [0.0, *FACTORS[1:]]}),
        [CONFIG, "rope_scaling.long_factor is", "needs a list of numbers above 0"],
    ),
    "a tied base with another head": (
        edit(CONFIG, tie_word_embeddings=True),
        [CONFIG, "tie_word_embeddings is true, but"],
    ),
    "a context beyond the model": (
        edit(CONFIG, max_position_embeddings=64),
        ["data.max_length", "64 positions"],
    ),
}

LATE: dict[str, tuple[Change, list[str]]] = {
    # What only reading all, or running a template, can tell
    "NaN": (spoiled(float("nan")), [WEIGHTS, "model.layers.1.mlp.down_proj.weight holds NaN or infinity"]),
    "infinity": (
        spoiled(float("-inf")),
        [WEIGHTS, "model.layers.1.mlp.down_proj.weight holds NaN or infinity"],
    ),
    "a tied base with another head of another dtype": (
        both(edit(CONFIG, tie_word_embeddings=True), head_of_float32),
        [CONFIG, "tie_word_embeddings is true, but"],
    ),
    "a tokenizer of the future": (
        edit(TOKENIZER, model={"type": "Unheard", "vocab": {"a": 0}, "merges": []}),
        ["the tokenizer cannot be read"],
    ),
    "no template": (drop("chat_template.jinja"), ["no chat template"]),
    "a template with an error": (write("chat_template.jinja", "{% if %}"), ["the chat template fails"]),
    "a template that raises": (
        write("chat_template.jinja", "{{ raise_exception('\x1b[31mno\u202e') }}"),
        ["the chat template fails", "\\x1b[31mno\\u202e"],
    ),
    "a template without end": (
        write("chat_template.jinja", "{% set x = 'xxxxxxxxxx' %}" + "{% set x = x ~ x %}" * 50),
        ["the chat template takes more than"],
    ),
    "a template without turns": (
        write("chat_template.jinja", "hello"),
        ["does not open the assistant's turn"],
    ),
}


def recipe_of(tmp_path: Path, base: Path) -> str:
    write_chats(tmp_path / "chats.jsonl", 4)
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nname: stranger\nmodel: {{base: {base}}}\nadapter: {{rank: 4, alpha: 8}}\n"
        "data: {train: {path: chats.jsonl}, max_length: 128}\n"
        "train: {max_steps: 1, effective_batch: 1, micro_batch: 1}\n"
    )
    return "r.yaml"


def folder_of(tmp_path: Path, checkpoint: Path, change: Change) -> Path:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    change(folder)
    return folder


@pytest.mark.parametrize(("geometry", "change"), TRAINS.values(), ids=TRAINS)
def test_it_trains(checkpoints: Callable[[str], Path], tmp_path: Path, geometry: str, change: Change) -> None:
    recipe = recipe_of(tmp_path, folder_of(tmp_path, checkpoints(geometry), change))
    for words in ([recipe, "--dry-run"], [recipe, "--out", "out"]):
        ended = attempt("recipe", *words, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    (tmp_path / "model").chmod(0o755)


STEERING = {
    "stop_strings": ["a"],
    "repetition_penalty": -1,
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "return_dict_in_generate": True,
    "num_beams": 2,
    "num_return_sequences": 2,
    "min_length": 100,
    "bad_words_ids": [[1]],
}


def test_its_settings_of_answers_do_not_steer_ours(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    answers = []
    for name, settings in (("plain", {}), ("steering", STEERING)):
        (home := tmp_path / name).mkdir()
        change = edit("generation_config.json", **settings)
        recipe = home / recipe_of(home, folder_of(home, checkpoints("gqa"), change))
        held_out = "eval: {path: chats.jsonl, limit: 4}, max_length"
        asked = "evaluate: {metrics: [loss, exact_match], samples: 2, max_new_tokens: 8}\n"
        recipe.write_text(recipe.read_text().replace("max_length", held_out) + asked)
        ended = attempt("recipe", recipe, "--out", "out", cwd=home)
        assert ended.returncode == 0, ended.stderr
        samples = json.loads((home / "out" / "eval.json").read_text())["tuned"]["samples"]
        answers.append([one["answer"] for one in samples])
    assert answers[0] and answers[0] == answers[1]


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_all_commands_refuse_it(
    checkpoints: Callable[[str], Path], tmp_path: Path, change: Change, words: list[str]
) -> None:
    recipe = recipe_of(tmp_path, folder_of(tmp_path, checkpoints("gqa"), change))
    told = set()
    for command in (["recipe", recipe, "--dry-run"], ["plan", recipe], ["recipe", recipe, "--out", "out"]):
        ended = attempt(*command, cwd=tmp_path)
        check_refused(ended, *words)
        told.add(ended.stderr)
    assert len(told) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "words"), LATE.values(), ids=LATE)
def test_the_run_refuses_it(
    checkpoints: Callable[[str], Path], tmp_path: Path, change: Change, words: list[str]
) -> None:
    recipe = recipe_of(tmp_path, folder_of(tmp_path, checkpoints("gqa"), change))
    check_refused(attempt("recipe", recipe, "--out", "out", cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", CONFIG, WEIGHTS, TOKENIZER, SETTINGS, "chat_template.jinja"])
def test_a_base_of_somebody_else(checkpoints: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """What one may not read is whole: to download it again would help nobody."""
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    able = [] if os.geteuid() else bound
    if able and shutil.which(able[0]) is None:
        pytest.skip("root may read everything")
    folder = folder_of(tmp_path, checkpoints("gqa"), lambda _: None)
    recipe = recipe_of(tmp_path, folder)
    (folder / name).chmod(0)
    done = subprocess.run(
        [*able, sys.executable, "-m", "qlora_phi3", "recipe", recipe, "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
    )
    (folder / name).chmod(0o700)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    check_refused(ended, "cannot be read: Permission denied. Check who may read it.")
