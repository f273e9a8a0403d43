"""One sparse quadratic program in numpy and scipy: the conditions of optimality, as in :mod:`bilevel.quadratic_programs._program`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bilevel.quadratic_programs._fewest import fewest
from bilevel.quadratic_programs._kkt import Sizes
from bilevel.quadratic_programs._program import BESIDE

__all__ = ["SparseProgram", "is_convex"]

_EXACT = 1e-10
_WEAK = 1e-9


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, 0.0)


def is_convex(Q: Any) -> bool:
    """Return whether the sparse symmetric matrix Q is positive semidefinite to rounding, by the signs of its pivots."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import splu

    diagonal = Q.diagonal()
    size = np.abs(diagonal).max(initial=0.0)
    beside = np.asarray(abs(Q).sum(axis=1)).ravel() - np.abs(diagonal)
    if (diagonal >= beside).all():  # diagonally dominant
        return True
    if (diagonal < 0).any():
        return False
    shifted = (Q + (1e-10 * size + 1e-300) * sp.eye(Q.shape[0])).tocsc()
    options = {"SymmetricMode": True, "Equil": False}
    try:
        pivots = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options).U.diagonal()
    except RuntimeError:  # an exact zero for a pivot
        return False
    return bool((pivots > 0).all())


@dataclass(frozen=True, eq=False)
class SparseProgram:
    """min ½ xᵀQx + qᵀx  s.t.  Ax = b, Gx ≤ h, lower ≤ x ≤ upper, with CSR matrices."""

    sizes: Sizes
    Q: Any
    A: Any
    G: Any
    q: np.ndarray
    b: np.ndarray
    h: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @cached_property
    def finite(self) -> bool:
        """Whether nothing is NaN, nor infinite where it must not be."""
        parts = (self.Q.data, self.A.data, self.G.data, self.q, self.b)
        return all(np.isfinite(v).all() for v in parts) and not any(
            np.isnan(v).any() for v in (self.h, self.lower, self.upper)
        )

    @cached_property
    def convex(self) -> bool:
        """Whether Q is positive semidefinite to rounding."""
        return is_convex(self.Q)

    @cached_property
    def fixed(self) -> np.ndarray:
        """(n,) bool: unknowns with two equal bounds."""
        return self.lower == self.upper

    @cached_property
    def empty(self) -> np.ndarray:
        """(m + 2n,) bool: inequalities that nothing fulfils, alone or two bounds together."""
        crossed = self.lower > self.upper
        return np.concatenate([self.h == -np.inf, crossed | (self.lower == np.inf), crossed | (self.upper == -np.inf)])

    @cached_property
    def unit(self) -> float:
        """The length of an unknown at which Q weighs as much as q, zero where Q is."""
        curvature = np.abs(self.Q.data).max(initial=0.0)
        return float(np.abs(self.q).max() / curvature) if curvature > 0 else 0.0

    @property
    def equations(self) -> int:
        """The number of equations, fixed unknowns included."""
        return self.sizes.p + int(self.fixed.sum())

    @cached_property
    def kept(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The numbers of the rows, lower and upper bounds that are inequalities."""
        low, up = np.isfinite(self.lower) & ~self.fixed, np.isfinite(self.upper) & ~self.fixed
        return np.flatnonzero(np.isfinite(self.h)), np.flatnonzero(low), np.flatnonzero(up)

    def stacked(self) -> tuple[Any, Any, np.ndarray]:
        """Return the upper triangle of Q, all rows, equations first, and their sides."""
        import scipy.sparse as sp

        rows, low, up = self.kept
        eye = sp.eye(self.sizes.n, format="csr")
        matrix = sp.vstack([self.A, eye[self.fixed], self.G[rows], -eye[low], eye[up]], format="csc")
        side = np.concatenate([self.b, self.lower[self.fixed], self.h[rows], -self.lower[low], self.upper[up]])
        return sp.triu(self.Q, format="csc"), matrix, side

    def point_of(self, x: np.ndarray, z: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the solution of :meth:`stacked` as a point (length,), and the slacks (m + 2n,), infinite where there is no row."""
        n, p, m = self.sizes.n, self.sizes.p, self.sizes.m
        rows, low, up = self.kept
        weights, slack = np.zeros(m + 2 * n), np.full(m + 2 * n, np.inf)
        where = np.concatenate([rows, m + low, m + n + up])
        weights[where], slack[where] = z[self.equations :], s[self.equations :]
        at = np.flatnonzero(self.fixed)
        pull = z[p : self.equations]
        weights[m + at], weights[m + n + at] = np.maximum(-pull, 0), np.maximum(pull, 0)
        return np.concatenate([x, z[:p], weights]), slack

    def ray(self, point: np.ndarray, infeasible: bool) -> tuple[np.ndarray, float]:
        """Return a ray of multipliers or of x, and its value, 0 if it proves nothing."""
        n, p, m = self.sizes.n, self.sizes.p, self.sizes.m
        x, nu, weights = np.split(point, [n, n + p])
        lam, low, up = np.split(weights, [m, m + n])
        if infeasible:
            pulled = abs(self.A.T) @ np.abs(nu) + abs(self.G.T) @ lam
            held = self.A.T @ nu + self.G.T @ lam - low + up
            value = self.b @ nu + _finite(self.h) @ lam - _finite(self.lower) @ low + _finite(self.upper) @ up
            proven = np.abs(held).max() <= 1e-6 * max(pulled.max(initial=0.0), low.max(), up.max())
            return np.concatenate([0 * x, nu, weights]), float(value) if proven else 0.0
        value = self.q @ x
        rows, lows, ups = self.kept
        outside = np.concatenate(
            [(self.G @ x)[rows], -x[lows], x[ups], np.abs(self.A @ x), np.abs(self.Q @ x), np.abs(x[self.fixed])]
        )
        proven = outside.max(initial=0.0) <= 1e-6 * np.abs(x).max()
        return np.concatenate([x, np.zeros(p + m + 2 * n)]), float(value) if proven else 0.0

    def shortened(self, ray: np.ndarray) -> np.ndarray:
        """Return the proof ``ray`` of infeasibility with the multipliers of few rows and bounds."""
        import scipy.sparse as sp

        n, p = self.sizes.n, self.sizes.p
        multipliers = ray[n:]
        eye = sp.identity(n, format="csr")
        rows = sp.vstack([self.A, self.G, -eye, eye]).tocsc()
        sides = np.concatenate([self.b, _finite(self.h), -_finite(self.lower), _finite(self.upper)])
        used = multipliers.nonzero()[0]
        # Multipliers of equations keep their signs.
        signs = np.where(used < p, np.sign(multipliers[used]), 1.0)
        weights = fewest(sp.csc_matrix(rows[used].T.multiply(signs)), sides[used] * signs)
        if weights is None:
            return ray
        made = np.zeros_like(ray)
        made[n + used] = weights * signs
        return made

    @cached_property
    def lengths(self) -> np.ndarray:
        """The largest entry of each row of G."""
        return abs(self.G).max(axis=1).toarray().ravel() if self.sizes.m else np.zeros(0)

    def weights(self, point: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the multipliers (m + 2n,) in units of a slope, and the size of the slopes that they are made of."""
        n, p, m = self.sizes.n, self.sizes.p, self.sizes.m
        weights = point[n + p :].copy()
        weights[:m] *= self.lengths
        size = max(np.abs(self.q).max(), (abs(self.Q) @ np.abs(point[:n])).max(), np.abs(weights).max(initial=0.0))
        return weights, max(size, (abs(self.A.T) @ np.abs(point[n : n + p])).max(initial=0.0))

    def slacks(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return d − Cx (m + 2n,), and the sizes of the numbers of which each is the difference."""
        x = point[: self.sizes.n]
        size = np.abs(x)
        size = np.maximum(size, BESIDE * max(size.max(), self.unit))
        slack = np.concatenate([self.h - self.G @ x, x - self.lower, self.upper - x])
        rows = np.abs(_finite(self.h)) + abs(self.G) @ size
        return slack, np.concatenate([rows, size + np.abs(_finite(self.lower)), size + np.abs(_finite(self.upper))])

    def tight(self, point: np.ndarray, slack: np.ndarray) -> np.ndarray:
        """Return which inequalities (m + 2n,) seem active in an interior solution."""
        weights, size = self.weights(point)
        n, m = self.sizes.n, self.sizes.m
        distance = slack.copy()
        distance[:m] /= np.where(self.lengths > 0, self.lengths, 1.0)
        reach = max(np.abs(point[:n]).max(), np.max(distance, where=np.isfinite(distance), initial=0.0), 1e-300)
        tight = weights / max(size, 1e-300) > distance / reach
        tight[m : m + n] = np.where(self.fixed, weights[m : m + n] >= weights[m + n :], tight[m : m + n])
        tight[m + n :] = np.where(self.fixed, False, tight[m + n :]) | (self.fixed & ~tight[m : m + n])
        tight[m + n :] &= ~tight[m : m + n]
        return tight

    def on(self, point: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Return the point with unknowns exactly at active bounds and multipliers of zero elsewhere."""
        n, m = self.sizes.n, self.sizes.m
        made = point.copy()
        head = n + self.sizes.p
        made[head:][~active] = 0.0
        low, up = active[m : m + n], active[m + n :]
        made[:n] = np.where(low, self.lower, np.where(up, self.upper, made[:n]))
        return made

    def clipped(self, point: np.ndarray) -> np.ndarray:
        """Return the point without multipliers that are negative by rounding; those of fixed unknowns keep their signs."""
        made, head, m = point.copy(), self.sizes.n + self.sizes.p, self.sizes.m
        free = np.concatenate([np.ones(m, dtype=bool), ~self.fixed, ~self.fixed])
        made[head:] = np.where(free, np.maximum(made[head:], 0.0), made[head:])
        return made

    def residual(self, point: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Return R (length,), which vanishes at the solution with this active set."""
        n, m = self.sizes.n, self.sizes.m
        x, nu, lam, low, up = np.split(point, np.cumsum(self.sizes.parts)[:-1])
        top = self.Q @ x + self.q + self.A.T @ nu + self.G.T @ lam - low + up
        general, below, above = np.split(active, [m, m + n])
        rows = np.where(general, self.G @ x - self.h, -lam)
        return np.concatenate(
            [
                top,
                self.A @ x - self.b,
                rows,
                np.where(below, self.lower - x, -low),
                np.where(above, x - self.upper, -up),
            ]
        )

    def lack(self, point: np.ndarray, active: np.ndarray) -> float:
        """Return the largest relative lack of an optimality condition, violations included."""
        left = np.abs(self.residual(point, active))
        n, head = self.sizes.n, self.sizes.n + self.sizes.p
        slack, rows = self.slacks(point)
        _, size = self.weights(point)
        primal = 1 + max(rows.max(initial=0.0), np.abs(self.b).max(initial=0.0))
        outside = max(left[n:].max(initial=0.0), np.where(active, 0.0, -slack).max(initial=0.0))
        negative = np.where(active, -point[head:], 0.0)[
            np.concatenate([np.ones(self.sizes.m, bool), ~self.fixed, ~self.fixed])
        ]
        return float(max(max(left[:n].max(), negative.max(initial=0.0)) / (1 + size), outside / primal))

    def verdict(self, point: np.ndarray, active: np.ndarray) -> tuple[bool, np.ndarray, np.ndarray]:
        """Return whether the point fulfils all conditions, the active set to try next, and the weakly active inequalities."""
        weights, size = self.weights(point)
        slack, scale = self.slacks(point)
        fixed = np.concatenate([np.zeros(self.sizes.m, bool), self.fixed, self.fixed])
        negative = active & (weights < -_EXACT * size) & ~fixed
        violated = ~active & (slack < -_EXACT * scale) & ~fixed
        weak = np.where(active, weights <= _WEAK * size, slack <= _WEAK * scale) & ~fixed
        good = not (negative | violated).any() and self.lack(point, active) <= 1e-9
        return good, (active & ~negative) | violated, weak

    def worst(self, point: np.ndarray, active: np.ndarray, flipped: np.ndarray) -> int:
        """Return which of the inequalities that ``flipped`` changes fulfils its condition least."""
        weights, size = self.weights(point)
        slack, scale = self.slacks(point)
        lack = np.where(active, -weights / size, -slack / scale)
        return int(np.where(flipped != active, lack, -np.inf).argmax())

    def unclear(self, point: np.ndarray) -> np.ndarray:
        """Return the inequalities of which an interior solution does not tell whether they are active."""
        weights, size = self.weights(point)
        slack, scale = self.slacks(point)
        return (np.abs(slack) <= 1e-4 * scale) & (weights <= 1e-4 * size)
