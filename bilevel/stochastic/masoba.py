"""MA-SOBA: SOBA with a moving average of the outer direction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bilevel.setting_checks import check_number
from bilevel.stochastic._adjoint import AdjointMethod, single_loop_directions
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._lists import Tensors, add, clone, scale
from bilevel.stochastic._method import Directions, Problem

__all__ = ["MASOBA"]


class MASOBA(AdjointMethod):
    """SOBA, with h ← (1 − β) h + β (∇_θ F − Bᵀ q) for the outer direction.

    The average makes up for the bias of q and φ, so that smoothness of second order is not needed. As SOBA, two forward and three
    reverse passes. θ moves along h after this update. All directions are taken at one point, before any variable moves. h begins at the
    first direction, not at zero as in the paper: the first steps are then not too short.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.AdjointMethod`.
    weight
        β in (0, 1]: the share of the new direction.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.AdjointMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range, or a variable or an optimiser cannot be used.

    References
    ----------
    Chen, Xiao, Balasubramanian, "Optimal algorithms for stochastic bilevel optimization under relaxed smoothness conditions",
    arXiv:2306.12067, 2023 (JMLR 2024), Algorithm 1 (MA-SOBA). Gong, Hao, Liu, "An accelerated algorithm for stochastic bilevel
    optimization under unbounded smoothness", NeurIPS 2024, whose code of MA-SOBA also updates h before θ moves.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import MASOBA
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.1), torch.zeros(2), torch.zeros(2)
    >>> method = MASOBA(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd, weight=0.5)
    >>> for _ in range(1000):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    _STATE = ("_mean",)

    def __init__(self, problem: Problem, inner: Any, outer: Any, *, weight: float = 0.1, **settings: Any) -> None:
        super().__init__(problem, inner, outer, **settings)
        if weight != 1.0:
            check_number(self.where, "weight", weight, below=1.0)
        self.weight = weight
        self._mean: Tensors = []

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        found = single_loop_directions(self._oracle, self.adjoint, inner.draw(), outer.draw())
        self._require_finite("direction", found.inner or [], found.adjoint or [], found.outer)
        if self._mean:
            self._mean = add(scale(self._mean, 1 - self.weight), found.outer, self.weight)
        else:
            self._mean = found.outer
        return replace(found, outer=clone(self._mean))
