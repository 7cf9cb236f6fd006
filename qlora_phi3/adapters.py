"""Attach, describe and save LoRA on a Phi-3 base.

Owns the target contract: every target that was asked for is trained in every layer, nothing else is, and
the table of what is trained says so. Saving is atomic, checked by reading back, and carries the base's
provenance.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from . import json_files, layouts, loftq, phi3, recipe_checks
from .errors import ModelError, RunError, is_folder
from .layouts.files import give_usual_modes
from .layouts.names import linear_shapes
from .model import Base, logical_numel
from .recipe import Adapter, Recipe
from .split_lora import DiagonalB, blocks, split
from .strict_yaml import dotted_path
from .weights import Checkpoint, Say, first_line

WEIGHTS_NAME: Final = "adapter_model.safetensors"
PROVENANCE_NAME: Final = "base_provenance.json"


@dataclass(frozen=True)
class Trained:
    """One row of the trained table: a part of a module, how many of it there are, and what trains it.

    `part`: the projection, as "q", the whole linear's as "q+k+v", "lengths" for DoRA's; of the embedding and
    the head, which have no parts, their own name.
    """

    target: str
    part: str
    num_modules: int
    in_features: int
    out_features: int
    rank: int
    num_parameters: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def attach(base: Base, recipe: Recipe) -> Any:
    """Wrap the base in a `PeftModel` with float32 LoRA on linears, projections in them, embedding and head.

    Raises:
        ModelError: a target that exists nowhere, or not in every layer, or a rank above a linear's size, or
            an adapter to go on from that does not fit, or weights that LoftQ cannot start from.
    """
    settings, geometry = recipe.adapter, base.checkpoint.geometry
    # not `settings.trained`: a name that is no linear at all is missing there, in a recipe nobody checked
    asked = phi3.LINEARS if isinstance(settings.targets, str) else settings.targets
    check_targets(base.model, [phi3.PROJECTIONS.get(name, name) for name in asked], geometry.num_layers)
    check_rank(settings, geometry)
    config = peft_config(settings)
    model = _wrap(base.model, config)
    if settings.split_fused:
        split_linears(model, settings, geometry)
    if settings.method == "dora":
        keep_dtype(model)
    if settings.init is not None:
        go_on_from(Path(settings.init), model, settings, base)
    if settings.method == "loftq":
        loftq.start(model, settings, base)
    # PEFT writes this into adapter_config.json; for hub ids others can load from it, a folder of this
    # machine would tell nobody anything.
    config.base_model_name_or_path = base.checkpoint.provenance.base
    config.revision = base.checkpoint.provenance.revision
    check_trained(model, settings, geometry)
    return model


def _wrap(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # of merging into tied matrices; the two adapters themselves know nothing of each other
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def peft_config(settings: Adapter) -> Any:
    """PEFT's config of what is trained, and of what is saved: a split linear is one of n times the rank.

    Its alpha grows with it, so that the update is scaled by what the recipe says: alpha / rank, or with
    rsLoRA alpha / sqrt(rank).
    """
    from peft import LoraConfig

    wide = {linear: len(phi3.inside(linear)) for linear in settings.trained if linear in phi3.FUSED}
    wide = wide if settings.split_fused else {}
    rslora = settings.method == "rslora"
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        rank_pattern={linear: n * settings.rank for linear, n in wide.items()},
        alpha_pattern={
            linear: settings.alpha * (math.sqrt(n) if rslora else n) for linear, n in wide.items()
        },
        lora_dropout=settings.dropout,
        target_modules=[*settings.trained, *settings.embeddings],
        use_rslora=rslora,
        use_dora=settings.method == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )


def go_on_from(path: Path, model: Any, settings: Adapter, base: Base) -> None:
    """Fill the new adapter with one that was trained before, of any layout.

    Raises:
        ModelError: it cannot be read, is of another base, or is not what the recipe describes.
    """
    from peft import set_peft_model_state_dict

    geometry, layout = base.checkpoint.geometry, "split" if settings.split_fused else "fused"
    check_provenance(path if is_folder(path, ModelError) else path.parent, base.checkpoint)
    tensors, found = layouts.read_adapter(path, geometry)
    tensors, found = layouts.convert(tensors, found, layout, geometry, str(path))  # type: ignore[arg-type]
    check_same_shape(path, found, peft_config(settings), geometry)
    try:
        loaded = set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()  # the lines before name torch's function
        raise ModelError(str(path), reason, "Add what it trains to adapter.targets.") from None
    assert not loaded.unexpected_keys


def check_same_shape(path: Path, found: layouts.AdapterConfig, wanted: Any, geometry: phi3.Geometry) -> None:
    """What was read must train the same modules with the same rank and scale as the recipe.

    Raises:
        ModelError: the first difference, and the keys that would make it go.
    """
    trained, asked = sorted({t.rsplit(".", 1)[-1] for t in found.targets}), sorted(wanted.target_modules)
    if trained != asked:
        reason = f"trains {', '.join(trained)}, the recipe {', '.join(asked)}."
        raise ModelError(str(path), reason, "Set adapter.targets to what it trains.")
    paths = {path.rsplit(".", 1)[-1]: path for path in linear_shapes(geometry)}
    for name in sorted(asked, key=phi3.ADAPTABLE.index):
        rank = wanted.rank_pattern.get(name, wanted.r)
        alpha = wanted.alpha_pattern.get(name, wanted.lora_alpha)
        scale = alpha / (math.sqrt(rank) if wanted.use_rslora else rank)
        its_rank, its_scale = found.rank_of(paths[name]), found.scale_of(paths[name])
        if its_rank != rank or not math.isclose(its_scale, scale, rel_tol=1e-6):
            # of a split linear, saved as one, `adapter.rank` is the rank of each part
            parts = rank // wanted.r
            own = its_rank // parts if its_rank % parts == 0 else its_rank
            reason = (
                f"{name} has rank {own} scaled by {its_scale:g}; "
                f"the recipe makes that {rank // parts} and {scale:g}."
            )
            raise ModelError(
                str(path), reason, "Set adapter.rank, adapter.alpha and adapter.method to its own."
            )


def check_provenance(folder: Path, checkpoint: Checkpoint, say: Say = lambda _: None) -> None:
    """Where the adapter says what it was trained on, that must be this base.

    Adapters of older versions tell names and shapes of the weights only, and `say` hears that.

    Raises:
        ModelError: another config or other weights, or the note cannot be read.
    """
    note = folder / PROVENANCE_NAME
    if not os.path.lexists(note):
        return
    ours = json.loads(json.dumps(checkpoint.provenance.to_json()))
    theirs = json_files.read(note, ModelError, "Remove it, or mend it.")
    try:
        told = all("samples_xxh3" in one for one in theirs["weights"])
        if not told:
            ours["weights"] = [
                {k: v for k, v in one.items() if k != "samples_xxh3"} for one in ours["weights"]
            ]
        same = all(theirs[key] == ours[key] for key in ("config_sha256", "weights"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            str(note), f"cannot be read: {first_line(error)}.", "Remove it, or mend it."
        ) from None
    if same and not told:
        say(f"{note} tells names and shapes of the base's weights, not whether they are still the same")
    if not same:
        reason = (
            f"the adapter was trained on {theirs.get('base')}, which is not {ours['base']} as it is here."
        )
        raise ModelError(str(folder), reason, "Set model.base to that one.")


def split_linears(model: nn.Module, settings: Adapter, geometry: phi3.Geometry) -> None:
    """Give each trained projection of a fused linear its own A and B."""
    for name, module in model.named_modules():
        linear = name.rsplit(".", 1)[-1]
        if linear in phi3.FUSED and linear in settings.trained and hasattr(module, "lora_A"):
            sizes = [stop - start for start, stop in geometry.slices(linear).values()]
            split(module, settings.rank, sizes, [p in settings.trained[linear] for p in phi3.inside(linear)])


def keep_dtype(model: nn.Module) -> None:
    """Have DoRA's linears give what they take.

    PEFT 0.21's Linear4bit leaves DoRA's output float32 under CUDA's autocast, and with it attention and the
    sum of all layers.
    """
    for module in model.modules():
        lengths: Any = getattr(module, "lora_magnitude_vector", ())
        if len(lengths):
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


def check_rank(settings: Adapter, geometry: phi3.Geometry) -> None:
    """Refuse a rank that `recipe_checks.rank_problems` finds too high.

    Raises:
        ModelError: the rank is above the smaller side of a linear, a projection, the embedding or the head.
    """
    for path, reason, remedy in recipe_checks.rank_problems(settings, geometry):
        raise ModelError(dotted_path(path), reason, remedy)


def check_targets(model: nn.Module, targets: Sequence[str], num_layers: int) -> None:
    """Every target must exist once in every decoder layer, the embedding and the head once in all.

    PEFT accepts partial matches in silence.

    Raises:
        ModelError: the number of modules of that name is another.
    """
    paths = [f".{name}" for name, _ in model.named_modules()]
    for target in targets:
        found = [path for path in paths if path.endswith(f".{target}")]
        if target in phi3.EMBEDDINGS:
            num, wanted = len(found), 1
            reason = f"the base has {num} modules called {target}, not one."
        else:
            num, wanted = sum(".layers." in path for path in found), num_layers
            reason = f"{target} exists in {num} of {num_layers} layers of the base."
        if num != wanted:
            raise ModelError("adapter.targets", reason, f"Choose out of {', '.join(phi3.ADAPTABLE)}.")


def check_trained(model: nn.Module, settings: Adapter, geometry: phi3.Geometry) -> None:
    """Assert that exactly the A/B pairs of the recipe are trained, as many parameters as computed."""
    table = trained_table(model)
    pairs = [row for row in table if row.rank]
    expected = [
        (linear, "+".join(phi3.inside(linear)) if part == linear else part) for linear, part in settings.pairs
    ]
    expected += [(name, name) for name in settings.embeddings]
    expected.sort(key=lambda one: phi3.ADAPTABLE.index(one[0]))
    assert [(row.target, row.part) for row in pairs] == expected, [(row.target, row.part) for row in pairs]
    assert all(
        row.num_modules == geometry.num_modules(row.target) and row.rank == settings.rank for row in pairs
    )
    computed = geometry.lora_parameters(settings.parts, settings.rank)
    assert sum(row.num_parameters for row in pairs) == computed
    trainable = sum(logical_numel(p) for p in model.parameters() if p.requires_grad)
    assert sum(row.num_parameters for row in table) == trainable


def trained_table(model: nn.Module) -> list[Trained]:
    """What is trained, a row per part of a module in the order of the forward pass, read off the modules."""
    found: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and (len(module.lora_A) or len(module.lora_embedding_A)):
            found.setdefault(name.rsplit(".", 1)[-1], []).append(module)
    ordered = sorted(found, key=phi3.ADAPTABLE.index)
    return [row for target in ordered for row in _rows(target, found[target])]


def summarize(table: Sequence[Trained]) -> list[str]:
    """The table for people, a line for all that are as many and of one rank.

    "q k v o gate up down in 30 layers, rank 16, 4.9 M parameters"
    """
    groups: dict[tuple[bool, int, int, bool], list[Trained]] = {}
    for row in table:
        inside = row.target not in phi3.EMBEDDINGS
        groups.setdefault((inside, row.num_modules, row.rank, row.part == "lengths"), []).append(row)
    lines = []
    for (inside, num_modules, rank, lengths), rows in groups.items():
        names = " ".join(row.target if lengths else row.part for row in rows)
        words = [f"{names} in {num_modules} layers" if inside else names]
        words[0] = f"lengths of {words[0]}" if lengths else words[0]
        num = sum(row.num_parameters for row in rows)
        counted = f"{num / 1e6:.1f} M" if num >= 10**5 else f"{num:,}"
        lines.append(", ".join([*words, *([f"rank {rank}"] if rank else []), f"{counted} parameters"]))
    return lines


def _rows(target: str, modules: list[Any]) -> list[Trained]:
    """A row for each A/B pair of a module, and one for DoRA's lengths."""
    sides = [
        (m.lora_embedding_A, m.lora_embedding_B) if len(m.lora_embedding_A) else (m.lora_A, m.lora_B)
        for m in modules
    ]
    pairs = [list(zip(blocks(a["default"]), blocks(b["default"]), strict=True)) for a, b in sides]
    parts = _part_names(target, sides[0][1]["default"])
    rows = [
        _row(target, part, list(same)) for part, same in zip(parts, zip(*pairs, strict=True), strict=True)
    ]
    lengths = [m.lora_magnitude_vector["default"].weight for m in modules if len(m.lora_magnitude_vector)]
    if lengths:
        num = sum(p.numel() for p in lengths if p.requires_grad)
        rows.append(
            Trained(target, "lengths", len(lengths), 0, lengths[0].numel(), 0, num, _dtype(lengths[0]))
        )
    return rows


def _part_names(target: str, b: object) -> list[str]:
    if target in phi3.EMBEDDINGS:
        return [target]
    names = phi3.inside(target)
    if isinstance(b, DiagonalB):
        return [name for name, on in zip(names, b.trained, strict=True) if on]
    return ["+".join(names)]


def _row(target: str, part: str, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Trained:
    a, b = pairs[0]
    return Trained(
        target=target,
        part=part,
        num_modules=len(pairs),
        in_features=a.shape[1],
        out_features=b.shape[0],
        rank=a.shape[0],
        num_parameters=sum(p.numel() for pair in pairs for p in pair if p.requires_grad),
        dtype=_dtype(a),
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def save(model: Any, base: Base, folder: Path) -> None:
    """Write the PEFT adapter, its tokenizer and the base's provenance; all or nothing.

    The folder appears under its name only after the written weights were read back equal.

    Raises:
        RunError: a weight is not finite, or reads back differently.
        OSError, SafetensorError: it cannot be written.
    """
    check_finite(model)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _write(model, base, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(model: Any, base: Base, partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    # "auto", PEFT's default, asks the hub or any folder of the base's name for its vocabulary
    model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
    base.tokenizer.save_pretrained(partial)
    provenance = json.dumps(base.checkpoint.provenance.to_json(), indent=2)
    (partial / PROVENANCE_NAME).write_text(provenance + "\n", encoding="utf-8")
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty template; report.py writes the real card
    check_saved(model, partial)
    give_usual_modes(partial)


def saved_bytes(model: nn.Module) -> int:
    """What `save` will write, about: the trained weights, fused ones of split pairs with their zeros.

    Upper bound: a split pair's fused form has two or three times the rank, its B mostly zeros.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 3 * trained


def check_finite(model: nn.Module) -> None:
    """Raises RunError when a trained weight is NaN or infinite."""
    bad = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if bad:
        reason = f"{len(bad)} trained weights are not finite, {bad[0]} the first."
        raise RunError("adapter", reason, "Lower train.learning_rate; nothing was saved.")


def check_saved(model: Any, folder: Path) -> None:
    """Read the written adapter back and compare it bit by bit with the live one.

    Raises:
        RunError: a weight is missing or differs.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place, remedy = str(folder / WEIGHTS_NAME), "Check the disk, then run again."
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    try:
        saved = load_file(place)
    except (OSError, SafetensorError) as error:
        raise RunError(place, f"cannot be read back: {first_line(error)}.", remedy) from None
    wrong = [key for key in live if key not in saved or not _same_bits(live[key].cpu(), saved[key])]
    if wrong or len(saved) != len(live):
        reason = f"reads back differently: {(wrong or ['surplus weights'])[0]}."
        raise RunError(place, reason, remedy)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Stricter than `torch.equal`, to which minus zero is zero and 1 in bfloat16 is 1 in float32."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))
