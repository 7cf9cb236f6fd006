"""Chat templates that explode are refused in seconds, and those of known models are not even tried."""

from __future__ import annotations

import time

import pytest
from conftest import CHATML_TEMPLATE, PHI3_TEMPLATE

from qlora_phi3 import template_limits
from qlora_phi3.errors import ModelError

PHI3_MEDIUM = (
    "{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
    "message['content'] + "
    "'<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] "
    "is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + "
    "'<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token "
    "}}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
    "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 "
    "== 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message "
    "!= false %}"
    "{% set content = '<<SYS>>' + system_message + '<</SYS>>' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{{ bos_token + '[INST] ' + content.strip() + ' "
    "[/INST]' }}"
    "{% endfor %}"
)
TRACKED = CHATML_TEMPLATE.replace("{{ '<|im_start|>' +", "{%- generation -%}{{ '<|im_start|>' +").replace(
    "'<|im_end|>\n' }}{% endfor %}", "'<|im_end|>\n' }}{% endgeneration %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [PHI3_TEMPLATE, CHATML_TEMPLATE, PHI3_MEDIUM, PHI4_MINI, LLAMA2, TRACKED, "{% if %}", "{" * 9, ""],
    ids=[
        "Phi-3",
        "ChatML",
        "Phi-3-medium",
        "Phi-4-mini",
        "Llama 2",
        "tracked",
        "no syntax",
        "braces",
        "empty",
    ],
)
def test_known_templates_cost_nothing(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "_explosion", lambda _: "was tried")
    template_limits.check(template, "base")


def test_a_template_that_is_not_simple_may_be_harmless() -> None:
    rendered = "{% macro turn(m) %}{{ m.role ~ ':' ~ m.content|replace('a', 'b') }}{% endmacro %}"
    template_limits.check(
        f"{rendered}{{% for m in messages %}}{{{{ turn(m) }}}}{{{{ '-' * 9 }}}}{{% endfor %}}", "b"
    )


GROWS = "{% set x = 'xxxxxxxxxx' %}"
EXPLODING = {
    "a long text": "{{ 'x' * 3000000000 }}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a width by a filter": "{{ 'a'|center(3000000000) }}",
    "a width by a method": "{{ '{:>3000000000}'.format(1) }}",
    "doubled": GROWS + "{% set x = x ~ x %}" * 40,
    "doubled by a block": GROWS + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "doubled by every message": "{% set ns = namespace(x='xx') %}{% for m in messages %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "replaced": GROWS + "{% set x = x|replace('x', 'xxxxxxxxxx') %}" * 15,
    "too many characters": "{{ 'x' * 3000000 }}",
    "in a generation block": "{% generation %}{{ 'x' * 3000000000 }}{% endgeneration %}",
    "only of long talks": "{% if messages|length > 9 %}{{ 'x' * 3000000000 }}{% endif %}",
    "only with tools": "{% if tools %}{{ 'x' * 3000000000 }}{% endif %}",
}


@pytest.mark.parametrize("template", EXPLODING.values(), ids=EXPLODING)
def test_exploding_templates(template: str) -> None:
    with pytest.raises(ModelError, match=r"the chat template (takes more than|renders 3,000,000)") as caught:
        template_limits.check(template, "base")
    assert caught.value.problems[0].place == "base"


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_endless_templates(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    start = time.process_time()
    with pytest.raises(ModelError, match="the chat template takes more than"):
        template_limits.check(template, "base")
    assert time.process_time() - start < 1, "it ran in this process"
