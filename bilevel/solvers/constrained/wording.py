"""What a failed solve of a constrained problem says: why, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bilevel.reports import Status, StatusMessages
from bilevel.solvers.constrained.program import Program

__all__ = ["Name", "failure_words"]

Name = Callable[[str, int], str]

_NARROW = "pass each tensor that a function reaches through its closure as an argument, so that the solve can run in float64; if there is none, "
# An x this many times larger than the start is far away.
_FAR = 10.0
_UNSETTLED = (
    "start elsewhere, rescale the problem so that its unknowns and constraints have sizes near one, or loosen a constraint if together they leave "
    "no interior"
)


def failure_words(
    program: Program, init: torch.Tensor, x: torch.Tensor, status: torch.Tensor, kinked: torch.Tensor, name: Name
) -> StatusMessages:
    """Return the messages for the first infeasible problem, for unbounded ones and for those that are not solved."""
    # In other dtypes the layer solves in float64, unless a function holds a tensor that fits its own dtype alone.
    narrow = "" if program.lower.dtype == torch.float64 else _NARROW
    words: dict[Status, tuple[str, str]] = {
        Status.STAGNATED: (Status.STAGNATED.meaning, f"{narrow}{_UNSETTLED}"),
        Status.MAX_STEPS: (Status.MAX_STEPS.meaning, f"{narrow}raise max_steps, or start nearer the solution"),
        Status.NOT_CONVERGED: (
            "returned a point at which the optimality conditions do not hold, and near which no solution was found",
            "tighten that solver's own tolerance, start it nearer the solution, or leave solver out",
        ),
    }
    for code in words:
        these = (status == code).nonzero()
        if len(these) and _falls(program, init, x, int(these[0])):
            words[code] = (
                f"{words[code][0]}; the objective fell all the way, and seems to have no minimum on the feasible set",
                "add a bound, or a term that grows with x, such as a small ridge",
            )
    if bool((status == Status.KINK).any()):
        words[Status.KINK] = _kink(program, int(kinked[kinked >= 0][0]), name)
    lost = (status == Status.NOT_FINITE).nonzero()
    if len(lost) and (found := _not_finite(program, init, int(lost[0]), name)):
        words[Status.NOT_FINITE] = (
            f"met a NaN or an infinity: {found}",
            "leave out constraints that are none, give bounds without NaN, and check the inputs",
        )
    if bool((status == Status.INDEFINITE).any()):
        words[Status.INDEFINITE] = (
            "ended at a saddle or a maximum of the objective on the constraints",
            "start elsewhere, or add regularisation",
        )
    if bool((status == Status.UNBOUNDED).any()):
        words[Status.UNBOUNDED] = (
            "found that the objective falls without end on the feasible set",
            "add a bound, or a term that grows with x, such as a small ridge",
        )
    infeasible = (status == Status.INFEASIBLE).nonzero()
    if len(infeasible):
        words[Status.INFEASIBLE] = _infeasible(program, x, int(infeasible[0]), name, narrow)
    return words


def _infeasible(program: Program, x: torch.Tensor, which: int, name: Name, narrow: str) -> tuple[str, str]:
    """Return the words for problem ``which``, which has no feasible point."""
    crossed = program.crossed[which].nonzero().reshape(-1)
    if len(crossed):
        i = int(crossed[0])
        low, high = float(program.lower[which, i]), float(program.upper[which, i])
        found = f"{name('lower', i)} is {low:.6g}, above the upper bound {high:.6g}"
        if low == math.inf or high == -math.inf:
            found = f"{name('lower', i)} is {low:.6g} and its upper bound {high:.6g}, and no number is between them"
        return (
            f"found no feasible point: {found}",
            "give bounds with lower <= upper, and -inf as lower or inf as upper where there is none",
        )
    _, h, c = program.split(program.parts(x))
    violation = torch.cat([h[which].abs(), c[which].clamp_min(0)])
    place, p = int(violation.argmax()), h.shape[-1]
    worst = name("equality", place) if place < p else name("inequality", place - p)
    return (
        f"found no point that satisfies the constraints: where they are violated least, {worst} is still violated by {float(violation[place]):.3g}",
        f"{narrow}loosen the constraints with nonzero solution.multipliers (on_failure='ignore' returns them), or start elsewhere if they are not "
        "convex",
    )


def _not_finite(program: Program, init: torch.Tensor, number: int, name: Name) -> str:
    """Return which bound of problem ``number`` is NaN, or which constraint is not finite at the start; "" if none."""
    for kind, bound in (("lower", program.lower), ("upper", program.upper)):
        places = torch.isnan(bound[number]).nonzero()
        if len(places):
            return f"{name(kind, int(places[0]))} is nan"
    _, h, c = program.split(program.parts(program.inside(init)))
    for kind, values in (("equality", h), ("inequality", c)):
        places = (~torch.isfinite(values[number])).nonzero()
        if len(places):
            return f"{name(kind, int(places[0]))} is {float(values[number, int(places[0])])} at the start"
    return ""


def _falls(program: Program, init: torch.Tensor, x: torch.Tensor, number: int) -> bool:
    """Return whether problem ``number`` ended far from its start, and lower."""
    away = float(x[number].abs().amax()) > _FAR * (1 + float(init[number].abs().amax()))
    fallen = program.parts(x)[number, 0] < program.parts(program.inside(init))[number, 0]
    return away and bool(fallen)


def _kink(program: Program, part: int, name: Name) -> tuple[str, str]:
    p = program.equalities
    where = (
        "the objective" if part == 0 else name("equality", part - 1) if part <= p else name("inequality", part - 1 - p)
    )
    return (
        f"ended at a kink of {where}: its gradient jumps there",
        "state the kink by several smooth constraints, for example x - 1 <= 0 and -1 - x <= 0 in place of abs(x) - 1 <= 0, or smooth it: "
        "(x**2 + 1e-6).sqrt() for abs(x), logsumexp(100 * x) / 100 for max",
    )
