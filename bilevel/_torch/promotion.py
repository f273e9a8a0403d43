"""Evaluate a function in a wider dtype than that of tensors which it reaches through its closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Promoted"]


class Promoted(TorchFunctionMode):
    """Inside, an operation on real floating-point tensors of several dtypes gets them all in the widest of these.

    torch does so for elementwise operations, and refuses it for products such as ``A @ x``.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, structure = pytree.tree_flatten((args, kwargs))
        dtypes = {leaf.dtype for leaf in leaves if _is_real(leaf)}
        if len(dtypes) > 1:
            widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
            leaves = [leaf.to(widest) if _is_real(leaf) and leaf.dtype != widest else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, structure)
        return function(*args, **kwargs)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
