"""The same problems for JAXopt, compiled: contestants of ``lasso.py`` and ``quadratic_programs.py`` where it is installed.

JAX is none of this project's dependencies. Answers come back as torch tensors, so that they are compared like the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

INSTALLED = bool(importlib.util.find_spec("jaxopt"))


def _jax() -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def _arrays(tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    jax = _jax()
    return [jax.numpy.asarray(t.detach().numpy()) for t in tensors]


def lasso(data: tuple[torch.Tensor, ...], tol: float) -> Callable[[], torch.Tensor]:
    """The validation loss and its derivative by the strength, by accelerated proximal gradient to the residual ``tol``."""
    jax = _jax()
    import jaxopt

    X, y, Xv, yv, s = _arrays(data)

    def loss(w: Any, X: Any, y: Any) -> Any:
        r = X @ w - y
        return 0.5 * (r @ r) / len(y)

    solver = jaxopt.ProximalGradient(fun=loss, prox=jaxopt.prox.prox_lasso, tol=tol, maxiter=100_000)

    @jax.jit
    def both(s: Any) -> Any:
        return jax.value_and_grad(
            lambda s: loss(solver.run(jax.numpy.zeros(X.shape[1]), hyperparams_prox=s, X=X, y=y).params, Xv, yv)
        )(s)

    return lambda: torch.from_numpy(np.stack([np.asarray(part) for part in both(s)]))


def quadratic_programs(data: dict[str, torch.Tensor], tol: float) -> Callable[[], torch.Tensor]:
    """x of each program, after its derivatives by all of Q, q, G, h, by OSQP under vmap."""
    jax = _jax()
    import jaxopt

    Q, q, G, h = _arrays(tuple(data[name] for name in ("Q", "q", "G", "h")))
    solver = jaxopt.OSQP(tol=tol, maxiter=20_000)

    def one(Q: Any, q: Any, G: Any, h: Any) -> Any:
        return solver.run(params_obj=(Q, q), params_ineq=(G, h)).params.primal

    @jax.jit
    def both(*args: Any) -> Any:
        def total(*args: Any) -> Any:
            x = jax.vmap(one)(*args)
            return x.sum(), x

        (_, x), gradients = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*args)
        return x, gradients

    return lambda: torch.from_numpy(np.asarray(jax.block_until_ready(both(Q, q, G, h))[0]))
