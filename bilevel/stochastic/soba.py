"""SOBA: one step for the inner variables, the adjoint and the outer variables, all from the same point."""

from __future__ import annotations

from bilevel.stochastic._adjoint import AdjointMethod, single_loop_directions
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._method import Directions

__all__ = ["SOBA"]


class SOBA(AdjointMethod):
    """Step φ by ∇_φ G, the adjoint q by H q − ∇_φ F and θ by ∇_θ F − Bᵀ q, all at the same point.

    A step makes two forward and three reverse passes: H q and Bᵀ q come from one reverse pass. With constant rates it ends in a
    neighbourhood of the solution; let the rates decrease, or take :class:`SABA`.

    Parameters
    ----------
    problem, inner, outer, inner_optimizer, outer_optimizer, adjoint_optimizer, options
        See :class:`~bilevel.stochastic.AdjointMethod`.

    References
    ----------
    Dagréou, Ablin, Vaiter, Moreau, "A framework for bilevel optimization that enables stochastic and global variance reduction
    algorithms", NeurIPS 2022, Algorithm 1 with the SOBA directions. Our q is −v there.

    Examples
    --------
    >>> import functools, torch, bilevel
    >>> sgd = functools.partial(torch.optim.SGD, lr=0.2)
    >>> w, theta = torch.zeros(2), torch.zeros(2)
    >>> losses = (  # argmin is w = theta: the outer loss asks for w = 1
    ...     lambda inner, outer, data: 0.5 * ((inner - outer) ** 2).sum(),
    ...     lambda inner, outer, data: 0.5 * ((inner - data) ** 2).sum(),
    ... )
    >>> method = bilevel.stochastic.SOBA(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(600):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 3) for number in theta.tolist()]
    [1.0, 1.0]
    >>> method.passes["forward"] // 600, method.passes["reverse"] // 600
    (2, 3)
    """

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        return single_loop_directions(self._oracle, self.adjoint, inner.draw(), outer.draw())
