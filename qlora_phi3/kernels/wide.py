"""The dtype that sums are made in."""

from __future__ import annotations

import torch


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """float32; of float64, which only tests have, float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
