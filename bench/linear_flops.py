"""Operations of matrix products with a layer's weights, counted as they run."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from qlora_phi3.phi3 import LINEARS, Geometry


class LinearFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is not typed
    """While active, counts operations of products in which one factor has the shape of a decoder linear.

    A trained A or B has another shape, unless its rank is as large as a layer is wide.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        shapes = {geometry.linear_shape(name) for name in LINEARS}
        self._shapes, self.total = shapes | {shape[::-1] for shape in shapes}, 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = operation._schema.name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = arguments[-2:]
            if tuple(right.shape) in self._shapes:
                self.total += 2 * left.shape[0] * prod(right.shape)
        elif name == "bitsandbytes::gemm_4bit":
            x, shape = arguments[0], arguments[2]
            self.total += 2 * x.numel() // x.shape[-1] * prod(shape)
        return operation(*arguments, **(named or {}))
