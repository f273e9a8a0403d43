"""Factorise once, solve for every right-hand side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigvalsh, svdvals
from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolver
from bilevel.linear._judge import eigenvalue_uncertainty
from bilevel.linear._pseudo_inverse import PseudoInverse
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.tolerance import auto_relative

__all__ = ["Exact", "offer_factor", "pseudo_inverse_of", "solve_nearby"]


@dataclass(frozen=True)
class Exact(LinearSolver):
    """Materialise the matrix and factorise it: Cholesky, or LU where it is not positive definite.

    The factorisation is kept with the operator and serves every further right-hand side. A solution is refined once if its
    residual is above the threshold. If Newton's method has just factorised a nearby matrix, those factors are used, with
    refinements until the residual is down to rounding. If this fails, the matrix itself is factorised.

    A symmetric matrix that is not positive definite is diagnosed by its eigenvalues, any other matrix by its singular
    values. It is reported as singular if the reciprocal condition number is below n·eps. Rows and columns are scaled alike
    first, so that the units of the unknowns do not matter.

    Costs n products to materialise, n³/3 (Cholesky) to 2n³/3 (LU) operations and batch · n² numbers of memory.

    Parameters
    ----------
    max_bytes
        The largest memory for the matrices, in bytes (default 2 GiB).
    indefinite
        Accept a Hessian that is not positive definite, to differentiate a saddle or a maximum on purpose.

    Raises
    ------
    ArgumentError
        On use, if the matrices would take more than ``max_bytes``.

    References
    ----------
    Golub, Van Loan, "Matrix Computations", 4th ed., 2013, sections 3.4 (LU), 3.5 (iterative refinement) and 4.2 (Cholesky).

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

    knows_null_space = True

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        base = operator.distinct
        n = base.size
        memory = base.batch * n * n * torch.finfo(base.dtype).bits // 8
        if memory > self.max_bytes:
            raise ArgumentError(
                f"Exact: expected matrices of at most {self.max_bytes / 2**30:.3g} GiB, got {base.batch} of order {n}, "
                f"which take {memory / 2**30:.3g} GiB; pass linear_solver=CG() (or GMRES() where not symmetric), or "
                "raise max_bytes"
            )
        lent = operator.memo.get(_OFFERED)
        if lent is not None and Exact not in operator.memo:
            x, residual, good = _refine(lent.factor, operator, rhs, threshold, _LENT_STEPS)
            if good:
                done = torch.zeros(operator.batch, dtype=torch.int64, device=rhs.device)
                return LinearSolution(x, torch.full_like(done, n), done, residual)
        factor = operator.memo.get(Exact)
        if factor is None:
            factor = _factorize(base.dense(), base.symmetric, base.expect_definite)
            operator.memo[Exact] = factor
        x, residual, _ = _refine(factor, operator, rhs, threshold, 1)
        status = factor.status
        if self.indefinite or not base.expect_definite:
            meant = torch.full_like(status, Status.CONVERGED)
            if factor.pseudo is not None:
                meant = torch.where(factor.pseudo.singular, torch.full_like(status, Status.MINIMUM_NORM), meant)
            status = torch.where(status == Status.INDEFINITE, meant, status)
        status = status.repeat(operator.repeats)
        floor = None if bool((residual.norm(dim=-1) <= threshold).all()) else _floor(factor, operator, x, rhs)
        return LinearSolution(x, torch.full_like(status, n), status, residual, floor=floor)

    def propose(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor | None:
        lent = operator.memo.get(_OFFERED)
        return _columnwise(lent.factor.solve, operator, rhs) if lent is not None and lent.exact else None


def pseudo_inverse_of(operator: LinearOperator) -> PseudoInverse | None:
    """Return the pseudo-inverse of the singular matrices of ``operator``, if :class:`Exact` has factorised it and found some."""
    factor = operator.memo.get(Exact)
    return None if factor is None else factor.pseudo


_OFFERED = "factor of a matrix nearby"
_LENT_STEPS = 6
# A scaled matrix of condition number κ < eps^−0.6 leaves more than a third of the digits of x.
_LEAST_REGULAR = 0.6


@dataclass(frozen=True, eq=False)
class _OfferedFactor:
    """A factorisation of matrices near those of an operator. ``exact``: they probably are those of the operator."""

    factor: _Factor
    exact: bool


def offer_factor(operator: LinearOperator, factor: torch.Tensor, *, exact: bool = False) -> None:
    """Offer Cholesky factors (batch, n, n) of matrices near those of the symmetric ``operator``, such as Newton's last ones.

    :class:`Exact` then solves by iterative refinement with these factors. If that converges to rounding, it needs no
    matrices and no factorisation of its own. Factors of other sizes are ignored. ``exact``: they probably belong to the
    operator's own matrices, as after a single step of Newton's method.
    """
    n, batch = operator.size, operator.batch // operator.repeats
    if operator.symmetric and n and factor.shape == (batch, n, n):
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        # A matrix that may be singular is factorised itself, so that the status is right. The two matrices differ by
        # about the last Newton step, the square root of the accuracy, and so may their eigenvalues. The ratio of a
        # pivot to its diagonal entry does not depend on units.
        least = 4 * auto_relative(factor.dtype) ** 0.5
        if bool((pivots > least**0.5 * torch.linalg.vector_norm(factor, dim=-1)).all()):
            status = torch.zeros(batch, dtype=torch.int64, device=factor.device)
            operator.memo.setdefault(_OFFERED, _OfferedFactor(_Factor(status, cholesky=factor), exact))


def solve_nearby(operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor:
    """Return A⁻¹ ``rhs`` (batch, n) to some digits, if factors of a nearby matrix are available."""
    offered = operator.memo.get(_OFFERED)
    if offered is not None:
        return _columnwise(offered.factor.solve, operator, rhs)
    return Exact().solve(operator, rhs, 1e-3 * rhs.norm(dim=-1)).x


def _refine(
    factor: _Factor, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return x, its residual, and whether the residual is at rounding level, after at most ``most`` refinements."""
    eps = torch.finfo(rhs.dtype).eps
    floor = 16 * eps * rhs.norm(dim=-1)
    x = _columnwise(factor.solve, operator, rhs)
    residual = rhs - operator.matvec(x)
    norm = residual.norm(dim=-1)
    for _ in range(most):
        if bool(((norm <= floor) | ((norm <= threshold) & (most == 1))).all()):
            break
        moved = x + _columnwise(factor.solve, operator, residual)
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


def _floor(factor: _Factor, operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor | None:
    """Return the residual norms that rounding can cause; zero if the scaled matrix is ill-conditioned too. None without scaling.

    This is the residual of a componentwise backward error of one unit for each operation (Oettli & Prager,
    "Compatibility of approximate solution of linear equations with given error bounds for coefficients and right-hand
    sides", 1964).
    """
    if factor.rows is None or factor.columns is None:
        return None
    matrix, eps = operator.distinct.dense().nan_to_num(), torch.finfo(rhs.dtype).eps
    values = svdvals(factor.rows.unsqueeze(-1) * matrix * factor.columns.unsqueeze(-2))
    least = values[..., -1]
    if factor.pseudo is not None:  # which leaves the least ones out
        kept = torch.where(values > factor.pseudo.cutoff * values[..., :1], values, values[..., :1])
        least = torch.where(factor.pseudo.singular, kept.amin(-1), least)
    # A huge x along a null vector must not raise its own floor. A regular matrix has a condition number of up to 1e4 in float32.
    sound = (least > eps**_LEAST_REGULAR * values[..., 0]) & (factor.status != Status.NOT_FINITE)
    reach = _columnwise(matrix.abs().matmul, operator, x.abs()) + rhs.abs()
    floor = torch.where(sound.repeat(operator.repeats), operator.size * eps * reach.norm(dim=-1), 0.0)
    return floor if factor.pseudo is None else torch.minimum(floor, eps**0.5 * rhs.norm(dim=-1))


def _columnwise(
    function: Callable[[torch.Tensor], torch.Tensor], operator: LinearOperator, rhs: torch.Tensor
) -> torch.Tensor:
    """Return ``function`` (batch, n, k) ↦ (batch, n, k) for vectors (k · batch, n). Vectors that share a matrix become columns."""
    if operator.repeats == 1:
        return function(rhs.unsqueeze(-1)).squeeze(-1)
    columns = rhs.reshape(operator.repeats, -1, operator.size).permute(1, 2, 0)  # (batch, n, repeats)
    return function(columns).permute(2, 0, 1).reshape(rhs.shape)


@dataclass(frozen=True, eq=False)
class _Factor:
    """A batch of factorisations: Cholesky if every matrix allows it, else LU, of the matrices scaled by ``rows`` and ``columns``.

    Singular matrices have a pseudo-inverse, even if their status is INDEFINITE.
    """

    status: torch.Tensor
    cholesky: torch.Tensor | None = None
    lu: tuple[torch.Tensor, torch.Tensor] | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    pseudo: PseudoInverse | None = None

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        if self.cholesky is not None:
            solved = torch.cholesky_solve(right, self.cholesky)
        else:
            assert self.lu is not None and self.rows is not None and self.columns is not None
            solved = torch.linalg.lu_solve(*self.lu, self.rows.unsqueeze(-1) * right)
            solved = self.columns.unsqueeze(-1) * solved
        if self.pseudo is None:
            return solved
        these = self.pseudo.singular
        return solved.index_put((these,), self.pseudo.apply(right[these]))


# Entries of small matrices too have errors of some units in the last place.
_LEAST_ORDER = 32


def _factorize(matrix: torch.Tensor, symmetric: bool, definite: bool) -> _Factor:
    """Factorise (batch, n, n). ``definite``: a small negative eigenvalue can only be an error of the matrix."""
    status = torch.zeros(matrix.shape[0], dtype=torch.int64, device=matrix.device)
    n = matrix.shape[-1]
    if n == 0:
        return _Factor(status, cholesky=matrix)
    finite = torch.isfinite(matrix).all(dim=-1).all(dim=-1)
    if not bool(finite.all()):
        # LAPACK refuses NaN. The problem is marked, and the identity replaces its matrix.
        status = torch.where(finite, status, torch.full_like(status, Status.NOT_FINITE))
        eye = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(finite[:, None, None], matrix, eye)
    smallest = max(n, _LEAST_ORDER) * torch.finfo(matrix.dtype).eps
    factor: torch.Tensor | None = None
    if symmetric:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if bool((info == 0).all()):
            # The squared ratio of the pivots bounds the reciprocal condition number from above. The ratios of pivots to
            # diagonal entries bound that of the scaled matrix. The exact number is computed only if a bound is near the
            # limit.
            pivots = factor.diagonal(dim1=-2, dim2=-1)
            left = torch.minimum(pivots.amin(-1) / pivots.amax(-1), (pivots / factor.norm(dim=-1)).amin(-1))
            doubtful = left**2 < 1e3 * n * torch.finfo(matrix.dtype).eps
            if not bool(doubtful.any()):
                return _Factor(status, cholesky=factor)
        else:
            factor = None
    # Units that differ by many orders of magnitude lead to a large condition number, but elimination is not affected.
    rows, columns = _scales(matrix, symmetric)
    scaled = rows.unsqueeze(-1) * matrix * columns.unsqueeze(-2)
    singular = torch.zeros_like(finite)
    if symmetric:
        eigenvalues = eigvalsh(scaled)
        largest = eigenvalues.abs().amax(-1)
        negative = -eigenvalues[..., 0] / largest
        # At a minimum, a small negative eigenvalue of the Hessian is an error, and shows how large errors are.
        wrong = (negative > smallest) & (negative <= eigenvalue_uncertainty(n, matrix.dtype)) & definite
        singular = finite & ((eigenvalues.abs().amin(-1) <= smallest * largest) | wrong)
        # A matrix with a zero eigenvalue and a negative one beyond rounding is both. INDEFINITE is the more informative
        # status.
        indefinite = finite & (negative > smallest) & ~wrong
        status = torch.where(singular, torch.full_like(status, Status.MINIMUM_NORM), status)
        status = torch.where(indefinite, torch.full_like(status, Status.INDEFINITE), status)
    lu: torch.Tensor | None = None
    if factor is None:
        lu, order, info = torch.linalg.lu_factor_ex(scaled)
    if not symmetric:
        assert lu is not None
        diagonal = lu.diagonal(dim1=-2, dim2=-1).abs()
        doubtful = (info != 0) | (diagonal.amin(-1) < 1e3 * smallest * diagonal.amax(-1))
        if bool(doubtful.any()):
            values = svdvals(scaled)
            singular = (values[..., -1] <= smallest * values[..., 0]) & finite
            status = torch.where(singular, torch.full_like(status, Status.MINIMUM_NORM), status)
    pseudo = PseudoInverse.of(scaled, rows, columns, singular, symmetric) if bool(singular.any()) else None
    if factor is not None:
        return _Factor(status, cholesky=factor, rows=rows, columns=columns, pseudo=pseudo)
    assert lu is not None
    return _Factor(status, lu=(lu, order), rows=rows, columns=columns, pseudo=pseudo)


_ROUNDS = 8


def _scales(matrix: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return powers of two for rows and columns (batch, n) that scale the largest entry of each to about one.

    Rows and columns are scaled at once by the square roots of their largest entries, which keeps a symmetric matrix
    symmetric. Powers of two make the scaling exact. (Ruiz, "A scaling algorithm to equilibrate both rows and columns
    norms in matrices", 2001.)
    """
    rows = torch.ones_like(matrix[..., 0])
    columns = rows
    for _ in range(_ROUNDS):
        sizes = (rows.unsqueeze(-1) * matrix * columns.unsqueeze(-2)).abs()
        more_rows, more_columns = _half_way(sizes.amax(-1)), _half_way(sizes.amax(-2))
        if bool((more_rows == 1).all() & (more_columns == 1).all()):
            break
        rows, columns = rows * more_rows, columns * more_columns
    return rows, rows if symmetric else columns


def _half_way(size: torch.Tensor) -> torch.Tensor:
    factor = torch.exp2(-0.5 * torch.log2(size)).nan_to_num(nan=1.0, posinf=1.0)
    return torch.exp2(torch.round(torch.log2(factor)))
