"""Constants that need not be given: those that follow from the degrees of the objectives as polynomials in φ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bilevel._torch.factorisations import norms
from bilevel.certificates._inner_point import MOST_NUMBERS
from bilevel.certificates.constants import Constants
from bilevel.equations.degrees import degree_of
from bilevel.equations.problem import Problem
from bilevel.operators import LinearOperator, hessian

__all__ = ["completed"]

# Third derivatives are found entry by entry, up to this many reverse passes.
_MOST_PASSES = 2**12
# What rounding may take off a norm of n numbers, in units of n.
_SLACK = 8


def completed(
    lower: Problem, upper: Problem, x: torch.Tensor, needs_grad: Sequence[bool], known: Constants
) -> Constants:
    """Return ``known`` with the constants that the degrees of G and F in φ prove.

    G of degree 2 has L_H = 0, and F of degree 2 has L_F = ‖∇²F‖. Consider the parts that depend on θ. Degree 1 in G gives
    L_B = 0. Degree 2 makes B affine, and L_B is at most the Frobenius norm of its derivative. Degree 1 in F does the same
    for L_θF. Such derivatives are the same at every φ.
    """
    size, batch = lower.size, lower.batch
    asked = (known.hessian_lipschitz, known.outer_smoothness, known.cross_lipschitz, known.outer_cross_lipschitz)
    if None not in asked or batch * size * size > MOST_NUMBERS or not batch:
        return known
    inner, outer = degree_of(lower, x, needs_grad), degree_of(upper, x, needs_grad)
    if known.hessian_lipschitz is None and inner.whole <= 2:
        known = replace(known, hessian_lipschitz=0.0)
    if known.outer_smoothness is None and outer.whole <= 2:
        known = _with(known, "outer_smoothness", _smoothness(upper, x) if outer.whole > 1 else x.new_zeros(()))
    if known.outer_cross_lipschitz is None and outer.part <= 1:
        known = _with(
            known,
            "outer_cross_lipschitz",
            _slope_lipschitz(upper, x, needs_grad) if outer.part > 0 else x.new_zeros(()),
        )
    if known.cross_lipschitz is None and inner.part <= 2:
        known = _with(
            known, "cross_lipschitz", _cross_lipschitz(lower, x, needs_grad) if inner.part > 1 else x.new_zeros(())
        )
    return known


def _with(known: Constants, name: str, value: torch.Tensor | None) -> Constants:
    """Return ``known`` with a computed constant; infinite for a problem in which it is not finite."""
    if value is None:
        return known
    value = value.detach() * (1 + _SLACK * torch.finfo(value.dtype).eps)
    value = value.nan_to_num(nan=float("inf"))
    if not bool(torch.isfinite(value).any()):
        return known
    return replace(known, **{name: value})  # type: ignore[arg-type]


def _smoothness(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """Return ‖∇²F‖ (K,), rounded up."""
    matrix = _objective_hessian(problem, x).dense()
    return norms(matrix) * (1 + _SLACK * problem.size * torch.finfo(x.dtype).eps)


def _objective_hessian(problem: Problem, x: torch.Tensor) -> LinearOperator:
    axes = problem.system.batch_shape

    def values(point: torch.Tensor) -> torch.Tensor:
        return problem.system.outputs(point.reshape(*axes, problem.size), *problem.tensors).reshape(problem.batch)

    return hessian(values, x)


def _slopes(problem: Problem, needs_grad: Sequence[bool], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leaf φ and ∂_θ of the objectives' sum as one vector (p,) with its graph."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        leaves = [t.detach().requires_grad_(True) if w else t for t, w in zip(problem.tensors, needs_grad, strict=True)]
        values = problem.system.outputs(point.reshape(*problem.system.batch_shape, problem.size), *leaves)
        return point, _flat_gradient(values.sum(), [leaf for leaf, w in zip(leaves, needs_grad, strict=True) if w])


def _pulled(
    problem: Problem, needs_grad: Sequence[bool], v: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leaf φ and Bᵀv as one vector (p,) with its graph."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        leaves = [t.detach().requires_grad_(True) if w else t for t, w in zip(problem.tensors, needs_grad, strict=True)]
        shaped = point.reshape(*problem.system.batch_shape, problem.size)
        residual = problem.system.plain_residual(shaped, leaves, graph=True).reshape(x.shape)
        return point, _flat_gradient(
            (residual * v).sum(), [leaf for leaf, w in zip(leaves, needs_grad, strict=True) if w]
        )


def _flat_gradient(scalar: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    gradients = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _squared_norm(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor
) -> torch.Tensor:
    """Return the squared Frobenius norms (K,) of the Jacobians by each problem's φ of an affine function of all, by reverse passes."""
    point, output = function(x)
    total = x.new_zeros(len(x))
    if not output.requires_grad:
        return total
    for entry in output:
        (row,) = torch.autograd.grad(entry, point, retain_graph=True, allow_unused=True, materialize_grads=True)
        total = total + (row**2).sum(-1)
    return total


def _outer_numbers(problem: Problem, needs_grad: Sequence[bool]) -> int:
    return sum(t.numel() for t, w in zip(problem.tensors, needs_grad, strict=True) if w)


def _slope_lipschitz(problem: Problem, x: torch.Tensor, needs_grad: Sequence[bool]) -> torch.Tensor | None:
    if _outer_numbers(problem, needs_grad) > _MOST_PASSES:
        return None
    return _squared_norm(functools.partial(_slopes, problem, needs_grad), x).sqrt()


def _cross_lipschitz(problem: Problem, x: torch.Tensor, needs_grad: Sequence[bool]) -> torch.Tensor | None:
    if problem.size * _outer_numbers(problem, needs_grad) > _MOST_PASSES:
        return None
    total = x.new_zeros(len(x))
    for i in range(problem.size):
        unit = torch.zeros_like(x)
        unit[:, i] = 1.0  # of every problem: the derivative by φ tells them apart
        total = total + _squared_norm(functools.partial(_pulled, problem, needs_grad, unit), x)
    return total.sqrt()
