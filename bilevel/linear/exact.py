"""Factorise once, solve for every right-hand side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolution, LinearSolver
from bilevel.operators import LinearOperator
from bilevel.reports import Status

__all__ = ["Exact", "lend"]


@dataclass(frozen=True)
class Exact(LinearSolver):
    """Materialise the matrix and factorise it: Cholesky, or LU where it is not positive definite.

    The factorisation is kept with the operator and serves every further right-hand side; each solution is refined once where
    its residual is above what was asked. Where Newton's method has just factorised a matrix nearby, that one is used, with
    as many refinements as bring the residual down to rounding, and if they do not, the matrix itself. A symmetric matrix that
    is not positive definite is diagnosed by its eigenvalues, any other by its singular values: a reciprocal
    condition number below n·eps is reported as singular.

    Costs n products to materialise, n³/3 (Cholesky) to 2n³/3 (LU) operations and batch · n² numbers of memory.

    Parameters
    ----------
    max_bytes
        The largest memory for the matrices that is attempted, in bytes (default 2 GiB).
    indefinite
        Accept a Hessian that is not positive definite, to differentiate a saddle or a maximum on purpose.

    Raises
    ------
    ArgumentError
        On use, if the matrices would take more than ``max_bytes``.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
    >>> Exact()(A, torch.tensor([[1.0, 2.0]]))
    tensor([[0.0909, 0.6364]])
    """

    max_bytes: int = 2**31
    indefinite: bool = False

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        base = operator.distinct
        n = base.size
        wanted = base.batch * n * n * torch.finfo(base.dtype).bits // 8
        if wanted > self.max_bytes:
            raise ArgumentError(
                f"Exact: expected matrices of at most {self.max_bytes / 2**30:.3g} GiB, got {base.batch} of order {n}, "
                f"which take {wanted / 2**30:.3g} GiB; pass linear_solver=CG() (or GMRES() where not symmetric), or "
                "raise max_bytes"
            )
        lent = base.memo.get(_LENT)
        if lent is not None and Exact not in base.memo:
            x, residual, good = _refine(lent.factor, operator, rhs, threshold, _LENT_STEPS)
            if good:
                done = torch.zeros(operator.batch, dtype=torch.int64, device=rhs.device)
                return LinearSolution(x, torch.full_like(done, n), done, residual)
        factor = base.memo.get(Exact)
        if factor is None:
            factor = _factorize(base.dense(), base.symmetric)
            base.memo[Exact] = factor
        x, residual, _ = _refine(factor, operator, rhs, threshold, 1)
        status = factor.status
        if self.indefinite or not base.expect_definite:
            status = torch.where(status == Status.INDEFINITE, torch.full_like(status, Status.CONVERGED), status)
        status = status.repeat(operator.repeats)
        return LinearSolution(x, torch.full_like(status, n), status, residual)

    def propose(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor | None:
        lent = operator.distinct.memo.get(_LENT)
        return _columnwise(lent.factor, operator, rhs) if lent is not None and lent.exact else None


_LENT = "factor of a matrix nearby"
_LENT_STEPS = 6


@dataclass(frozen=True, eq=False)
class _Loan:
    """A factorisation of matrices near an operator's, and whether they probably are the operator's."""

    factor: _Factor
    exact: bool


def lend(operator: LinearOperator, factor: torch.Tensor, *, exact: bool = False) -> None:
    """Offer Cholesky factors (batch, n, n) of matrices near the symmetric ``operator``'s, such as Newton's last.

    :class:`Exact` then solves by iterative refinement with them, if that converges to rounding, and needs neither
    matrices nor a factorisation of its own. An operator of other sizes takes no loan. ``exact`` says that they probably are
    the operator's own, as where a single step of Newton's method was the last.
    """
    base = operator.distinct
    if base.symmetric and factor.shape == base.shape:
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        # A matrix that is all but singular is looked at itself, so that what it is gets said.
        if base.size and bool((pivots.amin(-1) > 1e-4 * pivots.amax(-1)).all()):
            status = torch.zeros(base.batch, dtype=torch.int64, device=factor.device)
            base.memo.setdefault(_LENT, _Loan(_Factor(status, cholesky=factor), exact))


def _refine(
    factor: _Factor, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return x, its residual, and whether that is down to rounding, by at most ``most`` refinements."""
    eps = torch.finfo(rhs.dtype).eps
    floor = 16 * eps * rhs.norm(dim=-1)
    x = _columnwise(factor, operator, rhs)
    residual = rhs - operator.matvec(x)
    norm = residual.norm(dim=-1)
    for _ in range(most):
        if bool(((norm <= floor) | ((norm <= threshold) & (most == 1))).all()):
            break
        moved = x + _columnwise(factor, operator, residual)
        after = rhs - operator.matvec(moved)
        fresh = after.norm(dim=-1)
        better = (fresh < norm).unsqueeze(-1)
        gained = bool((fresh < norm / 16).any())
        x, residual = torch.where(better, moved, x), torch.where(better, after, residual)
        norm = torch.minimum(norm, fresh)
        if not gained:
            break
    sound = (norm <= threshold) | ((threshold == 0) & (norm <= eps**0.75 * rhs.norm(dim=-1)))
    return x, residual, bool(sound.all())


def _columnwise(factor: _Factor, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor:
    """Return the solutions (batch, n); right-hand sides that share a matrix are columns of one solve."""
    batch, n = operator.distinct.batch, operator.size
    columns = rhs.reshape(operator.repeats, batch, n).permute(1, 2, 0)  # (batch, n, repeats)
    return factor.solve(columns).permute(2, 0, 1).reshape(rhs.shape)


@dataclass(frozen=True, eq=False)
class _Factor:
    """A batch of factorisations: Cholesky if every matrix allows it, else LU."""

    status: torch.Tensor
    cholesky: torch.Tensor | None = None
    lu: tuple[torch.Tensor, torch.Tensor] | None = None

    def solve(self, columns: torch.Tensor) -> torch.Tensor:
        if self.cholesky is not None:
            return torch.cholesky_solve(columns, self.cholesky)
        assert self.lu is not None
        return torch.linalg.lu_solve(*self.lu, columns)


def _factorize(matrix: torch.Tensor, symmetric: bool) -> _Factor:
    status = torch.zeros(matrix.shape[0], dtype=torch.int64, device=matrix.device)
    n = matrix.shape[-1]
    if n == 0:
        return _Factor(status, cholesky=matrix)
    finite = torch.isfinite(matrix).all(dim=-1).all(dim=-1)
    if not bool(finite.all()):
        # LAPACK refuses NaN; the problem is marked and the identity stands in for its matrix.
        status = torch.where(finite, status, torch.full_like(status, Status.NOT_FINITE))
        eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(finite[:, None, None], matrix, eye)
    smallest = n * torch.finfo(matrix.dtype).eps
    if symmetric:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if bool((info == 0).all()):
            # The squared ratio of the pivots bounds the reciprocal condition number from above: only where it is
            # near the limit is the exact one worth its price.
            pivots = factor.diagonal(dim1=-2, dim2=-1)
            doubtful = (pivots.amin(-1) / pivots.amax(-1)) ** 2 < 1e3 * smallest
            if not bool(doubtful.any()):
                return _Factor(status, cholesky=factor)
        eigenvalues = torch.linalg.eigvalsh(matrix)
        largest = eigenvalues.abs().amax(-1)
        singular = eigenvalues.abs().amin(-1) <= smallest * largest
        indefinite = ~singular & (eigenvalues[..., 0] < 0)
        status = torch.where(indefinite & (status == 0), torch.full_like(status, Status.INDEFINITE), status)
        status = torch.where(singular & (status == 0), torch.full_like(status, Status.SINGULAR), status)
        if bool((info == 0).all()):
            return _Factor(status, cholesky=factor)
        # A matrix with a negative eigenvalue beyond rounding beside a zero one is both; indefinite says more.
        both = singular & (eigenvalues[..., 0] < -smallest * largest) & finite
        status = torch.where(both, torch.full_like(status, Status.INDEFINITE), status)
    lu, pivots_, info = torch.linalg.lu_factor_ex(matrix)
    if not symmetric:
        diagonal = lu.diagonal(dim1=-2, dim2=-1).abs()
        doubtful = (info != 0) | (diagonal.amin(-1) < 1e3 * smallest * diagonal.amax(-1))
        if bool(doubtful.any()):
            values = torch.linalg.svdvals(matrix)
            singular = (values[..., -1] <= smallest * values[..., 0]) & (status == 0)
            status = torch.where(singular, torch.full_like(status, Status.SINGULAR), status)
    return _Factor(status, lu=(lu, pivots_))
