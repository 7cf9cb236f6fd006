"""LoRA adapters as plain tensor dicts: what they hold, how each consumer lays them out, exact conversions.

Owns the layouts (fused, split, unfused, loralib, loralib_merged, mlx), their checks and their files.
Refuses whatever would change the function of the adapter or be read differently by a consumer.
"""

from .config import LAYOUTS, AdapterConfig, Layout
from .conversion import convert
from .files import read_adapter, write_adapter
from .names import Tensors
from .pairs import check, detect

__all__ = [
    "LAYOUTS",
    "AdapterConfig",
    "Layout",
    "Tensors",
    "check",
    "convert",
    "detect",
    "read_adapter",
    "write_adapter",
]
