"""A batch of constrained problems for solvers: min f(x) subject to h(x) = 0, c(x) ≤ 0, lower ≤ x ≤ upper.

Every tensor has a leading batch axis and no graph. The functions are stacked: ``parts`` is (f, h, c), of length 1 + p +
m.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, merge

__all__ = ["Answer", "ConstrainedSolver", "Program", "pulled_back"]

# Unknowns above this size need no other unit.
_SMALL = 1e-2
_DENSE_ORDER = 512
# Constraints whose values and gradients are below this are tiny.
_TINY = 1e-4


@dataclass(frozen=True, eq=False)
class Program:
    """A batch of K problems in n unknowns, with p equalities and m inequalities.

    Parameters
    ----------
    lower, upper
        (K, n), ±inf where there is no bound.
    equalities, inequalities
        p and m.
    parts
        x (K, n) ↦ (f, h, c) (K, 1 + p + m).
    jacobian
        x ↦ (parts, their Jacobian (K, 1 + p + m, n)).
    hessian
        (x, weights (K, 1 + p + m)) ↦ Σ weights · ∇² of the parts (K, n, n).
    product
        (x, v (K, n)) ↦ ∇²f v (K, n).
    single
        number ↦ the problem with this number as a batch of one.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    equalities: int
    inequalities: int
    parts: Callable[[torch.Tensor], torch.Tensor]
    jacobian: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    hessian: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    single: Callable[[int], Program] | None = None

    @property
    def size(self) -> int:
        """N."""
        return self.lower.shape[-1]

    @property
    def fixed(self) -> torch.Tensor:
        """Where lower = upper, (K, n)."""
        return self.lower == self.upper

    @property
    def crossed(self) -> torch.Tensor:
        """Where no number is between the bounds, (K, n)."""
        return (self.lower > self.upper) | (self.lower == torch.inf) | (self.upper == -torch.inf)

    @property
    def only_bounds(self) -> bool:
        """Whether there is neither an equality nor an inequality."""
        return self.equalities == self.inequalities == 0

    def split(self, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return f (K, ...), h (K, p, ...), c (K, m, ...) of ``parts`` (K, 1 + p + m, ...)."""
        p = self.equalities
        return parts[:, 0], parts[:, 1 : 1 + p], parts[:, 1 + p :]

    def violation(self, parts: torch.Tensor) -> torch.Tensor:
        """Return the largest violation of h = 0 and c ≤ 0, (K,)."""
        _, h, c = self.split(parts)
        return torch.cat([h.abs(), c.clamp_min(0), torch.zeros_like(parts[:, :1])], dim=-1).amax(-1)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest point to ``x`` (K, n) within the bounds. If lower > upper it is the upper bound."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def scaled(self, weights: torch.Tensor) -> Program:
        """Return the program with its parts multiplied by ``weights`` (K, 1 + p + m) > 0."""

        def jacobian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            parts, rows = self.jacobian(x)
            return weights * parts, weights.unsqueeze(-1) * rows

        return replace(
            self,
            parts=lambda x: weights * self.parts(x),
            jacobian=jacobian,
            hessian=lambda x, multipliers: self.hessian(x, weights * multipliers),
            product=lambda x, v: weights[:, :1] * self.product(x, v),
        )

    def in_units(self, unit: torch.Tensor) -> Program:
        """Return the program of x/unit, for ``unit`` (K,) > 0."""
        column = unit.unsqueeze(-1)

        def jacobian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            parts, rows = self.jacobian(column * x)
            return parts, column.unsqueeze(-1) * rows

        single = self.single
        return Program(
            self.lower / column, self.upper / column, self.equalities, self.inequalities,
            parts=lambda x: self.parts(column * x),
            jacobian=jacobian,
            hessian=lambda x, weights: column.unsqueeze(-1) ** 2 * self.hessian(column * x, weights),
            product=lambda x, v: column**2 * self.product(column * x, v),
            single=None if single is None else lambda number: single(number).in_units(unit[number : number + 1]),
        )  # fmt: skip

    def unit(self, x: torch.Tensor, parts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return a power of two (K,) as a unit in which unknowns are not small. It is one unless all indications of their size at ``x`` are small.

        The indications are x itself, finite bounds, the distances of constraints from x, and the length of a Newton
        step. Large unknowns need no unit, because tolerances are relative to 1 + |x|. ``parts`` and ``rows`` are the Jacobian at x inside the
        bounds.
        """
        flat = torch.zeros_like(parts)
        flat[:, 0] = 1.0
        dense = self.size <= _DENSE_ORDER
        slope = rows[:, 0]
        bent = (
            self.hessian(x, flat).abs().sum(-1).amax(-1)
            if dense
            else self.product(x, slope).norm(dim=-1) / slope.norm(dim=-1)
        )
        known = [x.abs().amax(-1), slope.abs().amax(-1) / bent]
        known += [torch.where(torch.isfinite(bound), bound.abs(), 0.0).amax(-1) for bound in (self.lower, self.upper)]
        if not self.only_bounds:
            known.append((parts[:, 1:].abs() / rows[:, 1:].norm(dim=-1)).nan_to_num(0.0, 0.0, 0.0).amax(-1))
        size = torch.stack(known).nan_to_num(0.0, 0.0, 0.0).amax(0)
        small = (size > 0) & (size < _SMALL)
        return torch.where(small, torch.exp2(torch.log2(size.clamp_min(1e-30)).round()), torch.ones_like(size))

    def row_weights(self, x: torch.Tensor, parts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """Return powers of two (K, 1 + p + m) by which tiny constraints are multiplied; None if none is tiny.

        A constraint is tiny if it and its gradient are so at ``x``, where they are ``parts`` and ``rows``, and beside it.
        """
        sizes = torch.maximum(rows.norm(dim=-1), parts.abs())
        sizes[:, 0] = 1.0
        if self.only_bounds or not bool((sizes < _TINY).any()):
            return None
        places = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
        beside = self.jacobian(self.inside(x + (1 + x.abs().amax(-1, keepdim=True)) * torch.cos(places)))[1].norm(
            dim=-1
        )
        sizes = torch.maximum(sizes, beside.nan_to_num(1.0, 1.0, 1.0))
        tiny = (sizes < _TINY) & (sizes > 0)
        tiny[:, 0] = False
        if not bool(tiny.any()):
            return None
        return torch.exp2(-torch.log2(torch.where(tiny, sizes, torch.ones_like(sizes))).round())


@dataclass(frozen=True, eq=False)
class Answer:
    """The result of a constrained solver.

    Parameters
    ----------
    x
        (K, n).
    equality, inequality
        Multipliers ν (K, p) and λ (K, m). For an infeasible problem: weights of the constraints whose combination cannot be met.
    status, iterations
        int64 (K,); ``Status.NOT_CONVERGED`` if the solver does not know.
    known
        Whether the multipliers are given. If not, they are recovered from x.
    """

    x: torch.Tensor
    equality: torch.Tensor
    inequality: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    known: bool = True

    def merged(self, these: torch.Tensor, other: Answer, *, ran: torch.Tensor | None = None) -> Answer:
        """Return ``other``, a search from this answer on, for ``these`` problems (K,), and this answer for the rest.

        The steps of ``other`` count where it ``ran`` (K,), by default for ``these``.
        """
        steps = self.iterations + torch.where(these if ran is None else ran, other.iterations, 0)
        return replace(merge(these, other, self), iterations=steps, known=self.known)


def pulled_back(rows: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Return Jᵀλ (K, n) of ``rows`` J (K, r, n) and ``multipliers`` λ (K, r)."""
    return (rows.mT @ multipliers.unsqueeze(-1)).squeeze(-1)


class ConstrainedSolver(InnerSolver):
    """A solver of a batch of constrained problems. Subclasses are frozen dataclasses of settings with one method, ``solve_program``."""

    @abstractmethod
    def solve_program(self, program: Program, init: torch.Tensor, smoothing: float | None) -> Answer:
        """Solve from ``init`` (K, n). ``smoothing`` is the barrier parameter τ of the central path to end on, or None for the solution."""

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        raise ArgumentError(
            f"{problem.where}: expected bounds or constraints for {self.name}, got none; pass lower, upper, equality or inequality to "
            "bilevel.argmin, or take bilevel.Newton() or bilevel.LBFGS()"
        )
