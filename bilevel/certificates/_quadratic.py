"""Constants that need not be given: those of objectives that are quadratic in φ."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bilevel._problem import Problem
from bilevel.certificates._point import MOST_NUMBERS
from bilevel.certificates.constants import Constants
from bilevel.operators import LinearOperator, hessian

__all__ = ["completed"]

# Third derivatives are found entry by entry, up to this many reverse passes.
_MOST_PASSES = 2**12


def completed(lower: Problem, upper: Problem, x: torch.Tensor, wanted: Sequence[bool], known: Constants) -> Constants:
    """Return ``known`` with what quadratic objectives determine filled in: L_H = 0, L_F = ‖∇²F‖, and L_B, L_θF.

    Whether H is constant is tested at two random points on random vectors. For an objective that is analytic in φ,
    agreement there means agreement everywhere, with probability one. One that is quadratic in pieces may pass: the caller looks
    at the way to a better point, too.
    """
    size, batch = lower.size, lower.batch
    if batch * size * size > MOST_NUMBERS:
        return known
    if known.hessian_lipschitz is None and _constant_hessian(lower, x):
        known = replace(known, hessian_lipschitz=0.0)
    if known.outer_smoothness is None and _constant_hessian(upper, x):
        matrix = _objective_hessian(upper, x).dense()
        known = replace(known, outer_smoothness=torch.linalg.matrix_norm(matrix, 2))
    if known.outer_cross_lipschitz is None:
        known = replace(known, outer_cross_lipschitz=_slope_lipschitz(upper, x, wanted))
    if known.cross_lipschitz is None:
        known = replace(known, cross_lipschitz=_cross_lipschitz(lower, x, wanted))
    return known


def _random(like: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _is_constant(first: torch.Tensor, second: torch.Tensor, scale: torch.Tensor) -> bool:
    return bool(((first - second).norm() <= 64 * torch.finfo(first.dtype).eps * (scale + first.norm())).all())


def _objective_hessian(problem: Problem, x: torch.Tensor) -> LinearOperator:
    axes = problem.system.batch_shape

    def values(point: torch.Tensor) -> torch.Tensor:
        return problem.system.outputs(point.reshape(*axes, problem.size), *problem.tensors).reshape(problem.batch)

    return hessian(values, x)


def _constant_hessian(problem: Problem, x: torch.Tensor) -> bool:
    vector = _random(x, 1)
    here = _objective_hessian(problem, x).matvec(vector)
    for seed in (2, 3):
        step = _random(x, seed) * (1 + x.abs().amax())
        there = _objective_hessian(problem, x + step).matvec(vector)
        if not _is_constant(here, there, there.norm()):
            return False
    return True


def _slopes(problem: Problem, x: torch.Tensor, wanted: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leaf φ and ∂_θ of the objectives' sum as one vector (p,) with its graph."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        leaves = [t.detach().requires_grad_(True) if w else t for t, w in zip(problem.tensors, wanted, strict=True)]
        values = problem.system.outputs(point.reshape(*problem.system.batch_shape, problem.size), *leaves)
        return point, _flat_gradient(values.sum(), [leaf for leaf, w in zip(leaves, wanted, strict=True) if w])


def _pulled(
    problem: Problem, x: torch.Tensor, wanted: Sequence[bool], v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leaf φ and Bᵀv as one vector (p,) with its graph."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        leaves = [t.detach().requires_grad_(True) if w else t for t, w in zip(problem.tensors, wanted, strict=True)]
        shaped = point.reshape(*problem.system.batch_shape, problem.size)
        residual = problem.system.plain_residual(shaped, leaves, graph=True).reshape(x.shape)
        return point, _flat_gradient((residual * v).sum(), [leaf for leaf, w in zip(leaves, wanted, strict=True) if w])


def _flat_gradient(scalar: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    gradients = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _affine_norm(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor
) -> torch.Tensor | None:
    """Return the squared Frobenius norm of the Jacobian of an affine function of φ, or None if it is not affine."""
    step = _random(x, 4) * (1 + x.abs().amax())
    middle, ahead, behind = (function(at)[1].detach() for at in (x, x + step, x - step))
    if not _is_constant(ahead + behind, 2 * middle, ahead.norm() + behind.norm()):
        return None
    point, output = function(x)
    if not output.requires_grad:
        return x.new_zeros(())
    total = x.new_zeros(())
    for entry in output:
        (row,) = torch.autograd.grad(entry, point, retain_graph=True, allow_unused=True, materialize_grads=True)
        total = total + (row**2).sum()
    return total


def _slope_lipschitz(problem: Problem, x: torch.Tensor, wanted: Sequence[bool]) -> float | None:
    if sum(t.numel() for t, w in zip(problem.tensors, wanted, strict=True) if w) > _MOST_PASSES:
        return None
    squared = _affine_norm(lambda at: _slopes(problem, at, wanted), x)
    return None if squared is None else float(squared.detach().sqrt())


def _cross_lipschitz(problem: Problem, x: torch.Tensor, wanted: Sequence[bool]) -> float | None:
    outer = sum(t.numel() for t, w in zip(problem.tensors, wanted, strict=True) if w)
    if problem.batch * problem.size * outer > _MOST_PASSES:
        return None
    total = x.new_zeros(())
    for k in range(problem.batch):
        for i in range(problem.size):
            unit = torch.zeros_like(x)
            unit[k, i] = 1.0
            squared = _affine_norm(functools.partial(_pulled_at, problem, wanted, unit), x)
            if squared is None:
                return None
            total = total + squared
    return float(total.sqrt())


def _pulled_at(
    problem: Problem, wanted: Sequence[bool], v: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _pulled(problem, x, wanted, v)
