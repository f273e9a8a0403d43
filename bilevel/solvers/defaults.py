"""The default inner solvers, chosen by size and structure."""

from __future__ import annotations

import torch

from bilevel.equations.equilibrium import EquilibriumSystem
from bilevel.equations.least_squares import LeastSquaresSystem
from bilevel.equations.problem import Problem
from bilevel.linear.bicgstab import BiCGStab
from bilevel.linear.defaults import dense_fits
from bilevel.solvers._base import InnerSolver
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.judging.successors import Successor
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.levenberg_marquardt import LevenbergMarquardt
from bilevel.solvers.newton import Newton
from bilevel.solvers.parts.path import PathFollowing

__all__ = ["default_solvers"]


class _BriefNewton(Newton):
    """Newton's method before a path takes over. Its few steps are no budget of the caller's."""

    @property
    def has_budget(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return Newton.__name__


# Made once: for small problems, making the settings took one per cent of a call.
_LEAST_SQUARES = LevenbergMarquardt()
_NEWTON, _LBFGS, _ANDERSON, _HALF_NEWTON = Newton(), LBFGS(), Anderson(), Newton(linear_solver=BiCGStab())
_POLISH = (Successor(_NEWTON),)
_AFTER_NEWTON = (Successor(_LBFGS, afresh=True), *_POLISH, *3 * (Successor(_NEWTON, onward=True),))
_AGAIN, _HALF_AGAIN = (
    (Successor(newton), Successor(newton, afresh=True, beside=True)) for newton in (_NEWTON, _HALF_NEWTON)
)
# Newton's method solves most games in fewer than 20 steps. In matrix games it can take all of 250 for nothing.
_BRIEF_NEWTON = _BriefNewton(max_steps=30)
_AFTER_NEWTON_IN_GAMES = (
    Successor(PathFollowing(), afresh=True),
    Successor(_NEWTON),
    Successor(PathFollowing(longest=0.02), afresh=True, beside=True),
    Successor(_NEWTON),
)


def default_solvers(problem: Problem) -> tuple[InnerSolver, tuple[Successor, ...]]:
    """Return the default inner solver, and the solvers that take over the problems at which it fails.

    - Least squares: Levenberg–Marquardt, then as an argmin.
    - A small argmin: Newton's method, then L-BFGS, then Newton's method from the lowest point, off its saddle. A large one: L-BFGS.
    - A fixed point: Anderson acceleration, which has plain iteration beneath it.
    - A game with bounds or terms: Newton's method, then a path from a game that is solved, then as a root.
    - A root: Newton's method, which goes on once more, and then begins again beside the start.

    Newton's method goes on from where L-BFGS or Anderson acceleration ended.
    """
    wide = torch.finfo(problem.system.raveler.dtype).bits >= 32
    polish = _POLISH if wide else ()
    if problem.is_fixed_point:
        return _ANDERSON, polish
    small = dense_fits(problem.batch, problem.size, problem.system.raveler.dtype)
    if small and isinstance(problem.system, EquilibriumSystem) and problem.system.has_kinks:
        return _BRIEF_NEWTON, _AFTER_NEWTON_IN_GAMES
    if problem.minimizes:
        if wide and isinstance(problem.system, LeastSquaresSystem):
            return _LEAST_SQUARES, (*polish, Successor(_NEWTON if small else _LBFGS, afresh=True), *polish)
        return (_NEWTON, _AFTER_NEWTON) if small else (_LBFGS, polish)
    return (_NEWTON, _AGAIN) if wide else (_HALF_NEWTON, _HALF_AGAIN)
