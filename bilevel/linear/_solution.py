"""The result of a linear solver, before and after it is judged."""

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
        int64 (batch,): the number of products that the problem needed.
    status
        int64 (batch,): a failure that the solver *noticed* (indefinite, singular, breakdown, diverged, not finite),
        or ``Status.CONVERGED`` / ``Status.MAX_STEPS`` / ``Status.STAGNATED`` as far as it knows.
        ``Status.MINIMUM_NORM``: A is singular, and x is the minimum-norm solution if there is a solution. If the
        residual shows that there is none, the status becomes ``Status.SINGULAR``.
    residual
        The true residual b − A x (batch, n), if the solver has recomputed it.
    error_bound
        A bound of ‖x − A⁻¹b‖ (batch,) up to rounding, if the solver was given μ and can prove one below ‖b − A x‖/μ.
    refuted
        Bool (batch,): where the solver has proven that A has an eigenvalue below the given μ.
    floor
        The residual norm (batch,) that rounding can cause, if the solver knows the entries of A and that A is regular.

    Examples
    --------
    >>> import torch, bilevel
    >>> from bilevel.operators import DenseOperator
    >>> A, b = DenseOperator(2 * torch.eye(2), symmetric=True), torch.tensor([[1.0, 3.0]])
    >>> solution = bilevel.CG(max_steps=5).solve(A, b, torch.tensor([1e-5]))
    >>> solution.x, solution.iterations
    (tensor([[0.5000, 1.5000]]), tensor([1]))
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
