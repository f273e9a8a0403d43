"""Products of a matrix with a few vectors at once, computed with the long side of the result contiguous.

MKL takes up to twice as long where the short side is contiguous, as it is after ``vmap`` of a product with one vector.
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
    """Inside, a product A B with few columns is computed as (Bᵀ Aᵀ)ᵀ."""

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if operation is _mm and args[1].shape[1] <= min(_MOST, args[0].shape[0]) and _dense(*args):
            return _mm(args[1].mT, args[0].mT).mT
        return operation(*args, **(kwargs or {}))


def _dense(*matrices: torch.Tensor) -> bool:
    return all(matrix.layout is torch.strided for matrix in matrices)
