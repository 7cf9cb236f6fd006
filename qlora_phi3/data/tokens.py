"""Conversations to token ids and the mask of what is trained on.

Owns how a chat template becomes spans: found by token id, never by searching text, because Phi-3's
special tokens swallow the whitespace after them. The template is the tokenizer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import DataError, ModelError
from .formats import Conversation

IGNORE: Final = -100
"""Label of a token that is not trained on."""


@dataclass(frozen=True)
class TokenRow:
    """One conversation in tokens.

    Shape: `input_ids` and `labels` have the same length; a label is the token itself or IGNORE.
    """

    input_ids: list[int]
    labels: list[int]
    place: str

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Turns:
    """How a template opens and closes the assistant's turn, in token ids.

    `header`: tokens that prompt for an answer (Phi-3: `<|assistant|>`; ChatML: `<|im_start|>assistant\\n`).
    `end`: the token that ends the answer (`<|end|>`, `<|im_end|>`), trained on so that the model stops.
    `special`: every special token; `end` is one and `header` has one, so text without them holds neither.
    """

    header: tuple[int, ...]
    end: int
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Turns:
        """Read both off a probe conversation.

        Raises:
            ModelError: the template does not prompt for an answer with a special token, or does not end one.
        """
        asked = [{"role": "user", "content": "1"}]
        closed = _ids(tokenizer, asked, prompt=False)
        prompt = _ids(tokenizer, asked, prompt=True)
        whole = _ids(tokenizer, [*asked, {"role": "assistant", "content": "2"}], prompt=False)
        header = prompt[_common(prompt, closed) :]
        special = _special_ids(tokenizer)
        ends = [token for token in whole[len(prompt) :] if token in special]
        if not special.intersection(header) or whole[: len(prompt)] != prompt:
            reason = "the chat template does not open the assistant's turn with a special token of its own."
            remedy = "Use one that adds it for add_generation_prompt, as Phi-3-mini-4k-instruct's does."
            raise ModelError("chat_template", reason, remedy)
        if not ends:
            reason = "the chat template does not end the assistant's turn with a special token."
            raise ModelError("chat_template", reason, "A model trained on it would never stop; mend it.")
        return cls(tuple(header), ends[0], special)


def tokenize(conversation: Conversation, tokenizer: Any, turns: Turns) -> TokenRow:
    """Token ids with labels on every assistant turn, its end token included.

    Raises:
        DataError: a message contains special tokens, the template refuses the conversation, or the turns
            found in the tokens are not those of the conversation: a header ran together with the answer.
    """
    from jinja2 import TemplateError

    _check_text(conversation, tokenizer, turns)
    try:
        ids = _ids(tokenizer, conversation.to_template(), prompt=False)
    except TemplateError as error:
        reason = f"the model's chat template refuses it: {error}."
        raise DataError(conversation.place, reason, "Change the row, or remove it.") from None
    spans = assistant_spans(ids, turns)
    expected = sum(message.role == "assistant" for message in conversation.messages)
    if len(spans) != expected:
        reason = f"{expected} assistant turns, but {len(spans)} in its tokens."
        remedy = "Remove whitespace from the beginning of its answers, or the row."
        raise DataError(conversation.place, reason, remedy)
    labels = [IGNORE] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return TokenRow(ids, labels, conversation.place)


def _check_text(conversation: Conversation, tokenizer: Any, turns: Turns) -> None:
    """A special token in a message would open or close turns, and never be shown in an answer."""
    for i, message in enumerate(conversation.messages):
        ids = tokenizer(message.content, add_special_tokens=False)["input_ids"]
        for token in ids:
            if token in turns.special:
                reason = f"contains the special token {tokenizer.decode([token])!r}."
                raise DataError(f"{conversation.place}: messages[{i}]", reason, "Remove it, or the row.")


def prompt_ids(conversation: Conversation, tokenizer: Any) -> tuple[list[int], str]:
    """Tokens that ask for the last assistant turn, and the answer it has there."""
    last = conversation.last_answer
    ids = _ids(tokenizer, conversation.to_template(last), prompt=True)
    return ids, conversation.messages[last].content


def assistant_spans(ids: Sequence[int], turns: Turns) -> list[tuple[int, int]]:
    """[start, stop) of every assistant turn: after its header, up to and including its end token."""
    spans: list[tuple[int, int]] = []
    at, width = 0, len(turns.header)
    while at + width <= len(ids):
        if tuple(ids[at : at + width]) != turns.header:
            at += 1
            continue
        start = at + width
        stop = next((i + 1 for i in range(start, len(ids)) if ids[i] == turns.end), None)
        if stop is None:
            return spans
        spans.append((start, stop))
        at = stop
    return spans


def _ids(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> list[int]:
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    return list(found["input_ids"])


def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
