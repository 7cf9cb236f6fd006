"""Facts of the Phi-3 family: variants, dimensions, fused linears and their slices, special tokens.

Owns what is true of the architecture before any weight is loaded, so that recipes can be checked and
memory predicted without torch. Refuses other architectures, Phi-3-small among them, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from . import config_values
from .errors import ModelError, shown

LINEARS: Final = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The four linears of a decoder layer, in the order of the forward pass."""

PROJECTIONS: Final = {
    "q": "qkv_proj",
    "k": "qkv_proj",
    "v": "qkv_proj",
    "o": "o_proj",
    "gate": "gate_up_proj",
    "up": "gate_up_proj",
    "down": "down_proj",
}
"""Logical projection -> the fused linear that stores it."""

BLOCKS: Final = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
"""Linear -> the part of a decoder layer that holds it."""

FUSED: Final = ("qkv_proj", "gate_up_proj")
"""Linears that hold several projections."""


_INSIDE: Final = {
    linear: tuple(name for name, owner in PROJECTIONS.items() if owner == linear) for linear in LINEARS
}


def inside(linear: str) -> tuple[str, ...]:
    """The projections that a linear holds, in order; the embedding and the head hold none."""
    return _INSIDE.get(linear, ())


EMBEDDINGS: Final = ("embed_tokens", "lm_head")
"""The embedding and the head, one of each; a base may store them as one matrix."""

EMBEDDING_WEIGHT: Final = "model.embed_tokens.weight"
HEAD_WEIGHT: Final = "lm_head.weight"
NORMS: Final = ("input_layernorm", "post_attention_layernorm")
"""The two norms of a decoder layer, beside `model.norm` behind the last."""

ADAPTABLE: Final = (EMBEDDINGS[0], *LINEARS, EMBEDDINGS[1])
"""Modules that can get adapters, in the order of the forward pass."""

LLAMA_NAMES: Final = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "gate_proj": "gate",
    "up_proj": "up",
}
"""Names copied from Llama recipes that exist in no Phi-3 -> what is meant here."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one `Phi3ForCausalLM`.

    Units: counts of elements; positions in tokens. `sliding_window` and `max_positions` as in the
    checkpoint's config.json.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied_embeddings: bool = False
    rotary_fraction: float = 1.0
    sliding_window: int | None = None
    max_positions: int = 4096
    original_max_positions: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def slices(self, linear: str) -> dict[str, tuple[int, int]]:
        """Output rows [start, stop) of each projection inside a fused linear.

        Raises:
            KeyError: `linear` is not one of LINEARS.
        """
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        ffn = self.intermediate_size
        return {
            "qkv_proj": {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)},
            "o_proj": {"o": (0, self.hidden_size)},
            "gate_up_proj": {"gate": (0, ffn), "up": (ffn, 2 * ffn)},
            "down_proj": {"down": (0, self.hidden_size)},
        }[linear]

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out_features, in_features) of a fused linear."""
        return self._linear_shapes[linear]

    @cached_property
    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        num_in = dict.fromkeys(LINEARS, self.hidden_size)
        num_in |= {"o_proj": self.num_heads * self.head_dim, "down_proj": self.intermediate_size}
        return {name: (max(stop for _, stop in self.slices(name).values()), num_in[name]) for name in LINEARS}

    @cached_property
    def num_linear_parameters(self) -> int:
        """Parameters of all decoder linears: what NF4 quantizes."""
        shapes = [self.linear_shape(name) for name in LINEARS]
        return self.num_layers * sum(rows * columns for rows, columns in shapes)

    @property
    def num_embedding_parameters(self) -> int:
        """Embedding, plus the head where it is a matrix of its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def num_norm_parameters(self) -> int:
        return self.hidden_size * (2 * self.num_layers + 1)

    @property
    def num_parameters(self) -> int:
        return self.num_linear_parameters + self.num_embedding_parameters + self.num_norm_parameters

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a checkpoint by name; a tied one has no head of its own."""
        hidden = (self.hidden_size,)
        found: dict[str, tuple[int, ...]] = {EMBEDDING_WEIGHT: (self.vocab_size, self.hidden_size)}
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            found |= {f"{layer}.{norm}.weight": hidden for norm in NORMS}
            found |= {f"{layer}.{BLOCKS[name]}.{name}.weight": self.linear_shape(name) for name in LINEARS}
        found["model.norm.weight"] = hidden
        return found if self.tied_embeddings else found | {HEAD_WEIGHT: found[EMBEDDING_WEIGHT]}

    def num_modules(self, name: str) -> int:
        """How many modules of a name there are: one in every layer, but a single embedding and head."""
        return 1 if name in EMBEDDINGS else self.num_layers

    def lora_parameters(self, parts: tuple[str, ...], rank: int) -> int:
        """Parameters of one A/B pair of `rank` on each named linear, projection, embedding or head."""
        return rank * sum(self.num_modules(name) * sum(self.pair_shape(name)) for name in parts)

    def pair_shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a linear, one projection in it, the embedding or the head.

        The embedding's is that of its update as PEFT writes it, B @ A: (hidden_size, vocab_size).
        """
        return self._pair_shapes[name]

    @cached_property
    def _pair_shapes(self) -> dict[str, tuple[int, int]]:
        found = {"embed_tokens": (self.hidden_size, self.vocab_size)}
        found["lm_head"] = found["embed_tokens"][::-1]
        for linear, (rows, columns) in self._linear_shapes.items():
            found |= {name: (stop - start, columns) for name, (start, stop) in self.slices(linear).items()}
            found[linear] = rows, columns
        return found


_MINI_4K = Geometry(
    num_layers=32,
    hidden_size=3072,
    intermediate_size=8192,
    num_heads=32,
    num_kv_heads=32,
    vocab_size=32064,
    sliding_window=2047,
)
_MEDIUM_4K = Geometry(
    num_layers=40,
    hidden_size=5120,
    intermediate_size=17920,
    num_heads=40,
    num_kv_heads=10,
    vocab_size=32064,
    sliding_window=2047,
)
_MINI_128K = replace(_MINI_4K, sliding_window=262144, max_positions=131072)
_MEDIUM_128K = replace(_MEDIUM_4K, sliding_window=131072, max_positions=131072)
_PHI_4 = replace(
    _MEDIUM_4K, vocab_size=100352, sliding_window=None, max_positions=16384, original_max_positions=16384
)
_PHI_4_MINI = replace(
    _MINI_128K,
    num_heads=24,
    num_kv_heads=8,
    vocab_size=200064,
    tied_embeddings=True,
    rotary_fraction=0.75,
)
_SMOLLM2 = Geometry(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    vocab_size=49152,
    tied_embeddings=True,
    max_positions=8192,
    original_max_positions=8192,
)

VARIANTS: Final[dict[str, Geometry]] = {
    "microsoft/Phi-3-mini-4k-instruct": _MINI_4K,
    "microsoft/Phi-3-mini-128k-instruct": _MINI_128K,
    "microsoft/Phi-3.5-mini-instruct": _MINI_128K,
    "microsoft/Phi-3-medium-4k-instruct": _MEDIUM_4K,
    "microsoft/Phi-3-medium-128k-instruct": _MEDIUM_128K,
    "microsoft/phi-4": _PHI_4,
    "microsoft/Phi-4-mini-instruct": _PHI_4_MINI,
    "builtin:smollm2-135m": _SMOLLM2,
}
"""Geometry of the known checkpoints, so that a plan needs no download."""

OTHERS: Final = {
    "phi3small": "Phi-3-small is another architecture (block-sparse attention, its own tokenizer)",
    "phi3_v": "Phi-3-vision is another architecture",
    "phimoe": "Phi-3.5-MoE is another architecture",
    "phi4mm": "Phi-4-multimodal is another architecture",
    "phi4flash": "Phi-4-mini-flash is another architecture",
    "phi4-siglip": "Phi-4-reasoning-vision is another architecture",
    "phi": "Phi-1 and Phi-2 are another architecture",
}
"""model_type of a checkpoint with Phi in its name that is no `Phi3ForCausalLM` -> what to say of it."""

TAKE_INSTEAD: Final = "Choose a Phi3ForCausalLM checkpoint, for example microsoft/Phi-3-mini-4k-instruct."


def check_architecture(config: Mapping[str, Any], place: str) -> None:
    """Refuse a checkpoint that is not `Phi3ForCausalLM`, by what its config.json says.

    Raises:
        ModelError: `model_type` is not "phi3", or `architectures` names another class.
    """
    model_type = config.get("model_type")
    if model_type != "phi3":
        reason = OTHERS.get(str(model_type), "only the Phi-3 architecture is supported")
        raise ModelError(place, f"model_type is {shown(model_type)}: {reason}.", TAKE_INSTEAD)
    named = config.get("architectures")
    if named and "Phi3ForCausalLM" not in (named if isinstance(named, list) else [named]):
        raise ModelError(place, f"architectures is {shown(named)}, not Phi3ForCausalLM.", TAKE_INSTEAD)


def _check_heads(config: Mapping[str, Any], place: str) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if hidden % heads or heads % kv_heads or (head_dim is not None and head_dim != hidden // heads):
        reason = (
            f"{heads} heads, {kv_heads} KV heads, head_dim {head_dim} and hidden_size {hidden} do not fit."
        )
        raise ModelError(place, reason, "Choose a Phi-3 checkpoint with the usual heads.")


def geometry_from_config(config: Mapping[str, Any], place: str = "config.json") -> Geometry:
    """Read the sizes out of a checkpoint's config.json, of either transformers 4 or 5 spelling.

    Raises:
        ModelError: another architecture, or values that no Phi-3 has: all of them at once.
    """
    check_architecture(config, place)
    faults = config_values.faults(config)
    if faults:
        raise ModelError(place, f"{'; '.join(faults)}.", "Download it again, or mend it.")
    _check_heads(config, place)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    positions = config.get("max_position_embeddings", 4096)
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return Geometry(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rotary_fraction=config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0,
        sliding_window=config.get("sliding_window"),
        max_positions=positions,
        original_max_positions=original or positions,
    )
