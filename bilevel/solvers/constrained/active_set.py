"""Polish: identify the active constraints, then Newton on the equality-constrained KKT system, to the accuracy of the arithmetic.

At the polished point λ = 0 holds exactly where a constraint is inactive, and x is exactly on its active bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bilevel._torch.factorisations import eigh
from bilevel.solvers._base import merge
from bilevel.solvers.constrained.kkt import solve_symmetric
from bilevel.solvers.constrained.program import Answer, Program, pulled_back

__all__ = ["Measures", "Polished", "continued", "measure", "polish", "polished_without_multipliers", "recovered"]

_MOST_ROUNDS, _MOST_STEPS = 12, 12
# The tolerance of signs and violations, relative to the sizes of forces and of x.
_WRONG = 1e-9
# A polish that moves x by more than this share of its size has found another solution.
_FAR = 1e-2
# Likewise for a solution that continues that of nearby arguments, and how often its active set may change.
_CONTINUED, _MOST_CHANGES = 0.5, 30
_UNBOUNDED = 1e6


@dataclass(frozen=True, eq=False)
class Polished:
    """A solution with its active set; every tensor has a leading batch axis.

    Parameters
    ----------
    x, equality, inequality
        The point and the multipliers of h and c.
    slope
        ∇f + ∇hᵀν + ∇cᵀλ (K, n): the multipliers of active bounds, positive at lower bounds.
    at_lower, at_upper, active
        Which bounds and inequalities are active, bool.
    error
        The last Newton step of x (K, n); NaN where there was none.
    good
        Whether the KKT conditions hold to rounding, signs included (K,).
    """

    x: torch.Tensor
    equality: torch.Tensor
    inequality: torch.Tensor
    slope: torch.Tensor
    at_lower: torch.Tensor
    at_upper: torch.Tensor
    active: torch.Tensor
    error: torch.Tensor
    good: torch.Tensor


@dataclass(frozen=True, eq=False)
class Measures:
    """The sizes and derivatives at a point.

    Parameters
    ----------
    force, size
        The sizes of gradients and of x (K,). Multipliers and distances are relative to them.
    norms
        ‖∇c_i‖ (K, m).
    parts, rows
        (f, h, c) and their Jacobian.
    hessian
        ∇² of the Lagrangian.
    """

    force: torch.Tensor
    size: torch.Tensor
    norms: torch.Tensor
    parts: torch.Tensor
    rows: torch.Tensor
    hessian: torch.Tensor


def measure(program: Program, x: torch.Tensor, equality: torch.Tensor, inequality: torch.Tensor) -> Measures:
    """Evaluate everything at a point (x, ν, λ)."""
    parts, rows = program.jacobian(x)
    weights = torch.cat([torch.ones_like(parts[:, :1]), equality, inequality], dim=-1)
    hessian = program.hessian(x, weights)
    hessian = 0.5 * (hessian + hessian.mT)
    gradient, jh, jc = program.split(rows)
    norms = jc.norm(dim=-1)
    size = 1 + x.abs().amax(-1)
    terms = [gradient.abs().amax(-1), 1e-3 * hessian.abs().amax(-1).amax(-1) * size]
    terms += [_largest(jh.norm(dim=-1) * equality), _largest(norms * inequality)]
    force = torch.stack(terms).amax(0).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return Measures(force, size, norms, parts, rows, hessian)


def polish(program: Program, answer: Answer, at: Measures | None = None) -> Polished:
    """Return the answer at full accuracy where that is possible; ``good`` says where."""
    return _followed(program, answer, at, _FAR, _MOST_ROUNDS, _MOST_STEPS)


def continued(program: Program, answer: Answer) -> Polished:
    """Return what becomes of a solution, with its multipliers, when the arguments change a little; ``good`` says where it was found.

    The active set is chosen anew after each Newton step. x may move by a large share of its size.
    """
    return _followed(program, answer, None, _CONTINUED, _MOST_CHANGES, 1)


def _followed(program: Program, answer: Answer, at: Measures | None, share: float, rounds: int, steps: int) -> Polished:
    """Return the end of ``rounds`` of ``steps`` Newton steps and a new active set each; x may move by a ``share`` of its size."""
    x = program.inside(answer.x)
    at = measure(program, x, answer.equality, answer.inequality) if at is None else at
    point = _identified(program, x, answer, at)
    best = point
    for _ in range(rounds):
        point, at = _newton(program, point, steps)
        point, wrong = _judged(program, point, at)
        far = (point.x - answer.x).abs().amax(-1) > share * at.size
        good = point.good & ~far
        best = merge(good & ~best.good, point, best)
        if bool((best.good | far).all()):
            break
        lower, upper, active = wrong
        point = _point(program, point, lower, upper, active)
    return best


def recovered(program: Program, answer: Answer, near: float, *, singly: bool = False) -> Answer:
    """Return the answer with least-squares multipliers of the constraints that are active up to ``near`` times the size of x.

    Constraints with multipliers of the wrong sign are left out: all of them in each round, or with ``singly`` the worst,
    which finds multipliers where many sets of constraints determine one point.
    """
    x = program.inside(answer.x)
    zero = torch.zeros_like(answer.inequality)
    at = measure(program, x, torch.zeros_like(answer.equality), zero)
    gradient, jh, jc = program.split(at.rows)
    c = program.split(at.parts)[2]
    gap = near * at.size.unsqueeze(-1)
    active = c / at.norms > -gap
    held = (x <= program.lower + gap) | (x >= program.upper - gap)
    equality, inequality = answer.equality, zero
    rounds = 1 + c.shape[-1] + (x.shape[-1] if singly else 0)
    for _ in range(rounds):
        free = (~held).to(x)
        jacobian = torch.cat([jh, jc * active.unsqueeze(-1)], dim=1) * free.unsqueeze(1)
        p = jh.shape[1]
        multipliers = _lstsq(jacobian, -gradient * free)
        equality, inequality = multipliers[:, :p], multipliers[:, p:] * active
        slope = gradient + pulled_back(jh, equality) + pulled_back(jc, inequality)
        tiny = _WRONG * at.force.unsqueeze(-1)
        worst = torch.where(active, inequality * at.norms, torch.zeros_like(inequality))
        drop = (worst < -tiny) & (worst <= worst.amin(-1, keepdim=True)) if c.shape[-1] else active
        inward = ((x <= program.lower + gap) & (slope < -tiny)) | ((x >= program.upper - gap) & (slope > tiny))
        inward = inward & held & ~program.fixed
        dropped = drop & active if c.shape[-1] else torch.zeros_like(active)
        if singly:
            pull = torch.where(inward, slope.abs(), torch.zeros_like(slope))
            inward = inward & (pull >= pull.amax(-1, keepdim=True)) & ~dropped.any(-1, keepdim=True)
        if not bool(dropped.any()) and not bool(inward.any()):
            break
        active, held = active & ~dropped, held & ~inward
    return Answer(x, equality, inequality.clamp_min(0), answer.status, answer.iterations)


def polished_without_multipliers(
    program: Program, answer: Answer, ways: Sequence[tuple[float, bool]], these: torch.Tensor | None = None
) -> Polished:
    """Return the answer polished with recovered multipliers, whatever its own: each problem in the first of the ``ways`` in which it is good.

    A way is ``near`` and ``singly`` of :func:`recovered`. The search ends where the problems ``these`` (K,), by default all, are good.
    """
    point: Polished | None = None
    for near, singly in ways:
        found = polish(program, recovered(program, answer, near, singly=singly))
        point = found if point is None else merge(point.good, point, found)
        if bool((point.good if these is None else point.good | ~these).all()):
            break
    assert point is not None
    return point


def _identified(program: Program, x: torch.Tensor, answer: Answer, at: Measures) -> Polished:
    """Return the point with the active set that its multipliers and distances suggest."""
    c = program.split(at.parts)[2]
    gradient, jh, jc = program.split(at.rows)
    slope = gradient + pulled_back(jh, answer.equality) + pulled_back(jc, answer.inequality)
    force, size = at.force.unsqueeze(-1), at.size.unsqueeze(-1)
    active = answer.inequality * at.norms / force > -c / (at.norms * size)
    lower = slope / force > (x - program.lower) / size
    upper = -slope / force > (program.upper - x) / size
    start = Polished(
        x, answer.equality, answer.inequality, slope, lower, upper, active,
        torch.full_like(x, math.nan), torch.zeros(len(x), dtype=torch.bool, device=x.device),
    )  # fmt: skip
    return _point(program, start, lower, upper, active)


def _point(
    program: Program, point: Polished, lower: torch.Tensor, upper: torch.Tensor, active: torch.Tensor
) -> Polished:
    """Return ``point`` with another active set, x on its active bounds and λ = 0 where inactive."""
    lower = lower & ~(upper & ~program.fixed)
    lower, upper = lower | (program.fixed & ~upper), upper
    x = torch.where(lower, program.lower, torch.where(upper, program.upper, point.x))
    inequality = torch.where(active, point.inequality, torch.zeros_like(point.inequality))
    return Polished(
        x, point.equality, inequality, point.slope, lower, upper, active, point.error, torch.zeros_like(point.good)
    )


def _newton(program: Program, point: Polished, steps: int) -> tuple[Polished, Measures]:
    """Return ``point`` after Newton's method on the KKT system of its active set."""
    x, equality, inequality = point.x, point.equality, point.inequality
    error, before = point.error, torch.full_like(x[:, 0], math.inf)
    held = point.at_lower | point.at_upper
    at = measure(program, x, equality, inequality)
    for count in range(steps):
        matrix, right = _system(program, point, at, x, equality, inequality)
        step = solve_symmetric(matrix, right)
        n, p = x.shape[-1], equality.shape[-1]
        # Where equations repeat each other the system is singular, and its solution moves x off its active bounds by rounding.
        dx = torch.where(held, 0.0, step[:, :n])
        length = (dx.abs().amax(-1) / at.size).nan_to_num(math.inf, math.inf)
        moving = (length < 1.0) & ((length < before) | (count < 3))
        mask = moving.unsqueeze(-1)
        error = torch.where(mask, dx, error)
        x = torch.where(mask, x + dx, x)
        equality = torch.where(mask, equality + step[:, n : n + p], equality)
        inequality = torch.where(mask & point.active, inequality + step[:, n + p :], inequality)
        before = torch.where(moving, length, before)
        at = measure(program, x, equality, inequality)
        if bool((~moving | (length <= 1e-14)).all()):
            break
    made = Polished(
        x, equality, inequality, point.slope, point.at_lower, point.at_upper, point.active, error, point.good
    )
    return made, at


def _system(
    program: Program, point: Polished, at: Measures, x: torch.Tensor, equality: torch.Tensor, inequality: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the masked KKT matrix (K, n + p + m, n + p + m), and minus the residual."""
    gradient, jh, jc = program.split(at.rows)
    _, h, c = program.split(at.parts)
    free = (~(point.at_lower | point.at_upper)).to(x)
    active = point.active.to(x)
    slope = gradient + pulled_back(jh, equality) + pulled_back(jc, inequality)
    hessian = at.hessian * free.unsqueeze(1) * free.unsqueeze(2) + torch.diag_embed(1 - free)
    rows = torch.cat([jh, jc * active.unsqueeze(-1)], dim=1) * free.unsqueeze(1)
    corner = torch.diag_embed(torch.cat([torch.zeros_like(h), active - 1], dim=-1))
    matrix = torch.cat([torch.cat([hessian, rows.mT], dim=-1), torch.cat([rows, corner], dim=-1)], dim=1)
    return matrix, -torch.cat([slope * free, h, c * active], dim=-1)


def _judged(
    program: Program, point: Polished, at: Measures
) -> tuple[Polished, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return the point with ``good`` set, and the active set (lower, upper, inequalities) that its signs and violations imply."""
    gradient, jh, jc = program.split(at.rows)
    _, h, c = program.split(at.parts)
    slope = gradient + pulled_back(jh, point.equality) + pulled_back(jc, point.inequality)
    force, size = at.force.unsqueeze(-1), at.size.unsqueeze(-1)
    tiny_force, tiny_size = _WRONG * force, _WRONG * size
    free = ~(point.at_lower | point.at_upper)
    not_fixed = ~program.fixed
    inward_low = point.at_lower & not_fixed & (slope < -tiny_force)
    inward_high = point.at_upper & not_fixed & (slope > tiny_force)
    below, above = free & (point.x < program.lower - tiny_size), free & (point.x > program.upper + tiny_size)
    negative = point.active & (point.inequality * at.norms < -tiny_force)
    violated = ~point.active & (c / at.norms > tiny_size)
    wrong = (inward_low | inward_high | below | above).any(-1) | (negative | violated).any(-1)
    stationary = (slope.abs() * free <= 1e-8 * force).all(-1)
    met = (h.abs() <= 1e-8 * size * jh.norm(dim=-1).clamp_min(1e-8)).all(-1)
    met = met & ((c.abs() / at.norms * point.active) <= 1e-8 * size).all(-1)
    # Huge multipliers show that no constraint qualification holds.
    largest = torch.maximum(_largest(jh.norm(dim=-1) * point.equality), _largest(at.norms * point.inequality))
    bounded = largest <= _UNBOUNDED * gradient.abs().amax(-1) + at.force / _UNBOUNDED
    # A violation as small as above times a large multiplier may still be a large error of f.
    gained = (point.equality * h).abs().sum(-1) + (point.inequality * c * point.active).abs().sum(-1)
    met = met & (gained <= 1e-8 * at.size * (gradient.abs().amax(-1) + at.force / _UNBOUNDED))
    good = ~wrong & stationary & met & bounded & torch.isfinite(slope).all(-1)
    x = torch.where(good.unsqueeze(-1), program.inside(point.x), point.x)
    # The sign of a weakly active constraint's multiplier is rounding: it is set to zero.
    inequality = point.inequality.clamp_min(0)
    inequality = torch.where(good.unsqueeze(-1), inequality, point.inequality)
    made = Polished(
        x, point.equality, inequality, slope, point.at_lower, point.at_upper, point.active, point.error, good
    )
    asked = (
        (point.at_lower & ~inward_low) | below,
        (point.at_upper & ~inward_high) | above,
        (point.active & ~negative) | violated,
    )
    return made, asked


def _largest(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.abs().amax(-1) if numbers.shape[-1] else numbers.new_zeros(len(numbers))


def _lstsq(rows: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return λ (K, r) of least norm that minimises ‖rowsᵀ λ − right‖."""
    if not rows.shape[1]:
        return right.new_zeros(len(right), 0)
    values, vectors = eigh(rows @ rows.mT)
    kept = values > 1e-12 * values.amax(-1, keepdim=True).clamp_min(1e-300)
    inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
    pushed = vectors.mT @ (rows @ right.unsqueeze(-1))
    return (vectors @ (inverse.unsqueeze(-1) * pushed)).squeeze(-1)
