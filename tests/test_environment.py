"""The machine's checks: what passes, what is found, and bitsandbytes really run on this device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from qlora_phi3 import environment
from qlora_phi3.environment import (
    MIN_MEMORY_BYTES,
    check_device,
    check_disks,
    check_memory,
    check_modules,
    check_self_test,
    check_versions,
    expected_versions,
    nf4_errors,
    optimizer_error,
)

CHECKOUT = Path(environment.__file__).parent.parent


@pytest.mark.parametrize(
    ("version", "wanted", "code"),
    [
        ("2.13.0", "torch==2.13.0", None),
        ("2.13.0+cpu", "torch==2.13.0", None),
        ("2.13.1", "torch==2.13.0", "other-version"),
        ("2.14.0.dev1", "torch>=2.10", None),
        ("2.9", "torch>=2.10", "other-version"),
        ("2.9", "numpy>=3", None),
        (None, "torch>=2.10", "missing-package"),
    ],
)
def test_versions(version: str | None, wanted: str, code: str | None) -> None:
    found = check_versions({"torch": version}, "constraints.txt", [Requirement(wanted)])
    assert [one.code for one in found] == ([code] if code else [])


def test_names_are_compared_without_case() -> None:
    (found,) = check_versions({"PyYAML": "5.0"}, "constraints.txt", [Requirement("pyyaml==6.0.3")])
    assert found.places == ("PyYAML 5.0, expected ==6.0.3",)


def test_a_checkout_is_compared_with_its_constraints() -> None:
    source, found = expected_versions()
    pinned = {one.name: str(one.specifier) for one in found}
    assert source == "constraints.txt"
    assert f"torch{pinned['torch']}" in (CHECKOUT / "constraints.txt").read_text().splitlines()


def test_an_installed_package_is_compared_with_its_requirements(tmp_path: Path) -> None:
    source, found = expected_versions(tmp_path / "constraints.txt")
    names = {one.name for one in found}
    assert source == "the package's requirements"
    assert {"torch", "bitsandbytes"} <= names and not {"pytest", "triton"} & names


def test_lines_that_are_no_requirement_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text(
        "# tested\n\n--only-binary :all:\ntorch==2.13.0  # pinned\nwin==1; platform_system == 'x'\n"
    )
    assert [str(one) for one in expected_versions(path)[1]] == ["torch==2.13.0"]


@pytest.mark.parametrize(
    ("kind", "driver", "bf16", "codes"),
    [
        ("cpu", None, True, []),
        ("cuda", "570.1", True, []),
        ("cpu", "570.1", True, ["gpu-unseen"]),
        ("cuda", "570.1", False, ["no-bf16"]),
    ],
)
def test_devices(kind: str, driver: str | None, bf16: bool, codes: list[str]) -> None:
    assert [one.code for one in check_device("name", kind, driver, bf16)] == codes


def test_bitsandbytes_computes_rightly_here() -> None:
    device = torch.device("cpu")
    errors = {**nf4_errors(device), "optimizer": optimizer_error(device)}
    assert check_self_test(errors) == []
    assert errors["quantization"] > 0.05  # four bits cannot do better: the test has seen them


def test_bitsandbytes_is_found_out_where_it_is_wrong() -> None:
    """0.50 dequantizes widths that are no multiple of 64 wrongly on a CPU."""
    (found,) = check_self_test(nf4_errors(torch.device("cpu"), size=96))
    assert (found.grade, found.code) == ("error", "bitsandbytes-wrong")
    assert found.places[0].startswith("quantization: ")


@pytest.mark.parametrize(
    ("errors", "wrong"),
    [
        ({"matmul": 0.02, "optimizer": 0.0}, []),
        ({"matmul": 0.021, "optimizer": 0.0}, ["matmul"]),
        ({"matmul": math.nan, "optimizer": math.inf}, ["matmul", "optimizer"]),
    ],
)
def test_the_self_test_has_limits(errors: Mapping[str, float], wrong: list[str]) -> None:
    places = [place for one in check_self_test(errors) for place in one.places]
    assert [place.split(":")[0] for place in places] == wrong


@pytest.mark.parametrize(("missing", "codes"), [(0, []), (1, ["little-memory"])])
def test_memory(missing: int, codes: list[str]) -> None:
    found = check_memory(MIN_MEMORY_BYTES - missing)
    assert [one.code for one in found.findings] == codes
    assert found.facts == {"memory_free_bytes": MIN_MEMORY_BYTES - missing}


def test_disks_of_folders_that_are_still_to_be_made(tmp_path: Path) -> None:
    folders = {"cache": tmp_path / "a" / "b", "here": tmp_path}
    found = check_disks(folders, least=0)
    assert found.findings == ()
    free, total = found.facts["disk_free_bytes"], psutil.disk_usage(str(tmp_path)).total
    assert set(free) == {"cache", "here"} and all(0 < size <= total for size in free.values())
    (little,) = check_disks({"cache": tmp_path / "a"}, least=2 * total).findings
    assert little.code == "little-disk" and str(tmp_path / "a") in little.places[0]


@pytest.mark.parametrize(
    ("pip", "kernels", "codes"),
    [(True, False, []), (False, False, ["no-pip"]), (True, True, ["kernels"])],
)
def test_packages_that_matter_by_being_there(pip: bool, kernels: bool, codes: list[str]) -> None:
    found = check_modules({"pip": pip, "kernels": kernels})
    assert [one.code for one in found.findings] == codes
    assert all("CVE-2026-4372" in one.what for one in found.findings if one.code == "kernels")
