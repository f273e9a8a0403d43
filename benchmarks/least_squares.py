"""128 curve fits as one batch, with their derivatives, beside a loop over scipy.optimize.least_squares without: ``python -m benchmarks.least_squares``.

Each fit is y = p_0 exp(−p_1 t) + p_2 at 30 points with noise of its own. Ours is timed with the derivative of Σ p by every datum, scipy's without.
Both start from ones, and both are the median of five runs after one to warm up; scipy's is given the Jacobian in closed form.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch
from torch.func import vmap

import bilevel

FITS, POINTS = 128, 30
T = torch.linspace(0, 3, POINTS, dtype=torch.float64)


@bilevel.least_squares
def fit(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return p[0] * torch.exp(-p[1] * T) + p[2] - y


def data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([2.0, 0.8, 0.3], dtype=torch.float64) + 0.3 * torch.rand(
        FITS, 3, generator=generator, dtype=torch.float64
    )
    noise = 0.05 * torch.randn(FITS, POINTS, generator=generator, dtype=torch.float64)
    return truth[:, :1] * torch.exp(-truth[:, 1:2] * T) + truth[:, 2:] + noise


def ours(y: torch.Tensor) -> torch.Tensor:
    given = y.clone().requires_grad_()
    p = vmap(fit)(torch.ones(FITS, 3, dtype=torch.float64), given)
    p.sum().backward()
    return p.detach()


def scipy_s(y: torch.Tensor, method: str) -> np.ndarray:
    t = T.numpy()

    def jacobian(p: np.ndarray, _: np.ndarray) -> np.ndarray:
        decay = np.exp(-p[1] * t)
        return np.stack([decay, -p[0] * t * decay, np.ones_like(t)], 1)

    def residual(p: np.ndarray, one: np.ndarray) -> np.ndarray:
        return p[0] * np.exp(-p[1] * t) + p[2] - one

    return np.stack(
        [
            scipy.optimize.least_squares(
                residual, np.ones(3), jacobian, args=(one,), method=method, xtol=1e-10, ftol=1e-10, gtol=1e-10
            ).x
            for one in y.numpy()
        ]
    )


def seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    y = data()
    found = ours(y)
    expected = torch.as_tensor(scipy_s(y, "lm"))
    print(f"largest difference of a parameter: {float((found - expected).abs().max()):.1e}")
    mine = seconds(lambda: ours(y))
    print(f"bilevel.least_squares, one batch, with derivative: {1e3 * mine:7.1f} ms")
    for method in ("trf", "lm"):
        theirs = seconds(lambda method=method: scipy_s(y, method))
        print(f"scipy least_squares({method!r}), a loop, without:       {1e3 * theirs:7.1f} ms   {theirs / mine:.0f}x")


if __name__ == "__main__":
    main()
