"""The result of an outer loop: a record of each step, the status, and the last point."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Generic

from typing_extensions import TypeVar

from bilevel.reports import Basis

__all__ = ["OuterResult", "OuterStatus", "OuterStep"]

T = TypeVar("T", default=Any)  # the pytree of the outer variables


class OuterStatus(enum.Enum):
    """Why :func:`bilevel.minimize` ended.

    Examples
    --------
    >>> from bilevel import OuterStatus
    >>> [status.name for status in OuterStatus if status.success]
    ['CONVERGED', 'MAX_STEPS', 'STOPPED']
    """

    CONVERGED = "the norm of the hypergradient, plus its error if that is known, is at or below gradient_tolerance"
    MAX_STEPS = "max_steps outer steps were made"
    NO_DECREASE = "no step was found whose decrease exceeds the errors of the values"
    SOLVE_FAILED = "a solve failed, and no other trial point is left"
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
        The number of the point, from 1.
    value
        F at the computed inner solution.
    corrected_value
        F − qᵀ∇_φ G: the outer value up to second order in the inner error.
    value_error
        The bound, or estimate, of the error of the corrected value. A line search allows for it.
    gradient_norm
        ‖ĝ‖.
    error_bound
        The bound, or estimate, of ‖ĝ − g‖; NaN if it was not asked for.
    basis
        Why ``error_bound`` holds.
    delta, delta_prime
        δ and δ′. If a goal chose them: the residuals that were reached, read as δ and δ′ with μ unknown.
    inner_iterations, linear_iterations
        The sums over all problems of a batch, rejected trial points included.
    step_size
        The size of the step that led here; NaN for the first point, and for a step of a torch optimiser.
    evaluations
        The number of hypergradients so far.
    seconds
        The time so far.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Tuning(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         return (inner - 1) ** 2 + outer.exp() * inner**2
    ...     def outer_objective(self, inner, outer, data):
    ...         return (inner - 0.8) ** 2
    >>> zero = torch.tensor(0.0, dtype=torch.float64)
    >>> step = bilevel.minimize(Tuning(), zero, None, init=zero, max_steps=5).history[0]
    >>> step.number, round(step.value, 4), round(step.gradient_norm, 4)
    (1, 0.09, 0.15)
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
class OuterResult(Generic[T]):
    """The result of :func:`bilevel.minimize`.

    Parameters
    ----------
    outer
        θ, the pytree that was given.
    inner
        φ at ``outer``, the pytree of the problem's init.
    value
        The corrected outer value at ``outer``.
    history
        Every point; the last one is ``outer``.
    status
        Why the run ended.
    message
        The status in one sentence.
    state
        The state that ``resume`` takes to continue the run.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Tuning(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         return (inner - 1) ** 2 + outer.exp() * inner**2
    ...     def outer_objective(self, inner, outer, data):
    ...         return (inner - 0.8) ** 2
    >>> zero = torch.tensor(0.0, dtype=torch.float64)
    >>> result = bilevel.minimize(Tuning(), zero, None, init=zero, gradient_tolerance=1e-6)
    >>> round(result.outer.exp().item(), 4), round(result.inner.item(), 4), result.status.name
    (0.25, 0.8, 'CONVERGED')
    """

    outer: T
    inner: Any
    value: float
    history: tuple[OuterStep, ...]
    status: OuterStatus
    message: str
    state: dict[str, Any]

    def __str__(self) -> str:
        return self.message
