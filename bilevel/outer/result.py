"""What an outer loop did: a record for each step, why it ended, and where."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from bilevel.reports import Basis

__all__ = ["OuterResult", "OuterStatus", "OuterStep"]


class OuterStatus(enum.Enum):
    """Why :func:`bilevel.minimize` ended."""

    CONVERGED = "the norm of the hypergradient, with its error where that is known, is at or below gradient_tolerance"
    MAX_STEPS = "max_steps outer steps are made"
    NO_DECREASE = "no step was found whose decrease is beyond the errors of the values"
    SOLVE_FAILED = "a solve failed, and nothing is left to go on from"
    NOT_FINITE = "the outer value or its gradient is not finite"
    STOPPED = "a callback asked to stop"
    INTERRUPTED = "it was interrupted from the keyboard"

    @property
    def success(self) -> bool:
        """Whether it ended as it was meant to."""
        return self in (OuterStatus.CONVERGED, OuterStatus.MAX_STEPS, OuterStatus.STOPPED)


@dataclass(frozen=True)
class OuterStep:
    """One point of an outer loop, with the hypergradient there.

    Parameters
    ----------
    number
        From 1.
    value
        F at the inner solution found.
    corrected_value
        F − qᵀ∇_φ G, the outer value up to second order.
    value_error
        Bound, or estimate, of the corrected value's error: what a line search allows for.
    gradient_norm
        ‖ĝ‖.
    error_bound
        Bound, or estimate, of ‖ĝ − g‖; NaN where it was not asked for.
    basis
        What ``error_bound`` rests on.
    delta, delta_prime
        δ and δ′: those asked for as numbers; else, as a goal chose them, the residuals that were reached, as δ and δ′ are
        read where μ is not given.
    inner_iterations, linear_iterations
        Of all problems of a batch together, trial points that were not taken included.
    step_size
        Of the step that led here; NaN for the first point, and where an optimiser of torch made it.
    evaluations
        Hypergradients computed so far.
    seconds
        Spent so far.
    """

    number: int
    value: float
    corrected_value: float
    value_error: float
    gradient_norm: float
    error_bound: float
    basis: Basis
    delta: float
    delta_prime: float
    inner_iterations: int
    linear_iterations: int
    step_size: float
    evaluations: int
    seconds: float


@dataclass(frozen=True, eq=False)
class OuterResult:
    """What :func:`bilevel.minimize` returns.

    Parameters
    ----------
    outer
        θ, the pytree that was given.
    inner
        φ there.
    value
        The corrected outer value there.
    history
        Every point, the last of which is ``outer``.
    status
        Why it ended.
    message
        The same in one sentence.
    state
        What ``resume`` takes to go on from here.
    """

    outer: Any
    inner: Any
    value: float
    history: tuple[OuterStep, ...]
    status: OuterStatus
    message: str
    state: dict[str, Any]

    def __str__(self) -> str:
        return self.message
