"""What is exported: an adapter, the base it was trained on, and what its run says of it.

Owns finding the three and that they belong together. Refuses a folder without an adapter, another base, and
adapters that are more than B @ A times a scale.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from errno import ELOOP
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from .. import adapters, files, json_files, layouts, model, weights
from ..base_names import is_hub_name
from ..errors import ModelError, Problem, is_file, printable, shown
from ..layouts.files import CONFIG_NAME, LORALIB_CONFIG, LORALIB_WEIGHTS
from ..recipe import Model, Recipe
from ..recipe_file import load_recipe
from . import card, stops
from .options import Say

TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip
LICENCE_NAMES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
LONGEST_NAME: Final = 100
_AGAIN: Final = "Give a run folder, or the folder of an adapter."


@dataclass(frozen=True, eq=False)  # one is itself: tensors have no equality to go by
class Source:
    """An adapter with its base, both checked.

    `run` and `recipe` are None for an adapter folder outside of a run; `model` then only says which base,
    and nothing about what the adapter was trained against. `report` is the run's report.json.
    """

    folder: Path
    run: Path | None
    recipe: Recipe | None
    model: Model
    report: dict[str, Any] | None
    checkpoint: weights.Checkpoint
    tensors: layouts.Tensors
    config: layouts.AdapterConfig

    @property
    def name(self) -> str:
        return printable(self._given_name)

    @property
    def _given_name(self) -> str:
        return self.recipe.name if self.recipe is not None else self.folder.absolute().name

    @property
    def file_name(self) -> str:
        """The name as a part of file names: a folder of somebody's may be called anything."""
        return re.sub(r"[^\w.-]+", "-", self._given_name).strip("-.")[:LONGEST_NAME] or "adapter"

    @property
    def base_name(self) -> str:
        return public_name(self.checkpoint.provenance.base)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Every token at which the toolkit stops."""
        return stops.stops_of(self)

    @cached_property
    def stop_tokens(self) -> list[str]:
        """Their texts, which some programs are told instead."""
        words = model.load_tokenizer(self.checkpoint.folder)
        return [text for text in words.convert_ids_to_tokens(self.stop_ids) if text]

    @property
    def system_prompt(self) -> str | None:
        """The system message that all training rows share; None where there is none such, or nobody knows."""
        found = self.report["data"].get("system_prompt") if self.report is not None else None
        return found if isinstance(found, str) and found else None

    @cached_property
    def other_template(self) -> bool:
        """Whether the adapter came with another chat template than its base has, which exports carry."""
        there = all((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        try:
            own = model.load_tokenizer(self.folder) if there else None
        except ModelError:  # a broken one, or of no chat model, says nothing
            return False
        base = model.load_tokenizer(self.checkpoint.folder)
        return own is not None and own.chat_template != base.chat_template

    @property
    def quantized(self) -> bool:
        """Whether it is known that the adapter was trained against NF4."""
        return self.recipe is not None and self.recipe.model.quantization == "nf4"


def public_name(base: str) -> str:
    """A base's name for others: a folder's own name in place of its path on this machine."""
    return Path(base).name if Path(base).is_absolute() else base


def open_source(path: Path, say: Say = lambda _: None) -> Source:
    """Read an adapter and find its base, downloading it where needed.

    Raises:
        ModelError: no adapter, one that no layout holds (DoRA), another base, no tokenizer or chat template.
        RecipeError: the run's recipe cannot be read.
    """
    folder, run = _find(path)
    recipe = load_recipe(run / "recipe.yaml") if run is not None else None
    settings = recipe.model if recipe is not None else _base_of(folder)
    if run is not None:
        _check_named(settings, folder, run / "recipe.yaml")
    checkpoint = _locate(settings, folder, say, told=recipe is None)
    model.load_tokenizer(checkpoint.folder)
    adapters.check_provenance(folder, checkpoint, say)
    tensors, config = layouts.read_adapter(
        folder, checkpoint.geometry, base_weight=lambda module: _weight(checkpoint, module)
    )
    return Source(folder, run, recipe, settings, _report(run), checkpoint, tensors, config)


def _locate(settings: Model, folder: Path, say: Say, *, told: bool) -> weights.Checkpoint:
    """The base; `told`: its name is out of the adapter's own files, which may be another tool's."""
    try:
        return weights.locate(settings, say)
    except ModelError as error:
        damaged = any(one.place.startswith(f"{settings.base}/") for one in error.problems)
        other = any(word in one.reason for one in error.problems for word in ("model_type", "quantized"))
        if not told or (damaged and not other):
            raise
        reason = f"names {shown(settings.base)} as its base, which cannot be used."
        remedy = (
            "Where that is elsewhere, a copy in other names, or a quantized one, write the name of the Phi-3 "
            f"checkpoint into its {CONFIG_NAME} (base_model_name_or_path; of mlx-lm model)."
        )
        raise ModelError.of((*error.problems, Problem(str(folder), reason, remedy))) from None


def _weight(checkpoint: weights.Checkpoint, module: str) -> Tensor:
    """The embedding's or the head's own weight; of a tied base the one that is both."""
    from safetensors import safe_open

    files = weights.tensor_files(checkpoint.folder)
    name = f"{module}.weight"
    name = name if name in files else "model.embed_tokens.weight"
    with safe_open(files[name], framework="pt") as tensors:
        found: Tensor = tensors.get_tensor(name)
    return found


def _find(path: Path) -> tuple[Path, Path | None]:
    """(adapter's folder, run folder or None)."""
    if not path.is_dir():
        raise ModelError(str(path), "no such folder.", _AGAIN)
    if _is_there(path / "recipe.yaml"):
        if not (path / "adapter").is_dir():
            _check_no_link(path / "adapter")
            reason = "is a run without an adapter: it failed, or has not finished."
            raise ModelError(str(path), reason, "Run its recipe again.")
        return path / "adapter", path
    above = path.absolute().parent
    in_run = path.absolute().name == "adapter" and _is_there(above / "recipe.yaml")
    return path, above if in_run else None


def _check_no_link(adapter: Path) -> None:
    """Refuse what has the name of a run's adapter and is no folder: the run did not fail for it.

    Raises:
        ModelError: so it is.
    """
    if not os.path.lexists(adapter):
        return
    try:
        adapter.stat()
        reason = "is no folder."
    except OSError as error:
        why = "it leads to itself" if error.errno == ELOOP else json_files.said(error)
        reason = f"is a link that leads to no folder: {why}."
    raise ModelError(str(adapter), reason, "Put the run's adapter folder itself there.")


def _is_there(path: Path) -> bool:
    """Whether a file is there. What has its name and cannot be read as one is refused, not passed over.

    Raises:
        ModelError: a folder, a pipe, a link that leads nowhere.
    """
    found = is_file(path, ModelError)
    if not found and os.path.lexists(path):
        reason = "is no regular file, and no link to one."
        raise ModelError(str(path), reason, "Move it away, or put the file itself there.")
    return found


def _no_adapter(folder: Path) -> ModelError:
    """What a folder without an adapter holds instead."""
    with suppress(OSError):
        marks = (CONFIG_NAME, "recipe.yaml")
        inside = [one for one in folder.iterdir() if any((one / mark).is_file() for mark in marks)]
        if inside:
            latest = max(inside, key=lambda one: one.stat().st_mtime_ns)
            reason = f"holds no {CONFIG_NAME} itself; {latest.name} in it does, the latest of {len(inside)}."
            return ModelError(str(folder), reason, f"Give {latest}.")
        if (folder / "config.json").is_file():
            remedy = "Give the adapter's folder; what is merged needs no export."
            return ModelError(str(folder), "holds a whole model, not an adapter.", remedy)
    return ModelError(str(folder), f"holds no {CONFIG_NAME}.", _AGAIN)


def _base_of(folder: Path) -> Model:
    """The base that an adapter's own files name: ours, PEFT's, mlx-lm's (`model`).

    Ours has a local folder by its last part only: where another file names a path, that counts.
    """
    found: dict[str, Any] = {}
    bare: Model | None = None
    for name in (adapters.PROVENANCE_NAME, CONFIG_NAME, LORALIB_CONFIG):
        if not os.path.lexists(folder / name):
            continue
        content = json_files.read(folder / name, ModelError, "Copy the adapter again.")
        found = content if isinstance(content, dict) else {}
        base = found.get("base") or found.get("base_model_name_or_path") or found.get("model")
        if isinstance(base, str):
            named = _named(base, found.get("revision"), folder / name)
            if ":" in base or "/" in base:  # builtin:, org/name, a path
                return named
            bare = bare or named
    if bare is not None:
        return bare
    if not found and (folder / LORALIB_WEIGHTS).exists():
        remedy = "Write one, with layout, rank, alpha, enable_lora and base (docs/export.md)."
        raise ModelError(str(folder), f"holds no {LORALIB_CONFIG} beside {LORALIB_WEIGHTS}.", remedy)
    if not found:
        raise _no_adapter(folder)
    reason = "its files do not name the base that it was trained on."
    name, key = CONFIG_NAME, "base_model_name_or_path"
    if (folder / LORALIB_CONFIG).exists():
        name, key = LORALIB_CONFIG, "base"
    raise ModelError(str(folder), reason, f"Write {key} into its {name}.")


def _check_named(settings: Model, folder: Path, recipe: Path) -> None:
    """Compare two names before either is fetched; a folder's says nothing, its content is compared later.

    Raises:
        ModelError: the recipe's base is not the one that the adapter's own files name.
    """
    if not _is_fetched(settings.base):
        return
    told = ""
    with suppress(ModelError):  # a run's adapter that names none is still its recipe's
        told = _base_of(folder).base
    if _is_fetched(told) and told.casefold() != settings.base.casefold():
        reason = f"the adapter was trained on {shown(told)}, and {recipe} names {shown(settings.base)}."
        raise ModelError(str(folder), reason, "Set model.base there to that one.")


def _is_fetched(base: str) -> bool:
    return base.startswith("builtin:") or is_hub_name(base)


def _named(base: str, revision: object, place: Path) -> Model:
    """A base by the name in a file of another tool's.

    Raises:
        ModelError: no base can have it.
    """
    try:
        return Model(base=base, revision=revision if isinstance(revision, str) else None)
    except ValueError:  # pydantic's: half a surrogate pair
        reason = f"names {shown(base)} as its base, which is no name."
        raise ModelError(str(place), reason, "Write the base's name or folder there.") from None


def _report(run: Path | None) -> dict[str, Any] | None:
    """The run's report.json, which every card is made of.

    Raises:
        ModelError: it cannot be read, or no card can be made of it.
    """
    path = run / "report.json" if run is not None else None
    if path is None or not _is_there(path):
        return None
    again = "Move it away to export without it, or run the recipe again."
    found = json_files.read_object(path, ModelError, again)
    try:
        for target in ("merged", "adapter"):
            card.render(found, card.About(target, "", ""))
    except Exception as error:  # whatever a template makes of another program's, or another version's
        reason = f"is no report of a run of this version: {weights.first_line(error)}."
        raise ModelError(str(path), reason, again) from None
    return found


def copy_tokenizer(source: Source, folder: Path) -> None:
    """The base's tokenizer and chat template, byte for byte, but for keys that name code."""
    for name in TOKENIZER_FILES:
        if (source.checkpoint.folder / name).is_file():
            shutil.copyfile(source.checkpoint.folder / name, folder / name)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json_files.read_object(path, ModelError, "Download it again.")
        if "auto_map" in settings or "name_or_path" in settings:
            kept = {k: v for k, v in settings.items() if k not in ("auto_map", "name_or_path")}
            files.write_json(path, kept)


def tokenizer_bytes(source: Source) -> int:
    paths = [source.checkpoint.folder / name for name in TOKENIZER_FILES]
    return sum(path.stat().st_size for path in paths if path.is_file())


def licence_file(source: Source) -> Path | None:
    """The licence's text beside the base's weights, where it came with them."""
    paths = [source.checkpoint.folder / name for name in LICENCE_NAMES]
    return next((path for path in paths if path.is_file()), None)


def licence_name(source: Source) -> str | None:
    """What the base's README says its licence is; None where nothing does."""
    if source.checkpoint.provenance.source == "builtin":
        return "apache-2.0"
    return licence_in(source.checkpoint.folder / "README.md")


def licence_in(readme: Path) -> str | None:
    """The licence's name in the head of a README."""
    if readme.is_file():
        head = files.read_bytes(readme).decode("utf-8", "replace")[:4000].splitlines()
        found = (re.match(r"""license:\s*["']?([\w.+-]+)["']?\s*(?:#.*)?$""", line) for line in head)
        return next((match[1] for match in found if match is not None), None)
    return None
