"""A working-set proximal Newton method for a single problem with a term of single entries.

It assumes that few of many unknowns are free at the solution.

Around x, f is replaced by its quadratic model. Rows of the Hessian are computed only for a working set W: the unknowns
that a prox step moves most. These rows give the model's whole gradient for any change in W. The model is therefore
minimised in W with small vectors and matrices, and W grows by the unknowns that a prox step moves at that minimum, without
f. If f is quadratic, the minimum of the model is the solution. Otherwise a new model is made at the new x.

In the spirit of Johnson & Guestrin, "Blitz", ICML 2015, and of Massias, Gramfort, Salmon, "Celer", ICML 2018, with Newton's method inside.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from bilevel._torch.grad_mode import no_graph
from bilevel.prox._entries import Entries
from bilevel.solvers._base import length
from bilevel.solvers.composite.entry_model import Array, EntryModel
from bilevel.solvers.composite.problem import Composite, Iterate
from bilevel.solvers.composite.reduced import Reduced, factorised

__all__ = ["Sparse", "solve_sparse"]

# The smallest number of unknowns, the largest number of free ones at the start, and the largest size of W.
_LEAST_UNKNOWNS, _MOST_FREE, _MOST = 64, 32, 640
# The smallest number of unknowns that join W at once, and the smallest limit of that number.
_LEAST_JOIN, _JOIN = 8, 16
_MOST_ROUNDS = 24
# The number of accelerated steps before Newton's method in a round, and where it follows such steps.
_STEPS, _FEW_STEPS = 16, 5
# The number of rounds with one model until f is known to be quadratic.
_TRIALS = 2


@dataclass(frozen=True, eq=False)
class Sparse:
    """The result: an iterate, the prox step (1, n) from there, the factorised Hessian, its distance (1,) from the iterate, and the rounds."""

    at: Iterate
    move: torch.Tensor
    reduced: Reduced
    distance: torch.Tensor
    rounds: int


def solve_sparse(composite: Composite, init: torch.Tensor) -> Sparse | None:
    """Minimise f + g from ``init`` (1, n). Return None if the method does not apply, or if no decrease was found."""
    n, kind = init.shape[-1], torch.finfo(init.dtype)
    # Places are packed as floats for the rows, and single precision has no larger whole numbers.
    if composite.separable is None or n < _LEAST_UNKNOWNS or kind.bits < 32 or n * kind.eps > 1:
        return None
    with no_graph():
        g = composite.separable.entries(init[0])
        if g is None:
            return None
        x = g.prox(init, kind.tiny**0.5)  # a step that only moves it between the bounds
        return None if int(g.free(x).sum()) > _MOST_FREE else _solved_sparse(composite, g, x)


def _solved_sparse(composite: Composite, g: Entries, x: torch.Tensor) -> Sparse | None:
    start = composite.at(x, x.new_zeros(1))
    if not bool(torch.isfinite(start.value + start.slope.sum())):
        return None
    state = _State.of(composite, g, start)
    more, quadratic = state.moved_most(), False
    for number in range(_MOST_ROUNDS):
        if more is None:
            return None
        state.join(more)
        # While W grows by as many as it may, the accelerated steps alone show what has to join.
        growing = more.shape[0] >= _JOIN
        if state.inner.size > min(_MOST, x.shape[-1]) or not state.minimise(_STEPS, exact=not growing):
            return None
        more = state.moved_most()
        if more is None and growing:
            state.minimise(_FEW_STEPS, exact=True)
            more = state.moved_most()
        if more is not None and (quadratic or len(state.rows) < _TRIALS):
            continue
        at = state.evaluated()
        if at is None:
            return None
        move = state.remaining(at)
        if move is not None:
            return Sparse(at, move.unsqueeze(0), state.reduced(at.x), length(at.x - state.around.x), number + 1)
        quadratic = state.describes(at)
        if more is None or not quadratic:
            state.begin(at)
            more = state.moved_most()
    return None


@dataclass(eq=False)
class _State:
    """The search: a model of f around an iterate, rows of its Hessian, and its minimum in the working set.

    Parameters
    ----------
    composite, g
        f + g, and g as numbers for each entry.
    around, total
        The iterate of the model, and f + g at the last iterate (1,).
    y, slope
        The minimum in W, and the gradient of the model there (n,).
    rows
        The rows of the Hessian in W, in blocks (k_b, n).
    x, slopes, inner
        The parts in W of the iterate, of ∇f there and of ``y`` (k,).
    step
        s, below 1/L in W; infinite if no curvature is known.
    model
        The model in W.
    places, hessian
        W (k,), and the entries of the Hessian in W (k, k); unset while W is empty.
    """

    composite: Composite
    g: Entries
    around: Iterate
    total: torch.Tensor
    y: torch.Tensor
    slope: torch.Tensor
    rows: list[torch.Tensor] = field(default_factory=list)
    x: Array = field(default_factory=lambda: np.empty(0))
    slopes: Array = field(default_factory=lambda: np.empty(0))
    inner: Array = field(default_factory=lambda: np.empty(0))
    step: float = float("inf")
    model: EntryModel | None = None
    places: torch.Tensor = field(init=False)
    hessian: Array = field(init=False)

    @staticmethod
    def of(composite: Composite, g: Entries, at: Iterate) -> _State:
        return _State(composite, g, at, at.value + g.value(at.x[0]), at.x[0], at.slope[0])

    def begin(self, at: Iterate) -> None:
        """Begin a new model around an iterate."""
        self.around, self.y, self.slope, self.rows = at, at.x[0], at.slope[0], []
        self.x = self.slopes = self.inner = np.empty(0)

    def moved_most(self) -> torch.Tensor | None:
        """Return the places outside of W of the unknowns that a prox step moves most; None if it moves none."""
        y, slope, step = self.y, self.slope, self.step
        if step == float("inf"):  # the curvature is unknown yet, but the order of the moves does not depend on the step
            size = float(slope.abs().amax())
            step = (1 + float(y.abs().amax())) / size if size > 0 else 1.0
        scores = self.g.prox(torch.add(y, slope, alpha=-step), step).sub_(y).abs_()
        size = self.inner.size
        if size:
            scores.index_fill_(0, self.places, -1.0)
            free = int(np.count_nonzero(self.inner))
        else:
            mask = self.g.free(y)
            scores.masked_fill_(mask, torch.inf)
            free = int(mask.sum())
        if not float(scores.amax()) > 0:
            return None
        # Powers of two, so that few recorded programs are needed for the rows.
        best = scores.topk(min(_power_of_two(max(_JOIN, free)), y.shape[0] - size))
        moved = sum(move > 0 for move in best.values.tolist())
        return best.indices[: max(_LEAST_JOIN, _power_of_two(moved))]

    def join(self, more: torch.Tensor) -> None:
        """Add unknowns to W."""
        rows, old = self.composite.objective.some_rows(self.around.x, more), self.inner.size
        self.rows.append(rows)
        self.places = torch.cat([self.places, more]) if old else more
        x, slope = (_array(v[0].index_select(0, more)) for v in (self.around.x, self.around.slope))
        self.x, self.slopes = np.concatenate([self.x, x]), np.concatenate([self.slopes, slope])
        self.inner = np.concatenate([self.inner, x])  # the minimum in W moves no unknown outside of it
        block = _array(rows.index_select(1, self.places))
        new = 0.5 * (block[:, old:] + block[:, old:].T)
        if old:
            known, self.hessian = self.hessian, np.empty((block.shape[1], block.shape[1]))
            self.hessian[:old, :old], self.hessian[old:, :old], self.hessian[:old, old:] = (
                known,
                block[:, :old],
                block[:, :old].T,
            )
            self.hessian[old:, old:] = new
        else:
            self.hessian = new

    def minimise(self, steps: int, *, exact: bool) -> bool:
        """Move to the minimum of the model in W, or near it unless ``exact``; return whether the model has a curvature."""
        at, slope = self.around.x[0], self.around.slope[0]
        self.model = EntryModel.of(self.g.at(self.places), self.x, self.slopes, self.hessian, self.step)
        if self.model is None:
            return False
        self.step = self.model.step
        self.inner = self.model.minimised(self.inner, steps) if exact else self.model.descended(self.inner, steps)
        both = torch.from_numpy(np.stack([self.inner, self.inner - self.x])).to(at)
        self.y = at.index_copy(0, self.places, both[0])
        first = 0
        for rows in self.rows:
            last = first + rows.shape[0]
            slope = torch.addmv(slope, rows.mT, both[1, first:last])
            first = last
        self.slope = slope
        return True

    def evaluated(self) -> Iterate | None:
        """Return the iterate at the minimum of the model; None if f + g has risen."""
        at = self.composite.at(self.y.unsqueeze(0), self.y.new_full((1,), self.step))
        before, self.total = self.total, at.value + self.g.value(self.y)
        return at if bool(self.total <= before + 1e-9 * before.abs()) else None

    def remaining(self, at: Iterate) -> torch.Tensor | None:
        """Return the prox step (n,) from the minimum of the model; None if it does not vanish up to rounding and the accuracy of the model."""
        y, slope = self.y, at.slope[0]
        move = self.g.prox(torch.add(y, slope, alpha=-self.step), self.step).sub_(y)
        small = float(move.abs().amax()) <= 1e-7 * (float(y.abs().amax()) + self.step * float(slope.abs().amax()))
        return move if small else None

    def describes(self, at: Iterate) -> bool:
        """Return whether the model's gradient at its minimum is that of f, up to rounding."""
        difference = length(self.slope - at.slope)
        most = max(1e-10, 128 * torch.finfo(self.y.dtype).eps)
        return bool(difference <= most * (length(at.slope) + length(self.around.slope)))

    def reduced(self, x: torch.Tensor) -> Reduced:
        """Return the factorised Hessian of the local model at ``x`` (1, n), which lies at the minimum in W."""
        assert self.model is not None
        free, matrix = self.model.free_hessian(self.inner)
        index = self.places[torch.from_numpy(free).to(x.device)]
        return factorised(
            x, self.g.free(self.y).unsqueeze(0), index.unsqueeze(0), None, torch.from_numpy(matrix).to(x).unsqueeze(0)
        )


def _array(t: torch.Tensor) -> Array:
    made: Array = t.numpy(force=True).astype(np.float64, copy=False)
    return made


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
