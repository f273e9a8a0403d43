"""The report of a solve: per problem a status, iterations, a residual, a bound and the basis of the bound."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from bilevel.status import Status, StatusMessages, _NamedCode

__all__ = [
    "Basis",
    "Pass",
    "Proof",
    "SolveReport",
    "Status",
    "StatusMessages",
    "remedy_for_dtype",
]


_WIDER = "use float64, "
_NOT_FINITE_GIVEN = (
    "the right-hand side is not finite; in reverse mode it is the gradient with respect to the solution: look for a log, square root or "
    "division outside its domain in the loss, or in forward mode in the tangents and the objective's arguments"
)

_AT_A_SADDLE = (
    "the solution may be a saddle or a maximum: start elsewhere, or add regularisation; to differentiate it all the same, pass "
    "linear_solver=bilevel.Exact(indefinite=True) or bilevel.GMRES()"
)

_NOT_INVARIANT = (
    "the solution is not unique, and its derivative depends on a free direction: pin one unknown, add a small ridge term such as "
    "1e-3 * ((x - x0) ** 2).sum() with a fixed x0 to the objective, or make the loss invariant along that direction"
)


_BUDGET_OF_ADJOINT = (
    "pass Tolerance(delta_prime=None) to say that the steps alone are meant, or Tolerance(delta_prime=1e-6) to hold the linear "
    "solve to an accuracy"
)
_BACKWARD = {
    Status.BUDGET_SPENT: _BUDGET_OF_ADJOINT,
    Status.INDEFINITE: _AT_A_SADDLE,
    Status.SINGULAR: _NOT_INVARIANT,
}
_SHORT_OF_THE_TOLERANCE = (Status.MAX_STEPS, Status.NOT_CONVERGED, Status.STAGNATED, Status.KINK, Status.DEGENERATE)
_NO_SOLUTION = (Status.INFEASIBLE, Status.UNBOUNDED)


def remedy_for_dtype(remedy: str, dtype: torch.dtype | None) -> str:
    """Return ``remedy`` without the advice to use float64 if the solve is in float64 already.

    Examples
    --------
    >>> remedy_for_dtype("use float64, rescale the problem or ask for less", torch.float64)
    'rescale the problem or ask for less'
    """
    return remedy.replace(_WIDER, "") if dtype == torch.float64 else remedy


class Basis(_NamedCode):
    """How an error bound was obtained.

    Examples
    --------
    >>> import bilevel
    >>> print([basis.name for basis in sorted(bilevel.Basis)])
    ['CERTIFIED', 'PROBABILISTIC', 'ESTIMATED', 'RESIDUAL']
    """

    CERTIFIED = 0
    """A proof, given constants that are known."""
    PROBABILISTIC = 1
    """A proof that holds but for a stated probability, such as one from a randomised Lanczos run."""
    ESTIMATED = 2
    """A computed estimate that may be exceeded."""
    RESIDUAL = 3
    """A residual only: no bound on the error follows from it."""


class Pass(enum.Enum):
    """Which solve a report speaks of.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> with bilevel.record() as reports:
    ...     layer(torch.zeros(2), torch.ones(2, requires_grad=True)).sum().backward()
    >>> sum(report.direction is bilevel.Pass.BACKWARD for report in reports)
    1
    """

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, eq=False)
class Proof:
    """What is known of a solution after a solve, in the shapes of the fields of a :class:`SolveReport` of the same names."""

    error_bound: torch.Tensor
    basis: Basis
    proven_zero: torch.Tensor | None = None
    proven_nonzero: torch.Tensor | None = None


# The fields of a report that a proof may give later.
_PROVEN = ("error_bound", "basis", "proven_zero", "proven_nonzero")


@dataclass(frozen=True, eq=False)
class SolveReport:
    """The record of one call of a solver, per problem.

    Every tensor has the shape of the batch: ``()`` for a single problem, ``(64,)`` under one ``vmap`` of 64.

    Parameters
    ----------
    direction
        :attr:`Pass.FORWARD` for an inner solve, :attr:`Pass.BACKWARD` for a linear solve of the derivative.
    where
        The layer or problem, for messages.
    solver
        The solver's name.
    status_code
        int64: the values of :class:`Status`.
    iterations
        int64: steps taken.
    residual_norm
        The true residual, recomputed at what was returned: ‖∇_φ G‖, ‖R‖ or ‖x − T(x)‖ forward, ‖b − A x‖ backward.
    threshold
        The residual norm that was asked for, in the dtype of the unknown.
    error_bound
        Bound on ‖x − x*‖ (on ‖q − q*‖ at fixed φ backward), in the units of x; NaN where none is known.
    basis
        What :attr:`error_bound` rests on.
    scale
        ‖b‖ backward, for ``residual_norm`` to be compared with, NaN if b is not finite; NaN forward, where there is no such size.
    words
        (meaning, remedy) for statuses whose general words do not fit the solver or the kind of problem.
    proven_zero, proven_nonzero
        Bool (*batch, n), for a layer with ``prox=``: the entries of the solution x* that are proven to be zero, and not to be zero. The entries
        are those of the leaves of x, one after the other. None where nothing is known of them. See "What is proven" in the guide to nonsmooth terms.

    Notes
    -----
    The error bound of a quadratic program, and that of a layer with ``prox=``, are computed when they are first read, as are the proven entries.
    They speak of the arguments as they were in the call. If an argument was changed in place since, nothing is proven.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum())
    >>> report = layer.solve(torch.zeros(2), torch.tensor([1.0, 3.0])).report
    >>> report.solver, report.status.name, int(report.iterations)
    ('Newton', 'CONVERGED', 1)
    """

    direction: Pass
    where: str
    solver: str
    status_code: torch.Tensor
    iterations: torch.Tensor
    residual_norm: torch.Tensor
    threshold: torch.Tensor
    error_bound: torch.Tensor
    basis: Basis
    scale: torch.Tensor
    words: StatusMessages = field(default_factory=dict)
    # Class attributes of these names would hide what a proof gives later.
    proven_zero: torch.Tensor | None = field(default_factory=type(None))
    proven_nonzero: torch.Tensor | None = field(default_factory=type(None))

    def with_proof(self, prove: Callable[[], Proof]) -> SolveReport:
        """Return the report with the error bound, the basis and the proven entries that ``prove`` returns. It is called when one is first read."""
        made = object.__new__(type(self))
        vars(made).update({name: value for name, value in vars(self).items() if name not in _PROVEN}, _prove=prove)
        return made

    def __getattr__(self, name: str) -> Any:
        prove = vars(self).pop("_prove", None) if name in _PROVEN else None
        if prove is None:
            raise AttributeError(f"a SolveReport has no {name}")
        proof = prove()
        vars(self).update({name: getattr(proof, name) for name in _PROVEN})
        return vars(self)[name]

    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def status(self) -> Status | tuple[Any, ...]:
        """The :class:`Status` of a single problem, or a (nested) tuple of them for a batch."""
        return _statuses(self.status_code.tolist())

    @property
    def converged(self) -> torch.Tensor:
        """Bool, per problem: the residual reached what was asked for."""
        return (self.status_code == Status.CONVERGED) | (self.status_code == Status.MINIMUM_NORM)

    @property
    def success(self) -> torch.Tensor:
        """Bool, per problem: converged, or spent a budget with no accuracy asked."""
        return self.converged | (self.status_code == Status.BUDGET_SPENT)

    @property
    def certified(self) -> torch.Tensor:
        """Bool, per problem: :attr:`error_bound` is finite and proven."""
        known = torch.isfinite(self.error_bound)
        return known if self.basis is Basis.CERTIFIED else torch.zeros_like(known)

    @property
    def message(self) -> str:
        """One sentence: what failed, for which problems, with the remedy; or that all is well."""
        codes = self.status_code.reshape(-1)
        failed = (~self.success).reshape(-1).nonzero().reshape(-1)
        head = f"{self.where}: the {self.direction.value} solve by {self.solver}"
        if codes.numel() == 0:
            return f"{head} had no problems to solve"
        if failed.numel() == 0:
            budget = (codes == Status.BUDGET_SPENT).nonzero().reshape(-1)
            which = int(budget[0]) if budget.numel() else int(self.residual_norm.reshape(-1).nan_to_num().argmax())
            status = Status(int(codes[which]))
        else:
            which = int(failed[0])
            status = Status(int(codes[which]))
        of = self._extent(status, which) if codes.numel() > 1 else ""
        residual = float(self.residual_norm.reshape(-1)[which])
        asked = float(self.threshold.reshape(-1)[which])
        steps = int(self.iterations.reshape(-1)[which])
        # Where no accuracy was asked for, the threshold is that of the default.
        word = "the default asks" if status is Status.BUDGET_SPENT else "asked"
        # The KKT conditions may have failed where this one number did not: it would contradict the sentence.
        # Where there is no solution no residual was aimed at.
        misleading = status in _NO_SOLUTION or (status in _SHORT_OF_THE_TOLERANCE and residual <= asked)
        goal = f", {word} {asked:.2g}" if asked > 0 and not misleading else ""
        figures = "" if math.isnan(residual) else f"residual {residual:.2g}{goal}, "
        return (
            f"{head} {self._meaning(status)}{of} ({figures}after {steps} iterations); "
            f"remedy: {self._remedy(status, which)}."
        )

    def _extent(self, status: Status, which: int) -> str:
        """Return how many problems ended with ``status``, the first of them at ``which``, and what other failures there are."""
        codes, failed = self.status_code.reshape(-1), (~self.success).reshape(-1)
        if not bool(failed.any()):
            return f" in {codes.numel()} problems, the worst number {which}"
        others = [Status(code).name for code in sorted(set(codes[failed].tolist())) if code != status]
        more = f", beside {' and '.join(others)} in {int((failed & (codes != status)).sum())}" if others else ""
        return f" in {int((codes == status).sum())} of {codes.numel()} problems, first in number {which}{more}"

    def _meaning(self, status: Status) -> str:
        return self.words[status][0] if status in self.words else status.meaning

    def _remedy(self, status: Status, which: int) -> str:
        """Return what to do about ``status``, which the problem at ``which`` ended with."""
        given = float(self.scale.reshape(-1)[which])
        if status is Status.BUDGET_SPENT and float(self.threshold.reshape(-1)[which]) == 0:
            return "nothing needs doing, as the steps alone were asked for"
        if status is Status.NOT_FINITE and self.direction is Pass.BACKWARD and not math.isfinite(given):
            # Nothing is amiss with the matrix or the solver then.
            return _NOT_FINITE_GIVEN
        if self.direction is Pass.BACKWARD and status in _BACKWARD and status not in self.words:
            return _BACKWARD[status]
        return remedy_for_dtype(
            self.words[status][1] if status in self.words else status.remedy, self.residual_norm.dtype
        )

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.direction.value} solve by {self.solver}"]
        codes = self.status_code.reshape(-1)
        if not codes.numel():
            return f"{lines[0]}\n  no problems to solve"
        steps, many = self.iterations.reshape(-1), codes.numel() > 1
        for code in sorted(set(codes.tolist())):
            status, these = Status(code), codes == code
            of = f" in {int(these.sum())} of {codes.numel()} problems" if many else ""
            remedy = "" if status is Status.CONVERGED else f"; {self._remedy(status, int(these.nonzero()[0]))}"
            lines.append(f"  status    {status.name}: {self._meaning(status)}{of}, steps {_span(steps[these])}{remedy}")
        asked = self.threshold.reshape(-1)[~torch.isin(codes, torch.tensor(_NO_SOLUTION, device=codes.device))]
        goal = f", asked {_span(asked)}" if bool((asked > 0).any()) else ""
        lines.append(f"  residual  {_span(self.residual_norm.reshape(-1))}{goal}")
        known = self.error_bound.reshape(-1)
        if self.basis is Basis.RESIDUAL or not bool(torch.isfinite(known).any()):
            lines.append(
                "  error     not known: give strong_convexity in Tolerance, or ask a hypergradient for its bounds"
            )
        else:
            lines.append(f"  error     at most {float(known.max()):.2g} ({self.basis.name.lower()})")
        return "\n".join(lines)


def _span(numbers: torch.Tensor) -> str:
    """Return the numbers' range, or the one number that they all are."""
    low, high = numbers.min(), numbers.max()
    if not numbers.dtype.is_floating_point:
        return f"{int(low)}" if bool(low == high) else f"{int(low)} to {int(high)}"
    short = f"{float(low):.2g}", f"{float(high):.2g}"
    return short[0] if short[0] == short[1] else " to ".join(short)


def _statuses(codes: int | list[Any]) -> Status | tuple[Any, ...]:
    return Status(codes) if isinstance(codes, int) else tuple(_statuses(code) for code in codes)
