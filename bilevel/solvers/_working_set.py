"""A working-set proximal Newton method for a single problem with a separable term. It assumes that few of many unknowns are free at the solution.

Around x, f is replaced by its quadratic model. Rows of the Hessian are computed only for a working set W: the unknowns
that a prox step moves most. These rows give the model's whole gradient for any change in W. The model is therefore
minimised with small vectors and matrices, without f. Accelerated proximal steps find the manifold, and Newton's method
finishes on it. If f is quadratic, this is the solution. Otherwise a new model is made at the new x.

In the spirit of Johnson & Guestrin, "Blitz", ICML 2015, and of Massias, Gramfort, Salmon, "Celer", ICML 2018, with Newton's method inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bilevel.prox._flat import FlatTerm
from bilevel.solvers._base import length
from bilevel.solvers._composite import Composite, Iterate
from bilevel.solvers._reduced import Reduced, factorised

__all__ = ["Sparse", "solve_sparse"]

Free: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# The smallest number of unknowns, the smallest and the first number that join the working set at once, and its largest
# size.
_LEAST_UNKNOWNS, _LEAST_JOIN, _JOIN, _MOST = 64, 8, 32, 640
_MOST_ROUNDS, _MOST_SWEEPS, _MOST_NEWTON = 16, 6, 8
# The numbers of accelerated steps before Newton's method: in the first round, in later ones, and after Newton's method
# failed.
_FIRST_STEPS, _STEPS, _MORE_STEPS = 12, 5, 15
# The number of power steps that estimate the largest eigenvalue, and the factor of the estimate.
_POWER_STEPS, _MARGIN = 5, 1.1


@dataclass(frozen=True, eq=False)
class Sparse:
    """The result: an iterate, the factorised Hessian, its distance (1,) from the iterate, and the number of rounds."""

    at: Iterate
    reduced: Reduced
    distance: torch.Tensor
    rounds: int


@torch.no_grad()
def solve_sparse(composite: Composite, x: torch.Tensor) -> Sparse | None:
    """Minimise f + g from ``x`` (1, n). Return None if the method does not apply, or if no decrease was found."""
    g = composite.separable
    if g is None or x.shape[-1] < _LEAST_UNKNOWNS or torch.finfo(x.dtype).bits < 32:
        return None
    free_of = _free_with(g, x[0])
    if int(free_of(x[0]).sum()) > _JOIN:
        return None
    at = composite.at(x, x.new_zeros(1))
    if not bool(torch.isfinite(at.value + at.slope.sum())):
        return None
    around, total, step = at, at.value + g.value(x[0]), float("inf")
    places: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    for number in range(_MOST_ROUNDS):
        more = _moved_most(g, free_of, at, step, places, _JOIN << max(0, number - 2))
        if more is None and (places is None or rows is None):
            return None
        if more is not None:
            made = composite.objective.some_rows(around.x, more)
            known = places is not None and rows is not None
            places = torch.cat([places, more]) if known and places is not None else more
            rows = torch.cat([rows, made]) if known and rows is not None else made
        assert places is not None and rows is not None
        model = _Model.of(g, around, places, rows, step)
        if model is None or len(places) > min(_MOST, x.shape[-1]):
            return None
        step = model.step
        inner = model.minimised(at.x[0, places], _STEPS if number else _FIRST_STEPS)
        y = at.x[0].index_copy(0, places, inner)
        at = composite.at(y.unsqueeze(0), x.new_full((1,), step))
        before, total = total, at.value + g.value(y)
        if not bool(total <= before + 1e-9 * before.abs()):
            return None
        slope = at.slope[0]
        # The prox step has to vanish up to rounding and the accuracy of the model.
        move = (g.prox(torch.add(y, slope, alpha=-step), at.step[0]) - y).abs().amax()
        if bool(move <= 1e-7 * (y.abs().amax() + step * slope.abs().amax())):
            reduced = model.reduced(at.x, free_of(y), inner)
            return Sparse(at, reduced, length(at.x - around.x), number + 1)
        expected = around.slope[0] + (inner - model.x) @ rows
        if not bool((expected - slope).norm() <= 1e-10 * (slope.norm() + around.slope.norm())):
            around, places, rows = at, None, None
    return None


def _moved_most(
    g: FlatTerm, free_of: Free, at: Iterate, step: float, known: torch.Tensor | None, many: int
) -> torch.Tensor | None:
    """Return the places of the ``many`` unknowns, besides the ``known``, that a prox step moves most; None if it moves none."""
    y, slope = at.x[0], at.slope[0]
    if step == float("inf"):  # the curvature is unknown yet, but the order of the moves does not depend on the step
        size = float(slope.abs().amax())
        step = (1 + float(y.abs().amax())) / size if size > 0 else 1.0
    scores = (g.prox(torch.add(y, slope, alpha=-step), y.new_tensor(step)) - y).abs()
    scores = scores.masked_fill(free_of(y), torch.inf)
    if known is not None:
        scores[known] = -1.0
    best = scores.topk(min(many, len(y) - (0 if known is None else len(known))))
    moved = int((best.values > 0).sum())
    # Powers of two, so that few recorded programs are needed for the rows.
    return best.indices[: max(_LEAST_JOIN, 1 << (moved - 1).bit_length())] if moved else None


@dataclass(frozen=True, eq=False)
class _Model:
    """f + g around x in the unknowns of W: ⟨∇f, y − x⟩ + ½ ⟨y − x, H (y − x)⟩ + g(y), all vectors (k,).

    Parameters
    ----------
    g
        The term of these unknowns.
    x, slope, hessian
        x, ∇f(x) and H (k, k).
    step
        s, below 1/L in W.
    prox
        v ↦ prox_{sg}(v).
    free_of
        y ↦ the free entries of its manifold.
    places
        W.
    """

    g: FlatTerm
    x: torch.Tensor
    slope: torch.Tensor
    hessian: torch.Tensor
    step: float
    prox: Callable[[torch.Tensor], torch.Tensor]
    free_of: Free
    places: torch.Tensor

    @staticmethod
    def of(g: FlatTerm, around: Iterate, places: torch.Tensor, rows: torch.Tensor, step: float) -> _Model | None:
        """Return the model around an iterate; None if it has no curvature, or if the term cannot be split."""
        part, hessian = g.at(places), rows[:, places]
        hessian = 0.5 * (hessian + hessian.mT)
        largest = _largest(hessian)
        step = min(step, 1 / largest) if largest > 0 else step
        if part is None or not step < float("inf"):
            return None
        x, slope = around.x[0, places], around.slope[0, places]
        prox, free_of = part.prox_with(x.new_tensor(step), x), _free_with(part, x)
        return _Model(part, x, slope, hessian, step, prox, free_of, places)

    def minimised(self, y: torch.Tensor, steps: int) -> torch.Tensor:
        """Return the minimiser; the search begins at ``y``."""
        for _ in range(_MOST_SWEEPS):
            y = self._descended(y, steps)
            slope = self._slope_at(y)
            value = self._value(y, slope)
            for _ in range(_MOST_NEWTON):
                ahead, final = self._newton(y, slope)
                if ahead is None:
                    break
                if final:
                    return ahead
                after = self._slope_at(ahead)
                new = self._value(ahead, after)
                if not new <= value + 1e-12 * abs(value):
                    break
                y, slope, value = ahead, after, new
            steps = _MORE_STEPS
        return y

    def _slope_at(self, y: torch.Tensor) -> torch.Tensor:
        """Return ∇f + H (y − x)."""
        return torch.addmv(self.slope, self.hessian, y - self.x)

    def _prox(self, y: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return self.prox(torch.add(y, slope, alpha=-self.step))

    def _descended(self, y: torch.Tensor, steps: int) -> torch.Tensor:
        """Return ``y`` after accelerated proximal steps, with restarts."""
        x, t = y, 1.0
        # y − s (∇f + H (y − x)) as one product.
        matrix = torch.mul(self.hessian, -self.step)
        matrix.diagonal().add_(1.0)
        shift = self.x - matrix @ self.x - self.step * self.slope
        for _ in range(steps):
            new = self.prox(torch.addmv(shift, matrix, y))
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
        """Return the prox step after Newton's step on the manifold of ``y``, and whether it is the minimiser; None if H is not positive definite."""
        back = self._prox(y, slope)
        free, curvature = self._manifold(y, slope)
        if free.numel() == 0:
            return back, bool((back == y).all())
        # R, as the prox step from y tells it: T(y) − y = −s R / (1 + s K).
        gap = (y - back)[free]
        residual = gap / self.step if curvature is None else gap * (1 / self.step + curvature)
        factor, info = torch.linalg.cholesky_ex(self._matrix(free, curvature))
        if int(info):
            return None, False
        ahead = y.index_add(0, free, torch.cholesky_solve(residual.unsqueeze(-1), factor).squeeze(-1), alpha=-1)
        new = self._prox(ahead, self._slope_at(ahead))
        # The model is quadratic on its manifold. If the prox changes nothing, the solution is found.
        return new, bool((new - ahead).abs().amax() <= 1e-11 * ahead.abs().amax())

    def _manifold(self, y: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the free unknowns, and the curvature K of g there; None if there are none."""
        free = self.free_of(y).nonzero().squeeze(-1)
        if self.g.is_flat:
            return free, None
        # The prox of a separable term has slopes 1 / (1 + s K). A difference gives them, and is exact if the prox is
        # piecewise linear.
        u = torch.add(y, slope, alpha=-self.step)
        h = torch.where(u < 0, -1.0, 1.0) * (1e-3 * u.abs() + 1e-6 * u.abs().amax())
        shrink = ((self.prox(u + h) - self.prox(u)) / h)[free]
        curvature = (1 / shrink - 1) / self.step
        return free, torch.where((curvature > 1e-9 / self.step) & torch.isfinite(curvature), curvature, 0.0)

    def _matrix(self, free: torch.Tensor, curvature: torch.Tensor | None) -> torch.Tensor:
        matrix = self.hessian[free][:, free]
        if curvature is not None:
            matrix.diagonal().add_(curvature)
        return matrix

    def _value(self, y: torch.Tensor, slope: torch.Tensor) -> float:
        """Return the model up to a constant; ``slope`` is its gradient at ``y``."""
        smooth = 0.5 * ((y - self.x) @ (self.slope + slope))
        return float(smooth + self.g.value(y))

    def reduced(self, x: torch.Tensor, everything: torch.Tensor, y: torch.Tensor) -> Reduced:
        """Return the factorised Hessian of the local model at ``x`` (1, n), with free unknowns ``everything`` (n,), whose part in W is ``y``."""
        free, curvature = self._manifold(y, self._slope_at(y))
        matrix = self._matrix(free, curvature).unsqueeze(0)
        return factorised(x, everything.unsqueeze(0), self.places[free].unsqueeze(0), None, matrix)


def _free_with(g: FlatTerm, like: torch.Tensor) -> Free:
    free_of = g.free_with(like)

    def free(y: torch.Tensor) -> torch.Tensor:
        found = free_of(y)
        assert found is not None
        return found

    return free


def _largest(matrix: torch.Tensor) -> float:
    """Return a probable upper bound of the largest eigenvalue of a positive semidefinite matrix."""
    size = matrix.abs().amax()
    scaled = matrix / size
    v = scaled.sum(dim=-1) + scaled.diagonal()
    for _ in range(_POWER_STEPS - 1):
        v = scaled @ v
    norm = torch.linalg.vector_norm
    return _MARGIN * float(size * norm(scaled @ v) / norm(v))
