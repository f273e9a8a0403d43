"""The value and hypergradient of a Lasso, n = 200 and d = 500, beside scikit-learn's solution with the closed form of its derivative.

JAXopt's proximal gradient, compiled, is timed where it is installed. Run ``python benchmarks/lasso.py``. The hypergradient is that of a
validation loss with respect to the strength. Answers are compared first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jaxopt_peers
import torch
from sklearn.linear_model import Lasso
from timing import check, compare, rounds

import bilevel

F64 = torch.float64
N, D, NONZERO = 200, 500, 20


def loss(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, *strength: torch.Tensor) -> torch.Tensor:
    r = X @ w - y
    return 0.5 * (r @ r) / len(y)


layer = bilevel.argmin(loss, prox=lambda X, y, s: bilevel.prox.L1(s))
Data = tuple[torch.Tensor, ...]


def problem(share: float) -> Data:
    """Return training data, validation data, and a strength: ``share`` of the least that makes every weight zero."""
    generator = torch.Generator().manual_seed(0)
    X, Xv = torch.randn(2, N, D, generator=generator, dtype=F64)
    w = torch.zeros(D, dtype=F64)
    w[:NONZERO] = torch.randn(NONZERO, generator=generator, dtype=F64)
    y = X @ w + 0.1 * torch.randn(N, generator=generator, dtype=F64)
    return X, y, Xv, Xv @ w, share * (X.mT @ y).abs().max() / N


def by_layer(X: torch.Tensor, y: torch.Tensor, Xv: torch.Tensor, yv: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    s = s.clone().requires_grad_()
    value = loss(layer(torch.zeros(D, dtype=F64), X, y, s), Xv, yv)
    value.backward()
    assert s.grad is not None
    return torch.stack([value.detach(), s.grad])


def by_formula(X: torch.Tensor, y: torch.Tensor, Xv: torch.Tensor, yv: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    model = Lasso(alpha=s.item(), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(X.numpy(), y.numpy())
    w = torch.from_numpy(model.coef_)
    S = w != 0
    A, r = X[:, S], Xv @ w - yv
    moved = -torch.linalg.solve(A.mT @ A / N, w[S].sign())
    return torch.stack([0.5 * (r @ r) / N, (Xv[:, S].mT @ r / N) @ moved])


def main() -> None:
    """Compare the answers, then the times."""
    count = rounds(40)
    for share in (0.3, 0.1, 0.03, 0.01):
        data = problem(share)
        check(f"strength {share}", by_layer(*data), by_formula(*data), 1e-6)
        contestants: dict[str, Callable[[], object]] = {
            "scikit-learn and the closed form": functools.partial(by_formula, *data),
            "bilevel.argmin with a term": functools.partial(by_layer, *data),
        }
        if jaxopt_peers.INSTALLED:
            peer = jaxopt_peers.lasso(data, tol=1e-8)
            error = ((peer() - by_formula(*data)).abs() / by_formula(*data).abs()).max()
            print(f"  {'JAXopt, tol 1e-8':44s} relative error {float(error):.1e}")
            contestants["JAXopt's proximal gradient, tol 1e-8"] = peer
        compare(f"Lasso, strength {share} of the largest", contestants, "scikit-learn and the closed form", count)


if __name__ == "__main__":
    main()
