"""The outcome of a judged inner solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bilevel.reports import Basis, Proof, Status, StatusMessages
from bilevel.solvers._base import InnerSolver
from bilevel.solvers.constrained.one_sided import Sides
from bilevel.tolerance import Target

__all__ = ["InnerOutcome", "nothing_to_solve", "with_spent_budget"]


@dataclass(frozen=True, eq=False)
class InnerOutcome:
    """A judged inner solve: tensors per problem, and the names of the solvers that took part.

    ``factor`` holds Cholesky factors of Hessians near x, ``exact`` says that they are those at x. ``degenerate`` (batch,) bool says where the
    derivative at x does not exist or is one-sided, ``sides`` for which losses it exists all the same. ``words`` holds what there is to say of the
    statuses of this solve. ``linear_solver`` is one for derivatives, made of what the solve has factorised. ``prove`` proves more of the solution,
    for who asks.
    """

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual_norm: torch.Tensor
    threshold: torch.Tensor
    error_bound: torch.Tensor
    basis: Basis
    residual: torch.Tensor
    factor: torch.Tensor | None = None
    exact: bool = False
    solver: str = ""
    degenerate: torch.Tensor | None = None
    words: StatusMessages = field(default_factory=dict)
    sides: Sides | None = None
    linear_solver: Any = None
    prove: Callable[[], Proof] | None = None


def nothing_to_solve(init: torch.Tensor, basis: Basis, solver: str) -> InnerOutcome:
    """Return the outcome where there is no problem, or no unknown: all have converged at ``init`` (batch, n)."""
    zeros = init.new_zeros(len(init))
    codes = torch.zeros(len(init), dtype=torch.int64, device=init.device)
    return InnerOutcome(init, codes, codes, zeros, zeros, zeros, basis, torch.zeros_like(init), solver=solver)


def with_spent_budget(solver: InnerSolver | None, target: Target, status: torch.Tensor) -> torch.Tensor:
    """Return the statuses with a spent budget a success where no accuracy was asked for."""
    meant = target.silent or (solver is not None and solver.has_budget and not target.asked)
    spent = (status == Status.MAX_STEPS) if meant else torch.zeros_like(status, dtype=torch.bool)
    return torch.where(spent, int(Status.BUDGET_SPENT), status)
