"""Conversations and tokenizers that the tests of this folder share, and ids written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import chatml_tokenizer, phi3_tokenizer
from hypothesis import strategies as st

from qlora_phi3.data.read import Conversation, Message

MEDIUM_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}"
    "{% endfor %}"
)
"""Phi-3-medium's first: the user's turn opens the assistant's, asked or not; system messages vanish."""


def medium_tokenizer() -> Any:
    from tokenizers import AddedToken

    found = phi3_tokenizer()
    found.add_special_tokens({"bos_token": AddedToken("<s>", special=True, normalized=False)})
    found.chat_template = MEDIUM_TEMPLATE
    return found


PHI3, CHATML, MEDIUM = phi3_tokenizer(), chatml_tokenizer(), medium_tokenizer()
EOS, ASSISTANT, SYSTEM, END, USER, BOS = 256, 257, 258, 259, 260, 261
START, CLOSE = 257, 258
"""ChatML's `<|im_start|>` and `<|im_end|>`."""

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [*PRINTABLE, *sorted(set(range(256)) - set(PRINTABLE))]
"""The byte of each of the first 256 ids, in GPT-2's order."""


def ids(*pieces: int | str) -> list[int]:
    """Ids by hand: a number stands for itself, text for its UTF-8 bytes."""
    found: list[int] = []
    for piece in pieces:
        found += [piece] if isinstance(piece, int) else [BYTES.index(byte) for byte in piece.encode()]
    return found


def talk(*messages: str, place: str = "chats.jsonl:7") -> Conversation:
    """`"user: hi"`, `"assistant: yo"` ... as a conversation."""
    return Conversation(tuple(Message(*message.split(": ", 1)) for message in messages), place)


def template_ids(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)[
        "input_ids"
    ]


SPECIAL_TEXT = [*PHI3.get_added_vocab(), *CHATML.get_added_vocab()]
FRAGMENTS = ["\n", " ", "\n\n", "\t", "<", "<|", "|>", "<|end|", "|end|>", "assistant\n", "user", "a", "S\n"]
TEXT = (
    st.lists(st.one_of(st.text(max_size=6), st.sampled_from(FRAGMENTS)), max_size=4)
    .map("".join)
    .filter(lambda text: not any(special in text for special in SPECIAL_TEXT))
)
ANSWER = TEXT.filter(str.strip)


TOKENIZERS = [
    pytest.param(PHI3, True, 1, id="phi3"),  # its eos stands behind the last turn
    pytest.param(CHATML, True, 1, id="chatml"),  # its newline
    pytest.param(MEDIUM, False, 0, id="medium"),
]
"""Tokenizer, whether it takes system messages, tokens of the template behind the last turn's end."""


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> Conversation:
    messages = [Message("system", draw(TEXT))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [Message("user", draw(TEXT)), Message("assistant", draw(ANSWER))]
    return Conversation(tuple(messages), "random:1")
