"""What the name of a base model says before anything of it is here.

Owns the names that are known, the ones that cannot be of this architecture, and what was probably meant. A
name that says nothing may be anybody's fine-tune of Phi-3: its config.json decides, once it is downloaded.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Final

from . import phi3

KNOWN: Final = (
    *(name for name in phi3.VARIANTS if not name.startswith("builtin:")),
    *("microsoft/Phi-4-mini-reasoning", "microsoft/Phi-4-reasoning", "microsoft/Phi-4-reasoning-plus"),
)
"""Microsoft's checkpoints of this architecture, those too whose sizes are read once they are downloaded."""

_CANONICAL: Final = {name.lower(): name for name in KNOWN}
_USUAL: Final = KNOWN[0]

_OTHER_PHI: Final = (
    (r"phi-3-small(-(8k|128k)|$)", "phi3small"),
    (r"phi-3(-5)?-vision", "phi3_v"),
    (r"phi-3-5-moe|phi-(mini|tiny)-moe", "phimoe"),
    (r"phi-4-(multimodal|mm)(-|$)", "phi4mm"),
    (r"phi-4-mini-flash", "phi4flash"),
    (r"phi-4-reasoning-vision", "phi4-siglip"),
    (r"phi-(1|1-5|2)(-|$)", "phi"),
)
"""Beginning of a name, dots and underscores as hyphens -> model_type in its config.json."""

_OTHER_FAMILY: Final = re.compile(
    r"(?:(?:tiny|code)?llama|smollm|smolvlm|(?:mi|mini|code|dev)stral|mixtral|qwen|qwq|(?:code|med)?gemma|deepseek"
    r"|falcon|vicuna|zephyr|(?:distil)?gpt|starcoder|olmo|granite|internlm|baichuan|chatglm|stablelm|pythia|bloom"
    r"|nemotron|exaone|(?:distil|ro|de|al|modern)?berta?|whisper|t5|flan)(?:v?\d\w*|z|j|neo|neox)?"
)
"""Word of a name that is another family's, with a version or without."""

_WITH_SIZE: Final = re.compile(
    r"(?:^|-)(opt|yi|mpt|glm|kimi|orca|jamba|mamba|rwkv|grok|lfm2|command-r)(-\w+)*-\d+(-\d+)?[bmk]"
)
"""Families whose names are plain words: only with a size behind them."""

_QUANTIZED: Final = "holds weights that are quantized already, by its name"
_FORMATS: Final = {
    **dict.fromkeys(("gguf", "ggml"), "is a copy for llama.cpp, by its name"),
    "onnx": "is a copy for ONNX Runtime, by its name",
    **dict.fromkeys(("awq", "gptq", "exl2", "exl3", "hqq", "aqlm", "bnb"), _QUANTIZED),
    **dict.fromkeys(("fp8", "nvfp4", "int4", "int8", "w4a16", "w8a8"), _QUANTIZED),
}
"""Word of a name -> what it says of the weights."""

_ENDING: Final = re.compile(r"-[48]-?bit$")
"""What the names of quantized copies end with; inside a name it may mean anything."""

_HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_LENGTH: Final = 96
_WEB: Final = re.compile(r"[a-z]+://([^/]+)/?(.*)", re.IGNORECASE)
_HOW_TO_WRITE: Final = "Write org/name, ./folder, or builtin:smollm2-135m."

Refusal = tuple[str, str]
"""(reason, remedy)."""


def canonical(base: str) -> str:
    """A known name as Microsoft writes it, whatever the case; any other as it is."""
    return _CANONICAL.get(base.lower(), base)


def refusal(base: str) -> Refusal | None:
    """Why a name cannot be a base, and what to take instead; None where it can, or where nobody knows."""
    if Path(base).is_absolute() or base.startswith("builtin:") or canonical(base) in KNOWN:
        return None
    if not is_hub_name(base):
        return _no_hub_name(base)
    plain = _plain(base.partition("/")[2])
    return (
        _other_architecture(plain)
        or _other_format(plain)
        or _misspelt(base.partition("/")[0].lower(), plain)
        or _other_family(plain)
    )


NO_REVISION: Final = ("is no commit, branch or tag.", "Write one as the hub shows it, or remove it.")


def is_hub_name(base: str) -> bool:
    """Whether the hub could have a model of this name: org/name, as its own client checks it."""
    fits = _HUB_ID.fullmatch(base) is not None and len(base) <= _HUB_LENGTH
    return fits and not any(part in base for part in ("--", "..")) and not base.endswith((".git", "-", "."))


def is_revision(revision: str) -> bool:
    """Whether it can be a commit, a branch or a tag: no way up, no empty part, nothing that git refuses."""
    parts = revision.split("/")
    return bool(re.fullmatch(r"[\w.+@/-]+", revision)) and not any(
        not part or part.startswith((".", "-")) or ".." in part or part.endswith((".", ".lock"))
        for part in parts
    )


def _no_hub_name(base: str) -> Refusal:
    address = _WEB.fullmatch(base)
    if address is not None:
        meant = "/".join(address[2].split("/")[:2])
        known = address[1].lower() in ("huggingface.co", "hf.co") and is_hub_name(meant)
        return "is a web address.", f"Write {canonical(meant)}." if known else _HOW_TO_WRITE
    hint = _hint(_plain(base)) if "/" not in base else ""
    return "is neither a hub id nor a folder.", f"{hint}{_HOW_TO_WRITE}"


def _plain(name: str) -> str:
    """A repository's name for comparisons: `Phi3.5_mini` is phi-3-5-mini."""
    return re.sub(r"\bphi-?(\d)", r"phi-\1", re.sub(r"[-_.:\s]+", "-", name.lower()))


_PLAIN: Final = {_plain(name.partition("/")[2]): name for name in KNOWN}


def _other_architecture(plain: str) -> Refusal | None:
    for pattern, model_type in _OTHER_PHI:
        if re.match(pattern, plain):
            return f"cannot be trained: {phi3.OTHERS[model_type]}.", phi3.TAKE_INSTEAD
    return None


def _other_format(plain: str) -> Refusal | None:
    """A copy for another program, or one whose weights are quantized."""
    words = plain.split("-")
    reason = next((_FORMATS[word] for word in words if word in _FORMATS), None)
    if reason is None and _ENDING.search(plain) is None:
        return None
    beginnings = ("-".join(words[:length]) for length in range(len(words), 0, -1))
    original = next((_PLAIN[name] for name in beginnings if name in _PLAIN), "the 16-bit checkpoint it is of")
    return f"{reason or _QUANTIZED}.", f"Take {original}; NF4 is made while loading."


def _misspelt(owner: str, plain: str) -> Refusal | None:
    """A name of Microsoft's own that is none, or a known one below an owner who is nearly Microsoft."""
    if owner != "microsoft":
        near = difflib.SequenceMatcher(None, owner, "microsoft").ratio() >= 0.8
        return (
            ("is not a name that is known here.", f"Did you mean {_PLAIN[plain]}?")
            if (near and plain in _PLAIN)
            else None
        )
    if not plain.startswith("phi-"):
        return None
    hint = _hint(plain) or f"Known: {', '.join(KNOWN)}. "
    remedy = f"{hint}One that is newer than these: download it and give its folder, ./folder."
    return "is not a Phi checkpoint that is known here.", remedy


def _other_family(plain: str) -> Refusal | None:
    if "phi-3" in plain or "phi-4" in plain:
        return None
    found = next((word for word in plain.split("-") if _OTHER_FAMILY.fullmatch(word)), None)
    sized = _WITH_SIZE.search(plain)
    found = sized[1] if found is None and sized is not None else found
    if found is None:
        return None
    instead = "builtin:smollm2-135m, the same model in Phi-3's form" if "smollm2-135m" in plain else _USUAL
    remedy = f"Take {instead}; a Phi3ForCausalLM all the same: download it and give its folder, ./folder."
    return f"is of another family, by its name ({found}): only the Phi-3 architecture is supported.", remedy


def _hint(plain: str) -> str:
    """The known name that has all words of this one and the fewest others, or is spelt nearly so."""
    words = plain.split("-")
    alike = [
        name for name in _PLAIN if words[:2] == name.split("-")[:2]
    ]  # of another number it is another model
    whole = [name for name in alike if set(words) <= set(name.split("-"))]
    close = difflib.get_close_matches(plain, alike, n=1, cutoff=0.7)
    found = min(whole, key=lambda name: len(name.split("-"))) if whole else next(iter(close), None)
    return f"Did you mean {_PLAIN[found]}? " if found else ""
