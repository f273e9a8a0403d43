"""A batch of quadratic programs as it was given, the conditions of optimality, and what a solver found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from bilevel.quadratic_programs._kkt import Factor, Sizes
from bilevel.reports import Status
from bilevel.solvers._dense_program import mv, tmv

__all__ = ["BESIDE", "Found", "Limits", "Program"]


_RUNAWAY = 1e4  # how many times the sides of the constraints the numbers may be that rounding is relative to
BESIDE = 1e-4  # the part of the largest unknown that counts as the size of a smaller one


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long to search, and what for.

    Parameters
    ----------
    max_steps
        Steps of the interior-point method.
    smoothing
        τ of the point of the central path that is wanted; 0 for the solution.
    """

    max_steps: int
    smoothing: float = 0.0


@dataclass(frozen=True, eq=False)
class Program:
    """min ½ xᵀQx + qᵀx  s.t.  Ax = b, Gx ≤ h, lower ≤ x ≤ upper, for a batch, in the dtype that is computed in.

    Parameters
    ----------
    Q, q, A, b, G, h
        (B, n, n), (B, n), (B, p, n), (B, p), (B, m, n), (B, m).
    lower, upper
        (B, n), infinite where there is no bound.
    dtype
        Of the data as given, whose rounding tells what is zero.
    """

    Q: torch.Tensor
    q: torch.Tensor
    A: torch.Tensor
    b: torch.Tensor
    G: torch.Tensor
    h: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Program:
        """Return the program of Q, q, A, b, G, h, lower and upper."""
        Q, q, A, b, G, h, lower, upper = tensors
        return cls(Q, q, A, b, G, h, lower, upper, dtype)

    def at(self, index: torch.Tensor) -> Program:
        """Return the problems at ``index``."""
        return Program.of([getattr(self, entry.name)[index] for entry in fields(self)[:-1]], self.dtype)

    @cached_property
    def sizes(self) -> Sizes:
        """n, p, m."""
        return Sizes(self.q.shape[-1], self.b.shape[-1], self.h.shape[-1])

    @property
    def finite(self) -> torch.Tensor:
        """(B,) bool: whether nothing is NaN, nor infinite where it must not be."""
        # A sum of numbers that are not all finite is not finite either, and takes a fraction of the time of a look at each.
        parts = [self.q, self.b, *(matrix.flatten(1) for matrix in (self.Q, self.A, self.G))]
        parts += [torch.where(torch.isinf(side), 0.0, side) for side in (self.h, self.lower, self.upper)]
        sums = torch.stack([part.sum(-1) for part in parts])
        if bool(torch.isfinite(sums).all()):
            return torch.ones(len(self.q), dtype=torch.bool, device=self.q.device)
        return torch.stack([torch.isfinite(part).all(-1) for part in parts]).all(0)

    @cached_property
    def fixed(self) -> torch.Tensor:
        """(B, n) bool: unknowns with two equal bounds."""
        return self.lower == self.upper

    @cached_property
    def fixed_rows(self) -> torch.Tensor:
        """(B, m + 2n) bool: the bounds of these unknowns, whose multipliers may have either sign."""
        return torch.cat([torch.zeros_like(self.h, dtype=torch.bool), self.fixed, self.fixed], -1)

    @cached_property
    def unit(self) -> torch.Tensor:
        """(B, 1): the length of an unknown at which Q weighs as much as q, zero where Q is."""
        slope, curvature = self.q.abs().amax(-1), self.Q.abs().flatten(1).amax(-1)
        return torch.where(curvature > 0, slope / curvature, 0.0).unsqueeze(-1)

    @cached_property
    def present(self) -> torch.Tensor:
        """(B, m + 2n) bool: inequalities that are not at infinity. Of two equal bounds the lower one."""
        return torch.cat(
            [torch.isfinite(self.h), torch.isfinite(self.lower), torch.isfinite(self.upper) & ~self.fixed], -1
        )  # fmt: skip

    @property
    def rounding(self) -> float:
        """The relative size of an eigenvalue of Q that may be rounding."""
        return 1e-11 if self.dtype == torch.float64 else 1e-5

    @property
    def weakness(self) -> float:
        """The relative size of a slack or a multiplier that counts as zero."""
        return 1e-9 if self.dtype == torch.float64 else 2e-6

    def residual(self, point: torch.Tensor, active: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Return R (B, n + p + m + 2n), which vanishes at the solution with the active set, or on the central path."""
        x, nu, lam, low, up = self.sizes.split(point)
        general, below, above = active.split(self.sizes.rows, -1)
        top = mv(self.Q, x) + self.q - low + up
        equations = nu
        if self.sizes.p:
            top = top + tmv(self.A, nu)
            equations = mv(self.A, x) - self.b
        rows = lam
        if self.sizes.m:
            top = top + tmv(self.G, lam)
            rows = torch.where(general, mv(self.G, x) - self.h, -lam)
        below_rows = torch.where(below, self.lower - x, -low)
        above_rows = torch.where(above, x - self.upper, -up)
        lack = torch.cat([top, equations, rows, below_rows, above_rows], -1)
        if smoothing:
            weights = point[:, self.sizes.n + self.sizes.p :]
            path = torch.where(active, smoothing / torch.where(active, weights, 1.0), 0.0)
            lack = torch.cat(
                [lack[:, : self.sizes.n + self.sizes.p], lack[:, self.sizes.n + self.sizes.p :] + path], -1
            )
        return lack

    @cached_property
    def sizes_of_matrices(self) -> tuple[torch.Tensor, ...]:
        """|Q|, |A|, |G|, and the largest entries (B, m) of the rows of G."""
        G = self.G.abs()
        return self.Q.abs(), self.A.abs(), G, G.amax(-1)

    @cached_property
    def sizes_of_sides(self) -> torch.Tensor:
        """(B, m + 2n): the sides of the inequalities without their signs, zero where they are infinite."""
        sides = torch.cat([self.h, self.lower, self.upper], -1).abs()
        return torch.where(torch.isfinite(sides), sides, 0.0)

    def slacks(self, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return d − Cx (B, m + 2n), and the sizes of the numbers of which each is the difference."""
        x = point[:, : self.sizes.n]
        slack = torch.cat([self.h - mv(self.G, x), x - self.lower, self.upper - x], -1)
        # The rounding of one unknown is relative to the others too: a difference from zero is not known to be one.
        size = x.abs()
        size = torch.maximum(size, BESIDE * torch.maximum(size.amax(-1, keepdim=True), self.unit))
        return slack, self.sizes_of_sides + torch.cat([mv(self.sizes_of_matrices[2], size), size, size], -1)

    def weights(self, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the multipliers (B, m + 2n) in units of a slope, and the size (B, 1) of the slopes of which they are made."""
        x, nu, lam, low, up = self.sizes.split(point)
        Q, A, _, lengths = self.sizes_of_matrices
        weights = torch.cat([lam * lengths, low, up], -1)
        size = torch.maximum(self.q.abs().amax(-1), mv(Q, x.abs()).amax(-1))
        if self.sizes.p:
            size = torch.maximum(size, tmv(A, nu.abs()).amax(-1))
        return weights, torch.maximum(size, weights.abs().amax(-1)).unsqueeze(-1)

    def scales(self, size: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest number (B,) in the constraints, and in the stationarity, for residuals to be compared with.

        To each is added what the program's own numbers are, at most one. ``size`` and ``rows`` are those of :meth:`weights` and :meth:`slacks`.
        """
        given, slope = self.sizes_of_sides.amax(-1), self.q.abs().amax(-1)
        if self.sizes.p:
            given = torch.maximum(given, self.b.abs().amax(-1))
        least = _at_most_one(torch.where(given > 0, given, self.unit.squeeze(-1)))
        # An x that runs away must not make the violation of a contradiction look small.
        primal = torch.minimum(torch.maximum(rows.amax(-1), given), _RUNAWAY * (least + given))
        curvature = self.Q.abs().flatten(1).amax(-1)
        return least + primal, _at_most_one(torch.where(slope > 0, slope, curvature)) + size.squeeze(-1)


def _at_most_one(size: torch.Tensor) -> torch.Tensor:
    return torch.where(size > 0, size, 1.0).clamp_max(1.0)


@dataclass(eq=False)
class Found:
    """The result of a solver.

    Parameters
    ----------
    point
        x, ν, λ, μ_l, μ_u (B, n + p + m + 2n).
    active, weak
        (B, m + 2n) bool: active inequalities, and those of which it is not clear.
    status, iterations
        (B,) int64.
    residual, threshold
        (B,).
    certificate
        (B, n + p + m + 2n): a ray of x that the objective falls along for ever, or of the multipliers that no feasible point allows; else zero.
    factor
        K, where it is at hand.
    """

    point: torch.Tensor
    active: torch.Tensor
    weak: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor
    threshold: torch.Tensor
    certificate: torch.Tensor
    factor: Factor | None = None

    @classmethod
    def blank(cls, program: Program) -> Found:
        """Return that nothing was found."""
        B, sizes, like = len(program.q), program.sizes, program.q
        marks = torch.zeros(B, sum(sizes.rows), dtype=torch.bool, device=like.device)
        numbers = torch.full((B,), int(Status.RUNNING), dtype=torch.int64, device=like.device)
        point = like.new_full((B, sum(sizes.parts)), float("nan"))
        residual, threshold = like.new_full((B,), float("nan")), like.new_full((B,), float("nan"))
        return cls(
            point,
            marks,
            marks.clone(),
            numbers,
            torch.zeros_like(numbers),
            residual,
            threshold,
            torch.zeros_like(point),
        )

    def put(self, index: torch.Tensor, other: Found) -> None:
        """Write the problems of ``other`` to ``index``."""
        for entry in fields(self)[:-1]:
            getattr(self, entry.name)[index] = getattr(other, entry.name)
