"""units.py: sizes as people write and read them."""

from __future__ import annotations

import pytest

from qlora_phi3.units import format_bytes, parse_bytes

MIB, GIB = 1024**2, 1024**3


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 * GIB),
        ("8GB", 8 * GIB),
        ("8", 8 * GIB),
        (" 8 gib ", 8 * GIB),
        ("8G", 8 * GIB),
        ("7.5GiB", 15 * GIB // 2),
        ("512MiB", 512 * MIB),
        ("1TB", 1024 * GIB),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "x", "0", "-8GiB", "8 GiBs", "GiB", "8B", "1e3", "8,5GiB", "auto", "\u0668GiB", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="8GiB, 8GB, 512MiB or 8, which is GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 * MIB, "5.00 MiB"), (3_446_711_214, "3.21 GiB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
