"""Solve a batch of constrained problems with any solver, polish the solutions, and judge them by the KKT conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.solvers._base import InnerSolver, is_one_of, merge
from bilevel.solvers.constrained.active_set import (
    Polished,
    continued,
    measure,
    polish,
    polished_without_multipliers,
    recovered,
)
from bilevel.solvers.constrained.beside import lower_points, lower_points_in_bounds
from bilevel.solvers.constrained.central_path import centred
from bilevel.solvers.constrained.found import Found
from bilevel.solvers.constrained.implied import Weak
from bilevel.solvers.constrained.interior_pieces import pick
from bilevel.solvers.constrained.loosening import polished_by_loosening
from bilevel.solvers.constrained.program import Answer, ConstrainedSolver, Program
from bilevel.solvers.constrained.regularity import Findings, examine, explained
from bilevel.solvers.constrained.restoration import with_feasibility
from bilevel.solvers.constrained.touching import only_point
from bilevel.solvers.constrained.unsettled import is_settled, kinked_part
from bilevel.solvers.constrained.wording import Name, failure_words
from bilevel.solvers.interior_point import InteriorPoint
from bilevel.solvers.projected_lbfgs import ProjectedLBFGS
from bilevel.solvers.projected_newton import DENSE_LIMIT, ProjectedNewton

__all__ = ["solve_constrained"]

_UNSOLVED = (Status.MAX_STEPS, Status.STAGNATED, Status.NOT_CONVERGED, Status.LINE_SEARCH_FAILED)
# Without multipliers, constraints within these shares of the size of x are tried as active. The second ways drop multipliers of a wrong sign
# all together, and one by one.
_WAYS = tuple((near, False) for near in (1e-5, 1e-7, 1e-3, 1e-2))
_OTHER_WAYS = ((1e-7, False), (1e-7, True))
# An initial guess is nearly a solution if its violation and its projected gradient are below this share of their sizes.
_KNOWN, _MOST_RECOVERED = 1e-3, 256
_MOST_RESUMES, _MOST_SADDLES = 2, 3
_MAYBE_KINKED = (Status.STAGNATED, Status.NOT_CONVERGED, Status.MAX_STEPS)


def solve_constrained(
    program: Program,
    init: torch.Tensor,
    solver: InnerSolver | Callable[[Program, torch.Tensor], Answer] | None,
    smoothing: float | None,
    name: Name,
    where: str,
    multipliers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Found:
    """Solve from ``init`` (K, n).

    Parameters
    ----------
    program
        The problems.
    init
        Where the search begins.
    solver
        A constrained solver, or a function (program, init) -> answer for an external solver, or None for the default.
    smoothing
        τ of the central path, or None.
    name
        (kind, index) ↦ how a user would write that constraint.
    where
        The layer's name, for messages.
    multipliers
        ν (K, p) and λ (K, m), if ``init`` is the solution for nearby arguments, and these are its multipliers.
    """
    inside = program.inside(init)
    parts, rows = program.jacobian(inside)
    given, unit = program, program.unit(init, parts, rows)
    column = unit.unsqueeze(-1)
    if bool((unit != 1).any()):
        program = program.in_units(unit)
    # A constraint of small unknowns is tiny by what it is in their unit.
    weights = program.row_weights(inside / column, parts, rows * column.unsqueeze(-1))
    of_equality = of_inequality = torch.ones_like(parts[:, :1])
    if weights is not None:
        program = program.scaled(weights)
        _, of_equality, of_inequality = program.split(weights)
    if isinstance(solver, ConstrainedSolver):
        answer, used = solver.solve_program(program, init / column, smoothing), solver.name
    elif solver is None:
        if multipliers is not None:
            multipliers = multipliers[0] / of_equality, multipliers[1] / of_inequality
        answer, used = _by_default(program, init / column, smoothing, where, multipliers)
    else:
        assert not isinstance(solver, InnerSolver)
        answer, used = solver(given, init), getattr(solver, "__name__", "solver")
        equality, inequality = answer.equality / of_equality, answer.inequality / of_inequality
        answer = replace(answer, x=answer.x / column, equality=equality, inequality=inequality)
    answer = _without_contradictions(program, answer)
    found = _found(program, answer, smoothing, used, name, _resume(solver))
    if solver is None:
        found = _off_saddles(program, found, smoothing, name, where)
    # The unit is a power of two: x stays exactly on its bounds.
    x = column * found.x
    found = replace(found, equality=found.equality * of_equality, inequality=found.inequality * of_inequality)
    budget = isinstance(solver, ConstrainedSolver) and solver.has_budget
    kinked = kinked_part(program, found.x, is_one_of(found.status, _MAYBE_KINKED[:2] if budget else _MAYBE_KINKED))
    found = replace(found, status=torch.where(kinked >= 0, int(Status.KINK), found.status))
    if bool((found.status > int(Status.BUDGET_SPENT)).any()):
        return replace(found, x=x, words={**failure_words(given, init, x, found.status, kinked, name), **found.words})
    return replace(found, x=x)


def _found(
    program: Program, answer: Answer, smoothing: float | None, used: str, name: Name, resume: ConstrainedSolver | None
) -> Found:
    """Return the judged answer. The solver ``resume``, if any, goes on where it is no solution."""
    if smoothing is not None:
        return _on_the_path(program, answer, smoothing, used)
    if program.size > DENSE_LIMIT and program.only_bounds:
        return _large(program, answer, used, name)
    start = answer.x
    answer, point = _with_only_points(program, *_settled(program, answer, resume))
    if resume is not None:
        answer, point = _without_interior(program, answer, point, start)
    return _judged(program, answer, point, used, name)


def _off_saddles(program: Program, found: Found, smoothing: float | None, name: Name, where: str) -> Found:
    """Return what the default solvers find from the lower points beside saddles."""
    for _ in range(_MOST_SADDLES):
        these = found.status == Status.INDEFINITE
        if found.lower is None or not bool(these.any()):
            break
        start = torch.where(these.unsqueeze(-1), found.lower, found.x)
        answer, used = _by_default(program, start, smoothing, where, None)
        fresh = _found(program, _without_contradictions(program, answer), smoothing, used, name, InteriorPoint())
        found = found.then(these, fresh)
    return found


def _by_default(
    program: Program,
    init: torch.Tensor,
    smoothing: float | None,
    where: str,
    multipliers: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[Answer, str]:
    if smoothing is not None or not program.only_bounds:
        known = None if smoothing is not None or multipliers is None else _continued(program, init, *multipliers)
        known = _known_already(program, init) if smoothing is None and known is None else known
        if known is not None:
            return known, "Newton on the active set of the start"
        if program.size + program.equalities > 4 * DENSE_LIMIT:
            raise ArgumentError(
                f"{where}: expected at most {4 * DENSE_LIMIT} unknowns and equalities with constraints other than bounds, got "
                f"{program.size + program.equalities}; pass solver=bilevel.InteriorPoint(), which takes dense matrices of that order, or "
                "bounds alone"
            )
        solver = InteriorPoint()
        return solver.solve_program(program, init, smoothing), solver.name
    if program.size > DENSE_LIMIT:
        return _many_unknowns(program, init)
    first = ProjectedNewton()
    answer = first.solve_program(program, init, None)
    failed = is_one_of(answer.status, (*_UNSOLVED, Status.NOT_FINITE))
    if not bool(failed.any()):
        return answer, first.name
    second = InteriorPoint()
    other = second.solve_program(program, init, None)
    won = failed & (other.status == Status.CONVERGED)
    return answer.merged(won, other, ran=failed), f"{first.name}, then {second.name}"


def _many_unknowns(program: Program, init: torch.Tensor) -> tuple[Answer, str]:
    """Return an answer for bounds alone: gradients alone find the active set, and Newton's method finishes on it."""
    first, second = ProjectedLBFGS(), ProjectedNewton()
    answer = first.solve_program(program, init, None)
    going = is_one_of(answer.status, (Status.CONVERGED, *_UNSOLVED))
    if not bool(going.any()):
        return answer, first.name
    other = second.solve_program(program, answer.x, None)
    better = going & is_one_of(other.status, (Status.CONVERGED, *_UNSOLVED))
    return answer.merged(better, other), f"{first.name}, then {second.name}"


def _continued(program: Program, init: torch.Tensor, equality: torch.Tensor, inequality: torch.Tensor) -> Answer | None:
    """Return the solutions that continue those of nearby arguments, by Newton's method on their active sets; None if one is not found."""
    status = torch.full((len(init),), int(Status.NOT_CONVERGED), dtype=torch.int64, device=init.device)
    steps = 0

    def counted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return program.hessian(x, weights)

    watched = replace(program, hessian=counted)
    answer = Answer(init, equality, inequality, status, torch.zeros_like(status))
    point = continued(watched, answer)
    # Two Hessians a step, and one to begin with.
    return _regular(program, point, torch.full_like(status, steps // 2))


def _regular(program: Program, point: Polished, steps: torch.Tensor) -> Answer | None:
    """Return polished points as an answer; None if one does not fulfil the conditions, or if its solution is degenerate or a saddle."""
    if not bool(point.good.all()):
        return None
    findings, point = examine(program, point, measure(program, point.x, point.equality, point.inequality))
    if bool((findings.negative | findings.degenerate).any()):
        return None
    return Answer(point.x, point.equality, point.inequality, torch.full_like(steps, int(Status.CONVERGED)), steps)


def _known_already(program: Program, init: torch.Tensor) -> Answer | None:
    """Return the initial guesses as an answer, with recovered multipliers, if all are nearly solutions. Only the polish is then needed."""
    none, nothing = (init.new_zeros(len(init), count) for count in (program.equalities, program.inequalities))
    status = torch.full((len(init),), int(Status.NOT_CONVERGED), dtype=torch.int64, device=init.device)
    answer = Answer(init, none, nothing, status, torch.zeros_like(status))
    x = program.inside(init)
    at = measure(program, x, none, nothing)
    size = _KNOWN * at.size
    outside = torch.maximum(
        (init - x).abs().amax(-1), program.violation(at.parts) / at.rows.norm(dim=-1).amax(-1).clamp_min(1e-300)
    )
    if not bool((outside <= size).all()) or program.equalities + program.inequalities > _MOST_RECOVERED:
        return None
    answer = recovered(program, answer, _KNOWN)
    at = measure(program, x, answer.equality, answer.inequality)
    _, jh, jc = program.split(at.rows)
    slope = at.rows[:, 0] + (jh.mT @ answer.equality.unsqueeze(-1) + jc.mT @ answer.inequality.unsqueeze(-1)).squeeze(
        -1
    )
    at_lower, at_upper = x <= program.lower + size.unsqueeze(-1), x >= program.upper - size.unsqueeze(-1)
    off = torch.where((at_lower & (slope > 0)) | (at_upper & (slope < 0)) | program.fixed, 0.0, slope).abs().amax(-1)
    if not bool((off <= _KNOWN * at.rows[:, 0].abs().amax(-1)).all()):
        return None
    return _regular(program, polish(program, answer, at), answer.iterations + 1)


def _without_contradictions(program: Program, answer: Answer) -> Answer:
    """Return the answer with statuses for bounds that contradict each other or are NaN."""
    crossed = program.crossed.any(-1)
    unknown = torch.isnan(program.lower).any(-1) | torch.isnan(program.upper).any(-1)
    status = torch.where(crossed, int(Status.INFEASIBLE), answer.status)
    status = torch.where(unknown, int(Status.NOT_FINITE), status)
    # An infinite or NaN multiplier would affect the other problems.
    tidy = [t.nan_to_num(0.0, 0.0, 0.0) for t in (answer.x, answer.equality, answer.inequality)]
    return replace(answer, x=tidy[0], equality=tidy[1], inequality=tidy[2], status=status)


def _resume(solver: object) -> ConstrainedSolver | None:
    """Return the solver that goes on where the answer of ``solver`` is no solution; None: nobody does."""
    if solver is None:
        return InteriorPoint()
    return solver if isinstance(solver, ConstrainedSolver) and not solver.has_budget else None


def _settled(program: Program, answer: Answer, resume: ConstrainedSolver | None) -> tuple[Answer, Polished]:
    """Return the answer and its polish. An answer that is no solution on its own scale is searched on from, with that scale."""
    point = _polished(program, answer)
    if not answer.known and bool((~point.good).any()):
        # External solvers prove nothing.
        return with_feasibility(
            program, replace(answer, status=torch.where(point.good, int(Status.CONVERGED), answer.status)), answer.x
        ), point
    for count in range(_MOST_RESUMES + 1):
        claimed = (answer.status == Status.CONVERGED) & ~point.good & ~is_settled(program, answer)
        if not bool(claimed.any()):
            break
        if resume is None or count == _MOST_RESUMES:
            return replace(answer, status=torch.where(claimed, int(Status.STAGNATED), answer.status)), point
        more = _without_contradictions(program, resume.solve_program(program, answer.x, None))
        fresh = _polished(program, more)
        point = merge(claimed, fresh, point)
        answer = answer.merged(claimed, more)
    return answer, point


def _with_only_points(program: Program, answer: Answer, point: Polished) -> tuple[Answer, Polished]:
    """Return the answers that are no solutions with the only feasible point of those whose constraints touch there. It is the solution."""
    these = ~point.good & is_one_of(answer.status, (*_UNSOLVED, Status.INFEASIBLE))
    if not program.inequalities or not _recoverable(program) or not bool(these.any()):
        return answer, point
    x, found = only_point(program, answer.x, these)
    mask = found.unsqueeze(-1)
    multipliers = [torch.where(mask, 0.0, part) for part in (answer.equality, answer.inequality)]
    x, status = torch.where(mask, x, answer.x), torch.where(found, int(Status.CONVERGED), answer.status)
    answer = replace(answer, x=x, equality=multipliers[0], inequality=multipliers[1], status=status)
    return answer, merge(found, replace(point, x=x, equality=multipliers[0], inequality=multipliers[1]), point)


def _without_interior(
    program: Program, answer: Answer, point: Polished, start: torch.Tensor
) -> tuple[Answer, Polished]:
    """Return the answers that are no solutions with those of problems whose inequalities leave no interior."""
    these = ~point.good & is_one_of(answer.status, _UNSOLVED)
    if not program.inequalities or not _recoverable(program) or not bool(these.any()):
        return answer, point
    found, steps = polished_by_loosening(program, start, these)
    answer = replace(answer, iterations=answer.iterations + torch.where(these, steps, 0))
    return answer, merge(found.good, found, point)


def _polished(program: Program, answer: Answer) -> Polished:
    usable = is_one_of(answer.status, (Status.CONVERGED, *_UNSOLVED))
    point = polish(program, answer) if answer.known else polished_without_multipliers(program, answer, _WAYS)
    if bool((usable & ~point.good).any()) and _recoverable(program):
        # Where constraints leave no interior, multipliers of the central path grow without end. Others may exist.
        point = merge(point.good, point, polished_without_multipliers(program, answer, _OTHER_WAYS))
    return point


def _judged(program: Program, answer: Answer, point: Polished, used: str, name: Name) -> Found:
    usable = is_one_of(answer.status, (Status.CONVERGED, *_UNSOLVED))
    good = usable & point.good
    status = torch.where(good, int(Status.CONVERGED), answer.status)
    at = measure(program, point.x, point.equality, point.inequality)
    findings, point = examine(program, point, at)
    # Interior-point iterates converge, slowly, even to solutions without multipliers.
    weak, saddle, lower = findings.weak, good & findings.negative, None
    doubtful = saddle | (good & (weak.any | findings.flat))
    if bool(doubtful.any()):
        lower, fell = lower_points(program, point, at, weak, doubtful)
        saddle = saddle | fell
    status = torch.where(saddle, int(Status.INDEFINITE), status)
    taken, kept = (point.x, point.equality, point.inequality), (answer.x, answer.equality, answer.inequality)
    x, equality, inequality = pick(good, taken, kept)
    degenerate = (findings.degenerate | findings.dependent) & (status == Status.CONVERGED)
    words = {}
    if bool(degenerate.any()):
        meaning, remedy = explained(findings, program, x, at, int(degenerate.nonzero()[0]), name)
        words[Status.DEGENERATE] = (f"met a solution where {meaning}", remedy)
    alone = findings.degenerate & (status == Status.CONVERGED)
    compared = weak.among(alone & findings.comparable) if bool(findings.comparable.any()) else None
    return Found(x, equality, inequality, status, answer.iterations, alone, words, used, compared, lower)


def _recoverable(program: Program) -> bool:
    return program.size + program.equalities + program.inequalities <= _MOST_RECOVERED


def _large(program: Program, answer: Answer, used: str, name: Name) -> Found:
    """Judge large problems with bounds alone by gradients. The linear solve of a derivative checks their curvature."""
    x = answer.x
    _, rows = program.jacobian(x)
    slope = rows[:, 0]
    force = slope.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    size = 1 + x.abs().amax(-1, keepdim=True)
    at_lower, at_upper = (x <= program.lower) & (slope >= 0), (x >= program.upper) & (slope <= 0)
    weak = 2e-8 * force
    loose = ~program.fixed
    no = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    findings = Findings(
        Weak(
            x.new_zeros(len(x), 0, dtype=torch.bool),
            loose & (x - program.lower <= 2e-8 * size) & (slope.abs() <= weak),
            loose & (program.upper - x <= 2e-8 * size) & (slope.abs() <= weak),
        ),
        no, x.new_zeros(len(x), 0, dtype=torch.bool), no, no, no, x.new_zeros(len(x), 0, dtype=torch.bool), no,
    )  # fmt: skip
    # What the slope is a small difference of. At zero it vanishes for a product of unknowns, and ∇²f x does not.
    first = program.jacobian(program.inside(torch.zeros_like(x)))[1][:, 0].abs().amax(-1, keepdim=True)
    bent = program.product(x, x).abs().amax(-1, keepdim=True).nan_to_num(0.0, 0.0)
    small = slope.abs() <= 1e-9 * torch.maximum(torch.maximum(first, bent), force)
    good = (small | at_lower | at_upper | program.fixed).all(-1)
    usable = is_one_of(answer.status, (Status.CONVERGED, *_UNSOLVED))
    failed = torch.where(answer.status == Status.CONVERGED, int(Status.STAGNATED), answer.status)
    status = torch.where(usable, torch.where(good, int(Status.CONVERGED), failed), answer.status)
    degenerate, lower = findings.degenerate & (status == Status.CONVERGED), None
    if bool(degenerate.any()):
        lower, fell = lower_points_in_bounds(program, x, slope, findings.weak, degenerate)
        status = torch.where(fell, int(Status.INDEFINITE), status)
        degenerate = degenerate & ~fell
    words = {}
    if bool(degenerate.any()):
        meaning, remedy = findings.words(int(degenerate.nonzero()[0]), name)
        words[Status.DEGENERATE] = (f"met a solution where {meaning}", remedy)
    return Found(x, answer.equality, answer.inequality, status, answer.iterations, degenerate, words, used, lower=lower)


def _on_the_path(program: Program, answer: Answer, smoothing: float, used: str) -> Found:
    moved, _, small = centred(program, answer, smoothing)
    usable = is_one_of(answer.status, (Status.CONVERGED, *_UNSOLVED))
    good = usable & small
    status = torch.where(good, int(Status.CONVERGED), torch.where(usable, int(Status.STAGNATED), answer.status))
    taken, kept = (moved.x, moved.equality, moved.inequality), (answer.x, answer.equality, answer.inequality)
    x, equality, inequality = pick(good, taken, kept)
    return Found(x, equality, inequality, status, answer.iterations, torch.zeros_like(good), {}, used)
