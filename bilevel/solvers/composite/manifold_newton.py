"""Newton's method on the active manifold of a composite problem f + g, and the error of a point.

At x, the local model Φ is f + g on the manifold that x lies on. Its gradient R and its Hessian give the next Newton
step, −H⁻¹R. They do not know other manifolds. Whether x is on the right manifold is decided by the prox step r = T(x) −
x, which is zero only at solutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel.equations.linearization import Linearization
from bilevel.solvers._base import length, merge
from bilevel.solvers.composite.problem import Composite, Iterate
from bilevel.solvers.composite.reduced import Reduced, reduce
from bilevel.solvers.judging.error import symmetric_error
from bilevel.solvers.parts.truncated_cg import truncated_cg
from bilevel.tolerance import Target

__all__ = ["Assessment", "Known", "Polished", "allowed_error", "assess", "polish", "prox_step", "reached"]

_MOST_STEPS = 30
_MOST_TRIALS = 4
_KRYLOV_STEPS, _KRYLOV_ACCURACY = 500, 1e-2
# The last Hessian is reused if the Newton step is shorter than the last one by this factor.
_CHORD = 0.1


@dataclass(frozen=True, eq=False)
class Known:
    """A Hessian that was factorised near an iterate, and the Newton step (batch, n) before it."""

    reduced: Reduced
    newton: torch.Tensor


@dataclass(frozen=True, eq=False)
class Assessment:
    """The estimated errors of an iterate, per problem.

    Parameters
    ----------
    newton
        d = −H⁻¹R (batch, n), on the manifold of x: minus the error of x to first order, if the solution is on that
        manifold.
    move
        r = T(x) − x (batch, n).
    slope
        R (batch, n).
    usable
        Bool (batch,): H is positive semidefinite, and R is in its range.
    indefinite
        Bool (batch,): H has a negative eigenvalue beyond rounding.
    reduced
        The factorised Hessian, if it was made.
    linearization
        The linearisation of the local model at x.
    """

    newton: torch.Tensor
    move: torch.Tensor
    slope: torch.Tensor
    usable: torch.Tensor
    indefinite: torch.Tensor
    reduced: Reduced | None
    linearization: Linearization

    def good(self, at: Iterate, allowed: torch.Tensor) -> torch.Tensor:
        """Return where both steps are at most ``allowed`` (batch, n), as bool (batch,)."""
        near = self.usable & (self.newton.abs() <= allowed).all(dim=-1)
        if not bool(near.any()):
            return near
        still = self.move.abs() <= allowed
        if bool(still.all()):
            return near
        eps = torch.finfo(allowed.dtype).eps
        rounding = 16 * eps * (at.x.abs() + at.step.unsqueeze(-1) * at.slope.abs())
        most = torch.maximum(allowed, self.newton.abs().amax(dim=-1, keepdim=True))
        return near & (self.move.abs() <= torch.maximum(most, rounding)).all(dim=-1)


def allowed_error(x: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the error allowed in each unknown (batch, n)."""
    return target.rtol * x.abs() + target.atol


def prox_step(composite: Composite, at: Iterate) -> tuple[Iterate, torch.Tensor]:
    """Return the iterate at x⁺ = T(x), and an element of ∂(f + g)(x⁺): (x − x⁺)/s − ∇f(x) + ∇f(x⁺), both (batch, n)."""
    new = composite.at(composite.step(at.x, at.slope, at.step), at.step)
    return new, (at.x - new.x) / at.step.unsqueeze(-1) - at.slope + new.slope


def assess(
    composite: Composite,
    at: Iterate,
    active: torch.Tensor,
    last: Assessment | Known | None = None,
    move: torch.Tensor | None = None,
) -> Assessment:
    """Return the :class:`Assessment` of the ``active`` problems (batch,). The factors of the ``last`` one are reused if they fit.

    ``move``: the prox step r from there (batch, n), if it is known.
    """
    linear = _linearization(composite, at.x)
    slope = linear.residual.detach()
    move = composite.step(at.x, at.slope, at.step) - at.x if move is None else move
    never = torch.zeros_like(active)
    if last is not None and last.reduced is not None and last.reduced.fits(composite, at.x):
        newton = -last.reduced.solve(slope)
        if bool((~active | (length(newton) <= _CHORD * length(last.newton))).all()):
            sound = last.reduced.sound
            return Assessment(newton, move, slope, sound, ~sound, last.reduced, linear)
    reduced = reduce(composite, at.x, linear)
    if reduced is None:
        accuracy = torch.full_like(at.step, _KRYLOV_ACCURACY)
        steps = min(2 * slope.shape[-1], _KRYLOV_STEPS)
        newton, definite = truncated_cg(linear.operator, slope, accuracy, steps, active & (length(slope) > 0))
        usable = definite & torch.isfinite(newton).all(dim=-1)
        return Assessment(newton, move, slope, usable, ~definite, None, linear)
    if bool(reduced.sound.all()):
        return Assessment(-reduced.solve(slope), move, slope, reduced.sound, never, reduced, linear)
    # A singular or an indefinite Hessian. Its eigenvalues decide which, and give the minimum-norm solution.
    found = symmetric_error(composite.model, reduced.matrix, reduced.gather(at.x), reduced.gather(slope))
    newton = -reduced.insert(found.error, slope)
    usable = ~found.indefinite & torch.isfinite(newton).all(dim=-1)
    return Assessment(newton, move, slope, usable, found.indefinite, reduced, linear)


def _linearization(composite: Composite, x: torch.Tensor) -> Linearization:
    """Return the linearisation of the local model at ``x``, and keep it for a derivative if one follows."""
    slot = composite.model.linearization_slot
    if slot is None:
        return composite.model.linearize(x)
    slot.linearization = composite.model.linearize(x, slot.needs_grad)
    return slot.linearization


@dataclass(frozen=True, eq=False)
class Polished:
    """The result of Newton's method.

    Parameters
    ----------
    at, subgradient
        The iterate, and an element of ∂(f + g) there (batch, n).
    assessment
        Of that iterate.
    done
        Bool (batch,): the error is at most the allowed one.
    iterations
        int64 (batch,).
    """

    at: Iterate
    subgradient: torch.Tensor
    assessment: Assessment
    done: torch.Tensor
    iterations: torch.Tensor


def polish(
    composite: Composite,
    at: Iterate,
    subgradient: torch.Tensor,
    target: Target,
    active: torch.Tensor,
    most: int = _MOST_STEPS,
    known: Known | None = None,
) -> Polished:
    """Take Newton steps on the manifold of x while f + g falls. A prox step follows each, and may change the manifold.

    Parameters
    ----------
    at, subgradient
        What :func:`prox_step` returns.
    target
        The accuracy asked for.
    active
        The problems to solve, bool (batch,).
    most
        The largest number of steps. 0: only assess the iterate.
    known
        A factorised Hessian that may be reused.
    """
    steps = torch.zeros(active.shape, dtype=torch.int64, device=active.device)
    found = assess(composite, at, active, known)
    total = composite.total(at)
    done = active & reached(found, at, subgradient, target)
    pending = active & ~done & found.usable
    for _ in range(most):
        if not bool(pending.any()):
            break
        new, new_total, new_subgradient, accepted = _search(composite, at, total, found, pending)
        steps = steps + accepted
        pending = pending & accepted
        if not bool(pending.any()):
            break
        at, total = merge(accepted, new, at), torch.where(accepted, new_total, total)
        subgradient = torch.where(accepted.unsqueeze(-1), new_subgradient, subgradient)
        found = assess(composite, at, pending, found)
        done = done | (pending & reached(found, at, subgradient, target))
        pending = pending & ~done & found.usable
    return Polished(at, subgradient, found, done, steps)


def reached(found: Assessment, at: Iterate, subgradient: torch.Tensor, target: Target) -> torch.Tensor:
    """Return where an iterate with this subgradient of f + g is as accurate as asked, bool (batch,)."""
    if target.rtol:
        return found.good(at, allowed_error(at.x, target))
    return length(subgradient) <= target.absolute


def _search(
    composite: Composite, at: Iterate, total: torch.Tensor, found: Assessment, pending: torch.Tensor
) -> tuple[Iterate, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the longest tried Newton step along which f + g falls, f + g and a subgradient there, and where such a step exists (batch,)."""
    assert composite.retract is not None
    eps = torch.finfo(total.dtype).eps
    t = torch.ones_like(total)
    best, best_total, best_subgradient = at, total, found.slope
    accepted = torch.zeros_like(pending)
    for _ in range(_MOST_TRIALS):
        left = pending & ~accepted
        ahead = torch.where(left.unsqueeze(-1), at.x + t.unsqueeze(-1) * found.newton, at.x)
        trial = composite.at(composite.retract(at.x, ahead), at.step)
        new, subgradient = prox_step(composite, trial)
        value = composite.total(new)
        rounding = 16 * eps * (total.abs() + value.abs())
        falls = value < total - rounding
        # If values differ only by rounding, the prox steps decide.
        level = left & ~falls & (value <= total + rounding)
        if bool(level.any()):
            move = composite.step(new.x, new.slope, new.step) - new.x
            falls = falls | (level & (length(move) < 0.9 * length(found.move)))
            # At the solution of a quadratic on its manifold, steps are zero.
            falls = falls | (level & (length(new.x - ahead) <= 0.1 * length(found.newton)))
        held = left & falls & torch.isfinite(new.slope).all(dim=-1)
        best, best_total = merge(held, new, best), torch.where(held, value, best_total)
        best_subgradient = torch.where(held.unsqueeze(-1), subgradient, best_subgradient)
        accepted = accepted | held
        if bool((accepted | ~pending).all()):
            break
        t = torch.where(accepted, t, 0.3 * t)
    return best, best_total, best_subgradient, accepted
