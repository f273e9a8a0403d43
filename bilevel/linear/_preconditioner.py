"""Preconditioners and initial residuals of iterative methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from bilevel.errors import ArgumentError
from bilevel.linear._base import LinearSolver
from bilevel.operators import LinearOperator

__all__ = ["MakesPreconditioner", "Preconditioner", "begin", "check_preconditioner"]


Preconditioner: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""r ↦ M⁻¹r on tensors (batch, n)."""


@runtime_checkable
class MakesPreconditioner(Protocol):
    """A factory that makes a preconditioner from an operator, such as :class:`bilevel.Nystrom`."""

    def preconditioner(self, operator: LinearOperator) -> Preconditioner:
        """Return r ↦ M⁻¹r for the matrices of ``operator``."""


def check_preconditioner(where: str, preconditioner: Preconditioner | MakesPreconditioner | None) -> None:
    """Raise :class:`ArgumentError` unless ``preconditioner`` is a function, a factory, or None."""
    if isinstance(preconditioner, MakesPreconditioner) and not isinstance(preconditioner, type):
        return
    if preconditioner is not None and not (callable(preconditioner) and not isinstance(preconditioner, LinearSolver)):
        raise ArgumentError(
            f"{where}: expected preconditioner to be a function of r (batch, n), got {preconditioner!r}; "
            "write for example lambda r: r / diagonal, or take bilevel.Nystrom(...)"
        )


def begin(operator: LinearOperator, rhs: torch.Tensor, start: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the initial x and b − A x: ``start`` if its residual is smaller than that of zero, else zero. Without ``start`` there is no product."""
    if start is None:
        return torch.zeros_like(rhs), rhs
    residual = rhs - operator.matvec(start)
    better = (residual.norm(dim=-1) < rhs.norm(dim=-1)).unsqueeze(-1)
    return torch.where(better, start, torch.zeros_like(start)), torch.where(better, residual, rhs)
