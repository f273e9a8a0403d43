"""R at one point with its graph: the operator ∂_x R and the pullback through ∂_θ R, for many products."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bilevel._torch.grad_mode import no_graph
from bilevel._torch.reverse import reverse_pass
from bilevel.equations.domain import no_value
from bilevel.operators import HessianOperator, JacobianOperator, LinearOperator
from bilevel.replay import ReplayCache, StartedProgram

__all__ = ["PRODUCT", "JointProduct", "Linearization", "LinearizationSlot", "NoPullback", "ReplayedLinearization"]


@dataclass(frozen=True, eq=False)
class Linearization:
    """R at one point with its graph: the operator ∂_x R, and the pullback through ∂_θ R.

    Parameters
    ----------
    residual
        R (batch, n), with its graph.
    operator
        ∂_x R.
    leaves
        The tensors θ from which R was computed. Those that require grad receive pullbacks.
    value
        The objectives (batch,) of an argmin, without a graph; None for equations.
    point
        x (batch, n).
    replayed
        The replay that computes pullbacks in place of a graph; None if there is a graph.
    """

    residual: torch.Tensor
    operator: LinearOperator
    leaves: tuple[torch.Tensor, ...]
    value: torch.Tensor | None = None
    point: torch.Tensor | None = None
    replayed: ReplayedLinearization | NoPullback | None = None

    def pullback(self, q: torch.Tensor) -> list[torch.Tensor | None]:
        """Return (∂_θ R)ᵀ q for ``q`` (batch, n), summed over the problems that share a tensor: one reverse pass."""
        return self._pull(q)[1] if self.replayed is None else self.replayed.pull(q, point=False)[1]

    def pull(self, q: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Return (∂_x R)ᵀ q (batch, n) and :meth:`pullback` of the same ``q``, from one reverse pass."""
        if self.replayed is not None:
            products, pulled = self.replayed.pull(q, point=True)
        else:
            assert isinstance(self.operator, (HessianOperator, JacobianOperator))
            products, pulled = self._pull(q, self.operator.point)
        return products[0], pulled

    def _pull(self, q: torch.Tensor, *point: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        needs_grad = [*point, *(leaf for leaf in self.leaves if leaf.requires_grad)]
        if not needs_grad or not self.residual.requires_grad:
            found = [torch.zeros_like(leaf) for leaf in needs_grad]
        else:
            found = list(reverse_pass([self.residual], needs_grad, [q]))
        gradients = iter(found)
        products = [next(gradients) for _ in point]
        return products, [next(gradients) if leaf.requires_grad else None for leaf in self.leaves]


class JointProduct:
    """The product q ↦ Jᵀq, which pulls −q back through ∂_θ R in the same reverse pass.

    If q is the adjoint, the derivative is then already computed.
    """

    def __init__(self, linearization: Linearization) -> None:
        self.linearization = linearization
        self._pulled: tuple[torch.Tensor, list[torch.Tensor | None]] | None = None

    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        product, pulled = self.linearization.pull(-q)
        self._pulled = (-q, pulled)
        return -product

    def pullback(self, v: torch.Tensor) -> list[torch.Tensor | None]:
        """Return (∂_θ R)ᵀ v; the last product has computed it already if its q was −v."""
        if self._pulled is not None and torch.equal(self._pulled[0], v):
            return self._pulled[1]
        return self.linearization.pullback(v)


@dataclass(frozen=True, eq=False)
class ReplayedLinearization:
    """The second part of a linearisation's program: (q, v) ↦ Jᵀ q, (∂_θ R)ᵀ q, and for equations J v.

    The first part computes R and the values.
    """

    begun: StartedProgram
    needs_grad: tuple[bool, ...]
    symmetric: bool

    def transposed(self, q: torch.Tensor) -> torch.Tensor:
        """Return Jᵀ q."""
        return self._finish((PRODUCT,), q)[0]

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Return J v."""
        return self.transposed(v) if self.symmetric else self._finish((PRODUCT + 1 + sum(self.needs_grad),), v)[0]

    def pull(self, q: torch.Tensor, *, point: bool) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Return [Jᵀ q] if ``point``, and (∂_θ R)ᵀ q."""
        first = PRODUCT if point else PRODUCT + 1
        found = list(self._finish(tuple(range(first, PRODUCT + 1 + sum(self.needs_grad))), q))
        products, pulled = found[: PRODUCT + 1 - first], iter(found[PRODUCT + 1 - first :])
        return products, [next(pulled) if want else None for want in self.needs_grad]

    def _finish(self, which: tuple[int, ...], q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with no_graph():
            q = q.contiguous()
            return self.begun.finish(which, q, q)


# The position of Jᵀ q in the outputs of a linearisation's program.
PRODUCT = 2


@dataclass(frozen=True, eq=False)
class NoPullback:
    """The missing pullback of a problem whose function has no value, and so no derivative, at its point."""

    where: str
    noun: str
    error: Exception

    def pull(self, q: torch.Tensor, *, point: bool) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Raise the error for a point outside the domain."""
        raise no_value(self.where, self.noun, self.error)


@dataclass(eq=False)
class LinearizationSlot:
    """The slot in which a solver leaves the linearisation at its solution, for a derivative that follows.

    Parameters
    ----------
    needs_grad
        Which of the problem's tensors need a gradient.
    linearization
        The linearisation at the solver's presumed final iterate, or None.
    replays
        The recorded evaluations of the problem, for a derivative that evaluates R first.
    matrix
        A point (batch, n) and the matrices ∂_x R (batch, n, n) there, if the judge materialised them.
    """

    needs_grad: tuple[bool, ...]
    linearization: Linearization | None = None
    replays: ReplayCache | None = None
    matrix: tuple[torch.Tensor, torch.Tensor] | None = None
