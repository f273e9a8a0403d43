"""Sparse tensors with right derivatives of every order, where torch's own are wrong or missing.

The backward of ``torch.sparse_coo_tensor`` records no graph. In torch 2.13 a second derivative with respect to the
values is silently wrong, on plain tensors too; it is zero if all of it leads through them. Other operations on the
sparse tensor are either right twice, or raise. Here the construction, and its transpose, which takes the entries at the
same places, are two linear maps, each the derivative of the other.

A product with a sparse matrix that is differentiated is computed from its entries, because torch cannot add dense and sparse gradients. A constant in
compressed layout (CSR, CSC, BSR, BSC), which torch.func does not support, is converted to coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bilevel._torch.transforms import carries_gradient, signed, transforms_active

__all__ = ["SPARSE"]


@signed
class _Placed(torch.autograd.Function):
    """The sparse tensor of shape ``size`` with ``values`` (k, ...) at ``indices`` (d, k)."""

    @staticmethod
    def forward(values: torch.Tensor, indices: torch.Tensor, size: tuple[int, ...], options: dict[str, Any]) -> Any:
        return torch.sparse_coo_tensor(indices, values, size, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, indices, ctx.size, ctx.options = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (indices,) = ctx.saved_tensors
        return _Taken.apply(grad, indices, ctx.size, ctx.options), None, None, None

    @staticmethod
    def jvp(ctx: Any, values: torch.Tensor, *_: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return _Placed.apply(values, indices, ctx.size, ctx.options)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise _no_batch()


@signed
class _Taken(torch.autograd.Function):
    """The entries (k, ...) of ``grad``, a dense or sparse tensor of shape ``size``, at ``indices`` (d, k)."""

    @staticmethod
    def forward(grad: torch.Tensor, indices: torch.Tensor, size: tuple[int, ...], options: dict[str, Any]) -> Any:
        if not grad.is_sparse:
            return grad[tuple(indices)]
        with torch.enable_grad():
            shape = (indices.shape[1], *size[indices.shape[0] :])
            values = grad.new_zeros(shape, layout=torch.strided).requires_grad_(True)
            placed = torch.sparse_coo_tensor(indices, values, size, **options)
            return torch.autograd.grad(placed, values, grad)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad, indices, ctx.size, ctx.options = inputs
        ctx.is_sparse = grad.is_sparse
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, values: torch.Tensor) -> tuple[Any, ...]:
        (indices,) = ctx.saved_tensors
        placed: torch.Tensor = _Placed.apply(values, indices, ctx.size, ctx.options)
        return placed if ctx.is_sparse else placed.to_dense(), None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return _Taken.apply(grad, indices, ctx.size, ctx.options)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise _no_batch()


def _sparse_coo_tensor(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return what ``torch.sparse_coo_tensor`` does, differentiable any number of times."""
    call = {**dict(zip(("indices", "values", "size"), args, strict=False)), **kwargs}
    values = call.pop("values", None)
    if not isinstance(values, torch.Tensor) or not carries_gradient(values) or call.get("requires_grad"):
        return torch.sparse_coo_tensor(*args, **kwargs)
    values = values.to(dtype=call.pop("dtype", None), device=call.pop("device", None))
    indices = torch.as_tensor(call.pop("indices"), device=values.device)
    size = call.pop("size", None)
    if size is None:
        size = torch.sparse_coo_tensor(indices, values.detach()).shape
    placed: torch.Tensor = _Placed.apply(values, indices, tuple(size), call)
    placed._entries = (indices, values)  # type: ignore[attr-defined]
    return placed


def _no_batch() -> RuntimeError:
    return RuntimeError("Batching rule not implemented for a sparse tensor of batched values")


# What torch calls a matrix with a layout of its own for rows, columns or blocks.
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _in_coordinates(item: Any) -> Any:
    """Return ``item``, or a compressed tensor that is not differentiated in coordinates."""
    if not isinstance(item, torch.Tensor) or item.layout not in _COMPRESSED or item.requires_grad:
        return item
    with torch._C._DisableFuncTorch():
        return item.to_sparse_coo()


def _uncompressed(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def of_coordinates(*args: Any, **kwargs: Any) -> Any:
        return theirs(*map(_in_coordinates, args), **kwargs)

    return of_coordinates


def _product(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def product(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_in_coordinates, args))
        if kwargs or len(args) != 2 or not all(isinstance(arg, torch.Tensor) for arg in args):
            return theirs(*args, **kwargs)
        if _made_of_entries(*args):
            return _entry_by_entry(*args, *args[0]._entries)
        # torch cannot batch the backward of a product with a sparse constant, as torch.func.jacrev does.
        if transforms_active() and _is_constant(*args):
            with torch._C._DisableFuncTorch():
                constant = args[0].detach().coalesce()
                entries = constant.indices(), constant.values()
            return _entry_by_entry(*args, *entries)
        return theirs(*args)

    return product


def _made_of_entries(matrix: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether ``matrix`` is a sparse one made of values above, and ``x`` a dense matrix or vector that fits."""
    return hasattr(matrix, "_entries") and _fits(matrix, x)


def _is_constant(matrix: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether ``matrix`` is a sparse one of coordinates that nothing is differentiated by, and ``x`` a dense matrix or vector that fits."""
    return matrix.layout is torch.sparse_coo and not carries_gradient(matrix) and _fits(matrix, x)


def _fits(matrix: torch.Tensor, x: torch.Tensor) -> bool:
    if matrix.ndim != 2 or matrix.dense_dim() != 0 or matrix.dtype != x.dtype:
        return False
    return x.ndim in (1, 2) and x.layout is torch.strided and len(x) == matrix.shape[1]


def _entry_by_entry(matrix: Any, x: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` @ ``x``, of the ``values`` of the matrix at ``places`` (2, k)."""
    rows, columns = places
    entries = values.reshape(-1, *[1] * (x.ndim - 1)) * x[columns]
    return x.new_zeros(matrix.shape[0], *x.shape[1:]).index_add(0, rows, entries)


_Tensor: Any = torch.Tensor
_PRODUCTS = (
    torch.sparse.mm,
    torch.mm,
    torch.mv,
    torch.matmul,
    _Tensor.mm,
    _Tensor.mv,
    _Tensor.matmul,
    _Tensor.__matmul__,
)
_OTHERS = (
    torch.sparse.addmm, torch.addmm, torch.addmv, torch.t, torch.transpose, torch.mul, _Tensor.__rmatmul__, _Tensor.t, _Tensor.transpose,
    _Tensor.mul, _Tensor.__mul__, _Tensor.__rmul__, _Tensor.to_dense, _Tensor.T.__get__, _Tensor.mT.__get__,
)  # fmt: skip

# What stands for torch's own functions.
SPARSE: dict[Any, Callable[..., Any]] = {
    torch.sparse_coo_tensor: _sparse_coo_tensor,
    **{theirs: _product(theirs) for theirs in _PRODUCTS},
    **{theirs: _uncompressed(theirs) for theirs in _OTHERS},
}
