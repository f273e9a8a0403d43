"""Solve a batch of dense quadratic programs: interior point, then a polish on the active set, then certificates for what failed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.quadratic_programs._kkt import KKTFactor
from bilevel.quadratic_programs._program import Found, Limits, Program
from bilevel.quadratic_programs._rays import infeasibility_rays, unboundedness_rays
from bilevel.reports import Status
from bilevel.solvers.programs.dense_program import DenseProgram, Iterate, Rows, mv, tmv
from bilevel.solvers.programs.mehrotra import interior_point

__all__ = ["solve_dense", "solve_solvable"]

_EARLY = 1e-7  # relative residuals at which the active set is tried for the first time
_LATE = 1e-10  # those at which it is tried again
_ACCEPTED = 1e-8  # those that are enough where no active set fits
_FLIPS = 4  # changes of the active set that are tried
_EXACT = 1e-11  # relative violation of a condition that counts as rounding


def solve_dense(program: Program, limits: Limits) -> Found:
    """Return what was found of each problem of ``program``."""
    found = Found.blank(program)
    sound = _refuse(program, found)
    if not len(program.q):
        return found
    if len(sound) == len(program.q):
        _search(program, limits, found)
    elif len(sound):
        part = program.at(sound)
        inner = Found.blank(part)
        _search(part, limits, inner)
        found.put(sound, inner)
    return found


def _refuse(program: Program, found: Found) -> torch.Tensor:
    """Give a status to the problems that need no search; return the numbers of the others."""
    finite = program.finite
    size = program.Q.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
    lifted = program.Q.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(program.rounding * size + 1e-300)
    if not bool(finite.all()):
        eye = torch.eye(lifted.shape[-1], dtype=lifted.dtype, device=lifted.device)
        lifted = torch.where(finite[:, None, None], lifted, eye)
    convex = torch.linalg.cholesky_ex(lifted)[1] == 0
    rays = program.sizes.split(found.certificate)
    infinity = float("inf")
    crossed = program.lower > program.upper
    rays[2][program.h == -infinity] = 1.0
    rays[3][crossed | (program.lower == infinity)] = 1.0
    rays[4][crossed | (program.upper == -infinity)] = 1.0
    empty = found.certificate.ne(0).any(-1)
    status = torch.where(empty, int(Status.INFEASIBLE), int(Status.RUNNING))
    status = torch.where(convex, status, int(Status.INDEFINITE))
    found.status.copy_(torch.where(finite, status, int(Status.NOT_FINITE)))
    return (found.status == Status.RUNNING).nonzero().squeeze(-1)


def solve_solvable(program: Program) -> torch.Tensor:
    """Return x (B, n) of programs that are known to have a solution."""
    found = Found.blank(program)
    _search(program, Limits(max_steps=100), found, certify=False)
    return found.point[:, : program.sizes.n]


def _search(program: Program, limits: Limits, found: Found, *, certify: bool = True) -> None:
    """Fill ``found`` by searches; what fails is looked at for certificates if ``certify``."""
    form = _interior_form(program)
    smoothing = limits.smoothing
    early = _LATE if smoothing else _EARLY
    iterate = interior_point(form, early, limits.max_steps, smoothing=smoothing)
    trial = _polished(program, iterate, limits)
    trial.write(found, None, iterate.steps)
    if bool(trial.good.all()):
        found.factor = trial.factor
        return
    rest = (~trial.good & ~iterate.escaped).nonzero().squeeze(-1)
    if len(rest):
        _search_on(program.at(rest), form.at(rest), iterate.at(rest), limits, found, rest)
    lost = (found.status != Status.CONVERGED).nonzero().squeeze(-1)
    if not len(lost):
        return
    lost = _certify(program, found, lost) if certify else lost
    again = lost[iterate.escaped[lost]]
    if len(again):
        part = form.at(again)
        more = interior_point(part, _LATE, limits.max_steps, smoothing=smoothing, may_escape=False)
        _conclude(program.at(again), more, limits, found, again)


def _search_on(
    program: Program, form: DenseProgram, iterate: Iterate, limits: Limits, found: Found, where: torch.Tensor
) -> None:
    """Go on with problems whose active set was not clear yet."""
    blank = torch.zeros_like(iterate.stuck)
    fresh = replace(iterate, stuck=blank, idle=torch.zeros_like(iterate.idle))
    more = interior_point(form, _LATE, limits.max_steps, fresh, smoothing=limits.smoothing)
    _conclude(program, more, limits, found, where)


def _conclude(program: Program, iterate: Iterate, limits: Limits, found: Found, where: torch.Tensor) -> None:
    """Polish what a second search found; accept it as it is where no active set fits and it is accurate enough."""
    trial = _polished(program, iterate, limits)
    trial.write(found, where, iterate.steps)
    unclear = (~trial.good & ~iterate.escaped).nonzero().squeeze(-1)
    if not len(unclear):
        return
    part, best = program.at(unclear), iterate.at(unclear)
    point, tight = _point_of(part, best)
    enough = best.best <= _ACCEPTED
    ended = torch.where(best.steps >= limits.max_steps, int(Status.MAX_STEPS), int(Status.STAGNATED))
    status = torch.where(enough & (best.error <= 10 * _ACCEPTED), int(Status.CONVERGED), ended)
    residual, threshold = residual_norm(
        part, point, tight, limits.smoothing, part.weights(point)[1], part.slacks(point)
    )
    index = where[unclear]
    found.point[index], found.active[index], found.status[index] = point, tight, status
    found.residual[index], found.threshold[index], found.iterations[index] = residual, threshold, best.steps
    found.weak[index] = _unclear_rows(part, point, tight) if not limits.smoothing else False


def _unclear_rows(program: Program, point: torch.Tensor, tight: torch.Tensor) -> torch.Tensor:
    """Return the rows (B, m + 2n) of which an interior iterate does not tell whether they are active: small slack, small multiplier."""
    slack, scale = program.slacks(point)
    weight, size = program.weights(point)
    return (slack.abs() <= 1e-4 * scale) & (weight <= 1e-4 * size)


def _certify(program: Program, found: Found, lost: torch.Tensor) -> torch.Tensor:
    """Look for rays that prove problems infeasible or unbounded; return the numbers of those without."""
    part = program.at(lost)
    for rays_of, status in ((infeasibility_rays, Status.INFEASIBLE), (unboundedness_rays, Status.UNBOUNDED)):
        if not len(lost):
            break
        rays, proven = rays_of(part, solve_solvable)
        index = lost[proven]
        found.certificate[index], found.status[index] = rays[proven], int(status)
        left = (~proven).nonzero().squeeze(-1)
        lost, part = lost[left], part.at(left)
    return lost


def _interior_form(program: Program) -> DenseProgram:
    """Return the program without unknowns that two equal bounds fix, and without constraints at infinity."""
    fixed, at_all = program.fixed, bool(program.fixed.any())
    Q, q, A, b, G, h = program.Q, program.q, program.A, program.b, program.G, program.h
    if at_all:
        value, free = torch.where(fixed, program.lower, 0.0), (~fixed).to(q.dtype)
        q = torch.where(fixed, -value, q + mv(Q, value))
        b, h = b - mv(A, value), h - mv(G, value)
        Q = Q * free.unsqueeze(-1) * free.unsqueeze(-2) + torch.diag_embed(1 - free)
        A, G = A * free.unsqueeze(-2), G * free.unsqueeze(-2)
    general = torch.isfinite(h)
    G, h = (G, h) if bool(general.all()) else (torch.where(general.unsqueeze(-1), G, 0.0), torch.where(general, h, 1.0))
    sides, d = [], [h]
    for bound, sign in ((program.lower, -1.0), (program.upper, 1.0)):
        has = torch.isfinite(bound) & ~fixed
        sides.append(has.to(q.dtype) if bool(has.any()) else None)
        if sides[-1] is not None:
            d.append(torch.where(has, sign * bound, 1.0))
    return DenseProgram(Q, q, A, b, Rows(G, *sides), torch.cat(d, -1))


def _point_of(program: Program, iterate: Iterate) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the iterate as a point (B, n + p + m + 2n), and which inequalities seem active (B, m + 2n)."""
    sizes, fixed = program.sizes, program.fixed
    B, n, m = len(program.q), sizes.n, sizes.m
    z, tight = iterate.z, iterate.tight
    parts, marks, at = [z[:, :m]], [tight[:, :m] & torch.isfinite(program.h)], m
    for bound in (program.lower, program.upper):
        has = torch.isfinite(bound) & ~fixed
        if bool(has.any()):
            parts.append(torch.where(has, z[:, at : at + n], 0.0))
            marks.append(tight[:, at : at + n] & has)
            at += n
        else:
            parts.append(z.new_zeros(B, n))
            marks.append(torch.zeros_like(fixed))
    marks[2] = marks[2] & ~marks[1]
    x = iterate.x
    if bool(fixed.any()):
        x = torch.where(fixed, program.lower, x)
        slope = mv(program.Q, x) + program.q
        slope = slope + tmv(program.A, iterate.y) if sizes.p else slope
        slope = slope + tmv(program.G, parts[0]) if m else slope
        parts[1] = torch.where(fixed, slope.clamp_min(0), parts[1])
        parts[2] = torch.where(fixed, (-slope).clamp_min(0), parts[2])
        marks[1], marks[2] = marks[1] | (fixed & (slope >= 0)), marks[2] | (fixed & (slope < 0))
    active = torch.cat(marks, -1)
    return torch.cat([x, iterate.y, *parts], -1), active


_PARTS = ("point", "active", "weak", "good", "residual", "threshold")


@dataclass(eq=False)
class _Trial:
    """Points that an active set led to, and whether they fulfil all conditions to rounding."""

    point: torch.Tensor
    active: torch.Tensor
    weak: torch.Tensor
    good: torch.Tensor
    residual: torch.Tensor
    threshold: torch.Tensor
    factor: KKTFactor | None

    def put(self, index: torch.Tensor, other: _Trial, chosen: torch.Tensor | slice = slice(None)) -> _Trial:
        """Return a copy in which the ``chosen`` trials of ``other`` stand at ``index``. It has no factorisation."""
        made = {name: getattr(self, name).clone() for name in _PARTS}
        for name, mine in made.items():
            mine[index] = getattr(other, name)[chosen]
        return _Trial(**made, factor=None)

    def clipped(self, program: Program) -> _Trial:
        """Return the trials with what is negative by rounding alone set to zero."""
        n, head = program.sizes.n, program.sizes.n + program.sizes.p
        x, rows = self.point[:, :n], self.point[:, head:]
        x = torch.minimum(torch.maximum(x, program.lower), program.upper)
        rows = torch.where(program.fixed_rows, rows, rows.clamp_min(0))
        return replace(self, point=torch.cat([x, self.point[:, n:head], rows], -1))

    def write(self, found: Found, where: torch.Tensor | None, steps: torch.Tensor) -> None:
        """Write the good ones into ``found``, whose problems ``where`` these are, and of the others the steps alone."""
        good = self.good.nonzero().squeeze(-1)
        index = good if where is None else where[good]
        if where is None and len(good) == len(self.good):
            found.point, found.active, found.weak = self.point, self.active, self.weak
            found.residual, found.threshold, found.iterations = self.residual, self.threshold, steps
            found.status = torch.full_like(found.status, int(Status.CONVERGED))
            return
        found.iterations[slice(None) if where is None else where] = steps
        found.status[index] = int(Status.CONVERGED)
        for name in _PARTS:
            if name != "good":
                getattr(found, name)[index] = getattr(self, name)[good]


def _polished(program: Program, iterate: Iterate, limits: Limits) -> _Trial:
    """Return the points on the active sets that the iterates show, changed where they prove wrong."""
    point, active = _point_of(program, iterate)
    if limits.smoothing:
        return _on_path(program, point, limits.smoothing)
    trial = tried = _on_active_set(program, point, active)
    for _ in range(_FLIPS):
        wrong = (~trial.good).nonzero().squeeze(-1)
        if not len(wrong):
            break
        part = program.at(wrong)
        flipped = _flipped(part, tried.point[wrong], tried.active[wrong])
        tried = tried.put(wrong, _on_active_set(part, point[wrong], flipped))
        # Where ties send the active sets round in a circle, one of them may fulfil all conditions but for rounding.
        better = (~trial.good & (tried.good | (tried.residual < trial.residual))).nonzero().squeeze(-1)
        trial = trial.put(better, tried, better)
    trial.good = trial.residual <= 1e-3 * trial.threshold
    return trial.clipped(program)


def _on_active_set(program: Program, point: torch.Tensor, active: torch.Tensor) -> _Trial:
    """Return the solutions of the equations that are left if ``active`` is the active set."""
    sizes = program.sizes
    factor = KKTFactor(sizes, program.Q, program.A, program.G, active)
    head = sizes.n + sizes.p
    z = torch.cat([point[:, :head], torch.where(active, point[:, head:], 0.0)], -1)
    for _ in range(2):
        step = factor.solve(program.residual(z, active))
        z = z - step
    x, nu, *weights = sizes.split(z)
    low, up = active[:, sizes.m :].split([sizes.n, sizes.n], -1)
    x = torch.where(low, program.lower, torch.where(up, program.upper, x))
    rows = torch.where(active, torch.cat(weights, -1), 0.0)
    z = torch.cat([x, nu, rows], -1)
    weight, size = program.weights(z)
    slack, scale = program.slacks(z)
    negative = active & (weight < -_EXACT * size) & ~program.fixed_rows
    violated = ~active & (slack < -_EXACT * scale)
    residual, threshold = residual_norm(program, z, active, 0.0, size, (slack, scale))
    good = ~(negative | violated).any(-1) & (residual <= 1e-3 * threshold)
    weak = torch.where(active, weight <= program.weakness * size, slack <= program.weakness * scale)
    weak &= ~program.fixed_rows
    return _Trial(z, active, weak, good, residual, threshold, factor)


def _flipped(program: Program, point: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Return the active set of the primal–dual method: less what has a negative multiplier, plus what is violated."""
    weight, size = program.weights(point)
    slack, scale = program.slacks(point)
    fixed = program.fixed_rows
    kept = torch.where(active, (weight >= -_EXACT * size) | fixed, (slack < -_EXACT * scale) & ~fixed)
    general, low, up = kept.split(program.sizes.rows, -1)
    return torch.cat([general, low, up & ~low], -1)


def _on_path(program: Program, point: torch.Tensor, smoothing: float) -> _Trial:
    """Return the points of the central path near ``point``."""
    sizes = program.sizes
    head = sizes.n + sizes.p
    active = program.present
    for _ in range(3):
        rows = point[:, head:]
        damping = smoothing / torch.where(active, rows, 1.0) ** 2
        factor = KKTFactor(sizes, program.Q, program.A, program.G, active, damping)
        moved = point - factor.solve(program.residual(point, active, smoothing))
        moved_rows = torch.where(active, moved[:, head:].maximum(0.1 * rows), 0.0)
        point = torch.cat([moved[:, :head], moved_rows], -1)
    size, slacks = program.weights(point)[1], program.slacks(point)
    residual, threshold = residual_norm(program, point, active, smoothing, size, slacks)
    good = residual <= threshold
    return _Trial(point, active, torch.zeros_like(active), good, residual, threshold, None)


def residual_norm(
    program: Program,
    point: torch.Tensor,
    active: torch.Tensor,
    smoothing: float,
    size: torch.Tensor,
    slacks: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest relative lack of an optimality condition, violations included, and what of it is small enough (B,).

    ``size`` and ``slacks`` are what the program's ``weights`` and ``slacks`` say of the point.
    """
    lack = program.residual(point, active, smoothing).abs()
    n, head = program.sizes.n, program.sizes.n + program.sizes.p
    slack, rows = slacks
    primal, dual = program.scales(size, rows)
    slope, rest = lack[:, :n].amax(-1), lack[:, n:]
    if not smoothing:
        outside = torch.maximum(lack[:, head:], torch.where(active, 0.0, -slack))
        rest = torch.cat([lack[:, n:head], outside], -1)
        slope = torch.maximum(slope, torch.where(active, -point[:, head:], 0.0).amax(-1))
    relative = torch.maximum(slope / dual, rest.amax(-1) / primal)
    return relative, torch.full_like(relative, _ACCEPTED)
