"""The inner solvers that are used where none is given, chosen by size and structure."""

from __future__ import annotations

import torch

from bilevel.equations.least_squares import LeastSquaresSystem
from bilevel.equations.problem import Problem
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.defaults import dense_fits
from bilevel.solvers._base import InnerSolver
from bilevel.solvers._judge import Successor
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.levenberg_marquardt import LevenbergMarquardt
from bilevel.solvers.newton import Newton

__all__ = ["default_solvers"]


def default_solvers(problem: Problem) -> tuple[InnerSolver, tuple[Successor, ...]]:
    """Return the inner solver used where none is given, and those that take over the problems at which it fails.

    - Least squares: Levenberg–Marquardt, then as an argmin.
    - A small argmin: Newton's method, then L-BFGS. A large one: L-BFGS.
    - A fixed point: Anderson acceleration, which has plain iteration beneath it.
    - A root: Newton's method, which goes on once more, and then begins again beside the start.

    Newton's method goes on from where L-BFGS or Anderson acceleration ended.
    """
    wide = torch.finfo(problem.system.raveler.dtype).bits >= 32
    polish = (Successor(Newton(), afresh=False),) if wide else ()
    if problem.is_fixed_point:
        return Anderson(), polish
    if problem.minimizes:
        small = dense_fits(problem.batch, problem.size, problem.system.raveler.dtype)
        if wide and isinstance(problem.system, LeastSquaresSystem):
            return LevenbergMarquardt(), (*polish, Successor(Newton() if small else LBFGS(), afresh=True), *polish)
        if small:
            return Newton(), (Successor(LBFGS(), afresh=True), *polish)
        return LBFGS(), polish
    newton = Newton() if wide else Newton(linear_solver=BiCGStab())
    return newton, (Successor(newton, afresh=False), Successor(newton, afresh=True, beside=True))
