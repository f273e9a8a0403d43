"""QR and SVD: least squares and minimum-norm solutions by orthogonal factorisations, made once for all right-hand sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import svd
from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolver
from bilevel.linear._judge import eigenvalue_uncertainty
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.operators._rectangular import rectangular_of
from bilevel.reports import Status

__all__ = ["QR", "SVD"]

_LEAST_ORDER = 32


@dataclass(frozen=True)
class SVD(LinearSolver):
    """A = U Σ Vᵀ for any A, square or rectangular, of any rank. Singular values up to ``rtol`` times the largest count as zero.

    The result is the minimum-norm solution, and for a rectangular system the least-squares solution. The operator keeps
    the factorisation. It costs n products to materialise and about 20 m n² operations.

    Parameters
    ----------
    rtol
        By default max(m, n, 32) units of rounding.
    max_bytes
        The largest memory for the matrices that is attempted, in bytes (default 2 GiB).

    Raises
    ------
    ArgumentError
        On use, if the matrices would take more than ``max_bytes``.

    References
    ----------
    Golub & Van Loan, "Matrix Computations", 2013, section 5.5.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    >>> SVD()(A, torch.tensor([[2.0, 2.0]], dtype=torch.float64))
    tensor([[1.0000, 1.0000]], dtype=torch.float64)
    """

    rtol: float | None = None
    max_bytes: int = 2**31

    @property
    def knows_null_space(self) -> bool:
        return True

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        factor = _kept(self, operator, self.max_bytes, lambda A: _singular(A, self.rtol))
        return _solved(factor, operator, rhs, threshold)


@dataclass(frozen=True)
class QR(LinearSolver):
    """A = Q R for any A, square or rectangular. Matrices without full rank are factorised by :class:`SVD` instead.

    The operator keeps the factorisation. It costs n products to materialise and 2 m n² operations.

    Parameters
    ----------
    max_bytes
        The largest memory for the matrices that is attempted, in bytes (default 2 GiB).

    Raises
    ------
    ArgumentError
        On use, if the matrices would take more than ``max_bytes``.

    References
    ----------
    Golub & Van Loan, "Matrix Computations", 2013, sections 5.2, 5.3 and 5.6.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [-1.0, 3.0]]))
    >>> QR()(A, torch.tensor([[5.0, 2.0]])).round(decimals=4)
    tensor([[1., 1.]])
    """

    max_bytes: int = 2**31

    @property
    def knows_null_space(self) -> bool:
        return True

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        factor = _kept(self, operator, self.max_bytes, _orthogonal)
        return _solved(factor, operator, rhs, threshold)


@dataclass(frozen=True, eq=False)
class _Factor:
    """A batch of A⁺: as R⁻¹ Qᵀ, or V Σ⁺ Uᵀ.

    Parameters
    ----------
    left, right
        (batch, m, k) and (batch, n, k) with A⁺ = right · left' . Columns that count as zero are zero in both.
    inverse
        1/σ (batch, k), or None where R is kept.
    triangle
        R (batch, n, n), or None.
    status
        int64 (batch,): CONVERGED, MINIMUM_NORM where the columns of A are dependent, or NOT_FINITE.
    """

    left: torch.Tensor
    right: torch.Tensor | None
    inverse: torch.Tensor | None
    triangle: torch.Tensor | None
    status: torch.Tensor

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """Return A⁺ b (batch, n, columns)."""
        along = self.left.mT @ b
        if self.triangle is not None:
            return torch.linalg.solve_triangular(self.triangle, along, upper=True)
        assert self.right is not None and self.inverse is not None
        return self.right @ (self.inverse.unsqueeze(-1) * along)

    def solve_normal(self, d: torch.Tensor) -> torch.Tensor:
        """Return (AᵀA)⁺ d (batch, n, columns)."""
        if self.triangle is not None:
            half = torch.linalg.solve_triangular(self.triangle.mT, d, upper=False)
            return torch.linalg.solve_triangular(self.triangle, half, upper=True)
        assert self.right is not None and self.inverse is not None
        return self.right @ (self.inverse.square().unsqueeze(-1) * (self.right.mT @ d))


def _kept(solver: LinearSolver, operator: LinearOperator, most: int, make: object) -> _Factor:
    base, A = operator.distinct, rectangular_of(operator)
    rows, columns = (base.size, base.size) if A is None else (A.rows, A.columns)
    memory = base.batch * rows * columns * torch.finfo(base.dtype).bits // 8
    if memory > most:
        raise ArgumentError(
            f"{solver.name}: expected matrices of at most {most / 2**30:.3g} GiB, got {base.batch} of {rows} by {columns}, which take "
            f"{memory / 2**30:.3g} GiB; pass linear_solver=LSMR(), or raise max_bytes"
        )
    factor = base.memo.get(solver)
    if factor is None:
        assert callable(make)
        factor = base.memo[solver] = make(base.dense() if A is None else A.dense())
    assert isinstance(factor, _Factor)
    return factor


def _finite(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices (batch, m, n) with the identity in place of those that are not finite, and int64 statuses."""
    finite = torch.isfinite(matrix).all(dim=-1).all(dim=-1)
    unit = torch.eye(*matrix.shape[-2:], dtype=matrix.dtype, device=matrix.device)
    status = torch.where(finite, int(Status.CONVERGED), int(Status.NOT_FINITE))
    return torch.where(finite[:, None, None], matrix, unit), status


def _singular(matrix: torch.Tensor, rtol: float | None) -> _Factor:
    matrix, status = _finite(matrix)
    m, n = matrix.shape[-2:]
    k = min(m, n)
    # For a tall or wide matrix, the triangular factor is decomposed. This avoids an orthogonal matrix of the larger
    # order.
    Q, R = torch.linalg.qr(matrix if m >= n else matrix.mT)
    U, values, Vt = svd(R if m >= n else R.mT)  # (batch, k, k)
    left, right = (Q @ U, Vt.mT) if m >= n else (U, Q @ Vt.mT)
    least = max(m, n, _LEAST_ORDER) * torch.finfo(matrix.dtype).eps if rtol is None else rtol
    zero = ~(values > least * values[..., :1]) if k else values > 0
    if rtol is None and k:
        # If one singular value is zero to rounding, all that cannot be distinguished from zero count as zero.
        wide = ~(values > eigenvalue_uncertainty(max(m, n), matrix.dtype) * values[..., :1])
        zero = torch.where(zero.any(dim=-1, keepdim=True), wide, zero)
    inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, values))
    dependent = zero.any(dim=-1) | (m < n)
    failed = torch.isnan(values).any(dim=-1)
    status = torch.where((status == Status.CONVERGED) & dependent, int(Status.MINIMUM_NORM), status)
    status = torch.where(failed, int(Status.NOT_FINITE), status)
    return _Factor(left, right, inverse, None, status)


def _orthogonal(matrix: torch.Tensor) -> _Factor:
    m, n = matrix.shape[-2:]
    if m < n:
        return _singular(matrix, None)
    safe, status = _finite(matrix)
    Q, R = torch.linalg.qr(safe)
    if n:
        # The ratios of pivots to column norms do not depend on the units of the unknowns. Near the limit the SVD
        # decides.
        lengths = R.norm(dim=-2)
        part = R.diagonal(dim1=-2, dim2=-1).abs() / torch.where(lengths > 0, lengths, 1.0)
        if not bool((part > 1e3 * max(m, _LEAST_ORDER) * torch.finfo(R.dtype).eps).all()):
            decided = _singular(matrix, None)
            if bool((decided.status == Status.MINIMUM_NORM).any()):
                return decided
    return _Factor(Q, None, None, R, status)


def _solved(factor: _Factor, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor) -> LinearSolution:
    """Solve, and refine once if the residual is above the threshold."""
    normal = rectangular_of(operator) is not None
    solve = factor.solve_normal if normal else factor.solve
    batch, n = operator.distinct.batch, operator.size

    def columnwise(vectors: torch.Tensor) -> torch.Tensor:
        columns = vectors.reshape(operator.repeats, batch, n).permute(1, 2, 0)  # (batch, n, repeats)
        return solve(columns).permute(2, 0, 1).reshape(vectors.shape)

    x = columnwise(rhs)
    residual = rhs - operator.matvec(x)
    norm = residual.norm(dim=-1)
    if not bool((norm <= threshold).all()):
        moved = x + columnwise(residual)
        after = rhs - operator.matvec(moved)
        better = (after.norm(dim=-1) < norm).unsqueeze(-1)
        x, residual = torch.where(better, moved, x), torch.where(better, after, residual)
    status = factor.status.repeat(operator.repeats)
    return LinearSolution(x, torch.full_like(status, n), status, residual)
