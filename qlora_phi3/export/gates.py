"""The gate between writing an export and giving it its name: does a real consumer compute what was trained?

Owns the prompts, what happens on drift, and what is said where no consumer is here. How it is measured is
the parity module's matter.
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from .. import data, files, layouts, model
from ..errors import InputError, QloraError, RunError
from ..weights import first_line
from . import context, destination, table, vocabulary
from .options import Say, family
from .source import Source

NUM_PROMPTS: Final = 4
MAX_NEW_TOKENS: Final = 96
BEYOND: Final = 64
"""Tokens by which a question may be longer than the sliding window."""
MOST_ASKED: Final = 4096
"""A longer window is not asked: each token of it is computed three times, on a CPU for minutes."""
FALLBACK: Final = ("Hello! Who are you?", "Name three colours.", "What is 2 + 3?")
"""What is asked where there are no held-out rows."""


class Gates:
    """The gate for several exports of one source; a model as trained is loaded and asked once."""

    def __init__(self, source: Source, say: Say) -> None:
        self._source, self._say = source, say
        self._asked: dict[tuple[str, int | None, int | None], tuple[Any, Any]] = {}

    def check(
        self, target: str, partial: Path, folder: Path, details: Mapping[str, Any], *, wanted: bool = True
    ) -> dict[str, Any]:
        """What the gate found, which is in parity.json of the unfinished folder too.

        Raises:
            RunError: drift -> `<folder>.failed` keeps parity.json, and the export is removed.
        """
        if wanted:
            found, difference = self._measure(target, partial, details)
        else:
            found, difference = _skipped(target, "switched off with --no-gate"), ""
        files.write_json(partial / destination.PARITY, found)
        if found["verdict"] != "drift":
            return found
        failed = destination.keep_failed(partial, folder)
        why = "; ".join(found["reasons"])
        reason = f"{found['consumer']} does not compute what was trained: {why}. {difference}."
        known = context.limits_of(self._source, target, details.get("context"))
        reason = " ".join([reason, *(f"Known of it: {one}" for one in known)])
        raise RunError(f"{target}: {failed or folder}", reason, "The export was removed.")

    def _measure(self, target: str, partial: Path, details: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """The gate's result, and the first token that differs in words."""
        from . import consumers, parity

        with ExitStack() as stack:
            with _told(target, "the program that it is for cannot load it"):
                opened = _open(consumers, target, self._source, partial, details, stack)
            if isinstance(opened, str):
                return _skipped(target, opened), ""
            window = _window(self._source, target)
            live, reference = self._reference(partial, details, window)
            self._say(f"comparing it in {opened.name} with the model as trained")
            name = f"ollama:{details['kind']}" if target == "ollama" else target
            base, size = self._source.checkpoint.folder, details.get("context")
            texts = vocabulary.odd_texts(base) if family(target) in context.LLAMA_CPP else []
            left = context.not_asked(self._source, target, size, long=window is not None)
            with _told(target, f"{opened.name} cannot run it"):
                found = parity.gate(name, reference, opened, stops=live.stops, texts=texts, not_asked=left)
        return found.to_json(), str(found.first_difference or "")

    def _reference(
        self, partial: Path, details: Mapping[str, Any], window: int | None = None
    ) -> tuple[Any, Any]:
        """The adapter in PEFT on the weights that the export is for, and its answers: as in training where it
        was merged into those, else the base's own, which is what others load it onto.

        What PEFT is given are the source's checked tensors. Its files may be in names that PEFT passes over.
        `window`: one more question is longer than so many tokens.
        """
        from . import consumers, parity

        dequant = details.get("merge", {}).get("base") == "dequant"
        settings, size = self._source.model, details.get("context")
        if not dequant:
            settings = settings.model_copy(update={"quantization": "none", "compute_dtype": "float32"})
        key = settings.quantization, size, window
        if key not in self._asked:
            self._asked.clear()  # one model at a time
            with TemporaryDirectory(dir=partial, prefix=".trained-") as place:
                folder, device = Path(place) / "adapter", model.device_for_run()
                layouts.write_adapter(folder, *_as_peft(self._source))
                live = consumers.Live.load(self._source.checkpoint, settings, folder, device)
            new = MAX_NEW_TOKENS if size is None else min(MAX_NEW_TOKENS, size // 4)
            # an answer may become twice as long as the live model's before it counts as one without end
            room = None if size is None else size - 2 * new - 8
            asked = prompts(self._source, live, room)
            asked += [] if window is None else [longer_than(window, live)]
            reference = parity.Reference.of(live, live.control(), asked, max_new_tokens=new)
            self._asked[key] = live, reference
        return self._asked[key]


@contextmanager
def _told(target: str, what: str) -> Iterator[None]:
    """Have whatever another program raises told as an export that is not proven.

    Raises:
        RunError: in its place.
    """
    try:
        yield
    except (QloraError, MemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        remedy = "The export was removed; --no-gate leaves it there, unproven."
        raise RunError(target, f"{what}: {why}.", remedy) from error


def _as_peft(source: Source) -> tuple[layouts.Tensors, layouts.AdapterConfig]:
    """The source's tensors under Phi-3's own names, untouched where they are in them."""
    if source.config.layout in ("fused", "split"):
        return source.tensors, source.config
    geometry = source.checkpoint.geometry
    return layouts.convert(source.tensors, source.config, "fused", geometry, str(source.folder))


def _open(
    consumers: Any,
    target: str,
    source: Source,
    partial: Path,
    details: Mapping[str, Any],
    stack: ExitStack,
) -> Any:
    """A program with the export loaded as its card says, or why there is none."""
    base, kind, stops = source.checkpoint.folder, family(target), list(details.get("stop_ids", ())) or None
    if details.get("layout") == "unfused":
        place = stack.enter_context(TemporaryDirectory(dir=partial, prefix=".fused-"))
        fused = _fused_again(source, partial, Path(place) / "adapter")
        program = consumers.peft_folder(base, fused, stops)
        program.name = "transformers + PEFT, its names fused again"
        return program
    if kind in ("adapter", "vllm"):
        return consumers.peft_folder(base, partial, stops)
    if kind == "merged":
        return consumers.transformers_folder(partial)
    missing = {"loralib": "loralib", "mlx": "mlx_lm"}.get(kind, "xllamacpp")
    if importlib.util.find_spec(missing) is None:
        return f"{missing} is not installed"
    if kind == "loralib":
        return consumers.loralib_file(base, partial, source.checkpoint.geometry, stops)
    if kind == "mlx":
        return consumers.MlxLm(base, partial, stops)
    size = details["context"]
    if kind == "gguf-lora":
        plain = Path(stack.enter_context(TemporaryDirectory(dir=partial, prefix=".base-"))) / "base.gguf"
        table.write_base_gguf(source, plain)
        return stack.enter_context(consumers.llama_cpp(plain, partial / details["gguf"], context=size))
    return stack.enter_context(consumers.llama_cpp(partial / details["gguf"], context=size))


def _fused_again(source: Source, folder: Path, out: Path) -> Path:
    """The exported adapter with Phi-3's own names, for programs that have the linears fused."""
    geometry = source.checkpoint.geometry
    layouts.write_adapter(out, *layouts.convert(*layouts.read_adapter(folder, geometry), "fused", geometry))
    return out


def _skipped(target: str, reason: str) -> dict[str, Any]:
    return {"target": target, "consumer": None, "verdict": "skipped", "reasons": [reason], "passed": False}


def prompts(source: Source, live: Any, room: int | None) -> list[list[dict[str, Any]]]:
    """Messages to answer: the beginnings of held-out conversations, else a few questions of ours.

    `room`: the most tokens that a prompt may have where the program is run with so small a context.
    """
    asked = [[{"role": "user", "content": text}] for text in FALLBACK]
    recipe = source.recipe
    if recipe is not None and recipe.data.eval is not None:
        try:
            splits = data.load(recipe.data, live.tokenizer)
        except InputError:
            splits = None  # the gate asks its own questions; the merge report says why
        if splits is not None and splits.eval is not None:
            found = (one.to_template(one.last_answer) for one in splits.eval.conversations)
            fitting = (one for one in found if room is None or len(live.tokens(one)) <= room)
            asked = list(islice(fitting, NUM_PROMPTS)) or asked
    return asked


def _window(source: Source, target: str) -> int | None:
    """The base's sliding window, where the target's program is to heed it and a question fits behind it."""
    geometry, window = source.checkpoint.geometry, context.window_of(source.checkpoint.geometry)
    if window is None or family(target) in (*context.LLAMA_CPP, "mlx"):
        return None
    most = window + BEYOND + 2 * MAX_NEW_TOKENS + 8
    return window if window <= MOST_ASKED and most <= geometry.max_positions else None


def longer_than(window: int, live: Any) -> list[dict[str, Any]]:
    """A question of a little more tokens than the window."""
    text = " ".join(f"{FALLBACK[number % len(FALLBACK)]} ({number})" for number in range(window))

    def asked(size: int) -> list[dict[str, Any]]:
        return [{"role": "user", "content": text[:size]}]

    size = bisect_right(
        range(len(text)), window + BEYOND // 2, key=lambda size: len(live.tokens(asked(size)))
    )
    return asked(size)


def summary(found: Mapping[str, Any]) -> str:
    """One line of what the gate found."""
    if found["verdict"] != "passed":
        return f"not proven ({found['verdict']}): {'; '.join(found['reasons'])}"
    kl, agreement = found["kl_mean"], found["greedy_agreement"]
    what = f"KL {kl:.3g} from the model as trained, {agreement:.0%} of its greedy tokens agree"
    return f"proven in {found['consumer']}: {what}"
