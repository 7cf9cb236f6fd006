"""llama.cpp as a consumer, through xllamacpp's server.

Owns the requests. Refuses nothing: a file that llama.cpp cannot load is a failure of ours.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import RunError

_IMPOSSIBLE: Final = -1e4
"""Log-probability of tokens that are not listed: its exp is 0, and 0 times it is no NaN."""


SECONDS: Final = 1800.0
"""For one request: a long answer of a large model on a slow CPU, but not for ever."""


class LlamaCpp:
    """llama.cpp through xllamacpp, on a GGUF file and, where given, a LoRA GGUF beside it.

    It is a server on a free port of this machine; `close` ends it. Log-probabilities come for the last
    position only, so that each is a request (0.6 s with 49152 tokens on 2 CPU cores, most of it JSON); the
    earlier part of the prompt is cached.
    """

    name = "xllamacpp"

    def __init__(
        self,
        path: Path,
        lora: Path | None = None,
        *,
        context: int = 4096,
        threads: int | None = None,
        template: str | None = None,
        request: dict[str, Any] | None = None,
    ) -> None:
        """Load; `template` replaces the file's chat template, `request` adds to every completion."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context, 1
        params.n_gpu_layers = 0
        params.verbosity = -1  # its messages would mix with ours on stderr
        params.warmup = params.fit_params = params.ui = False
        params.n_threads_http = 2
        params.cpuparams.n_threads = threads or torch.get_num_threads()
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        if template is not None:
            params.chat_template = template
        self.request = request or {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            reason = f"llama.cpp cannot load it{f' with {lora.name}' if lora else ''}."
            raise RunError(str(path), reason, "Export it again; report it if that does not help.") from error

    def close(self) -> None:
        """End the server and free the model."""
        self._server = None

    def tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        prompt = self._ask("/apply-template", messages=messages)["prompt"]
        found = self._ask("/tokenize", content=prompt, add_special=False, parse_special=True)
        return list(found["tokens"])

    def log_probs(self, ids: list[int], last: int | None = None) -> Tensor:
        size, steer = self._vocab_size(), {"logit_bias": [[self._plain_token(), 1e4]]}
        rows = torch.full((last or len(ids), size), _IMPOSSIBLE)
        for row, stop in enumerate(range(len(ids) - len(rows) + 1, len(ids) + 1)):
            found = self._complete(ids[:stop], 1, n_probs=size, **steer)
            listed = found["completion_probabilities"][0]["top_logprobs"]
            places = torch.tensor([entry["id"] for entry in listed])
            rows[row, places] = torch.tensor([max(entry["logprob"], _IMPOSSIBLE) for entry in listed])
        return rows

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        return list(self._complete(ids, max_new_tokens, return_tokens=True)["tokens"])

    def text(self, ids: list[int]) -> str:
        return str(self._ask("/detokenize", tokens=ids)["content"])

    def _plain_token(self) -> int:
        """A token to choose where only probabilities are wanted, which are those before the choice.

        llama.cpp lists none for a token that begins a character and leaves it unfinished.
        """
        return int(self._ask("/tokenize", content="a", add_special=False)["tokens"][-1])

    def _vocab_size(self) -> int:
        meta = self._ask("/v1/models")["data"][0]["meta"]
        return int(meta["n_vocab"])

    def _complete(self, ids: list[int], max_new_tokens: int, **more: Any) -> dict[str, Any]:
        body = {"prompt": ids, "n_predict": max_new_tokens, "temperature": 0.0, "cache_prompt": True}
        return self._ask("/completion", **body, **more, **self.request)

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            self._server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with self._opener.open(request, timeout=SECONDS) as answer:
            content: dict[str, Any] = json.load(answer)
        return content


@contextmanager
def llama_cpp(path: Path, lora: Path | None = None, **settings: Any) -> Iterator[LlamaCpp]:
    """A `LlamaCpp` that is closed at the end."""
    program = LlamaCpp(path, lora, **settings)
    try:
        yield program
    finally:
        program.close()
