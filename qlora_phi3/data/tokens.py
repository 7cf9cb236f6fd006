"""Conversations to token ids and the mask of what is trained on.

Owns how a chat template becomes spans: found by token id, never by searching text, because Phi-3's
special tokens swallow the whitespace after them. The template is the tokenizer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Final, Literal

from ..errors import DataError, ModelError
from .rows import Conversation
from .tools import check_shown, silent_tools, tool_texts

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
LossOn = Literal["assistant", "last", "all"]

IGNORE: Final = -100
"""Label of a token that is not trained on."""
ASKED: Final = {"role": "user", "content": "1"}
ANSWERED: Final = {"role": "assistant", "content": "2"}
AROUND: Final[dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]]] = {
    "system": ([], [ASKED, ANSWERED]),
    "later system": ([ASKED, ANSWERED], [ASKED, ANSWERED]),
    "user": ([], [ANSWERED]),
    "assistant": ([ASKED], []),
}
"""Kind of a message -> messages before and after it in a probe."""
PLAIN_TEXT: Final = (
    "Text that a chat template has rendered already: write its turns as messages, and the template is "
    "applied for you. A token that is meant as text: write it another way, for example with a blank inside."
)
"""What helps where a special token stands in text; to remove it, or the row, would harm the data."""
REWRITTEN: Final = "Remove the row, or use a chat template that shows every turn as it is."


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
class Marked:
    """One conversation in tokens, as the runs of them that are trained on: a TokenRow in less time and space.

    `trained`: [start, stop) of every run, ascending, with a gap between any two.
    """

    input_ids: list[int]
    trained: list[tuple[int, int]]
    place: str

    @property
    def num_supervised(self) -> int:
        return sum(stop - start for start, stop in self.trained)

    def row(self) -> TokenRow:
        labels = [IGNORE] * len(self.input_ids)
        for start, stop in self.trained:
            labels[start:stop] = self.input_ids[start:stop]
        return TokenRow(self.input_ids, labels, self.place)


@dataclass(frozen=True)
class Turns:
    """How a template opens and closes the assistant's turn, in token ids.

    `header`: tokens that prompt for an answer (Phi-3: `<|assistant|>`; ChatML: `<|im_start|>assistant\\n`).
    `end`: the token that ends the answer (`<|end|>`, `<|im_end|>`), trained on so that the model stops.
    `special`: every special token; `end` is one and `header` has one, so text without them holds neither.
    `silent`: kinds of messages (see `_kind`), and parts of function calling (see `tools`), that the template
    leaves out without a word.
    """

    header: tuple[int, ...]
    end: int
    special: frozenset[int]
    silent: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any) -> Turns:
        """Read all off probe conversations.

        Raises:
            ModelError: the template fails, does not prompt for an answer with a special token, or ends none.
        """
        try:
            closed = _ids(tokenizer, [ASKED], prompt=False)
            prompt = _ids(tokenizer, [ASKED], prompt=True)
            whole = _ids(tokenizer, [ASKED, ANSWERED], prompt=False)
        except Exception as error:  # a template is a program, and raises what it likes
            raise _failed(error) from None
        special, answer = _special_ids(tokenizer), whole[len(prompt) :]
        header = _opened(prompt, answer, special) if prompt == closed else prompt[_common(prompt, closed) :]
        ends = [token for token in answer if token in special]
        if not special.intersection(header) or whole[: len(prompt)] != prompt:
            reason = "the chat template does not open the assistant's turn with a special token of its own."
            remedy = "Use one that adds it for add_generation_prompt, as Phi-3-mini-4k-instruct's does."
            raise ModelError("chat_template", reason, remedy)
        if not ends:
            reason = "the chat template does not end the assistant's turn with a special token."
            raise ModelError("chat_template", reason, "A model trained on it would never stop; mend it.")
        silent = _silent(tokenizer) | silent_tools(partial(_text, tokenizer, prompt=False))
        return cls(tuple(header), ends[0], special, silent)


def _failed(error: Exception) -> ModelError:
    reason = f"the chat template fails on a question and its answer: {_first_line(error)}."
    return ModelError("chat_template", reason, "Use a base with a chat template for plain chats, or mend it.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _opened(prompt: list[int], answer: list[int], special: frozenset[int]) -> list[int]:
    """The header of a template that opens the answer in the user's turn, asked or not (Phi-3-medium's first).

    Empty when the prompt stops with what ends an answer too, or an answer is followed by the next header:
    then what stands there is no header, or one that stands in every row's end.
    """
    at = max((i for i, token in enumerate(prompt) if token in special), default=len(prompt))
    return [] if set(prompt[at:]) & special & set(answer) else prompt[at:]


def _silent(tokenizer: Any) -> frozenset[str]:
    """Kinds of messages whose text makes no difference to what the template renders."""
    found = set()
    for kind, (before, after) in AROUND.items():
        role = kind.removeprefix("later ")
        probes = ([*before, {"role": role, "content": text}, *after] for text in ("1", "2"))
        try:
            rendered = {_text(tokenizer, probe, prompt=False) for probe in probes}
        except Exception:  # refused aloud, and so will be the row
            continue
        if len(rendered) == 1:
            found.add(kind)
    return frozenset(found)


def _kind(conversation: Conversation, at: int) -> str:
    """A message's role; a system message behind the first message is a `later system` one."""
    role = conversation.messages[at].role
    return f"later {role}" if role == "system" and at > 0 else role


def tokenize(conversation: Conversation, tokenizer: Any, turns: Turns, loss_on: LossOn) -> TokenRow:
    """Token ids with labels on what is trained on, end tokens included.

    `all` leaves out the row's first token, which nothing predicts.

    Raises:
        DataError: a message contains special tokens, the template refuses the conversation, leaves a message
            out or changes an answer, or the turns found in the tokens are not those of the conversation: a
            header ran together with the answer.
    """
    return mark(conversation, tokenizer, turns, loss_on).row()


def mark(conversation: Conversation, tokenizer: Any, turns: Turns, loss_on: LossOn) -> Marked:
    """What `tokenize` says, as runs; the reference for `batches`, one row at a time.

    Raises:
        DataError: as `tokenize`.
    """
    check_text(conversation, tokenizer, turns)
    messages, last = conversation.to_template(), conversation.last_answer
    try:
        whole = _text(tokenizer, messages, conversation.tools, prompt=False)
        prompt = _text(tokenizer, messages[:last], conversation.tools, prompt=True)
    except Exception as error:  # a template is a program, and raises what it likes
        reason = f"the model's chat template refuses it: {_first_line(error)}."
        raise DataError(conversation.place, reason, "Change the row, or remove it.") from None
    ids = list(tokenizer(whole, add_special_tokens=False)["input_ids"])
    return marked(conversation, whole, prompt, ids, turns, loss_on)


def marked(
    conversation: Conversation, whole: str, prompt: str, ids: list[int], turns: Turns, loss_on: LossOn
) -> Marked:
    """The runs to train on in `ids`, the tokens of `whole`; `prompt` asks for its last answer.

    Raises:
        DataError: the turns in tokens or text are not those of the conversation.
    """
    spans = assistant_spans(ids, turns)
    _check_spans(conversation, len(spans))
    _check_prefix(conversation, prompt, whole)
    _check_answers(conversation, len(prompt), whole)
    trained = {"assistant": spans, "last": spans[-1:], "all": [(1, len(ids))]}[loss_on]
    if conversation.shown_only:
        trained = _without_shown(conversation, spans, loss_on)
    return Marked(ids, trained, conversation.place)


def _without_shown(
    conversation: Conversation, spans: list[tuple[int, int]], loss_on: LossOn
) -> list[tuple[int, int]]:
    """The answers that count, out of those that `loss_on` takes.

    Raises:
        DataError: `loss_on` takes all, also what is only shown.
    """
    if loss_on == "all":
        where = f"{conversation.place}: messages[{conversation.shown_only[0]}]"
        reason = "is only shown (weight 0, or part of a prompt), and data.loss_on: all would train on it."
        raise DataError(where, reason, "Set data.loss_on to assistant.")
    answers = [message for message in conversation.messages if message.role == "assistant"]
    counted = [span for span, message in zip(spans, answers, strict=True) if message.trained]
    return [span for span in counted if loss_on == "assistant" or span == spans[-1]]


def _check_spans(conversation: Conversation, found: int) -> None:
    expected = sum(message.role == "assistant" for message in conversation.messages)
    if found != expected:
        reason = f"{expected} assistant turns, but {found} in its tokens."
        remedy = "Remove whitespace from the beginning of its answers, join answers in a row, or remove it."
        raise DataError(conversation.place, reason, remedy)


def _check_prefix(conversation: Conversation, prompt: str, whole: str) -> None:
    """Training must show what generation will see: the prompt for the last answer, then that answer.

    Text suffices: headers hold a special token, which no merge crosses, and `_check_spans` found all of
    them whole, so equal text in front means equal ids in front.
    """
    if whole.startswith(prompt):
        return
    at = _common(prompt, whole)
    reason = (
        "the chat template renders the turns before the last answer differently once that is there: "
        f"{prompt[at:][:40]!r} becomes {whole[at:][:40]!r}."
    )
    raise DataError(conversation.place, reason, REWRITTEN)


def _check_answers(conversation: Conversation, prompt_width: int, whole: str) -> None:
    """Every answer stands in the text as in the row, outer whitespace aside; the last behind its prompt."""
    at, last = 0, conversation.last_answer
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        answer = message.content.strip()
        at = whole.find(answer, prompt_width if i == last else at)
        if at < 0:
            reason = f"the chat template changes the answer {answer[:40]!r}."
            raise DataError(f"{conversation.place}: messages[{i}]", reason, REWRITTEN)
        at += len(answer)


def check_text(conversation: Conversation, tokenizer: Any, turns: Turns) -> None:
    """A special token in a message would open or close turns, and never be shown in an answer.

    Raises:
        DataError: the first message or part of function calling with one, or that the template leaves out.
    """
    check_shown(conversation, turns.silent)
    silent = left_out(conversation, turns)
    for i, message in enumerate(conversation.messages):
        if i == silent:
            reason = f"the model's chat template leaves out a {_kind(conversation, i)} message."
            remedy = "Put its text into the user's message, or remove it."
            raise DataError(f"{conversation.place}: messages[{i}]", reason, remedy)
        check_plain(message.content, f"{conversation.place}: messages[{i}]", tokenizer, turns)
    for place, text in tool_texts(conversation):
        check_plain(text, place, tokenizer, turns)


def check_plain(text: str, place: str, tokenizer: Any, turns: Turns) -> list[int]:
    """The ids of text without special tokens.

    Raises:
        DataError: it has one.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for token in ids:
        if token in turns.special:
            reason = f"contains the special token {tokenizer.decode([token])!r}."
            raise DataError(place, reason, PLAIN_TEXT)
    return ids


def left_out(conversation: Conversation, turns: Turns) -> int | None:
    """Index of the first message that the template leaves out, if any."""
    for i, message in enumerate(conversation.messages):
        if (_kind(conversation, i) if message.role == "system" else message.role) in turns.silent:
            return i
    return None


def prompt_ids(conversation: Conversation, tokenizer: Any) -> tuple[list[int], str]:
    """Tokens that ask for the last assistant turn, and the answer it has there: a call as it is rendered."""
    last, tools = conversation.last_answer, conversation.tools
    ids = _ids(tokenizer, conversation.to_template(last), tools, prompt=True)
    message = conversation.messages[last]
    if not message.calls_tools:
        return ids, message.content
    whole, special = (
        _ids(tokenizer, conversation.to_template(last + 1), tools, prompt=False),
        _special_ids(tokenizer),
    )
    answer = list(takewhile(lambda token: token not in special, whole[len(ids) :]))
    return ids, str(tokenizer.decode(answer))


def assistant_spans(ids: list[int], turns: Turns) -> list[tuple[int, int]]:
    """[start, stop) of every assistant turn: after its header, up to and including its end token."""
    spans: list[tuple[int, int]] = []
    header, width, at = list(turns.header), len(turns.header), 0
    try:  # list.index runs in C: twenty times as fast as a loop over the tokens
        while True:
            at = ids.index(header[0], at)
            if ids[at : at + width] != header:
                at += 1
                continue
            stop = ids.index(turns.end, at + width) + 1
            spans.append((at + width, stop))
            at = stop
    except ValueError:  # no header any more, or one that nothing ends
        return spans


def _ids(tokenizer: Any, messages: Messages, tools: Tools = None, *, prompt: bool) -> list[int]:
    found = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    return list(found["input_ids"])


def _text(tokenizer: Any, messages: Messages, tools: Tools = None, *, prompt: bool) -> str:
    found = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
    return str(found)


def render(tokenizer: Any, messages: Messages) -> str:
    """The template's text of these messages.

    Raises:
        ModelError: it fails on them.
    """
    try:
        return _text(tokenizer, messages, prompt=False)
    except Exception as error:
        raise _failed(error) from None


def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
