"""The state and the result of a search for a goal, and the report of the goal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from bilevel.certificates.bound import Bound
from bilevel.problems.adaptive.iterate import Iterate
from bilevel.problems.adaptive.quasi_newton import SecantPairs
from bilevel.reports import Basis, Status, remedy_for_dtype
from bilevel.tolerance import Tolerance

__all__ = ["GoalReport", "SearchResult", "SearchState"]


@dataclass(frozen=True)
class GoalReport:
    """The outcome of a goal for the hypergradient, ``Tolerance(hypergradient=...)`` or ``Tolerance(descent=...)``.

    Parameters
    ----------
    tolerance
        The goal.
    status
        ``Status.CONVERGED`` if it was met, ``Status.STAGNATED`` if the dtype permits no more, or the status that stopped the solves.
    error
        The bound, or the estimate, of ‖ĝ − g‖ at the end.
    allowed
        The largest error that the goal allows for this ĝ.
    basis
        Why ``error`` holds.
    rounds
        How often the two solves were continued.
    dtype
        The dtype of ĝ, which limits the accuracy; None if it is not known.
    inner
        The status of the inner solve if it ran to full accuracy; None otherwise.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Tuning(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         return (inner - 1) ** 2 + outer.exp() * inner**2
    ...     def outer_objective(self, inner, outer, data):
    ...         return (inner - 0.8) ** 2
    >>> zero = torch.tensor(0.0, dtype=torch.float64)
    >>> problem = Tuning(tolerance=bilevel.Tolerance(hypergradient=1e-3))
    >>> goal = problem.hypergradient(zero, None, init=zero).report.goal
    >>> goal.met, goal.allowed, goal.error < goal.allowed
    (True, 0.001, True)
    """

    tolerance: Tolerance
    status: Status
    error: float
    allowed: float
    basis: Basis
    rounds: int
    dtype: torch.dtype | None = None
    inner: Status | None = None

    @property
    def met(self) -> bool:
        """Whether the goal was met."""
        return self.status is Status.CONVERGED

    @property
    def message(self) -> str:
        """One sentence: what was asked and reached, with a remedy where it was not."""
        kind = {Basis.CERTIFIED: "certified", Basis.PROBABILISTIC: "probabilistic"}.get(self.basis, "estimated")
        reached = f"at most {self.error:.2g} ({kind})" if math.isfinite(self.error) else "not known"
        head = f"the hypergradient's error is {reached} after {self.rounds} rounds, and {self.tolerance!r} allows {self.allowed:.2g}"
        if self.met:
            return f"{head}."
        return f"{head}; remedy: {remedy_for_dtype(self._remedy, self.dtype)}."

    @property
    def _remedy(self) -> str:
        if self.inner is not None and not self.inner.success and self.inner is not Status.INDEFINITE:
            return (
                f"the solves {self.status.meaning}, and the inner solver, which was left to go on from there, {self.inner.meaning}: "
                f"{self.inner.remedy}"
            )
        if Status.INDEFINITE in (self.status, self.inner):
            return (
                "the solves met negative curvature where the inner solver ended, which is so at a saddle or a maximum, where there is no "
                "hypergradient: start elsewhere, or add regularisation to the inner objective"
            )
        if self.status is Status.STAGNATED:
            remedy = "that is what this dtype permits: use float64, rescale the problem, or ask for less"
            if self.tolerance.relative or self.tolerance.descent is not None:
                remedy += "; near a stationary point only an absolute accuracy can be had, or stationary=... says which norm counts as zero"
            return remedy
        return f"the solves {self.status.meaning}: {self.status.remedy}"

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class SearchState:
    """What was measured of the problem. One call leaves it to the next, which is near by.

    Parameters
    ----------
    nu, slope, pull
        ν, S and β of the error model; zero before they are measured.
    numbers, pulls
        On how many numbers S and β were observed.
    looks
        In how many steps S was observed.
    value_bend
        The largest change of F − qᵀ∇G along a step, over (ν ‖∇G‖)². It estimates the corrected value's error.
    curvature
        The largest ‖∇G(φ − s) − (∇G − H s)‖/‖s‖². It is zero for a quadratic G.
    inner_doubt, linear_doubt
        The factors by which a certificate exceeded the two parts of the estimate.
    secants
        Pairs for the preconditioner.
    """

    nu: float = 0.0
    slope: float = 0.0
    pull: float = 0.0
    numbers: int = 0
    looks: int = 0
    pulls: int = 0
    value_bend: float = 0.0
    curvature: float = 0.0
    inner_doubt: float = 1.0
    linear_doubt: float = 1.0
    secants: SecantPairs = field(default_factory=SecantPairs)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, in types that can be loaded without running code."""
        numbers = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "secants"}
        return {**numbers, "pairs": list(self.secants.pairs), "scale": self.secants.scale}

    @staticmethod
    def of(state: dict[str, Any]) -> SearchState:
        """Return what :meth:`state_dict` described."""
        numbers = {name: value for name, value in state.items() if name not in ("pairs", "scale")}
        known = SearchState(**numbers)
        known.secants.pairs.extend(tuple(pair) for pair in state["pairs"])
        known.secants.scale = state["scale"]
        return known

    def age(self, before: SearchState, *, stepped: bool, solved: bool) -> None:
        """Raise a quarter above the state ``before`` what this call has not measured: S without a step, and ν without a step or a solve."""
        if not stepped:
            self.slope, self.value_bend = 1.25 * before.slope, 1.25 * before.value_bend
            if not solved:
                self.nu = 1.25 * before.nu

    def reset(self) -> None:
        """Forget everything. It was measured at other points, and does not hold at this one."""
        for item in fields(self):
            if item.name != "secants":
                setattr(self, item.name, item.default)
        self.secants = SecantPairs()

    def discount(self) -> None:
        """Lower what was measured elsewhere by a fifth. New measurements raise it again."""
        self.nu, self.slope, self.pull = 0.8 * self.nu, 0.8 * self.slope, 0.8 * self.pull
        self.secants.softest = 0.0
        self.curvature, self.value_bend = 0.8 * self.curvature, 0.8 * self.value_bend
        self.numbers, self.pulls, self.looks = min(self.numbers, 50), min(self.pulls, 50), min(self.looks, 4)
        self.inner_doubt, self.linear_doubt = max(1.0, 0.8 * self.inner_doubt), max(1.0, 0.8 * self.linear_doubt)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The end of a search over a batch of K problems.

    Parameters
    ----------
    here
        The last iterate.
    gradient
        ĝ (p,), the mean over the problems, or NaN if the policy wants that.
    inner_steps, linear_steps
        int64 (K,): steps of the inner solver and products for H s = ∇G; products for the adjoint.
    bound
        The bound or the estimate that decided, with its parts.
    value_error
        The estimated error of the corrected value (C4), which is of second order; None if it was not estimated.
    report
        The report of the goal.
    known
        The state for the next call.
    """

    here: Iterate
    gradient: torch.Tensor
    inner_steps: torch.Tensor
    linear_steps: torch.Tensor
    bound: Bound
    value_error: float | None
    report: GoalReport
    known: SearchState | None

    @property
    def finite(self) -> bool:
        """Whether φ and q are finite, so that the next call can begin there."""
        return self.report.met or bool(torch.isfinite(self.here.x).all() & torch.isfinite(self.here.q).all())
