"""Between a dict of tensors and one A/B pair per linear, with every check on the way in.

Owns what makes a dict of tensors a whole adapter of a base. Refuses half pairs, shapes of another base,
numbers that are none, and claims that do not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ..errors import ModelError, Problem
from ..phi3 import Geometry
from .blocks import Pair, is_block_diagonal
from .config import PEFT_LAYOUTS, AdapterConfig, Layout, alpha_for, by_name, check_config, compress
from .names import (
    Style,
    Tensors,
    block_sizes,
    find_style,
    is_fused,
    key_of,
    known_keys,
    linear_shapes,
    style_of,
    unfused_shapes,
)

Pairs = dict[str, Pair]

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN: Final = 8
"""Problems that are listed of one adapter; a wrong base makes hundreds alike."""

_OTHER_BASE: Final = "Give an adapter made for this base."


def detect(tensors: Mapping[str, Tensor], geometry: Geometry, place: str = "adapter") -> Layout:
    """The layout a dict of tensors is in, by its keys, shapes and zeros.

    "split" needs every B of a fused linear block-diagonal and one of them not zero: an untrained adapter is
    block-diagonal in any case, and called fused.

    Raises:
        ModelError: no layout fits all keys, or an A or B is missing or of the wrong shape.
    """
    style = find_style(tensors, geometry, place)
    shapes = linear_shapes(geometry)
    unfused = not known_keys(shapes, style).keys() >= tensors.keys()
    if unfused:
        shapes = unfused_shapes(geometry)
    raw = _raw_pairs(tensors, shapes, style, place)
    if style == "loralib" and any(_is_grouped(a, b) for a, b in raw.values()):
        return "loralib_merged"
    _check_shapes(raw, shapes, geometry, place)
    if style != "peft":
        return style
    return "unfused" if unfused else "split" if _is_split(raw, geometry) else "fused"


def _is_split(raw: Mapping[str, tuple[Tensor, Tensor]], geometry: Geometry) -> bool:
    found = {m: Pair(a, b, 1.0) for m, (a, b) in raw.items() if is_fused(m)}
    diagonal = [is_block_diagonal(pair, _sizes(m, geometry)) for m, pair in found.items()]
    return bool(found) and all(diagonal) and any(bool(pair.b.any()) for pair in found.values())


def check(
    tensors: Mapping[str, Tensor], config: AdapterConfig, geometry: Geometry, place: str = "adapter"
) -> None:
    """Refuse an adapter that is not whole, not of this base, or not what its config says.

    Raises:
        ModelError: as said, with every place.
    """
    parse(tensors, config, geometry, place)


def parse(
    tensors: Mapping[str, Tensor], config: AdapterConfig, geometry: Geometry, place: str = "adapter"
) -> Pairs:
    """One checked pair per linear, in the shapes of the layout that the config names.

    Raises:
        ModelError: an unknown key, half a pair, a shape of another base, a rank other than the config's, a
            number that is none, a split that is none.
    """
    check_config(config, place)
    style = style_of(config.layout)
    shapes = unfused_shapes(geometry) if config.layout == "unfused" else linear_shapes(geometry)
    find_style(tensors, geometry, place)
    raw = _raw_pairs(tensors, shapes, style, place)
    if config.layout == "loralib_merged":
        _check_grouped(raw, config, shapes, geometry, place)
    else:
        _check_shapes(raw, shapes, geometry, place)
    _check_ranks(raw, config, place)
    _check_targets(raw, shapes, config, place)
    _check_numbers(tensors, place)
    pairs = {module: Pair(a, b, config.scale_of(module)) for module, (a, b) in raw.items()}
    if config.layout == "split":
        check_split(pairs, geometry, place)
    return pairs


def _raw_pairs(
    tensors: Mapping[str, Tensor], modules: Mapping[str, object], style: Style, place: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module in the order of the base, MLX's turned; every one a matrix with its other half."""
    known = known_keys(modules, style)
    foreign = [key for key in tensors if key not in known]
    if foreign:
        reason = "does not belong to the layout of the other tensors, or of the config."
        raise ModelError(f"{place}: {foreign[0]}", reason, "Give one layout at a time.")
    problems, raw = [], {}
    for module in modules:
        keys = [key_of(module, side, style) for side in "AB"]
        there = [key in tensors for key in keys]
        if all(there):
            a, b = (tensors[key].detach() for key in keys)
            problems += [_problem(place, k, "is not a matrix.") for k in keys if tensors[k].ndim != 2]
            raw[module] = (a.T, b.T) if style == "mlx" and a.ndim == b.ndim == 2 else (a, b)
        elif any(there):
            problems.append(_problem(place, keys[there.index(False)], "is missing beside its other half."))
    _raise(problems)
    return raw


def _check_shapes(
    raw: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, tuple[int, int]],
    geometry: Geometry,
    place: str,
) -> None:
    problems = []
    for module, (a, b) in raw.items():
        (num_out, num_in), rank = shapes[module], a.shape[0]
        if (a.shape[1], *b.shape) != (num_in, num_out, rank) or rank == 0:
            reason = (
                f"A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a linear of {num_in} to {num_out}."
            )
            problems.append(_problem(place, module, reason, _OTHER_BASE))
        elif rank > _rank_limit(module, b, geometry):
            limit = _rank_limit(module, b, geometry)
            reason = f"rank {rank} is above {limit}, the most that a linear of {num_in} to {num_out} can use."
            problems.append(_problem(place, module, reason, "Train it with a smaller rank."))
    _raise(problems)


def _rank_limit(module: str, b: Tensor, geometry: Geometry) -> int:
    """The fused linear's smaller side; that for each block of a block-diagonal B.

    A block of its own may exceed its few rows: it is what a fused adapter becomes when it is cut.
    """
    whole = linear_shapes(geometry)
    if module not in whole:
        parent, linear = module.rsplit(".", 1)
        fused = "qkv_proj" if linear in ("q_proj", "k_proj", "v_proj") else "gate_up_proj"
        return min(whole[f"{parent}.{fused}"])
    limit = min(whole[module])
    if is_fused(module) and limit < b.shape[1]:
        sizes = _sizes(module, geometry)
        return limit * len(sizes) if is_block_diagonal(Pair(b, b, 1.0), sizes) else limit
    return limit


def _check_grouped(
    raw: Mapping[str, tuple[Tensor, Tensor]],
    config: AdapterConfig,
    shapes: Mapping[str, tuple[int, int]],
    geometry: Geometry,
    place: str,
) -> None:
    """MergedLinear's shapes where a linear has them or must have them, else Linear's."""
    grouped = {m: ab for m, ab in raw.items() if _is_grouped(*ab) or m in _named(raw, config)}
    problems = []
    for module, (a, b) in grouped.items():
        reason = _why_not_grouped(module, a, b, config, shapes[module], geometry)
        if reason:
            problems.append(_problem(place, module, reason, "See loralib's MergedLinear for the shapes."))
    _raise(problems)
    _check_shapes({m: ab for m, ab in raw.items() if m not in grouped}, shapes, geometry, place)


def _named(raw: Mapping[str, object], config: AdapterConfig) -> list[str]:
    return [module for module in raw if config.blocks_of(module)]


def _is_grouped(a: Tensor, b: Tensor) -> bool:
    """A grouped A has k times the rank of its B. One block of several looks like a Linear of fewer rows."""
    return a.shape[0] != b.shape[1]


def _why_not_grouped(
    module: str, a: Tensor, b: Tensor, config: AdapterConfig, shape: tuple[int, int], geometry: Geometry
) -> str:
    """What keeps a pair from being a MergedLinear's; empty where nothing does."""
    (num_out, num_in), rank, used = shape, b.shape[1], config.blocks_of(module)
    if not is_fused(module):
        return f"A {tuple(a.shape)} and B {tuple(b.shape)} have different ranks, and this is one projection."
    sizes = _sizes(module, geometry)
    if len(set(sizes)) > 1:
        return unequal_blocks(sizes)
    if len(used) != len(sizes) or not any(used):
        return f"enable_lora says {list(used)}; {len(sizes)} of true and false are needed, one true."
    expected = (rank * sum(used), num_in), (num_out // len(used) * sum(used), rank)
    if (tuple(a.shape), tuple(b.shape)) != expected or rank == 0:
        return (
            f"A {tuple(a.shape)} and B {tuple(b.shape)} are not the {expected[0]} and {expected[1]} of "
            f"enable_lora {list(used)}."
        )
    return f"rank {rank} is above {min(shape)}." if rank > min(shape) else ""


def unequal_blocks(sizes: list[int]) -> str:
    """Why grouped-query attention cannot be a MergedLinear."""
    rows = ", ".join(map(str, sizes))
    return f"MergedLinear cuts its rows in equal blocks, and these are of {rows} rows (GQA)."


def _check_ranks(raw: Mapping[str, tuple[Tensor, Tensor]], config: AdapterConfig, place: str) -> None:
    """A rank that the config does not know would be scaled wrongly, or not load at all."""
    wrong = [(m, b.shape[1]) for m, (_, b) in raw.items() if b.shape[1] != config.rank_of(m)]
    remedy = "Give the config that belongs to these tensors."
    _raise(
        [_problem(place, m, f"rank {r}, but the config says {config.rank_of(m)}.", remedy) for m, r in wrong]
    )


def _check_targets(
    raw: Mapping[str, object], shapes: Mapping[str, object], config: AdapterConfig, place: str
) -> None:
    """A consumer would leave a linear that is named but missing as it was, and say nothing.

    Names that no linear of the base has pass: recipes for Llama leave them in Phi-3's configs.
    """
    problems = []
    for target in config.targets:
        missing = [m for m in shapes if (m == target or m.endswith(f".{target}")) and m not in raw]
        if missing:
            more = f" and {len(missing) - 1} more like it" if len(missing) > 1 else ""
            reason = f"has no tensors for {missing[0]}{more}, which its config names."
            problems.append(Problem(place, reason, "Copy or save the adapter again."))
    _raise(problems)


def _check_numbers(tensors: Mapping[str, Tensor], place: str) -> None:
    problems = []
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        remedy = "Save all tensors as float32, bfloat16 or float16."
        raise ModelError(place, f"its tensors are of {names}; one floating type is needed.", remedy)
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            problems.append(_problem(place, key, "holds NaN or infinity.", "Train it again."))
    _raise(problems)


def check_split(pairs: Pairs, geometry: Geometry, place: str) -> None:
    """Hold an adapter to the claim of being split.

    Raises:
        ModelError: a B of a fused linear has an entry other than zero outside its blocks.
    """
    problems = []
    for module, pair in pairs.items():
        if is_fused(module) and not is_block_diagonal(pair, _sizes(module, geometry)):
            reason = f"B (rank {pair.rank}) is not block-diagonal, so the adapter is not split."
            problems.append(_problem(place, module, reason, "Convert it from fused; that is always exact."))
    _raise(problems)


def describe(
    pairs: Pairs,
    layout: Layout,
    geometry: Geometry,
    *,
    use_rslora: bool,
    enable_lora: Mapping[str, tuple[bool, ...]],
) -> AdapterConfig:
    """The config that gives these pairs their scales, as short as it can be written."""
    use_rslora = use_rslora and layout in PEFT_LAYOUTS
    rank, rank_pattern = compress({module: pair.rank for module, pair in pairs.items()})
    alpha, alpha_pattern = compress(
        {module: alpha_for(pair.scale, pair.rank, use_rslora) for module, pair in pairs.items()}
    )
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        targets=_targets(pairs, geometry),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=use_rslora,
        layout=layout,
        enable_lora=_all_or_paths(enable_lora),
    )


def _targets(pairs: Pairs, geometry: Geometry) -> tuple[str, ...]:
    """A linear's name where all layers have it, else the paths; PEFT's target_modules takes both."""
    targets: list[str] = []
    for name, modules in by_name(pairs).items():
        whole = len(modules) == (geometry.num_layers if ".layers." in modules[0] else 1)
        targets += [name] if whole else modules
    return tuple(targets)


def _all_or_paths(values: Mapping[str, tuple[bool, ...]]) -> dict[str, tuple[bool, ...]]:
    short: dict[str, tuple[bool, ...]] = {}
    for name, modules in by_name(values).items():
        alike = len({values[module] for module in modules}) == 1
        short |= {name: values[modules[0]]} if alike else {module: values[module] for module in modules}
    return short


def render(pairs: Pairs, layout: Layout) -> Tensors:
    """The tensors of pairs under the names of a layout, each in memory of its own."""
    style, tensors = style_of(layout), {}
    for module, pair in pairs.items():
        for side, tensor in (("A", pair.a), ("B", pair.b)):
            turned = tensor.T if style == "mlx" else tensor
            # safetensors refuses tensors that share memory, and a caller may write into what it was given
            tensors[key_of(module, side, style)] = turned.clone(memory_format=torch.contiguous_format)
    return tensors


def _sizes(module: str, geometry: Geometry) -> list[int]:
    return list(block_sizes(module, geometry).values())


def _problem(place: str, name: str, reason: str, remedy: str = "Train or save the adapter again.") -> Problem:
    return Problem(f"{place}: {name}", reason, remedy)


def _raise(problems: list[Problem]) -> None:
    if len(problems) > _SHOWN:
        rest = Problem("adapter", f"{len(problems) - _SHOWN} more problems like these.")
        problems = [*problems[:_SHOWN], rest]
    if problems:
        raise ModelError.of(problems)
