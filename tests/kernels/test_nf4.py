"""NF4 to weights: every bit as bitsandbytes has it, whole and in slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_lab import devices, draw, triton_on

from qlora_phi3 import kernels
from qlora_phi3.kernels import nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda one: str(one).removeprefix("torch."))
nesting = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
ROWS, COLUMNS = 96, 192
SLICES: dict[str, dict[str, Any]] = {
    "whole": {},
    "one span of rows": dict(rows=[(5, 9)]),
    "gate and up": dict(rows=[(8, 24), (56, 72)]),
    "three alike": dict(rows=[(0, 3), (10, 13), (20, 23)]),
    "backwards": dict(rows=[(40, 48), (8, 16)]),
    "unlike spans": dict(rows=[(8, 24), (56, 80), (1, 2)]),
    "columns": dict(columns=(64, 192)),
    "rows and columns": dict(rows=[(3, 5), (90, 96)], columns=(64, 128)),
}
slices = pytest.mark.parametrize("how", SLICES.values(), ids=SLICES.keys())


def quantized(
    rows: int, columns: int, dtype: torch.dtype, nested: bool, size: int = 64, device: str = "cpu"
) -> tuple[torch.Tensor, Any]:
    """Weights of very different sizes, and a block of zeros."""
    import bitsandbytes.functional as bnb

    weight = draw(rows, columns, dtype=torch.float64) * draw(rows, 1, dtype=torch.float64, seed=1).exp()
    weight[0, :64] = 0
    packed, state = bnb.quantize_4bit(
        weight.to(device, dtype), blocksize=size, compress_statistics=nested, quant_type="nf4"
    )
    return packed, state


def of_bitsandbytes(packed: torch.Tensor, state: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(packed.cpu(), _on_cpu(state))


def _on_cpu(state: Any) -> Any:
    state.to("cpu")
    return state


def cut(weight: torch.Tensor, rows: Any = None, columns: Any = None) -> torch.Tensor:
    found = weight if rows is None else torch.cat([weight[start:stop] for start, stop in rows])
    return found if columns is None else found[:, slice(*columns)]


@dtypes
@nesting
@slices
def test_reference_is_bitsandbytes(how: dict[str, Any], nested: bool, dtype: torch.dtype) -> None:
    packed, state = quantized(ROWS, COLUMNS, dtype, nested)
    found = nf4.dequantize(packed, state, **how)
    wanted = cut(of_bitsandbytes(packed, state), **how)
    assert found.dtype == dtype and torch.equal(found, wanted)
    out = torch.full(wanted.shape, 7, dtype=dtype)
    assert nf4.dequantize(packed, state, **how, out=out) is out and torch.equal(out, wanted)


@devices
@dtypes
@nesting
@slices
def test_kernel_is_bitsandbytes_on_a_cpu(how, nested, dtype, device) -> None:
    packed, state = quantized(ROWS, COLUMNS, dtype, nested, device=device)
    with triton_on(device):
        found = nf4.dequantize(packed, state, **how)
        out = torch.full(found.shape, 7, dtype=dtype, device=device)
        assert nf4.dequantize(packed, state, **how, out=out) is out
    wanted = cut(of_bitsandbytes(packed, state), **how)
    assert torch.equal(found.cpu(), wanted) and torch.equal(out.cpu(), wanted)


@devices
@nesting
@pytest.mark.parametrize(
    ("rows", "columns", "size"),
    [(2, 2, 64), (3, 50, 64), (1, 4100, 64), (9, 130, 128), (3, 4096, 4096)],
)
def test_ends_within_a_block_and_other_blocks(rows, columns, size, nested, device) -> None:
    """Few weights leave a second scale for fewer than 256."""
    packed, state = quantized(rows, columns, torch.bfloat16, nested, size, device)
    with triton_on(device):
        found = nf4.dequantize(packed, state)
    assert torch.equal(found.cpu(), of_bitsandbytes(packed, state))


@devices
@nesting
def test_half_a_byte_is_left(nested: bool, device: str) -> None:
    """Of an odd number of weights, which bitsandbytes itself computes as here, slowly."""
    packed, state = quantized(5, 7, torch.bfloat16, nested, device=device)
    with triton_on(device):
        found = nf4.dequantize(packed, state)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:35].int()
    wanted = (state.code[codes] * nf4._scales(state)).to(torch.bfloat16).view(5, 7)
    assert torch.equal(found, wanted)


def test_every_usual_slice_is_one_launch() -> None:
    _, state = quantized(ROWS, COLUMNS, torch.bfloat16, False)
    num_runs = {
        name: len(nf4._runs(state, how.get("rows"), how.get("columns"))) for name, how in SLICES.items()
    }
    assert num_runs == dict.fromkeys(SLICES, 1) | {"unlike spans": 3, "rows and columns": 2}


@pytest.mark.parametrize("how", [dict(rows=[(0, 1)]), dict(columns=(0, 32)), dict(columns=(0, 64))])
def test_a_cut_block_is_refused(how: dict[str, Any]) -> None:
    packed, state = quantized(64, 96, torch.bfloat16, False)
    with pytest.raises(AssertionError, match="cuts a block"):
        nf4.dequantize(packed, state, **how)


@pytest.mark.parametrize(
    "out",
    [torch.empty(96, 191), torch.empty(96, 192, dtype=torch.float16), torch.empty(192, 96).T],
    ids=["shape", "dtype", "strides"],
)
def test_memory_that_does_not_fit_is_refused(out: torch.Tensor) -> None:
    packed, state = quantized(ROWS, COLUMNS, torch.float32, False)
    with kernels.using("torch"), pytest.raises(AssertionError, match="not memory for"):
        nf4.dequantize(packed, state, out=out)
