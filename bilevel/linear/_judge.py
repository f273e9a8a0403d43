"""How a linear solve ended, decided by the true residual, alike for all methods."""

from __future__ import annotations

import torch

from bilevel.linear._range import outside_range
from bilevel.linear._solution import LinearSolution
from bilevel.operators import FunctionOperator, LinearOperator
from bilevel.reports import Status
from bilevel.tolerance import Target, auto_relative

__all__ = ["eigenvalue_uncertainty", "judge", "refuted", "rounding", "rounding_floor"]


def eigenvalue_uncertainty(size: int, dtype: torch.dtype) -> float:
    """Return the part of its largest eigenvalue by which an eigenvalue of a Hessian of order ``size`` may be wrong.

    It is rounded, and taken at a solution that is known to about the accuracy asked by default: where the solution is unique up to a
    symmetry only, an eigenvalue that is zero at the solution is of either sign beside it.
    """
    return min(max(size * torch.finfo(dtype).eps, 4 * auto_relative(dtype)), 1e-3)


def rounding_floor(operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Return, per problem, the residual norm that rounding alone accounts for: five products.

    Moving every entry of x by one unit in its last place moves A x by about eps ‖A (s∘x)‖ for signs s. They are first drawn, and of a
    symmetric A then chosen along A A (s∘x), as drawn ones may all but cancel. No solver can answer for less. Inside a product, as of a
    Hessian through a factorisation, larger numbers may cancel: what such a move does change in A x is the floor there.
    """
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (x.shape[-1],), generator=generator) * 2 - 1).to(x)
    eps, size = torch.finfo(x.dtype).eps, rhs.norm(dim=-1)
    product = operator.matvec(signs * x)
    moved = product.norm(dim=-1)
    if operator.symmetric:
        moved = torch.maximum(moved, operator.matvec(x.abs() * operator.matvec(product).sign()).norm(dim=-1))
    noise = (operator.matvec(x + eps * signs * x) - operator.matvec(x)).norm(dim=-1)
    # An x that has run away along a null vector must not excuse its own residual.
    return torch.minimum(torch.maximum(32 * eps * (moved + size), 8 * noise), eps**0.5 * size)


def rounding(operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, per problem, what rounding can hide in b − A x, and an estimate of ‖A‖; one product.

    As :func:`rounding_floor`, without the clause for an x that has run away: its bound is to be as large as it is.
    """
    generator = torch.Generator().manual_seed(1)
    signs = (torch.randint(0, 2, (x.shape[-1],), generator=generator) * 2 - 1).to(x)
    eps = torch.finfo(x.dtype).eps
    product, size = operator.matvec(signs * x).norm(dim=-1), x.norm(dim=-1)
    tiny = torch.finfo(x.dtype).tiny
    return 8 * eps * (product + rhs.norm(dim=-1)), product / size.clamp_min(tiny)


def refuted(
    operator: LinearOperator, x: torch.Tensor, product: torch.Tensor, mu: float, size_of_a: torch.Tensor
) -> torch.Tensor:
    """Return where A x = ``product`` proves that μ is too large: xᵀAx < μ‖x‖², or ‖A x‖ < μ‖x‖ where A is not symmetric."""
    square = torch.linalg.vecdot(x, x)
    measured = torch.linalg.vecdot(x, product) if operator.symmetric else product.norm(dim=-1) * square.sqrt()
    eps = torch.finfo(x.dtype).eps
    # The margin: μ may have been computed in another way, and the product is rounded.
    least = mu * (1 - 1e-4) - 64 * eps * (size_of_a + product.norm(dim=-1) / square.sqrt())
    return (square > torch.finfo(x.dtype).tiny) & (measured < least * square)


def _consistent(
    operator: LinearOperator,
    rhs: torch.Tensor,
    target: Target,
    x: torch.Tensor,
    residual_norm: torch.Tensor,
    reached: torch.Tensor,
) -> torch.Tensor:
    """Return what became of systems with a singular matrix: whether b lies in its range, to the tolerance, or to the dtype's where none is."""
    status = torch.full(reached.shape, int(Status.SINGULAR), dtype=torch.int64, device=rhs.device)
    if target.asked and not bool(
        reached.all()
    ):  # the accuracy asked may be beyond the dtype, and b in the range for all that
        rounded = residual_norm <= rounding_floor(operator, x, rhs)
        status = torch.where(rounded, int(Status.STAGNATED), status)
    if target.silent:
        reached = reached | (residual_norm <= auto_relative(rhs.dtype) * rhs.norm(dim=-1))
    return torch.where(reached, int(Status.MINIMUM_NORM), status)


def _singular(
    operator: LinearOperator,
    rhs: torch.Tensor,
    x: torch.Tensor,
    threshold: torch.Tensor,
    status: torch.Tensor,
    failed: torch.Tensor,
) -> torch.Tensor:
    """Return ``status`` with ``Status.SINGULAR`` for those of the ``failed`` problems (batch,) whose b is proven to lie outside the range of A."""
    if isinstance(operator, FunctionOperator) and not operator.transposes:
        return status
    # Of an x that has run away, the residual is lost in rounding.
    residual = rhs - operator.matvec(x)
    lost = ~(residual.norm(dim=-1) <= rhs.norm(dim=-1))
    residual = torch.where(lost.unsqueeze(-1), rhs, residual)
    least = torch.maximum(threshold, 64 * torch.finfo(rhs.dtype).eps * rhs.norm(dim=-1))
    proven = outside_range(operator, residual, least, failed, eigenvalue_uncertainty(operator.size, rhs.dtype))
    return torch.where(proven, int(Status.SINGULAR), status)


def judge(
    has_budget: bool,
    operator: LinearOperator,
    rhs: torch.Tensor,
    target: Target,
    threshold: torch.Tensor,
    error: torch.Tensor,
    solution: LinearSolution,
    residual_norm: torch.Tensor,
) -> torch.Tensor:
    noticed = solution.status
    if bool(((noticed == Status.CONVERGED) & (residual_norm <= threshold)).all()):
        return noticed
    ended = (
        (noticed == Status.CONVERGED)
        | (noticed == Status.MAX_STEPS)
        | (noticed == Status.STAGNATED)
        | (noticed == Status.NOT_CONVERGED)
        | (noticed == Status.BREAKDOWN)  # a breakdown at the solution is a solution
        | (noticed == Status.DIVERGED)
        | (noticed == Status.MINIMUM_NORM)
    )
    reached = residual_norm <= threshold
    if solution.error_bound is not None:
        reached = reached | (solution.error_bound <= error)
    if solution.floor is not None and not target.asked:
        reached = reached | (residual_norm <= solution.floor)
    # Whether a budget that alone was meant ended within rounding is not worth a product.
    spent_as_meant = (noticed == Status.MAX_STEPS) & target.silent
    if not bool((reached | ~ended | spent_as_meant).all()) and not target.asked:
        reached = reached | (residual_norm <= rounding_floor(operator, solution.x, rhs))
    status = noticed
    short = ended & ~reached
    if bool(short.any()):
        # A solver that believes it has converged, and has not, has met the limit of its arithmetic.
        believed = noticed == Status.CONVERGED
        status = torch.where(short & believed, torch.full_like(status, Status.STAGNATED), status)
        if not target.asked and (has_budget or target.silent):
            spent = short & ((noticed == Status.MAX_STEPS) | (target.silent & (noticed != Status.DIVERGED)))
            status = torch.where(spent, torch.full_like(status, Status.BUDGET_SPENT), status)
    status = torch.where(ended & reached, torch.full_like(status, Status.CONVERGED), status)
    free = noticed == Status.MINIMUM_NORM
    if bool(free.any()):
        status = torch.where(free, _consistent(operator, rhs, target, solution.x, residual_norm, reached), status)
    failed = (
        (status == Status.STAGNATED)
        | (status == Status.BREAKDOWN)
        | (status == Status.NOT_CONVERGED)
        | ((status == Status.MAX_STEPS) & (not has_budget))
    )
    if bool((failed & short).any()):
        status = _singular(operator, rhs, solution.x, threshold, status, failed & short)
    # A singular matrix makes infinities; that it is singular says more.
    bad = ~torch.isfinite(residual_norm) & ended
    return torch.where(bad, torch.full_like(status, Status.NOT_FINITE), status)
