"""The meaning and the remedy of a failed inner solve, adapted to the kind of problem and to the solver.

:mod:`bilevel.reports` has general words for each status. They do not fit every case. A root has no objective, and Newton's
method has no step size. An objective without a minimum needs a message of its own.
"""

from __future__ import annotations

import torch

from bilevel.equations.problem import Problem
from bilevel.reports import Status, StatusMessages
from bilevel.solvers._base import CallableSolver, InnerSolver
from bilevel.solvers.bracketing import Bracketing
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.judging.outcome import InnerOutcome
from bilevel.solvers.torch_optimizer import TorchOptimizer

__all__ = ["autocast_messages", "derivative_messages", "failure_messages"]

# x counts as diverging once it is this many times as large as the initial guess.
_FAR = 1e6
_SHORT_OF_IT = (
    Status.MAX_STEPS,
    Status.NOT_CONVERGED,
    Status.STAGNATED,
    Status.DIVERGED,
    Status.NOT_FINITE,
    Status.LINE_SEARCH_FAILED,
)
_NO_MINIMUM = (
    "the point is a saddle or a maximum, and a minimum was asked for: start beside it, for example at init + 1e-3 * torch.randn_like(init), "
    "or add regularisation; if any stationary point will do, take bilevel.root(torch.func.grad(objective))"
)
_FLAT = (
    "could not leave the start: the function is flat there in this arithmetic, and no solution is in sight",
    "start elsewhere, nearer the solution; float64 may help if a small number underflows",
)
_DOMAIN = (
    "look for a log, square root, division or factorisation (such as torch.linalg.cholesky) outside its domain at the start, "
    "and check the inputs"
)


def failure_messages(
    solver: InnerSolver, problem: Problem, init: torch.Tensor, outcome: InnerOutcome
) -> StatusMessages:
    """Return (meaning, remedy) of statuses whose general words do not fit this solve. Nothing is computed if all problems succeeded.

    Parameters
    ----------
    solver
        The solver that failed.
    problem
        The batch of problems.
    init
        Their initial guesses (batch, n).
    outcome
        The outcome of the solve; the first problem that failed is examined.
    """
    failed = outcome.status > int(Status.BUDGET_SPENT)
    if not bool(failed.any()):
        return {}
    which = int(failed.nonzero()[0])
    status = Status(int(outcome.status[which]))
    stayed = bool((outcome.x[which] == init[which]).all())
    if status is Status.DIVERGED and stayed:
        return {status: _FLAT}
    if not problem.minimizes:
        words = dict(_FIXED_POINT if problem.is_fixed_point else _ROOT)
        flat = status is Status.SINGULAR and stayed and _is_flat(problem.single(which), init[which : which + 1])
        words[Status.SINGULAR] = _FLAT if flat else _singular(problem, at_start=stayed)
        return {**words, **_BRACKET} if isinstance(solver, Bracketing) else words
    words = {
        Status.INDEFINITE: (Status.INDEFINITE.meaning, _NO_MINIMUM),
        Status.DIVERGED: (Status.DIVERGED.meaning, _steadier(solver)),
        Status.NOT_FINITE: (Status.NOT_FINITE.meaning, f"{_DOMAIN}{_or_lower(solver)}"),
    }
    if status not in _SHORT_OF_IT:
        return words
    try:
        one, x, start = problem.single(which), outcome.x[which : which + 1], init[which : which + 1]
        if _falls_without_end(one, x, start, status):
            words[status] = (
                f"{status.meaning}, and the objective fell all the way: it seems to have no minimum",
                "add a term that grows with x, such as a small ridge, bound what x can become, or start elsewhere",
            )
    except RuntimeError:  # do not hide the error that the message is about
        pass
    return words


def _is_flat(problem: Problem, start: torch.Tensor) -> bool:
    """Return whether R is the same at points to both sides of ``start`` (1, n) as there, where to start beside it does not help."""
    aside, there = 1e-3 * (1 + start.abs()), problem.residual(start)
    return all(bool((problem.residual(start + sign * aside) == there).all()) for sign in (-1, 1))


def _singular(problem: Problem, *, at_start: bool) -> tuple[str, str]:
    """Return the words for a singular matrix that stopped the solve of an equation."""
    matrix = "I - ∂T" if problem.is_fixed_point else "Jacobian"
    if at_start:
        return (
            f"could not leave the start, where the {matrix} is singular",
            "this says nothing of the solution: start beside it, for example at init + 1e-3 * torch.randn_like(init)",
        )
    return (
        f"ended where the {matrix} is singular, at a point that is no solution",
        "start elsewhere; if that does not help, there may be no solution: look for equations that contradict each other",
    )


def _step_size(solver: InnerSolver) -> str | None:
    """Return the name of the solver's step size; None if it has none that a caller could lower."""
    if isinstance(solver, GradientDescent):
        return None if solver.line_search else "lr"
    if isinstance(solver, TorchOptimizer):
        return "lr"
    return "its step size" if isinstance(solver, CallableSolver) else None


def _steadier(solver: InnerSolver) -> str:
    step = _step_size(solver)
    if step is None:
        return "the objective may have no minimum: add a term that grows with x, such as a small ridge, or start nearer the solution"
    if isinstance(solver, GradientDescent):
        return f"lower {step}, which is {solver.lr:g}, pass line_search=True, or start nearer the solution"
    return f"lower {step}, start nearer the solution, or take a solver with a line search, such as bilevel.LBFGS()"


def _or_lower(solver: InnerSolver) -> str:
    step = _step_size(solver)
    return "" if step is None else f", or lower {step}"


def _falls_without_end(problem: Problem, x: torch.Tensor, start: torch.Tensor, status: Status) -> bool:
    away = float((x - start).norm()) > _FAR * (1 + float(start.norm()))
    return (away or status is Status.DIVERGED) and float(problem.value(x)) < float(problem.value(start))


def derivative_messages(status: torch.Tensor, rhs: torch.Tensor, noun: str, *, symmetric: bool) -> StatusMessages:
    """Return (meaning, remedy) of statuses of a derivative whose general words do not fit.

    They are those of ``NOT_FINITE``, unless the first such right-hand side (batch, n) is not finite itself, and of ``SINGULAR`` for equations,
    which have no objective. ``noun`` is what the function is called.
    """
    words = {}
    if not symmetric and noun in _FREE:
        words[Status.SINGULAR] = (Status.SINGULAR.meaning, _FREE[noun])
    met = status == Status.NOT_FINITE
    if not bool(met.any()) or not bool(torch.isfinite(rhs[int(met.nonzero()[0])]).all()):
        return words
    what = "a second derivative of the objective" if symmetric else "a derivative of the function"
    remedy = (
        "smooth the function there, as |d|**1.5, whose second derivative is infinite at d = 0, becomes (d**2 + 1e-6)**0.75; or state "
        "what is not smooth by prox= or by constraints"
    )
    words[Status.NOT_FINITE] = (f"found {what} to be infinite or NaN at the solution", remedy)
    return words


_FREE = {
    "residual": (
        "the solution is not unique, and its derivative depends on a free direction: put an equation that pins one unknown, such as "
        "x[0] - c, in the place of one that follows from the others, or make the loss invariant along that direction. At a multiple "
        "root, such as that of x**3 - a at a = 0, no derivative exists"
    ),
    "mapping": (
        "the fixed point is not unique, and its derivative depends on a free direction: let the mapping return a constant c for one "
        "unknown, or make the loss invariant along that direction"
    ),
}

_ABOUT_ROOTS = (
    "the residual may have no root near the start: start elsewhere, check that it is smooth and finite there, use float64, or loosen "
    "the tolerance"
)
_NO_LOWER_RESIDUAL = ("found no step that lowers the residual", _ABOUT_ROOTS)

_ROOT: StatusMessages = {
    Status.LINE_SEARCH_FAILED: _NO_LOWER_RESIDUAL,
    Status.DIVERGED: (
        Status.DIVERGED.meaning,
        "the residual may have no root there: check that one exists, and start nearer to it",
    ),
    Status.STAGNATED: (
        Status.STAGNATED.meaning,
        "the residual may have no root near the start: start elsewhere; or rounding is the limit: use float64, rescale the equations, "
        "or loosen the tolerance",
    ),
    Status.NOT_FINITE: (Status.NOT_FINITE.meaning, f"{_DOMAIN}, or start nearer the root"),
}

_BRACKET: StatusMessages = {
    Status.NOT_CONVERGED: (
        "found residuals of one sign at lower and upper: the bracket may hold no root",
        "widen the bracket until the residual changes its sign, or take Newton(), which needs none",
    ),
    Status.STAGNATED: (
        "found the residual to jump across zero, or its equations to depend on each other",
        "check that the residual is continuous between lower and upper, and that residual[i] depends on x[i] alone; else take Newton()",
    ),
    Status.NOT_FINITE: (
        "found a pole or a NaN between lower and upper",
        "choose a bracket in which the residual is continuous",
    ),
}

_FIXED_POINT: StatusMessages = {
    Status.MAX_STEPS: (
        Status.MAX_STEPS.meaning,
        "check that the mapping has a fixed point and is smooth near it; lower the step size inside of it, if it has one, start nearer to the "
        "fixed point, loosen the tolerance, or raise max_steps",
    ),
    Status.LINE_SEARCH_FAILED: (
        "found no step that lowers the residual x - T(x)",
        _ABOUT_ROOTS.replace("the residual may have no root", "the mapping may have no fixed point"),
    ),
    Status.DIVERGED: (
        Status.DIVERGED.meaning,
        "the mapping may not be a contraction there, or have no fixed point: lower the step size inside of it, if it has one, start nearer to "
        "the fixed point, or take solver=bilevel.Newton(), which needs no contraction",
    ),
    Status.NOT_FINITE: (Status.NOT_FINITE.meaning, f"{_DOMAIN}, or start nearer the fixed point"),
}


def autocast_messages(precision: torch.dtype) -> StatusMessages:
    """Return (meaning, remedy) of statuses that the rounding of autocast to ``precision`` causes."""
    name = str(precision).removeprefix("torch.")
    words = (
        f"did not reach the tolerance, because autocast evaluates the function in {name}, whose rounding is coarser",
        "ask for what it allows, for example tolerance=bilevel.Tolerance(delta=0.03, delta_prime=0.03), or wrap the call of the layer in "
        "torch.autocast(device_type, enabled=False)",
    )
    return dict.fromkeys(
        (Status.MAX_STEPS, Status.NOT_CONVERGED, Status.STAGNATED, Status.LINE_SEARCH_FAILED, Status.KINK), words
    )
