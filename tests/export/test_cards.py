"""What stands on a card: code that loads the whole adapter when it is copied, and nothing but text."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_chats
from export_lab import make_base

from qlora_phi3 import export, pipeline, weights
from qlora_phi3.errors import ModelError
from qlora_phi3.export import card
from qlora_phi3.export.consumers import Live
from qlora_phi3.export.source import licence_in
from qlora_phi3.recipe import Recipe
from qlora_phi3.recipe_file import load_recipe

SYSTEM = 'Say "no" \\n only.\n```\n</details> `x` é\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose adapter is then made a strong one, and whose rows share a system message."""
    from safetensors.torch import load_file, save_file

    place = tmp_path_factory.mktemp("cards")
    base, chats = make_base(place / "ba se's", "medium"), str(write_chats(place / "chats.jsonl"))
    (base / "generation_config.json").unlink()  # the base alone says no more than its eos
    found = {
        "version": 1,
        "name": "Lab.1",
        "model": {"base": str(base), "compute_dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": {"path": chats}, "eval": {"path": chats, "limit": 4}, "max_length": 128},
        "train": {"max_steps": 3, "effective_batch": 2, "micro_batch": 2, "learning_rate": 0.01},
        "evaluate": {"metrics": ["loss"]},
    }
    _, run = pipeline.run(Recipe.model_validate(found), place / "run")
    path = run / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(2)
    tensors = {
        key: torch.randn(tensor.shape, generator=generator) * 0.1 * (tensor != 0)
        if "lora_B" in key
        else tensor
        for key, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    report = json.loads((run / "report.json").read_text())
    report["data"]["system_prompt"] = SYSTEM
    (run / "report.json").write_text(json.dumps(report))
    return run


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^(```+)(\w*)\n(.*?)^\1$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for _, name, block in found if name == language]


def as_trained(run: Path, quantization: str) -> Live:
    recipe = load_recipe(run / "recipe.yaml")
    settings = recipe.model.model_copy(update={"quantization": quantization})
    cpu = torch.device("cpu")
    return Live.load(weights.locate(recipe.model), settings, run / "adapter", cpu, precise=False)


CODE = {
    "the run's own": ("adapter", None, "nf4", 1e-3),
    "adapter": ("adapter", None, "nf4", 1e-3),
    "fused": ("adapter", "fused", "nf4", 1e-3),
    "unfused": ("adapter", "unfused", "nf4", 1e-3),
    "loralib": ("loralib", None, "none", 1e-3),
    "merged": ("merged", None, "nf4", 0.5),
}


@pytest.mark.parametrize("name", CODE)
def test_its_code_computes_and_answers_as_trained(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    target, layout, quantization, near = CODE[name]
    live = as_trained(run, quantization)
    if name == "the run's own":
        place, text = run, (run / "adapter" / "README.md").read_text()
    else:
        options = export.Options(layout=layout, gate=False)  # type: ignore[arg-type]
        place, text = tmp_path, ""
        done = export.export(run, target, out=tmp_path / target, options=options)
        text = (done.folder / "README.md").read_text()
        (tmp_path / "ba se's").symlink_to(live.model.config.name_or_path)
    (code,) = blocks(text, "python")
    monkeypatch.chdir(place)
    # on CPUs with AVX512-BF16 bitsandbytes rounds to bfloat16 where nothing is trained
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    names: dict[str, Any] = {}
    exec(code, names)
    messages = [{"role": "user", "content": "Hello!"}]
    if name != "the run's own":  # its card was written before the report said it
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    assert names["messages"] == messages
    ids = live.tokens(messages)
    assert names["inputs"]["input_ids"].tolist() == [ids]
    found = names["model"](input_ids=torch.tensor([ids])).logits.float().detach()
    expected = live.model(input_ids=torch.tensor([ids])).logits.detach()
    assert (found - expected).abs().max() < near
    control = live.control().log_probs(ids)
    assert (expected[0].log_softmax(-1) - control).abs().max() > 2
    answer = names["answer"][0, len(ids) :].tolist()
    if near < 0.1:
        assert answer == live.generate(ids, 256)
    assert answer[-1] in live.stops or len(answer) == 256
    assert capsys.readouterr().out.strip("\n") == names["tokenizer"].decode(
        answer, skip_special_tokens=True
    ).strip("\n")


COMMANDS = {
    "gguf:q8_0": ["llama-cli", "-m", "Lab.1-q8_0.gguf", "-c", "512", "-cnv", "-sys", SYSTEM],
    "gguf-lora": ["llama-cli", "-m", "BASE.gguf", "--lora", "Lab.1-lora.gguf"],
    "mlx": ["mlx_lm.generate", "--model", "ba se's", "--adapter-path", "FOLDER", "--extra-eos-token"],
    "vllm": ["vllm", "serve", "ba se's", "--enable-lora", "--lora-modules", "NAME=FOLDER"],
    "ollama": ["ollama", "create", "lab.1", "-f", "Modelfile", "ollama", "run", "lab.1"],
}


@pytest.mark.parametrize("target", COMMANDS)
def test_its_command_is_quoted_for_a_shell(run: Path, tmp_path: Path, target: str) -> None:
    done = export.export(run, target, out=tmp_path / "x", options=export.Options(gate=False))
    text = (done.folder / "README.md").read_text()
    (block,) = blocks(text, "")
    expected = COMMANDS[target]
    assert shlex.split(block)[: len(expected)] == expected
    if target == "mlx":
        assert set(shlex.split(block)[6:8]) == {"<|endoftext|>", "<|end|>"}
    if target == "ollama":
        assert f'SYSTEM """{SYSTEM}"""\n' in (done.folder / "Modelfile").read_text()
    assert "sliding window" not in text and "2047" not in text


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "link": "[a](javascript:alert(1))",
    "picture": "![a](http://x/y.png)",
    "fence": "```\n</details>\n```",
    "code": "`` ` `` | x | *y* __z__",
    "front matter": "---\nlicense: mine\n---",
    "heading": "# a\nb\n===\n- c\n1. d",
    "control": "a\x1b[31m\u202eb\ud800",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_users_write_stays_text(run: Path, kind: str) -> None:
    """The page that a Markdown renderer makes of it holds the text, and no element but the card's own."""
    from markdown_it import MarkdownIt

    def page(text: str, name: str) -> tuple[list[str], str]:
        report = json.loads((run / "report.json").read_text())
        report["description"], report["machine"]["system"] = text, [text]
        report["recipe"]["description"] = report["data"]["system_prompt"] = text
        report["data"]["sources"][0]["name"] = report["base"]["revision"] = text
        report["trained"][0]["part"] = report["metrics"]["tuned"] and text
        rendered = card.render(report, card.About("adapter", name, text, {"stop_ids": [1]}, None, text))
        rendered.encode("utf-8")
        assert "\x1b" not in rendered and "\u202e" not in rendered
        html = MarkdownIt("commonmark").enable("table").render(rendered.split("\n---\n", 1)[1])
        return re.findall(r"</?[a-zA-Z][a-z0-9]*", html), html

    tags, html = page(HOSTILE[kind], HOSTILE[kind])
    plain, _ = page("one\ntwo" if "\n" in HOSTILE[kind] else "plain", "plain")
    extra = [tag for tag in tags if tag not in plain or tags.count(tag) > plain.count(tag)]
    assert {tag for tag in extra if tag not in ("<code", "</code")} == set()
    assert not re.search(r"<(script|img|a)\b", html)


def test_a_foreign_report_puts_no_code_into_the_card(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    report["recipe"]["model"]["compute_dtype"] = "float32); import os; os.system('x'"
    (other / "report.json").write_text(json.dumps(report))
    with pytest.raises(ModelError, match=r"report\.json: is no report of a run of this version"):
        export.export(other, "adapter")


@pytest.mark.parametrize(
    ("line", "found"), [("'mit' # ours", "mit"), ("[a](b)", None), ("apache-2.0", "apache-2.0")]
)
def test_a_licence_is_its_name_alone(tmp_path: Path, line: str, found: str | None) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: {line}\n---\n")
    assert licence_in(tmp_path / "README.md") == found


@pytest.mark.parametrize(
    "system", ["/brief", "a\u00a0b \U0001f469\u200d\U0001f680", "\x07 bell, \\\\ and `", "C:\\x"]
)
def test_a_system_prompt_is_asked_as_it_is(run: Path, system: str) -> None:
    report = json.loads((run / "report.json").read_text())
    report["data"]["system_prompt"] = system
    text = card.render(report, card.About("adapter", "lab", "org/base", {"stop_ids": [1]}))
    (code,) = blocks(text, "python")
    (line,) = (line for line in code.splitlines() if '"role": "system"' in line)
    assert eval(line.strip().rstrip(",")) == {"role": "system", "content": system}
    if (system.isascii() and system.isprintable()) or "\u200d" in system:
        assert blocks(text, "text") == [f"{system}\n"]


def test_a_card_of_every_family_has_one_way_to_use_it(run: Path) -> None:
    for target in ("adapter", "merged", "gguf:q8_0", "gguf-lora", "ollama", "mlx", "loralib", "vllm"):
        told = {"gguf": "a.gguf", "context": 512, "flags": ["--enable-lora"], "stop_ids": [], "kind": "q8_0"}
        text = card.render(None, card.About(target, "lab", "org/base", told))
        assert text.count("## Use it") == 1 and "\n\n\n\n" not in text
        for code in blocks(text, "python"):
            compile(code, target, "exec")
    shutil.rmtree(run / "exports", ignore_errors=True)
