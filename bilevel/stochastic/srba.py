"""SRBA: SOBA's directions with the recursive variance reduction of SARAH."""

from __future__ import annotations

from typing import Any

from bilevel.setting_checks import check_number
from bilevel.stochastic._adjoint import AdjointMethod, single_loop_directions
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import Tensors, add, clone, norm, subtract
from bilevel.stochastic._method import Directions, Problem
from bilevel.stochastic._recursive import Periodic, Reference
from bilevel.stochastic._variables import Point

__all__ = ["SRBA"]


class SRBA(AdjointMethod):
    """Add to the last directions what they change on a minibatch: Δ_t = D(u_t) − D(u_{t−1}) + Δ_{t−1}, anew every ``period`` steps.

    At a beginning one evaluation on a large batch, with two forward and three reverse passes; twice as many passes on a minibatch in
    other steps. Memory: two points and one set of directions, whatever the number of minibatches. No index is needed.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.AdjointMethod`.
    period
        Steps from one beginning to the next.
    reference
        A function without arguments that returns the large batches (inner, outer) of a beginning, best the whole data sets. None: the
        batches given to ``step`` are used; ``wants_large_batch`` says when they should be large.
    adjoint_radius
        Project the adjoint onto the ball of this radius after each step, as the paper's analysis does; None: do not.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.AdjointMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Dagréou, Moreau, Vaiter, Ablin, "A lower bound and a near-optimal algorithm for bilevel empirical risk minimization",
    arXiv:2302.08766, 2023 (AISTATS 2024), Algorithm 1 (SRBA); Nguyen et al., "SARAH", ICML 2017.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import SRBA
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = SRBA(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    _STATE = ("_last_inner", "_last_outer", "_last_adjoint", "_estimate")

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        period: int = 16,
        reference: Reference | None = None,
        adjoint_radius: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        if adjoint_radius is not None:
            check_number(self.where, "adjoint_radius", adjoint_radius)
        self.adjoint_radius = adjoint_radius
        self._periodic = Periodic(period, reference, self.where)
        self._last_inner: Tensors = []
        self._last_outer: Tensors = []
        self._last_adjoint: Tensors = []
        self._estimate: Tensors = []

    @property
    def wants_large_batch(self) -> bool:
        """Whether the next step begins anew, and is best given a large batch."""
        return self._periodic.begins(self.steps)

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        begins = self.wants_large_batch or not self._estimate
        inner_batch, outer_batch = self._periodic.batches(inner, outer) if begins else (inner.draw(), outer.draw())
        drawn = self._random_numbers()
        now = single_loop_directions(self._oracle, self.adjoint, inner_batch, outer_batch)
        estimate = _flat(now)
        if not begins:
            last = Point.of(self._last_inner, self._last_outer)
            with drawn.again():
                before = single_loop_directions(self._oracle, self._last_adjoint, inner_batch, outer_batch, last)
            estimate = add(self._estimate, subtract(estimate, _flat(before)))
        self._require_finite("recursive direction", estimate)
        self._estimate = estimate
        self._last_inner, self._last_outer = clone(self._inner.tensors), clone(self._outer.tensors)
        self._last_adjoint = clone(self.adjoint)
        n = len(self._last_inner)
        estimate = clone(estimate)  # optimisers may change what they are given
        return Directions(
            inner=estimate[:n],
            adjoint=estimate[n : 2 * n],
            outer=estimate[2 * n :],
            inner_loss=now.inner_loss,
            outer_loss=now.outer_loss,
        )

    def _finish(self) -> None:
        if self.adjoint_radius is not None:
            factor = (self.adjoint_radius / norm(self.adjoint).clamp(min=1e-30)).clamp(max=1.0)
            for tensor in self.adjoint:
                tensor.mul_(factor.to(tensor.dtype))


def _flat(found: Directions) -> Tensors:
    assert found.inner is not None and found.adjoint is not None
    return [*found.inner, *found.adjoint, *found.outer]
