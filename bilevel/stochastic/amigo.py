"""AmIGO: several inner steps, several steps on the linear system, one outer step, everything warm-started."""

from __future__ import annotations

from typing import Any

from bilevel.setting_checks import check_steps
from bilevel.stochastic._adjoint import AdjointMethod
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import norm, subtract, subtract_from
from bilevel.stochastic._method import Directions, Problem

__all__ = ["AmIGO"]


class AmIGO(AdjointMethod):
    """T inner steps, N gradient steps on ½ qᵀH q − qᵀ∇_φ F from the last q, and one outer step along ∇_θ F − Bᵀ q.

    T + 2 forward and T + N + 3 reverse passes with one batch for each level. From streams every inner step, adjoint step and the last
    product draw their own minibatches.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.AdjointMethod`.
    inner_steps, adjoint_steps
        T and N.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.AdjointMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Arbel, Mairal, "Amortized implicit differentiation for stochastic bilevel optimization", ICLR 2022, Algorithm 1.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import AmIGO
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = AmIGO(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
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
        adjoint_steps: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "inner_steps", inner_steps, least=0)
        check_steps(self.where, "adjoint_steps", adjoint_steps)
        self.inner_steps, self.adjoint_steps = inner_steps, adjoint_steps

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        self._inner_steps(inner, self.inner_steps)
        oracle = self._oracle
        lower = oracle.linearize(inner.draw())
        size, upper = lower.norm_of_gradient(), oracle.outer_gradients(outer.draw())
        left = size
        for step in range(self.adjoint_steps):
            if step and inner.is_stream:
                lower = oracle.linearize(inner.draw())
                size = lower.norm_of_gradient()
            if step and outer.is_stream:
                upper = oracle.outer_gradients(outer.draw())
            residual = subtract_from(lower.hessian(self.adjoint), upper.inner)
            self._move("adjoint", residual)
            left = norm(residual)
            del residual  # the next product needs its room
        return Directions(
            outer=subtract(upper.outer, lower.cross(self.adjoint)),
            inner_loss=lower.loss,
            outer_loss=upper.loss,
            inner_gradient_norm=size,
            adjoint_residual_norm=left,
        )
