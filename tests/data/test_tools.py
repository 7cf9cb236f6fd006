"""Function calls are trained on where the template shows them, and refused by name where it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import phi3_tokenizer
from talks import PHI3

from qlora_phi3.data.overlong import exchanges
from qlora_phi3.data.rows import Conversation, Message
from qlora_phi3.data.tokens import IGNORE, Turns, prompt_ids, tokenize
from qlora_phi3.errors import DataError

SCHEMAS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CALLS = json.dumps({"tool_calls": [CALL]})
TALK = (
    Message("user", "How is it?"),
    Message("assistant", "", CALLS),
    Message("tool", "7 degrees", '{"name": "weather"}'),
    Message("assistant", "Cold."),
)

END = "<|end|>\n"
SYSTEM_TOOLS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|system|>' + message['content'] + message['tools'] + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
"""As Phi-4-mini's: tools stand in the system message, as text."""

WHOLE = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + ('user' if message.role == 'tool' else message.role) + '|>' }}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
"""A template that shows all of it."""


def tokenizer_with(template: str) -> Any:
    found = phi3_tokenizer()
    found.chat_template = template
    return found


FULL, IN_SYSTEM = tokenizer_with(WHOLE), tokenizer_with(SYSTEM_TOOLS)


def talk(*messages: Message, tools: Any = SCHEMAS) -> Conversation:
    return Conversation(messages or TALK, "f:1", json.dumps(tools) if tools else "")


def trained_text(conversation: Conversation, tokenizer: Any, loss_on: Any = "assistant") -> tuple[str, str]:
    row = tokenize(conversation, tokenizer, Turns.of(tokenizer), loss_on)
    kept = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE]
    return tokenizer.decode(row.input_ids), tokenizer.decode(kept)


def refusal(conversation: Conversation, tokenizer: Any) -> tuple[str, str, str]:
    with pytest.raises(DataError) as caught:
        tokenize(conversation, tokenizer, Turns.of(tokenizer), "assistant")
    [problem] = caught.value.problems
    return problem.place, problem.reason, problem.remedy


def test_what_templates_show() -> None:
    assert Turns.of(FULL).silent == {"system tools"}
    assert Turns.of(IN_SYSTEM).silent == {"tools", "tool_calls"}
    assert Turns.of(PHI3).silent == {"tools", "system tools", "tool_calls", "tool"}


def test_a_template_that_shows_all_of_it_is_given_all_of_it() -> None:
    whole, trained = trained_text(talk(), FULL)
    assert whole == (
        f"<|system|>{json.dumps(SCHEMAS)}<|end|><|user|>How is it?<|end|>"
        '<|assistant|>weather{"city": "Köln"}<|end|><|user|>7 degrees<|end|>'
        "<|assistant|>Cold.<|end|><|endoftext|>"
    )
    assert trained == 'weather{"city": "Köln"}<|end|>Cold.<|end|>'
    assert trained_text(talk(), FULL, "last")[1] == "Cold.<|end|>"


def test_the_prompt_has_the_tools_and_a_call_is_expected_as_it_is_rendered() -> None:
    found, expected = prompt_ids(talk(), FULL)
    assert FULL.decode(found).startswith("<|system|>[{")
    assert FULL.decode(found).endswith("<|user|>7 degrees<|end|><|assistant|>")
    assert expected == "Cold."
    found, expected = prompt_ids(talk(*TALK[:2]), FULL)
    assert FULL.decode(found).endswith("<|user|>How is it?<|end|><|assistant|>")
    assert expected == 'weather{"city": "Köln"}'


@pytest.mark.parametrize(
    ("conversation", "place", "reason"),
    [
        (talk(*TALK[::3]), "f:1", "the model's chat template leaves out `tools`."),
        (talk(tools=None), "f:1: messages[1]", "the model's chat template leaves out `tool_calls`."),
        (
            talk(TALK[0], Message("assistant", "weather(Köln)"), *TALK[2:], tools=None),
            "f:1: messages[2]",
            "the model's chat template leaves out a tool message.",
        ),
        (
            talk(Message("system", "Be.", '{"tools": "[]"}'), *TALK[::3], tools=None),
            "f:1: messages[0]",
            "the model's chat template leaves out `tools`.",
        ),
    ],
)
def test_what_the_template_leaves_out_is_refused(conversation: Conversation, place: str, reason: str) -> None:
    found = refusal(conversation, PHI3)
    assert found[:2] == (place, reason)
    assert found[2]


def test_tools_that_belong_into_the_system_message() -> None:
    remedy = refusal(talk(*TALK[::3]), IN_SYSTEM)[2]
    assert remedy == 'It takes them as text: {"role": "system", "content": "...", "tools": "[...]"}.'
    system = Message("system", "Be.", json.dumps({"tools": "[weather]"}))
    whole, trained = trained_text(talk(system, *TALK[::3], tools=None), IN_SYSTEM)
    assert whole.startswith("<|system|>Be.[weather]<|end|><|user|>How is it?")
    assert trained == "Cold.<|end|>"


@pytest.mark.parametrize(
    ("conversation", "place"),
    [
        (talk(*TALK[::3], tools=[{"name": "<|end|>"}]), "f:1: tools"),
        (
            talk(TALK[0], Message("assistant", "", CALLS.replace("weather", "<|user|>")), *TALK[2:]),
            "f:1: messages[1]",
        ),
        (talk(*TALK[:2], Message("tool", "<|end|>"), TALK[3]), "f:1: messages[2]"),
    ],
)
def test_special_tokens_inside_tools(conversation: Conversation, place: str) -> None:
    found, reason, _ = refusal(conversation, FULL)
    assert (found, reason.startswith("contains the special token")) == (place, True)


def test_a_template_that_breaks_on_calls_refuses_the_row() -> None:
    broken = tokenizer_with(WHOLE.replace("call.function.name + ", "1 + "))
    assert "tool_calls" not in Turns.of(broken).silent
    place, reason, _ = refusal(talk(), broken)
    assert place == "f:1"
    assert reason.startswith("the model's chat template refuses it: ")


def test_a_result_is_never_split_from_its_call() -> None:
    assert exchanges((*TALK, *TALK)) == [0, 4]
    assert exchanges((Message("system", "Be."), *TALK)) == [0]
