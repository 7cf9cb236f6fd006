"""What a process is told before torch and the libraries on it are imported, and what they keep to themselves.

Owns how threads wait, how freed memory goes back to the system, and which of the libraries' messages reach
nobody. What a user has set in the environment stays. No torch before it is asked for.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import warnings
from typing import Final

KEPT_KERNELS: Final = 128
"""Compiled kernels that oneDNN and torch's layer above it keep, each; a pass needs about 60.

They are made for one number of tokens, and passes without padding have ever new ones: with the default of
1024 the quickstart kept 24 MB more every step, strewn over the heap, and ended at 3.6 instead of 2.4 GiB.
With 32 every step made its own anew, at a tenth of the speed.
"""

MMAP_BYTES: Final = 4 * 1024**2
"""Tensors from here on go back to the system when freed. glibc raises its own threshold to 32 MiB as it goes;
then tensors of ever other sizes leave holes: after six quickstart steps 2.4 GiB resident against 2.1."""

_M_MMAP_THRESHOLD: Final = -3
"""From glibc's malloc.h."""


def prepare() -> None:
    """Set what has to be set before torch and the hub's library are imported."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when huggingface_hub is imported
    # How long threads spin while they wait. On two quiet cores six steps of the quickstart took 27-30 s when
    # they never did, 21 s at 1000, 18 s at 4000; beside two busy programs 38 s never, 53 s at 4000, 77 s at
    # 20000, and with OpenMP's own default a step was ten times slower.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))
    _give_back_large()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # transformers would spread over all of them
    # bitsandbytes advises to install `kernels`, which would let a checkpoint run code (CVE-2026-4372)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _give_back_large() -> None:
    """Have glibc give large tensors back when they are freed; elsewhere nothing."""
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ or os.name != "posix":
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, MMAP_BYTES)


def give_back() -> None:
    """Have what was freed leave the process, where glibc keeps it: after a phase that took much."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def quiet() -> None:
    """Prepare, and import the libraries without telemetry and chatter; a run itself says what matters."""
    prepare()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # is a note
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
