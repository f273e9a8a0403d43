"""F2SA: a penalty in place of second derivatives."""

from __future__ import annotations

from typing import Any

from bilevel.setting_checks import check_number, check_steps
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import add, add_into, clone, norm, subtract
from bilevel.stochastic._method import Auxiliary, Directions, Problem, StochasticMethod
from bilevel.stochastic._optimizers import same_layout, tie_rates
from bilevel.stochastic._variables import Point

__all__ = ["F2SA"]


class F2SA(StochasticMethod):
    """Follow z ≈ argmin G and y ≈ argmin F + λG, and step θ by ∇_θ F(y) + λ (∇_θ G(y) − ∇_θ G(z)): no second derivative.

    At exact z and y the bias of the outer direction is O(1/λ). ``inner`` is z, and ``penalized`` is y. y has an optimiser
    of the same class and settings as the inner one, and the direction ∇G + ∇F/λ, so that both move at the same rate. A step
    makes 3T + 3 forward and reverse passes. Models that cannot be differentiated twice can be trained, such as those
    compiled by ``torch.compile`` with inductor.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    inner_steps
        T.
    penalty
        λ in the first step.
    penalty_increment
        δ ≥ 0, added to λ after each step. λ → ∞ removes the bias.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.StochasticMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Kwon, Kwon, Wright, Nowak, "A fully first-order method for stochastic bilevel optimization", ICML 2023, Algorithm 1 (F2SA).

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import F2SA
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = F2SA(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    _STATE = ("penalty",)

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        inner_steps: int = 5,
        penalty: float = 10.0,
        penalty_increment: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "inner_steps", inner_steps)
        check_number(self.where, "penalty", penalty)
        check_number(self.where, "penalty_increment", penalty_increment, closed=True)
        self.inner_steps, self.penalty, self.penalty_increment = inner_steps, penalty, penalty_increment
        penalized = clone(self._inner.tensors)
        optimizer = same_layout(self.inner_optimizer, self._inner.tensors, penalized)
        self._auxiliary["penalized"] = Auxiliary(penalized, optimizer)

    @property
    def penalized(self) -> list[Any]:
        """The minimiser of F + λG that the method follows: a list of tensors like the inner variables."""
        return self._auxiliary["penalized"].tensors

    def _prepare(self) -> None:
        tie_rates(self._auxiliary["penalized"].optimizer, self.inner_optimizer)

    def _finish(self) -> None:
        self.penalty += self.penalty_increment

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        oracle, lam = self._oracle, self.penalty
        for _ in range(self.inner_steps):
            batch = inner.draw()
            drawn = self._random_numbers()
            self._move_inner(oracle.inner_gradient(batch)[1])
            at = self._there()
            with drawn.again():
                lower = oracle.inner_gradient(batch, at)[1]
            upper = oracle.outer_gradients(outer.draw(), at)
            self._move("penalized", add_into(lower, upper.inner, 1 / lam))
        batch = inner.draw()  # the same for both, so that their noise cancels where λ is large
        at = self._there()
        drawn = self._random_numbers()
        here = oracle.inner_gradients(batch)
        with drawn.again():
            there = oracle.inner_gradients(batch, at)
        upper = oracle.outer_gradients(outer.draw(), at)
        return Directions(
            outer=add(upper.outer, subtract(there.outer, here.outer), lam),
            inner_loss=here.loss,
            outer_loss=upper.loss,
            inner_gradient_norm=norm(here.inner),
        )

    def _there(self) -> Point:
        return Point.of(self.penalized, self._outer.tensors)
