"""What a linear solver returns, and what becomes of it once it is judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.reports import Basis

__all__ = ["LinearOutcome", "LinearSolution"]


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """The result of a linear solver.

    Parameters
    ----------
    x
        (batch, n).
    iterations
        int64 (batch,): products with the matrix that the problem needed.
    status
        int64 (batch,): a failure that the solver *noticed* (indefinite, singular, breakdown, diverged, not finite),
        or ``Status.CONVERGED`` / ``Status.MAX_STEPS`` / ``Status.STAGNATED`` as far as it can tell. ``Status.MINIMUM_NORM``: A is singular,
        and x is what the minimum-norm solution is if there is a solution; the residual decides, and it is ``Status.SINGULAR`` if there is none.
    residual
        The true residual b − A x (batch, n), if the solver has recomputed it.
    error_bound
        A bound of ‖x − A⁻¹b‖ (batch,), if the solver was told μ and can prove one below ‖b − A x‖/μ; but for rounding.
    refuted
        Bool (batch,): where the solver has met a proof that A has an eigenvalue below the μ that it was told.
    floor
        The residual norm (batch,) that rounding accounts for, where the solver knows the entries of A and that it is not singular.
    """

    x: torch.Tensor
    iterations: torch.Tensor
    status: torch.Tensor
    residual: torch.Tensor | None = None
    error_bound: torch.Tensor | None = None
    refuted: torch.Tensor | None = None
    floor: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LinearOutcome:
    """A judged linear solve; every tensor per problem."""

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor
    residual_norm: torch.Tensor
    threshold: torch.Tensor
    error_bound: torch.Tensor
    basis: Basis
    scale: torch.Tensor
