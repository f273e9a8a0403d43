"""The solvers that are taken where none is given, by size and structure."""

from __future__ import annotations

import torch

from bilevel.equations.least_squares import LeastSquaresSystem
from bilevel.equations.problem import Problem
from bilevel.linear._base import LinearSolver
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact
from bilevel.linear.gmres import GMRES
from bilevel.operators import LinearOperator
from bilevel.solvers._base import InnerSolver
from bilevel.solvers._judge import Successor
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.levenberg_marquardt import LevenbergMarquardt
from bilevel.solvers.newton import Newton

__all__ = ["default_linear_solver", "default_solvers"]

# Up to this order, and this much memory for a batch, a factorisation beats products; found by timing.
_DENSE_ORDER = 512
_DENSE_NUMBERS = 2**25
# LU has no forward factorisation to begin with, and Krylov methods are quick on the Jacobians of contractions.
_DENSE_JACOBIAN_NUMBERS = 2**20


def _dense_fits(batch: int, size: int, dtype: torch.dtype) -> bool:
    # There are no factorisations in half precision.
    fits = size <= _DENSE_ORDER and batch * size * size <= _DENSE_NUMBERS
    return fits and torch.finfo(dtype).bits >= 32


def default_solvers(problem: Problem) -> tuple[InnerSolver, tuple[Successor, ...]]:
    """Return the inner solver used where none is given, and those that take over the problems at which it fails.

    Least squares: Levenberg–Marquardt, then as an argmin.
    A small argmin: Newton's method, then L-BFGS. A large one: L-BFGS. A fixed point: Anderson acceleration, which has plain iteration
    beneath it. Newton's method goes on from where the last of these ended. A root: Newton's method, which goes on once more, and then
    begins again beside the start.
    """
    wide = torch.finfo(problem.system.raveler.dtype).bits >= 32
    polish = (Successor(Newton(), afresh=False),) if wide else ()
    if problem.is_fixed_point:
        return Anderson(), polish
    if problem.minimizes:
        small = _dense_fits(problem.batch, problem.size, problem.system.raveler.dtype)
        if wide and isinstance(problem.system, LeastSquaresSystem):
            return LevenbergMarquardt(), (*polish, Successor(Newton() if small else LBFGS(), afresh=True), *polish)
        if small:
            return Newton(), (Successor(LBFGS(), afresh=True), *polish)
        return LBFGS(), polish
    newton = Newton() if wide else Newton(linear_solver=BiCGStab())
    return newton, (Successor(newton, afresh=False), Successor(newton, afresh=True, beside=True))


def default_linear_solver(operator: LinearOperator) -> LinearSolver:
    """Return the linear solver used where none is given: a factorisation if small, else CG, or GMRES if not symmetric."""
    distinct = operator.distinct
    fits = _dense_fits(distinct.batch, distinct.size, operator.dtype)
    if operator.symmetric:
        return Exact() if fits else CG()
    if torch.finfo(operator.dtype).bits < 32:
        return BiCGStab()
    return Exact() if fits and distinct.batch * distinct.size**2 <= _DENSE_JACOBIAN_NUMBERS else GMRES()
