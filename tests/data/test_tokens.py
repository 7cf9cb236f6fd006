"""Ids are those of the tokenizer's template; labels stand on assistant turns and their ends, nowhere else."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from conftest import CHATML_TEMPLATE, PHI3_TEMPLATE, phi3_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import (
    ASSISTANT,
    BOS,
    CHATML,
    CLOSE,
    END,
    EOS,
    MEDIUM,
    MEDIUM_TEMPLATE,
    PHI3,
    START,
    SYSTEM,
    TOKENIZERS,
    USER,
    conversations,
    ids,
    talk,
    template_ids,
)

from qlora_phi3.data.read import Conversation
from qlora_phi3.data.tokens import IGNORE, LossOn, Turns, assistant_spans, prompt_ids, tokenize
from qlora_phi3.errors import DataError, ModelError


def quiet(*pieces: int | str) -> list[tuple[int, int]]:
    """(id, label) of tokens that are not trained on."""
    return [(token, IGNORE) for token in ids(*pieces)]


def trained(*pieces: int | str) -> list[tuple[int, int]]:
    """(id, label) of tokens that are."""
    return [(token, token) for token in ids(*pieces)]


def label(tokenizer: Any, conversation: Conversation, loss_on: LossOn = "assistant") -> list[tuple[int, int]]:
    row = tokenize(conversation, tokenizer, Turns.of(tokenizer), loss_on)
    assert row.place == conversation.place
    assert row.num_supervised == sum(label != IGNORE for label in row.labels)
    return list(zip(row.input_ids, row.labels, strict=True))


# --- labels by hand

EMOJI = "🙂é"

PHI3_ROWS = [
    pytest.param(
        talk("user: hi", "assistant: yo"),
        quiet(USER, "hi", END, ASSISTANT) + trained("yo", END) + quiet(EOS),
        id="single turn",
    ),
    pytest.param(
        talk("system: Sh", "user: hi", "assistant: yo"),
        quiet(SYSTEM, "Sh", END, USER, "hi", END, ASSISTANT) + trained("yo", END) + quiet(EOS),
        id="system",
    ),
    pytest.param(
        talk("system: S", "user: a", "assistant: b", "user: c", "assistant: d e"),
        quiet(SYSTEM, "S", END, USER, "a", END, ASSISTANT)
        + trained("b", END)
        + quiet(USER, "c", END, ASSISTANT)
        + trained("d e", END)
        + quiet(EOS),
        id="two turns",
    ),
    pytest.param(
        talk("user: a", "assistant: b", "assistant: c", "user: d"),
        quiet(USER, "a", END, ASSISTANT)
        + trained("b", END)
        + quiet(ASSISTANT)
        + trained("c", END)
        + quiet(USER, "d", END, EOS),
        id="two answers in a row, the user last",
    ),
    pytest.param(
        talk("system: S", "assistant: b"),
        quiet(SYSTEM, "S", END, ASSISTANT) + trained("b", END) + quiet(EOS),
        id="no user",
    ),
    pytest.param(
        talk("user: \n hi \n", "assistant: \n\n  yo\n x \n"),
        quiet(USER, "hi \n", END, ASSISTANT) + trained("yo\n x \n", END) + quiet(EOS),
        id="whitespace: swallowed in front, kept behind",
    ),
    pytest.param(
        talk("user: ", "assistant: yo"),
        quiet(USER, END, ASSISTANT) + trained("yo", END) + quiet(EOS),
        id="the user says nothing",
    ),
    pytest.param(
        talk(f"user: {EMOJI}", f"assistant: {EMOJI}"),
        quiet(USER, EMOJI, END, ASSISTANT) + trained(EMOJI, END) + quiet(EOS),
        id="unicode",
    ),
    pytest.param(
        talk("user: assistant\n", "assistant: <|end|"),
        quiet(USER, "assistant\n", END, ASSISTANT) + trained("<|end|", END) + quiet(EOS),
        id="text that resembles the template",
    ),
]
DEFAULT = quiet(START, "system\nYou help.", CLOSE, "\n")
ASKS = quiet(START, "assistant\n")
CHATML_ROWS = [
    pytest.param(
        talk("user: hi", "assistant: yo"),
        DEFAULT + quiet(START, "user\nhi", CLOSE, "\n") + ASKS + trained("yo", CLOSE) + quiet("\n"),
        id="single turn, default system",
    ),
    pytest.param(
        talk("system: Sh", "user: hi", "assistant: yo"),
        quiet(START, "system\nSh", CLOSE, "\n", START, "user\nhi", CLOSE, "\n")
        + ASKS
        + trained("yo", CLOSE)
        + quiet("\n"),
        id="own system",
    ),
    pytest.param(
        talk("user: a", "assistant: b", "user: c", "assistant: d e", "user: f"),
        DEFAULT
        + quiet(START, "user\na", CLOSE, "\n")
        + ASKS
        + trained("b", CLOSE)
        + quiet("\n", START, "user\nc", CLOSE, "\n")
        + ASKS
        + trained("d e", CLOSE)
        + quiet("\n", START, "user\nf", CLOSE, "\n"),
        id="two turns, the user last",
    ),
    pytest.param(
        talk("user: \n hi \n", "assistant: \n\n  yo\n x \n"),
        DEFAULT
        + quiet(START, "user\n\n hi \n", CLOSE, "\n")
        + ASKS
        + trained("\n\n  yo\n x \n", CLOSE)
        + quiet("\n"),
        id="whitespace: kept on both sides",
    ),
    pytest.param(
        talk("user: assistant\n", "assistant: assistant\n"),
        DEFAULT
        + quiet(START, "user\nassistant\n", CLOSE, "\n")
        + ASKS
        + trained("assistant\n", CLOSE)
        + quiet("\n"),
        id="text that resembles the template",
    ),
]


MEDIUM_ROWS = [
    pytest.param(
        talk("user: hi", "assistant: yo"),
        quiet(BOS, USER, "hi", END, ASSISTANT) + trained("yo", END),
        id="single turn",
    ),
    pytest.param(
        talk("user: a", "assistant: b", "user: c", "assistant: d e", "user: f"),
        quiet(BOS, USER, "a", END, ASSISTANT)
        + trained("b", END)
        + quiet(USER, "c", END, ASSISTANT)
        + trained("d e", END)
        + quiet(USER, "f", END, ASSISTANT),
        id="two turns, the user last",
    ),
]
TWO_TURNS = talk("system: S", "user: a", "assistant: b", "user: c", "assistant: d")
ASKED_TWICE = talk("user: a", "assistant: b", "user: c", "assistant: d", "user: e")
OTHER_LOSSES = [
    pytest.param(
        PHI3,
        "last",
        TWO_TURNS,
        quiet(SYSTEM, "S", END, USER, "a", END, ASSISTANT, "b", END, USER, "c", END, ASSISTANT)
        + trained("d", END)
        + quiet(EOS),
        id="phi3 last",
    ),
    pytest.param(
        PHI3,
        "all",
        TWO_TURNS,
        quiet(SYSTEM)
        + trained("S", END, USER, "a", END, ASSISTANT, "b", END, USER, "c", END, ASSISTANT, "d", END, EOS),
        id="phi3 all",
    ),
    pytest.param(
        PHI3,
        "last",
        ASKED_TWICE,
        quiet(USER, "a", END, ASSISTANT, "b", END, USER, "c", END, ASSISTANT)
        + trained("d", END)
        + quiet(USER, "e", END, EOS),
        id="phi3 last, the user last",
    ),
    pytest.param(
        CHATML,
        "last",
        TWO_TURNS,
        quiet(
            START, "system\nS", CLOSE, "\n", START, "user\na", CLOSE, "\n", START, "assistant\nb", CLOSE, "\n"
        )
        + quiet(START, "user\nc", CLOSE, "\n")
        + ASKS
        + trained("d", CLOSE)
        + quiet("\n"),
        id="chatml last",
    ),
    pytest.param(
        CHATML,
        "all",
        talk("system: S", "user: a", "assistant: b"),
        quiet(START)
        + trained(
            "system\nS", CLOSE, "\n", START, "user\na", CLOSE, "\n", START, "assistant\nb", CLOSE, "\n"
        ),
        id="chatml all",
    ),
    pytest.param(
        MEDIUM,
        "last",
        ASKED_TWICE,
        quiet(BOS, USER, "a", END, ASSISTANT, "b", END, USER, "c", END, ASSISTANT)
        + trained("d", END)
        + quiet(USER, "e", END, ASSISTANT),
        id="medium last",
    ),
    pytest.param(
        MEDIUM,
        "all",
        talk("user: a", "assistant: b"),
        quiet(BOS) + trained(USER, "a", END, ASSISTANT, "b", END),
        id="medium all",
    ),
]


@pytest.mark.parametrize(("tokenizer", "loss_on", "conversation", "expected"), OTHER_LOSSES)
def test_labels_of_other_losses(
    tokenizer: Any, loss_on: LossOn, conversation: Conversation, expected: list[tuple[int, int]]
) -> None:
    assert label(tokenizer, conversation, loss_on) == expected


@pytest.mark.parametrize(("conversation", "expected"), MEDIUM_ROWS)
def test_labels_medium(conversation: Conversation, expected: list[tuple[int, int]]) -> None:
    assert label(MEDIUM, conversation) == expected


@pytest.mark.parametrize(("conversation", "expected"), PHI3_ROWS)
def test_labels_phi3(conversation: Conversation, expected: list[tuple[int, int]]) -> None:
    assert label(PHI3, conversation) == expected


@pytest.mark.parametrize(("conversation", "expected"), CHATML_ROWS)
def test_labels_chatml(conversation: Conversation, expected: list[tuple[int, int]]) -> None:
    assert label(CHATML, conversation) == expected


def test_turns() -> None:
    phi3, chatml, medium = Turns.of(PHI3), Turns.of(CHATML), Turns.of(MEDIUM)
    assert (phi3.header, phi3.end) == (medium.header, medium.end) == ((ASSISTANT,), END)
    assert (list(chatml.header), chatml.end) == (ids(START, "assistant\n"), CLOSE)
    tools = {"tools", "system tools", "tool_calls"}  # ChatML shows any role, a tool's too
    assert (phi3.silent, chatml.silent) == (tools | {"tool"}, tools)
    assert medium.silent == tools | {"tool", "system", "later system"}


def test_prompt_asks_for_the_last_answer() -> None:
    conversation = talk("user: a", "assistant: b", "user: c", "assistant:  d ", "user: e")
    assert prompt_ids(conversation, PHI3) == (
        ids(USER, "a", END, ASSISTANT, "b", END, USER, "c", END, ASSISTANT),
        " d ",
    )


# --- special tokens in the text are refused, with the message they stand in


@pytest.mark.parametrize("token", ["<|end|>", "<|assistant|>", "<|user|>", "<|system|>", "<|endoftext|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("text", ["{}", "a {} b"])
def test_special_token_in_the_text_phi3(token: str, role: str, text: str) -> None:
    refused(PHI3, token, role, text)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("text", ["{}", "a {} b"])
def test_special_token_in_the_text_chatml(token: str, role: str, text: str) -> None:
    refused(CHATML, token, role, text)


def refused(tokenizer: Any, token: str, role: str, text: str) -> None:
    contents = {"system": "S", "user": "hi", "assistant": "yo"} | {role: text.replace("{}", token)}
    conversation = talk(*(f"{name}: {content}" for name, content in contents.items()))
    with pytest.raises(DataError) as caught:
        tokenize(conversation, tokenizer, Turns.of(tokenizer), "assistant")
    [problem] = caught.value.problems
    assert problem.place == f"chats.jsonl:7: messages[{list(contents).index(role)}]"
    assert problem.reason == f"contains the special token {token!r}."


def test_a_whole_turn_in_the_text_is_refused() -> None:
    """Its spans, counted over the whole row, could cancel those of a turn that was lost."""
    for text in ("x<|end|>\n<|assistant|>\ny", "x<|assistant|>y<|end|>"):
        with pytest.raises(DataError, match=r"messages\[0\]"):
            tokenize(talk(f"user: {text}", "assistant: b"), PHI3, Turns.of(PHI3), "assistant")


# --- templates that cannot be used


def with_template(template: str, tokenizer: Any = None) -> Any:
    found = tokenizer or phi3_tokenizer()
    found.chat_template = template
    return found


PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
assert PHI3_TEMPLATE.endswith(PROMPT)

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)

BAD_TEMPLATES = [
    pytest.param(PHI3_TEMPLATE.removesuffix(PROMPT), "does not open", id="no generation prompt"),
    pytest.param(
        PHI3_TEMPLATE.replace("{% if add", "{% if true or add"), "does not open", id="always prompts"
    ),
    pytest.param(
        MEDIUM_TEMPLATE.replace("{% endif %}{% endfor %}", "{% endif %}{% endfor %}{{ eos_token }}"),
        "does not open",
        id="the user's turn prompts, and the eos follows",
    ),
    pytest.param(
        PHI3_TEMPLATE.replace("{{ '<|assistant|>\n' }}", "{{ '<|assistant|>\n<think>\n' }}"),
        "does not open",
        id="prompts for more than a turn begins with",
    ),
    pytest.param(PLAIN_TEMPLATE, "does not open", id="a header of plain text, which any message can hold"),
    pytest.param(
        PHI3_TEMPLATE.replace("<|end|>", "").replace("{{ eos_token }}", ""), "does not end", id="never ends"
    ),
    pytest.param(
        CHATML_TEMPLATE.replace("<|im_start|>", "<|user|>").replace("<|im_end|>", "[END]"),
        "does not end",
        id="ends in plain text",
    ),
    pytest.param("{{ messages[", "fails on a question", id="no template"),
    pytest.param("{{ 1 // 0 }}", "fails on a question and its answer: ", id="raises what it likes"),
    pytest.param("{{ 5 + messages[0]['content'] }}", "fails on a question and its answer: ", id="adds text"),
]


@pytest.mark.parametrize(("template", "reason"), BAD_TEMPLATES)
def test_bad_template(template: str, reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        Turns.of(with_template(template))
    [problem] = caught.value.problems
    assert problem.place == "chat_template"
    assert reason in problem.reason


def test_turns_that_only_the_eos_ends() -> None:
    """One turn is taught to stop with it; a turn in the middle, which nothing ends, is refused."""
    tokenizer = with_template(PHI3_TEMPLATE.replace("<|end|>", ""))
    assert label(tokenizer, talk("user: hi", "assistant: yo")) == (
        quiet(USER, "hi\n", ASSISTANT) + trained("yo\n", EOS)
    )
    with pytest.raises(DataError, match="2 assistant turns, but 1 in its tokens"):
        label(tokenizer, talk("user: a", "assistant: b", "user: c", "assistant: d"))


def test_row_that_the_template_refuses() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = with_template(strict + PHI3_TEMPLATE)
    assert label(tokenizer, talk("user: a", "assistant: b"))
    with pytest.raises(DataError, match=r"chats\.jsonl:7: .*no system role"):
        label(tokenizer, talk("system: S", "user: a", "assistant: b"))


# --- templates that leave messages out, or show turns otherwise than they are

FIRST_SYSTEM_ONLY = PHI3_TEMPLATE.replace("== 'system' %}", "== 'system' and loop.first %}")
LATER = ["user: a", "assistant: b", "system: S", "user: c", "assistant: d"]
OMITTED = [
    pytest.param(MEDIUM, ["system: S", "user: a", "assistant: b"], 0, "system", id="system"),
    pytest.param(MEDIUM, LATER, 2, "later system", id="later system"),
    pytest.param(with_template(FIRST_SYSTEM_ONLY), LATER, 2, "later system", id="only a later one"),
    pytest.param(
        with_template(PHI3_TEMPLATE.replace("'<|user|>\n' + message['content']", "'<|user|>\nsomething'")),
        ["user: a", "assistant: b"],
        0,
        "user",
        id="a user's turn, but not its text",
    ),
]


@pytest.mark.parametrize(("tokenizer", "messages", "at", "kind"), OMITTED)
def test_message_that_the_template_leaves_out(
    tokenizer: Any, messages: list[str], at: int, kind: str
) -> None:
    with pytest.raises(DataError) as caught:
        label(tokenizer, talk(*messages))
    [problem] = caught.value.problems
    assert problem.place == f"chats.jsonl:7: messages[{at}]"
    assert problem.reason == f"the model's chat template leaves out a {kind} message."


def test_a_first_system_message_stays_usable() -> None:
    tokenizer = with_template(FIRST_SYSTEM_ONLY)
    conversation = talk("system: S", "user: a", "assistant: b")
    assert label(tokenizer, conversation) == label(PHI3, conversation)


def forgetting(condition: str) -> Any:
    """Phi-3's template, without the first line of an assistant message where `condition` holds."""
    content = (
        "(message['content'].split('\\n')[1:] | join('\n') if " + condition + " else message['content'])"
    )
    return with_template(
        PHI3_TEMPLATE.replace("'<|assistant|>\n' + message['content']", "'<|assistant|>\n' + " + content)
    )


LAST_ANSWER = "messages | selectattr('role', 'equalto', 'assistant') | list | last"
THOUGHTS = ["user: a", "assistant: think\nb", "user: c", "assistant: think\nd"]
REWRITING = [
    pytest.param(
        forgetting(f"message != ({LAST_ANSWER})"),
        "chats.jsonl:7",
        "'think\\nb<|end|>",
        id="once another answer follows",
    ),
    pytest.param(
        forgetting("not loop.last"), "chats.jsonl:7: messages[1]", "'think\\nb'", id="once anything follows"
    ),
]


@pytest.mark.parametrize(("tokenizer", "place", "shown"), REWRITING)
@pytest.mark.parametrize("loss_on", get_args(LossOn))
def test_turns_that_the_template_rewrites(tokenizer: Any, place: str, shown: str, loss_on: LossOn) -> None:
    assert label(tokenizer, talk(*THOUGHTS[:2]), loss_on) == label(PHI3, talk(*THOUGHTS[:2]), loss_on)
    with pytest.raises(DataError) as caught:
        label(tokenizer, talk(*THOUGHTS), loss_on)
    [problem] = caught.value.problems
    assert problem.place == place
    assert shown in problem.reason


def test_prompt_of_a_template_that_ignores_being_asked() -> None:
    conversation = talk("user: a", "assistant: b", "user: c", "assistant: d")
    asked = conversation.to_template(3)
    ids_, answer = prompt_ids(conversation, MEDIUM)
    assert ids_ == template_ids(MEDIUM, asked) == template_ids(MEDIUM, asked, prompt=True)
    assert (ids_, answer) == (ids(BOS, USER, "a", END, ASSISTANT, "b", END, USER, "c", END, ASSISTANT), "d")


def test_two_answers_where_only_a_question_opens_one() -> None:
    with pytest.raises(DataError, match="2 assistant turns, but 1 in its tokens"):
        label(MEDIUM, talk("user: a", "assistant: b", "assistant: c"))


# --- random conversations against an oracle that adds one message at a time


def spans_by_prefixes(tokenizer: Any, conversation: Conversation, tail: int) -> list[tuple[int, int]]:
    """From the end of the prompt for a turn to the end of the row that stops with it, less `tail` tokens."""
    messages = conversation.to_template()
    whole = template_ids(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = template_ids(tokenizer, messages[:i], prompt=True)
            through = template_ids(tokenizer, messages[: i + 1])
            through = through[: len(through) - tail]
            assert whole[: len(prompt)] == prompt
            assert whole[: len(through)] == through
            spans.append((len(prompt), len(through)))
    return spans


@pytest.mark.parametrize(("tokenizer", "system", "tail"), TOKENIZERS)
@settings(max_examples=100, deadline=None, database=None)
@given(data=st.data())
def test_random_conversations(tokenizer: Any, system: bool, tail: int, data: st.DataObject) -> None:
    conversation, turns = data.draw(conversations(system)), Turns.of(tokenizer)
    whole = template_ids(tokenizer, conversation.to_template())
    spans = spans_by_prefixes(tokenizer, conversation, tail)
    assert assistant_spans(whole, turns) == spans
    assert all(whole[stop - 1] == turns.end for _, stop in spans)
    inside = {"assistant": spans, "last": [spans[-1]], "all": [(1, len(whole))]}
    for loss_on in get_args(LossOn):
        row = tokenize(conversation, tokenizer, turns, loss_on)
        assert row.input_ids == whole
        trained_on = {i for start, stop in inside[loss_on] for i in range(start, stop)}
        assert row.labels == [token if i in trained_on else IGNORE for i, token in enumerate(whole)]
    start, stop = spans[-1]
    assert prompt_ids(conversation, tokenizer)[0] + whole[start:stop] == whole[:stop]


def merging_tokenizer() -> Any:
    """ChatML with merges across words, so that the header's newline can run together with the answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("Ċ", "Ċ"), ("Ċ", "a"), ("Ċ", "Ġ"), ("Ġ", "Ġ")]
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0], chat_template=CHATML_TEMPLATE
    )


MERGING = merging_tokenizer()


@pytest.mark.parametrize("answer", ["\nb", "ab", " b"])
def test_answer_that_runs_together_with_its_header(answer: str) -> None:
    assert label(MERGING, talk("user: a", "assistant: b"))
    with pytest.raises(DataError, match="1 assistant turns, but 0 in its tokens"):
        label(MERGING, talk("user: a", f"assistant: {answer}"))


@settings(max_examples=150, deadline=None, database=None)
@given(conversation=conversations())
def test_merging_is_refused_or_right(conversation: Conversation) -> None:
    whole = template_ids(MERGING, conversation.to_template())
    prompts = [
        template_ids(MERGING, conversation.to_template(i), prompt=True)
        for i, message in enumerate(conversation.messages)
        if message.role == "assistant"
    ]
    clean = all(whole[: len(prompt)] == prompt for prompt in prompts)
    try:
        row = tokenize(conversation, MERGING, Turns.of(MERGING), "assistant")
    except DataError:
        assert not clean
        return
    assert clean
    spans = spans_by_prefixes(MERGING, conversation, tail=1)
    inside = {i for start, stop in spans for i in range(start, stop)}
    assert [i for i, token in enumerate(row.labels) if token != IGNORE] == sorted(inside)


def test_the_last_answer_of_a_chat_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked for at every answer: minutes for a log of twenty thousand."""
    asked, found = [], Conversation.last_answer
    assert isinstance(found, property) and found.fget is not None

    def counted(self: Conversation) -> int:
        asked.append(1)
        return int(found.fget(self))  # type: ignore[misc]

    monkeypatch.setattr(Conversation, "last_answer", property(counted))
    assert label(PHI3, talk(*["user: a", "assistant: b"] * 50))
    assert len(asked) < 5
