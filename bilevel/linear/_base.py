"""The contract of linear solvers, and the one place that judges what they return.

A solver sees an operator of shape (batch, n, n), right-hand sides (batch, n) and, per problem, the norm that the
residual is to reach. It returns iterates, steps and what it noticed. :func:`solve_linear` scales the
problem, recomputes the true residual and decides the status, alike for all methods and for a user's function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

import torch

from bilevel._torch.factorisations import LinAlgError
from bilevel.errors import ArgumentError, DtypeError, ShapeError
from bilevel.linear._judge import judge, refuted, rounding
from bilevel.linear._null_space import find_null_space, known_null_space, without_null_part
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Basis, Status
from bilevel.tolerance import Target, Tolerance

__all__ = [
    "CallableLinearSolver",
    "LinearOutcome",
    "LinearSolver",
    "LinearSolverLike",
    "MakesPreconditioner",
    "Preconditioner",
    "as_linear_solver",
    "begin",
    "check_preconditioner",
    "solve_linear",
]


class LinearSolver(ABC):
    """Solves A x = b for a batch. Subclasses are frozen dataclasses of settings with one method, ``solve``.

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

    knows_null_space: ClassVar[bool] = False
    """Whether the method itself tells singular matrices from regular ones, as a factorisation does."""

    @property
    def has_budget(self) -> bool:
        """Whether the caller chose a number of steps, which is then legitimate to spend, as in "5 CG steps"."""
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

        Override it in a method that can use μ beyond dividing a residual by it. The method may stop a problem as soon as ‖x −
        A⁻¹b‖ ≤ ``error`` (batch,) is proven; 0 means that the residual alone decides. It returns the bound, and reports where μ
        is refuted.
        """
        return self.solve(operator, rhs, threshold, start)

    def solve_unverified(self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor) -> LinearSolution:
        """Solve A x = b for a caller that computes b − A x himself, with something else beside it; by default as :meth:`solve` does.

        Override it in a method that knows its residual by a recurrence. It ends on that residual, and returns it. The caller
        makes the product that verifies it.
        """
        return self.solve(operator, rhs, threshold)

    def propose(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor | None:
        """Return what is probably A⁻¹ b at the price of no product, or None; by default None.

        For a caller whose own pass over the graph makes A x along with something else: where the answer holds, that was all.
        """
        return None

    def serves(self, operator: LinearOperator) -> bool:
        """Return whether this can solve with ``operator``; of a solver that keeps factors, whether they are of its matrices."""
        return True

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


@runtime_checkable
class MakesPreconditioner(Protocol):
    """What makes a preconditioner of an operator, such as :class:`bilevel.Nystrom`."""

    def preconditioner(self, operator: LinearOperator) -> Preconditioner:
        """Return r ↦ M⁻¹r for the matrices of ``operator``."""


def check_preconditioner(where: str, preconditioner: Preconditioner | MakesPreconditioner | None) -> None:
    """Raise :class:`ArgumentError` unless ``preconditioner`` is a function, makes one, or is None."""
    if isinstance(preconditioner, MakesPreconditioner) and not isinstance(preconditioner, type):
        return
    if preconditioner is not None and not (callable(preconditioner) and not isinstance(preconditioner, LinearSolver)):
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
    noise
        (batch,): the norm of a part of b outside the range of A that is known to be rounding, where no accuracy was asked. In a second
        derivative, b may be the rounding of a sum that is zero.
    examine
        Whether to look for free directions where a solver has converged that would not notice them, at the price of about as many products again.
        Where there are some, the answer is the one of minimum norm, and its status says so.
    """
    solution: LinearSolution | None = None
    if product is not None:
        solution, settled = _proposed(solver, operator, rhs, product, target)
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
        status = judge(solver.has_budget, operator, unit, target, threshold, error, solution, residual.norm(dim=-1))
        coarse = status == Status.SINGULAR
        if noise is not None and not target.asked and bool(coarse.any()):
            threshold = torch.where(coarse, torch.maximum(threshold, noise / size), threshold)
            solution = _again(solver, operator, unit, threshold, coarse, solution)
            x, residual = solution.x, unit - operator.matvec(solution.x)
            status = judge(solver.has_budget, operator, unit, target, threshold, error, solution, residual.norm(dim=-1))
        if (examine or known_null_space(operator) is not None) and mu is None and not target.silent:
            x, residual, status = _examined(operator, unit, threshold, solution, residual, status)
    residual_norm = residual.norm(dim=-1)
    bound = torch.full_like(residual_norm, float("nan"))
    if mu is not None:
        rounded, size_of_a = rounding(operator, x, unit)
        bound = residual_norm / mu
        if solution.error_bound is not None:
            bound = torch.fmin(bound, solution.error_bound)
        bound = bound + rounded / mu
        if target.asked:
            short = (status == Status.CONVERGED) & _exceeds(bound, error)
            if bool(short.any()):
                x, bound = _closer(solver, operator, unit, threshold, rounded, mu, short, x, bound)
                residual = unit - operator.matvec(x)
                residual_norm = residual.norm(dim=-1)
                status = torch.where(short & _exceeds(bound, error), int(Status.STAGNATED), status)
        contradicted = refuted(operator, x, unit - residual, mu, size_of_a)
        if solution.refuted is not None:
            contradicted = contradicted | solution.refuted
        # It is said of whatever ended for want of steps or digits, too: it is the graver fault.
        contradicted = contradicted & (status <= Status.STAGNATED) | (
            status == Status.MINIMUM_NORM
        )  # with an eigenvalue 0
        status = torch.where(contradicted, torch.full_like(status, Status.REFUTED), status)
        bound = torch.where(contradicted, torch.full_like(bound, float("nan")), bound)
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


_LEAST_EXAMINATION = 50


def _examined(
    operator: LinearOperator,
    rhs: torch.Tensor,
    threshold: torch.Tensor,
    solution: LinearSolution,
    residual: torch.Tensor,
    status: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, its residual and its status with the minimum-norm answers of converged problems whose matrices prove to be singular."""
    x, converged = solution.x, status == Status.CONVERGED
    if not bool(converged.any()) or not operator.size:
        return x, residual, status
    taken = int(solution.iterations.amax()) or operator.size  # of a user's function it is not known
    most = 2 * taken + _LEAST_EXAMINATION
    free = converged & find_null_space(operator, most).singular.repeat(operator.repeats)
    if not bool(free.any()):
        return x, residual, status
    moved, changed = without_null_part(operator, x, free, most)
    status = torch.where(free, int(Status.MINIMUM_NORM), status)
    if not bool(changed.any()):
        return x, residual, status
    left = rhs - operator.matvec(moved)
    norm, before = left.norm(dim=-1), residual.norm(dim=-1)
    # A projection that was not finished in time is a solution to the tolerance, or is not used.
    good = changed & (norm <= torch.maximum(threshold, 2 * before))
    status = torch.where(changed & ~good, int(Status.STAGNATED), status)
    good = good.unsqueeze(-1)
    return torch.where(good, moved, x), torch.where(good, left, residual), status


def _again(
    solver: LinearSolver,
    operator: LinearOperator,
    rhs: torch.Tensor,
    threshold: torch.Tensor,
    these: torch.Tensor,
    found: LinearSolution,
) -> LinearSolution:
    """Solve ``these`` singular systems (batch,) again, to another threshold: an iterate that went beyond it has run away along null vectors."""
    again = solver.solve(operator, torch.where(these.unsqueeze(-1), rhs, 0.0), threshold)
    status = torch.where(again.status == Status.CONVERGED, int(Status.MINIMUM_NORM), again.status)
    return LinearSolution(
        torch.where(these.unsqueeze(-1), again.x, found.x),
        found.iterations + torch.where(these, again.iterations, 0),
        torch.where(these, status, found.status),
    )


def _exceeds(bound: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Return where ``bound`` is above ``error``, and not by its own rounding, (batch,) bool."""
    return bound > error * (1 + 16 * torch.finfo(bound.dtype).eps)


def _closer(
    solver: LinearSolver,
    operator: LinearOperator,
    rhs: torch.Tensor,
    threshold: torch.Tensor,
    rounded: torch.Tensor,
    mu: float,
    these: torch.Tensor,
    x: torch.Tensor,
    bound: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (batch, n) and bounds (batch,), of ``these`` problems with residuals so small that rounding does not lift the bound above δ′."""
    stricter = threshold - 2 * rounded
    within = these & (stricter > 0)
    if not bool(within.any()):
        return x, bound
    again = solver.solve(operator, torch.where(within.unsqueeze(-1), rhs, 0.0), stricter.clamp_min(0.0)).x
    fresh = ((rhs - operator.matvec(again)).norm(dim=-1) + rounded) / mu
    lower = within & (fresh < bound)
    return torch.where(lower.unsqueeze(-1), again, x), torch.where(lower, fresh, bound)


def _proposed(
    solver: LinearSolver,
    operator: LinearOperator,
    rhs: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    target: Target,
) -> tuple[LinearSolution | None, LinearOutcome | None]:
    """Return the solver's proposal, if it has one whose true residual is down to rounding, or None.

    If nothing is left to judge, because the proposal is accurate enough and no bound is to be had, the outcome is returned too.
    """
    x = solver.propose(operator, rhs)
    if x is None:
        return None, None
    norm, info = torch.linalg.vector_norm(rhs, dim=-1), torch.finfo(rhs.dtype)
    # Squares of what is beyond these would be lost, and a NaN is beyond them too.
    safe = (norm > info.tiny**0.25) & (norm < info.max**0.25)
    if not bool(safe.all()) and not bool((safe | (rhs == 0).all(dim=-1)).all()):
        return None, None
    residual = rhs - product(x)
    left = torch.linalg.vector_norm(residual, dim=-1)
    if not bool((left <= 16 * info.eps * norm).all()):
        return None, None
    done = torch.zeros(operator.batch, dtype=torch.int64, device=rhs.device)
    solution = LinearSolution(x, torch.full_like(done, operator.size), done, residual)
    threshold = _threshold(target, norm, torch.ones_like(norm))
    if target.strong_convexity is not None or not bool((left <= threshold).all()):
        return solution, None
    unknown = torch.full_like(norm, float("nan"))
    return solution, LinearOutcome(
        x, done, solution.iterations, residual, left, threshold, unknown, Basis.RESIDUAL, norm
    )


def _threshold(target: Target, norm: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return the residual to reach (batch,), in units of the problem whose right-hand side was divided by ``size``."""
    return torch.maximum(target.relative * norm, target.absolute * torch.minimum(norm, 1 / size))


def _as_meant(solution: LinearSolution, target: Target) -> bool:
    """Whether every problem spent a budget that alone was meant, so that its residual decides nothing."""
    meant = target.silent and target.strong_convexity is None and solution.residual is None
    return meant and bool((solution.status == Status.MAX_STEPS).all()) and bool(torch.isfinite(solution.x.sum()))


def _safe(start: torch.Tensor) -> torch.Tensor:
    return start.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
