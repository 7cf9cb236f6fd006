"""pyproject.toml names every package that ours imports: what another one brings may leave with it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qlora_phi3"
OPTIONAL = {"loralib", "mlx", "mlx_lm", "pynvml", "triton", "xllamacpp"}
"""Asked for by name where they are needed, with a message where they are missing."""
CALLED = {"yaml": "pyyaml", "pydantic_core": "pydantic"}
"""Modules that have another name than what brings them."""


def imported() -> set[str]:
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module)
    tops = {name.partition(".")[0] for name in found}
    return {CALLED.get(name, name) for name in tops - set(sys.stdlib_module_names) - {PACKAGE.name}}


def declared() -> set[str]:
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    names = re.findall(r'^\s*"([A-Za-z0-9_.-]+)', block, re.MULTILINE)
    return {name.lower().replace("-", "_") for name in names}


def test_what_is_imported_is_declared() -> None:
    assert {"torch", "numpy"} < declared() & imported()
    assert imported() - declared() - OPTIONAL == set()


def test_nothing_else_is_declared() -> None:
    """But accelerate, without which transformers loads nothing in 4 bit, and TRL does not train."""
    assert declared() - imported() == {"accelerate"}


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest would take the second for the first, and fail or run it twice; files that run alone hide it."""
    paths = [path for top in ("tests", "bench") for path in (PACKAGE.parent / top).rglob("*.py")]
    names = [path.name for path in paths if path.name != "__init__.py" and path.parts[-2] != "bench"]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
