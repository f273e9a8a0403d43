"""stocBiO: several inner steps, and a Neumann series from cold for the linear system."""

from __future__ import annotations

from typing import Any

from bilevel.setting_checks import check_steps
from bilevel.stochastic._adjoint import check_rate, neumann_outer, sum_neumann
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import subtract
from bilevel.stochastic._method import Directions, Problem, StochasticMethod

__all__ = ["StocBiO"]


class StocBiO(StochasticMethod):
    """T inner steps, q = η Σ_{k≤Q} Π_{j≤k} (I − η H_j) ∇_φ F, and one outer step along ∇_θ F − Bᵀ q.

    T + 2 forward and T + Q + 3 reverse passes with one batch for each level. From a stream every factor has its own minibatch, with
    one forward and one reverse pass more. η must be below 2 over the largest eigenvalue of H.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    inner_steps, terms
        T and Q.
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
    Ji, Yang, Liang, "Bilevel optimization: convergence analysis and enhanced design", ICML 2021, Algorithms 2 (stocBiO) and 3.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import StocBiO
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = StocBiO(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        inner_steps: int = 10,
        terms: int = 10,
        neumann_rate: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "inner_steps", inner_steps, least=0)
        check_steps(self.where, "terms", terms, least=0)
        check_rate(self.where, "neumann_rate", neumann_rate)
        self.inner_steps, self.terms, self.neumann_rate = inner_steps, terms, neumann_rate

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        self._inner_steps(inner, self.inner_steps)
        lower = self._oracle.linearize(inner.draw())
        size = lower.norm_of_gradient()
        upper = self._oracle.outer_gradients(outer.draw())
        rate = self._rate if self.neumann_rate is None else self.neumann_rate
        if inner.is_stream:
            q, _ = sum_neumann(self._oracle, inner, upper.inner, lower.hessian, self.terms, rate)
            direction = subtract(upper.outer, lower.cross(q))
        else:
            direction = neumann_outer(lower, upper, self.terms, rate)
        return Directions(
            outer=direction,
            inner_loss=lower.loss,
            outer_loss=upper.loss,
            inner_gradient_norm=size,
        )
