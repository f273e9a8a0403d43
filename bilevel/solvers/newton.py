"""Newton's method: dense where the matrices are small, by products alone where they are large."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from bilevel._torch.factorisations import eigvalsh
from bilevel.equations.problem import Problem
from bilevel.linear._base import LinearSolverLike, as_linear_solver
from bilevel.linear.gmres import GMRES
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate, length
from bilevel.solvers.judging.error import meets_negative_curvature
from bilevel.solvers.parts.newton_directions import dense_descent, dense_root, descending
from bilevel.solvers.parts.newton_error import error_left, is_slow, root_error_left
from bilevel.solvers.parts.newton_search import search, search_again
from bilevel.solvers.parts.newton_state import Direction, NewtonState
from bilevel.solvers.parts.tiny_steps import TinySteps
from bilevel.solvers.parts.truncated_cg import truncated_cg

__all__ = ["Newton"]

_MAX_STEPS = 250
_DENSE_NUMBERS = 2**25
_LEAST_FORCING, _MOST_FORCING = 0.1, 0.5


@dataclass(frozen=True)
class Newton(InnerSolver):
    """Step along the solution of ∂R(x) d = −R(x), shortened until the objective, or ‖R‖, decreases enough.

    *Small problems* (n ≤ ``dense_limit``): the matrices of the batch are materialised and factorised
    together, by Cholesky for an argmin and LU for a root or a fixed point. A Hessian that is not positive
    definite is replaced by the one with the absolute values of its eigenvalues, which leads away from
    saddles.

    A shortened step that ends beyond the minimum along its direction goes back to that minimum. Otherwise steps zigzag
    between the sides of a narrow valley.

    *Large problems*: an argmin is solved Hessian-free, by conjugate gradients that stop early or at negative
    curvature; a root or a fixed point by GMRES. The linear systems are solved only as accurately as the
    progress of the outer iteration deserves.

    A quadratic, or a linear system, takes one step. A stationary point whose Hessian has a negative eigenvalue beyond
    rounding is reported as ``Status.INDEFINITE``. For large problems the products that were made decide this. A flat
    valley, as of least squares with redundant variables, is a solution.

    Each step costs one gradient, and one more for each shortening. It also costs n products (small), or as many as the
    linear solver makes (large). Memory is batch · n² numbers (small) or some vectors (large), and does not depend on the
    number of steps.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 250, and spending them all is a failure. A number is a budget: spending it
        without a tolerance is a success.
    dense_limit
        The largest n for which matrices are materialised (if those of the batch also take fewer than 2²⁵
        numbers).
    linear_solver
        For the directions, in place of the choice above: an instance such as ``bilevel.CG()``, or a function
        (operator, rhs) ↦ x.
    linear_steps
        The most products for each step of a large argmin.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Nocedal & Wright, "Numerical Optimization", 2006, chapters 3 and 7; Martens, "Deep learning via
    Hessian-free optimization", ICML 2010; Dauphin et al., "Identifying and attacking the saddle point
    problem", NeurIPS 2014 (absolute eigenvalues); Eisenstat & Walker, "Choosing the forcing terms in an
    inexact Newton method", 1996.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 4).sum() + (x**2).sum(), solver=Newton())
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))
    tensor([0.4102, 2.0000], dtype=torch.float64)
    """

    max_steps: int | None = None
    dense_limit: int = 512
    linear_solver: LinearSolverLike | None = None
    linear_steps: int = 250

    def __post_init__(self) -> None:
        check_steps("Newton", "max_steps", self.max_steps, optional=True)
        check_steps("Newton", "dense_limit", self.dense_limit, least=0)
        check_steps("Newton", "linear_steps", self.linear_steps)
        if self.linear_solver is not None:
            as_linear_solver(self.linear_solver)

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        dense = self.linear_solver is None and problem.size <= self.dense_limit
        dense = dense and problem.batch * problem.size**2 <= _DENSE_NUMBERS
        linearize = problem.linearize_dense if dense else problem.linearize
        first = linearize(init)
        goal.measure(first)
        threshold = goal.threshold
        start = NewtonState(
            x=init,
            residual=first.residual.detach(),
            merit=torch.full_like(threshold, 0.5) if first.value is None else first.value,
            magnitude=torch.zeros_like(threshold),
            last_norm=torch.full_like(threshold, float("inf")),
            definite=torch.ones_like(threshold, dtype=torch.bool),
        )

        tiny = TinySteps(problem)

        def step(state: NewtonState, active: torch.Tensor) -> tuple[NewtonState, torch.Tensor | None]:
            operator = (first if state is start else linearize(state.x)).operator
            if dense:
                direction = (dense_descent if problem.minimizes else dense_root)(operator, state, active)
            else:
                direction = self._inexact(problem, operator, state, threshold, active)
            found, verdict = search(problem, operator, state, direction, threshold, active)
            if dense and verdict is not None and not problem.minimizes:
                return search_again(problem, operator, state, direction, threshold, active, found, verdict)
            if problem.minimizes and found.t is not None:
                verdict = tiny.end(partial(_length_of, found), state.x, found.x, state.residual, active, verdict)
            return found, verdict

        solution, state = iterate(start, step, goal, self.max_steps or _MAX_STEPS, descends=True)
        if not problem.minimizes:
            return replace(solution, error=root_error_left(problem, state)) if dense else solution
        definite = dense and state.factor is not None and bool(state.definite.all())
        if definite:
            error = error_left(state, lone=problem.is_lone)
            slow = is_slow(state, error)
            solution = replace(solution, value=state.merit, factor=state.factor, error=error, slow=slow)
        else:
            solution = replace(solution, value=state.merit)
        # If the last step used a positive definite Hessian, the point counts as a minimum.
        if definite and bool((solution.iterations > 0).all()):
            return solution
        doubtful = solution.status == Status.CONVERGED
        if dense:
            doubtful = doubtful & ((solution.iterations == 0) | ~state.definite)
        if not bool(doubtful.any()):
            return solution
        operator = (first if state is start else linearize(state.x)).operator
        saddle = (
            _has_negative_eigenvalue(operator, doubtful)
            if dense
            else meets_negative_curvature(problem, state.x, doubtful)
        )
        indefinite = torch.full_like(solution.status, Status.INDEFINITE)
        return replace(solution, status=torch.where(doubtful & saddle, indefinite, solution.status))

    def _inexact(
        self,
        problem: Problem,
        operator: LinearOperator,
        state: NewtonState,
        threshold: torch.Tensor,
        active: torch.Tensor,
    ) -> Direction:
        """Solve for the direction as accurately as Eisenstat & Walker's choice 2, (‖R_k‖ / ‖R_{k−1}‖)²."""
        norm = length(state.residual)
        progress = torch.clamp((norm / state.last_norm) ** 2, max=_LEAST_FORCING)
        # Ask for no more accuracy than the threshold needs, so that the last step is not solved too accurately.
        forcing = torch.maximum(progress, torch.clamp(0.3 * threshold / norm, max=_MOST_FORCING))
        if self.linear_solver is None and problem.minimizes:
            d, definite = truncated_cg(operator, state.residual, forcing, self.linear_steps, active)
        else:
            solver = as_linear_solver(self.linear_solver or GMRES())
            usable = (active & (norm > 0)).unsqueeze(-1)
            rhs = torch.where(usable, -state.residual / norm.unsqueeze(-1), torch.zeros_like(state.residual))
            found = solver.solve(operator, rhs, forcing)
            d, definite = found.x * norm.unsqueeze(-1), found.status != Status.INDEFINITE
        if not problem.minimizes:
            return Direction(d, -torch.ones_like(norm), definite)
        return descending(d, state.residual, definite)


def _length_of(state: NewtonState) -> torch.Tensor:
    assert state.t is not None
    return state.t


def _has_negative_eigenvalue(operator: LinearOperator, doubtful: torch.Tensor) -> torch.Tensor:
    hessian = operator.dense()
    negative: torch.Tensor = torch.linalg.cholesky_ex(hessian)[1] != 0
    rows = negative & doubtful
    if bool(rows.any()):
        eigenvalues = eigvalsh(hessian[rows])
        rounding = 100 * hessian.shape[-1] * torch.finfo(hessian.dtype).eps * eigenvalues.abs().amax(dim=-1)
        negative = negative.index_put((rows,), eigenvalues[..., 0] < -rounding)
    return negative
