"""Mehrotra's predictor–corrector method for batches of dense convex quadratic programs. Each problem has its own iteration.

    min ½ xᵀQx + qᵀx   s.t.   Ax = b,   Cx ≤ d

C stacks general rows G and the two sides of bounds. The method is the infeasible primal–dual one of Mehrotra (1992) as
Gertz and Wright (2003) give it for quadratic programs, with three additions:

- Ruiz's equilibration (2001) of the KKT matrix, and a scale of the objective.
- The Newton matrix is reduced to M = Q + CᵀWC + ρAᵀA + δI, W = diag(z/s). ρAᵀA changes no solution, because Ax = b, and makes M positive
  definite where Q is so on the null space of A alone. δ keeps the step near the iterate, as a proximal point does: it limits no accuracy.
- A problem that has ended is taken out of the batch, so that its answer does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from bilevel.solvers._dense_program import DenseProgram, Iterate, ProgramBatch, largest, mv, tmv
from bilevel.solvers._equilibration import equilibrated

__all__ = ["interior_point"]

_PROXIMAL = 1e-10  # δ, relative to a KKT matrix of norm one
_AUGMENTED = 1.0  # ρ, likewise
_ESCAPED = 1e-6  # a certificate of infeasibility or unboundedness is computed if a search ends this near to one
_IDLE = 5  # a search near its end ends after this many steps without progress
_LEAST_STEP = 1e-12


def interior_point(
    program: DenseProgram,
    tolerance: float,
    max_steps: int,
    start: Iterate | None = None,
    *,
    smoothing: float = 0.0,
    may_escape: bool = True,
) -> Iterate:
    """Return the last iterate: its relative residuals are at most ``tolerance``, or the :class:`Iterate` says why not.

    ``smoothing`` τ > 0: find the point of the central path with s·z = τ in place of a solution. ``may_escape``: end a
    search whose iterate looks like a ray.
    """
    scaled, scales = equilibrated(program)
    target = smoothing / scales.product
    point = _start(scaled) if start is None else scales.scaled(start)
    found = replace(point, **{entry.name: getattr(point, entry.name).clone() for entry in fields(point)})
    live = torch.arange(len(program.q), device=program.q.device)
    for turn in range(max_steps + 1):
        residuals = _Residuals.of(scaled, point, target)
        escaped = residuals.escaped(scaled, point) if may_escape else torch.zeros_like(point.escaped)
        point = _judged(point, residuals.error, escaped)
        ended = (
            (residuals.error <= tolerance)
            | escaped
            | point.stuck
            | (turn == max_steps)
            | ~torch.isfinite(residuals.error)
        )
        if bool(ended.any()):
            point, scaled, target, residuals, live = _retire(found, ended, live, point, scaled, target, residuals)
            if not len(live):
                break
        point = _step(scaled, point, residuals, target)
    return scales.unscaled(found)


def _judged(point: Iterate, error: torch.Tensor, escaped: torch.Tensor) -> Iterate:
    """Return ``point`` with its error and the flags that follow from its residuals."""
    better = error < 0.9 * point.best
    idle = torch.where(better, 0, point.idle + 1)
    stuck = point.stuck | ((idle >= _IDLE) & (point.best < 1e-4))
    return replace(
        point, error=error, escaped=escaped, stuck=stuck, best=torch.minimum(point.best, error), idle=idle
    )  # fmt: skip


def _retire(
    found: Iterate,
    ended: torch.Tensor,
    live: torch.Tensor,
    point: Iterate,
    program: DenseProgram,
    target: torch.Tensor,
    residuals: _Residuals,
) -> tuple[Iterate, DenseProgram, torch.Tensor, _Residuals, torch.Tensor]:
    """Store the iterates that have just ended, and remove them from the batch."""
    gone = ended.nonzero().squeeze(-1)
    found.put(live[gone], point.at(gone))
    left = (~ended).nonzero().squeeze(-1)
    return point.at(left), program.at(left), target[left], residuals.at(left), live[left]


@dataclass(frozen=True, eq=False)
class _Residuals(ProgramBatch):
    """The residuals of the optimality conditions at an iterate: dual (B, n), of equations (B, p), of rows (B, rows), and their relative size."""

    dual: torch.Tensor
    equations: torch.Tensor
    rows: torch.Tensor
    gap: torch.Tensor  # mean of s·z
    error: torch.Tensor
    curved: torch.Tensor  # Qx
    held: torch.Tensor  # Aᵀy + Cᵀz
    reached: torch.Tensor  # Cx

    @classmethod
    def of(cls, program: DenseProgram, point: Iterate, target: torch.Tensor) -> _Residuals:
        curved, reached = mv(program.Q, point.x), program.rows.times(point.x)
        held = program.rows.transposed(point.z)
        equations = point.y
        if point.y.shape[-1]:
            held = held + tmv(program.A, point.y)
            equations = mv(program.A, point.x) - program.b
        dual, rows = curved + program.q + held, reached + point.s - program.d
        products = point.s * point.z
        gap = products.mean(-1) if products.shape[-1] else point.x.new_zeros(len(point.x))
        primal = largest(equations, rows) / (1 + largest(program.b, program.d, reached))
        slope = largest(dual) / (1 + largest(program.q, curved, held))
        value = (point.x * (0.5 * curved + program.q)).sum(-1).abs()
        distance = (products - target).abs().sum(-1) / (1 + value)
        return cls(
            dual, equations, rows, gap, torch.maximum(torch.maximum(primal, slope), distance), curved, held, reached
        )

    def escaped(self, program: DenseProgram, point: Iterate) -> torch.Tensor:
        """Return whether (y, z) or x, normalised, is a ray that proves that there is no solution."""
        refuted = (program.b * point.y).sum(-1) + (program.d * point.z).sum(-1)
        infeasible = (refuted < 0) & (largest(self.held) < -_ESCAPED * refuted)
        falls = (program.q * point.x).sum(-1)
        along = torch.maximum(largest(self.curved), largest(self.equations + program.b))
        if self.reached.shape[-1]:
            along = torch.maximum(along, self.reached.amax(-1))
        return infeasible | ((falls < 0) & (along < -_ESCAPED * falls))


class _Newton:
    """The factorised Newton matrix at an iterate."""

    def __init__(self, program: DenseProgram, weights: torch.Tensor) -> None:
        self.program, self.weights = program, weights
        A = program.A
        self.equations = bool(A.shape[-2])
        matrix = program.rows.gram(weights, program.Q)
        if self.equations:
            matrix = matrix + _AUGMENTED * torch.bmm(A.mT, A)
        self.factor = _cholesky(matrix, _PROXIMAL)
        if self.equations:
            self.pulled = torch.cholesky_solve(A.mT.contiguous(), self.factor)  # M⁻¹Aᵀ
            schur = torch.bmm(A, self.pulled)
            self.schur = _cholesky((schur + schur.mT) / 2, 1e-13)

    def solve(
        self, dual: torch.Tensor, equations: torch.Tensor, rows: torch.Tensor, products: torch.Tensor, point: Iterate
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the step (dx, dy, ds, dz) that makes the residuals zero. ``products``: s·z minus its target."""
        C, A = self.program.rows, self.program.A
        shift = self.weights * rows - products / point.s
        right = -dual - C.transposed(shift)
        dy = point.y
        if self.equations:
            right = right - _AUGMENTED * tmv(A, equations)
            first = torch.cholesky_solve(right.unsqueeze(-1), self.factor)
            dy = torch.cholesky_solve(torch.bmm(A, first) + equations.unsqueeze(-1), self.schur)
            dx, dy = (first - torch.bmm(self.pulled, dy)).squeeze(-1), dy.squeeze(-1)
        else:
            dx = torch.cholesky_solve(right.unsqueeze(-1), self.factor).squeeze(-1)
        dz = self.weights * C.times(dx) + shift
        ds = -(products + point.s * dz) / point.z
        return dx, dy, ds, dz


def _cholesky(matrix: torch.Tensor, regularisation: float) -> torch.Tensor:
    """Return the Cholesky factors of ``matrix`` (B, n, n) + δ·size·I. δ grows until this is positive definite."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    size = diagonal.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    # δ is relative to a matrix of norm one, but not below the rounding of a large entry.
    diagonal += torch.maximum(torch.full_like(size, regularisation), 1e-15 * size)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    for more in (1e-13, 1e-10, 1e-7):
        if not bool(failed.any()):
            break
        diagonal += torch.where(failed.unsqueeze(-1) != 0, more * size, torch.zeros_like(size))
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor


def _start(program: DenseProgram) -> Iterate:
    """Return the initial point of Mehrotra's method: the solution with equal weights of all slacks, shifted until they are positive."""
    B, n = program.q.shape
    zeros, one = program.q.new_zeros, torch.ones_like(program.d)
    blank = torch.zeros(B, dtype=torch.bool, device=program.q.device)
    steps, error = torch.zeros(B, dtype=torch.int64, device=program.q.device), program.q.new_full((B,), float("inf"))
    origin = Iterate(
        zeros(B, n), zeros(B, program.A.shape[-2]), one, one, steps, error, blank, blank, error, steps, one > 1
    )
    newton = _Newton(program, one)
    # At x = 0, y = 0 with the condition s + z = 0, the products lead to ds = −dz.
    dx, dy, _, dz = newton.solve(program.q, -program.b, -program.d, torch.zeros_like(one), origin)
    if not program.d.shape[-1]:
        return replace(origin, x=dx, y=dy)
    return replace(origin, x=dx, y=dy, s=_positive(-dz), z=_positive(dz))


def _positive(v: torch.Tensor) -> torch.Tensor:
    least = v.amin(-1, keepdim=True)
    return torch.where(least > 1e-4, v, v - least + 1)


def _longest(v: torch.Tensor, dv: torch.Tensor) -> torch.Tensor:
    """Return the largest step (B, 1) along dv that keeps v ≥ 0; infinity if there is no limit."""
    return 1 / (-dv / v).amax(-1, keepdim=True).clamp_min(1e-30)


def _step(program: DenseProgram, point: Iterate, now: _Residuals, target: torch.Tensor) -> Iterate:
    """Return the iterate after one predictor–corrector step."""
    newton = _Newton(program, point.z / point.s)
    if not program.d.shape[-1]:
        dx, dy, _, _ = newton.solve(now.dual, now.equations, now.rows, now.rows, point)
        return replace(point, x=point.x + dx, y=point.y + dy, steps=point.steps + 1)
    s, z, mean = point.s, point.z, now.gap.unsqueeze(-1)
    products = s * z
    # With smoothing the predictor aims at the target, where the correction vanishes.
    _, _, ds, dz = newton.solve(now.dual, now.equations, now.rows, products - target, point)
    reach = torch.minimum(_longest(s, ds), _longest(z, dz)).clamp_max(1.0)
    after = ((s + reach * ds) * (z + reach * dz)).mean(-1, keepdim=True)
    centre = torch.maximum((after / mean) ** 3 * mean, target)
    dx, dy, ds, dz = newton.solve(now.dual, now.equations, now.rows, products + ds * dz - centre, point)
    # Near the solution, a step may end nearer to the boundary. A point of the central path is not near the boundary,
    # and a product s·z far below its target would prevent all further steps.
    share = torch.where(target > 0, 0.9, 1 - mean.clamp(1e-3, 1e-2))
    reach = (share * torch.minimum(_longest(s, ds), _longest(z, dz))).clamp_max(1.0)
    stuck = ~(reach.squeeze(-1) > _LEAST_STEP)
    reach = torch.where(stuck.unsqueeze(-1), torch.zeros_like(reach), reach)
    moved = [v + reach * dv for v, dv in ((point.x, dx), (point.y, dy), (s, ds), (z, dz))]
    moved = [torch.where(stuck.unsqueeze(-1), v, new) for v, new in zip((point.x, point.y, s, z), moved, strict=True)]
    x, y, s, z = moved
    return replace(point, x=x, y=y, s=s, z=z, steps=point.steps + 1, stuck=stuck)
