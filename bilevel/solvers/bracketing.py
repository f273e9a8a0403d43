"""Roots of independent scalar equations between bounds at which the residual has different signs: bisection and Brent's method."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.mapped import is_mapped
from bilevel._torch.transforms import innermost
from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError, ShapeError
from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver

__all__ = ["Bisection", "Bracketing", "Brent"]

# The residual at a root, in units of the rounding of the residuals at the bounds.
_ROUNDING = 1e3


@dataclass(frozen=True, eq=False)
class Bracketing(InnerSolver):
    """A method for scalar equations, each with its own bracket; see :class:`Bisection`."""

    lower: Any
    upper: Any
    max_steps: int | None = None

    @property
    def is_confined(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_steps(self.name, "max_steps", self.max_steps, optional=True)
        if all(isinstance(bound, (int, float)) for bound in (self.lower, self.upper)):
            low, high = (torch.tensor(float(bound), dtype=torch.float64) for bound in (self.lower, self.upper))
            self._check(self.name, low, high)

    @staticmethod
    def _check(where: str, low: torch.Tensor, high: torch.Tensor) -> None:
        """Raise :class:`ArgumentError` unless the bounds are finite numbers, and ``low`` is below ``high``."""
        wrong = ~(torch.isfinite(low) & torch.isfinite(high) & (low < high))
        if not bool(wrong.any()):
            return
        first, second = (float(bound[wrong][0]) for bound in (low, high))
        remedy = "choose finite bounds, such as -1e6 and 1e6"
        if low[wrong][0] >= high[wrong][0]:
            remedy = (
                "exchange them"
                if first > second
                else "choose a lower bound below the root, and an upper bound above it"
            )
        raise ArgumentError(
            f"{where}: expected finite bounds with lower < upper, got {first:g} and {second:g}; {remedy}"
        )

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        """Solve from the brackets. The first trial is ``init`` (batch, n) if it lies inside."""
        if problem.minimizes:
            raise ArgumentError(
                f"{problem.where}: expected a root for {self.name}, got an objective; take Newton(), or state the gradient as a bilevel.root"
            )
        low, high = (self._bound(problem, init, which) for which in ("lower", "upper"))
        self._check(f"{problem.where}: {self.name}", low, high)
        f_low, f_high = problem.residual(low), problem.residual(high)
        first = torch.where((init > low) & (init < high), init, low + 0.5 * (high - low))
        finest = max(0.01 * goal.target.atol, torch.finfo(init.dtype).tiny)
        x, f, width, steps = self.search(problem, (low, high, f_low, f_high), first, finest)
        size = torch.maximum(*(torch.where(torch.isfinite(f), f.abs(), 0.0) for f in (f_low, f_high)))
        # Where both overflow, nothing is known of the rounding of a residual.
        size = torch.where(torch.isinf(f_low) & torch.isinf(f_high), torch.nan, size)
        changes = f_low.sign() * f_high.sign() <= 0  # not where it is NaN
        eps = torch.finfo(x.dtype).eps
        at_rounding = f.abs() <= _ROUNDING * eps * size
        # The judge detects a jump across zero, and equations that depend on each other.
        known = changes & at_rounding
        error = torch.where(known.all(dim=-1, keepdim=True), width, torch.nan)
        ended = (width <= 8 * eps * x.abs() + 2 * finest).all(dim=-1)
        status = torch.where(ended, int(Status.CONVERGED), int(Status.MAX_STEPS))
        pole = changes & ((f.abs() > 10 * size) | ~torch.isfinite(f))
        pole = pole | torch.isnan(f_low) | torch.isnan(f_high)
        status = torch.where(pole.any(dim=-1), int(Status.NOT_FINITE), status)
        nothing = (~changes & ~(f == 0) & ~pole).any(dim=-1)
        status = torch.where(nothing, int(Status.NOT_CONVERGED), status)
        return InnerSolution(x, steps, status, f, error=error)

    @abstractmethod
    def search(
        self, problem: Problem, bracket: tuple[torch.Tensor, ...], first: torch.Tensor, finest: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x, R(x) and the final widths of the brackets (batch, n), and the steps int64 (batch,).

        ``bracket`` holds the bounds and R at each (batch, n), ``first`` the first trial. A bracket of width ``finest``,
        or of some units of rounding of x, is not shortened further.
        """

    def _bound(self, problem: Problem, init: torch.Tensor, which: str) -> torch.Tensor:
        bound, raveler = getattr(self, which), problem.system.raveler
        if any(isinstance(leaf, torch.Tensor) and is_mapped(leaf) for leaf in pytree.tree_leaves(bound)):
            raise ArgumentError(
                f"{problem.where}: expected {which} of {self.name} to be the same for all problems of a batch, got one that vmap maps; "
                "make the batch one unknown, which is a vector, and leave vmap out: each entry is solved by itself, with its own bounds"
            )
        bound = pytree.tree_map_only(torch.Tensor, innermost, bound)
        try:
            if isinstance(bound, (int, float)):
                return torch.full_like(init, bound)
            if isinstance(bound, torch.Tensor) and raveler.is_tensor:
                flat = bound.to(init).broadcast_to(raveler.shapes[0]).reshape(-1)
            else:
                if pytree.tree_structure(bound) != raveler.structure:
                    raise ValueError
                flat = raveler.ravel(bound).to(init)
            return flat.detach().expand_as(init)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            raise ShapeError(
                f"{problem.where}: expected {which} of {self.name} to be a number, or tensors of the unknown's shapes, "
                f"{list(map(tuple, raveler.shapes))}, got {getattr(bound, 'shape', bound)!r}; pass a number for all, or one for each unknown"
            ) from None


@dataclass(frozen=True, eq=False)
class Bisection(Bracketing):
    """Halve a bracket on which the residual changes sign, separately for each unknown.

    For ``bilevel.root`` whose equations are independent: R_i depends on x_i alone. All are bisected at once. An unknown
    ends when its bracket is some units of rounding wide. The report names a bracket without a sign change, and a sign
    change at a pole. If equations depend on each other, the residual shows it, and the solve usually fails. The
    derivative is that of any root. Above 512 unknowns, ``linear_solver=bilevel.Diagonal()`` needs two products for it.

    Each step costs one evaluation of R; float64 takes about 60 steps.

    Parameters
    ----------
    lower, upper
        The bounds: numbers, or tensors of the unknown's shape, the same for all problems of a batch.
    max_steps
        The largest number of steps; None: 1,200, which is enough for any bracket of float64. Spending them all is a
        failure.

    Raises
    ------
    ArgumentError, ShapeError
        If a bracket is empty, or has not the unknown's shape; on use, for an ``argmin``.

    References
    ----------
    Press et al., "Numerical Recipes", 2007, section 9.1.

    Examples
    --------
    >>> import torch, bilevel
    >>> logs = bilevel.root(lambda x, a: torch.exp(x) - a, solver=Bisection(-5.0, 5.0))
    >>> logs(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 10.0], dtype=torch.float64))
    tensor([0.0000, 2.3026], dtype=torch.float64)
    """

    def search(
        self, problem: Problem, bracket: tuple[torch.Tensor, ...], first: torch.Tensor, finest: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        low, high, f_low, f_high = bracket
        steps = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        running = f_low.sign() * f_high.sign() < 0
        x = torch.where(f_low.abs() <= f_high.abs(), low, high)
        f = torch.where(f_low.abs() <= f_high.abs(), f_low, f_high)
        trial = first
        for _ in range(self.max_steps or 1200):
            running = running & (trial > low) & (trial < high)  # end when no number lies between the bounds
            if not bool(running.any()):
                break
            steps = steps + running.any(dim=-1)
            value = problem.residual(torch.where(running, trial, x))
            x, f = torch.where(running, trial, x), torch.where(running, value, f)
            same = value.sign() == f_low.sign()
            low = torch.where(running & same, trial, low)
            high = torch.where(running & ~same, trial, high)
            running = running & (value != 0) & (high - low > finest)
            trial = low + 0.5 * (high - low)
        return x, f, torch.where(f == 0, 0.0, high - low), steps


@dataclass(frozen=True, eq=False)
class Brent(Bracketing):
    """Brent's method: inverse quadratic interpolation inside a bracket, or bisection if that is better; separately for each unknown.

    It finds the same roots as :class:`Bisection`, in about 10 evaluations in place of 60. In the worst case it needs
    about the square of bisection's number.

    Parameters
    ----------
    lower, upper
        See :class:`Bisection`.
    max_steps
        The largest number of steps; None: 3,000, and spending them all is a failure.

    Raises
    ------
    ArgumentError, ShapeError
        See :class:`Bisection`.

    References
    ----------
    Brent, "Algorithms for Minimization without Derivatives", 1973, chapter 4.

    Examples
    --------
    >>> import torch, bilevel
    >>> logs = bilevel.root(lambda x, a: torch.exp(x) - a, solver=Brent(-5.0, 5.0))
    >>> logs(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 10.0], dtype=torch.float64))
    tensor([0.0000, 2.3026], dtype=torch.float64)
    """

    def search(
        self, problem: Problem, bracket: tuple[torch.Tensor, ...], first: torch.Tensor, finest: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        low, high, f_low, f_high = bracket
        steps = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        running = f_low.sign() * f_high.sign() < 0
        eps = torch.finfo(first.dtype).eps
        # b is the best point, c the other end of its bracket, a the point before.
        a, fa, c, fc = low, f_low, high, f_high
        b, fb = torch.where(running, first, low), f_low
        if bool(running.any()):
            fb = torch.where(running, problem.residual(b), fb)
            steps = steps + running.any(dim=-1)
        below = fb.sign() == f_low.sign()
        a, fa = torch.where(below, low, high), torch.where(below, f_low, f_high)
        c, fc = torch.where(below, high, low), torch.where(below, f_high, f_low)
        d = e = b - a
        for _ in range(self.max_steps or 3000):
            # c is on the other side of the root, and b is the better of the two.
            again = fb.sign() == fc.sign()
            c, fc = torch.where(again, a, c), torch.where(again, fa, fc)
            d, e = torch.where(again, b - a, d), torch.where(again, b - a, e)
            swap = fc.abs() < fb.abs()
            a, b, c = torch.where(swap, b, a), torch.where(swap, c, b), torch.where(swap, b, c)
            fa, fb, fc = torch.where(swap, fb, fa), torch.where(swap, fc, fb), torch.where(swap, fb, fc)
            least, half = 2 * eps * b.abs() + 0.5 * finest, 0.5 * (c - b)
            running = running & (half.abs() > least) & (fb != 0)
            if not bool(running.any()):
                break
            step = _interpolated(a, b, c, fa, fb, fc)
            within = (
                (step * half.sign() > 0) & (step.abs() < 1.5 * half.abs() - 0.5 * least) & (step.abs() < 0.5 * e.abs())
            )
            good = within & (e.abs() >= least) & (fa.abs() > fb.abs())
            d, e = torch.where(good, step, half), torch.where(good, d, half)
            moved = b + torch.where(d.abs() > least, d, least * half.sign())
            steps = steps + running.any(dim=-1)
            a, fa = torch.where(running, b, a), torch.where(running, fb, fa)
            b = torch.where(running, moved, b)
            fb = torch.where(running, problem.residual(b), fb)
        lost = f_low.sign() * f_high.sign() >= 0
        end = torch.where(f_low.abs() <= f_high.abs(), low, high)
        at_end = torch.where(f_low.abs() <= f_high.abs(), f_low, f_high)
        x, f = torch.where(lost, end, b), torch.where(lost, at_end, fb)
        return x, f, torch.where(f == 0, 0.0, (c - b).abs()), steps


def _interpolated(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, fa: torch.Tensor, fb: torch.Tensor, fc: torch.Tensor
) -> torch.Tensor:
    """Return the step from b to the zero of the secant through a and b, or of the inverse parabola through all three points."""
    s = fb / fa
    secant = -s * (c - b) / (1 - s)
    q, r = fa / fc, fb / fc
    top = s * ((c - b) * q * (q - r) - (b - a) * (r - 1))
    parabola = -top / ((q - 1) * (r - 1) * (s - 1))
    return torch.nan_to_num(torch.where(a == c, secant, parabola), nan=0.0)
