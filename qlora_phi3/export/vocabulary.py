"""A tokenizer as the metadata of a GGUF file, so that llama.cpp gives the same ids.

Owns both kinds in the family: SentencePiece-style BPE with byte fallback (Phi-3) and byte-level BPE (Phi-4,
the built-in model). Refuses what llama.cpp would tokenize differently: another pre-tokenizer, special tokens
of which only some swallow the whitespace after them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..data.tokens import ANSWERED, ASKED, Turns
from ..errors import ModelError
from ..model import load_tokenizer

_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE: Final = "\u2581"
_NO_MERGES: Final = ("[PAD0] [PAD0]",)
"""A merge that never applies: llama.cpp refuses a file with none."""
_UNUSED_SCORE: Final = -10000.0
_ADDED_SCORE: Final = -1000.0

_PHI3: Final = re.compile("phi-?3", re.IGNORECASE)
_NEVER_SWALLOW: Final = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens whose following whitespace llama.cpp keeps in any model (llama-vocab.cpp, "phi-3")."""
_ASSUMED: Final = (*_NEVER_SWALLOW, "</s>")
"""Tokens without which llama.cpp fails to load a model of that name (map::at)."""


_CONTENT: Final = re.compile(r"""\b\w+\[['"]content['"]\]|\b\w+\.content\b""")
"""Where a chat template takes a message's content."""
_SPACED: Final = [{**turn, "content": f" {turn['content']}\n"} for turn in (ASKED, ANSWERED, ASKED, ANSWERED)]
_PROBES: Final = (_SPACED, [{"role": "system", "content": " 0\n"}, *_SPACED])


@dataclass(frozen=True)
class Vocabulary:
    """All that a GGUF file says about a tokenizer.

    `model`: llama.cpp's name of the algorithm, "llama" (SentencePiece) or "gpt2" (byte-level BPE).
    `pre`: its name of the rule that cuts text before the merges. `swallows`: special tokens eat the
    whitespace after them. Lists have one entry for each row of the embedding.
    """

    model: str
    pre: str
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    ids: dict[str, int]
    swallows: bool
    space_prefix: bool
    template: str

    def name(self, wished: str) -> str:
        """`general.name`, by which llama.cpp decides whether special tokens swallow whitespace.

        It does where the name contains phi-3 or phi3, and only there: without it `<|user|>\\n` gains a
        newline, and with it ChatML would lose those that its tokens keep.
        """
        if self.swallows:
            return wished if _PHI3.search(wished) else f"Phi-3 {wished}"
        return _PHI3.sub("phi_3", wished)

    def write(self, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges or _NO_MERGES)
        for role, token in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(False)  # the template says where one stands; Phi-3's has none
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.space_prefix)
        writer.add_chat_template(self.template)


def read(folder: Path, vocab_size: int, stop_ids: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of the tokenizer in a folder; rows of the embedding beyond it become unused tokens.

    `stop_ids` end an answer; beside eos and the end of a turn llama.cpp knows one more (`untold`).

    Raises:
        ModelError: no tokenizer, no chat template, or one that llama.cpp cannot repeat.
    """
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    place = str(folder)
    if content["model"]["type"] != "BPE":
        reason = f"the tokenizer's algorithm is {content['model']['type']}, not BPE."
        raise ModelError(place, reason, "Export it as merged safetensors instead.")
    sentencepiece = bool(content["model"].get("byte_fallback"))
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens, types = _tokens(content, added, vocab_size, sentencepiece, place)
    swallows = _swallows(tokenizer, added, place)
    if swallows:
        _name_spare_rows(tokens, types, place)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else _pre(content["pre_tokenizer"], place),
        tokens=tokens,
        scores=_scores(tokens, merges, added) if sentencepiece else [0.0] * len(tokens),
        types=types,
        merges=merges,
        ids=_ids(tokenizer, stop_ids),
        swallows=swallows,
        space_prefix=sentencepiece and _prefixes_space(content),
        template=_template(tokenizer, added, place),
    )


def _tokens(
    content: dict[str, Any], added: dict[int, dict[str, Any]], size: int, sentencepiece: bool, place: str
) -> tuple[list[str], list[int]]:
    """Text and `gguf.TokenType` of every id."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    by_id = {i: token for token, i in content["model"]["vocab"].items()}
    by_id |= {i: token["content"] for i, token in added.items()}
    if max(by_id) >= size:
        reason = f"the tokenizer has id {max(by_id)}, but the embedding only {size} rows."
        raise ModelError(place, reason, "Give the tokenizer that belongs to these weights.")
    unknown = content["model"].get("unk_token")
    for i, token in by_id.items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
        if token == unknown:
            types[i] = int(TokenType.UNKNOWN)
        elif i in added:
            types[i] = int(TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED)
        elif sentencepiece and _BYTE.fullmatch(token):
            types[i] = int(TokenType.BYTE)
    return tokens, types


def _name_spare_rows(tokens: list[str], types: list[int], place: str) -> None:
    """Give what llama.cpp takes for granted in a Phi-3 to rows that no text becomes, where it is absent.

    Raises:
        ModelError: there are too few such rows.
    """
    from gguf import TokenType

    absent = [token for token in _ASSUMED if token not in tokens]
    spare = [i for i, kind in enumerate(types) if kind == TokenType.UNUSED]
    if len(absent) > len(spare):
        reason = (
            f"llama.cpp needs {', '.join(absent)}, and the embedding has {len(spare)} rows to spare for them."
        )
        raise ModelError(place, reason, "Export it as merged safetensors instead.")
    for token, i in zip(absent, spare, strict=False):
        tokens[i] = token


def _scores(tokens: list[str], merges: list[str], added: dict[int, Any]) -> list[float]:
    """SentencePiece scores that order merges as the merge list does: the earlier, the higher.

    tokenizer.json keeps no scores; that of a piece only says when it is merged, so that its first merge will
    do. What no merge makes needs none: it is a character, or never comes out.
    """
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", ""), rank)
    last = -float(len(merges) + 1)
    scores = [-float(first[token]) if token in first else last for token in tokens]
    for i, token in enumerate(tokens):
        if i in added:
            scores[i] = _ADDED_SCORE
        elif token.startswith("[PAD"):
            scores[i] = _UNUSED_SCORE
        elif _BYTE.fullmatch(token):
            scores[i] = 0.0
    return scores


def _prefixes_space(content: dict[str, Any]) -> bool:
    """Whether text gets a space in front, at its start and after special tokens, as in Llama's."""
    steps = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    steps += steps[0].get("normalizers", [])
    prepends = any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps)
    return prepends or any(step.get("prepend_scheme") in ("always", "first") for step in steps)


def _pre(pre_tokenizer: dict[str, Any] | None, place: str) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer.

    Source: llama.cpp llama-vocab.cpp, the regular expressions of each name.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    plain = not any(step.get("add_prefix_space") for step in steps)
    if kinds == ["ByteLevel"] and plain and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and plain and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and plain:
        pattern = str(steps[0]["pattern"].get("Regex", ""))
        if r"\p{Lu}" in pattern and r"\p{N}{1,3}" in pattern:
            return "gpt-4o"  # Phi-4-mini
        if "ll" in pattern and r"\p{N}{1,3}" in pattern:
            return "dbrx"  # Phi-4
    reason = f"llama.cpp has no pre-tokenizer like {json.dumps(pre_tokenizer)[:200]}."
    raise ModelError(place, reason, "Export it as merged safetensors instead.")


def differences(folder: Path, stop_ids: Sequence[int]) -> list[str]:
    """What llama.cpp makes of texts and answers otherwise than transformers, beyond what the gate asks."""
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    swallows = _swallows(tokenizer, added, str(folder))
    template = {token["content"] for token in _used(tokenizer, added)}
    found = []
    for does, told in ((True, "drops"), (False, "keeps")):
        eaten = [token for token in added.values() if _eats(token, swallows) is does]
        other = [token["content"] for token in eaten if token["rstrip"] is not does]
        names = [_quoted(name) for name in other if name not in template]
        if names:
            shown = f"{', '.join(names[:8])}{' and others' if len(names) > 8 else ''}"
            found.append(
                f"llama.cpp {told} white space right behind {shown}, where transformers does not; the chat "
                "template writes none of these."
            )
    if swallows:
        found.append(
            "White space beyond ASCII (no-break and ideographic spaces, line separators) at the beginning of "
            "a message is dropped by transformers and kept by llama.cpp."
        )
    untold = [_quoted(one) for one in tokenizer.convert_ids_to_tokens(_others(tokenizer, stop_ids)[1:])]
    if untold:
        found.append(f"A GGUF has no place for all stops: have llama.cpp stop at {', '.join(untold)} too.")
    return found


_SPACES: Final = ("\u00a0", "\u2003", "\u2028", "\u3000")


def odd_texts(folder: Path) -> list[str]:
    """Messages as no row may have: added tokens with white space around, and white space beyond ASCII."""
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token["content"] for token in content["added_tokens"]]
    return [
        *(f"a {token}{behind}b" for token in tokens for behind in ("", " ", "\n\n")),
        *(text for space in _SPACES for text in (f"{space}a", f"a{space}", f"a {space} b")),
    ]


def unexplained(folder: Path, texts: Sequence[str]) -> list[str]:
    """Texts for whose other ids `differences` has no reason."""
    tokenizer = load_tokenizer(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in content["added_tokens"]}
    swallows = _swallows(tokenizer, added, str(folder))
    other = [token["content"] for token in added.values() if _eats(token, swallows) != token["rstrip"]]
    spaced = _SPACES if swallows else ()
    return [text for text in texts if not any(part in text for part in (*other, *spaced))]


def _quoted(token: str) -> str:
    return f"`{token.replace('`', chr(92) + 'x60')}`"


def _eats(token: dict[str, Any], swallows: bool) -> bool:
    """Whether llama.cpp drops the white space behind an added token."""
    return swallows and token["content"] not in _NEVER_SWALLOW


def _others(tokenizer: Any, stop_ids: Sequence[int]) -> list[int]:
    known = (tokenizer.eos_token_id, Turns.of(tokenizer).end)
    return [token for token in stop_ids if token not in known]


def _ids(tokenizer: Any, stop_ids: Sequence[int]) -> dict[str, int]:
    """Special ids by llama.cpp's role; the template's end of turn ends an answer beside the eos.

    Any other stop is written as the end of a message, which llama.cpp takes for one too.
    """
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": Turns.of(tokenizer).end,
        "eom": next(iter(_others(tokenizer, stop_ids)), None),
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {role: token for role, token in found.items() if token is not None}


def _used(tokenizer: Any, added: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The added tokens that the chat template writes, but for those that llama.cpp never lets swallow."""
    used: set[int] = set()
    for messages in _PROBES:
        try:
            used |= set(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
        except Exception:  # a template that refuses a system turn; the other probe stands
            continue
    return [added[i] for i in sorted(used & added.keys()) if added[i]["content"] not in _NEVER_SWALLOW]


def _swallows(tokenizer: Any, added: dict[int, dict[str, Any]], place: str) -> bool:
    """Whether the template's special tokens eat the whitespace after them; all do or none does.

    Raises:
        ModelError: only some do: llama.cpp has one rule for all.
    """
    tokens = _used(tokenizer, added)
    eating = [token["content"] for token in tokens if token["rstrip"]]
    if eating and len(eating) < len(tokens):
        reason = f"only some of the special tokens swallow whitespace ({', '.join(eating)})."
        raise ModelError(place, reason, "llama.cpp cannot repeat that; export merged safetensors instead.")
    return bool(eating)


def _template(tokenizer: Any, added: dict[int, dict[str, Any]], place: str) -> str:
    """The chat template; with contents trimmed where special tokens eat the whitespace before them (Phi-4).

    llama.cpp lets none do that. Trimmed beforehand, a content gives the ids that it gives in transformers,
    where it does not end in whitespace beyond ASCII: llama.cpp's `trim` knows no other.

    Raises:
        ModelError: whitespace still stands before a special token.
    """
    template = str(tokenizer.chat_template)
    eating = [token["content"] for token in _used(tokenizer, added) if token["lstrip"]]
    if not eating:
        return template
    trimmed = _CONTENT.sub(r"(\g<0> | trim)", template)
    for messages in _PROBES:
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=trimmed, tokenize=False)
        except Exception:  # as above
            continue
        if any(before.rstrip() != before for token in eating for before in str(text).split(token)[:-1]):
            reason = f"{eating[0]} swallows the whitespace before it, which llama.cpp does not."
            raise ModelError(place, reason, "Export it as merged safetensors instead.")
    return trimmed
