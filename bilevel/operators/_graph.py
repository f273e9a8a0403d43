"""Operators that are derivatives: linearised once, one reverse pass over the graph for each product."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch.func import vmap

from bilevel._torch.reverse import reverse_pass
from bilevel.operators._base import LinearOperator

__all__ = [
    "GaussNewtonOperator",
    "HessianOperator",
    "JacobianOperator",
    "gauss_newton",
    "hessian",
    "jacobian",
]


def _pull(output: torch.Tensor, point: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One reverse pass over a retained graph: vᵀ ∂output/∂point, zero where the graph does not reach."""
    if not output.requires_grad:
        return v.new_zeros(v.shape[:-1] + point.shape[-1:])
    return reverse_pass([output], [point], [v])[0]


def _pull_many(output: torch.Tensor, point: torch.Tensor, vs: torch.Tensor) -> torch.Tensor:
    if not len(vs):
        return torch.empty_like(vs)
    try:
        # torch.func's vmap, not is_grads_batched: that one is an older vmap which knows fewer operations.
        return vmap(lambda v: _pull(output, point, v))(vs)
    except RuntimeError:
        # Some operation in the graph has no batching rule: one pass for each vector instead.
        return torch.stack([_pull(output, point, v) for v in vs])


class HessianOperator(LinearOperator):
    """The Hessian H = ∂gradient/∂point by its products alone: each is one reverse pass through the gradient's autograd graph.

    Parameters
    ----------
    gradient
        ∇G (batch, n), computed from ``point`` with ``create_graph=True``. Each row depends on the same row of ``point`` alone.
    point
        Where H is taken (batch, n); it requires grad.
    positive_definite, expect_definite
        See :class:`LinearOperator`.
    materialize
        A function that returns H as matrices (batch, n, n), faster than n products with unit vectors; None if there is none.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import HessianOperator
    >>> point = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> HessianOperator(4 * point**3, point) @ torch.ones(1, 2)
    tensor([[12., 48.]])
    """

    def __init__(
        self,
        gradient: torch.Tensor,
        point: torch.Tensor,
        *,
        positive_definite: bool = False,
        expect_definite: bool = False,
        materialize: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(
            point.shape[0], point.shape[1], point.dtype, point.device, symmetric=True,
            positive_definite=positive_definite, expect_definite=expect_definite, materialize=materialize,
        )  # fmt: skip
        self._gradient, self._point = gradient, point

    @property
    def point(self) -> torch.Tensor:
        """The leaf (batch, n) that the gradient was computed from."""
        return self._point

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return _pull(self._gradient, self._point, v)

    rmatvec = matvec

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return _pull_many(self._gradient, self._point, vs)

    rmatmat = matmat


class JacobianOperator(LinearOperator):
    """J = ∂residual/∂point of a residual that still has its graph.

    Jᵀv is one reverse pass. J v is a reverse pass over that (linear) reverse pass. Its graph is built at the first product
    and kept. Dual numbers would not nest inside a custom Function.

    Parameters
    ----------
    residual
        (batch, n), computed from ``point`` with a graph, each row from its own row.
    point
        (batch, n), requires grad.
    materialize
        Returns the matrices (batch, n, n), faster than products with the unit vectors; None if there is no such way.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import JacobianOperator
    >>> point = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> JacobianOperator(point.flip(-1) * 3, point) @ torch.tensor([[1.0, 0.0]])
    tensor([[0., 3.]])
    """

    def __init__(
        self,
        residual: torch.Tensor,
        point: torch.Tensor,
        *,
        materialize: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(point.shape[0], point.shape[1], point.dtype, point.device, materialize=materialize)
        self._residual, self._point = residual, point

    @property
    def point(self) -> torch.Tensor:
        """The leaf (batch, n) that the residual was computed from."""
        return self._point

    @cached_property
    def _transposed_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            dummy = torch.zeros_like(self._residual, requires_grad=True)
            (product,) = reverse_pass([self._residual], [self._point], [dummy], create_graph=True)
        return product, dummy

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        if not self._residual.requires_grad:
            return torch.zeros_like(v)
        return _pull(*self._transposed_pass, v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return _pull(self._residual, self._point, v)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        if not self._residual.requires_grad:
            return torch.zeros_like(vs)
        return _pull_many(*self._transposed_pass, vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return _pull_many(self._residual, self._point, vs)


class GaussNewtonOperator(LinearOperator):
    """Jᵀ L J, with J = ∂outputs/∂point and L the Hessian of the loss with respect to the outputs.

    It is positive semi-definite for a convex loss. It equals the Hessian only if the residuals vanish or the outputs are
    linear in ``point``; otherwise it is an approximation.

    Parameters
    ----------
    outputs
        (batch, m), computed from ``point`` with a graph.
    loss_gradient
        The gradient of the loss with respect to the outputs (batch, m), computed from ``at`` with a graph.
    at
        (batch, m): the outputs as a leaf that requires grad.
    point
        (batch, n), requires grad.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import GaussNewtonOperator
    >>> point = torch.tensor([[3.0]], requires_grad=True)
    >>> outputs = point**2
    >>> at = outputs.detach().requires_grad_()
    >>> GaussNewtonOperator(outputs, 2 * at, at, point) @ torch.ones(1, 1)  # (2x)² · 2
    tensor([[72.]])
    """

    def __init__(
        self, outputs: torch.Tensor, loss_gradient: torch.Tensor, at: torch.Tensor, point: torch.Tensor
    ) -> None:
        super().__init__(point.shape[0], point.shape[1], point.dtype, point.device, symmetric=True)
        self._outputs, self._point = outputs, point
        self._loss_gradient, self._at = loss_gradient, at
        with torch.enable_grad():
            self._dummy = torch.zeros_like(outputs, requires_grad=True)
            (self._pass,) = reverse_pass([outputs], [point], [self._dummy], create_graph=True)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        pushed = _pull(self._pass, self._dummy, v)  # (batch, m)
        return _pull(self._outputs, self._point, _pull(self._loss_gradient, self._at, pushed))

    rmatvec = matvec


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_(True)


def hessian(objective: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> HessianOperator:
    """Return the Hessian of a batch of objectives at ``x``, linearised once.

    Parameters
    ----------
    objective
        (batch, n) ↦ (batch,), each value a function of its own row.
    x
        (batch, n).

    Returns
    -------
    HessianOperator
        H, (batch, n, n).

    Examples
    --------
    >>> import torch
    >>> operator = hessian(lambda x: (x**4).sum(-1), torch.tensor([[1.0, 2.0]]))
    >>> operator @ torch.ones(1, 2)
    tensor([[12., 48.]])
    """
    with torch.enable_grad():
        point = _leaf(x)
        value = objective(point)
        if not value.requires_grad:  # an objective that does not depend on x
            return HessianOperator(torch.zeros_like(x), point)
        (gradient,) = torch.autograd.grad(
            value.sum(), point, create_graph=True, allow_unused=True, materialize_grads=True
        )
    return HessianOperator(gradient, point)


def jacobian(residual: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> JacobianOperator:
    """Return the Jacobian of a batch of residuals at ``x``, linearised once.

    Parameters
    ----------
    residual
        (batch, n) ↦ (batch, n), each row a function of its own row.
    x
        (batch, n).

    Returns
    -------
    JacobianOperator
        J, (batch, n, n).

    Examples
    --------
    >>> import torch
    >>> operator = jacobian(lambda x: torch.stack([x[:, 1], 3 * x[:, 0]], -1), torch.zeros(1, 2))
    >>> operator @ torch.tensor([[1.0, 2.0]]), operator.T @ torch.tensor([[1.0, 2.0]])
    (tensor([[2., 3.]]), tensor([[6., 1.]]))
    """
    with torch.enable_grad():
        point = _leaf(x)
        value = residual(point)
    return JacobianOperator(value, point)


def gauss_newton(
    outputs: Callable[[torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
) -> GaussNewtonOperator:
    """Return the Gauss–Newton matrix of ``loss(outputs(x))`` at ``x``.

    Parameters
    ----------
    outputs
        (batch, n) ↦ (batch, m).
    loss
        (batch, m) ↦ (batch,), convex for a positive semi-definite result.
    x
        (batch, n).

    Returns
    -------
    GaussNewtonOperator
        Jᵀ L J, (batch, n, n).

    References
    ----------
    Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 2002.

    Examples
    --------
    >>> import torch
    >>> operator = gauss_newton(lambda x: x**2, lambda z: 0.5 * (z**2).sum(-1), torch.tensor([[3.0]]))
    >>> operator @ torch.ones(1, 1)  # (2x)² = 36, where the Hessian is 6x² = 54
    tensor([[36.]])
    """
    with torch.enable_grad():
        point = _leaf(x)
        out = outputs(point)
        at = _leaf(out)
        (gradient,) = torch.autograd.grad(loss(at).sum(), at, create_graph=True)
    return GaussNewtonOperator(out, gradient, at, point)
