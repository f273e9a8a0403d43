"""The jumps of the total variation prox: a batched active-set method, and the taut string for what it does not settle.

With u the dual variable, the solution of min ½‖x − v‖² + t Σ|x_{i+1} − x_i| has Σ_{k ≤ i}(x_k − v_k) = t u_i, u_i ∈ sign(x_{i+1} − x_i). The sign of
each jump, 0 for none, determines x: on each segment without a jump x is the mean of v, shifted by the jumps at both ends.
"""

from __future__ import annotations

import torch

__all__ = ["jumps", "segment_means"]

_MAX_STEPS = 50
_ROUNDING = 1e-13


def jumps(v: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor]:
    """Return the sign of each jump (..., n − 1) of the solution for v (..., n) and t (..., 1)."""
    shape, n = v.shape, v.shape[-1]
    rows, t = v.reshape(-1, n).double(), threshold.reshape(-1, 1).double()
    signs = torch.where(t > 0, torch.zeros_like(rows[:, 1:]), rows.diff(dim=-1).sign())
    active = ((t > 0) & torch.isfinite(rows).all(-1, keepdim=True) & torch.isfinite(t)).squeeze(-1)
    for _ in range(_MAX_STEPS):
        if not bool(active.any()):
            break
        new = _improved(rows[active], t[active], signs[active])
        changed = (new != signs[active]).any(-1)
        signs[active] = new
        active[active.clone()] = changed
    for row in active.nonzero().reshape(-1).tolist():
        found = _taut_string(rows[row].tolist(), float(t[row]))
        signs[row] = torch.tensor(found, dtype=signs.dtype, device=signs.device)
    return (signs.reshape(*shape[:-1], n - 1).to(v.dtype),)


def _improved(v: torch.Tensor, t: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return the signs that the solution for ``signs`` asks for: the same ones, if it is the solution (a primal-dual active-set step)."""
    x = segment_means(v, t, signs)
    dual = (x - v).cumsum(-1)[:, :-1]
    slack = _ROUNDING * (v.abs().sum(-1, keepdim=True) + t)
    kept = torch.where(signs * x.diff(dim=-1) > 0, signs, 0.0)
    entering = torch.where(dual.abs() > t + slack, dual.sign(), 0.0)
    return torch.where(signs != 0, kept, entering)


def segment_means(v: torch.Tensor, threshold: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return the x (..., n) whose jumps have these signs (..., n − 1): equal on each segment, and linear in v and t (..., 1)."""
    ends = torch.nn.functional.pad(signs, (0, 1)) - torch.nn.functional.pad(signs, (1, 0))
    labels = torch.nn.functional.pad((signs != 0).to(torch.int64), (1, 0)).cumsum(-1)
    zero = torch.zeros_like(v)
    sums = zero.scatter_add(-1, labels, v + threshold * ends)
    counts = zero.scatter_add(-1, labels, torch.ones_like(v)).clamp(min=1)
    return (sums / counts).gather(-1, labels)


def _taut_string(v: list[float], t: float) -> list[float]:
    """Return the sign of each jump, from the shortest path in the tube of radius t around the cumulative sums of v (Davies and Kovac 2001).

    ``upper`` and ``lower`` are the convex and the concave chain from the end of the path so far. Where a new point makes them cross,
    the path goes on along the chain that is in its way. It jumps up where it touches the upper side of the tube.
    """
    n, sums = len(v), [0.0]
    for entry in v:
        sums.append(sums[-1] + entry)
    signs = [0.0] * (n - 1)
    upper, lower = [(0, 0.0)], [(0, 0.0)]
    for i in range(1, n + 1):
        width = t if i < n else 0.0
        _add((i, sums[i] + width), upper, lower, 1.0, signs)
        _add((i, sums[i] - width), lower, upper, -1.0, signs)
    return signs


def _add(
    point: tuple[int, float],
    own: list[tuple[int, float]],
    other: list[tuple[int, float]],
    side: float,
    signs: list[float],
) -> None:
    """Add a point to a chain; ``side`` is 1 for the convex upper chain, −1 for the concave lower one."""
    while len(own) > 1 and side * (_slope(own[-2], own[-1]) - _slope(own[-1], point)) >= 0:
        own.pop()
    if len(own) == 1:
        while len(other) > 1 and side * (_slope(other[0], other[1]) - _slope(other[0], point)) > 0:
            del other[0]
            if other[0][0] < point[0]:
                signs[other[0][0] - 1] = -side
            own[0] = other[0]
    if own[0][0] < point[0]:
        own.append(point)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
