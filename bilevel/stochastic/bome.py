"""BOME: descend on F while the value-function gap G(φ) − min G is pushed down by a dynamic barrier."""

from __future__ import annotations

from typing import Any

import torch

from bilevel.layers.randomness import GeneratorStates
from bilevel.setting_checks import check_number, check_steps
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import Tensors, add, dot, norm, scale, subtract
from bilevel.stochastic._method import Directions, Problem, StochasticMethod
from bilevel.stochastic._oracle import Gradients
from bilevel.stochastic._variables import Point

__all__ = ["BOME"]


class BOME(StochasticMethod):
    """Step (φ, θ) by ∇F + λ∇q̂ with q̂ = G(φ, θ) − G(φ_T, θ), φ_T from T gradient steps and held constant: no second derivative.

    λ = max(η − ⟨∇F, ∇q̂⟩/‖∇q̂‖², 0), so that q̂ decreases. T + 2 forward and reverse passes. A deterministic method: the sign of λ
    suffers from small batches. The direction is a descent direction of F along the constraint q̂ = 0, and not the hypergradient; both
    vanish at the same points.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    inner_steps
        T: plain gradient steps at ``gap_rate``.
    gap_rate
        Their learning rate; None: that of the inner optimiser.
    barrier
        η > 0.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.StochasticMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel optimization made easy: a simple first-order approach", NeurIPS 2022, Algorithm 1,
    with φ_k = η‖∇q̂‖².

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import BOME
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = BOME(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
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
        gap_rate: float | None = None,
        barrier: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "inner_steps", inner_steps)
        check_number(self.where, "barrier", barrier)
        if gap_rate is not None:
            check_number(self.where, "gap_rate", gap_rate)
        self.inner_steps, self.gap_rate, self.barrier = inner_steps, gap_rate, barrier

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        oracle, n = self._oracle, len(self._inner.tensors)
        batch = inner.draw()
        drawn = self._random_numbers()
        here = oracle.inner_gradients(batch)
        z = self._value_function_point(batch, here, drawn)
        with drawn.again():
            ahead = oracle.inner_gradients(batch, Point.of(z, self._outer.tensors))
        upper = oracle.outer_gradients(outer.draw())
        gap = [*here.inner, *subtract(here.outer, ahead.outer)]
        slope = [*upper.inner, *upper.outer]
        size = dot(gap, gap)
        barrier = self.barrier - dot(slope, gap) / size
        # Where φ is the minimiser already, ∇q̂ = 0 and there is nothing to push down.
        factor = torch.where(size > 0, barrier, torch.zeros_like(barrier)).clamp(min=0.0)
        direction = add(slope, scale(gap, factor))
        return Directions(
            inner=direction[:n],
            outer=direction[n:],
            inner_loss=here.loss,
            outer_loss=upper.loss,
            inner_gradient_norm=norm(here.inner),
        )

    def _value_function_point(self, batch: Any, here: Gradients, drawn: GeneratorStates) -> Tensors:
        """Return φ_T, on the same minibatch and with the random numbers of ``here``: the gap is then that of one function."""
        rate = self._rate if self.gap_rate is None else self.gap_rate
        z, gradient = self._inner.tensors, here.inner  # the first of the T steps is from φ itself
        for step in range(self.inner_steps):
            if step:
                with drawn.again():
                    gradient = self._oracle.inner_gradient(batch, Point.of(z, self._outer.tensors))[1]
            z = add([tensor.detach() for tensor in z], gradient, -rate)
        return z
