"""Initial guesses of the next solves: the inner solution and the adjoint at a new θ, extrapolated from earlier points.

By the implicit function theorem φ* and q* are differentiable in θ. The new step in θ is written as a combination of earlier steps, and the same
combination of their changes of φ and q is added. This costs no gradient and no product. In tuning runs the result is three to ten times
nearer to the solutions than the last point.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.factorisations import solve

__all__ = ["PointHistory", "combination"]

Outer: TypeAlias = tuple[torch.Tensor, ...]

_MOST_POINTS = 6
_MOST_BYTES = 2**28
# A step whose part outside the span of the others is smaller than this is not used.
_LEAST_NEW = 0.1


class PointHistory:
    """The last points of a run, with θ, φ and q of each. Rejected trial points are kept too."""

    def __init__(self) -> None:
        self.points: deque[tuple[Outer, Any, Any]] = deque(maxlen=_MOST_POINTS)

    def add(self, outer: Outer, inner: Any, adjoint: Any) -> None:
        """Keep a point, unless it is not finite."""
        point = pytree.tree_map(lambda leaf: leaf.detach().clone(), (outer, inner, adjoint))
        leaves = pytree.tree_leaves(point)
        if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
            return
        room = _MOST_BYTES // max(1, sum(leaf.numel() * leaf.element_size() for leaf in leaves))
        while self.points and len(self.points) >= room:
            self.points.popleft()
        self.points.append(point)

    def start(self, outer: Outer) -> tuple[Any, Any] | None:
        """Return the initial guesses of φ and q at θ; None if there is no earlier point."""
        if not self.points:
            return None
        outers, inners, adjoints = zip(*self.points, strict=True)
        weights = combination(outers, outer).tolist()

        def mixed(*leaves: torch.Tensor) -> torch.Tensor:
            return torch.stack([w * leaf for w, leaf in zip(weights, leaves, strict=True)]).sum(0)

        return pytree.tree_map(mixed, *inners), pytree.tree_map(mixed, *adjoints)

    def state_dict(self) -> list[list[Any]]:
        """Return the points, in types that can be loaded without running code."""
        return [[list(outer), inner, adjoint] for outer, inner, adjoint in self.points]

    @staticmethod
    def of(state: list[list[Any]]) -> PointHistory:
        """Return what :meth:`state_dict` described."""
        trail = PointHistory()
        trail.points.extend((tuple(outer), inner, adjoint) for outer, inner, adjoint in state)
        return trail


def combination(points: Sequence[Outer], target: Outer) -> torch.Tensor:
    """Return weights (m,) of sum one with Σ w_j θ_j near ``target``.

    With θ_0 the nearest of the ``points`` and d_j = θ_j − θ_0, the weights of the others are the c of least
    ‖(target − θ_0) − Σ c_j d_j‖. The d_j are taken in the order of their length, as what is near says most; one that adds less than
    a tenth of its length to those before it is left out, since errors of φ and q would be multiplied by large numbers.
    In directions in which no step was made, the combination stays at θ_0.

    Parameters
    ----------
    points
        θ_j, the tensors of each.
    target
        θ.

    Examples
    --------
    >>> import torch
    >>> t = lambda *numbers: (torch.tensor(numbers, dtype=torch.float64),)
    >>> combination([t(0.0, 5.0), t(1.0, 5.0)], t(2.0, 5.0)).tolist()  # on along a line
    [-1.0, 2.0]
    >>> combination([t(0.0, 5.0), t(1.0, 5.0)], t(1.0, 6.0)).tolist()  # aside
    [0.0, 1.0]
    """
    # (m, p) for each tensor; half precision would not hold the squares.
    stacks = [torch.stack(leaves) for leaves in zip(*points, strict=True)]
    stacks = [stack if stack.dtype == torch.float64 else stack.float() for stack in stacks]
    away = torch.zeros(len(points), dtype=torch.float64)
    for stack, x in zip(stacks, target, strict=True):
        away += (stack - x).reshape(len(stack), -1).square().sum(1).cpu()
    nearest = int(away.argmin())
    gram = torch.zeros(len(points), len(points), dtype=torch.float64)  # ⟨d_i, d_j⟩
    slope = torch.zeros(len(points), dtype=torch.float64)  # ⟨d_j, target − θ_0⟩
    for stack, x in zip(stacks, target, strict=True):
        steps = (stack - stack[nearest]).reshape(len(stack), -1)
        gram += (steps @ steps.T).cpu()
        slope += (steps @ (x - stack[nearest]).reshape(-1).to(steps)).cpu()
    used = _independent(gram)
    weights = torch.zeros_like(slope)
    if used:
        weights[used] = solve(gram[used][:, used], slope[used].unsqueeze(-1)).squeeze(-1)
    weights[nearest] = 1.0 - weights.sum()
    return weights


def _independent(gram: torch.Tensor) -> list[int]:
    """Return which steps of this Gram matrix (m, m) span the rest, the shortest first: its Cholesky factor, row by row."""
    used: list[int] = []
    rows: list[torch.Tensor] = []  # of the factor, for all columns
    for j in gram.diagonal().argsort().tolist():
        row = gram[j] - sum((before[j] * before for before in rows), torch.zeros_like(gram[j]))
        if row[j] > _LEAST_NEW**2 * gram[j, j] > 0:
            used.append(j)
            rows.append(row / row[j].sqrt())
    return used
