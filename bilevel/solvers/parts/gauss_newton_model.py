"""The Gauss–Newton model ½ ‖r + J d‖² of a batch of least-squares problems, and its minimisers, damped or not.

Unknowns are scaled: with D the lengths of J's columns, d = D⁻¹ p and A = J D⁻¹. A tall A is reduced to its triangular factor once, so that each
damped step costs a factorisation of 2n rows, and no product AᵀA loses half of the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import svd

__all__ = ["Model", "column_scale"]

# If a pivot is below this many units of rounding for each unknown, its column depends on the others.
_DEPENDENT = 10.0


@dataclass(frozen=True, eq=False)
class Model:
    """A reduced model.

    Parameters
    ----------
    triangle
        R (batch, k, k) with ‖A p + r‖² = ‖R q + c‖² + constant, where p = q or p = ``basis`` q.
    target
        c (batch, k).
    basis
        (batch, n, k): an orthonormal basis of the row space of a wide A, in which steps lie. None for a tall A.
    scale
        D (batch, n).
    deficient
        (batch,) bool: where the columns of A, or the rows of a wide A, depend on each other.
    """

    triangle: torch.Tensor
    target: torch.Tensor
    basis: torch.Tensor | None
    scale: torch.Tensor
    deficient: torch.Tensor

    @classmethod
    def of(cls, jacobian: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> Model:
        """Reduce the model with J (batch, m, n), r (batch, m) and D (batch, n).

        If J does not have full column rank, D is the same for all unknowns. Steps of least scaled length are then
        shortest in the units of x too, and have no part in the null space of J.
        """
        m, n = jacobian.shape[-2:]
        if m < n:
            scale = _uniform(scale)
            rows = jacobian / scale.unsqueeze(-2)  # (batch, m, n)
            basis, upper = torch.linalg.qr(rows.mT)  # (batch, n, m), (batch, m, m)
            return cls(upper.mT, residual, basis, scale, _dependent(upper))
        triangle, target = _reduced(jacobian / scale.unsqueeze(-2), residual)
        deficient = _dependent(triangle)
        if bool(deficient.any()):
            uniform = torch.where(deficient.unsqueeze(-1), _uniform(scale), scale)
            triangle, scale = triangle * (scale / uniform).unsqueeze(-2), uniform
        return cls(triangle, target, None, scale, deficient)

    def step(self, damping: torch.Tensor) -> torch.Tensor:
        """Return d (batch, n) that minimises ‖J d + r‖² + λ ‖D d‖², the shortest in x if J is deficient and λ zero; ``damping`` is λ (batch,)."""
        k = self.triangle.shape[-1]
        unit = torch.eye(k, dtype=self.triangle.dtype, device=self.triangle.device)
        root = damping.sqrt()[:, None, None]
        stacked = torch.cat([self.triangle, root * unit], dim=-2)  # (batch, 2k, k)
        triangle, target = _reduced(stacked, torch.nn.functional.pad(self.target, (0, k)))
        solved = torch.linalg.solve_triangular(triangle, -target.unsqueeze(-1), upper=True).squeeze(-1)
        if bool(self.deficient.any()):
            these = self.deficient
            solved = solved.index_put((these,), _shortest(self.triangle[these], self.target[these], damping[these]))
        if self.basis is not None:
            solved = (self.basis @ solved.unsqueeze(-1)).squeeze(-1)
        return solved / self.scale


def column_scale(jacobian: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return D (batch, n): the column lengths of J (batch, m, n), but at least ``before`` (Moré); 1 if both are zero."""
    lengths = jacobian.norm(dim=-2)
    lengths = lengths if before is None else torch.maximum(lengths, before)
    lengths = torch.where(torch.isfinite(lengths), lengths, 0.0 if before is None else before)
    largest = lengths.amax(dim=-1, keepdim=True) if lengths.shape[-1] else lengths
    return torch.where(lengths > 0, lengths, torch.where(largest > 0, largest, 1.0))


def _uniform(scale: torch.Tensor) -> torch.Tensor:
    return scale.amax(dim=-1, keepdim=True).expand_as(scale)


def _reduced(matrix: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return R (batch, n, n) and Qᵀ b (batch, n) of the tall ``matrix`` = Q R (batch, m, n) and ``right``, b (batch, m)."""
    n = matrix.shape[-1]
    upper = torch.linalg.qr(torch.cat([matrix, right.unsqueeze(-1)], dim=-1), mode="r")[1]
    return upper[..., :n, :n], upper[..., :n, n]


def _dependent(triangle: torch.Tensor) -> torch.Tensor:
    """Return where a column of a triangular matrix (batch, k, k) lies, up to rounding, in the span of those before it, (batch,) bool."""
    k = triangle.shape[-1]
    if not k:
        return torch.zeros(triangle.shape[0], dtype=torch.bool, device=triangle.device)
    lengths = triangle.norm(dim=-2)
    least = _DEPENDENT * max(k, 8) * torch.finfo(triangle.dtype).eps * lengths.amax(dim=-1, keepdim=True)
    return ~(triangle.diagonal(dim1=-2, dim2=-1).abs() > least).all(dim=-1)


def _shortest(triangle: torch.Tensor, target: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    left, values, right = svd(triangle)
    least = _DEPENDENT * max(values.shape[-1], 8) * torch.finfo(values.dtype).eps * values[..., :1]
    kept = values > least
    weights = torch.where(kept, values / torch.where(kept, values**2 + damping.unsqueeze(-1), 1.0), 0.0)
    along = weights * (left.mT @ target.unsqueeze(-1)).squeeze(-1)
    return -(right.mT @ along.unsqueeze(-1)).squeeze(-1)
