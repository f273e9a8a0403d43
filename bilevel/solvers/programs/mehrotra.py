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

from bilevel.solvers.programs.dense_program import DenseProgram, Iterate, ProgramBatch, largest, mv, tmv
from bilevel.solvers.programs.equilibration import equilibrated

__all__ = ["interior_point"]

_PROXIMAL = 1e-10  # δ, relative to a KKT matrix of norm one
_AUGMENTED = 1.0  # ρ, likewise
_ESCAPED = 1e-6  # a certificate of infeasibility or unboundedness is computed if a search ends this near to one
_IDLE = 5  # a search near its end ends after this many steps without progress
_CIRCLING = 3  # steps without progress after which the corrector is trusted no further than the predictor's step
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
    ended = torch.zeros_like(point.stuck)
    for turn in range(max_steps + 1):
        residuals = _Residuals.of(scaled, point, target)
        escaped = residuals.escaped(scaled, point) if may_escape else torch.zeros_like(point.escaped)
        point = _judged(point, residuals.error, escaped)
        reached = ended | (residuals.error <= tolerance)
        ended = reached | escaped | point.stuck | (turn == max_steps) | ~torch.isfinite(residuals.error)
        count = int(ended.sum())
        if count == len(ended):
            found.put(live, point)
            break
        # What has reached its end stands still. It is taken out of the batch where that saves more than it costs.
        if 2 * count >= len(ended) or count > int(reached.sum()):
            point, scaled, target, residuals, live = _retire(found, ended, live, point, scaled, target, residuals)
            ended = torch.zeros_like(point.stuck)
        point = _step(scaled, point, residuals, target, ended)
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
    products: torch.Tensor  # s·z
    error: torch.Tensor
    falls: torch.Tensor  # qᵀx
    curved: torch.Tensor  # the largest entry of Qx, and so on
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
        falls = (point.x * program.q).sum(-1)
        value = (0.5 * (point.x * curved).sum(-1) + falls).abs()
        sizes = largest(curved), largest(held)
        primal = largest(equations, rows) / (1 + torch.maximum(program.sides, largest(reached)))
        slope = largest(dual) / (1 + torch.maximum(program.slope, torch.maximum(*sizes)))
        distance = (products - target).abs().sum(-1) / (1 + value)
        error = torch.maximum(torch.maximum(primal, slope), distance)
        return cls(dual, equations, rows, products, error, falls, *sizes, reached)

    def escaped(self, program: DenseProgram, point: Iterate) -> torch.Tensor:
        """Return whether (y, z) or x, normalised, is a ray that proves that there is no solution."""
        refuted = (program.d * point.z).sum(-1)
        along = self.curved
        if point.y.shape[-1]:
            refuted = refuted + (program.b * point.y).sum(-1)
            along = torch.maximum(along, largest(self.equations + program.b))
        if self.reached.shape[-1]:
            along = torch.maximum(along, self.reached.amax(-1))
        # Each is at least 0 beside the other side, which is positive for a ray alone.
        return (self.held < -_ESCAPED * refuted) | (along < -_ESCAPED * self.falls)


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


def _longest(pair: torch.Tensor, change: torch.Tensor, share: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Return the step (B, 1), at most one, that keeps ``pair`` positive: ``share`` of the way to the boundary."""
    return 1 / (-(change / pair).amin(-1, keepdim=True) / share).clamp_min(1.0)


def _step(program: DenseProgram, point: Iterate, now: _Residuals, target: torch.Tensor, ended: torch.Tensor) -> Iterate:
    """Return the iterate after one predictor–corrector step of the problems that have not ``ended``."""
    newton = _Newton(program, point.z / point.s)
    steps = point.steps + ~ended
    if not program.d.shape[-1]:
        dx, dy, _, _ = newton.solve(now.dual, now.equations, now.rows, now.rows, point)
        free = ~ended.unsqueeze(-1)
        return replace(point, x=point.x + free * dx, y=point.y + free * dy, steps=steps)
    pair, products = torch.cat([point.s, point.z], -1), now.products
    mean = products.mean(-1, keepdim=True)
    # With smoothing the predictor aims at the target, where the correction vanishes.
    _, _, ds, dz = newton.solve(now.dual, now.equations, now.rows, products - target, point)
    change = torch.cat([ds, dz], -1)
    reach = _longest(pair, change)
    after = torch.mul(*(pair + reach * change).chunk(2, -1)).mean(-1, keepdim=True)
    centre = torch.maximum((after / mean) ** 3 * mean, target)
    # The corrector stands for the whole predictor, of which a part is taken. Iterates may go round in a circle for that (Cartis 2009).
    trust = torch.where(point.idle.unsqueeze(-1) >= _CIRCLING, reach.square(), 1.0)
    dx, dy, ds, dz = newton.solve(now.dual, now.equations, now.rows, products + trust * ds * dz - centre, point)
    # Near the solution, a step may end nearer to the boundary. A point of the central path is not near the boundary,
    # and a product s·z far below its target would prevent all further steps.
    share = torch.where(target > 0, 0.9, 1 - mean.clamp(1e-3, 1e-2))
    change = torch.cat([ds, dz], -1)
    reach = _longest(pair, change, share)
    stuck = ~(reach > _LEAST_STEP)
    still = stuck | ended.unsqueeze(-1)
    x, y, pair = point.x + reach * dx, point.y + reach * dy, pair + reach * change
    stuck = stuck.squeeze(-1)
    s, z = pair.chunk(2, -1)
    if bool(still.any()):
        # A step that is not finite must not touch what stays, hence no product with zero.
        x, y = torch.where(still, point.x, x), torch.where(still, point.y, y)
        s, z = torch.where(still, point.s, s), torch.where(still, point.z, z)
    return replace(point, x=x, y=y, s=s, z=z, steps=steps, stuck=stuck)
