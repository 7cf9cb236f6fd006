"""Bytes as people write them."""

from __future__ import annotations

import re
from typing import Final

_POWERS: Final = {"": 3, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)
HOW_TO_WRITE: Final = "a size such as 8GiB, 8GB, 512MiB or 8, which is GiB"


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB"; "8GB" and "8" mean the same, as on the box of a card with 8 x 1024^3 bytes.

    Raises:
        ValueError: no positive size -> how to write one.
    """
    found = _SIZE.fullmatch(text.strip())
    # a bare "b" behind the number would be a card of eight bytes
    if found is None or not float(found[1]) or (found[3] and not found[2]):
        raise ValueError(f"needs {HOW_TO_WRITE}")
    return int(float(found[1]) * 1024 ** _POWERS[found[2].lower()])


def format_bytes(num_bytes: int) -> str:
    """Bytes for people, in powers of 1024: "3.21 GiB"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(num_bytes) >= 1024**power:
            return f"{num_bytes / 1024**power:.2f} {unit}"
    return f"{num_bytes} B"
