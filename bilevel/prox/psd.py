"""The cone of positive semidefinite matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import inverse
from bilevel._torch.transforms import carries_gradient, outside_autocast
from bilevel.errors import ShapeError
from bilevel.prox._base import Manifold, Parameter, Term, as_parameter, detached, no_value
from bilevel.prox._margins import least, relative, scale_of
from bilevel.prox._spectral import abs_change, eigh, rank_mask, symmetric

__all__ = ["PSDCone"]


@dataclass(frozen=True, eq=False)
class PSDCone(Term):
    """The indicator function of the symmetric positive semidefinite matrices, along the last two axes of x.

    The other axes of x hold independent matrices. The projection takes the symmetric part and removes the negative eigenvalues.
    Its derivatives are exact up to the fifth order, with equal eigenvalues too.

    Raises
    ------
    ShapeError
        On use, if x is not of shape (..., n, n).

    References
    ----------
    Higham, Computing a nearest symmetric positive semidefinite matrix, 1988; Malick and Sendov, Clarke generalized Jacobian of
    the projection onto the cone of positive semidefinite matrices, 2006.

    Examples
    --------
    >>> import torch
    >>> from bilevel import prox
    >>> prox.PSDCone().prox(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    tensor([[1., 0.],
            [0., 0.]])
    """

    def _matrix(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
            raise ShapeError(
                f"{self.where}: expected x of shape (..., n, n), got {tuple(x.shape)}; pass square matrices"
            )
        return symmetric(x)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return no_value(x)

    @outside_autocast
    def prox(self, v: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        matrix = self._matrix(v)
        values, vectors = eigh(matrix)
        projected = symmetric((vectors * values.relu().unsqueeze(-2)) @ vectors.mT)
        if not carries_gradient(v):
            return projected
        # max(λ, 0) = (λ + |λ|)/2
        return projected + 0.5 * symmetric(matrix - detached(matrix) + abs_change(matrix, values, vectors))

    def manifold(self, x: torch.Tensor) -> Manifold:
        values, vectors = eigh(self._matrix(x))
        kept = rank_mask(values, x.shape[-1])
        basis = vectors * kept.unsqueeze(-2)  # (..., n, n), zero columns beyond the rank
        rest = torch.diag_embed((~kept).to(x.dtype))

        @outside_autocast
        def retract(y: torch.Tensor) -> torch.Tensor:
            """Return Y U (Uᵀ Y U)⁻¹ Uᵀ Y, which is Y where Y has the rank of x."""
            matrix = symmetric(y)
            side = matrix @ basis
            return symmetric(side @ inverse(basis.mT @ side + rest) @ side.mT)

        return Manifold(retract)

    @outside_autocast
    def margin(self, x: torch.Tensor, slope: torch.Tensor, step: Parameter = 1.0) -> torch.Tensor:
        move = symmetric(as_parameter(step, x) * slope)
        values, vectors = eigh(self._matrix(x))
        kept = rank_mask(values, x.shape[-1])
        basis = vectors * (~kept).unsqueeze(-2)
        # ∇f(x) on the null space of x has to be positive definite.
        dual = eigh(basis.mT @ symmetric(move) @ basis + torch.diag_embed(kept * scale_of(x, move)))[0]
        primal = torch.where(kept, values, float("inf"))
        return least(relative(torch.cat([primal, dual], -1), scale_of(values, move)))
