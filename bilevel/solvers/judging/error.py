"""The error of a solution: the next Newton step, per unknown, and the effect of rounding.

The judge (:mod:`bilevel.solvers.judging.judge`) decides by these numbers. Small systems are factorised. Large ones are solved
to one digit by a Krylov method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from bilevel._torch.factorisations import eigh, svd
from bilevel.equations.linearization import Linearization
from bilevel.equations.perturbation import perturbed, perturbed_copies
from bilevel.equations.problem import Problem
from bilevel.linear.gmres import GMRES
from bilevel.solvers._base import all_finite
from bilevel.solvers.parts.truncated_cg import truncated_cg

__all__ = [
    "ErrorEstimate",
    "estimate_error",
    "has_kink",
    "irregular_signs",
    "is_dense",
    "meets_negative_curvature",
    "residual_rounding",
    "rounding",
    "scaled_symmetric",
    "symmetric_error",
]

# Up to these sizes matrices are factorised: a Krylov method would need as many products.
_DENSE_SYMMETRIC, _DENSE_JACOBIAN = 128, 32
_DENSE_NUMBERS = 2**22
# Up to this size they are factorised if the residual is at the rounding level of x. R alone then says nothing about the
# error.
_DENSE_DROWNED = 512
# Matrices of up to so many numbers are kept for the derivative.
_KEPT_NUMBERS = 2**20
_KRYLOV_STEPS, _KRYLOV_ACCURACY = 500, 0.1
_EXAMINATION_STEPS = 20
# x may be this many times as long as the tangent of its orbit under a symmetry.
_SHORT_TANGENT = 10


@dataclass(frozen=True, eq=False)
class ErrorEstimate:
    """The results of a linear solve with J = ∂_x R at x, per problem.

    Parameters
    ----------
    error
        J⁻¹ R (batch, n): the next Newton step, which is x − x* to first order. Infinite if R is outside the range of a
        singular J, NaN if J is not finite.
    rounding
        (batch, n): the effect of rounding in x on J⁻¹ R. None if it was not computed.
    size
        (batch, n): the size of x in the units of each unknown, converted by the diagonal scaling of J.
    singular
        (batch,) bool: J is singular to working precision. A large J may be singular.
    indefinite
        (batch,) bool: J, a Hessian, has a negative eigenvalue beyond rounding.
    null_part
        (batch, n): the part of x in the null space of J.
    solved
        (batch,) bool: whether ``error`` at least halves the residual of J error = R. Always true if J was factorised.
    factor
        Cholesky factors (batch, n, n) of J, if all of them are positive definite.
    null
        Two arbitrary vectors (batch, n) in the null space of a symmetric J; zero if J is regular. None if all are
        regular.
    """

    error: torch.Tensor
    rounding: torch.Tensor | None
    size: torch.Tensor
    singular: torch.Tensor
    indefinite: torch.Tensor
    null_part: torch.Tensor
    solved: torch.Tensor
    factor: torch.Tensor | None = None
    null: tuple[torch.Tensor, ...] = ()


def is_dense(problem: Problem, most: int | None = None) -> bool:
    """Return whether the matrices of ``problem`` are factorised to estimate the error. ``most``: another limit of the order."""
    n = problem.size
    if most is None:
        most = _DENSE_SYMMETRIC if problem.system.symmetric else _DENSE_JACOBIAN
    wide = torch.finfo(problem.system.raveler.dtype).bits >= 32  # there are no factorisations in half precision
    return wide and n <= most and problem.batch * n * n <= _DENSE_NUMBERS


def estimate_error(problem: Problem, x: torch.Tensor, residual: torch.Tensor, doubtful: torch.Tensor) -> ErrorEstimate:
    """Return the :class:`ErrorEstimate` at ``x`` (batch, n); only the rows ``doubtful`` (batch,) are valid."""
    n, symmetric = problem.size, problem.system.symmetric
    dense = is_dense(problem)
    drowned = doubtful if dense else _drowned(problem, x, residual, doubtful)
    if dense or (is_dense(problem, _DENSE_DROWNED) and bool(drowned.any())):
        matrix = problem.linearize_dense(x).operator.dense()
        if problem.linearization_slot is not None and matrix.numel() <= _KEPT_NUMBERS:
            problem.linearization_slot.matrix = (x, matrix)
        estimate = symmetric_error if symmetric else _general
        if bool(all_finite(matrix) & all_finite(residual)):
            return estimate(problem, matrix, x, residual)
        finite = torch.isfinite(matrix).all(dim=-1).all(dim=-1)
        matrix = torch.where(finite[:, None, None], matrix, torch.eye(n, dtype=x.dtype, device=x.device))
        residual = torch.nan_to_num(residual)
        found = estimate(problem, matrix, x, residual)
        error = torch.where(finite.unsqueeze(-1), found.error, torch.full_like(x, torch.nan))
        return ErrorEstimate(
            error, found.rounding, found.size, found.singular & finite, found.indefinite & finite, found.null_part, found.solved,
            found.factor if bool(finite.all()) else None, found.null,
        )  # fmt: skip
    return _by_products(problem, x, torch.nan_to_num(residual), doubtful, drowned)


def _drowned(problem: Problem, x: torch.Tensor, residual: torch.Tensor, doubtful: torch.Tensor) -> torch.Tensor:
    """Return where R is at most the effect of rounding in x, (batch,) bool. It costs one product."""
    eps = torch.finfo(x.dtype).eps
    moved = _linearization(problem, x).operator.matvec(irregular_signs(x) * x).norm(dim=-1)
    if problem.is_fixed_point:
        moved = moved + x.norm(dim=-1)
    return doubtful & (residual.norm(dim=-1) <= 8 * eps * moved)


def scaled_symmetric(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symmetric matrices (batch, n, n) scaled to unit diagonal, and the units (batch, n): one scaled unknown in those of x."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).abs()
    unit = torch.where(diagonal > 0, diagonal, diagonal.amax(dim=-1, keepdim=True)).rsqrt()
    unit = torch.where(torch.isfinite(unit), unit, torch.ones_like(unit))
    return unit.unsqueeze(-1) * matrix * unit.unsqueeze(-2), unit


def symmetric_error(problem: Problem, matrix: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> ErrorEstimate:
    """Return the :class:`ErrorEstimate` of symmetric matrices (batch, n, n), those of ∂_x R at ``x``, with R = ``residual``."""
    n, eps = x.shape[-1], torch.finfo(x.dtype).eps
    scaled, unit = scaled_symmetric(matrix)
    noise = eps * (matrix.abs() @ x.abs().unsqueeze(-1)).squeeze(-1)
    right = torch.stack([residual, irregular_signs(x) * noise], dim=-1) * unit.unsqueeze(-1)  # (batch, n, 2)
    factor, info = torch.linalg.cholesky_ex(scaled)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    sound = (info == 0) & (pivots.amin(dim=-1) ** 2 > 1e3 * n * eps)
    solved = unit.unsqueeze(-1) * torch.cholesky_solve(right, factor)
    flag = torch.zeros_like(sound)
    singular, indefinite, null_part = flag, flag, torch.zeros_like(x)
    free: tuple[torch.Tensor, ...] = ()
    if not bool(sound.all()):
        rows = ~sound
        values, vectors = eigh(scaled[rows])
        largest = values.abs().amax(dim=-1, keepdim=True)
        null = values.abs() <= 10 * n * eps * largest
        # The eigenvalue of a symmetry is zero only at the solution itself. Nearby it has the size of the gradient, relative to
        # the tangent of the orbit. The tangent of a rotation is shorter than x: it is measured from the axis.
        drift = (right[rows][..., 0].norm(dim=-1) / (x / unit)[rows].norm(dim=-1)).unsqueeze(-1)
        null = null | ((values.abs() <= 1e-6 * largest) & (values.abs() <= _SHORT_TANGENT * drift))
        spectral = _Spectral(vectors, vectors, values, null)
        least = torch.where(null, largest, values).amin(dim=-1)
        negative = problem.minimizes & (least < -100 * n * eps * largest[:, 0])
        indefinite = indefinite.index_put((rows,), negative)
        singular = singular.index_put((rows,), null.any(dim=-1))
        solved = solved.index_put((rows,), unit[rows].unsqueeze(-1) * spectral.solve(right[rows], eps))
        null_part = null_part.index_put((rows,), unit[rows] * spectral.null_part((x / unit)[rows]))
        if bool(singular.any()):
            irregular = (spectral.null_part(v.expand_as(x)[rows]) for v in _irregular(x))
            free = tuple(torch.zeros_like(x).index_put((rows,), unit[rows] * v) for v in irregular)
    whole = factor / unit.unsqueeze(-1) if bool(sound.all()) else None
    size = (x.abs() / unit).amax(dim=-1, keepdim=True) * unit
    return ErrorEstimate(solved[..., 0], solved[..., 1], size, singular, indefinite, null_part, ~flag, whole, free)


def _general(problem: Problem, matrix: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> ErrorEstimate:
    n, eps = x.shape[-1], torch.finfo(x.dtype).eps
    noise = eps * (matrix.abs() @ x.abs().unsqueeze(-1)).squeeze(-1)
    if problem.is_fixed_point:
        # The rounding of x − T(x) is that of x.
        noise = noise + eps * x.abs()
        # The terms that add up to an unknown of T(x) have its unit. Those of an equation have not.
        columns = _usable((_usable(noise / eps).unsqueeze(-1) * matrix.abs()).amax(dim=-2))
    else:
        columns = _usable(matrix.abs().amax(dim=-2))
    rows_scale = _usable((matrix * columns.unsqueeze(-2)).abs().amax(dim=-1))
    scaled = rows_scale.unsqueeze(-1) * matrix * columns.unsqueeze(-2)
    right = torch.stack([residual, irregular_signs(x) * noise], dim=-1) * rows_scale.unsqueeze(-1)
    lu, pivots, info = torch.linalg.lu_factor_ex(scaled)
    steps = lu.diagonal(dim1=-2, dim2=-1).abs()
    sound = (info == 0) & (steps.amin(dim=-1) > 1e3 * n * eps * steps.amax(dim=-1))
    every = bool(sound.all())
    if not every:
        lu = torch.where(sound[:, None, None], lu, torch.eye(n, dtype=x.dtype, device=x.device))
    solved = columns.unsqueeze(-1) * torch.linalg.lu_solve(lu, pivots, right)
    flag = torch.zeros_like(sound)
    singular, null_part = flag, torch.zeros_like(x)
    if not every:
        rows = ~sound
        left, values, righth = svd(scaled[rows])
        null = values <= 10 * n * eps * values[:, :1]
        spectral = _Spectral(left, righth.mT, values, null)
        singular = singular.index_put((rows,), null.any(dim=-1))
        solved = solved.index_put((rows,), columns[rows].unsqueeze(-1) * spectral.solve(right[rows], eps))
        null_part = null_part.index_put((rows,), columns[rows] * spectral.null_part((x / columns)[rows]))
    size = (x.abs() / columns).amax(dim=-1, keepdim=True) * columns
    return ErrorEstimate(solved[..., 0], solved[..., 1], size, singular, flag, null_part, ~flag)


@dataclass(frozen=True, eq=False)
class _Spectral:
    """U diag(s) Vᵀ (batch, n, n) with the directions of ``null`` (batch, n) left out."""

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor
    null: torch.Tensor

    def solve(self, rhs: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the minimum-norm solutions of ``rhs`` (batch, n, 2) = (R, noise); infinite if more of R than the noise is out of range."""
        parts = self.left.mT @ rhs
        hidden = self.null.unsqueeze(-1)
        usable = torch.where(self.null, torch.ones_like(self.values), self.values).unsqueeze(-1)
        found = self.right @ torch.where(hidden, torch.zeros_like(parts), parts / usable)
        # Per unknown: noise in one unknown may be large for another with smaller units.
        unreachable = torch.where(self.null.unsqueeze(-2), self.left, torch.zeros_like(self.left))
        projector = unreachable @ unreachable.mT
        noise = (rhs[..., 1].abs() + eps * rhs[..., 0].abs()).unsqueeze(-1)
        beyond = (projector @ rhs[..., :1]).abs() > 8 * (projector.abs() @ noise)  # (batch, n, 1)
        error = torch.where(beyond.any(dim=-2), torch.full_like(found[..., 0], torch.inf), found[..., 0])
        return torch.stack([error, found[..., 1]], dim=-1)

    def null_part(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projection of ``x`` (batch, n) to the null directions."""
        along = (self.right.mT @ x.unsqueeze(-1)).squeeze(-1)
        return (self.right @ torch.where(self.null, along, torch.zeros_like(along)).unsqueeze(-1)).squeeze(-1)


def _usable(size: torch.Tensor) -> torch.Tensor:
    """Return 1/``size``, and 1 where that is not finite."""
    inverse = size.reciprocal()
    return torch.where(torch.isfinite(inverse), inverse, torch.ones_like(inverse))


def irregular_signs(x: torch.Tensor) -> torch.Tensor:
    """Return irregular signs like ``x`` (batch, n), the same in each row. No generator draws them, because an older vmap would refuse it."""
    n = x.shape[-1]
    known = _SIGNS.get(n) if x.device.type == "cpu" and type(x) is torch.Tensor else None
    if known is not None:
        return known.to(x.dtype).expand_as(x)
    places = torch.arange(1, n + 1, dtype=torch.float64, device=x.device)
    return torch.where(torch.frac(places * 0.7548776662) < 0.5, -1.0, 1.0).to(x).expand_as(x)


# Kept for small problems, whose time goes into single operations.
_SIGNS: dict[int, torch.Tensor] = {}
_SIGNS.update({n: irregular_signs(torch.empty(n)).double() for n in range(1, 33)})


def _irregular(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two arbitrary vectors (n,)."""
    places = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64, device=x.device)
    return tuple(torch.frac(places * irrational).sub(0.5).to(x) for irrational in (0.5698402910, 0.8191725134))  # type: ignore[return-value]


def _by_products(
    problem: Problem, x: torch.Tensor, residual: torch.Tensor, doubtful: torch.Tensor, drowned: torch.Tensor
) -> ErrorEstimate:
    operator = _linearization(problem, x).operator
    norm = residual.norm(dim=-1)
    active = doubtful & (norm > 0)
    none = torch.zeros_like(doubtful)
    if problem.system.symmetric:
        accuracy = torch.full_like(norm, _KRYLOV_ACCURACY)
        d, definite = truncated_cg(operator, residual, accuracy, min(2 * problem.size, _KRYLOV_STEPS), active)
        error, indefinite = -d, ~definite & problem.minimizes
    else:
        usable = active.unsqueeze(-1)
        unit = torch.where(usable, residual / norm.unsqueeze(-1), torch.zeros_like(residual))
        steps = min(problem.size, _KRYLOV_STEPS)
        found = GMRES(max_steps=steps).solve(operator, unit, torch.full_like(norm, _KRYLOV_ACCURACY))
        error, indefinite = found.x * norm.unsqueeze(-1), none
    left = (residual - operator.matvec(torch.nan_to_num(error))).norm(dim=-1)
    size = x.abs().amax(dim=-1, keepdim=True).expand_as(x)
    # It is not known whether J is singular. If rounding hides R, the judge decides whether that is due to the size of
    # x.
    return ErrorEstimate(error, None, size, drowned, indefinite, x, left <= 0.5 * norm)


def _linearization(problem: Problem, x: torch.Tensor) -> Linearization:
    """Return the linearisation at ``x``, and keep it for a derivative if one follows."""
    slot = problem.linearization_slot
    if slot is None:
        return problem.linearize(x)
    known = slot.linearization
    if known is None or known.point is None or not torch.equal(known.point, x):
        slot.linearization = known = problem.linearize(x, slot.needs_grad)
    return known


def meets_negative_curvature(problem: Problem, x: torch.Tensor, doubtful: torch.Tensor) -> torch.Tensor:
    """Return where a few Hessian-vector products at ``x`` (batch, n) prove a negative eigenvalue, (batch,) bool."""
    operator = _linearization(problem, x).operator
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(operator.size, generator=generator, dtype=torch.float64)
    start = start.to(dtype=operator.dtype, device=operator.device).expand(operator.batch, -1)
    relative = torch.full((operator.batch,), 1e-3, dtype=operator.dtype, device=operator.device)
    return ~truncated_cg(operator, start, relative, _EXAMINATION_STEPS, doubtful)[1]


def has_kink(problem: Problem, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Return where an objective's gradient jumps at or near ``x``, per problem. It costs six gradients and one product.

    If G is smooth, ∇G changes by 2 h H s + O(h³) from x − h s to x + h s, with signs s. The change minus 2 h H s then
    shrinks with h. At a kink it does not. If G has no value at one of the points, gradients decide nothing. Where H is
    not finite, as that of ‖x‖ at 0, the change of ∇G alone decides: it too shrinks unless ∇G jumps.
    """
    eps = torch.finfo(x.dtype).eps
    signs, reach = irregular_signs(x), eps ** (1 / 3) * x.abs().clamp_min(1.0)
    bend = _linearization(problem, x).operator.matvec(reach * signs).nan_to_num(0.0, 0.0, 0.0)
    left = []
    for share in (64.0, 1.0, 1 / 64):
        step = share * reach * signs
        (above, slope_above), (below, slope_below) = (problem.value_and_residual(x + s * step) for s in (1, -1))
        change = (slope_above - slope_below - 2 * share * bend).abs()
        inside = torch.isfinite(above) & torch.isfinite(below)
        left.append(torch.where(inside.unsqueeze(-1), change, torch.inf))
    found = torch.zeros_like(x, dtype=torch.bool)
    for wide, near in pairwise(left):
        size = residual.abs().amax(dim=-1, keepdim=True) + wide
        jump = torch.isfinite(wide) & (near > 0.5 * wide) & (near > 1e3 * eps * size) & (near > bend.abs() / 4)
        found = found | jump
    return found.any(dim=-1)


def residual_rounding(problem: Problem, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Return, per unknown (batch, n), the rounding error of R(x). It costs two or three evaluations."""
    worst = torch.finfo(x.dtype).eps * residual.abs()
    for moved in _differences(problem, x, residual):
        worst = torch.maximum(worst, torch.nan_to_num(moved.abs(), nan=0.0, posinf=0.0))
    return 8 * worst


def rounding(problem: Problem, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Return, per problem, the norm of the rounding error of R(x). It costs one to three evaluations.

    Below float64 it is the difference from float64. In float64 it is the scaled difference from float32, or the change
    when every number moves by a unit in its last place. The larger of these counts, times eight.
    """
    moved, *others = (difference.norm(dim=-1) for difference in _differences(problem, x, residual))
    for other in others:
        moved = torch.where(torch.isfinite(other), torch.maximum(moved, other), moved)
    eps = torch.finfo(x.dtype).eps
    return torch.nan_to_num(8 * (moved + eps * residual.norm(dim=-1)), nan=float("inf"))


def _differences(problem: Problem, x: torch.Tensor, residual: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the changes of R(x) when every number moves by its rounding, and in another precision."""
    other, (beside,) = perturbed(problem, 1, x)
    yield other.residual(beside) - residual
    try:
        if x.dtype != torch.float64:
            wide = (problem.to(torch.float64).residual(x.double()) - residual).to(residual)
        else:
            copies, (points,) = perturbed_copies(problem, 2, 1, x)
            single = torch.float32
            wide = copies.residual(points) - copies.to(single).residual(points.to(single))
            wide = torch.nan_to_num(wide, nan=0.0, posinf=0.0, neginf=0.0)
            wide = wide * (torch.finfo(x.dtype).eps / torch.finfo(single).eps)
    except (RuntimeError, TypeError, ValueError):  # a constant of another dtype inside, or a device without float64
        return
    yield wide
