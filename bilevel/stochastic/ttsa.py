"""TTSA and ALSET: inner steps, and a hypergradient from one random term of the Neumann series."""

from __future__ import annotations

from typing import Any

import torch

from bilevel.setting_checks import check_steps
from bilevel.stochastic._adjoint import check_rate, sum_neumann
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import scale, subtract
from bilevel.stochastic._method import Directions, Problem, StochasticMethod

__all__ = ["ALSET", "TTSA"]


class TTSA(StochasticMethod):
    """One inner step, and one outer step with q = K η Π_{j=1..p} (I − η H_j) ∇_φ F, p uniform in {0, ..., K − 1}.

    The random term has the truncated series η Σ_{p<K} (I − ηH)^p ∇_φ F as its expectation. 3 forward and p + 4 reverse passes. From a
    stream every factor has its own minibatch. In the paper the outer learning rate decreases faster than the inner one.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    max_terms
        K.
    neumann_rate
        η; None: the learning rate of the inner optimiser.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.StochasticMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Hong, Wai, Wang, Yang, "A two-timescale stochastic algorithm framework for bilevel optimization: complexity analysis and
    application to actor-critic", arXiv:2007.05170, 2020 (SIAM Journal on Optimization 2023), Algorithm 1. The random term is that of
    Ghadimi, Wang, "Approximation methods for bilevel programming", arXiv:1802.02246, 2018.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import TTSA
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = TTSA(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    inner_steps = 1

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        max_terms: int = 10,
        neumann_rate: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "max_terms", max_terms)
        check_rate(self.where, "neumann_rate", neumann_rate)
        self.max_terms, self.neumann_rate = max_terms, neumann_rate

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        self._inner_steps(inner, self.inner_steps)
        lower = self._oracle.linearize(inner.draw())
        size = lower.norm_of_gradient()
        upper = self._oracle.outer_gradients(outer.draw())
        rate = self._rate if self.neumann_rate is None else self.neumann_rate
        power = int(torch.randint(self.max_terms, (), generator=self._generator))
        _, term = sum_neumann(self._oracle, inner, upper.inner, lower.hessian, power, rate)
        q = scale(term, self.max_terms * rate)
        return Directions(
            outer=subtract(upper.outer, lower.cross(q)),
            inner_loss=lower.loss,
            outer_loss=upper.loss,
            inner_gradient_norm=size,
        )


class ALSET(TTSA):
    """:class:`TTSA` with T inner steps: alternating SGD, with rates of the same order for both levels.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    inner_steps
        T.
    **settings
        Those of :class:`TTSA`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Chen, Sun, Yin, "Closing the gap: tighter analysis of alternating stochastic gradient methods for bilevel problems", NeurIPS
    2021, Algorithm 1 (ALSET).

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import ALSET
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = ALSET(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    def __init__(self, problem: Problem, inner: Any, outer: Any, *, inner_steps: int = 5, **settings: Any) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "inner_steps", inner_steps)
        self.inner_steps = inner_steps
