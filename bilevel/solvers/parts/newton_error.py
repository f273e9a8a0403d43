"""The error of Newton's last iterate, estimated by the factors of its last step at no further cost."""

from __future__ import annotations

from typing import Any

import torch
from torch.linalg import vector_norm

from bilevel.equations.problem import Problem
from bilevel.solvers.judging.degenerate import SLOW
from bilevel.solvers.judging.error import irregular_signs
from bilevel.solvers.parts.newton_state import NewtonState

__all__ = ["error_left", "is_slow", "root_error_left"]

# How far the objective may be off the quadratic model, and how small a step is, for the Hessian before it to hold after it.
_MODEL_ERROR, _SMALL_STEP = 0.1, 0.01
# The old Jacobian is still valid if a full Newton step makes the next one shorter by this factor.
_SHRINKS = 0.05


def error_left(state: NewtonState, *, lone: bool) -> torch.Tensor:
    """Return H⁻¹ R (batch, n) by the factors of the last step's Hessian; NaN where they may not be valid at x."""
    assert state.factor is not None
    # With rows of unit length, the smallest pivot of the factor bounds the distance to a singular matrix.
    pivots = (state.factor.diagonal(dim1=-2, dim2=-1) / vector_norm(state.factor, dim=-1)).amin(dim=-1)
    least = 1e3 * torch.finfo(pivots.dtype).eps * state.x.shape[-1]
    error = torch.cholesky_solve(state.residual.unsqueeze(-1), state.factor).squeeze(-1)
    modelled = _modelled(state, lone=lone)
    if lone and float(pivots) ** 2 > least and bool(modelled):
        return error
    known = modelled & state.definite & (pivots**2 > least)
    return torch.where(known.unsqueeze(-1), error, torch.full_like(error, torch.nan))


def root_error_left(problem: Problem, state: NewtonState) -> torch.Tensor | None:
    """Return J⁻¹ R (batch, n) by the last step's factors, or None if they may not be valid at x for some problem.

    Newton's steps d shrink quadratically where the Jacobian hardly changes: J⁻¹ R after a full step is ½ J⁻¹J′[d, d], so that J⁻¹ changed by about
    2 |J⁻¹R| / |d| (the simplified Newton correction of Deuflhard, "Newton methods for nonlinear problems", 2004). The effect of
    rounding of x on R has to be small too: x − T(x) is rounded like x, even where J is small.
    """
    if state.factor is None or state.pivots is None or state.jacobian is None or state.last_x is None:
        return None
    eps, x = torch.finfo(state.x.dtype).eps, state.x
    noise = eps * (state.jacobian.abs() @ x.abs().unsqueeze(-1))
    if problem.is_fixed_point:
        noise = noise + eps * x.abs().unsqueeze(-1)
    right = torch.cat([state.residual.unsqueeze(-1), irregular_signs(x).unsqueeze(-1) * noise], dim=-1)
    error, rounding = torch.linalg.lu_solve(state.factor, state.pivots, right).unbind(dim=-1)
    size = x.abs()
    known = (error.abs() <= _SHRINKS * (x - state.last_x).abs() + 4 * eps * size) & (rounding.abs() <= eps**0.5 * size)
    return error if bool(known.all() & state.definite.all()) else None


def _modelled(state: NewtonState, *, lone: bool) -> torch.Tensor | bool:
    """Return where the last step shows that the old Hessian is still valid, (batch,) bool or a bool.

    The objective changed by about t gᵀd + ½ t² dᵀHd, with dᵀHd = −gᵀd, or the step was small.
    """
    last, slope, t = state.last_merit, state.slope, state.t
    assert state.last_x is not None and last is not None and slope is not None and t is not None
    numbers: list[Any] = [state.merit, last, slope, t, state.magnitude]
    if lone:
        numbers = [float(number) for number in numbers]
    kept = _fell_as_promised(torch.finfo(t.dtype).eps, *numbers)
    if kept is True or (kept is not False and bool(kept.all())):
        return kept
    return kept | ((state.x - state.last_x).abs() <= _SMALL_STEP * state.x.abs()).all(dim=-1)


def _fell_as_promised(eps: float, found: Any, last: Any, slope: Any, t: Any, magnitude: Any) -> Any:
    """Return whether the objective fell from ``last`` to ``found`` as the model predicts, for numbers or tensors (batch,)."""
    promised = slope * (t - 0.5 * t * t)
    size, noise = abs(promised), 1e3 * eps
    seen = (size > noise * magnitude) & (size > noise * abs(found))
    return seen & (abs(found - last - promised) <= _MODEL_ERROR * size)


def is_slow(state: NewtonState, error: torch.Tensor) -> torch.Tensor:
    """Return where the next step is neither small beside the last one nor rounding, (batch,) bool."""
    assert state.last_x is not None
    left = vector_norm(error, dim=-1)
    more = left > 8 * torch.finfo(left.dtype).eps * vector_norm(state.x, dim=-1)
    return more & (left > SLOW * vector_norm(state.x - state.last_x, dim=-1)) if bool(more.any()) else more
