"""What the tests of kernels share: the devices a kernel runs on, inputs, and how close is the same."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from qlora_phi3 import kernels

TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-10),
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=2**-6, atol=2**-6),  # two roundings of 2^-8, and what they are summed to
}
SAME = {
    torch.float32: dict(rtol=5e-6, atol=5e-6),
    torch.bfloat16: dict(rtol=2**-7, atol=1e-4),  # one last bit, where a float32 lies between two
}
"""For two implementations that round at the same places."""

dtypes = pytest.mark.parametrize("dtype", list(SAME), ids=lambda one: str(one).removeprefix("torch."))
precisions = pytest.mark.parametrize(
    "dtype", list(TOLERANCE), ids=lambda one: str(one).removeprefix("torch.")
)
devices = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)
"""Where a kernel is compared with its reference: in Triton's interpreter, and on a card."""


def needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


@contextmanager
def triton_on(device: str) -> Iterator[None]:
    """Kernels inside the body, in the interpreter on a CPU."""
    needs_triton()
    if device == "cuda":
        with kernels.using("triton"):
            yield
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 has to be there before triton; test_interpreter.py sees to it")
    with _rounds_to_nearest(), kernels.using("triton"):
        yield


def draw(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def twin_of(x: torch.Tensor) -> torch.Tensor:
    """The same in float64, for autograd."""
    return x.to(torch.float64, copy=True).requires_grad_()


@contextmanager
def _rounds_to_nearest() -> Iterator[None]:
    """Triton's interpreter (3.7 to 3.9) cuts a float32's last bits off where a card rounds it to bfloat16."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        # numpy has no bfloat16; 0-d arrays are handed on as they are
        wide = torch.tensor(data, dtype=torch.float32)
        return wide.to(torch.bfloat16).view(torch.int16).numpy().view("uint16")

    with mock.patch.object(interpreter, "_convert_float", rounded):
        yield
