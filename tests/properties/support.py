"""What the properties have in common: derivatives of a drawn problem, and comparison to a stated relative error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.testing.strategies import RandomProblem

Function = Callable[..., Any]


def flat(tree: Any) -> torch.Tensor:
    """Return a pytree as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def normal(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def pull(
    function: Function, args: Sequence[torch.Tensor], cotangent: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the flat value of ``function`` and its vector-Jacobian products with every argument."""
    leaves = [argument.detach().clone().requires_grad_(True) for argument in args]
    value = flat(function(*leaves))
    pulled = torch.autograd.grad(value, leaves, cotangent.to(value), allow_unused=True, materialize_grads=True)
    return value.detach(), list(pulled)


def implicit(problem: RandomProblem, **settings: Any) -> Function:
    """Return args ↦ x*, by the library."""
    layer = problem.layer(**settings)
    return lambda *args: layer(problem.init, *args)


def wide(args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [argument.double() for argument in args]


def assert_near(
    mine: Sequence[torch.Tensor], others: Sequence[torch.Tensor], error: float, *, scale: float | None = None
) -> None:
    """Hold ‖mine − other‖ ≤ error · ‖other‖ for each pair, or ``scale`` where that is larger."""
    for number, (a, b) in enumerate(zip(mine, others, strict=True)):
        size = max(float(b.double().norm()), scale or 0.0)
        wrong = float((a.double() - b.double()).norm())
        assert wrong <= error * size, f"number {number}: ‖difference‖ {wrong:.3e}, stated {error:.1e} of {size:.3e}"
