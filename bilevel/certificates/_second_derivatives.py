"""B = ∂_θ∇_φG, its products, and the gradient of the Lagrangian, for each problem of a batch.

Each is computed for all problems at once by ``vmap``. Where something in the objective has no rule for a transform, reverse passes of one problem
after the other do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import vmap

from bilevel._torch.reverse import grad, vjp
from bilevel.equations.problem import Problem

__all__ = ["SecondDerivatives"]


@dataclass(frozen=True, eq=False)
class SecondDerivatives:
    """Derivatives of G, and of the Lagrangian F − qᵀ∇_φG, by θ.

    Parameters
    ----------
    lower, upper
        The inner objective G and the outer objective F, as problems of one list of tensors.
    needs_grad
        Which tensors make up θ, with p numbers in all.
    """

    lower: Problem
    upper: Problem
    needs_grad: tuple[bool, ...]

    def cross(self, x: torch.Tensor, *, by_columns: bool) -> torch.Tensor:
        """Return B (K, n, p) at x (K, n); ``by_columns`` if p is smaller than n."""
        by_vmap = self._cross_by_columns if by_columns else self._cross_by_vmap
        return _each(self.lower, x[:, None], by_vmap, self._cross_by_passes)

    def cross_square(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return B Bᵀ u for u (K, n)."""
        return _each(self.lower, torch.stack([x, u], 1), self._square_by_vmap, None)

    def lagrangian(self, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Return ∇_θ F − Bᵀ q (K, p)."""
        return _each(self.lower, torch.stack([x, q], 1), self._lagrangian_by_vmap, self._lagrangian_by_passes)

    def _chosen(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], Callable[..., list[torch.Tensor]]]:
        """Return the tensors of θ, and a function that puts others of their shapes in their places."""

        def merged(*moved: torch.Tensor) -> list[torch.Tensor]:
            feed = iter(moved)
            return [next(feed) if want else t for t, want in zip(tensors, self.needs_grad, strict=True)]

        return tuple(t for t, want in zip(tensors, self.needs_grad, strict=True) if want), merged

    def _pullback(self, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """Return u ↦ Bᵀu at x (n,), and the tensors of θ."""
        chosen, merged = self._chosen(tensors)
        system = self.lower.system
        made: Any = vjp(lambda *moved: grad(lambda point: system.output(point, *merged(*moved)), x)[0], *chosen)
        return made[1], chosen

    # vmap is outermost in all of these: torch 2.13 differentiates vmap(grad(f)) wrongly from outside when f holds a batch norm.
    def _cross_by_vmap(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        pullback, _ = self._pullback(rows[0], tensors)
        n = rows.shape[1]
        pulled = vmap(pullback)(torch.eye(n, dtype=rows.dtype, device=rows.device))
        return torch.cat([part.reshape(n, -1) for part in pulled], dim=1)

    def _cross_by_columns(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        x = rows[0]
        pullback, chosen = self._pullback(x, tensors)

        # B w = ∇_u ⟨w, Bᵀu⟩.
        def column(w: torch.Tensor) -> torch.Tensor:
            return grad(lambda u: torch.dot(w, torch.cat([part.reshape(-1) for part in pullback(u)])), x)[0]

        units = torch.eye(sum(t.numel() for t in chosen), dtype=x.dtype, device=x.device)
        return vmap(column)(units).mT

    def _square_by_vmap(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        x, u = rows
        pullback, _ = self._pullback(x, tensors)
        fixed = [part.detach() for part in pullback(u)]
        # B w = ∇_u ⟨w, Bᵀu⟩.
        return grad(lambda v: torch.stack([(a * b).sum() for a, b in zip(fixed, pullback(v), strict=True)]).sum(), u)[0]

    def _cross_by_passes(self, single: Problem, rows: torch.Tensor) -> torch.Tensor:
        linear = single.linearize(rows[:1], self.needs_grad)
        units = torch.eye(self.lower.size, dtype=rows.dtype, device=rows.device)
        return torch.stack([_joined(linear.pullback(unit[None])) for unit in units])

    def _lagrangian_by_vmap(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        chosen, merged = self._chosen(tensors)
        lower, upper = self.lower.system, self.upper.system
        x, q = rows

        def lagrangian(*moved: torch.Tensor) -> torch.Tensor:
            feed = merged(*moved)
            (slope,) = grad(lambda point: lower.output(point, *feed), x)
            return upper.output(x, *feed) - torch.dot(q, slope)

        parts = grad(lagrangian, *chosen)
        return torch.cat([part.reshape(-1) for part in parts])

    def _lagrangian_by_passes(self, single: Problem, rows: torch.Tensor) -> torch.Tensor:
        pulled = _joined(single.linearize(rows[:1], self.needs_grad).pullback(rows[1:]))
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(True) if want else t
                for t, want in zip(single.tensors, self.needs_grad, strict=True)
            ]
            value = self.upper.system.output(rows[0], *leaves)
            chosen = [leaf for leaf, want in zip(leaves, self.needs_grad, strict=True) if want]
            if not value.requires_grad:
                return -pulled
            slopes = torch.autograd.grad(value, chosen, allow_unused=True, materialize_grads=True)
        return _joined(slopes) - pulled


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts if part is not None])


def _each(
    problem: Problem,
    rows: torch.Tensor,
    by_vmap: Callable[..., torch.Tensor],
    by_passes: Callable[[Problem, torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Return a function of each problem's ``rows`` (K, k, n) and tensors, all at once if it can be transformed."""
    system = problem.system
    shaped = rows.reshape(*system.batch_shape, *rows.shape[1:])
    try:
        with torch.no_grad():
            found: torch.Tensor = system.lifted(by_vmap)(shaped, *problem.tensors)
        return found.detach().reshape(problem.batch, *found.shape[len(system.batch_shape) :])
    except RuntimeError:
        if by_passes is None:
            raise
        return torch.stack([by_passes(problem.single(k), rows[k]).detach() for k in range(problem.batch)])
