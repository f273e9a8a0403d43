"""How a solve ended: a code for each way, what it means, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeAlias

__all__ = ["Status", "StatusMessages"]


class _NamedCode(enum.IntEnum):
    """Numbers that fit into a tensor, and print as names in every version of Python."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, spec: str) -> str:
        return int.__format__(self, spec) if spec else str(self)


class Status(_NamedCode):
    """How one problem's solve ended. :attr:`meaning` describes it, and :attr:`remedy` says what to do.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.root(lambda x, a: x**2 - a, on_failure="nan")
    >>> solve = torch.func.vmap(layer.solve)
    >>> report = solve(torch.ones(2), torch.tensor([4.0, -1.0])).report
    >>> [status.name for status in report.status], report.status_code.tolist()
    (['CONVERGED', 'SINGULAR'], [0, 8])
    """

    CONVERGED = 0
    """The estimated error, or the residual where an accuracy was given, is as small as asked. A success."""
    BUDGET_SPENT = 1
    """The iteration limit, ``max_steps``, that you set is spent, and you asked for no accuracy. A success."""
    MAX_STEPS = 2
    """The iteration limit is spent, and the accuracy was not reached."""
    NOT_CONVERGED = 3
    """A solver of yours, or of scipy, returned a point that is not accurate enough."""
    STAGNATED = 4
    """The search made no more progress. Rounding may be the reason."""
    DIVERGED = 5
    """x ran away, or the residual grew. There may be no solution."""
    NOT_FINITE = 6
    """A NaN or an infinity was met."""
    INDEFINITE = 7
    """A forward solve ended at a saddle or a maximum, or a linear solve met a matrix that is not positive definite."""
    SINGULAR = 8
    """A singular matrix stopped a forward solve, or the right-hand side of a linear solve lies outside the range of a singular matrix."""
    BREAKDOWN = 9
    """A linear solver had to divide by zero."""
    LINE_SEARCH_FAILED = 10
    """No step lowers the objective, or the residual."""
    RUNNING = 11
    """The solve has not ended. No report shows this."""
    REFUTED = 12
    """The curvature is smaller than the strong convexity that was given."""
    MINIMUM_NORM = 13
    """The matrix is singular and the right-hand side in its range: the solution of smallest norm was returned. A success."""
    KINK = 14
    """The search began or ended where the gradient jumps."""
    DEGENERATE = 15
    """The solution was found, and its derivative does not exist there or is one-sided: a term or a constraint is at its threshold."""
    INFEASIBLE = 16
    """No point fulfils the constraints."""
    UNBOUNDED = 17
    """The objective falls without end inside the constraints."""

    @property
    def meaning(self) -> str:
        """What happened, as half a sentence."""
        return _TEXT[self][0]

    @property
    def remedy(self) -> str:
        """What to do about it, as half a sentence."""
        return _TEXT[self][1]

    @property
    def success(self) -> bool:
        """Whether the solve did what was asked of it (a budget spent with no accuracy asked included)."""
        return self in (Status.CONVERGED, Status.BUDGET_SPENT, Status.MINIMUM_NORM)


_TEXT: dict[Status, tuple[str, str]] = {
    Status.CONVERGED: ("reached the tolerance", "nothing needs doing"),
    Status.BUDGET_SPENT: (
        "spent the iteration budget, and no accuracy was asked for",
        "pass Tolerance(delta=None) to say that the steps alone are meant, or Tolerance(delta=1e-6, delta_prime=1e-6) to hold it to an accuracy",
    ),
    Status.MAX_STEPS: (
        "ran out of iterations before it reached the tolerance",
        "raise max_steps, start nearer the solution, loosen the tolerance, or take a faster solver",
    ),
    Status.NOT_CONVERGED: (
        "returned a point whose residual is above the tolerance",
        "tighten that solver's own tolerance or loosen bilevel.Tolerance",
    ),
    Status.STAGNATED: (
        "stopped making progress above the tolerance",
        "the dtype's rounding may be the limit: use float64, rescale the problem, regularise it or loosen the tolerance",
    ),
    Status.DIVERGED: (
        "moved away from a solution",
        "lower the step size, start nearer the solution, or take a solver with a line search",
    ),
    Status.NOT_FINITE: (
        "met a NaN or an infinity",
        "look for a log, square root or division outside its domain, check the inputs, or lower the step size",
    ),
    Status.INDEFINITE: (
        "met negative curvature: the matrix is not positive definite",
        "add regularisation, or pass linear_solver=bilevel.Exact(indefinite=True) or bilevel.GMRES(), which accept indefinite matrices",
    ),
    Status.SINGULAR: (
        "met a right-hand side outside the range of a matrix that is singular to working precision",
        "the equations may contradict each other: remove redundant ones and redundant unknowns, or add a small ridge term",
    ),
    Status.BREAKDOWN: (
        "met a division by zero in its recurrence",
        "take another linear solver, such as GMRES() or Exact()",
    ),
    Status.LINE_SEARCH_FAILED: (
        "found no step that lowers the objective",
        "check that the objective is smooth and finite near the start, use float64, or loosen the tolerance; a layer that the "
        "objective calls needs a smaller error than this one: leave its tolerance at the default, or ask this one for a hundred times that error",
    ),
    Status.REFUTED: (
        "reached a point that refutes the strong convexity it was told: curvature below μ was met",
        "the bounds that use this μ do not hold; pass a smaller strong_convexity, or None if it is not known",
    ),
    Status.KINK: (
        "ended at a kink of the objective: it is not smooth there, its gradient jumps",
        "start elsewhere if the point is no minimum; otherwise smooth the kink: (x**2 + eps**2).sqrt() for abs(x), softplus for relu, "
        "logsumexp for max; or pass the nonsmooth term as prox=, for example bilevel.argmin(f, prox=bilevel.prox.L1(s))",
    ),
    Status.DEGENERATE: (
        "met a solution at which the derivative is one-sided: a term or a constraint is just at its threshold",
        "perturb the arguments, for example a strength or a cost by a relative 1e-3, leave out an equation that follows from the others, or pass "
        "on_failure='ignore' to take the derivative of one side",
    ),
    Status.INFEASIBLE: (
        "proved that no point fulfils the constraints",
        "look at solution.certificate, whose nonzero multipliers name the constraints that contradict each other, and loosen one of them",
    ),
    Status.UNBOUNDED: (
        "proved that the objective falls without end inside the constraints",
        "look at solution.certificate.direction, along which it falls, and add a bound or a quadratic term that stops it",
    ),
    Status.MINIMUM_NORM: (
        "met a singular matrix with the right-hand side in its range, and returned the solution of smallest Euclidean norm",
        "nothing needs doing if the solution is unique up to a symmetry, or your loss does not depend on the free directions; "
        "to make the solution unique, pin one unknown or add a small ridge term such as 1e-3 * ((x - x0) ** 2).sum() with a fixed x0",
    ),
    Status.RUNNING: ("has not ended", "this is a fault of the library; please report it"),
}


StatusMessages: TypeAlias = Mapping[Status, tuple[str, str]]
"""(meaning, remedy) of statuses, in place of :attr:`Status.meaning` and :attr:`Status.remedy`."""
