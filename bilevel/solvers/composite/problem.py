"""min f(x) + g(x) for solvers: a batch of flat problems with a smooth objective and a proximal operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.equations.problem import Problem
from bilevel.prox._flat import FlatTerm

__all__ = ["Composite", "Iterate"]


@dataclass(frozen=True, eq=False)
class Composite:
    """f + g, all tensors (batch, n) or (batch,), without a graph.

    Parameters
    ----------
    objective
        f, smooth.
    model
        The equation R = 0 that is differentiated: the gradient of the local model Φ, or the residual of the proximal
        fixed point.
    prox
        (v, step (batch,)) ↦ prox_{step·g}(v).
    value
        x ↦ g(x) (batch,). This and all below are None for terms without a manifold.
    margin
        (x, ∇f(x), step) ↦ the distance of x from degeneracy (batch,).
    retract
        (x, y) ↦ Π(y), with the retraction of the manifold that x lies on.
    free
        x ↦ bool (batch, n): the unknowns that are not fixed on the manifold of x.
    entries
        (x, places (batch, k)) ↦ the entries (batch, k, k) of the Hessian of Φ at these places.
    proven_zero, proven_nonzero, convexity
        (∇f, bounds of its change) ↦, (x, distance (batch,)) ↦ bool (batch, n) and x ↦ c (batch, n): see :class:`bilevel.prox.Term`.
    separable
        The term of a single problem, if it is a sum of functions of one unknown each; else None.
    entrywise
        Whether the terms of all problems are such sums.
    """

    objective: Problem
    model: Problem
    prox: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    value: Callable[[torch.Tensor], torch.Tensor] | None = None
    margin: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    retract: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    free: Callable[[torch.Tensor], torch.Tensor] | None = None
    entries: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    proven_zero: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    proven_nonzero: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    convexity: Callable[[torch.Tensor], torch.Tensor] | None = None
    separable: FlatTerm | None = None
    entrywise: bool = False

    def step(self, x: torch.Tensor, slope: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return T(x) = prox_{step·g}(x − step · slope)."""
        return self.prox(x - step.unsqueeze(-1) * slope, step)

    def known_free(self, x: torch.Tensor) -> torch.Tensor:
        """Return the unknowns that are not fixed on the manifold of x, bool (batch, n)."""
        assert self.free is not None
        return self.free(x)

    def at(self, x: torch.Tensor, step: torch.Tensor) -> Iterate:
        """Return the iterate at ``x``."""
        value, slope = self.objective.value_and_residual(x)
        return Iterate(x, value, slope, step)

    def total(self, at: Iterate) -> torch.Tensor:
        """Return f + g (batch,) at an iterate that lies in the domain of g."""
        assert self.value is not None
        return at.value + self.value(at.x)


@dataclass(frozen=True, eq=False)
class Iterate:
    """A point with the value and gradient of f.

    Parameters
    ----------
    x, value, slope
        x (batch, n), f(x) (batch,) and ∇f(x) (batch, n).
    step
        A step size s (batch,) with which proximal gradient steps descend, about 1/L.
    """

    x: torch.Tensor
    value: torch.Tensor
    slope: torch.Tensor
    step: torch.Tensor
