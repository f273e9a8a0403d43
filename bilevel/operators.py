"""Linear operators on batches of vectors: linearised once, applied many times.

An operator here is a batch of ``batch`` square matrices of order ``size`` that acts on tensors of shape
``(batch, size)``, one vector for each matrix. Those made from a function (:func:`hessian`, :func:`jacobian`,
:func:`gauss_newton`) keep one gradient graph from construction and use it again for each product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.func import vmap

from bilevel.errors import ShapeError

__all__ = [
    "DampedOperator",
    "DenseOperator",
    "FunctionOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearOperator",
    "RepeatedOperator",
    "ScaledOperator",
    "SumOperator",
    "TransposedOperator",
    "gauss_newton",
    "hessian",
    "jacobian",
]


class LinearOperator(ABC):
    """A batch of square matrices known by their products.

    Parameters
    ----------
    batch
        Number of matrices.
    size
        Order n of each.
    dtype, device
        Of the vectors it acts on.
    symmetric
        Whether each matrix equals its transpose.
    positive_definite
        Whether each matrix is *known* to be positive definite (False: not known).
    """

    def __init__(
        self,
        batch: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
    ) -> None:
        self.batch = batch
        self.size = size
        self.dtype = dtype
        self.device = device
        self.symmetric = symmetric
        self.positive_definite = positive_definite
        # Whether anything but a positive definite matrix means that the problem is not what it claims to be:
        # at a minimum the Hessian is; a saddle's or a maximum's is not.
        self.expect_definite = False
        # A faster way to the matrices than products with the unit vectors, if there is one.
        self.materialize: Callable[[], torch.Tensor] | None = None
        # What a solver wants to keep with the matrices, such as a factorisation.
        self.memo: dict[Hashable, Any] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(batch, n, n)``."""
        return (self.batch, self.size, self.size)

    @abstractmethod
    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Return A v for ``v`` of shape (batch, n)."""

    @abstractmethod
    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        """Return Aᵀ v for ``v`` of shape (batch, n)."""

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        """Return A v for each of the k vectors in ``vs`` (k, batch, n)."""
        return torch.stack([self.matvec(v) for v in vs]) if len(vs) else torch.empty_like(vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        """Return Aᵀ v for each of the k vectors in ``vs`` (k, batch, n)."""
        return torch.stack([self.rmatvec(v) for v in vs]) if len(vs) else torch.empty_like(vs)

    @cached_property
    def _dense(self) -> torch.Tensor:
        if self.materialize is not None:
            try:
                return self.materialize()
            except RuntimeError:  # something in the function cannot be transformed; products always can be made
                self.materialize = None
        n = self.size
        units = torch.eye(n, dtype=self.dtype, device=self.device).unsqueeze(1).expand(n, self.batch, n)
        # A row of a symmetric matrix is its column, and rows are what a reverse pass gives.
        if self.symmetric:
            matrix = self.matmat(units).movedim(0, -2)
            return 0.5 * (matrix + matrix.mT)
        return self.rmatmat(units).movedim(0, -2)  # (batch, n, n)

    def dense(self) -> torch.Tensor:
        """Return the matrices as one tensor (batch, n, n); n products, kept for the next call."""
        return self._dense

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self if self.symmetric else TransposedOperator(self)

    @property
    def repeats(self) -> int:
        """How many right-hand sides in a row share each distinct matrix (see :class:`RepeatedOperator`)."""
        return 1

    @property
    def distinct(self) -> LinearOperator:
        """The operator with each matrix once."""
        return self

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        if v.shape != (self.batch, self.size):
            raise ShapeError(
                f"LinearOperator: expected a vector of shape {(self.batch, self.size)}, got {tuple(v.shape)}; "
                "give one vector for each matrix of the batch"
            )
        return self.matvec(v)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return SumOperator((self, other))

    def __mul__(self, factor: float) -> LinearOperator:
        return ScaledOperator(self, factor)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        flags = ", symmetric" if self.symmetric else ""
        flags += ", positive definite" if self.positive_definite else ""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}{flags})"


class DenseOperator(LinearOperator):
    """Matrices given as a tensor (batch, n, n), or (n, n) for a batch of one.

    Examples
    --------
    >>> import torch
    >>> operator = DenseOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), symmetric=True)
    >>> operator @ torch.tensor([[1.0, 1.0]])
    tensor([[2., 4.]])
    """

    def __init__(self, matrix: torch.Tensor, *, symmetric: bool = False, positive_definite: bool = False) -> None:
        matrix = matrix.unsqueeze(0) if matrix.ndim == 2 else matrix
        if matrix.ndim != 3 or matrix.shape[-1] != matrix.shape[-2]:
            raise ShapeError(
                f"DenseOperator: expected square matrices (batch, n, n) or (n, n), got {tuple(matrix.shape)}; "
                "reshape them"
            )
        super().__init__(
            matrix.shape[0], matrix.shape[1], matrix.dtype, matrix.device,
            symmetric=symmetric, positive_definite=positive_definite,
        )  # fmt: skip
        self.matrix = matrix

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.matrix, v.unsqueeze(-1)).squeeze(-1)  # half the time of an einsum at small orders

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.matrix.mT, v.unsqueeze(-1)).squeeze(-1)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bij,kbj->kbi", self.matrix, vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bji,kbj->kbi", self.matrix, vs)

    def dense(self) -> torch.Tensor:
        return self.matrix


class FunctionOperator(LinearOperator):
    """Products given as functions of ``v`` (batch, n).

    Parameters
    ----------
    matvec
        v ↦ A v.
    like
        A tensor (batch, n) with the shape, dtype and device of the vectors.
    rmatvec
        v ↦ Aᵀ v; may be left out when ``symmetric``.
    symmetric, positive_definite
        See :class:`LinearOperator`.
    """

    def __init__(
        self,
        matvec: Callable[[torch.Tensor], torch.Tensor],
        like: torch.Tensor,
        rmatvec: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
    ) -> None:
        super().__init__(
            like.shape[0], like.shape[1], like.dtype, like.device,
            symmetric=symmetric, positive_definite=positive_definite,
        )  # fmt: skip
        self._matvec = matvec
        self._rmatvec = matvec if symmetric else rmatvec

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._matvec(v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        if self._rmatvec is None:
            raise ShapeError(
                "FunctionOperator: a product with the transpose is needed, and none was given; pass rmatvec=, or "
                "symmetric=True if the matrix is"
            )
        return self._rmatvec(v)

    def dense(self) -> torch.Tensor:
        if self._rmatvec is None:
            n = self.size
            units = torch.eye(n, dtype=self.dtype, device=self.device).unsqueeze(1).expand(n, self.batch, n)
            return self.matmat(units).movedim(0, -1)
        return super().dense()


def _pull(output: torch.Tensor, point: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One reverse pass over a retained graph: vᵀ ∂output/∂point, zero where the graph does not reach."""
    if not output.requires_grad:
        return v.new_zeros(v.shape[:-1] + point.shape[-1:])
    (product,) = torch.autograd.grad(output, point, v, retain_graph=True, allow_unused=True, materialize_grads=True)
    return product


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
    """H = ∂gradient/∂point of a gradient that still has its graph: one reverse pass for each product.

    Parameters
    ----------
    gradient
        ∇G (batch, n), computed from ``point`` with ``create_graph=True``, each row from its own row.
    point
        (batch, n), requires grad.
    """

    def __init__(self, gradient: torch.Tensor, point: torch.Tensor, *, positive_definite: bool = False) -> None:
        super().__init__(
            point.shape[0], point.shape[1], point.dtype, point.device,
            symmetric=True, positive_definite=positive_definite,
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

    Jᵀv is one reverse pass. J v is a reverse pass over the (linear) reverse pass, whose graph is built at
    the first product and kept: dual numbers do not nest inside a custom Function, reverse passes do.
    """

    def __init__(self, residual: torch.Tensor, point: torch.Tensor) -> None:
        super().__init__(point.shape[0], point.shape[1], point.dtype, point.device)
        self._residual, self._point = residual, point

    @property
    def point(self) -> torch.Tensor:
        """The leaf (batch, n) that the residual was computed from."""
        return self._point

    @cached_property
    def _transposed_pass(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            dummy = torch.zeros_like(self._residual, requires_grad=True)
            (product,) = torch.autograd.grad(
                self._residual, self._point, dummy, create_graph=True, allow_unused=True, materialize_grads=True
            )
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

    It is positive semi-definite for a convex loss, and equals the Hessian only where the residuals vanish or
    the outputs are linear: an approximation, to be named so.
    """

    def __init__(
        self, outputs: torch.Tensor, loss_gradient: torch.Tensor, at: torch.Tensor, point: torch.Tensor
    ) -> None:
        super().__init__(point.shape[0], point.shape[1], point.dtype, point.device, symmetric=True)
        self._outputs, self._point = outputs, point
        self._loss_gradient, self._at = loss_gradient, at
        with torch.enable_grad():
            self._dummy = torch.zeros_like(outputs, requires_grad=True)
            (self._pass,) = torch.autograd.grad(
                outputs, point, self._dummy, create_graph=True, allow_unused=True, materialize_grads=True
            )

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
    """Return the Jacobian of a batch of residuals (batch, n) ↦ (batch, n) at ``x``, linearised once.

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


class TransposedOperator(LinearOperator):
    """Aᵀ."""

    def __init__(self, base: LinearOperator) -> None:
        super().__init__(base.batch, base.size, base.dtype, base.device)
        self.base = base

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.rmatvec(v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.matvec(v)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.rmatmat(vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.matmat(vs)

    def dense(self) -> torch.Tensor:
        return self.base.dense().mT

    @property
    def T(self) -> LinearOperator:
        return self.base


class DampedOperator(LinearOperator):
    """A + γI, for γ a number or one per matrix (batch,)."""

    def __init__(self, base: LinearOperator, damping: float | torch.Tensor) -> None:
        nonnegative = bool(torch.as_tensor(damping >= 0).all())
        super().__init__(
            base.batch, base.size, base.dtype, base.device,
            symmetric=base.symmetric, positive_definite=base.positive_definite and nonnegative,
        )  # fmt: skip
        self.base = base
        self.damping = torch.as_tensor(damping, dtype=base.dtype, device=base.device).reshape(-1, 1)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.matvec(v) + self.damping * v

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.base.rmatvec(v) + self.damping * v

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.matmat(vs) + self.damping * vs

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.base.rmatmat(vs) + self.damping * vs

    def dense(self) -> torch.Tensor:
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self.base.dense() + self.damping.unsqueeze(-1) * eye


class ScaledOperator(LinearOperator):
    """c A, for a number c."""

    def __init__(self, base: LinearOperator, factor: float) -> None:
        super().__init__(
            base.batch, base.size, base.dtype, base.device,
            symmetric=base.symmetric, positive_definite=base.positive_definite and factor > 0,
        )  # fmt: skip
        self.base, self.factor = base, factor

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.matvec(v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.rmatvec(v)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.matmat(vs)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return self.factor * self.base.rmatmat(vs)

    def dense(self) -> torch.Tensor:
        return self.factor * self.base.dense()


class SumOperator(LinearOperator):
    """A + B + …, all of one shape."""

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        first = terms[0]
        for term in terms[1:]:
            if term.shape != first.shape or term.dtype != first.dtype:
                raise ShapeError(
                    f"SumOperator: expected operators of one shape and dtype, got {first!r} and {term!r}; "
                    "only like batches of matrices can be added"
                )
        super().__init__(
            first.batch, first.size, first.dtype, first.device,
            symmetric=all(term.symmetric for term in terms),
            positive_definite=all(term.positive_definite for term in terms),
        )  # fmt: skip
        self.terms = tuple(terms)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.matvec(v) for term in self.terms]).sum(0)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.rmatvec(v) for term in self.terms]).sum(0)

    def matmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.matmat(vs) for term in self.terms]).sum(0)

    def rmatmat(self, vs: torch.Tensor) -> torch.Tensor:
        return torch.stack([term.rmatmat(vs) for term in self.terms]).sum(0)

    def dense(self) -> torch.Tensor:
        return torch.stack([term.dense() for term in self.terms]).sum(0)


class RepeatedOperator(LinearOperator):
    """Each matrix ``repeats`` times over: many right-hand sides for the matrices of ``base``.

    The batch is repeats · base.batch, with the repeats outermost, so that problem k · base.batch + i
    has matrix i. A factorisation is made once, of :attr:`distinct`.
    """

    def __init__(self, base: LinearOperator, repeats: int) -> None:
        super().__init__(
            base.batch * repeats, base.size, base.dtype, base.device,
            symmetric=base.symmetric, positive_definite=base.positive_definite,
        )  # fmt: skip
        self._base, self._repeats = base, repeats

    @property
    def repeats(self) -> int:
        return self._repeats

    @property
    def distinct(self) -> LinearOperator:
        return self._base

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        grouped = v.reshape(self._repeats, self._base.batch, self.size)
        return self._base.matmat(grouped).reshape(self.batch, self.size)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        grouped = v.reshape(self._repeats, self._base.batch, self.size)
        return self._base.rmatmat(grouped).reshape(self.batch, self.size)

    def dense(self) -> torch.Tensor:
        return self._base.dense().repeat(self._repeats, 1, 1)
