"""MRBO: recursive momentum (STORM) for the inner and the outer direction."""

from __future__ import annotations

from typing import Any

from bilevel.setting_checks import check_number, check_steps
from bilevel.stochastic._adjoint import check_rate, neumann_directions
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import Tensors, add, clone, subtract
from bilevel.stochastic._method import Directions, Problem, StochasticMethod
from bilevel.stochastic._variables import Point

__all__ = ["MRBO"]


class MRBO(StochasticMethod):
    """Both directions by d_t = D(u_t) + (1 − β)(d_{t−1} − D(u_{t−1})), each difference on one minibatch; a single loop.

    D is ∇_φ G for the inner variables, and ∇_θ F − Bᵀ q with q = η Σ_{k≤Q} (I − ηH)ᵏ ∇_φ F for the outer. 4 forward and 2Q + 6
    reverse passes.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    terms
        Q.
    neumann_rate
        η; None: the learning rate of the inner optimiser.
    inner_weight, outer_weight
        β in (0, 1] of the two directions; 1 has no memory.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.StochasticMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Yang, Ji, Liang, "Provably faster algorithms for bilevel optimization", NeurIPS 2021, Algorithm 1 (MRBO); Cutkosky, Orabona,
    "Momentum-based variance reduction in non-convex SGD", NeurIPS 2019.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import MRBO
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = MRBO(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    _STATE = ("_last_inner", "_last_outer", "_estimate")

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        terms: int = 10,
        neumann_rate: float | None = None,
        inner_weight: float = 0.5,
        outer_weight: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "terms", terms, least=0)
        check_rate(self.where, "neumann_rate", neumann_rate)
        for name, weight in (("inner_weight", inner_weight), ("outer_weight", outer_weight)):
            if weight != 1.0:
                check_number(self.where, name, weight, below=1.0)
        self.terms, self.neumann_rate = terms, neumann_rate
        self.inner_weight, self.outer_weight = inner_weight, outer_weight
        self._last_inner: Tensors = []
        self._last_outer: Tensors = []
        self._estimate: Tensors = []

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        batches = inner.draw(), outer.draw()
        rate = self._rate if self.neumann_rate is None else self.neumann_rate
        drawn = self._random_numbers()
        now = neumann_directions(self._oracle, *batches, self.terms, rate)
        n = len(self._inner.tensors)
        estimate = _flat(now)
        if self._estimate:
            last = Point.of(self._last_inner, self._last_outer)
            with drawn.again():
                before = neumann_directions(self._oracle, *batches, self.terms, rate, last)
            carried = subtract(self._estimate, _flat(before))
            estimate = [
                *add(estimate[:n], carried[:n], 1 - self.inner_weight),
                *add(estimate[n:], carried[n:], 1 - self.outer_weight),
            ]
        self._require_finite("recursive direction", estimate)
        self._estimate = estimate
        self._last_inner, self._last_outer = clone(self._inner.tensors), clone(self._outer.tensors)
        estimate = clone(estimate)  # optimisers may change what they are given
        return Directions(inner=estimate[:n], outer=estimate[n:], inner_loss=now.inner_loss, outer_loss=now.outer_loss)


def _flat(found: Directions) -> Tensors:
    assert found.inner is not None
    return [*found.inner, *found.outer]
