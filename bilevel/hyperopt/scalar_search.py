"""Minimise a smooth function of one variable by its derivative, where there may be several basins.

The curve of the cross-validation loss over one log-strength can have more than one basin, or be lowest at an
end. So the search looks everywhere first, and then uses derivatives where it pays:

1. *Probe* the interval at equal distances, from right to left (from strong to weak regularisation, so that
   each inner solve starts at a solution that is near).
2. Between two neighbours, the values and slopes at both ends define a cubic. Where it has a minimum inside,
   that minimum is the interval's *promise*.
3. Evaluate where the lowest promise is, which makes two intervals of one, and so on. Near a minimum the cubic
   is accurate to fourth order in the interval's length, so that a basin takes three or four evaluations.
4. Stop when no promise is below the best value seen by more than a tolerance, or the budget is spent.

A dip so narrow that neither the values nor the slopes at the probes show it is not found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import bilevel

__all__ = ["Point", "ScalarSearch", "minimise_scalar"]


@dataclass(frozen=True)
class Point:
    """One evaluation: where, the value and the derivative there."""

    x: float
    value: float
    slope: float


@dataclass(frozen=True)
class ScalarSearch:
    """What :func:`minimise_scalar` found.

    Parameters
    ----------
    best
        The evaluated point of least value.
    points
        Every evaluation, in order.
    stopped
        Why the search ended, in words.
    at_end
        Whether the least value is at an end of the interval, with the curve falling towards the outside.
    """

    best: Point
    points: tuple[Point, ...]
    stopped: str
    at_end: bool


def minimise_scalar(
    function: Callable[[float], tuple[float, float]],
    low: float,
    high: float,
    *,
    probes: int = 9,
    max_evaluations: int = 24,
    tolerance: float = 1e-9,
) -> ScalarSearch:
    """Minimise ``function`` on [low, high]; the module's page gives the method.

    Parameters
    ----------
    function
        Takes x, returns the value and the derivative. A value that is not finite is never the best.
    low, high
        The interval.
    probes
        Equidistant points to begin with, the ends included.
    max_evaluations
        In all, probes included.
    tolerance
        A promise of less than this, relative to the best value, is not worth an evaluation.

    Raises
    ------
    bilevel.ArgumentError
        If the interval is empty, or there are fewer than two probes.

    Examples
    --------
    >>> found = minimise_scalar(lambda x: ((x - 1) ** 2, 2 * (x - 1)), -4, 4, probes=3)
    >>> found.best.x, len(found.points)
    (1.0, 4)
    """
    if not low < high:
        raise bilevel.ArgumentError(f"minimise_scalar: expected low < high, got {low} and {high}; exchange them")
    if probes < 2 or max_evaluations < probes:
        raise bilevel.ArgumentError(
            f"minimise_scalar: expected at least 2 probes and as many evaluations, got {probes} and {max_evaluations}; "
            "write for example probes=9, max_evaluations=40"
        )
    points: list[Point] = []

    def evaluate(x: float) -> Point:
        value, slope = function(x)
        points.append(Point(x, value, slope))
        return points[-1]

    inner = [high - (high - low) * i / (probes - 1) for i in range(1, probes - 1)]
    probed = [evaluate(x) for x in (high, *inner, low)][::-1]  # the ends exactly, by which they are known again
    intervals = [_Interval(left, right) for left, right in itertools.pairwise(probed)]
    stopped = f"the budget of {max_evaluations} evaluations is spent"
    while len(points) < max_evaluations:
        lowest = min(map(_value, points))
        noise = 1e-13 * max((abs(point.value) for point in points if math.isfinite(point.value)), default=0)
        chosen = min(intervals, key=lambda interval: interval.promise)
        if not chosen.promise < lowest - max(tolerance * abs(lowest), noise):
            stopped = "no interval promises a lower value"
            break
        middle = evaluate(chosen.proposal)
        intervals.remove(chosen)
        intervals += [_Interval(chosen.left, middle), _Interval(middle, chosen.right)]
    best = min(points, key=_value)
    at_end = (best.x == low and best.slope > 0) or (best.x == high and best.slope < 0)
    return ScalarSearch(best, tuple(points), stopped, at_end)


def _value(point: Point) -> float:
    return point.value if math.isfinite(point.value) else math.inf


@dataclass(frozen=True)
class _Interval:
    """Two neighbouring points, and the minimum inside of the cubic that they define."""

    left: Point
    right: Point

    @property
    def proposal(self) -> float:
        return self.left.x + self._minimum()[0] * (self.right.x - self.left.x)

    @property
    def promise(self) -> float:
        return self._minimum()[1]

    def _minimum(self) -> tuple[float, float]:
        """Return where on [0, 1], and how low: infinite if not inside.

        With t from 0 to 1, p(t) = v + m t + b t² + a t³; p'(t) = 0 and p''(t) > 0 at t = (√(b² − 3 a m) − b)
        / (3 a).
        """
        width = self.right.x - self.left.x
        v, m, rise = self.left.value, self.left.slope * width, self.right.value - self.left.value
        a, b = m + self.right.slope * width - 2 * rise, 3 * rise - 2 * m - self.right.slope * width
        inside = b * b - 3 * a * m
        if not (math.isfinite(inside) and inside > 0):
            return 0.5, math.inf
        root = math.sqrt(inside)
        # Two forms of one root: take the one without cancellation.
        t = -m / (b + root) if b > 0 else (root - b) / (3 * a) if a != 0 else math.nan
        return (t, v + t * (m + t * (b + t * a))) if 0 < t < 1 else (0.5, math.inf)
