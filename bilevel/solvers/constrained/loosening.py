"""Feasible sets without an interior: where an inequality repeats an equation, or two inequalities leave only their border.

An interior-point method needs points with c(x) < 0, and multipliers grow without end where there are none. With c(x) ≤ ε there are. The solution of
that problem is close to the one wanted, and shows which constraints are active there; Newton's polish of the problem itself does the rest.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel.reports import Status
from bilevel.solvers.constrained.active_set import Polished, measure, polished_without_multipliers
from bilevel.solvers.constrained.program import Answer, Program
from bilevel.solvers.interior_point import InteriorPoint

__all__ = ["polished_by_loosening"]

# By how much inequalities are loosened, in shares of the size of x; and up to which share a constraint counts as active then.
_LOOSENED = 1e-6
_WAYS = ((1e-5, False), (1e-5, True), (1e-3, False), (1e-3, True))


def polished_by_loosening(program: Program, init: torch.Tensor, these: torch.Tensor) -> tuple[Polished, torch.Tensor]:
    """Return polished solutions, searched from ``init`` (K, n), and the steps of the search (K,). ``good`` is False but for ``these`` (K,)."""
    none = init.new_zeros(len(init), program.equalities), init.new_zeros(len(init), program.inequalities)
    at = measure(program, program.inside(init), *none)
    slack = _LOOSENED * at.size.unsqueeze(-1) * at.norms
    answer = InteriorPoint().solve_program(_loosened(program, slack), init, None)
    finite = torch.isfinite(answer.x).all(-1)
    x = torch.where((finite & these).unsqueeze(-1), answer.x, init)
    unknown = torch.full_like(answer.status, int(Status.NOT_CONVERGED))
    start = Answer(x, *none, unknown, answer.iterations)
    point = polished_without_multipliers(program, start, _WAYS, these)
    return replace(point, good=point.good & these), answer.iterations


def _loosened(program: Program, slack: torch.Tensor) -> Program:
    """Return the program with c(x) ≤ ``slack`` (K, m)."""
    beyond = torch.cat([slack.new_zeros(len(slack), 1 + program.equalities), slack], dim=-1)

    def jacobian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts, rows = program.jacobian(x)
        return parts - beyond, rows

    return replace(program, parts=lambda x: program.parts(x) - beyond, jacobian=jacobian, single=None)
