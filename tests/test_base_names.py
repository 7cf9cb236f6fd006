"""base_names.py: which names of a base are refused before a download, and what is said instead."""

from __future__ import annotations

import pytest

from qlora_phi3 import phi3
from qlora_phi3.base_names import KNOWN, canonical, is_revision, refusal

MINI = "microsoft/Phi-3-mini-4k-instruct"

REFUSED: dict[str, tuple[str, str]] = {
    # name: words of the reason, words of the remedy
    "microsoft/Phi-3-small-8k-instruct": ("Phi-3-small is another architecture", MINI),
    "microsoft/phi-3-small-128k-instruct": ("Phi-3-small is another architecture", MINI),
    "microsoft/Phi-3-vision-128k-instruct": ("Phi-3-vision", MINI),
    "microsoft/Phi-3.5-vision-instruct": ("Phi-3-vision", MINI),
    "microsoft/Phi-3.5-MoE-instruct": ("Phi-3.5-MoE", MINI),
    "microsoft/Phi-mini-MoE-instruct": ("Phi-3.5-MoE", MINI),
    "microsoft/Phi-4-multimodal-instruct": ("Phi-4-multimodal", MINI),
    "microsoft/Phi-4-mini-flash-reasoning": ("Phi-4-mini-flash", MINI),
    "microsoft/phi-2": ("Phi-1 and Phi-2", MINI),
    "microsoft/phi-1_5": ("Phi-1 and Phi-2", MINI),
    "someone/phi-2-chat": ("Phi-1 and Phi-2", MINI),
    "meta-llama/Llama-3.2-1B": ("of another family, by its name (llama)", "./folder"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("(tinyllama)", MINI),
    "mistralai/Mistral-7B-v0.1": ("(mistral)", MINI),
    "Qwen/Qwen2.5-0.5B": ("(qwen2)", MINI),
    "google/gemma-2-2b": ("(gemma)", MINI),
    "openai-community/gpt2": ("(gpt2)", MINI),
    "EleutherAI/gpt-neo-125m": ("(gpt)", MINI),
    "FacebookAI/roberta-base": ("(roberta)", MINI),
    "facebook/opt-125m": ("(opt)", MINI),
    "01-ai/Yi-1.5-6B-Chat": ("(yi)", MINI),
    "mistralai/Ministral-8B-Instruct-2410": ("(ministral)", MINI),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("(smollm2)", "builtin:smollm2-135m"),
    f"{MINI}-gguf": ("for llama.cpp", f"Take {MINI};"),
    f"{MINI}-onnx-web": ("for ONNX Runtime", f"Take {MINI};"),
    "someone/Phi-3.5-mini-instruct-GGUF": ("for llama.cpp", "Take microsoft/Phi-3.5-mini-instruct;"),
    "someone/Phi-3-mini-4k-instruct-bnb-4bit": ("quantized already", f"Take {MINI};"),
    "someone/phi-4-4bit": ("quantized already", "Take microsoft/phi-4;"),
    "someone/Phi-3-mini-4k-instruct-AWQ": ("quantized already", MINI),
    "someone/tuned-GPTQ-Int4": ("quantized already", "the 16-bit checkpoint it is of"),
    "microsoft/Phi-3-mini-instruct": ("not a Phi checkpoint that is known here", f"Did you mean {MINI}?"),
    "microsoft/Phi-3-mini-4k-instuct": ("not a Phi checkpoint", f"Did you mean {MINI}?"),
    "microsoft/Phi-3-medium-instruct": ("", "Did you mean microsoft/Phi-3-medium-4k-instruct?"),
    "microsoft/Phi-5-mini": ("not a Phi checkpoint that is known here", f"Known: {MINI}, "),
    "microsft/Phi-3-mini-4k-instruct": ("not a name that is known here", f"Did you mean {MINI}?"),
    "Phi-3-mini-4k-instruct": ("neither a hub id nor a folder", f"Did you mean {MINI}?"),
    "phi3:mini": ("neither a hub id nor a folder", f"Did you mean {MINI}?"),
    "https://huggingface.co/microsoft/phi-4/tree/main": ("a web address", "Write microsoft/phi-4."),
    "http://x": ("a web address", "Write org/name"),
    "a/b/c": ("neither a hub id nor a folder", "Write org/name"),
    "org/na--me": ("neither a hub id nor a folder", "./folder"),
    "two words": ("neither a hub id nor a folder", "./folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_cannot_be_a_base(name: str) -> None:
    found = refusal(name)
    assert found is not None
    for text, words in zip(found, REFUSED[name], strict=True):
        assert words in text and text.endswith((".", "?"))


@pytest.mark.parametrize(
    "name",
    [
        *KNOWN,
        *phi3.VARIANTS,
        "MICROSOFT/phi-3-MINI-4k-instruct",
        "microsoft/MediPhi-Instruct",
        "me/my-phi3",
        "me/phi-3-small-talk",
        "me/Phi-3-mini-4k-instruct",
        "me/phi3-llama-judge",
        "me/phi-4-4bit-study",
        "me/support",
        "me/bloomberg-headlines",
        "me/orca-support",
        "me/bertha",
        "me/opt-out-letters",
        "/models/Llama-3.2-1B-GGUF",
    ],
)
def test_what_may_be_one(name: str) -> None:
    assert refusal(name) is None


def test_capitals_do_not_matter_in_a_known_name() -> None:
    assert canonical("Microsoft/phi-3-mini-4K-instruct") == MINI
    assert canonical("me/My-Phi3") == "me/My-Phi3"


@pytest.mark.parametrize(
    ("revision", "right"),
    [("main", True), ("refs/pr/3", True), ("0f3a", True), ("v1.0+x", True), ("feature/a_b", True)]
    + [(one, False) for one in ("../..", "a/../b", "/x", "x/", "a//b", "-x", ".x", "a b", "", "x.lock")],
)
def test_revisions(revision: str, right: bool) -> None:
    assert is_revision(revision) is right
