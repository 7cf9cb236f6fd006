"""Which implementation computes, and that the package does without Triton."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_phi3 import kernels
from qlora_phi3.kernels import backend, rms_norm

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
CHECKOUT = Path(kernels.__file__).parents[2]


@pytest.fixture
def triton_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_works", lambda device, dtype: True)


@pytest.mark.usefixtures("triton_works")
def test_cards_take_kernels_where_they_lose_nothing() -> None:
    assert backend.takes_triton(CARD, torch.bfloat16, torch.bfloat16)
    assert not backend.takes_triton(CARD, torch.bfloat16, torch.float32)
    assert not backend.takes_triton(CARD, torch.float64)
    assert not backend.takes_triton(CPU, torch.float32)


@pytest.mark.usefixtures("triton_works")
def test_a_choice_ends_with_its_body_and_reaches_other_threads() -> None:
    def fail() -> None:
        thread = threading.Thread(target=lambda: seen.append(backend.takes_triton(CPU, torch.float32)))
        with kernels.using("triton"):
            thread.start()
            thread.join()
            raise KeyError

    seen: list[bool] = []
    with kernels.using("torch"):
        assert not backend.takes_triton(CARD, torch.float32)
        with pytest.raises(KeyError):
            fail()
        assert seen == [True] and not backend.takes_triton(CARD, torch.float32)
    assert backend.takes_triton(CARD, torch.float32)


def test_a_kernel_that_would_round_is_refused() -> None:
    x = torch.ones(2, 4, dtype=torch.float64)
    with kernels.using("triton"), pytest.raises(AssertionError, match="float64"):
        rms_norm.forward(x, x[0], 1e-5)


def test_a_card_that_triton_does_not_know_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **constants: Any) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(backend, "launch", fails)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: torch.empty(1, dtype=dtype))
    backend._works.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match=r"off on cuda:0 in torch.float16.*Failed to find C compiler\. "
        ):
            assert not backend.takes_triton(CARD, torch.float16)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not backend.takes_triton(CARD, torch.float16)
    finally:
        backend._works.cache_clear()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    backend._works.cache_clear()
    try:
        assert not backend.takes_triton(CARD, torch.float32)
    finally:
        backend._works.cache_clear()


def test_importing_and_computing_on_a_cpu_never_imports_triton() -> None:
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import torch\nfrom qlora_phi3.kernels import cross_entropy, nf4, rms_norm, rope, swiglu\n"
        "x = torch.ones(2, 4)\nrms_norm.forward(x, x[0], 1e-5)\nswiglu.forward(x, x)\n"
        "rope.rotate_(x.view(2, 1, 4), x, x)\nrms_norm.backward(x, x, x[0], 1e-5)\n"
        "cross_entropy.nll_and_error_(x, torch.zeros(2, 1, dtype=torch.int64))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=CHECKOUT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("length", "block"), [(0, 1), (1, 1), (2, 2), (3, 4), (3072, 4096), (4096, 4096)])
def test_blocks_are_powers_of_two(length: int, block: int) -> None:
    assert backend.block_of(length) == block
    assert 1 <= backend.warps_of(block) <= 16


def test_rows_whose_columns_lie_apart_are_refused() -> None:
    assert backend.row_stride(torch.empty(3, 8)[:, 2:4]) == 8
    with pytest.raises(AssertionError, match="side by side"):
        backend.row_stride(torch.empty(3, 8).T)


@pytest.mark.gpu
def test_a_card_takes_kernels_by_itself() -> None:
    assert backend.takes_triton(CARD, torch.float32)
