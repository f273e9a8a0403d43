"""128 curve fits as one batch, with their derivatives, beside loops over scipy.optimize.least_squares without.

Theseus, which solves a batch as well, is timed where it is installed, with its derivative.

``python -m benchmarks.least_squares``. Each fit is y = p_0 exp(−p_1 t) + p_2 at 30 points with noise of its own. Ours is timed with the derivative of
Σ p by every datum, scipy's without. All begin from ones. The figures are CPU times, the least of some runs after others to warm up.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch.func import jacfwd, vmap

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


def scipy_s(y: torch.Tensor, residual: Callable[..., np.ndarray], **settings: Any) -> np.ndarray:
    fits = (scipy.optimize.least_squares(residual, np.ones(3), args=(one,), **settings) for one in y.numpy())
    return np.stack([found.x for found in fits])


def in_numpy(p: np.ndarray, one: np.ndarray) -> np.ndarray:
    decay: np.ndarray = p[0] * np.exp(-p[1] * T.numpy()) + p[2] - one
    return decay


def its_jacobian(p: np.ndarray, _: np.ndarray) -> np.ndarray:
    t = T.numpy()
    decay = np.exp(-p[1] * t)
    return np.stack([decay, -p[0] * t * decay, np.ones_like(t)], 1)


def in_torch(p: np.ndarray, one: np.ndarray) -> np.ndarray:
    found: np.ndarray = fit.function(torch.as_tensor(p), torch.as_tensor(one)).numpy()
    return found


def by_torch(p: np.ndarray, one: np.ndarray) -> np.ndarray:
    found: np.ndarray = jacfwd(fit.function)(torch.as_tensor(p), torch.as_tensor(one)).numpy()
    return found


def theseus_s(y: torch.Tensor, steps: int) -> Callable[[], torch.Tensor]:
    """The batch by Theseus: Levenberg-Marquardt, Jacobians by torch's vmap, and the implicit derivative."""
    import theseus as th

    def residual(optim_vars: Any, aux_vars: Any) -> torch.Tensor:
        p, one = optim_vars[0].tensor, aux_vars[0].tensor
        return p[:, :1] * torch.exp(-p[:, 1:2] * T) + p[:, 2:] - one

    objective = th.Objective(dtype=torch.float64)
    unknown, observed = th.Vector(3, name="p", dtype=torch.float64), th.Variable(torch.zeros_like(y), name="y")
    weight = th.ScaleCostWeight(th.Variable(torch.ones(1, 1, dtype=torch.float64)))
    objective.add(
        th.AutoDiffCostFunction([unknown], residual, POINTS, weight, aux_vars=[observed], autograd_mode="vmap")
    )
    method = th.LevenbergMarquardt(
        objective, max_iterations=steps, step_size=1.0, abs_err_tolerance=1e-16, rel_err_tolerance=1e-12
    )
    layer = th.TheseusLayer(method)

    def run() -> torch.Tensor:
        given = y.clone().requires_grad_()
        inputs = {"p": torch.ones(FITS, 3, dtype=torch.float64), "y": given}
        options = {"backward_mode": "implicit", "damping": 1e-3}  # with adaptive damping some fits end elsewhere
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, _ = layer.forward(inputs, optimizer_kwargs=options)
        found["p"].sum().backward()
        p: torch.Tensor = found["p"].detach()
        return p

    return run


def seconds(run: Callable[[], object], runs: int) -> float:
    for _ in range(runs):  # what is replayed later is noted at the first calls
        run()
    times = []
    for _ in range(runs):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    y = data()
    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}
    expected = torch.as_tensor(scipy_s(y, in_numpy, jac=its_jacobian, method="lm", **tight))
    print(f"largest difference of a parameter: {float((ours(y) - expected).abs().max()):.1e}")
    mine = seconds(lambda: ours(y), 5)
    print(f"{'bilevel.least_squares, one batch, with derivative':60s} {1e3 * mine:7.1f} ms")
    if importlib.util.find_spec("theseus"):
        run = theseus_s(y, 20)
        error = float((run() - expected).abs().max())
        theirs = seconds(run, 3)
        name = f"Theseus, one batch, with derivative (off by {error:.0e})"
        print(f"{name:60s} {1e3 * theirs:7.1f} ms   {theirs / mine:.1f}x")
    loops: dict[str, Callable[[], object]] = {
        "the same residual in torch, Jacobian by jacfwd": lambda: scipy_s(y, in_torch, jac=by_torch),
        "the same residual in torch, Jacobian by differences": lambda: scipy_s(y, in_torch),
        "written in numpy, Jacobian by differences": lambda: scipy_s(y, in_numpy),
        "written in numpy, Jacobian by hand": lambda: scipy_s(y, in_numpy, jac=its_jacobian),
        "written in numpy, Jacobian by hand, MINPACK": lambda: scipy_s(y, in_numpy, jac=its_jacobian, method="lm"),
    }
    for name, loop in loops.items():
        theirs = seconds(loop, 2)
        print(f"{'scipy in a loop: ' + name:60s} {1e3 * theirs:7.1f} ms   {theirs / mine:.1f}x")


if __name__ == "__main__":
    main()
