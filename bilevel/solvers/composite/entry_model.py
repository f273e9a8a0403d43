"""A quadratic model plus a term of single entries, minimised with numpy, whose operations on small arrays cost less than torch's.

Accelerated proximal steps find the manifold, and Newton's method finishes on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from bilevel.prox._entries import Entries

__all__ = ["EntryModel"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_MOST_SWEEPS, _MOST_NEWTON = 30, 8
# A step lowers the model if it does so by more than its rounding.
_FALL = 1e-14
# Up to this order a row sum bounds the largest eigenvalue well enough. Above, power steps estimate it, and the estimate is multiplied by the factor.
_FEW, _POWER_STEPS, _MARGIN = 32, 4, 1.1
# The number of accelerated steps doubles up to this one.
_MOST_STEPS = 40


@dataclass(frozen=True, eq=False)
class EntryModel:
    """f(x) + ⟨∇f, y − x⟩ + ½ ⟨y − x, H (y − x)⟩ + g(y), in double precision.

    Parameters
    ----------
    g
        The term.
    x, slope
        The point of the model and ∇f there (k,).
    hessian
        H (k, k), symmetric.
    step
        s, below 1/L.
    """

    g: Entries
    x: Array
    slope: Array
    hessian: Array
    step: float

    @staticmethod
    def of(g: Entries, x: Array, slope: Array, hessian: Array, step: float) -> EntryModel | None:
        """Return the model with a step size of at most ``step``; None if it has no curvature."""
        largest = _largest(hessian)
        step = min(step, 1 / largest) if largest > 0 else step
        return EntryModel(g, x, slope, hessian, step) if step < float("inf") else None

    def minimised(self, y: Array, steps: int) -> Array:
        """Return the minimiser; the search begins at ``y`` with this number of accelerated steps."""
        for _ in range(_MOST_SWEEPS):
            y = self.descended(y, steps)
            slope = self.slope_at(y)
            value = self._value(y, slope)
            for _ in range(_MOST_NEWTON):
                ahead = self._newton(y, slope, value)
                if ahead is None:
                    break
                y, slope, value, whole = ahead
                if whole is None:
                    return y
                if not whole:
                    break
            steps = min(2 * steps, _MOST_STEPS)
        return y

    def slope_at(self, y: Array) -> Array:
        """Return ∇f + H (y − x)."""
        return self.slope + self.hessian @ (y - self.x)

    def free_hessian(self, y: Array) -> tuple[Array, Array]:
        """Return the places (r,) of the entries that are free on the manifold of y, and the Hessian (r, r) of the model on it."""
        free = self.g.free(y).nonzero()[0]
        matrix = self.hessian[free[:, None], free]
        if self.g.l2 is not None:
            matrix.reshape(-1)[:: len(free) + 1] += _of(self.g.l2, free)
        return free, matrix

    def _prox(self, y: Array, slope: Array) -> Any:
        return self.g.prox(y - self.step * slope, self.step)

    def descended(self, y: Array, steps: int) -> Array:
        """Return ``y`` after accelerated proximal steps, with restarts."""
        x, t = y, 1.0
        # y − s (∇f + H (y − x)) as one product.
        matrix = -self.step * self.hessian
        matrix.reshape(-1)[:: len(y) + 1] += 1.0
        shift = self.x - matrix @ self.x - self.step * self.slope
        for _ in range(steps):
            new = self.g.prox(matrix @ y + shift, self.step)
            moved = new - x
            if (y - new) @ moved > 0:
                t, y = 1.0, new
            else:
                following = 0.5 * (1 + (1 + 4 * t * t) ** 0.5)
                y = new + (t - 1) / following * moved
                t = following
            x = new
        return x

    def _newton(self, y: Array, slope: Array, value: float) -> tuple[Array, Array, float, bool | None] | None:
        """Return a lower point after a Newton step on the manifold of ``y``, the slope and the value there, and whether it is the minimiser.

        None if there is no lower point.
        """
        free, matrix = self.free_hessian(y)
        slopes = (slope + self.g.slope(y, np.sign(y)))[free]
        change = _solved(matrix, -slopes)
        if change is None:  # more free unknowns than the rank of H, which accelerated steps make fewer
            return None
        ahead = y.copy()
        ahead[free] += change
        new = self._prox(ahead, self.slope_at(ahead))
        after = self.slope_at(new)
        lower = self._value(new, after)
        # The model is quadratic on its manifold. If the prox changes nothing, the solution is found.
        if lower <= value + 1e-12 * abs(value) and abs(new - ahead).max() <= 1e-11 * abs(ahead).max():
            return new, after, lower, None
        least = value - _FALL * abs(value)
        if lower < least:
            return new, after, lower, True
        new = self._along(y, free, change, slopes, matrix)
        after = self.slope_at(new)
        lower = self._value(new, after)
        return (new, after, lower, False) if lower < least else None

    def _along(self, y: Array, free: Array, change: Array, slopes: Array, matrix: Array) -> Array:
        """Return the minimiser of the model from ``y`` along a ``change`` (r,) of its free entries, at most all of it.

        The slope along it jumps where an entry meets a kink: at zero by 2 l1 |change|, and at a bound, which ends it, without limit.
        """
        part, g = y[free], self.g
        kinks = [(0.0, 2 * _of(g.l1, free) * abs(change))] if g.l1 is not None else []
        kinks += [(_of(bound, free), np.inf) for bound in (g.lower, g.upper) if bound is not None]
        with np.errstate(divide="ignore", invalid="ignore"):
            times = np.concatenate([np.zeros(0), *((kink - part) / change for kink, _ in kinks)])
        jumps = np.concatenate([np.zeros(0), *(np.broadcast_to(jump, part.shape) for _, jump in kinks)])
        values = np.concatenate([np.zeros(0), *(np.broadcast_to(kink, part.shape) for kink, _ in kinks)])
        met = ((times > 0) & (times <= 1)).nonzero()[0]
        met = met[times[met].argsort()]
        first, second = float(slopes @ change), float(change @ matrix @ change)
        after = first + jumps[met].cumsum()
        place = int((after + second * times[met] >= 0).argmax()) if len(met) else 0
        place = place if len(met) and after[place] + second * times[met[place]] >= 0 else len(met)
        before = float(after[place - 1]) if place else first
        time = min(1.0, -before / second) if second > 0 else 1.0
        at_kink = place < len(met) and times[met[place]] <= time
        new = y.copy()
        new[free] += (times[met[place]] if at_kink else time) * change
        if at_kink:
            new[free[met[place] % len(free)]] = values[met[place]]
        return new

    def _value(self, y: Array, slope: Array) -> float:
        """Return the model up to a constant; ``slope`` is its gradient at ``y``."""
        return float(0.5 * ((y - self.x) @ (self.slope + slope)) + self.g.value(y))


def _of(numbers: Any, places: Array) -> Any:
    return numbers if np.ndim(numbers) == 0 else numbers[places]


def _solved(matrix: Array, right: Array) -> Array | None:
    """Return the solution of a positive definite system; None if the matrix is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    if info.item():
        return None
    return torch.cholesky_solve(torch.from_numpy(right[:, None]), factor).numpy()[:, 0]


def _largest(matrix: Array) -> float:
    """Return a probable upper bound of the largest eigenvalue of a positive semidefinite matrix."""
    size = float(abs(matrix).sum(axis=0).max())
    if len(matrix) <= _FEW or not 0 < size < float("inf"):
        return size
    v = matrix.sum(axis=0) / size + matrix.diagonal() / size
    for _ in range(_POWER_STEPS):
        v, before = matrix @ v / size, v
    return min(size, _MARGIN * size * float((v @ v) / (before @ before)) ** 0.5)
