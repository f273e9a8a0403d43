"""Directions of Newton's method by matrices: descent directions for a minimum, and directions for a root, also for singular matrices."""

from __future__ import annotations

import torch

from bilevel._torch.factorisations import eigh, pinv
from bilevel.operators import LinearOperator
from bilevel.solvers.parts.newton_state import Direction, NewtonState

__all__ = ["dense_descent", "dense_root", "descending", "slope_along", "truncated_direction"]

# Up to this size the Jacobians of a batch of roots are kept for a look at what is left.
_KEPT_NUMBERS = 2**20


def descending(
    d: torch.Tensor, gradient: torch.Tensor, definite: torch.Tensor, factor: torch.Tensor | None = None
) -> Direction:
    """Return the direction d (batch, n), or steepest descent where the objective does not fall along d."""
    slope = (gradient * d).sum(dim=-1)
    down = slope < 0  # not where it is NaN
    if not bool(down.all()):
        d = torch.where(down.unsqueeze(-1), d, -gradient)
        slope = torch.where(down, slope, -(gradient * gradient).sum(dim=-1))
        definite = definite & down
    return Direction(d, slope, definite, factor)


def dense_descent(operator: LinearOperator, state: NewtonState, active: torch.Tensor) -> Direction:
    """Return Newton's directions for a minimum. Where the Hessian is not positive definite, its eigenvalues are made so."""
    hessian, gradient = operator.dense(), state.residual
    factor, info = torch.linalg.cholesky_ex(hessian)
    d = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
    definite = info == 0
    if not bool(definite.all()) and bool((bad := active & ~definite).any()):
        size = torch.clamp(state.x[bad].norm(dim=-1), min=1.0)
        d = d.index_put((bad,), _absolute_newton(hessian[bad], gradient[bad], size))
    return descending(d, gradient, definite, factor)


def _absolute_newton(hessian: torch.Tensor, gradient: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Return −|H|⁻¹ g: absolute eigenvalues, taken once the variables are scaled to unit diagonal."""
    n = hessian.shape[-1]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).abs()
    eps = torch.finfo(hessian.dtype).eps
    # Small diagonal entries count too: they may belong to an unknown in large units.
    scale = torch.where(diagonal > 0, diagonal, diagonal.amax(dim=-1, keepdim=True)).sqrt()
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))
    # A failed decomposition gives NaN, which the gradient replaces later.
    eigenvalues, vectors = eigh(hessian / (scale.unsqueeze(-1) * scale.unsqueeze(-2)))
    sizes = eigenvalues.abs()
    floor = 1e3 * n * eps * sizes.amax(dim=-1)
    # Without curvature, as for a linear objective, the step is as long as x.
    floor = torch.where(floor > 0, floor, gradient.norm(dim=-1) / size)
    along = torch.einsum("bji,bj->bi", vectors, gradient / scale) / torch.maximum(sizes, floor.unsqueeze(-1))
    return -torch.einsum("bij,bj->bi", vectors, along) / scale


def dense_root(operator: LinearOperator, state: NewtonState, active: torch.Tensor) -> Direction:
    """Return Newton's directions for a root, or shortest least-squares steps where the Jacobian is singular."""
    jacobian, residual = operator.dense(), state.residual
    lu, pivots, info = torch.linalg.lu_factor_ex(jacobian)
    d = -torch.linalg.lu_solve(lu, pivots, residual.unsqueeze(-1)).squeeze(-1)
    slope = -torch.ones_like(state.last_norm)
    bad = active & ((info != 0) | ~torch.isfinite(d).all(dim=-1))
    if bool(bad.any()):
        matrix, b = jacobian[bad], residual[bad]
        step = truncated_direction(matrix, b)
        step = torch.where(torch.isfinite(step).all(dim=-1, keepdim=True), step, _unit_step(matrix, b, state.x[bad]))
        change = slope_along(step, matrix, b)
        change = torch.where(torch.isfinite(change), change, -torch.ones_like(change))
        d, slope = d.index_put((bad,), step), slope.index_put((bad,), change)
    return Direction(d, slope, ~bad, lu, pivots if lu.numel() <= _KEPT_NUMBERS else None)


def truncated_direction(matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return −J⁺b, with the pseudo-inverse that leaves out the singular values which may be rounding."""
    least = 1e3 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return -torch.einsum("bij,bj->bi", pinv(matrix, rtol=least), b)


def slope_along(step: torch.Tensor, matrix: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the slope (batch,) of ½(‖R‖ / ‖b‖)² along ``step``, from R = b; NaN where the squares overflow."""
    return (b * torch.einsum("bij,bj->bi", matrix, step)).sum(dim=-1) / (b * b).sum(dim=-1)


def _unit_step(matrix: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a step as long as x along Newton's direction −J⁻¹b, for a J so small that the direction overflows; −b if there is none."""
    size = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    largest = b.abs().amax(dim=-1, keepdim=True)
    step = truncated_direction((matrix / size).nan_to_num(0.0, 0.0, 0.0), b / largest)
    step = step * (x.norm(dim=-1, keepdim=True).clamp_min(1.0) / step.norm(dim=-1, keepdim=True))
    return torch.where(torch.isfinite(step).all(dim=-1, keepdim=True), step, -b)
