"""The status of a linear solve, decided by the true residual, in the same way for all methods."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bilevel.linear._range import outside_range
from bilevel.linear._solution import LinearSolution
from bilevel.operators import FunctionOperator, LinearOperator
from bilevel.reports import Status
from bilevel.tolerance import Target, auto_relative

__all__ = ["eigenvalue_uncertainty", "judge", "refuted", "rounding", "within_rounding"]


def eigenvalue_uncertainty(size: int, dtype: torch.dtype) -> float:
    """Return the possible error of an eigenvalue of a Hessian of order ``size``, relative to its largest eigenvalue.

    The Hessian is rounded, and it is computed at a point whose error is about the default accuracy. If the solution is
    unique only up to a symmetry, an eigenvalue that is zero at the solution can have either sign at a nearby point.
    """
    return min(max(size * torch.finfo(dtype).eps, 4 * auto_relative(dtype)), 1e-3)


def within_rounding(
    operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor, residual_norm: torch.Tensor, asked: torch.Tensor
) -> torch.Tensor:
    """Return where ``residual_norm`` (batch,) is no larger than rounding alone can cause, at least for the problems ``asked`` (batch,).

    Moving every entry of x by one unit in its last place moves A x by about eps ‖A (s∘x)‖ for signs s. The signs are
    drawn first. For a symmetric A they are then chosen along A A (s∘x), because random ones may nearly cancel. No
    solver can reach a smaller residual. Larger numbers may cancel inside a product, for example in a Hessian through a
    factorisation. The measured change of A x is the floor there.

    Products are made only while one of the problems is above what is known of its floor: none, or up to five.
    """
    for floor in _floors(operator, x, rhs):
        within = residual_norm <= floor
        if bool((within | ~asked).all()):
            break
    return within


def _floors(operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield bounds (batch,) that rise with every product or two. The last one is the floor of :func:`within_rounding`."""
    eps, size = torch.finfo(x.dtype).eps, rhs.norm(dim=-1)
    # A huge x along a null vector must not raise its own floor.
    most = eps**0.5 * size
    yield torch.minimum(32 * eps * size, most)
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (x.shape[-1],), generator=generator) * 2 - 1).to(x)
    product = operator.matvec(signs * x)
    moved = product.norm(dim=-1)
    yield torch.minimum(32 * eps * (moved + size), most)
    if operator.symmetric:
        moved = torch.maximum(moved, operator.matvec(x.abs() * operator.matvec(product).sign()).norm(dim=-1))
        yield torch.minimum(32 * eps * (moved + size), most)
    noise = (operator.matvec(x + eps * signs * x) - operator.matvec(x)).norm(dim=-1)
    yield torch.minimum(torch.maximum(32 * eps * (moved + size), 8 * noise), most)


def rounding(operator: LinearOperator, x: torch.Tensor, rhs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, per problem, the rounding error of b − A x, and an estimate of ‖A‖. It costs one product.

    It differs from the floor of :func:`within_rounding` for a huge x along a null vector: the bound then grows with x.
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
    # The margin allows for rounding in the product, and for a μ that was computed in another way.
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
    """Return the statuses of systems with a singular matrix, by whether b lies in its range to the tolerance, or to the dtype's default."""
    status = torch.full(reached.shape, int(Status.SINGULAR), dtype=torch.int64, device=rhs.device)
    if target.asked and not bool(
        reached.all()
    ):  # b may lie in the range although the dtype cannot reach the accuracy asked
        rounded = within_rounding(operator, x, rhs, residual_norm, ~reached)
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
    # If x is huge, rounding hides the residual.
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
        | (noticed == Status.BREAKDOWN)  # a breakdown at the solution is a success
        | (noticed == Status.DIVERGED)
        | (noticed == Status.MINIMUM_NORM)
    )
    reached = residual_norm <= threshold
    if solution.error_bound is not None:
        reached = reached | (solution.error_bound <= error)
    if solution.floor is not None and not target.asked:
        reached = reached | (residual_norm <= solution.floor)
    # With no accuracy asked, a product to find the rounding error is not worth its cost.
    spent_as_meant = (noticed == Status.MAX_STEPS) & target.silent
    settled = reached | ~ended | spent_as_meant
    if not target.asked and not bool(settled.all()):
        reached = reached | within_rounding(operator, solution.x, rhs, residual_norm, ~settled)
    status = noticed
    short = ended & ~reached
    if bool(short.any()):
        # A solver that reports convergence above the threshold has reached the limit of its arithmetic.
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
    # A singular matrix leads to infinities. SINGULAR is then the more informative status.
    bad = ~torch.isfinite(residual_norm) & ended
    return torch.where(bad, torch.full_like(status, Status.NOT_FINITE), status)
