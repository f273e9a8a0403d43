"""The settings of a learner, checked: λ, the normalisation of the model, and the solvers of the released code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import bilevel
from bilevel.meta.released import ReleasedDescent, ReleasedLinearSolve

__all__ = ["SHARED", "refuse_running_statistics", "register_lam", "released_solvers"]

# The name of a λ that all parameters share.
SHARED = "all"


def register_lam(learner: nn.Module, parameters: Mapping[str, torch.Tensor], lam: Any, learned: bool) -> dict[str, str]:
    """Register λ, or log λ if it is learned, beside the model; return the name of each under its parameter's name."""
    if not parameters:
        raise bilevel.ArgumentError(
            "IMAML: expected model to have parameters that require grad, and it has none; they are what is learned"
        )
    given: dict[str, Any] = dict(lam) if isinstance(lam, Mapping) else {SHARED: lam}
    if isinstance(lam, Mapping) and set(given) != set(parameters):
        raise bilevel.ArgumentError(
            f"IMAML: expected lam to name the model's trainable parameters, {sorted(parameters)}, got {sorted(given)}; give "
            "each of them a number or a tensor"
        )
    like = next(iter(parameters.values()))
    keys = {}
    for name, value in given.items():
        try:
            number = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        except (TypeError, ValueError):
            number = like.new_tensor(float("nan"))  # what is no number is refused as one
        shape = parameters[name].shape if name != SHARED else torch.Size()
        fits = number.ndim == 0 or (name != SHARED and number.shape == shape)
        if not fits or not bool(((number > 0) & torch.isfinite(number)).all()):
            what = "lam" if name == SHARED else f"lam[{name!r}]"
            got = f"shape {tuple(number.shape)}" if not fits else f"{value!r}"
            raise bilevel.ArgumentError(
                f"IMAML: expected {what} to be a positive finite number{'' if name == SHARED else f' or a tensor {tuple(shape)}'}"
                f", got {got}; pass a positive number"
            )
        keys[name] = name.replace(".", "/")
        if learned:
            learner.register_parameter(f"log_lam_{keys[name]}", nn.Parameter(number.log().clone()))
        else:
            learner.register_buffer(f"lam_{keys[name]}", number.clone())
    return keys


def refuse_running_statistics(model: nn.Module) -> None:
    """Raise if a normalisation of ``model`` updates running statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            raise bilevel.ArgumentError(
                f"IMAML: expected normalisation by batch statistics, and {name or 'model'} ({type(module).__name__}) keeps running "
                "ones, which every step of every task would change in place, so that one task's adaptation would depend "
                "on another's; construct it with track_running_stats=False, or put it in .eval() to use them as constants"
            )


def released_solvers(solver: Any, linear_solver: Any, lam: Any, learned: bool) -> tuple[Any, Any]:
    """Return the inner and the linear solver of the released code with these settings."""
    plain = isinstance(solver, bilevel.GradientDescent) and not solver.momentum and not solver.line_search
    if not plain or not isinstance(linear_solver, bilevel.CG) or linear_solver.max_steps is None:
        raise bilevel.ArgumentError(
            "IMAML: expected mode='released' with solver=GradientDescent(lr, max_steps) and linear_solver=CG(max_steps), got "
            f"{solver!r} and {linear_solver!r}; the released code has no others"
        )
    if learned or isinstance(lam, Mapping) or not math.isfinite(float(lam)) or float(lam) <= 0:
        raise bilevel.ArgumentError(
            f"IMAML: expected one positive number as lam in mode='released', got {lam!r}{', learned' if learned else ''}; the "
            "released code's linear system is not that of a λ for each tensor, nor its derivative λ's"
        )
    return (
        ReleasedDescent(solver.lr, solver.max_steps, float(lam)),
        ReleasedLinearSolve(linear_solver.max_steps, float(lam)),
    )
