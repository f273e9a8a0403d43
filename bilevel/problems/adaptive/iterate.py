"""One point of a search: G and F linearised there, the adjoint so far, and the passes that compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bilevel._torch.reverse import reverse_pass
from bilevel.equations.linearization import Linearization
from bilevel.equations.problem import Problem
from bilevel.operators import LinearOperator
from bilevel.problems.definition import OuterTensors

__all__ = ["Iterate", "Objectives"]


@dataclass(eq=False)
class Iterate:
    """G and F linearised at one φ, with the adjoint so far. Sums over the K problems of the batch are (p,).

    Parameters
    ----------
    x
        φ (K, n).
    linear
        The linearisation of ∇G.
    operator
        H; it may record its products.
    residual
        ∇G (K, n).
    values
        F (K,).
    v
        ∇_φ F (K, n).
    direct
        The sum of ∇_θ F (p,).
    q, rho
        The adjoint and its residual ρ = v − H q (K, n).
    pulled
        The sum of Bᵀq (p,).
    changes
        The change of ĝ by each of the last products, where it was followed.
    inner_error
        An estimate of ‖φ − φ*‖ from the inner solve; None: it is ν ‖∇G‖.
    """

    x: torch.Tensor
    linear: Linearization
    operator: LinearOperator
    residual: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor
    direct: torch.Tensor
    q: torch.Tensor
    rho: torch.Tensor
    pulled: torch.Tensor
    changes: list[float] = field(default_factory=list)
    inner_error: float | None = None

    @property
    def size(self) -> float:
        """‖∇G‖ of the whole batch."""
        return float(self.residual.norm())

    @property
    def left(self) -> float:
        """‖ρ‖ of the whole batch."""
        return float(self.rho.norm())

    @property
    def corrected(self) -> torch.Tensor:
        """F − qᵀ∇G, the mean over the problems."""
        return self.values.mean() - torch.linalg.vecdot(self.q, self.residual).mean()

    @property
    def gradient(self) -> torch.Tensor:
        """ĝ, the mean over the problems (p,)."""
        return (self.direct - self.pulled) / self.x.shape[0]


@dataclass(frozen=True, eq=False)
class Objectives:
    """G and F, and the passes that evaluate them.

    Parameters
    ----------
    lower, upper
        G and F, as problems with the same tensors.
    outer
        Which of these tensors are θ.
    outputs
        (φ, *tensors) ↦ F; that of ``upper``, or one that also checks F.
    """

    lower: Problem
    upper: Problem
    outer: OuterTensors
    outputs: Callable[..., torch.Tensor]

    def at(self, x: torch.Tensor) -> Iterate:
        """Return the iterate at ``x`` (K, n) with the adjoint zero: two passes."""
        linear = self.lower.linearize(x, self.outer.needs_grad)
        values, v, direct = self.slopes(x)
        direct = direct.to(x)
        return Iterate(
            x, linear, linear.operator, linear.residual.detach(), values, v, direct,
            torch.zeros_like(x), v, torch.zeros_like(direct),
        )  # fmt: skip

    def set_adjoint(self, here: Iterate, q: torch.Tensor) -> None:
        """Set q, and with it ρ and Bᵀq: one pass of ⟨∇G, q⟩ gives H q and Bᵀq both."""
        here.q, here.changes = q, []
        product, here.pulled = self.joint(here.linear, q)
        here.rho = here.v - product

    def joint(self, linear: Linearization, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return H q (K, n) and the sum of the problems' Bᵀq (p,): one pass."""
        product, parts = linear.pull(q)
        return product, self.outer.slope(parts).to(q)

    def slopes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return F (K,), ∇_φF (K, n) and the sum of the problems' ∇_θF (p,): one pass."""
        upper = self.upper
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            tensors = [
                t.detach().requires_grad_(True) if want else t
                for t, want in zip(upper.tensors, self.outer.needs_grad, strict=True)
            ]
            values = self.outputs(upper.shaped(point), *tensors)
            total = values.sum()
        theta = [t for t, want in zip(tensors, self.outer.needs_grad, strict=True) if want]
        slope, *direct = reverse_pass([total], [point, *theta], [torch.ones_like(total)], retain_graph=False)
        return values.detach().reshape(-1), slope, self.outer.slope(direct)
