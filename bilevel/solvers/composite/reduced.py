"""The factorised Hessian of a composite problem's local model on the free unknowns of its manifold.

If a term fixes unknowns, the Hessian is H on the free ones and the identity on the fixed ones. A solution with few
nonzero unknowns needs only a small matrix, for any n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.linearization import Linearization
from bilevel.linear._base import LinearSolver
from bilevel.linear._solution import LinearSolution
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact
from bilevel.operators import LinearOperator
from bilevel.solvers.composite.problem import Composite

__all__ = ["Reduced", "ReducedSolver", "factorised", "reduce"]

_MOST_ORDER = 512
_MOST_NUMBERS = 2**25
_MOST_REFINEMENTS = 8


@dataclass(frozen=True, eq=False)
class Reduced:
    """H on the free unknowns.

    Parameters
    ----------
    x
        The point (batch, n).
    free
        Bool (batch, n).
    index, valid
        The places of the free unknowns (batch, k), and which of them are valid: problems with fewer than k are padded.
        None: all are valid.
    matrix
        (batch, k, k), with the identity as padding.
    factor
        Its Cholesky factor.
    sound
        Bool (batch,): the matrix is positive definite beyond rounding.
    """

    x: torch.Tensor
    free: torch.Tensor
    index: torch.Tensor
    valid: torch.Tensor | None
    matrix: torch.Tensor
    factor: torch.Tensor
    sound: torch.Tensor

    def gather(self, v: torch.Tensor) -> torch.Tensor:
        """Return the free entries (batch, k) of ``v`` (batch, n), padded with zeros."""
        part = v.gather(-1, self.index)
        return part if self.valid is None else torch.where(self.valid, part, 0.0)

    def insert(self, part: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Return ``rest`` (batch, n) with its free entries replaced by ``part`` (batch, k)."""
        if self.valid is not None:
            part = torch.where(self.valid, part, rest.gather(-1, self.index))
        return rest.scatter(-1, self.index, part)

    def solve(self, v: torch.Tensor) -> torch.Tensor:
        """Return H⁻¹ v (batch, n)."""
        if not self.index.shape[-1]:
            return v
        part = torch.cholesky_solve(self.gather(v).unsqueeze(-1), self.factor).squeeze(-1)
        return self.insert(part, v)

    def same_free(self, composite: Composite, x: torch.Tensor) -> bool:
        """Return whether the same unknowns are free on the manifolds of ``x``."""
        return x is self.x or torch.equal(composite.known_free(x), self.free)

    def fits(self, composite: Composite, x: torch.Tensor) -> bool:
        """Return whether ``x`` lies on the same manifolds."""
        assert composite.retract is not None
        if not bool(self.sound.all()) or not self.same_free(composite, x):
            return False
        if x is self.x:
            return True
        near = 64 * torch.finfo(x.dtype).eps * x.abs().amax(dim=-1, keepdim=True)
        return bool(((composite.retract(self.x, x) - x).abs() <= near).all())


def reduce(composite: Composite, x: torch.Tensor, linear: Linearization) -> Reduced | None:
    """Return the reduced Hessian at ``x`` (batch, n), or None if it is too large. ``linear`` is the linearisation there."""
    assert composite.free is not None
    batch = x.shape[0]
    free = composite.free(x)
    k = int(free.sum(dim=-1).max())
    wide = torch.finfo(x.dtype).bits >= 32
    if k > _MOST_ORDER or batch * k * k > _MOST_NUMBERS or not wide:
        return None
    if batch == 1:
        index, valid = free[0].nonzero().reshape(1, -1), None
    else:
        index = free.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :k]
        valid = free.gather(-1, index)
    return factorised(x, free, index, valid, _entries(composite, x, linear, index))


def factorised(
    x: torch.Tensor, free: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None, matrix: torch.Tensor
) -> Reduced:
    """Return the :class:`Reduced` of these entries (batch, k, k) of the Hessian. ``valid`` None: all places are valid."""
    k = index.shape[-1]
    if valid is not None and not bool(valid.all()):
        both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
        matrix = torch.where(both, matrix, torch.eye(k, dtype=x.dtype, device=x.device))
    matrix = 0.5 * (matrix + matrix.mT)
    factor, info = torch.linalg.cholesky_ex(matrix)
    sound = info == 0
    if k:
        # With rows of unit length, the smallest pivot bounds the distance to a singular matrix.
        pivots = (factor.diagonal(dim1=-2, dim2=-1) / torch.linalg.vector_norm(factor, dim=-1)).amin(dim=-1)
        sound = sound & (pivots**2 > 1e3 * k * torch.finfo(x.dtype).eps)
    return Reduced(x, free, index, valid, matrix, factor, sound)


def _entries(composite: Composite, x: torch.Tensor, linear: Linearization, index: torch.Tensor) -> torch.Tensor:
    """Return the entries (batch, k, k) of the Hessian at the places ``index`` (batch, k)."""
    batch, n = x.shape
    k = index.shape[-1]
    if batch == 1 and 2 * k < n:
        units = torch.zeros(k, 1, n, dtype=x.dtype, device=x.device)
        units[torch.arange(k, device=x.device), 0, index[0]] = 1
        return linear.operator.matmat(units)[:, 0, index[0]].unsqueeze(0)
    if 2 * k < n and composite.entries is not None:
        try:
            return composite.entries(x, index)
        except RuntimeError:  # an operation in the function cannot be transformed
            pass
    whole = composite.model.linearize_dense(x).operator.dense()
    rows = whole.gather(-2, index.unsqueeze(-1).expand(batch, k, n))
    return rows.gather(-1, index.unsqueeze(-2).expand(batch, k, k))


@dataclass(frozen=True, eq=False)
class ReducedSolver(LinearSolver):
    """Solve with the factors of the forward pass on the free unknowns, and refine. Another solver solves the rest.

    Parameters
    ----------
    reduced
        Factors at the solution, or near it.
    """

    reduced: Reduced

    @property
    def name(self) -> str:
        return "Exact"

    def serves(self, operator: LinearOperator) -> bool:
        """Return whether the factors belong to the matrices of ``operator``."""
        shape = (operator.distinct.batch, operator.distinct.size)
        return shape == tuple(self.reduced.x.shape) and operator.dtype == self.reduced.x.dtype

    def propose(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor | None:
        return self._apply(operator, rhs)

    def _apply(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor:
        if operator.repeats == 1:
            return self.reduced.solve(rhs)
        batch, n = self.reduced.x.shape
        rows = rhs.reshape(-1, batch, n)
        return torch.stack([self.reduced.solve(row) for row in rows]).reshape(rhs.shape)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        x = self._apply(operator, rhs)
        residual = rhs - operator.matvec(x)
        for _ in range(_MOST_REFINEMENTS):
            if bool((residual.norm(dim=-1) <= threshold).all()):
                break
            further = x + self._apply(operator, residual)
            left = rhs - operator.matvec(further)
            if not bool((left.norm(dim=-1) <= 0.5 * residual.norm(dim=-1)).any()):
                break
            x, residual = further, left
        if bool((residual.norm(dim=-1) <= torch.maximum(threshold, _floor(rhs))).all()):
            done = torch.zeros(operator.batch, dtype=torch.int64, device=rhs.device)
            return LinearSolution(x, torch.full_like(done, operator.size), done, residual)
        other = Exact() if operator.distinct.size <= _MOST_ORDER else CG(preconditioner=None)
        return other.solve(operator, rhs, threshold, start)


def _floor(rhs: torch.Tensor) -> torch.Tensor:
    return 64 * torch.finfo(rhs.dtype).eps * rhs.norm(dim=-1)
