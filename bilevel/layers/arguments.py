"""Checks of the arguments of a call under transforms, and the NaN that the policy ``"nan"`` returns."""

from __future__ import annotations

from typing import Any

import torch

from bilevel._torch.double_backward import Repeatable
from bilevel._torch.transforms import carries_gradient, forward_levels, without_gradient
from bilevel.equations.domain import leaves_domain
from bilevel.equations.system import System
from bilevel.errors import InitGradientError, StochasticObjectiveError, TransformError
from bilevel.layers.checks import captured_error
from bilevel.policy import OnFailure, handle_misuse

__all__ = ["check_captures", "init_gradient_error", "nan_of", "refuse_forward_twice"]


def refuse_forward_twice(where: str, tensors: list[torch.Tensor]) -> None:
    """Raise inside two forward-mode transforms."""
    if forward_levels(tensors) > 1:
        raise TransformError(
            f"{where}: expected at most one forward-mode transform around it, got two, for which torch "
            "silently returns zero (pytorch/pytorch#197867); write jacfwd(jacrev(f)) or torch.func.hessian(f) "
            "instead of jacfwd(jacfwd(f))"
        )


def init_gradient_error(where: str) -> InitGradientError:
    """Return the error for an initial guess that something differentiates."""
    return InitGradientError(
        f"{where}: expected init not to require grad, and it does: a solution does not depend on the initial "
        "guess, which would receive no gradient; pass init.detach(), for a dict {name: x.detach() for name, x in "
        "init.items()}, or pass the tensor as an argument"
    )


def check_captures(system: System, init: torch.Tensor, tensors: list[torch.Tensor], on_failure: OnFailure) -> bool:
    """Find tensors of an outer transform, which differentiates, that the function captures; return whether the policy asks for NaN."""
    # Inside the primitive, a captured tensor of a transform looks like a plain tensor. The check has to be here.
    detached = [without_gradient(tensor) for tensor in tensors]
    flat = without_gradient(init)
    try:
        with torch.enable_grad(), Repeatable():
            output = system.first_output(flat, *detached)
    except (RuntimeError, ValueError) as problem:
        if leaves_domain(problem):  # the solve reports it
            return False
        if "randomness" not in str(problem):
            raise
        raise StochasticObjectiveError(
            f"{system.where}: expected {system.noun} to be deterministic, and it draws random numbers inside vmap; "
            "switch dropout off with .eval(), or draw the noise outside and pass it as an argument"
        ) from problem
    if carries_gradient(output):
        error = captured_error(system.where, system.noun, "is being differentiated by a transform outside")
        return handle_misuse(error, on_failure)
    return False


def nan_of(system: System, init: Any, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a NaN whose derivatives are NaN too, for every tensor that the function captures and for init."""
    with torch.enable_grad():
        flat = system.raveler.ravel(init)
        try:
            reached = system.output(flat.detach(), *(tensor.detach() for tensor in tensors)).sum()
        except RuntimeError as problem:
            # vmap refuses random numbers. They are the fault that was found, so the error is expected.
            if "randomness" not in str(problem):
                raise
            reached = torch.zeros_like(flat.sum())
    return float("nan") * (reached + flat.sum())
