"""Kernels without a card: in Triton's interpreter, and compiled for cards that are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_lab import draw, needs_triton

from qlora_phi3 import kernels
from qlora_phi3.kernels import backend, cross_entropy, nf4, rms_norm, rope, swiglu

FOLDER = Path(__file__).parent


@pytest.mark.slow
def test_all_comparisons_in_the_interpreter() -> None:
    """In a process of its own: TRITON_INTERPRET counts when triton is imported, which bitsandbytes does."""
    needs_triton()
    line = [sys.executable, "-m", "pytest", "-m", "interpreter", "-p", "no:cacheprovider", "-rs", str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=environment, cwd=FOLDER.parents[1]
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\b\d{3} passed", last) and "skipped" not in last, last


@pytest.mark.interpreter
def test_nothing_else_is_interpreted() -> None:
    """That the process is one of the interpreter: compiled kernels on CPU tensors would fail, not compare."""
    needs_triton()
    assert type(backend._compiled(backend._probe)).__name__ == "InterpretedFunction"


# --- compiled, for a card with compute capability 7.5 (float16), 8.0, 9.0


def launches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of each kernel, by name: itself and what it is launched with, at Phi-3-mini's widths."""
    found: dict[str, Any] = {}

    def noting(kernel: Any) -> Any:
        name = kernel.__module__.rpartition(".")[2] + kernel.__name__

        def note(*arguments: Any, **constants: Any) -> None:
            found[name] = kernel, arguments, constants

        return defaultdict(lambda: note)  # whatever the programs are

    monkeypatch.setattr(backend, "_compiled", noting)
    import bitsandbytes.functional as bnb

    x, weight = draw(2, 3072, dtype=dtype), draw(3072, dtype=dtype)
    packed, state = bnb.quantize_4bit(
        draw(16, 6144, dtype=dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    with kernels.using("triton"):
        rms_norm.forward(x, weight, 1e-5)
        rms_norm.backward(x, x, weight, 1e-5)
        rope.rotate_(x.view(2, 32, 96), x[:, :96], x[:, :96], back=True)
        swiglu.forward(*x.chunk(2, dim=1))
        swiglu.backward_(x[:, :1536], *x.chunk(2, dim=1), product=True)
        nf4.dequantize(packed, state, columns=(2048, 4096))
        cross_entropy.nll_and_error_(torch.zeros(2, 32064), torch.zeros(2, 1, dtype=torch.int64))
    return found


TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


def compiled(kernel: Any, arguments: Any, constants: dict[str, Any], capability: int) -> Any:
    """As a launch compiles it: a 1 is a constant, and what 16 divides is known to be so."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = backend._compiled(kernel)
    options = {name: value for name, value in constants.items() if name not in function.arg_names}
    constexprs = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, known = dict.fromkeys(function.arg_names, "constexpr"), {}
    for place, value in enumerate(arguments):
        name = function.arg_names[place]
        if not torch.is_tensor(value) and value == 1:
            constexprs[name] = value
            continue
        plain = "fp32" if isinstance(value, float) else "i32"
        signature[name] = TYPES[value.dtype] if torch.is_tensor(value) else plain
        if torch.is_tensor(value) or value % 16 == 0:
            known[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=known)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(75, torch.float16), (80, torch.bfloat16), (90, torch.bfloat16)]
)
def test_every_kernel_compiles_to_a_card_s_code(
    capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_triton()
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patched:
        found = launches(dtype, patched)
    assert len(found) == 7
    for name, (kernel, arguments, constants) in found.items():
        made = compiled(kernel, arguments, constants, capability)
        assert len(made.asm["cubin"]) > 1000, name
        # 16 bytes at once, wherever a matrix is written
        assert "st.global.v4.b32" in made.asm["ptx"] and ".local" not in made.asm["ptx"], name
        if name == "nf4_kernel":
            # a product that is rounded before it is summed, or bits are not bitsandbytes'
            assert "fma." not in made.asm["ptx"]
            assert "add" in made.asm["ptx"] and "mul" in made.asm["ptx"]
