"""Which linears a base has under which names, and what each layout calls the A and the B of one.

Owns names and sizes. Refuses keys that are no A or B of a linear of the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, Literal

from torch import Tensor

from ..errors import ModelError, shown
from ..phi3 import BLOCKS, EMBEDDINGS, LINEARS, Geometry
from .config import PEFT_LAYOUTS, Layout

Tensors = dict[str, Tensor]
Style = Literal["peft", "loralib", "mlx"]
STYLES: Final[tuple[Style, ...]] = ("peft", "loralib", "mlx")

PEFT_PREFIX: Final = "base_model.model."
WHOLE: Final = ("lm_head.weight", "model.embed_tokens.weight")


def style_of(layout: Layout) -> Style:
    """How keys are spelled in a layout."""
    if layout in PEFT_LAYOUTS:
        return "peft"
    return "mlx" if layout == "mlx" else "loralib"


def is_embedding(module: str) -> bool:
    return module.endswith("embed_tokens")


def is_fused(module: str) -> bool:
    """Whether a linear stores several projections."""
    return module.endswith(("qkv_proj", "gate_up_proj"))


def block_sizes(module: str, geometry: Geometry) -> dict[str, int]:
    """Output rows by path of each projection inside a fused linear: `...self_attn.q_proj` -> rows."""
    parent, linear = module.rsplit(".", 1)
    return {f"{parent}.{p}_proj": stop - start for p, (start, stop) in geometry.slices(linear).items()}


def linear_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear, the embedding and the head of a base, by path.

    Shape: of the delta that an A/B pair makes; an embedding's is (hidden_size, vocab_size).
    """
    shapes = {
        f"model.layers.{layer}.{BLOCKS[linear]}.{linear}": geometry.linear_shape(linear)
        for layer in range(geometry.num_layers)
        for linear in LINEARS
    }
    embedding, head = EMBEDDINGS
    shapes[f"model.{embedding}"] = (geometry.hidden_size, geometry.vocab_size)
    shapes[head] = (geometry.vocab_size, geometry.hidden_size)
    return shapes


def unfused_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """The same, with Llama's linears in the place of the fused ones."""
    shapes: dict[str, tuple[int, int]] = {}
    for module, (num_out, num_in) in linear_shapes(geometry).items():
        blocks = block_sizes(module, geometry) if is_fused(module) else {module: num_out}
        shapes |= {name: (rows, num_in) for name, rows in blocks.items()}
    return shapes


def key_of(module: str, side: str, style: Style) -> str:
    """Key of a linear's A or B ("A", "B")."""
    if style == "mlx":
        return f"{module}.lora_{side.lower()}"
    if style == "loralib":
        return f"{module}.lora_{side}"
    if is_embedding(module):  # PEFT keeps these as parameters, not as modules with a weight
        return f"{PEFT_PREFIX}{module}.lora_embedding_{side}"
    return f"{PEFT_PREFIX}{module}.lora_{side}.weight"


def known_keys(modules: Iterable[str], style: Style) -> dict[str, tuple[str, str]]:
    """Every key that may occur -> (module, side)."""
    return {key_of(module, side, style): (module, side) for module in modules for side in "AB"}


def find_style(keys: Iterable[str], geometry: Geometry, place: str) -> Style:
    """The spelling that all keys have in common.

    Raises:
        ModelError: no keys, or one that is in no spelling an A or a B of a linear of this base.
    """
    found = list(keys)
    if not found:
        raise ModelError(place, "holds no tensors.", "Give a LoRA adapter for Phi-3.")
    modules = [*linear_shapes(geometry), *unfused_shapes(geometry)]
    known = {style: known_keys(modules, style) for style in STYLES}
    unknown = {style: [key for key in found if key not in known[style]] for style in STYLES}
    best = min(STYLES, key=lambda style: len(unknown[style]))
    if unknown[best]:
        raise unknown_keys(unknown[best], geometry, place)
    return best


_WRAPPERS: Final = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|module)\.")
"""What torch.compile, FSDP and DistributedDataParallel put into names."""
_SAVED: Final = re.compile(
    rf"(?:{re.escape(PEFT_PREFIX)})?(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB])"
    r"(?:\.(?!weight$)(?P<adapter>[\w-]+))?(?P<weight>\.weight)?"
)


def usual_keys(keys: Iterable[str], place: str) -> dict[str, str]:
    """Every key of a file -> as PEFT itself saves it, where it is from a live model's state dict.

    Those have the adapter's name inside (`lora_A.default.weight`), what wraps a model, or no prefix.

    Raises:
        ModelError: they are of several adapters, or two keys mean the same.
    """
    found, adapters = dict[str, str](), dict[str, None]()
    for key in keys:
        saved = _SAVED.fullmatch(_WRAPPERS.sub("", key))
        name = saved["adapter"] if saved is not None else None
        if saved is None or not (saved["weight"] or name):
            found[key] = key
            continue
        adapters |= {} if name is None else {name: None}
        found[key] = f"{PEFT_PREFIX}{saved['module']}.{saved['kind']}{saved['weight'] or ''}"
    if len(adapters) > 1:
        reason = f"holds several adapters: {', '.join(map(shown, adapters))}."
        raise ModelError(place, reason, "Save one of them, with save_pretrained and selected_adapters.")
    twice = [key for key, usual in found.items() if usual != key and usual in found]
    if twice or len({*found.values()}) < len(found):
        place = f"{place}: {(twice or [*found])[0]}"
        raise ModelError(place, "is there under two names.", "Keep one of them.")
    return found


_OTHERS: Final = {
    r"ia3_l": "an IA3 adapter's",
    r"prompt_embeddings": "prompt tuning's, or prefix tuning's",
    r"vera_(?:A|B|lambda_\w)": "a VeRA adapter's",
    r"hada_w": "a LoHa adapter's",
    r"lokr_w": "a LoKr adapter's",
    r"oft_[rR]": "an OFT adapter's",
    r"lora_E|ranknum": "an AdaLoRA adapter's",
    r"attn\.\w+_proj\.lora_[ab]": "in torchtune's own names, which it can save as PEFT's",
    r"lora_up|lora_down": "in the names of diffusion models",
}
"""What a key says -> whose it is."""


def unknown_keys(keys: list[str], geometry: Geometry, place: str) -> ModelError:
    """The refusal of keys, by what the first of them seems to be."""
    key, more = keys[0], f" ({len(keys) - 1} more such keys)" if len(keys) > 1 else ""
    layer = re.search(r"\.layers\.(\d{1,6})\.", key)
    if layer and int(layer[1]) >= geometry.num_layers:
        reason = f"layer {layer[1]} of a base with {geometry.num_layers} layers{more}."
        return ModelError(f"{place}: {key}", reason, "This adapter was made for another base.")
    if ".base_layer." in key or "modules_to_save" in key:
        reason = f"is a whole weight of the base, not a LoRA{more}."
        remedy = "Save it with `save_embedding_layers=False` and without modules_to_save."
        return ModelError(f"{place}: {key}", reason, remedy)
    if key.endswith("bias"):
        return ModelError(f"{place}: {key}", f"Phi-3 has no biases{more}.", 'Save it with bias="none".')
    if "lora_magnitude_vector" in key:
        return ModelError(f"{place}: {key}", f"is DoRA's{more}, plain LoRA only.", "Merge it, or use LoRA.")
    other = next((whose for sign, whose in _OTHERS.items() if re.search(rf"(?:^|[._])(?:{sign})", key)), None)
    if other is not None:
        return ModelError(f"{place}: {key}", f"is {other}{more}.", "Give a LoRA adapter as PEFT saves it.")
    if key.removeprefix(PEFT_PREFIX) in WHOLE or re.search(r"(?:_proj|norm)\.weight$", key):
        reason = f"is a whole weight of a model, not a LoRA's{more}."
        return ModelError(f"{place}: {key}", reason, "Give the folder of a LoRA adapter.")
    reason = f"is no A or B of a linear of this base{more}."
    return ModelError(f"{place}: {key}", reason, "Give a LoRA adapter for this Phi-3 base.")
