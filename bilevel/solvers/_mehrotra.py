"""Mehrotra's predictor–corrector for batches of dense convex quadratic programs, each problem its own iteration.

    min ½ xᵀQx + qᵀx   s.t.   Ax = b,   Cx ≤ d

C stacks general rows G and the two sides of bounds (:class:`Rows`). The method is the infeasible primal–dual one of Mehrotra (1992) as
Gertz and Wright (2003) give it for quadratic programs, with three additions:

- Ruiz's equilibration (2001) of the KKT matrix, and a scale of the objective.
- The Newton matrix is reduced to M = Q + CᵀWC + ρAᵀA + δI, W = diag(z/s). ρAᵀA changes no solution, because Ax = b, and makes M positive
  definite where Q is so on the null space of A alone. δ keeps the step near the iterate, as a proximal point does: it limits no accuracy.
- A problem that has ended is taken out of the batch once half of the batch has, and its iterate is kept from the moment at which it ended.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

__all__ = ["DenseProgram", "Iterate", "Rows", "interior_point", "mv", "tmv"]

_PROXIMAL = 1e-10  # δ, relative to a KKT matrix of norm one
_AUGMENTED = 1.0  # ρ, likewise
_ESCAPED = 1e-6  # how near to a certificate of infeasibility or unboundedness a search ends, for the certificate to be looked for
_IDLE = 5  # steps without progress after which a search that is near its end has ended
_LEAST_STEP = 1e-12

T = TypeVar("T", bound="_Batch")


def mv(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the products (B, m) of matrices (B, m, n) and vectors (B, n)."""
    return torch.bmm(matrix, x.unsqueeze(-1)).squeeze(-1)


def tmv(matrix: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the products (B, n) of transposed matrices (B, m, n) and vectors (B, m)."""
    return torch.bmm(y.unsqueeze(1), matrix).squeeze(1)


class _Batch:
    """A dataclass of tensors whose first axis is the batch."""

    def at(self: T, index: torch.Tensor) -> T:
        """Return the problems at ``index``."""
        chosen = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            chosen[entry.name] = (
                None if value is None else value.at(index) if isinstance(value, _Batch) else value[index]
            )
        return replace(self, **chosen)  # type: ignore[type-var]

    def put(self: T, index: torch.Tensor, other: T) -> None:
        """Write the problems of ``other`` to ``index``."""
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if isinstance(value, _Batch):
                value.put(index, getattr(other, entry.name))
            elif value is not None:
                value[index] = getattr(other, entry.name)


@dataclass(frozen=True, eq=False)
class Rows(_Batch):
    """The rows C of Cx ≤ d: G, then −x on the side of lower bounds, then x on the side of upper bounds.

    Parameters
    ----------
    general
        G (B, m, n). A row of zeros stands for a constraint that is none.
    below, above
        (B, n): 1 where the variable has the bound, 0 where the row is zero. None where no problem has such bounds.
    """

    general: torch.Tensor
    below: torch.Tensor | None
    above: torch.Tensor | None

    @property
    def splits(self) -> list[int]:
        """The numbers of rows of the three kinds."""
        n = self.general.shape[-1]
        return [self.general.shape[-2], 0 if self.below is None else n, 0 if self.above is None else n]

    def present(self) -> torch.Tensor:
        """Return which rows (B, rows) are not zero."""
        general = self.general.ne(0).any(-1)
        return torch.cat([general, *(side > 0 for side in (self.below, self.above) if side is not None)], -1)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return C x (B, rows)."""
        parts = [mv(self.general, x)] if self.general.shape[-2] else []
        if self.below is not None:
            parts.append(-self.below * x)
        if self.above is not None:
            parts.append(self.above * x)
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0] if parts else x[:, :0]

    def transposed(self, z: torch.Tensor) -> torch.Tensor:
        """Return Cᵀ z (B, n)."""
        general, below, above = z.split(self.splits, -1)
        total = tmv(self.general, general) if self.general.shape[-2] else z.new_zeros(len(z), self.general.shape[-1])
        if self.below is not None:
            total = total - self.below * below
        if self.above is not None:
            total = total + self.above * above
        return total

    def gram(self, weights: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        """Return ``onto`` + Cᵀ diag(weights) C, in new memory."""
        general, below, above = weights.split(self.splits, -1)
        if self.general.shape[-2]:
            made = torch.baddbmm(onto, self.general.mT, self.general * general.unsqueeze(-1))
        else:
            made = onto.clone()
        diagonal = made.diagonal(dim1=-2, dim2=-1)
        if self.below is not None:
            diagonal += self.below * below
        if self.above is not None:
            diagonal += self.above * above
        return made


@dataclass(frozen=True, eq=False)
class DenseProgram(_Batch):
    """A batch of quadratic programs.

    Parameters
    ----------
    Q, q
        (B, n, n), symmetric positive semidefinite, and (B, n).
    A, b
        (B, p, n) and (B, p).
    rows, d
        C, and (B, rows) finite.
    """

    Q: torch.Tensor
    q: torch.Tensor
    A: torch.Tensor
    b: torch.Tensor
    rows: Rows
    d: torch.Tensor


@dataclass(frozen=True, eq=False)
class Iterate(_Batch):
    """Where a search stands.

    Parameters
    ----------
    x, y, s, z
        Unknowns (B, n), multipliers of the equations (B, p), slacks and multipliers of the rows (B, rows), both positive.
    steps
        (B,) int64.
    error
        (B,): the largest of the relative residuals of the optimality conditions.
    escaped
        (B,) bool: the iterate has run away along a ray that refutes the problem or its dual.
    stuck
        (B,) bool: no step was possible any more, or none made progress.
    best, idle
        (B,): the smallest error so far, and how many steps ago that was.
    tight
        (B, rows) bool: z > s in the scaled program, which are the rows that seem active.
    """

    x: torch.Tensor
    y: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor
    steps: torch.Tensor
    error: torch.Tensor
    escaped: torch.Tensor
    stuck: torch.Tensor
    best: torch.Tensor
    idle: torch.Tensor
    tight: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Scales(_Batch):
    """The scales (B, ...) by which the parts of a scaled iterate are multiplied to have those of the given program.

    s·z is that of the scaled program times ``product``.
    """

    x: torch.Tensor
    y: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor
    product: torch.Tensor

    def scaled(self, point: Iterate) -> Iterate:
        return replace(point, x=point.x / self.x, y=point.y / self.y, s=point.s / self.s, z=point.z / self.z)

    def unscaled(self, point: Iterate) -> Iterate:
        tight = point.z > point.s
        return replace(
            point, x=point.x * self.x, y=point.y * self.y, s=point.s * self.s, z=point.z * self.z, tight=tight
        )  # fmt: skip


def interior_point(
    program: DenseProgram,
    tolerance: float,
    max_steps: int,
    start: Iterate | None = None,
    *,
    smoothing: float = 0.0,
    may_escape: bool = True,
) -> Iterate:
    """Return where the search ends: relative residuals of at most ``tolerance``, or a reason in the :class:`Iterate`.

    ``smoothing`` τ > 0 aims at the point of the central path with s·z = τ in place of a solution. ``may_escape`` lets a search end
    where its iterate looks like a ray.
    """
    scaled, scales = _equilibrated(program)
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
    """Return ``point`` with what its residuals say of it."""
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
    """Keep the iterates that have ended and are new, and leave them out of the batch."""
    gone = ended.nonzero().squeeze(-1)
    found.put(live[gone], point.at(gone))
    left = (~ended).nonzero().squeeze(-1)
    return point.at(left), program.at(left), target[left], residuals.at(left), live[left]


def _largest(*parts: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value (B,) in tensors (B, k), 0 of none."""
    found = [part.abs().amax(-1) for part in parts if part.shape[-1]]
    total = found[0] if found else parts[0].new_zeros(len(parts[0]))
    for other in found[1:]:
        total = torch.maximum(total, other)
    return total


def _equilibrated(program: DenseProgram, passes: int = 3) -> tuple[DenseProgram, _Scales]:
    """Return the program whose KKT matrix has columns of norm near one, and the scales that lead back."""
    Q, A, G = program.Q, program.A, program.rows.general
    n, p, m = Q.shape[-1], A.shape[-2], G.shape[-2]
    columns, equations, general = Q.new_ones(len(Q), n), Q.new_ones(len(Q), p), Q.new_ones(len(Q), m)
    for _ in range(passes):
        height = Q.abs().amax(-2)
        if p:
            height = torch.maximum(height, A.abs().amax(-2))
        if m:
            height = torch.maximum(height, G.abs().amax(-2))
        step = _inverse_root(height)
        columns = columns * step
        Q = Q * step.unsqueeze(-1) * step.unsqueeze(-2)
        if p:
            row = _inverse_root(A.abs().amax(-1))
            A, equations = A * row.unsqueeze(-1) * step.unsqueeze(-2), equations * row
        if m:
            row = _inverse_root(G.abs().amax(-1))
            G, general = G * row.unsqueeze(-1) * step.unsqueeze(-2), general * row
    sides = [general]
    sides += [1 / columns] * (program.rows.below is not None) + [1 / columns] * (program.rows.above is not None)
    inequalities, rows = torch.cat(sides, -1), replace(program.rows, general=G)
    q, b, d, there = program.q * columns, program.b * equations, program.d * inequalities, rows.present()
    unit = _unit(Q, q, b, d, there)
    q, b, d = q / unit, b / unit, torch.where(there | (d <= 0), d / unit, 1.0)
    size = torch.maximum(Q.abs().amax(-1).mean(-1), q.abs().amax(-1)).unsqueeze(-1)
    cost = torch.where(size > 0, 1 / size.clamp_min(1e-30), torch.ones_like(size))
    scaled = DenseProgram(Q * cost.unsqueeze(-1), q * cost, A, b, rows, d)
    weight = unit / cost
    return scaled, _Scales(
        columns * unit, equations * weight, unit / inequalities, inequalities * weight, unit * weight
    )


def _unit(Q: torch.Tensor, q: torch.Tensor, b: torch.Tensor, d: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Return a size (B, 1) that the unknowns may have, if that is below one."""
    curvature = Q.abs().flatten(1).amax(-1)
    free = torch.where(curvature > 0, _largest(q) / curvature.clamp_min(1e-300), 0.0)
    unit = torch.maximum(free, _largest(b, torch.where(there, d, 0.0)))
    return torch.where(unit > 0, unit, torch.ones_like(unit)).clamp(1e-100, 1.0).unsqueeze(-1)


def _inverse_root(norm: torch.Tensor) -> torch.Tensor:
    return torch.where(norm > 0, norm.clamp_min(1e-30).rsqrt(), torch.ones_like(norm))


@dataclass(frozen=True, eq=False)
class _Residuals(_Batch):
    """What the optimality conditions lack at an iterate: dual (B, n), of equations (B, p), of rows (B, rows), and their relative size."""

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
        primal = _largest(equations, rows) / (1 + _largest(program.b, program.d, reached))
        slope = _largest(dual) / (1 + _largest(program.q, curved, held))
        value = (point.x * (0.5 * curved + program.q)).sum(-1).abs()
        distance = (products - target).abs().sum(-1) / (1 + value)
        return cls(
            dual, equations, rows, gap, torch.maximum(torch.maximum(primal, slope), distance), curved, held, reached
        )

    def escaped(self, program: DenseProgram, point: Iterate) -> torch.Tensor:
        """Return whether (y, z) or x is, up to its length, a ray that proves that there is no solution."""
        refuted = (program.b * point.y).sum(-1) + (program.d * point.z).sum(-1)
        infeasible = (refuted < 0) & (_largest(self.held) < -_ESCAPED * refuted)
        falls = (program.q * point.x).sum(-1)
        along = torch.maximum(_largest(self.curved), _largest(self.equations + program.b))
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
        """Return the step (dx, dy, ds, dz) that takes the residuals to zero; ``products`` is what s·z exceeds its aim by."""
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
    """Return the Cholesky factors of ``matrix`` (B, n, n) + δ·size·I, with δ raised where that is not positive definite."""
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
    """Return the start of Mehrotra's method: the solution with all slacks weighed alike, shifted to where they are positive."""
    B, n = program.q.shape
    zeros, one = program.q.new_zeros, torch.ones_like(program.d)
    blank = torch.zeros(B, dtype=torch.bool, device=program.q.device)
    steps, error = torch.zeros(B, dtype=torch.int64, device=program.q.device), program.q.new_full((B,), float("inf"))
    origin = Iterate(
        zeros(B, n), zeros(B, program.A.shape[-2]), one, one, steps, error, blank, blank, error, steps, one > 1
    )
    newton = _Newton(program, one)
    # At x = 0, y = 0 with s + z = 0 asked for: products make ds = −dz.
    dx, dy, _, dz = newton.solve(program.q, -program.b, -program.d, torch.zeros_like(one), origin)
    if not program.d.shape[-1]:
        return replace(origin, x=dx, y=dy)
    return replace(origin, x=dx, y=dy, s=_positive(-dz), z=_positive(dz))


def _positive(v: torch.Tensor) -> torch.Tensor:
    least = v.amin(-1, keepdim=True)
    return torch.where(least > 1e-4, v, v - least + 1)


def _longest(v: torch.Tensor, dv: torch.Tensor) -> torch.Tensor:
    """Return the largest step (B, 1) along dv that keeps v ≥ 0; infinity where none ends it."""
    return 1 / (-dv / v).amax(-1, keepdim=True).clamp_min(1e-30)


def _step(program: DenseProgram, point: Iterate, now: _Residuals, target: torch.Tensor) -> Iterate:
    """Return the iterate after one predictor–corrector step."""
    newton = _Newton(program, point.z / point.s)
    if not program.d.shape[-1]:
        dx, dy, _, _ = newton.solve(now.dual, now.equations, now.rows, now.rows, point)
        return replace(point, x=point.x + dx, y=point.y + dy, steps=point.steps + 1)
    s, z, mean = point.s, point.z, now.gap.unsqueeze(-1)
    products = s * z
    # On the central path the predictor aims at the target: what it corrects for vanishes there.
    _, _, ds, dz = newton.solve(now.dual, now.equations, now.rows, products - target, point)
    reach = torch.minimum(_longest(s, ds), _longest(z, dz)).clamp_max(1.0)
    after = ((s + reach * ds) * (z + reach * dz)).mean(-1, keepdim=True)
    centre = torch.maximum((after / mean) ** 3 * mean, target)
    dx, dy, ds, dz = newton.solve(now.dual, now.equations, now.rows, products + ds * dz - centre, point)
    # The nearer to the solution, the nearer to the boundary a step may go.
    share = 1 - mean.clamp(1e-3, 1e-2)
    reach = (share * torch.minimum(_longest(s, ds), _longest(z, dz))).clamp_max(1.0)
    stuck = ~(reach.squeeze(-1) > _LEAST_STEP)
    reach = torch.where(stuck.unsqueeze(-1), torch.zeros_like(reach), reach)
    moved = [v + reach * dv for v, dv in ((point.x, dx), (point.y, dy), (s, ds), (z, dz))]
    moved = [torch.where(stuck.unsqueeze(-1), v, new) for v, new in zip((point.x, point.y, s, z), moved, strict=True)]
    x, y, s, z = moved
    return replace(point, x=x, y=y, s=s, z=z, steps=point.steps + 1, stuck=stuck)
