"""Real programs that read what was exported, behind three questions: which ids, how likely, which answer.

Owns how each is asked. Refuses nothing: an export that a program cannot load raises that program's error.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from .. import json_files, ladder, tokenizer_files
from .. import model as models
from ..data.tokens import Turns
from ..errors import ModelError
from ..generate import stop_ids
from ..layouts import read_adapter
from ..phi3 import Geometry
from ..recipe import Model
from ..weights import Checkpoint, first_line
from .llama_cpp import LlamaCpp, llama_cpp

__all__ = [
    "Consumer",
    "Live",
    "LlamaCpp",
    "Messages",
    "MlxLm",
    "Torch",
    "gguf_reader_limit",
    "llama_cpp",
    "loralib_file",
    "peft_folder",
    "transformers_folder",
    "transformers_gguf",
    "why_missing",
]

Messages = list[dict[str, Any]]


class Consumer(Protocol):
    """A program that holds a model and its tokenizer."""

    name: str

    def tokens(self, messages: Messages) -> list[int]:
        """The prompt of a conversation through the program's own template and tokenizer."""

    def log_probs(self, ids: list[int], last: int | None = None) -> Tensor:
        """Log-probabilities of what follows each of the `last` positions, or each of all.

        Shape: (last, vocab), float32 on the CPU.
        """

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """The greedy answer, with the token that ended it where one did."""

    def text(self, ids: list[int]) -> str:
        """Tokens as text, special ones too."""


class Torch:
    """A transformers model, wrapped by PEFT or not, with its tokenizer.

    `stops` are given to `generate`; without them it ends where its own generation_config says.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, stops: list[int] | None = None) -> None:
        self.name, self.model, self.tokenizer, self.stops = name, model.eval(), tokenizer, stops

    def tokens(self, messages: Messages) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return list(ids)

    @torch.inference_mode()
    def log_probs(self, ids: list[int], last: int | None = None) -> Tensor:
        with self._ready():
            logits = self.model(
                input_ids=torch.tensor([ids], device=self.model.device), logits_to_keep=last or len(ids)
            ).logits[0]
        log_probs: Tensor = logits.float().log_softmax(-1).cpu()
        return log_probs

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        try:
            return self._generate(ids, max_new_tokens)
        except Exception as error:  # whatever the settings that came with the base ask for
            if isinstance(error, MemoryError) or ladder.ran_out(error):
                raise
            reason = f"transformers cannot answer with these settings: {first_line(error).rstrip('.')}."
            raise ModelError(tokenizer_files.GENERATION, reason, "Mend the base's, or remove it.") from error

    @torch.inference_mode()
    def _generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        prompt = torch.tensor([ids], device=self.model.device)
        with self._ready():
            out = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                **({} if self.stops is None else {"eos_token_id": self.stops}),
            )
        answer: list[int] = out[0, len(ids) :].tolist()
        return answer

    def text(self, ids: list[int]) -> str:
        return _text(self.tokenizer, ids)

    def _ready(self) -> Any:
        return nullcontext()


class Live(Torch):
    """The model as it was trained: the base as the recipe quantizes it, with the PEFT adapter on it."""

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        settings: Model,
        adapter: Path,
        device: torch.device,
        precise: bool = True,
    ) -> Live:
        """Load base and adapter; `precise` computes in float32 with the weights as they were trained.

        bfloat16 alone moves the built-in model by 3e-4 to 2e-3 nats, as much as a fault may: an export that
        rounds less would be measured by the live model's own error.

        Raises:
            ModelError: the base cannot be loaded.
        """
        from peft import PeftModel

        base = models.load(checkpoint, settings, device)
        tuned = PeftModel.from_pretrained(base.model, adapter, torch_device=str(device))
        if precise:
            tuned.float()  # packed weights are integers and stay
            for linear in models.packed_linears(tuned):
                linear.compute_dtype = torch.float32
        return cls.of("transformers + PEFT", tuned, base.tokenizer)

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any) -> Live:
        """It stops where the toolkit does."""
        return cls(name, model, tokenizer, stop_ids(tokenizer, model, Turns.of(tokenizer).end))

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        return self._generate(ids, max_new_tokens)  # with settings of our own

    def control(self) -> Torch:
        """The same base with the adapter switched off, which an export must not be equal to."""
        return _Untuned("base without the adapter", self.model, self.tokenizer, self.stops)


class _Untuned(Torch):
    def _ready(self) -> Any:
        return self.model.disable_adapter()


def transformers_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Torch:
    """transformers on a folder of merged safetensors, which stops where the folder says."""
    from transformers import AutoTokenizer, Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return Torch("transformers", model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def peft_folder(
    base: Path, adapter: Path, stops: list[int] | None = None, dtype: torch.dtype = torch.float32
) -> Torch:
    """PEFT on an adapter folder in whatever layout it takes, over an unquantized base.

    `stops`: what the code on the adapter's card gives to `generate`; a base's own settings may lack them.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer, Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    tuned = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(_words(base, adapter), local_files_only=True)
    return Torch("transformers + PEFT", tuned, tokenizer, stops)


def _words(base: Path, adapter: Path) -> Path:
    """The folder whose tokenizer and template are used: the adapter's own, where it came with one."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def loralib_file(
    base: Path,
    adapter: Path,
    geometry: Geometry,
    stops: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Torch:
    """microsoft/LoRA's own layers over an unquantized base, filled from a file in the loralib layout.

    Each adapted linear becomes a `loralib.Linear`, the embedding a `loralib.Embedding`, as its users build
    their models.

    Raises:
        ModelError: the adapter is no plain loralib file of this base.
    """
    import loralib

    tensors, config = read_adapter(adapter, geometry)
    program = transformers_folder(base, dtype)
    for path in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        old, rank, alpha = program.model.get_submodule(path), config.rank_of(path), config.alpha_of(path)
        if isinstance(old, torch.nn.Embedding):
            new = loralib.Embedding(*old.weight.shape, r=rank, lora_alpha=alpha, merge_weights=False)
        else:
            sizes = (old.in_features, old.out_features)
            new = loralib.Linear(*sizes, r=rank, lora_alpha=alpha, merge_weights=False, bias=False)
        new.weight = old.weight
        program.model.set_submodule(path, new.to(dtype))
    surplus = program.model.load_state_dict(tensors, strict=False).unexpected_keys
    assert not surplus, surplus
    program.model.eval()
    program.name, program.stops = "loralib", stops
    return program


def transformers_gguf(path: Path, tokenizer: Any) -> Torch:
    """transformers' own GGUF reader for the weights; its tokenizer reader knows no Phi-3 and is not asked."""
    from transformers import GgufConfig, Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    return Torch("transformers' GGUF reader", model, tokenizer)


def gguf_reader_limit(config: Mapping[str, Any]) -> str | None:
    """What transformers' GGUF reader loses of a model; None where it reads all of it.

    Source: transformers 5.23 integrations/ggml.py, the keys of "phi3".
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    lost = {"LongRoPE's factors": kind != "default", "the partial rotary embedding": partial != 1.0}
    names = [name for name, there in lost.items() if there]
    return f"transformers' GGUF reader loses {' and '.join(names)} of a Phi-3." if names else None


def own_mlx_folder() -> None:
    """Have mlx compile, and load what it compiled, in a folder that is the user's own.

    mlx 0.32 takes `mlx/VERSION/cpu` in TMPDIR, the first user's who came: closed to others, it fails,
    and open it holds their code. TMPDIR stays so for the process.
    """
    shared = Path(tempfile.gettempdir()) / "mlx"
    try:
        found = [shared, *shared.glob("*"), *shared.glob("*/*")] if shared.exists() else []
        usable = all(path.is_dir() and _is_own(path) for path in found)
    except OSError:
        usable = False
    if not usable:
        own = tempfile.mkdtemp(prefix="mlx-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        os.environ["TMPDIR"] = own


def _is_own(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK) and path.stat().st_uid == os.getuid()


class MlxLm:
    """mlx-lm on a folder of safetensors and, where given, an adapter in the mlx layout.

    It stops where its own loader says, and at `stops`, which the card gives it as `--extra-eos-token`.
    """

    name = "mlx-lm"

    def __init__(self, base: Path, adapter: Path | None = None, stops: list[int] | None = None) -> None:
        own_mlx_folder()
        from mlx.core import float32
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        # transformers 5 writes RoPE's base into `rope_parameters` alone, which mlx-lm 0.32 does not know
        config = json_files.read_object(base / "config.json", ModelError, "Download it again.")
        theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
        self.model, read = load_model(base, model_config={} if theta is None else {"rope_theta": theta})
        if adapter is not None:
            self.model = load_adapters(self.model, str(adapter))
        self.model.set_dtype(float32)  # in half precision mlx has no fast product on a CPU
        self.tokenizer = models.load_tokenizer(base)
        own = read.get("eos_token_id") or self.tokenizer.eos_token_id
        self.stops = {*(own if isinstance(own, list) else [own]), *(stops or ())}

    def tokens(self, messages: Messages) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return list(ids)

    def log_probs(self, ids: list[int], last: int | None = None) -> Tensor:
        import mlx.core

        logits = self.model(mlx.core.array([ids]))[0, -(last or len(ids)) :]
        rows = torch.from_numpy(numpy.array(logits.astype(mlx.core.float32)))
        return rows.log_softmax(-1)

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        import mlx.core
        from mlx_lm.models.cache import make_prompt_cache

        answer, given = list[int](), ids
        cache = make_prompt_cache(self.model)
        while len(answer) < max_new_tokens and not self.stops.intersection(answer[-1:]):
            logits = self.model(mlx.core.array([given]), cache=cache)[0, -1]
            given = [int(mlx.core.argmax(logits))]
            answer += given
        return answer

    def text(self, ids: list[int]) -> str:
        return _text(self.tokenizer, ids)


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Tokens as text; as the tokenizer's own pieces where they are no whole characters."""
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    if text and "\ufffd" not in text:
        return text
    pieces = zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return "".join(piece if piece is not None else f"[{i}]" for i, piece in pieces)  # a spare row has none


def why_missing(program: str) -> str | None:
    """Why a program cannot be asked here; None where it can.

    `program`: a consumer's name.
    """
    import importlib.util

    needed = {"xllamacpp": "xllamacpp", "mlx-lm": "mlx_lm", "loralib": "loralib"}.get(program)
    if needed is None or importlib.util.find_spec(needed) is not None:
        return None
    hint = {"mlx_lm": "pip install mlx-lm (on Linux with mlx and mlx-cpu)"}.get(
        needed, f"pip install {needed}"
    )
    return f"{program} is not installed here; {hint} to have this export checked in it."
