"""Products of a matrix with a few unit vectors at once, without a sum over zeros, and with the long side of a result contiguous.

``vmap`` turns products with one vector into a product with a matrix whose short side is contiguous. MKL takes up to
twice as long for it. If the vectors are unit vectors, the product is a selection of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ThinProducts"]

_mm = torch.ops.aten.mm.default
# The largest number of vectors.
_MOST = 64


class ThinProducts(TorchDispatchMode):
    """Inside, A Uᵀ is a selection of columns of A, and another product A B with few columns is computed as (Bᵀ Aᵀ)ᵀ.

    Parameters
    ----------
    units, places
        U (k, n), whose rows are unit vectors, and the places (k,) of their ones.
    """

    def __init__(self, units: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__()
        self._units, self._places = units, places

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if operation is not _mm or not all(matrix.layout is torch.strided for matrix in args):
            return operation(*args, **(kwargs or {}))
        left, right = args
        if _same(right, self._units.mT):
            return left.index_select(1, self._places)
        if right.shape[1] <= min(_MOST, left.shape[0]):
            return _mm(right.mT, left.mT).mT
        return _mm(left, right)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()
