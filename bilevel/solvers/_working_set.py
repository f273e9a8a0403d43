"""A working-set proximal Newton method for one problem with a separable term: few unknowns of many are free at the solution.

Around x, f is taken for its quadratic model. Rows of the Hessian are made for a working set W alone, the unknowns that a prox step moves most.
They give the model's whole gradient for any change in W, so that the model is minimised by small vectors and matrices, without f: accelerated
proximal steps find the manifold, and Newton's method ends on it. Where f is a quadratic, that is all. Otherwise the model is made again at the
new x.

In the spirit of Johnson & Guestrin, "Blitz", ICML 2015, and of Massias, Gramfort, Salmon, "Celer", ICML 2018, with Newton's method inside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bilevel.prox._flat import FlatTerm
from bilevel.solvers._base import length
from bilevel.solvers._composite import Composite, Iterate
from bilevel.solvers._reduced import Reduced, factorised

__all__ = ["Sparse", "solve_sparse"]

# How many unknowns there have to be, how many join the working set at once, and how many it may hold.
_LEAST_UNKNOWNS, _JOIN, _MOST = 64, 32, 256
_MOST_ROUNDS, _MOST_SWEEPS, _MOST_NEWTON = 16, 6, 8
# Accelerated steps before Newton's method: in the first round, in later ones, and after Newton's method failed.
_FIRST_STEPS, _STEPS, _MORE_STEPS = 6, 2, 15
# How many power steps estimate the largest eigenvalue, and what is added to the estimate.
_POWER_STEPS, _MARGIN = 5, 1.1


@dataclass(frozen=True, eq=False)
class Sparse:
    """Where the method ended: an iterate, the factorised Hessian, how far (1,) it was made from there, and the rounds taken."""

    at: Iterate
    reduced: Reduced
    distance: torch.Tensor
    rounds: int


@torch.no_grad()
def solve_sparse(composite: Composite, x: torch.Tensor) -> Sparse | None:
    """Minimise f + g from ``x`` (1, n); None where the method has nothing to gain, or no decrease was found."""
    g = composite.separable
    if g is None or x.shape[-1] < _LEAST_UNKNOWNS or torch.finfo(x.dtype).bits < 32:
        return None
    if int(_free(g, x[0]).sum()) > _JOIN:
        return None
    at = composite.at(x, x.new_zeros(1))
    if not bool(torch.isfinite(at.value + at.slope.sum())):
        return None
    model = _Model(g, x[0], at.slope[0], float("inf"))
    total = at.value + g.value(x[0])
    for number in range(_MOST_ROUNDS):
        grown = model.grown(composite, at)
        if grown is None:
            return None
        model = grown
        y = model.minimised(at.x[0], _STEPS if number else _FIRST_STEPS)
        at = composite.at(y.unsqueeze(0), x.new_full((1,), model.step))
        before, total = total, at.value + g.value(y)
        if not bool(total <= before + 1e-9 * before.abs()):
            return None
        slope, expected = at.slope[0], model.slope_at(y)
        size = slope.norm() + model.slope.norm()
        # No part of the prox step may be left, but what rounding and the model's own accuracy leave.
        move = (g.prox(y - model.step * slope, at.step[0]) - y).abs().amax()
        if bool(move <= 1e-7 * (y.abs().amax() + model.step * slope.abs().amax())):
            return Sparse(at, model.reduced(y), length(at.x - model.x), number + 1)
        if not bool((expected - slope).norm() <= 1e-10 * size):
            model = _Model(g, y, slope, model.step)
    return None


@dataclass(frozen=True, eq=False)
class _Model:
    """f + g around x: ⟨∇f, y − x⟩ + ½ ⟨y − x, H (y − x)⟩ + g(y), for y that differ from x in W alone.

    Parameters
    ----------
    g
        The term.
    x, slope
        x (n,) and ∇f(x).
    step
        s, below 1/L in W.
    places, rows
        W (k,), and the rows of H for it (k, n).
    inside
        Bool (n,): what is in W.
    """

    g: FlatTerm
    x: torch.Tensor
    slope: torch.Tensor
    step: float
    places: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    inside: torch.Tensor | None = None

    @cached_property
    def length(self) -> torch.Tensor:
        """s, as a tensor."""
        return self.x.new_tensor(self.step)

    def slope_at(self, y: torch.Tensor) -> torch.Tensor:
        """Return ∇f + H (y − x) (n,)."""
        assert self.places is not None and self.rows is not None
        return self.slope + (y - self.x)[self.places] @ self.rows

    def grown(self, composite: Composite, at: Iterate) -> _Model | None:
        """Return the model with more unknowns in W, those that a prox step moves most; None if W would be too large."""
        y, slope = at.x[0], at.slope[0]
        if self.step == float(
            "inf"
        ):  # nothing is known of the curvature yet: the longest moves are the longest for any step
            size = float(slope.abs().amax())
            step = (1 + float(y.abs().amax())) / size if size > 0 else 1.0
        else:
            step = self.step
        scores = (self.g.prox(y - step * slope, y.new_tensor(step)) - y).abs()
        scores = torch.where(_free(self.g, y), torch.inf, scores)
        if self.inside is not None:
            scores = torch.where(self.inside, -1.0, scores)
        if not bool((scores > 0).any()):
            return self if self.places is not None else None
        new = scores.topk(_JOIN).indices  # always as many, so that one recorded program makes the rows
        rows = composite.objective.some_rows(self.x.unsqueeze(0), new)
        if self.places is not None and self.rows is not None:
            new, rows = torch.cat([self.places, new]), torch.cat([self.rows, rows])
        if len(new) > min(_MOST, len(y)):
            return None
        inside = torch.zeros_like(y, dtype=torch.bool)
        inside[new] = True
        largest = _largest(rows[:, new])
        step = min(self.step, 1 / largest) if largest > 0 else self.step
        return replace(self, places=new, rows=rows, inside=inside, step=step) if step < float("inf") else None

    def minimised(self, y: torch.Tensor, steps: int) -> torch.Tensor:
        """Return the minimiser over W, found from ``y``."""
        for _ in range(_MOST_SWEEPS):
            y = self._descended(y, steps)
            slope = self.slope_at(y)
            value = self._value(y, slope)
            for _ in range(_MOST_NEWTON):
                ahead, final = self._newton(y, slope)
                if ahead is None:
                    break
                after = self.slope_at(ahead)
                new = self._value(ahead, after)
                if not new <= value + 1e-12 * abs(value):
                    break
                y, slope, value = ahead, after, new
                if final:
                    return y
            steps = _MORE_STEPS
        return y

    def _prox(self, y: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        assert self.inside is not None
        return torch.where(self.inside, self.g.prox(torch.add(y, slope, alpha=-self.step), self.length), y)

    def _descended(self, y: torch.Tensor, steps: int) -> torch.Tensor:
        """Return ``y`` after accelerated proximal steps, with restarts."""
        x, t = y, 1.0
        for _ in range(steps):
            new = self._prox(y, self.slope_at(y))
            moved = new - x
            if float((y - new) @ moved) > 0:
                t, y = 1.0, new
            else:
                following = 0.5 * (1 + (1 + 4 * t * t) ** 0.5)
                y = torch.add(new, moved, alpha=(t - 1) / following)
                t = following
            x = new
        return x

    def _newton(self, y: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """Return the prox step from Newton's on the manifold of ``y``, and whether that is the minimiser; None where H is not positive definite."""
        back = self._prox(y, slope)
        free, curvature = self._manifold(y, slope)
        if free.numel() == 0:
            return back, bool((back == y).all())
        # R, as the prox step from y tells it: T(y) − y = −s R / (1 + s K).
        residual = (y - back)[free] * (1 / self.step + curvature)
        factor, info = torch.linalg.cholesky_ex(self._matrix(free, curvature))
        if int(info):
            return None, False
        ahead = y.index_add(0, free, torch.cholesky_solve(residual.unsqueeze(-1), factor).squeeze(-1), alpha=-1)
        new = self._prox(ahead, self.slope_at(ahead))
        # The model is quadratic on its manifold: where the prox changes nothing any more, that was the solution.
        return new, bool((new - ahead).abs().amax() <= 1e-11 * ahead.abs().amax())

    def _manifold(self, y: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the free unknowns of W, and the curvature K of g there (k,)."""
        assert self.inside is not None
        free = (_free(self.g, y) & self.inside).nonzero().squeeze(-1)
        if self.g.is_flat:
            return free, y.new_zeros(len(free))
        # A separable term's prox has slopes 1 / (1 + s K): a difference tells them, exactly where it is piecewise linear.
        u, step = y - self.step * slope, self.length
        h = torch.where(u < 0, -1.0, 1.0) * (1e-3 * u.abs() + 1e-6 * u.abs().amax())
        shrink = ((self.g.prox(u + h, step) - self.g.prox(u, step)) / h)[free]
        curvature = (1 / shrink - 1) / self.step
        return free, torch.where((curvature > 1e-9 / self.step) & torch.isfinite(curvature), curvature, 0.0)

    def _matrix(self, free: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
        assert self.places is not None and self.rows is not None
        place = torch.empty(len(self.x), dtype=torch.int64, device=self.x.device)
        place[self.places] = torch.arange(len(self.places), device=self.x.device)
        matrix = self.rows[place[free]][:, free]
        matrix = 0.5 * (matrix + matrix.mT)
        matrix.diagonal().add_(curvature)
        return matrix

    def _value(self, y: torch.Tensor, slope: torch.Tensor) -> float:
        """Return the model, but for a constant; ``slope`` is its gradient at ``y``."""
        smooth = 0.5 * ((y - self.x) @ (self.slope + slope))
        return float(smooth + self.g.value(y))

    def reduced(self, y: torch.Tensor) -> Reduced:
        """Return the factorised Hessian of the local model at ``y``, a minimiser."""
        free, curvature = self._manifold(y, self.slope_at(y))
        everything = _free(self.g, y)
        matrix = self._matrix(free, curvature).unsqueeze(0)
        return factorised(y.unsqueeze(0), everything.unsqueeze(0), free.unsqueeze(0), None, matrix)


def _free(g: FlatTerm, y: torch.Tensor) -> torch.Tensor:
    free = g.manifold(y).free
    assert free is not None
    return free


def _largest(matrix: torch.Tensor) -> float:
    """Return a number that is probably above the largest eigenvalue of a positive semidefinite matrix."""
    v = matrix.sum(dim=-1) + matrix.diagonal()
    for _ in range(_POWER_STEPS):
        v = matrix @ (v / v.norm())
    return _MARGIN * float(v.norm())
