"""Products of many factors, of multiplications alone, because torch's own ``prod`` and ``cumprod`` are differentiated by division.

torch computes ∂(Π x)/∂x_i as (Π x)/x_i. A second derivative divides by x_i twice. In torch 2.13 its digits are lost where
a factor is small, and near 1e-17 nothing is left of them: ∂²(x₀ x₁)/∂x₀² comes out as 0.5 or 2 and not as 0. Third derivatives
are lost earlier. Exactly at zero torch has another formula, which is right. Nested forward mode of ``cumprod`` is wrong
at zero (pytorch/pytorch#196701). No issue was found for small factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["PRODUCTS"]


def _product(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return Π x over the axis ``dim``, which becomes one of size 1: neighbours are multiplied until one factor is left."""
    x = x.movedim(dim, 0)
    while len(x) > 1:
        pairs = x[0 : len(x) - 1 : 2] * x[1::2]
        x = torch.cat([pairs, x[-1:]]) if len(x) % 2 else pairs
    return x.movedim(0, dim)


def _cumulative(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the products of the first 1, 2, ... factors along ``dim``: after a step each has twice as many factors."""
    x, step = x.movedim(dim, 0), 1
    while step < len(x):
        x, step = torch.cat([x[:step], x[step:] * x[:-step]]), 2 * step
    return x.movedim(0, dim)


def _is_written(x: Any, dtype: torch.dtype | None, options: dict[str, Any]) -> bool:
    """Return whether the product is of real or complex numbers in an ordinary tensor, and nothing unusual is asked for."""
    if options or not isinstance(x, torch.Tensor) or x.layout is not torch.strided or not x.numel():
        return False
    kind = x.dtype if dtype is None else dtype
    return kind.is_floating_point or kind.is_complex


def _prod(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def prod(
        input: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, **options: Any
    ) -> torch.Tensor:
        if not _is_written(input, dtype, options) or not (dim is None or type(dim) is int):
            where = () if dim is None else (dim, keepdim)
            return theirs(input, *where, dtype=dtype, **options)
        x = input if dtype is None else input.to(dtype)
        if dim is None or not x.ndim:
            return _product(x.reshape(-1), 0)[0]
        found = _product(x, dim)
        return found if keepdim else found.squeeze(dim)

    return prod


def _cumprod(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def cumprod(input: torch.Tensor, dim: Any, *, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        if not _is_written(input, dtype, options) or type(dim) is not int or not input.ndim:
            return theirs(input, dim, dtype=dtype, **options)
        return _cumulative(input if dtype is None else input.to(dtype), dim)

    return cumprod


PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.prod: _prod(torch.prod),
    torch.Tensor.prod: _prod(torch.Tensor.prod),
    torch.cumprod: _cumprod(torch.cumprod),
    torch.Tensor.cumprod: _cumprod(torch.Tensor.cumprod),
}
