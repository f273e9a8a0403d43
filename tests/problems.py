"""Small problems with a name, used by several tests; each has an oracle in ``oracles``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import bilevel

from . import oracles

F64 = torch.float64


def regression(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """A convex objective that is not quadratic, with three kinds of argument."""
    return ((X @ w - y) ** 2).sum() + s.exp() * (w**2).sum() + 0.1 * (w**4).sum()


def coupled(x: torch.Tensor, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """A residual whose Jacobian is far from symmetric."""
    n = x.shape[0]
    skew = torch.triu(torch.ones(n, n, dtype=x.dtype), 1)
    return x + 0.3 * torch.tanh((skew - 2 * skew.mT) @ x) + s.exp() * x**3 - X.mT @ y


def contraction(x: torch.Tensor, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """A mapping with a Lipschitz constant below one half."""
    n = x.shape[0]
    skew = torch.triu(torch.ones(n, n, dtype=x.dtype), 1)
    return 0.1 * torch.sigmoid(s) * torch.tanh((skew - 2 * skew.mT) @ x) + 0.2 * X.mT @ y


@dataclass(frozen=True)
class Family:
    """A layer and the oracle that gives the same answer."""

    name: str
    layer: Callable[..., bilevel.Layer]
    function: Callable[..., torch.Tensor]
    oracle: Callable[..., torch.Tensor]

    def implicit(self, **settings: object) -> Callable[..., torch.Tensor]:
        layer = self.layer(self.function, **settings)
        return lambda X, y, s: layer(torch.zeros(3, dtype=X.dtype), X, y, s)

    def reference(self, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self.oracle(X, y, s)


def _argmin_oracle(X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return oracles.newton_argmin(regression, torch.zeros(3, dtype=X.dtype), X, y, s)


def _root_oracle(X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return oracles.newton_root(coupled, torch.zeros(3, dtype=X.dtype), X, y, s)


def _fixed_oracle(X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return oracles.newton_root(lambda x, *a: x - contraction(x, *a), torch.zeros(3, dtype=X.dtype), X, y, s)


FAMILIES = (
    Family("argmin", bilevel.argmin, regression, _argmin_oracle),
    Family("root", bilevel.root, coupled, _root_oracle),
    Family("fixed_point", bilevel.fixed_point, contraction, _fixed_oracle),
)


def arguments(seed: int = 0, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return X (6, 3), y (6,), s ()."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    return draw(6, 3), 0.3 * draw(6), 0.3 * draw()
