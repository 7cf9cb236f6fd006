"""Modelfiles: the template says what the chat template says, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from export_models import TOKENIZERS

from qlora_phi3.errors import InputError
from qlora_phi3.export import ollama

MEDIUM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
)
PHI_4 = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def tokenizer_of(kind: str, template: str | None = None) -> Any:
    words = TOKENIZERS[kind]()
    if template is not None:
        words.chat_template = template
    return words


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("sentencepiece", None),
        ("bytes", None),
        ("chatml", None),
        ("sentencepiece", MEDIUM),
        ("chatml", PHI_4),
        ("sentencepiece", WITH_BOS),
    ],
)
def test_conversations_come_out_as_the_chat_template_has_them(kind: str, template: str | None) -> None:
    words = tokenizer_of(kind, template)
    parts = ollama.take_apart(words, "here")
    system = [{"role": "system", "content": " Be brief.\n"}] if "system" in parts.turns else []
    asked, answered = {"role": "user", "content": "\n a "}, {"role": "assistant", "content": "b\n"}
    for messages in ([asked], [asked, answered, asked], [*system, asked], [*system, asked, answered, asked]):
        expected = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert parts.render(messages) == expected


def test_phi_3s_modelfile(tmp_path: Path) -> None:
    TOKENIZERS["sentencepiece"]().save_pretrained(tmp_path)
    text = ollama.modelfile("model.gguf", tmp_path, num_ctx=4096, license="MIT\nand more", system="Be brief.")
    assert text == (
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ "<|system|>\\n" }}{{ .Content }}{{ "<|end|>\\n" }}'
        '{{ else if eq .Role "user" }}{{ "<|user|>\\n" }}{{ .Content }}{{ "<|end|>\\n" }}'
        '{{ else if eq .Role "assistant" }}{{ "<|assistant|>\\n" }}{{ .Content }}{{ "<|end|>\\n" }}'
        '{{ end }}{{ end }}{{ "<|assistant|>\\n" }}"""\n'
        'PARAMETER stop "<|end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|user|>"\n'
        'PARAMETER stop "<|assistant|>"\n'
        "PARAMETER num_ctx 4096\n"
        'SYSTEM """Be brief."""\n'
        'LICENSE """MIT\nand more"""\n'
    )


def test_a_default_system_turn_stands_only_where_there_is_no_other() -> None:
    text = ollama.take_apart(tokenizer_of("chatml"), "here").go()
    assert text.startswith('{{ if not .System }}{{ "<|im_start|>system\\nYou help.<|im_end|>\\n" }}{{ end }}')


@pytest.mark.parametrize(
    "template",
    [
        WITH_BOS.replace("m['content']", "m['content'] | trim"),
        WITH_BOS.replace("m['content']", "loop.index ~ m['content']"),
    ],
)
def test_templates_that_do_more_are_refused(template: str) -> None:
    with pytest.raises(InputError, match="Export gguf instead"):
        ollama.take_apart(tokenizer_of("sentencepiece", template), "here")


def test_texts_that_cannot_be_quoted_are_refused(tmp_path: Path) -> None:
    TOKENIZERS["sentencepiece"]().save_pretrained(tmp_path)
    with pytest.raises(InputError, match='holds """'):
        ollama.modelfile("model.gguf", tmp_path, num_ctx=4096, license='a """ \nb')


def values(text: str) -> Iterator[tuple[str, str]]:
    """Commands of a Modelfile by Ollama's rules: a value ends at the first line's end at which it is nothing
    between triple or single quotes that still waits for its closing ones; what does not print is dropped."""
    name, value = "", ""
    for one in text:
        if not name.endswith(" "):
            name += one
            continue
        whole = value.strip(" \t\r\n")
        quotes = '"""' if whole.startswith('"""') else '"' if whole.startswith('"') else ""
        if one in "\r\n" and whole.endswith(quotes) and len(whole) >= 2 * len(quotes):
            yield name.strip(), whole[len(quotes) : len(whole) - len(quotes)]
            name, value = "", ""
        else:
            value += one if one.isprintable() or one in "\t\r\n" else ""


@pytest.mark.parametrize(
    ("system", "fits"),
    [
        ("Be brief.", True),
        ('Say "yes" or \\n "no"', True),
        ('"quoted"', True),
        ("\n begins and ends with a line's end \n", True),
        ('""\n""', True),
        ("two\n\n lines\twith a tab\r\n", True),
        ('a """ b', True),
        ("{{ .System }} # none", True),
        ('a """\nb', False),
        ('"""\nb', False),
        ("non\u00a0breaking", False),
        ("zero\u200bwidth", False),
    ],
)
def test_a_system_text_is_read_as_it_was_or_known_not_to_be(tmp_path: Path, system: str, fits: bool) -> None:
    assert ollama.fits(system) == fits
    TOKENIZERS["sentencepiece"]().save_pretrained(tmp_path)
    if fits:
        text = ollama.modelfile("a b.gguf", tmp_path, num_ctx=4096, license="MIT", system=system)
        read = dict(values(text))
        assert read["FROM"] == "./a b.gguf" and read["SYSTEM"] == system and read["LICENSE"] == "MIT"
    else:
        assert next(values(f'SYSTEM """{system}"""\n')) != ("SYSTEM", system)


def test_every_stop_is_a_parameter(tmp_path: Path) -> None:
    words = TOKENIZERS["sentencepiece"]()
    words.save_pretrained(tmp_path)
    other = words.convert_tokens_to_ids("<|placeholder1|>")
    text = ollama.modelfile("a.gguf", tmp_path, num_ctx=256, license=None, stop_ids=[other])
    assert ("PARAMETER", 'stop "<|placeholder1|>"') in values(text)


def test_a_system_text_needs_a_system_turn(tmp_path: Path) -> None:
    tokenizer_of("sentencepiece", MEDIUM).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no system turn"):
        ollama.modelfile("model.gguf", tmp_path, num_ctx=4096, license=None, system="Be brief.")
