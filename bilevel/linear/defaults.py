"""The default linear solver, chosen by size and symmetry."""

from __future__ import annotations

import torch

from bilevel.linear._base import LinearSolver
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.operators import LinearOperator

__all__ = ["default_linear_solver", "dense_fits"]

# Up to this order, and this memory for a batch, a factorisation is faster than products. Found by timing.
_DENSE_ORDER = 512
_DENSE_NUMBERS = 2**25
# LU cannot reuse a factorisation of the forward solve, and Krylov methods are fast on Jacobians of contractions.
_DENSE_JACOBIAN_NUMBERS = 2**20


def dense_fits(batch: int, size: int, dtype: torch.dtype) -> bool:
    """Return whether a batch of matrices (size, size) is small enough to factorise."""
    # There are no factorisations in half precision.
    fits = size <= _DENSE_ORDER and batch * size * size <= _DENSE_NUMBERS
    return fits and torch.finfo(dtype).bits >= 32


def default_linear_solver(operator: LinearOperator) -> LinearSolver:
    """Return the default linear solver: a factorisation for small matrices, else CG, or GMRES without symmetry."""
    distinct = operator.distinct
    fits = dense_fits(distinct.batch, distinct.size, operator.dtype)
    if operator.symmetric:
        return Exact() if fits else CG()
    if torch.finfo(operator.dtype).bits < 32:
        return BiCGStab()
    return Exact() if fits and distinct.batch * distinct.size**2 <= _DENSE_JACOBIAN_NUMBERS else GMRES()
