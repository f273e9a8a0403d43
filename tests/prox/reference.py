"""Proximal points from another solver: each term as a cone program, by Clarabel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import clarabel
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]
Block = tuple[object, Array, Array]


def solve(quadratic: Array, linear: Array, blocks: Sequence[Block]) -> Array:
    """Return the minimiser of ½ xᵀ diag(quadratic) x + linearᵀ x with E x + f in a cone, for each block (cone, E, f)."""
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    matrix = sparse.csc_matrix(np.concatenate([-np.atleast_2d(block[1]) for block in blocks]))
    right = np.concatenate([np.atleast_1d(block[2]) for block in blocks])
    cones = [block[0] for block in blocks]
    solver = clarabel.DefaultSolver(sparse.diags(quadratic).tocsc(), linear, matrix, right, cones, settings)
    return np.array(solver.solve().x)


def positive(rows: Array, offset: Array | float = 0.0) -> Block:
    rows = np.atleast_2d(rows)
    return clarabel.NonnegativeConeT(len(rows)), rows, np.broadcast_to(offset, len(rows)).astype(float)


def zero(rows: Array, offset: Array | float) -> Block:
    rows = np.atleast_2d(rows)
    return clarabel.ZeroConeT(len(rows)), rows, np.broadcast_to(offset, len(rows)).astype(float)


def second_order(rows: Array, offset: Array | float = 0.0) -> Block:
    return clarabel.SecondOrderConeT(len(rows)), rows, np.broadcast_to(offset, len(rows)).astype(float)


def lifted(
    v: Array, extra: Array, blocks: Callable[[Array, Array], Sequence[Block]], ridge: Array | float = 0.0
) -> Array:
    """Return the x of the minimiser of ½‖x − v‖² + ½ ridge ‖x‖² + extraᵀt; ``blocks`` gets the rows that pick x and t."""
    n, count = v.size, len(extra)
    unit = np.eye(n + count)
    quadratic = np.concatenate([np.ones(n) + ridge, np.zeros(count)])
    linear = np.concatenate([-v.reshape(-1), extra])
    return solve(quadratic, linear, blocks(unit[:n], unit[n:]))[:n].reshape(v.shape)


def l1(v: Array, step: float, strength: Array, ridge: Array | float = 0.0) -> Array:
    weights = step * np.broadcast_to(strength, v.shape).reshape(-1)
    return lifted(v, weights, lambda x, t: [positive(t - x), positive(t + x)], step * np.asarray(ridge))


def group_l2(v: Array, step: float, strength: Array, groups: Sequence[Sequence[int]]) -> Array:
    weights = step * np.broadcast_to(strength, len(groups))

    def blocks(x: Array, t: Array) -> list[Block]:
        return [second_order(np.concatenate([t[i : i + 1], x[list(group)]])) for i, group in enumerate(groups)]

    return lifted(v, weights, blocks)


def linf(v: Array, step: float, strength: Array) -> Array:
    return lifted(v, np.array([step * float(strength)]), lambda x, t: [positive(t - x), positive(t + x)])


def total_variation(v: Array, step: float, strength: Array) -> Array:
    def blocks(x: Array, t: Array) -> list[Block]:
        return [positive(t - np.diff(x, axis=0)), positive(t + np.diff(x, axis=0))]

    return lifted(v, np.full(v.size - 1, step * float(strength)), blocks)


def l1_ball(v: Array, radius: Array) -> Array:
    def blocks(x: Array, t: Array) -> list[Block]:
        return [positive(t - x), positive(t + x), positive(-t.sum(0), float(radius))]

    return lifted(v, np.zeros(v.size), blocks)


def projection(v: Array, blocks: Callable[[Array], Sequence[Block]]) -> Array:
    return lifted(v, np.zeros(0), lambda x, t: blocks(x))


def triangle(order: int) -> tuple[Array, Array, Array]:
    """Return the rows, columns and weights of the entries of Clarabel's vectors of symmetric matrices."""
    pairs = [(i, j) for j in range(order) for i in range(j + 1)]
    weights = [1.0 if i == j else 2**0.5 for i, j in pairs]
    return np.array([i for i, _ in pairs]), np.array([j for _, j in pairs]), np.array(weights)


def psd(v: Array) -> Array:
    rows, columns, weights = triangle(len(v))
    symmetric = (v + v.T) / 2
    found = solve(
        np.ones(len(rows)), -(weights * symmetric[rows, columns]), [(clarabel.PSDTriangleConeT(len(v)), np.eye(len(rows)), np.zeros(len(rows)))]
    )  # fmt: skip
    made = np.zeros_like(v)
    made[rows, columns] = made[columns, rows] = found / weights
    return made


def nuclear(v: Array, step: float, strength: Array) -> Array:
    """‖X‖_* is the least (tr W₁ + tr W₂)/2 with [[W₁, X], [Xᵀ, W₂]] positive semidefinite."""
    n, order = len(v), sum(v.shape)
    rows, columns, weights = triangle(order)
    inside = (rows < n) & (columns >= n)
    target = np.where(inside, v[np.where(inside, rows, 0), np.where(inside, columns - n, 0)], 0.0)
    cost = np.where(rows == columns, 0.5 * step * float(strength), 0.0)
    found = solve(
        inside / weights**2, -target / weights * inside + cost, [(clarabel.PSDTriangleConeT(order), np.eye(len(rows)), np.zeros(len(rows)))]
    )  # fmt: skip
    made = np.zeros_like(v)
    made[rows[inside], columns[inside] - n] = (found / weights)[inside]
    return made
