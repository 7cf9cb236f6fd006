"""Many rows to tokens at once, each as `tokens.mark` or `text.mark_text` alone would make it.

Owns the speed: texts are rendered and encoded in batches, and while the tokenizer works on one, outside
Python's lock, the next is read and rendered. What a batch cannot be sure of, tools included, goes to those.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from ..errors import DataError, Problem
from .rows import Row, Text
from .text import mark_text, marked_text
from .tokens import ANSWERED, ASKED, LossOn, Marked, Turns, left_out, mark, marked

CHUNK: Final = 512
"""Rows that are rendered and encoded together; 2,000 were no faster, and hold four times the memory."""
AHEAD: Final = 3
"""Chunks under way: two that are encoded, so that no core waits for Python's lock between them, and one that
is read and rendered."""

Outcome = Marked | DataError | Problem
"""A row in tokens, the reason that it has none, or the Problem that it was read with."""
Item = tuple[Row | None, Outcome]
"""A row, None for an unreadable one, and what became of it."""

Render = Callable[[list[dict[str, str]], bool], str]
"""Messages, and whether to prompt for an answer -> the template's text."""

_HARMLESS: Final = ("Prepend", "Replace")
"""Normalizers that only write ▁ for a space, or in front."""
_PRINTABLE: Final = re.compile(r"[!-~]+")
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Batcher:
    """Encodes batches of texts with the tokenizer's own backend.

    `suspicious`: finds every message that may hold a special token, and perhaps others.
    """

    tokenizer: Any
    turns: Turns
    loss_on: LossOn
    suspicious: re.Pattern[str]
    render: Render

    @classmethod
    def of(cls, tokenizer: Any, turns: Turns, loss_on: LossOn) -> Batcher | None:
        """None where only the tokenizer itself, row by row, is sure to be right."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        pattern = None if backend is None else special_text(json.loads(backend.to_str()), turns.special)
        if pattern is None or not _same_ids(tokenizer, backend):
            return None
        return cls(tokenizer, turns, loss_on, pattern, renderer(tokenizer))

    def submit(self, rows: Sequence[Row | Problem], pool: ThreadPoolExecutor) -> Chunk:
        """Render the rows that are beyond doubt and have them encoded, each copy of a row with it."""
        texts: dict[int, tuple[str, str]] = {}
        for row in rows:
            pair = None if isinstance(row, Problem) or id(row) in texts else self._texts(row)
            if pair is not None:
                texts[id(row)] = pair
        wholes = [whole for whole, _ in texts.values()]
        return Chunk(rows, texts, pool.submit(self._encode, wholes))

    def finish(self, chunk: Chunk) -> Iterator[Item]:
        """Every row of a chunk in its order."""
        encoded = dict(zip(chunk.texts, chunk.encoded.result(), strict=True))
        for row in chunk.rows:
            if isinstance(row, Problem):
                yield None, row
            elif id(row) not in encoded:
                yield row, reference(row, self.tokenizer, self.turns, self.loss_on)
            elif isinstance(row, Text):
                yield row, marked_text(row, encoded[id(row)].ids, self.tokenizer.eos_token_id)
            else:
                texts, ids = chunk.texts[id(row)], encoded[id(row)].ids
                yield row, _outcome(marked, row, *texts, ids, self.turns, self.loss_on)

    def _texts(self, row: Row) -> tuple[str, str] | None:
        """The whole text and the prompt for the last answer; None where the reference may refuse the row."""
        search = self.suspicious.search
        if isinstance(row, Text):
            plain = not search(row.text) and self.tokenizer.eos_token_id is not None
            return (row.text, "") if plain else None
        if (
            row.has_tools
            or left_out(row, self.turns) is not None
            or any(search(m.content) for m in row.messages)
        ):
            return None
        messages = row.to_template()
        try:
            return self.render(messages, False), self.render(messages[: row.last_answer], True)
        except Exception:  # told by the reference
            return None

    def _encode(self, texts: list[str]) -> Any:
        return self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)


@dataclass(frozen=True)
class Chunk:
    """Rows under way. `texts`: by identity, the whole text and the prompt of those that are encoded."""

    rows: Sequence[Row | Problem]
    texts: dict[int, tuple[str, str]]
    encoded: Future[Any]


def mark_all(
    rows: Iterable[Row | Problem], tokenizer: Any, turns: Turns, loss_on: LossOn
) -> Generator[Item, None, None]:
    """What `reference` makes of every row, in order."""
    batcher = Batcher.of(tokenizer, turns, loss_on)
    if batcher is None:
        for row in rows:
            if isinstance(row, Problem):
                yield None, row
            else:
                yield row, reference(row, tokenizer, turns, loss_on)
        return
    source, waiting = iter(rows), deque[Chunk]()
    with ThreadPoolExecutor(AHEAD - 1, "tokenize") as pool:
        while chunk := list(islice(source, CHUNK)):
            waiting.append(batcher.submit(chunk, pool))
            if len(waiting) == AHEAD:
                yield from batcher.finish(waiting.popleft())
        for last in waiting:
            yield from batcher.finish(last)


def reference(row: Row, tokenizer: Any, turns: Turns, loss_on: LossOn) -> Marked | DataError:
    """One row by itself; a DataError comes as its outcome.

    Raises:
        ModelError: plain text, and the tokenizer has no token for the end of one.
    """
    if isinstance(row, Text):
        return _outcome(mark_text, row, tokenizer, turns)
    return _outcome(mark, row, tokenizer, turns, loss_on)


def _outcome(make: Callable[..., Marked], *arguments: Any) -> Marked | DataError:
    try:
        return make(*arguments)
    except DataError as error:
        return error


def special_text(backend: dict[str, Any], special: frozenset[int]) -> re.Pattern[str] | None:
    """A pattern that text must match to have a special token among its ids; None where none is sure.

    Sure for byte-level and SentencePiece-like BPE, which is all of Phi-3's family: an added token is looked
    for in the text as it stands, and a token of the model covers a piece of the text that reads like it.
    """
    model, added = backend["model"], {one["id"]: one for one in backend["added_tokens"]}
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    harmless = all(kind in _HARMLESS for kind in _parts(backend["normalizer"], "normalizers"))
    if not harmless or _unknown(backend) in special:
        return None
    if not special <= added.keys():
        return None
    tokens = [added[token] for token in special]
    names = [token["content"] for token in tokens]
    as_written = backend["normalizer"] is None or not any(token["normalized"] for token in tokens)
    if not as_written or not all(_PRINTABLE.fullmatch(name) and not _BYTE.fullmatch(name) for name in names):
        return None
    return re.compile("|".join(map(re.escape, sorted(names))))


def _parts(component: dict[str, Any] | None, name: str) -> list[str]:
    """Types of a normalizer's or pre-tokenizer's parts."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [kind for part in component[name] for kind in _parts(part, name)]
    return [str(component["type"])]


def _unknown(backend: dict[str, Any]) -> int | None:
    """Id of the token for characters that the vocabulary lacks, where there are any and there is one."""
    model = backend["model"]
    if model.get("unk_token") is None:
        return None
    vocab: dict[str, int] = model["vocab"]
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return None
    return vocab.get(model["unk_token"])


def renderer(tokenizer: Any) -> Render:
    """The tokenizer's chat template as a function, in half the time of `apply_chat_template`.

    That spends the other half on copies of what the template sees, in case it holds more than text. The
    compiled template is not part of transformers' interface: 5.23 has it, and where a version has not, or it
    renders anything else, the interface is used.
    """

    def slow(messages: list[dict[str, str]], prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False))

    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = _compile_jinja_template(tokenizer.get_chat_template())
    except ImportError:
        return slow
    names = template.globals | tokenizer.special_tokens_map | {"tools": None, "documents": None}

    def fast(messages: list[dict[str, str]], prompt: bool) -> str:
        # Template.render without its copies of all names: a third of its time
        given = {**names, "messages": messages, "add_generation_prompt": prompt}
        return "".join(template.root_render_func(template.new_context(given, shared=True)))

    probes = [([ASKED, ANSWERED], False), ([ASKED], True), ([ASKED, ANSWERED, ASKED], True)]
    try:
        same = all(fast(*probe) == slow(*probe) for probe in probes)
    except Exception:  # a template may refuse a probe, and every row is rendered by itself then
        same = False
    return (
        fast if same and all(isinstance(one, str) for one in tokenizer.special_tokens_map.values()) else slow
    )


def _same_ids(tokenizer: Any, backend: Any) -> bool:
    """Whether the backend alone gives what the tokenizer gives: its class may do more.

    Called with it, the tokenizer also sets its backend to neither pad nor truncate.
    """
    talk = tokenizer.apply_chat_template([ASKED, ANSWERED], tokenize=False)
    probes = [talk, f" {talk} \n\n 1 \t é 🙂", ""]
    expected = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in probes]
    found = backend.encode_batch_fast(probes, add_special_tokens=False)
    return [encoding.ids for encoding in found] == expected
