"""Many conversations to tokens at once, each as `tokens.mark` alone would make it.

Owns the speed: texts are rendered and encoded in batches, and while the tokenizer works on one, outside
Python's lock, the next is read and rendered. Whatever a batch cannot be sure of goes to `tokens.mark`.
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
from .formats import Conversation
from .tokens import ANSWERED, ASKED, LossOn, Marked, Turns, left_out, mark, marked

CHUNK: Final = 512
"""Rows that are rendered and encoded together; 2,000 were no faster, and hold four times the memory."""
AHEAD: Final = 2
"""Chunks under way: one that is encoded, and one that waits for it."""

Outcome = Marked | DataError | Problem
"""A row in tokens, the reason that it has none, or the Problem that it was read with."""
Item = tuple[Conversation | None, Outcome]
"""A conversation, None for an unreadable row, and what became of it."""

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

    @classmethod
    def of(cls, tokenizer: Any, turns: Turns, loss_on: LossOn) -> Batcher | None:
        """None where only the tokenizer itself, row by row, is sure to be right."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        pattern = None if backend is None else special_text(json.loads(backend.to_str()), turns.special)
        if pattern is None or not _same_ids(tokenizer, backend):
            return None
        return cls(tokenizer, turns, loss_on, pattern)

    def submit(self, chunk: Sequence[Conversation | Problem], pool: ThreadPoolExecutor) -> Chunk:
        """Render the rows that are beyond doubt and have them encoded."""
        sure = [row for row in chunk if isinstance(row, Conversation) and self._plain(row)]
        wholes = self._render([row.to_template() for row in sure], prompt=False)
        prompts = self._render([row.to_template(row.last_answer) for row in sure], prompt=True)
        if wholes is None or prompts is None:
            return Chunk(chunk, {}, None)
        texts = {id(row): pair for row, *pair in zip(sure, wholes, prompts, strict=True)}
        return Chunk(chunk, texts, pool.submit(self._encode, wholes))

    def finish(self, chunk: Chunk) -> Iterator[Item]:
        """Every row of a chunk in its order."""
        encoded = iter(chunk.encoded.result() if chunk.encoded is not None else ())
        for row in chunk.rows:
            if isinstance(row, Problem):
                yield None, row
            elif id(row) in chunk.texts:
                whole, prompt = chunk.texts[id(row)]
                ids = next(encoded).ids
                yield row, _outcome(marked, row, whole, prompt, ids, self.turns, self.loss_on)
            else:
                yield row, _outcome(mark, row, self.tokenizer, self.turns, self.loss_on)

    def _plain(self, row: Conversation) -> bool:
        """Whether `tokens.check_text` has nothing to say of it."""
        search = self.suspicious.search
        return left_out(row, self.turns) is None and not any(search(m.content) for m in row.messages)

    def _render(self, talks: list[list[dict[str, str]]], *, prompt: bool) -> list[str] | None:
        """None where the template refuses one of them."""
        from jinja2 import TemplateError

        if not talks:
            return []
        try:
            found: list[str] = self.tokenizer.apply_chat_template(
                talks, add_generation_prompt=prompt, tokenize=False
            )
        except TemplateError:
            return None
        return found

    def _encode(self, texts: list[str]) -> Any:
        return self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)


@dataclass(frozen=True)
class Chunk:
    """Rows under way. `texts`: by identity, the whole text and the prompt of those that are encoded."""

    rows: Sequence[Conversation | Problem]
    texts: dict[int, list[str]]
    encoded: Future[Any] | None


def mark_all(
    rows: Iterable[Conversation | Problem], tokenizer: Any, turns: Turns, loss_on: LossOn
) -> Generator[Item, None, None]:
    """What `tokens.mark` makes of every row, in order; a DataError comes as the row's outcome."""
    batcher = Batcher.of(tokenizer, turns, loss_on)
    if batcher is None:
        for row in rows:
            yield (
                (None, row)
                if isinstance(row, Problem)
                else (row, _outcome(mark, row, tokenizer, turns, loss_on))
            )
        return
    source, waiting = iter(rows), deque[Chunk]()
    with ThreadPoolExecutor(1, "tokenize") as pool:
        while chunk := list(islice(source, CHUNK)):
            waiting.append(batcher.submit(chunk, pool))
            if len(waiting) == AHEAD:
                yield from batcher.finish(waiting.popleft())
        for last in waiting:
            yield from batcher.finish(last)


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


def _same_ids(tokenizer: Any, backend: Any) -> bool:
    """Whether the backend alone gives what the tokenizer gives: its class may do more.

    Called with it, the tokenizer also sets its backend to neither pad nor truncate.
    """
    talk = tokenizer.apply_chat_template([ASKED, ANSWERED], tokenize=False)
    probes = [talk, f" {talk} \n\n 1 \t é 🙂", ""]
    expected = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in probes]
    found = backend.encode_batch_fast(probes, add_special_tokens=False)
    return [encoding.ids for encoding in found] == expected
