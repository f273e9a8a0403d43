"""The result of a gradient check: one row for each comparison, with its tolerance and the reason for it."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

__all__ = ["Allowance", "Comparison", "GradientCheck", "Verdict"]


class Verdict(enum.Enum):
    """The verdict of a comparison.

    Examples
    --------
    >>> from bilevel.testing import Verdict
    >>> {verdict.name: verdict.value for verdict in Verdict}
    {'PASSED': 'ok', 'FAILED': 'WRONG', 'INCONCLUSIVE': 'unsure'}
    """

    PASSED = "ok"
    """The two agree within the tolerance."""
    FAILED = "WRONG"
    """They do not."""
    INCONCLUSIVE = "unsure"
    """The tolerance is so large that agreement within it proves nothing: solve more accurately, or use float64."""


@dataclass(frozen=True)
class Allowance:
    """The tolerance of a comparison and its parts; each part bounds ‖difference‖ in the Euclidean norm.

    In these, J = ∂_x R, B = ∂_θ R, and q = J⁻ᵀ v is the dense adjoint, all in the reference's arithmetic. u is 64 eps of
    the coarsest dtype in the call.

    Parameters
    ----------
    rounding
        ‖Bᵀ J⁻ᵀ‖ u (‖v‖ + ‖J‖ ‖q‖) + u (‖B‖ ‖q‖ + ‖∂_θ c‖ + S), S being the change of the dense gradient by a relative change of x.
    linear
        ‖Bᵀ J⁻ᵀ‖ times the residual that the library's linear solve reported.
    inner
        Twice the change of the dense gradient from the computed solution to the exact one, which the residual of the inner
        solve causes. Also its change when the exact solution is rounded. Zero if both sides are evaluated at the computed
        solution.
    step
        For differences: the change by extrapolation from two steps, their rounding, and the remaining errors of their
        solves. For an unrolled iteration: the truncated part.

    Examples
    --------
    >>> from bilevel.testing import Allowance
    >>> allowance = Allowance(rounding=1e-9, linear=3e-9)
    >>> f"{allowance.total:.0e}", allowance.largest
    ('4e-09', 'linear')
    """

    rounding: float = 0.0
    linear: float = 0.0
    inner: float = 0.0
    step: float = 0.0

    @property
    def total(self) -> float:
        """The tolerance: the sum."""
        return self.rounding + self.linear + self.inner + self.step

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(("rounding", "linear", "inner", "step"), key=lambda name: float(getattr(self, name)))

    def scaled(self, factor: float, *, inner: float | None = None, step: float = 0.0) -> Allowance:
        """Return rounding, linear (and ``inner``) times ``factor``, and ``step`` as it is."""
        kept = self.inner if inner is None else inner
        return Allowance(self.rounding * factor, self.linear * factor, kept * factor, step)


@dataclass(frozen=True)
class Comparison:
    """One derivative of one tensor by the library, against one reference.

    Parameters
    ----------
    argument
        The tensor's name.
    derivative
        ``"reverse"`` (a vector-Jacobian product by ``torch.autograd.grad``) or ``"forward"`` (``torch.func.jvp``).
    reference
        The reference: dense, unrolled or differences.
    error
        ‖difference‖.
    size
        ‖reference‖.
    allowance
        The possible sources of ``error``.
    held_to
        The tolerance: ``allowance.total``, unless the caller gave another.
    verdict
        The verdict: passed, failed or inconclusive.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x**4).sum())
    >>> t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> first = bilevel.testing.check_gradients(layer, (0 * t, t)).comparisons[0]
    >>> first.derivative, first.reference, first.verdict.name, f"{first.relative:.6f}"
    ('reverse', 'dense', 'PASSED', '0.000000')
    """

    argument: str
    derivative: str
    reference: str
    error: float
    size: float
    allowance: Allowance
    held_to: float
    verdict: Verdict

    @property
    def relative(self) -> float:
        """``error`` relative to ``size``; 0 for two zeros."""
        return 0.0 if self.error == 0 else self.error / self.size if self.size else math.inf


@dataclass(frozen=True, eq=False)
class GradientCheck:
    """The result of :func:`check_gradients`; ``print`` it for the table.

    Parameters
    ----------
    where
        The layer or problem.
    comparisons
        One comparison for each tensor, derivative and reference.
    solution_error
        ‖x − x*‖ / ‖x*‖ of the inner solution, the largest over a batch.
    dtypes
        The coarsest dtype of the call, and the dtype of the references.
    gradients
        By method (``"reverse"``, ``"dense"``, ``"unrolled"``) and argument.
    notes
        Sentences on the references.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x**4).sum())
    >>> t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> check = bilevel.testing.check_gradients(layer, (0 * t, t))
    >>> check.passed, len(check.comparisons), f"{check.worst.relative:.6f}"
    (True, 4, '0.000000')
    """

    where: str
    comparisons: tuple[Comparison, ...]
    solution_error: float
    dtypes: tuple[str, str]
    gradients: Mapping[str, Mapping[str, torch.Tensor]] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every comparison was conclusive and agreed."""
        return all(comparison.verdict is Verdict.PASSED for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest error for its tolerance."""
        order = [Verdict.PASSED, Verdict.INCONCLUSIVE, Verdict.FAILED]
        return max(self.comparisons, key=lambda c: (order.index(c.verdict), c.error / max(c.held_to, 1e-300)))

    def __str__(self) -> str:
        head = ("argument", "derivative", "reference", "error", "relative", "held to", "mostly for", "")
        lines = [
            (
                c.argument, c.derivative, c.reference, f"{c.error:.1e}", f"{c.relative:.1e}" if c.size else "-", f"{c.held_to:.1e}",
                c.allowance.largest, c.verdict.value,
            )
            for c in self.comparisons
        ]  # fmt: skip
        widths = [max(len(row[column]) for row in (head, *lines)) for column in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *lines)
        ]
        bad = sum(c.verdict is not Verdict.PASSED for c in self.comparisons)
        agree = "all agree" if not bad else f"{bad} of {len(self.comparisons)} do not agree or prove nothing"
        return "\n".join(
            [
                f"{self.where}: {len(self.comparisons)} comparisons of gradients in {self.dtypes[0]} with references in "
                f"{self.dtypes[1]}, {agree}",
                "",
                *(line.rstrip() for line in table),
                "",
                f"inner solution: relative error {self.solution_error:.1e}",
                *self.notes,
            ]
        )
