"""Independent references: nothing here imports a solver or a rule of the library.

A solution is found by Newton's method in float64, written out with torch.func and a dense solve. Unrolling it gives
derivatives of every order: each further step at the solution makes one more order exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import grad, hessian, jacrev


def newton_argmin(
    objective: Callable[..., torch.Tensor], init: torch.Tensor, *args: object, steps: int = 14
) -> torch.Tensor:
    """Return argmin of ``objective`` over a vector, differentiable by unrolling."""
    x = init
    for _ in range(steps):
        x = x - torch.linalg.solve(hessian(objective)(x, *args), grad(objective)(x, *args))
    return x


def newton_root(
    residual: Callable[..., torch.Tensor], init: torch.Tensor, *args: object, steps: int = 14
) -> torch.Tensor:
    """Return the root of ``residual`` over a vector, differentiable by unrolling."""
    x = init
    for _ in range(steps):
        x = x - torch.linalg.solve(jacrev(residual)(x, *args), residual(x, *args))
    return x


def ridge(X: torch.Tensor, y: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Return argmin ‖Xw − y‖² + Σ strength·w², in closed form."""
    n = X.shape[-1]
    return torch.linalg.solve(
        X.mT @ X
        + torch.diag_embed(strength.expand(*strength.shape[:-1], n) if strength.ndim else strength * X.new_ones(n)),
        X.mT @ y,
    )
