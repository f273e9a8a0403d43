"""SABA: SOBA's directions with the variance reduction of SAGA."""

from __future__ import annotations

from typing import Any

from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_steps
from bilevel.stochastic._adjoint import AdjointMethod
from bilevel.stochastic._batches import BatchSource, batch_key, batch_size
from bilevel.stochastic._lists import Tensors, add, clone, subtract
from bilevel.stochastic._method import Directions, Problem

__all__ = ["SABA"]


class SABA(AdjointMethod):
    """SOBA, with each derivative d_i replaced by d_i − (its value when minibatch i was last seen) + (the mean of these values).

    The variance vanishes at the solution, so that constant rates converge linearly where SOBA stalls. For each minibatch of a fixed
    partition, ∇_φ G, H q and Bᵀ q, or ∇_φ F and ∇_θ F, are kept: memory of (2 inner + outer) · N_G + (inner + outer) · N_F numbers. As
    SOBA, two forward and three reverse passes.

    A minibatch is known by its ``index`` (:class:`Batch`, :class:`Minibatches`). One without an index is known by the checksum of its
    content, which copies it to the CPU. While some minibatch is new, the mean of those seen is the direction.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.AdjointMethod`.
    max_batches
        The most different minibatches remembered for each objective. More are an error: they do not come from a fixed partition.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.AdjointMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; in ``step``, if more than ``max_batches`` different minibatches came, or if a number came again
        with a minibatch of another size.

    References
    ----------
    Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global variance reduction
    algorithms", NeurIPS 2022, Algorithm 1 with the SABA directions; Defazio, Bach, Lacoste-Julien, "SAGA", NeurIPS 2014.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import SABA
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = SABA(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    _STATE = ("_lower", "_upper")

    def __init__(self, problem: Problem, inner: Any, outer: Any, *, max_batches: int = 4096, **settings: Any) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "max_batches", max_batches)
        self.max_batches = max_batches
        self._lower = _empty()
        self._upper = _empty()

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        inner_batch, outer_batch = inner.draw(), outer.draw()
        lower = self._oracle.products(inner_batch, self.adjoint)
        upper = self._oracle.outer_gradients(outer_batch)
        derivatives = [*lower.gradient, *lower.hessian, *lower.cross]
        slopes = [*upper.inner, *upper.outer]
        self._require_finite("minibatch derivative", derivatives, slopes)
        derivatives = self._reduced(self._lower, "inner", inner_batch, derivatives)
        slopes = self._reduced(self._upper, "outer", outer_batch, slopes)
        n = len(lower.gradient)
        return Directions(
            inner=derivatives[:n],
            adjoint=subtract(derivatives[n : 2 * n], slopes[:n]),
            outer=subtract(slopes[n:], derivatives[2 * n :]),
            inner_loss=lower.loss,
            outer_loss=upper.loss,
        )

    def _reduced(self, memory: dict[str, Any], what: str, batch: Any, new: Tensors) -> Tensors:
        """Return SAGA's direction, and remember ``new``."""
        slots, key = memory["slots"], batch_key(batch)
        old = slots.get(key)
        if old is None and len(slots) >= self.max_batches:
            raise ArgumentError(
                f"{self.where}: expected at most {self.max_batches} different {what} minibatches, which come again, and got one more; draw "
                "from a fixed partition (bilevel.stochastic.Minibatches), number it with Batch(data=..., index=...), or raise max_batches"
            )
        size = batch_size(batch)
        known = memory["sizes"].setdefault(key, size)
        if known != size:
            raise ArgumentError(
                f"{self.where}: expected {what} minibatch number {batch.index} to be the one seen before, whose tensors held {known} numbers, "
                f"got {size}; give different minibatches different numbers, or draw from bilevel.stochastic.Minibatches"
            )
        slots[key] = new
        mean: Tensors = memory["mean"]
        if old is None:
            memory["mean"] = add(mean, subtract(new, mean), 1 / len(slots)) if mean else new
            return clone(memory["mean"])  # optimisers may change what they are given
        change = subtract(new, old)
        memory["mean"] = add(mean, change, 1 / len(slots))
        return add(mean, change)


def _empty() -> dict[str, Any]:
    return {"slots": {}, "sizes": {}, "mean": []}
