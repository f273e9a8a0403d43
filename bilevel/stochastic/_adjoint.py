"""Methods with an adjoint: a vector q, kept from step to step, that follows the solution of H q = ∇_φ F."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bilevel.setting_checks import check_number
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import Tensors, add, add_into, clone, scale, subtract_from
from bilevel.stochastic._method import Auxiliary, Directions, Problem, StochasticMethod
from bilevel.stochastic._optimizers import OptimizerLike, made_optimizer, mirrored_sgd, tie_rates
from bilevel.stochastic._options import StepOptions
from bilevel.stochastic._oracle import Gradients, Linearization, Oracle
from bilevel.stochastic._variables import Point

__all__ = [
    "AdjointMethod",
    "check_rate",
    "neumann_directions",
    "neumann_outer",
    "single_loop_directions",
    "sum_neumann",
]


class AdjointMethod(StochasticMethod):
    """A method with an adjoint that is kept from step to step, and moves by plain gradient steps unless told otherwise.

    Parameters
    ----------
    problem, inner, outer, inner_optimizer, outer_optimizer, options
        See :class:`StochasticMethod`.
    adjoint_optimizer
        An optimiser over the adjoint, as for the other variables. By default plain gradient steps with the learning rates that the
        inner optimiser has at that moment, so that its schedulers drive both.
    """

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        inner_optimizer: OptimizerLike | None = None,
        outer_optimizer: OptimizerLike | None = None,
        adjoint_optimizer: OptimizerLike | None = None,
        options: StepOptions | None = None,
    ) -> None:
        super().__init__(
            problem, inner, outer, inner_optimizer=inner_optimizer, outer_optimizer=outer_optimizer, options=options
        )
        adjoint = [torch.zeros_like(tensor, requires_grad=False) for tensor in self._inner.tensors]
        self._tied = adjoint_optimizer is None
        if adjoint_optimizer is None:
            optimizer = mirrored_sgd(self.inner_optimizer, self._inner.tensors, adjoint)
        else:
            optimizer = made_optimizer(adjoint_optimizer, adjoint, "adjoint", self.where, None)
        self._auxiliary["adjoint"] = Auxiliary(adjoint, optimizer)

    @property
    def adjoint(self) -> Tensors:
        """The adjoint q, a list of tensors like the inner variables; zero at first."""
        return self._auxiliary["adjoint"].tensors

    @property
    def adjoint_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the adjoint; learning-rate schedulers of torch work on it, where it was given."""
        return self._auxiliary["adjoint"].optimizer

    def _prepare(self) -> None:
        if self._tied:
            tie_rates(self.adjoint_optimizer, self.inner_optimizer)


def single_loop_directions(
    oracle: Oracle, q: Tensors, inner_batch: Any, outer_batch: Any, at: Point | None = None
) -> Directions:
    """Return SOBA's three directions at one point: ∇_φ G, H q − ∇_φ F and ∇_θ F − Bᵀ q.

    Two forward and three reverse passes.
    """
    lower = oracle.products(inner_batch, q, at)
    upper = oracle.outer_gradients(outer_batch, at)
    return Directions(
        inner=lower.gradient,
        adjoint=subtract_from(lower.hessian, upper.inner),
        outer=subtract_from(upper.outer, lower.cross),
        inner_loss=lower.loss,
        outer_loss=upper.loss,
    )


def sum_neumann(
    oracle: Oracle,
    inner: BatchSource,
    rhs: Tensors,
    first: Callable[[Tensors], Tensors],
    terms: int,
    rate: Any,
) -> tuple[Tensors, Tensors]:
    """Return q = α Σ_{k=0..K} Π_{j≤k} (I − α H_j) b and the last term's vector Π_{j≤K} (I − α H_j) b.

    A stream gives each factor its own minibatch, as unbiased estimates need; without one see :func:`neumann_outer`. ``first`` has the products
    of the one at hand. ``rhs``, which is b, is given up: its memory holds the terms.
    """
    running = rhs
    total = clone(rhs)
    product = first
    for term in range(terms):
        if inner.is_stream and term:
            product = oracle.linearize(inner.draw()).hessian
        running = add_into(running, product(running), -rate)
        total = add_into(total, running)
    return scale(total, rate), running


def neumann_directions(
    oracle: Oracle,
    inner_batch: Any,
    outer_batch: Any,
    terms: int,
    rate: Any,
    at: Point | None = None,
) -> Directions:
    """Return ∇_φ G and ∇_θ F − Bᵀ q with q = α Σ_{k≤K} (I − αH)ᵏ ∇_φ F, at one point and on one minibatch of each level.

    Two forward and K + 3 reverse passes.
    """
    lower = oracle.linearize(inner_batch, at)
    upper = oracle.outer_gradients(outer_batch, at)
    return Directions(
        inner=lower.gradient,
        outer=neumann_outer(lower, upper, terms, rate),
        inner_loss=lower.loss,
        outer_loss=upper.loss,
    )


def neumann_outer(lower: Linearization, upper: Gradients, terms: int, rate: Any) -> Tensors:
    """Return ∇_θ F − Bᵀ q with q = α Σ_{k≤K} (I − αH)ᵏ b, where b = ∇_φ F is given up. K + 1 reverse passes.

    If θ has far fewer numbers than φ, q is not made: the Bᵀ v of its terms v are summed, each found in the pass that finds H v. A step then
    has room for two vectors like φ, and not three. For a larger θ the passes through its graph would cost more than they save.
    """
    v, outer = upper.inner, upper.outer
    if 8 * sum(part.numel() for part in outer) > sum(part.numel() for part in v):
        q = clone(v)
        for _ in range(terms):
            v = add_into(v, lower.hessian(v), -rate)
            q = add_into(q, v)
        return add(outer, lower.cross(q), -rate)
    for _ in range(terms):
        curved, crossed = lower.products(v)
        v, outer = add_into(v, curved, -rate), add(outer, crossed, -rate)
        del curved
    return add(outer, lower.cross(v), -rate)


def check_rate(where: str, name: str, rate: float | None) -> None:
    """Raise :class:`ArgumentError` unless ``rate`` is a positive number or None."""
    if rate is not None:
        check_number(where, name, rate)
