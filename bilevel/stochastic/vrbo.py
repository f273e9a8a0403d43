"""VRBO: recursive estimates (SPIDER) in a double loop."""

from __future__ import annotations

from typing import Any

import torch

from bilevel.setting_checks import check_steps
from bilevel.stochastic._adjoint import check_rate, neumann_directions
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import Tensors, add, clone, norm, subtract
from bilevel.stochastic._method import Directions, Problem, StochasticMethod
from bilevel.stochastic._recursive import Periodic, Reference
from bilevel.stochastic._variables import Point

__all__ = ["VRBO"]


class VRBO(StochasticMethod):
    """One outer step along a recursive estimate, then T + 1 inner steps; both estimates follow by a difference after each of them.

    Every ``period`` steps the estimates begin anew on a large batch. Each of the T + 2 differences costs 4 forward and 2Q + 6 reverse
    passes.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.StochasticMethod`.
    inner_steps
        T ≥ 1.
    terms
        Q, of the Neumann series η Σ_{k≤Q} (I − ηH)ᵏ ∇_φ F.
    neumann_rate
        η; None: the learning rate of the inner optimiser.
    period
        Steps from one beginning to the next.
    reference
        A function without arguments that returns the large batches (inner, outer) of a beginning. None: the batches given to ``step``
        are used; ``wants_large_batch`` says when they should be large.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.StochasticMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Yang, Ji, Liang, "Provably faster algorithms for bilevel optimization", NeurIPS 2021, Algorithm 2 (VRBO); Fang et al., "SPIDER",
    NeurIPS 2018.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import VRBO
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = VRBO(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    _STATE = ("_estimate", "_losses")

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        inner_steps: int = 3,
        terms: int = 10,
        neumann_rate: float | None = None,
        period: int = 8,
        reference: Reference | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        check_steps(self.where, "inner_steps", inner_steps)
        check_steps(self.where, "terms", terms, least=0)
        check_rate(self.where, "neumann_rate", neumann_rate)
        self.inner_steps, self.terms, self.neumann_rate = inner_steps, terms, neumann_rate
        self._periodic = Periodic(period, reference, self.where)
        self._estimate: Tensors = []
        self._losses: Tensors = []

    @property
    def wants_large_batch(self) -> bool:
        """Whether the next step begins anew, and is best given a large batch."""
        return self._periodic.begins(self.steps)

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        if self.wants_large_batch or not self._estimate:
            self._follow(self._periodic.batches(inner, outer), None)
        n = len(self._inner.tensors)
        return Directions(
            outer=clone(self._estimate[n:]),  # optimisers may change what they are given
            inner_loss=self._losses[0],
            outer_loss=self._losses[1],
            inner_gradient_norm=norm(self._estimate[:n]),
        )

    def _apply(self, found: Directions, inner: BatchSource, outer: BatchSource) -> dict[str, torch.Tensor]:
        """Make the outer step, and then the inner steps at the new outer variables, as Algorithm 2 does."""
        before = self._here()
        norms = super()._apply(found, inner, outer)
        n = len(self._inner.tensors)
        self._follow((inner.draw(), outer.draw()), before)
        for _ in range(self.inner_steps + 1):
            before = self._here()
            self._move_inner(clone(self._estimate[:n]))
            self._follow((inner.draw(), outer.draw()), before)
        return norms

    def _follow(self, batches: tuple[Any, Any], before: Point | None) -> None:
        """Bring the estimates from the point ``before`` to the variables as they are; None: begin anew."""
        # A step that ends half way, by an error or an update that is left out, begins anew: the point has moved.
        last, self._estimate = self._estimate, []
        rate = self._rate if self.neumann_rate is None else self.neumann_rate
        drawn = self._random_numbers()
        now = neumann_directions(self._oracle, *batches, self.terms, rate)
        estimate = [*(now.inner or []), *now.outer]
        if before is not None:
            with drawn.again():
                old = neumann_directions(self._oracle, *batches, self.terms, rate, before)
            estimate = add(last, subtract(estimate, [*(old.inner or []), *old.outer]))
        self._require_finite("recursive direction", estimate)
        self._estimate, self._losses = estimate, [now.inner_loss, now.outer_loss]
