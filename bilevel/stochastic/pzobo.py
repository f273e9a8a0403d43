"""PZOBO: the response of inner steps to θ by differences of trajectories, without second derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch

from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_number, check_steps
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import Tensors, add, clone, dot, norm, subtract
from bilevel.stochastic._method import Directions, Problem, StochasticMethod
from bilevel.stochastic._optimizers import is_plain_sgd
from bilevel.stochastic._variables import Point

__all__ = ["PZOBO"]


class PZOBO(StochasticMethod):
    """T inner steps at θ and at θ + μ u_j; the outer direction is ∇_θ F + (1/Q) Σ_j ⟨(φ_T(θ + μu_j) − φ_T(θ))/μ, ∇_φ F⟩ u_j.

    The u_j are random: its expectation is the hypergradient of T steps, up to O(μ), with a variance that grows with the number of
    outer variables. (1 + Q) T + 1 forward and reverse passes. Each trajectory sees the same minibatches.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    inner_steps
        T, plain gradient steps.
    directions
        Q.
    smoothing
        μ.
    orthogonal
        Take the u_j orthogonal to each other, of length √p: with Q = p outer variables, the sum has no variance. Needs p × Q numbers.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.StochasticMethod`. The inner optimiser has to be plain SGD.

    Raises
    ------
    ArgumentError
        If the inner optimiser is not plain SGD, if Q > p with ``orthogonal``, or if a setting is out of its range.

    References
    ----------
    Sow, Ji, Liang, "On the convergence theory for Hessian-free bilevel algorithms", NeurIPS 2022, Algorithm 1 (PZOBO), and its
    stochastic form (PZOBO-S).

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import PZOBO
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = PZOBO(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd, directions=2, orthogonal=True)
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
        inner_steps: int = 5,
        directions: int = 1,
        smoothing: float = 1e-3,
        orthogonal: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "inner_steps", inner_steps)
        check_steps(self.where, "directions", directions)
        check_number(self.where, "smoothing", smoothing)
        if not is_plain_sgd(self.inner_optimizer):
            raise ArgumentError(
                f"{self.where}: expected the inner optimiser to be torch.optim.SGD without momentum and weight decay, whose steps can be made "
                f"elsewhere, got {type(self.inner_optimizer).__name__}; pass that"
            )
        size = sum(tensor.numel() for tensor in self._outer.tensors)
        if orthogonal and directions > size:
            raise ArgumentError(
                f"{self.where}: expected at most {size} orthogonal directions, one for each outer variable, got {directions}; pass fewer"
            )
        self.inner_steps, self.directions = inner_steps, directions
        self.smoothing, self.orthogonal = smoothing, orthogonal

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        oracle = self._oracle
        batches = [inner.draw() for _ in range(self.inner_steps)]
        start = clone(self._inner.tensors)
        drawn = self._random_numbers()
        for batch in batches:
            loss, gradient = oracle.inner_gradient(batch)
            self._move_inner(gradient)
        upper = oracle.outer_gradients(outer.draw())
        end, total = self._inner.tensors, upper.outer
        for u in self._random_directions():
            with drawn.again():
                moved = self._trajectory(start, add(self._outer.tensors, u, self.smoothing), batches)
            slope = dot(subtract(moved, end), upper.inner) / (self.smoothing * self.directions)
            total = add(total, u, slope.detach())
        return Directions(
            outer=[tensor.detach() for tensor in total],
            inner_loss=loss,
            outer_loss=upper.loss,
            inner_gradient_norm=norm(gradient),
        )

    def _trajectory(self, start: Tensors, outer: Tensors, batches: list[Any]) -> Tensors:
        """Return where the inner steps lead from ``start`` at other outer variables."""
        z = start
        rates = {id(t): group["lr"] for group in self.inner_optimizer.param_groups for t in group["params"]}
        for batch in batches:
            gradient = self._oracle.inner_gradient(batch, Point.of(z, outer))[1]
            steps = zip(z, gradient, self._inner.tensors, strict=True)
            z = [tensor.detach() - rates[id(own)] * slope for tensor, slope, own in steps]
        return z

    def _random_directions(self) -> list[Tensors]:
        """Return Q directions, drawn on the CPU: the same on every device and in every process."""
        shapes = [tensor.shape for tensor in self._outer.tensors]
        sizes = [shape.numel() for shape in shapes]
        flat = torch.randn(sum(sizes), self.directions, generator=self._generator, dtype=torch.float64)
        if self.orthogonal:
            flat = torch.linalg.qr(flat).Q * math.sqrt(sum(sizes))
        return [
            [
                part.reshape(shape).to(tensor)
                for part, shape, tensor in zip(column.split(sizes), shapes, self._outer.tensors, strict=True)
            ]
            for column in flat.T
        ]
