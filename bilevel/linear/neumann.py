"""The Neumann series: the inverse as a sum of powers, with a few products and no inner products."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear._judge import eigenvalue_uncertainty
from bilevel.linear._preconditioner import begin
from bilevel.linear._solution import LinearSolution
from bilevel.operators import LinearOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_steps

__all__ = ["Neumann"]

_POWER_STEPS = 12
_GROWTH = 4.0
_MARGIN = 0.9


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Sum x = α Σ_{j=0..K} (I − αA)ʲ b. The last term (I − αA)^{K+1} b is the residual.

    It converges if the spectral radius of I − αA is below one. If the terms grow, the status is DIVERGED, and the best
    partial sum is kept. If A maps a term to zero, A is singular and b is outside its range. For a symmetric positive
    semidefinite A with b in its range, the sum tends to the minimum-norm solution.

    Parameters
    ----------
    terms
        K ≥ 0, the largest power; each costs one product. It is a budget: spending it without a tolerance is a success.
    step
        α > 0; None: chosen for each problem. For a symmetric matrix it is 1/λ, where λ is an upper estimate of the largest
        eigenvalue by twelve power iterations. For any other matrix it is 1, which suits I − ∂T of a contraction. If that
        does not converge it is 1/‖A‖, which needs products with the transpose. The estimates cost twelve products, or
        thirty-six.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Lorraine, Vicol, Duvenaud, "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020.

    Examples
    --------
    >>> import torch
    >>> from bilevel.operators import DenseOperator
    >>> A = DenseOperator(torch.tensor([[2.0, 0.5], [0.5, 1.0]]), symmetric=True)
    >>> Neumann(terms=100)(A, torch.tensor([[2.5, 1.5]]))
    tensor([[1.0000, 1.0000]])
    """

    terms: int
    step: float | None = None

    def __post_init__(self) -> None:
        check_steps("Neumann", "terms", self.terms, least=0)
        if self.step is not None:
            check_number("Neumann", "step", self.step)

    @property
    def has_budget(self) -> bool:
        return True

    def solve(
        self, operator: LinearOperator, rhs: torch.Tensor, threshold: torch.Tensor, start: torch.Tensor | None = None
    ) -> LinearSolution:
        x, r = begin(operator, rhs, start)
        alpha = self._step(operator, rhs).unsqueeze(-1)
        norm = r.norm(dim=-1)
        least, best = norm, x
        status = torch.full(norm.shape, int(Status.RUNNING), dtype=torch.int64, device=rhs.device)
        status = torch.where(norm <= threshold, int(Status.CONVERGED), status)
        iterations = torch.zeros_like(status)
        still = torch.zeros_like(norm, dtype=torch.bool)
        for term in range(self.terms + 1):
            active = status == Status.RUNNING
            if not bool(active.any()):
                break
            moving = active.unsqueeze(-1)
            x = torch.where(moving, x + alpha * r, x)
            change = alpha * operator.matvec(r)
            if term == self.terms:
                still = change.norm(dim=-1) <= eigenvalue_uncertainty(operator.size, r.dtype) * norm
            r = torch.where(moving, r - change, r)
            norm = r.norm(dim=-1)
            iterations = iterations + active
            improved = active & (norm < least)
            best = torch.where(improved.unsqueeze(-1), x, best)
            least = torch.where(improved, norm, least)
            # The term and the residual differ by rounding: a term just below the threshold may belong to a residual
            # above it.
            status = torch.where(active & (norm <= _MARGIN * threshold), int(Status.CONVERGED), status)
            # For a matrix far from normal, terms may grow before they shrink.
            diverged = (status == Status.RUNNING) & ~(norm <= _GROWTH * least * (1 + iterations.sqrt()))
            status = torch.where(diverged, int(Status.DIVERGED), status)
        # With a budget the result is the whole sum. For a divergent series it is the best partial sum.
        x = torch.where((status == Status.DIVERGED).unsqueeze(-1), best, x)
        ended = torch.where(still, int(Status.MINIMUM_NORM), int(Status.MAX_STEPS))
        status = torch.where(status == Status.RUNNING, ended, status)
        return LinearSolution(x, iterations, status)

    def _step(self, operator: LinearOperator, rhs: torch.Tensor) -> torch.Tensor:
        if self.step is not None:
            return rhs.new_full((rhs.shape[0],), self.step)
        if operator.symmetric:
            return _inverse(_largest(operator, rhs, lambda v: operator.matvec(v)))
        # A NaN is no reason to estimate another step.
        plain = ~(_largest(operator, rhs, lambda v: v - operator.matvec(v), margin=1.0) >= 1)
        if bool(plain.all()):
            return rhs.new_ones(rhs.shape[0])
        norm = _largest(operator, rhs, lambda v: operator.rmatvec(operator.matvec(v))).sqrt()
        return torch.where(plain, torch.ones_like(norm), _inverse(norm))


def _largest(operator: LinearOperator, like: torch.Tensor, apply: object, margin: float | None = None) -> torch.Tensor:
    """Estimate, per problem, the largest absolute eigenvalue of ``apply`` by power iteration, plus its residual.

    ‖Av − λv‖ bounds the distance from λ to the spectrum of a symmetric matrix. Adding it compensates for the small
    number of iterations. ``margin`` multiplies the estimate instead.
    """
    assert callable(apply)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape[-1], generator=generator, dtype=torch.float64).to(like).expand_as(like)
    v = v / v.norm(dim=-1, keepdim=True)
    value, gap = like.new_ones(like.shape[0]), like.new_zeros(like.shape[0])
    tiny = torch.finfo(like.dtype).tiny
    for _ in range(_POWER_STEPS):
        w = apply(v)
        value = w.norm(dim=-1)
        quotient = (v * w).sum(dim=-1)
        gap = (w - quotient.unsqueeze(-1) * v).norm(dim=-1)
        v = w / value.clamp_min(tiny).unsqueeze(-1)
    return value * margin if margin is not None else value + gap


def _inverse(value: torch.Tensor) -> torch.Tensor:
    """Return 1/value, and 1 for a matrix of zeros."""
    return torch.where(value > 0, 1 / value, torch.ones_like(value))
