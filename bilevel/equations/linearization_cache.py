"""The linearisation of one call, kept for its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bilevel._torch.transforms import runs_plainly, transforms_active
from bilevel.equations.linearization import Linearization, LinearizationSlot
from bilevel.equations.problem import Problem
from bilevel.equations.system import System
from bilevel.replay import ReplayCache, allowed

__all__ = ["LinearizationCache"]

Tensors = Sequence[torch.Tensor]


@dataclass(eq=False)
class LinearizationCache:
    """The last linearisation of a call. At the same point it serves derivatives of every order and every right-hand side."""

    _key: list[tuple[Any, ...]] | None = None
    _kept: tuple[Any, ...] = ()
    _offered: LinearizationSlot | None = None
    _tapes: ReplayCache | None = None
    _matrix: tuple[torch.Tensor, torch.Tensor] | None = None

    def look(self, needs_grad: tuple[bool, ...]) -> LinearizationSlot | None:
        """Return the slot in which the solver may leave a linearisation, or None if no derivative can follow."""
        self._offered = LinearizationSlot(needs_grad) if True in needs_grad else None
        return self._offered

    def adopt(self, x: torch.Tensor, tensors: Tensors) -> None:
        """Keep the linearisation that the solver left, if it was made at the solution x."""
        look, self._offered = self._offered, None
        self._tapes = None if look is None else look.replays
        self._matrix = None if look is None or transforms_active() else look.matrix
        if look is None or look.linearization is None or transforms_active():
            return
        at = look.linearization.point
        if at is not None and torch.equal(at, x.reshape(at.shape)):
            self._offer_matrix(look.linearization, at)
            self._key = _key(x, tensors)
            self._kept = (look.linearization, look.needs_grad, x.detach(), [t.detach() for t in tensors])

    def linearize(
        self,
        system: System,
        x: torch.Tensor,
        tensors: Tensors,
        needs_grad: Sequence[bool],
        compare: Callable[[Problem, torch.Tensor, torch.Tensor], None] | None,
    ) -> Linearization:
        """Return the linearisation of ``system`` at the solution ``x``; a new one is passed to ``compare``, as (problem, x, R(x))."""
        key = _key(x, tensors)
        if self._key == key and len(key) == 1 + len(tensors):
            linearization, had = self._kept[:2]
            if all(h or not w for h, w in zip(had, needs_grad, strict=True)):
                return linearization
        problem = Problem.of(system, tensors)
        # The solution comes back with the graph of this call, which no evaluation takes part in.
        point = x.detach()
        if self._tapes is not None and allowed() and runs_plainly((point, *problem.tensors)):
            problem = problem.replayed_from(self._tapes)
        flat = point.reshape(problem.batch, problem.size)
        linearization = problem.linearize(flat, needs_grad)
        self._offer_matrix(linearization, point)
        if compare is not None and not transforms_active():
            compare(problem, flat, linearization.residual.detach())
        self._key, self._kept = key, (linearization, tuple(needs_grad), x.detach(), [t.detach() for t in tensors])
        return linearization

    def _offer_matrix(self, linearization: Linearization, point: torch.Tensor) -> None:
        """Spare a dense linear solver the matrices that the judge of convergence has materialised at ``point``."""
        if self._matrix is None or transforms_active():
            return
        at, matrix = self._matrix
        if at.numel() == point.numel() and torch.equal(at, point.reshape(at.shape)):
            linearization.operator.materialize = lambda: matrix


def _key(x: torch.Tensor, tensors: Tensors) -> list[tuple[Any, ...]]:
    # Saved tensors come back as new objects over the same memory. The cache holds them, so that their memory is not reused.
    # A tensor without a data pointer, such as a sparse one, is left out. A key that is too short never matches.
    return [
        (t.data_ptr(), t.shape, t.stride(), t._version)
        for t in (x, *tensors)
        if t.layout is torch.strided and not t.is_inference()
    ]
