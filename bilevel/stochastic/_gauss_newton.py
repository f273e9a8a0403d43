"""Products with the Gauss–Newton matrix of an inner objective that is a loss of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bilevel._torch.reverse import reverse_pass
from bilevel.errors import ArgumentError
from bilevel.stochastic._lists import Tensors
from bilevel.stochastic._oracle import Linearization, Oracle
from bilevel.stochastic._variables import Point

__all__ = ["GaussNewtonLinearization", "OutputLoss"]


@dataclass(frozen=True)
class OutputLoss:
    """An inner objective in parts: ℓ(outputs) + penalty. Its Gauss–Newton matrix is Jᵀ ∇²ℓ J + ∇² penalty, with J the Jacobian of the outputs.

    The matrix is positive semidefinite where ℓ and the penalty are convex, also where the Hessian of a network is not. It is exact
    where the outputs are linear in φ or ∇ℓ is zero. For cross-entropy of logits, and for squares, it is the Fisher matrix. Pass
    the object as ``inner_objective``, with ``hessian=bilevel.GaussNewtonHessian()`` to :class:`ImplicitStep`.

    Parameters
    ----------
    outputs
        (inner, outer, data) ↦ a floating-point tensor of any shape, such as the logits of a model.
    loss
        (outputs, outer, data) ↦ ℓ, of shape ().
    penalty
        (inner, outer) ↦ a tensor of shape (), such as a weight decay; None: there is none.

    References
    ----------
    Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation 2002; Martens, "New insights and
    perspectives on the natural gradient method", JMLR 2020, Section 9.2.

    Examples
    --------
    >>> import torch
    >>> from bilevel.stochastic import OutputLoss
    >>> objective = OutputLoss(
    ...     outputs=lambda w, theta, data: data @ w,
    ...     loss=lambda outputs, theta, data: 0.5 * (outputs**2).mean(),
    ...     penalty=lambda w, theta: theta.exp() * (w**2).sum(),
    ... )
    >>> objective(torch.ones(2), torch.zeros(()), torch.eye(2))  # ½ + 2
    tensor(2.5000)
    """

    outputs: Callable[[Any, Any, Any], torch.Tensor]
    loss: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    penalty: Callable[[Any, Any], torch.Tensor] | None = None

    def parts(self, inner: Any, outer: Any, data: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the outputs, ℓ and the penalty, each with its graph."""
        outputs = self.outputs(inner, outer, data)
        if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point():
            raise ArgumentError(
                f"OutputLoss: expected outputs to return a floating-point tensor, got {type(outputs).__name__}; return the model's output"
            )
        return outputs, self.loss(outputs, outer, data), None if self.penalty is None else self.penalty(inner, outer)

    def __call__(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        _, loss, penalty = self.parts(inner, outer, data)
        return loss if penalty is None else loss + penalty


class GaussNewtonLinearization(Linearization):
    """∇_φ G with its graph, as in :class:`Linearization`, and products with the Gauss–Newton matrix in place of H.

    A product takes two reverse passes, and one more is made at first.

    Parameters
    ----------
    oracle, batch, at
        As for :class:`Linearization`.
    objective
        The inner objective of ``oracle``.
    """

    def __init__(self, oracle: Oracle, batch: Any, at: Point | None, objective: OutputLoss) -> None:
        self._objective = objective
        self._matrices: list[_Matrix] = []
        super().__init__(oracle, batch, at)

    def _part(self, data: Any) -> tuple[torch.Tensor, Tensors, torch.Tensor | None]:
        oracle = self._oracle
        outputs, loss, penalty = oracle.twice("inner_objective", self._objective.parts, data, self._at)
        total = oracle.checked("inner_objective", loss if penalty is None else loss + penalty, self._at)
        (slope,) = reverse_pass([loss], [outputs], [torch.ones_like(loss)], create_graph=True)
        with torch.enable_grad():
            cotangent = torch.zeros_like(outputs, requires_grad=True)
        pullback = oracle._reverse([outputs], self._z, [cotangent], create_graph=True)
        penalized: Sequence[torch.Tensor] = ()
        if penalty is not None and penalty.requires_grad:
            penalized = reverse_pass([penalty], self._z, [torch.ones_like(penalty)], create_graph=True)
        self._matrices.append(_Matrix(outputs, slope, cotangent, pullback, penalized))
        return oracle.gradient_of(total, self._z)

    def exact_hessian(self, q: Sequence[torch.Tensor]) -> Tensors:
        """Return H q: one reverse pass."""
        return super().hessian(q)

    def hessian(self, q: Sequence[torch.Tensor]) -> Tensors:
        return self._oracle._mean(
            (weight, matrix.product(self._oracle, self._z, q))
            for (weight, *_), matrix in zip(self._parts, self._matrices, strict=True)
        )


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The graphs of one part of a minibatch: the outputs z, ∇_z ℓ, the map u ↦ Jᵀ u with its u, and the penalty's gradient or none."""

    outputs: torch.Tensor
    slope: torch.Tensor
    cotangent: torch.Tensor
    pullback: Sequence[torch.Tensor]
    penalized: Sequence[torch.Tensor]

    def product(self, oracle: Oracle, z: Tensors, q: Sequence[torch.Tensor]) -> Tensors:
        """Return Jᵀ ∇²ℓ J q + ∇² penalty q."""
        (pushed,) = oracle._reverse(self.pullback, [self.cotangent], q)  # J q: the transpose of u ↦ Jᵀ u
        (curved,) = reverse_pass([self.slope], [self.outputs], [pushed])
        found = list(oracle._reverse([self.outputs], z, [curved]))
        if self.penalized:
            more = reverse_pass(self.penalized, z, q)
            found = [one + other for one, other in zip(found, more, strict=True)]
        return found
