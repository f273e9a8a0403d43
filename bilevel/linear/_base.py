"""The contract of linear solvers, and the one place that judges what they return.

A solver sees an operator of shape (batch, n, n), right-hand sides (batch, n) and, per problem, the norm that the
residual is to reach. It returns iterates, steps and what it noticed. :func:`solve_linear` scales the
problem, recomputes the true residual and decides the status, alike for all methods and for a user's function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.linear._decompositions import LinAlgError
from bilevel.linear._range import outside_range
from bilevel.operators import FunctionOperator, LinearOperator
from bilevel.reports import Basis, Status
from bilevel.tolerance import Target, Tolerance, auto_relative

__all__ = [
    "CallableLinearSolver",
    "LinearOutcome",
    "LinearSolution",
    "LinearSolver",
    "LinearSolverLike",
    "Preconditioner",
    "as_linear_solver",
    "begin",
    "check_preconditioner",
    "doubt",
    "rounding_floor",
    "solve_linear",
]


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """What a linear solver returns.

    Parameters
    ----------
    x
        (batch, n).
    iterations
        int64 (batch,): products with the matrix that the problem needed.
    status
        int64 (batch,): a failure that the solver *noticed* (indefinite, singular, breakdown, diverged, not finite),
        or ``Status.CONVERGED`` / ``Status.MAX_STEPS`` / ``Status.STAGNATED`` as far as it can tell. ``Status.MINIMUM_NORM``: A is singular,
        and x is what the minimum-norm solution is if there is a solution; the residual decides, and it is ``Status.SINGULAR`` if there is none.
    residual
        The true residual b − A x (batch, n), if the solver has recomputed it.
    error_bound
        A bound of ‖x − A⁻¹b‖ (batch,), if the solver was told μ and can prove one below ‖b − A x‖/μ; but for rounding.
    refuted
        Bool (batch,): where the solver has met a proof that A has an eigenvalue below the μ that it was told.
    floor
        The residual norm (batch,) that rounding accounts for, where the solver knows the entries of A and that it is not singular.
    """

    x: torch.Tensor
    iterations: torch.Tensor
    status: torch.Tensor
    residual: torch.Tensor | None = None
    error_bound: torch.Tensor | None = None
    refuted: torch.Tensor | None = None
    floor: torch.Tensor | None = None


class LinearSolver(ABC):
    """Solves A x = b for a batch. Subclasses are frozen dataclasses of settings with one method, ``solve``."""

    @property
    def has_budget(self) -> bool:
        """Whether the caller chose a number of steps, which is then legitimate to spend (style: "5 CG steps")."""
        return getattr(self, "max_steps", None) is not None

    @property
    def name(self) -> str:
        """The name used in messages and reports."""
        return type(self).__name__

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
            (batch,): stop a problem when ‖b − A x‖ is at or below; 0 to spend the budget.
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
        """Solve A x = b for a symmetric A whose eigenvalues are known to be at least ``mu``; by default as :meth:`solve` does.

        A method that can do more with μ than divide a residual by it overrides this: it may stop a problem as soon as
        ‖x − A⁻¹b‖ ≤ ``error`` (batch,) is proven (0: stop by the residual alone), returns the bound, and says where μ is refuted.
        """
        return self.solve(operator, rhs, threshold, start)

    def solve_unverified(self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor) -> LinearSolution:
        """Solve A x = b for a caller that computes b − A x himself, with something else beside it; by default as :meth:`solve` does.

        A method that knows its residual by a recurrence overrides this, ends on that, and returns it as it is: the product that
        would verify it is the caller's to make.
        """
        return self.solve(operator, rhs, threshold)

    def propose(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor | None:
        """Return what is probably A⁻¹ b at the price of no product, or None; by default None.

        For a caller whose own pass over the graph makes A x along with something else: where the answer holds, that was all.
        """
        return None

    def __call__(self, operator: LinearOperator, rhs: torch.Tensor, tolerance: Tolerance | None = None) -> torch.Tensor:
        """Solve A x = b to ``tolerance`` and return x (batch, n), whatever became of it; see ``solve_linear``.

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


Preconditioner: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""r ↦ M⁻¹r on tensors (batch, n)."""


def check_preconditioner(where: str, preconditioner: Preconditioner | None) -> None:
    """Raise :class:`ArgumentError` unless ``preconditioner`` is a function or None."""
    if preconditioner is not None and not callable(preconditioner):
        raise ArgumentError(
            f"{where}: expected preconditioner to be a function of r (batch, n), got {preconditioner!r}; pass one"
        )


def begin(operator: LinearOperator, rhs: torch.Tensor, start: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and b − A x to begin with: ``start`` where it is better than zero, and no product where there is none."""
    if start is None:
        return torch.zeros_like(rhs), rhs
    residual = rhs - operator.matvec(start)
    better = (residual.norm(dim=-1) < rhs.norm(dim=-1)).unsqueeze(-1)
    return torch.where(better, start, torch.zeros_like(start)), torch.where(better, residual, rhs)


@dataclass(frozen=True)
class CallableLinearSolver(LinearSolver):
    """A user's function (operator, rhs) ↦ x as a linear solver; its answer is judged by its true residual."""

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
        except LinAlgError:  # of one matrix, and the whole batch is without an answer
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


@dataclass(frozen=True, eq=False)
class LinearOutcome:
    """A judged linear solve; every tensor per problem."""

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor
    residual_norm: torch.Tensor
    threshold: torch.Tensor
    error_bound: torch.Tensor
    basis: Basis
    scale: torch.Tensor


def doubt(size: int, dtype: torch.dtype) -> float:
    """Return the part of its largest eigenvalue by which an eigenvalue of a Hessian of order ``size`` may be wrong.

    It is rounded, and taken at a solution that is known to about the accuracy asked by default: where the solution is unique up to a
    symmetry only, an eigenvalue that is zero at the solution is of either sign beside it.
    """
    return min(max(size * torch.finfo(dtype).eps, 4 * auto_relative(dtype)), 1e-3)


def rounding_floor(operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Return, per problem, the residual norm that rounding alone accounts for: one product.

    Moving every entry of x by one unit in its last place moves A x by about eps ‖A (s∘x)‖ for signs s. No
    solver can answer for less.
    """
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (x.shape[-1],), generator=generator) * 2 - 1).to(x)
    eps = torch.finfo(x.dtype).eps
    size = rhs.norm(dim=-1)
    floor = 32 * eps * (operator.matvec(signs * x).norm(dim=-1) + size)
    # An x that has run away along a null vector must not excuse its own residual.
    return torch.minimum(floor, eps**0.5 * size)


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
) -> LinearOutcome:
    """Solve A x = b and judge the answer by its true residual.

    Parameters
    ----------
    solver
        The method.
    operator
        A, (batch, n, n).
    rhs
        b (batch, n). Each is scaled to unit size first, so that neither 1e-30 nor 1e30 is lost.
    target
        The accuracy asked: the absolute bound holds for right-hand sides of norm one and above, and relative to
        ‖b‖ below.
    start
        (batch, n) to begin from; used for a problem only where it is better than zero.
    verify
        False to judge by the residual that the method has, however it came by it: for a caller that computes b − A x himself
        before anything rests on it. Not with μ, nor with ``start``.
    product
        v ↦ A v as the caller makes it, with something else beside it, for an answer that the solver has before any product.
    seen
        False where nobody will look at the residual: where budgets alone were meant, and all of them were spent, it is then NaN, and the
        product for it is not made. The answers and their success do not depend on it.
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
    if solution is not None:  # left as it is, for whoever has made its product
        scale = torch.ones_like(scale)
    # A problem with a NaN on the right is solved with zero instead and marked, so that it cannot spoil the others.
    unit, sound = rhs / scale, bool(usable.all())
    unit = unit if sound else torch.where(usable, unit, torch.zeros_like(rhs))
    norm = unit.norm(dim=-1)
    size = scale.squeeze(-1)
    threshold = _threshold(target, norm, size)
    begun = None if start is None else _safe(start / scale)
    mu = target.strong_convexity
    # The error that the threshold stands for; one that nobody asked for is meant as a residual.
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
        status = _judge(solver, operator, unit, target, threshold, error, solution, residual.norm(dim=-1))
    residual_norm = residual.norm(dim=-1)
    bound = torch.full_like(residual_norm, float("nan"))
    if mu is not None:
        noise, size_of_a = _rounding(operator, x, unit)
        bound = residual_norm / mu
        if solution.error_bound is not None:
            bound = torch.fmin(bound, solution.error_bound)
        bound = bound + noise / mu
        refuted = _refuted(operator, x, unit - residual, mu, size_of_a)
        if solution.refuted is not None:
            refuted = refuted | solution.refuted
        # It is said of whatever ended for want of steps or digits, too: it is the graver fault.
        refuted = refuted & (status <= Status.STAGNATED) | (status == Status.MINIMUM_NORM)  # which has the eigenvalue 0
        status = torch.where(refuted, torch.full_like(status, Status.REFUTED), status)
        bound = torch.where(refuted, torch.full_like(bound, float("nan")), bound)
    x, residual_norm = x * scale, residual_norm * size
    if not sound:
        status = torch.where(finite.squeeze(-1), status, torch.full_like(status, Status.NOT_FINITE))
        x = torch.where(finite, x, float("nan"))
        unknown = torch.full_like(size, float("nan"))
        residual_norm, norm = (torch.where(finite.squeeze(-1), length, unknown) for length in (residual_norm, norm))
    if not bool(torch.isfinite(x.sum())):
        # The answer to a scaled problem may lie beyond the largest number of its dtype.
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
    """Return the solver's proposal, if it has one whose true residual is down to rounding, or None."""
    x = solver.propose(operator, rhs)
    if x is None:
        return None
    scale, info = rhs.abs().amax(dim=-1), torch.finfo(rhs.dtype)
    # Squares of what is beyond these would be lost, and a NaN is beyond them too.
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
    """Return the outcome of a proposal where nothing is left to judge, or None: it was accurate enough and no bound is to be had."""
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
    """Whether every problem spent a budget that alone was meant, so that its residual decides nothing."""
    meant = target.silent and target.strong_convexity is None and solution.residual is None
    return meant and bool((solution.status == Status.MAX_STEPS).all()) and bool(torch.isfinite(solution.x.sum()))


def _rounding(operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, per problem, what rounding can hide in b − A x, and an estimate of ‖A‖; one product.

    As :func:`rounding_floor`, without the clause for an x that has run away: its bound is to be as large as it is.
    """
    generator = torch.Generator().manual_seed(1)
    signs = (torch.randint(0, 2, (x.shape[-1],), generator=generator) * 2 - 1).to(x)
    eps = torch.finfo(x.dtype).eps
    product, size = operator.matvec(signs * x).norm(dim=-1), x.norm(dim=-1)
    tiny = torch.finfo(x.dtype).tiny
    return 8 * eps * (product + rhs.norm(dim=-1)), product / size.clamp_min(tiny)


def _refuted(
    operator: LinearOperator, x: torch.Tensor, product: torch.Tensor, mu: float, size_of_a: torch.Tensor
) -> torch.Tensor:
    """Return where A x = ``product`` proves that μ is too large: xᵀAx < μ‖x‖², or ‖A x‖ < μ‖x‖ where A is not symmetric."""
    square = torch.linalg.vecdot(x, x)
    measured = torch.linalg.vecdot(x, product) if operator.symmetric else product.norm(dim=-1) * square.sqrt()
    eps = torch.finfo(x.dtype).eps
    # The margin: μ may have been computed in another way, and the product is rounded.
    least = mu * (1 - 1e-4) - 64 * eps * (size_of_a + product.norm(dim=-1) / square.sqrt())
    return (square > torch.finfo(x.dtype).tiny) & (measured < least * square)


def _safe(start: torch.Tensor) -> torch.Tensor:
    return start.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _consistent(
    operator: LinearOperator,
    rhs: torch.Tensor,
    target: Target,
    x: torch.Tensor,
    residual_norm: torch.Tensor,
    reached: torch.Tensor,
) -> torch.Tensor:
    """Return what became of systems with a singular matrix: whether b lies in its range, to the tolerance, or to the dtype's where none is."""
    status = torch.full(reached.shape, int(Status.SINGULAR), dtype=torch.int64, device=rhs.device)
    if target.asked and not bool(
        reached.all()
    ):  # the accuracy asked may be beyond the dtype, and b in the range for all that
        rounded = residual_norm <= rounding_floor(operator, x, rhs)
        status = torch.where(rounded, int(Status.STAGNATED), status)
    if target.silent:
        reached = reached | (residual_norm <= auto_relative(rhs.dtype) * rhs.norm(dim=-1))
    return torch.where(reached, int(Status.MINIMUM_NORM), status)


def _singular(
    operator: LinearOperator,
    rhs: torch.Tensor,
    x: torch.Tensor,
    threshold: torch.Tensor,
    status: torch.Tensor,
    failed: torch.Tensor,
) -> torch.Tensor:
    """Return ``status`` with ``Status.SINGULAR`` for those of the ``failed`` problems (batch,) whose b is proven to lie outside the range of A."""
    if isinstance(operator, FunctionOperator) and not operator.transposes:
        return status
    # Of an x that has run away, the residual is lost in rounding.
    residual = rhs - operator.matvec(x)
    lost = ~(residual.norm(dim=-1) <= rhs.norm(dim=-1))
    residual = torch.where(lost.unsqueeze(-1), rhs, residual)
    least = torch.maximum(threshold, 64 * torch.finfo(rhs.dtype).eps * rhs.norm(dim=-1))
    proven = outside_range(operator, residual, least, failed, doubt(operator.size, rhs.dtype))
    return torch.where(proven, int(Status.SINGULAR), status)


def _judge(
    solver: LinearSolver,
    operator: LinearOperator,
    rhs: torch.Tensor,
    target: Target,
    threshold: torch.Tensor,
    error: torch.Tensor,
    solution: LinearSolution,
    residual_norm: torch.Tensor,
) -> torch.Tensor:
    noticed = solution.status
    if bool(((noticed == Status.CONVERGED) & (residual_norm <= threshold)).all()):
        return noticed
    ended = (
        (noticed == Status.CONVERGED)
        | (noticed == Status.MAX_STEPS)
        | (noticed == Status.STAGNATED)
        | (noticed == Status.NOT_CONVERGED)
        | (noticed == Status.BREAKDOWN)  # a breakdown at the solution is a solution
        | (noticed == Status.DIVERGED)
        | (noticed == Status.MINIMUM_NORM)
    )
    reached = residual_norm <= threshold
    if solution.error_bound is not None:
        reached = reached | (solution.error_bound <= error)
    if solution.floor is not None and not target.asked:
        reached = reached | (residual_norm <= solution.floor)
    # Whether a budget that alone was meant ended within rounding is not worth a product.
    spent_as_meant = (noticed == Status.MAX_STEPS) & target.silent
    if not bool((reached | ~ended | spent_as_meant).all()) and not target.asked:
        reached = reached | (residual_norm <= rounding_floor(operator, solution.x, rhs))
    status = noticed
    short = ended & ~reached
    if bool(short.any()):
        # A solver that believes it has converged, and has not, has met the limit of its arithmetic.
        believed = noticed == Status.CONVERGED
        status = torch.where(short & believed, torch.full_like(status, Status.STAGNATED), status)
        if not target.asked and (solver.has_budget or target.silent):
            spent = short & ((noticed == Status.MAX_STEPS) | (target.silent & (noticed != Status.DIVERGED)))
            status = torch.where(spent, torch.full_like(status, Status.BUDGET_SPENT), status)
    status = torch.where(ended & reached, torch.full_like(status, Status.CONVERGED), status)
    free = noticed == Status.MINIMUM_NORM
    if bool(free.any()):
        status = torch.where(free, _consistent(operator, rhs, target, solution.x, residual_norm, reached), status)
    failed = (
        (status == Status.STAGNATED)
        | (status == Status.BREAKDOWN)
        | (status == Status.NOT_CONVERGED)
        | ((status == Status.MAX_STEPS) & (not solver.has_budget))
    )
    if bool((failed & short).any()):
        status = _singular(operator, rhs, solution.x, threshold, status, failed & short)
    # A singular matrix makes infinities; that it is singular says more.
    bad = ~torch.isfinite(residual_norm) & ended
    return torch.where(bad, torch.full_like(status, Status.NOT_FINITE), status)
