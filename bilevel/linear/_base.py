"""The contract of linear solvers, and the function that judges their results.

A solver sees an operator of shape (batch, n, n), right-hand sides (batch, n) and, per problem, the norm that the
residual is to reach. It returns solutions, step counts and statuses. :func:`solve_linear` scales the problem, computes
the true residual and decides the status. It treats all methods, and a user's function, alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bilevel._torch.factorisations import LinAlgError
from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.linear._judge import judge, refuted, rounding
from bilevel.linear._null_space import known_null_space
from bilevel.linear._second_solves import exceeds, minimum_norm, solve_again, solve_closer
from bilevel.linear._solution import LinearOutcome, LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Basis, Status
from bilevel.tolerance import Target, Tolerance

__all__ = [
    "CallableLinearSolver",
    "LinearSolver",
    "LinearSolverLike",
    "as_linear_solver",
    "solve_linear",
]


class LinearSolver(ABC):
    """A solver of A x = b for a batch. Subclasses are frozen dataclasses of settings with one method, ``solve``.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> from bilevel import LinearSolution, LinearSolver, Status
    >>> class Halving(LinearSolver):  # for A = 2 I
    ...     def solve(self, operator, rhs, threshold, start=None):
    ...         steps = torch.ones(len(rhs), dtype=torch.int64)
    ...         return LinearSolution(rhs / 2, steps, torch.full_like(steps, int(Status.CONVERGED)))
    >>> Halving()(DenseOperator(2 * torch.eye(2)), torch.tensor([[1.0, 3.0]]))
    tensor([[0.5000, 1.5000]])
    """

    @property
    def has_budget(self) -> bool:
        """Whether the caller chose a number of steps. Spending it is then no failure, as in "5 CG steps"."""
        return getattr(self, "max_steps", None) is not None

    @property
    def name(self) -> str:
        """The name used in messages and reports."""
        return type(self).__name__

    @property
    def knows_null_space(self) -> bool:
        """Whether the method itself distinguishes singular matrices from regular ones, as a factorisation does."""
        return False

    @abstractmethod
    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        """Solve A x = b.

        Parameters
        ----------
        operator
            A, (batch, n, n).
        rhs
            b (batch, n), finite.
        threshold
            (batch,): a problem ends when ‖b − A x‖ is at most this. 0: spend the budget.
        start
            (batch, n) to begin from; zero if None.
        """

    def solve_certified(
        self,
        operator: LinearOperator,
        rhs: torch.Tensor,
        threshold: torch.Tensor,
        start: torch.Tensor | None,
        mu: float,
        error: torch.Tensor,
    ) -> LinearSolution:
        """Solve A x = b for a symmetric A whose eigenvalues are at least ``mu``. The default calls :meth:`solve`.

        Override it in a method that has a better error bound than ‖b − A x‖/μ. The method may end a problem when it has
        proven ‖x − A⁻¹b‖ ≤ ``error`` (batch,). With ``error`` 0 the residual alone decides. The method returns the
        bound, and marks the problems that refute μ.
        """
        return self.solve(operator, rhs, threshold, start)

    def solve_unverified(self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor) -> LinearSolution:
        """Solve A x = b for a caller that computes b − A x itself. The default calls :meth:`solve`.

        Override it in a method that updates its residual by a recurrence. The method ends on the recursive residual and
        returns it. The caller verifies it by a product.
        """
        return self.solve(operator, rhs, threshold)

    def propose(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor | None:
        """Return a probable A⁻¹ b without any product, or None. The default is None.

        The caller verifies it with a product that it needs anyway. If the residual is small enough, the solve is
        finished.
        """
        return None

    def serves(self, operator: LinearOperator) -> bool:
        """Return whether this can solve with ``operator``. A solver that keeps factors can only if they are those of its matrices."""
        return True

    def __call__(self, operator: LinearOperator, rhs: torch.Tensor, tolerance: Tolerance | None = None) -> torch.Tensor:
        """Solve A x = b to ``tolerance`` and return x (batch, n), even if the solve failed; see ``solve_linear``.

        Raises
        ------
        ShapeError, DtypeError
            If ``rhs`` is not one vector of the operator's dtype for each of its matrices.
        """
        if rhs.shape != (operator.batch, operator.size):
            raise ShapeError(
                f"{self.name}: expected a right-hand side of shape {(operator.batch, operator.size)}, one row for each "
                f"matrix of {operator!r}, got {tuple(rhs.shape)}; reshape it, or wrap the operator in a RepeatedOperator "
                "for many right-hand sides of one matrix"
            )
        if rhs.dtype != operator.dtype:
            raise DtypeError(
                f"{self.name}: expected a right-hand side of the operator's dtype, {operator.dtype}, got {rhs.dtype}; "
                "convert one of them"
            )
        target = (tolerance or Tolerance()).linear(rhs.dtype)
        return solve_linear(self, operator, rhs, target).x


@dataclass(frozen=True)
class CallableLinearSolver(LinearSolver):
    """A user's function (operator, rhs) ↦ x as a linear solver. Its solution is judged by the true residual."""

    function: Callable[[LinearOperator, torch.Tensor], torch.Tensor]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        unknown = torch.zeros(rhs.shape[0], dtype=torch.int64, device=rhs.device)
        try:
            with torch.no_grad():
                x = self.function(operator, rhs)
        except LinAlgError:  # one matrix failed, and the whole batch has no solution
            return LinearSolution(torch.zeros_like(rhs), unknown, torch.full_like(unknown, Status.BREAKDOWN))
        if not isinstance(x, torch.Tensor) or x.shape != rhs.shape:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ShapeError(
                f"linear_solver {self.name}: expected a tensor of shape {tuple(rhs.shape)}, one row for each "
                f"right-hand side, got {got}; return x with A x = rhs, batched as rhs is"
            )
        x = x.detach().to(rhs)
        return LinearSolution(x, unknown, torch.full_like(unknown, Status.NOT_CONVERGED))


LinearSolverLike: TypeAlias = LinearSolver | Callable[[LinearOperator, torch.Tensor], torch.Tensor]


def as_linear_solver(solver: LinearSolverLike) -> LinearSolver:
    """Return ``solver`` as a :class:`LinearSolver`; a function (operator, rhs) -> x is wrapped."""
    if isinstance(solver, LinearSolver):
        return solver
    if isinstance(solver, type):
        raise ArgumentError(
            f"expected linear_solver to be an instance, got the class {solver.__name__}; write {solver.__name__}(...)"
        )
    if callable(solver):
        return CallableLinearSolver(solver)
    raise ArgumentError(
        f"expected linear_solver to be a LinearSolver or a function (operator, rhs) -> x, got {solver!r}; "
        "for example bilevel.CG()"
    )


def solve_linear(
    solver: LinearSolver,
    operator: LinearOperator,
    rhs: torch.Tensor,
    target: Target,
    start: torch.Tensor | None = None,
    *,
    verify: bool = True,
    product: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seen: bool = True,
    noise: torch.Tensor | None = None,
    examine: bool = False,
) -> LinearOutcome:
    """Solve A x = b and judge the answer by its true residual.

    Parameters
    ----------
    solver
        The method.
    operator
        A, (batch, n, n).
    rhs
        b (batch, n). Each row is scaled to unit size first, so that squares neither underflow nor overflow.
    target
        The accuracy. The absolute tolerance holds for right-hand sides of norm one and above. For smaller ones it is
        relative to ‖b‖.
    start
        The initial guess (batch, n). A problem uses it only if its residual is smaller than that of zero.
    verify
        False: judge by the method's own residual, because the caller computes b − A x itself. It cannot be combined
        with μ or ``start``.
    product
        The caller's own v ↦ A v, which verifies a solution that the solver proposes before any product.
    seen
        False if nobody reads the residual. If no accuracy is asked and all problems spent their budgets, the residual
        is then NaN, and its product is saved. Solutions and statuses do not depend on it.
    noise
        (batch,): the norm of the rounding error in b, which may lie outside the range of A. It counts if no accuracy is
        asked. In a second derivative, b may be the rounding error of a sum that is zero.
    examine
        Whether to look for null vectors of A if the solver cannot notice them itself. This about doubles the products.
        If A is singular, the result is the minimum-norm solution, and the status says so.
    """
    solution: LinearSolution | None = None
    if product is not None:
        solution = _proposed(solver, operator, rhs, product)
        settled = None if solution is None else _settled(solution, rhs, target)
        if settled is not None:
            return settled
    scale = rhs.abs().amax(dim=-1, keepdim=True) if rhs.shape[-1] else rhs.new_ones(rhs.shape[0], 1)
    finite = torch.isfinite(scale)
    usable = finite & (scale > 0)
    scale = torch.where(usable, scale, torch.ones_like(scale))
    if solution is not None:  # not scaled: the caller has verified it as it is
        scale = torch.ones_like(scale)
    # A right-hand side with a NaN is replaced by zero and marked, so that it cannot affect the other problems.
    unit, sound = rhs / scale, bool(usable.all())
    unit = unit if sound else torch.where(usable, unit, torch.zeros_like(rhs))
    norm = unit.norm(dim=-1)
    size = scale.squeeze(-1)
    threshold = _threshold(target, norm, size)
    begun = None if start is None else _safe(start / scale)
    mu = target.strong_convexity
    # The error that the threshold implies. A default threshold concerns the residual alone.
    error = threshold / mu if mu is not None and target.asked else torch.zeros_like(threshold)
    if solution is None and not verify:
        assert mu is None and start is None
        solution = solver.solve_unverified(operator, unit, threshold)
    elif solution is None and (mu is None or not operator.symmetric):
        solution = solver.solve(operator, unit, threshold, begun)
    elif solution is None:
        assert mu is not None
        solution = solver.solve_certified(operator, unit, threshold, begun, mu, error)
    x = solution.x
    if not seen and _as_meant(solution, target):
        residual = torch.full_like(unit, float("nan"))
        status = torch.full_like(solution.status, Status.BUDGET_SPENT)
    else:
        residual = unit - operator.matvec(x) if solution.residual is None else solution.residual
        status = judge(solver.has_budget, operator, unit, target, threshold, error, solution, residual.norm(dim=-1))
        coarse = status == Status.SINGULAR
        if noise is not None and not target.asked and bool(coarse.any()):
            threshold = torch.where(coarse, torch.maximum(threshold, noise / size), threshold)
            solution = solve_again(solver.solve, operator, unit, threshold, coarse, solution)
            x, residual = solution.x, unit - operator.matvec(solution.x)
            status = judge(solver.has_budget, operator, unit, target, threshold, error, solution, residual.norm(dim=-1))
        if (examine or known_null_space(operator) is not None) and mu is None and not target.silent:
            x, residual, status = minimum_norm(operator, unit, threshold, solution, residual, status)
    residual_norm = residual.norm(dim=-1)
    bound = torch.full_like(residual_norm, float("nan"))
    if mu is not None:
        rounded, size_of_a = rounding(operator, x, unit)
        bound = residual_norm / mu
        if solution.error_bound is not None:
            bound = torch.fmin(bound, solution.error_bound)
        bound = bound + rounded / mu
        if target.asked:
            short = (status == Status.CONVERGED) & exceeds(bound, error)
            if bool(short.any()):
                x, bound = solve_closer(solver.solve, operator, unit, threshold, rounded, mu, short, x, bound)
                residual = unit - operator.matvec(x)
                residual_norm = residual.norm(dim=-1)
                status = torch.where(short & exceeds(bound, error), int(Status.STAGNATED), status)
        contradicted = refuted(operator, x, unit - residual, mu, size_of_a)
        if solution.refuted is not None:
            contradicted = contradicted | solution.refuted
        # A wrong μ is the more serious fault: it replaces the statuses of problems that ran out of steps or digits,
        # too.
        contradicted = contradicted & (status <= Status.STAGNATED) | (
            status == Status.MINIMUM_NORM
        )  # A then has the eigenvalue 0
        status = torch.where(contradicted, torch.full_like(status, Status.REFUTED), status)
        bound = torch.where(contradicted, torch.full_like(bound, float("nan")), bound)
    x, residual_norm = x * scale, residual_norm * size
    if not sound:
        status = torch.where(finite.squeeze(-1), status, torch.full_like(status, Status.NOT_FINITE))
        x = torch.where(finite, x, float("nan"))
        unknown = torch.full_like(size, float("nan"))
        residual_norm, norm = (torch.where(finite.squeeze(-1), length, unknown) for length in (residual_norm, norm))
    if not bool(torch.isfinite(x.sum())):
        # The solution may overflow when it is scaled back.
        beyond = ((status == Status.CONVERGED) | (status == Status.MINIMUM_NORM)) & ~torch.isfinite(x).all(dim=-1)
        status = torch.where(beyond, torch.full_like(status, Status.NOT_FINITE), status)
    return LinearOutcome(
        x, status, solution.iterations, residual * scale, residual_norm, threshold * size, bound * size,
        Basis.RESIDUAL if mu is None else Basis.CERTIFIED, norm * size,
    )  # fmt: skip


def _proposed(
    solver: LinearSolver,
    operator: LinearOperator,
    rhs: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
) -> LinearSolution | None:
    """Return the solver's proposal if its true residual is at rounding level, else None."""
    x = solver.propose(operator, rhs)
    if x is None:
        return None
    scale, info = rhs.abs().amax(dim=-1), torch.finfo(rhs.dtype)
    # Outside this range squares underflow or overflow. A NaN is outside too.
    if not bool((((scale > info.tiny**0.25) & (scale < info.max**0.25)) | (scale == 0)).all()):
        return None
    residual = rhs - product(x)
    if not bool((residual.norm(dim=-1) <= 16 * info.eps * rhs.norm(dim=-1)).all()):
        return None
    done = torch.zeros(operator.batch, dtype=torch.int64, device=rhs.device)
    return LinearSolution(x, torch.full_like(done, operator.size), done, residual)


def _threshold(target: Target, norm: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return the residual to reach (batch,), in units of the problem whose right-hand side was divided by ``size``."""
    return torch.maximum(target.relative * norm, target.absolute * torch.minimum(norm, 1 / size))


def _settled(solution: LinearSolution, rhs: torch.Tensor, target: Target) -> LinearOutcome | None:
    """Return the outcome of a proposal that is accurate enough and needs no error bound, else None."""
    assert solution.residual is not None
    norm, left = rhs.norm(dim=-1), solution.residual.norm(dim=-1)
    threshold = _threshold(target, norm, torch.ones_like(norm))
    if target.strong_convexity is not None or not bool((left <= threshold).all()):
        return None
    unknown = torch.full_like(norm, float("nan"))
    return LinearOutcome(
        solution.x,
        solution.status,
        solution.iterations,
        solution.residual,
        left,
        threshold,
        unknown,
        Basis.RESIDUAL,
        norm,
    )


def _as_meant(solution: LinearSolution, target: Target) -> bool:
    """Return whether no accuracy was asked and every problem spent its budget. The residual then decides nothing."""
    meant = target.silent and target.strong_convexity is None and solution.residual is None
    return meant and bool((solution.status == Status.MAX_STEPS).all()) and bool(torch.isfinite(solution.x.sum()))


def _safe(start: torch.Tensor) -> torch.Tensor:
    return start.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
