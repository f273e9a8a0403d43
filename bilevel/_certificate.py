"""How wrong a hypergradient is: a proof where the constants are known, an estimate where they are not.

With ε = ‖∇_φ G‖/μ and E_q = [r_lin + (L_F + L_H‖q‖) ε]/μ (C1 and C2 of the project's notes), the first-order
expansion of g around the returned φ gives (C3)::

    ‖ĝ − g‖ ≤ ‖B‖ E_q + L_B ε (‖q‖ + E_q) + L_θF ε

which needs, besides μ, Lipschitz constants of ∇_φF, H, B and ∇_θF. They are taken from the problem, or proven
zero or found exactly where the objectives are quadratic in φ. Otherwise the error is *estimated*, by
comparing ĝ with the hypergradient at the point that one Newton step leads to, whose own error is of second order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bilevel._system import Problem
from bilevel.linear._base import LinearSolver, solve_linear
from bilevel.linear.cg import CG
from bilevel.linear.exact import Exact
from bilevel.operators import LinearOperator, hessian
from bilevel.reports import Basis
from bilevel.tolerance import Target, auto_relative

__all__ = ["Bound", "Constants", "bound_hypergradient"]

# Matrices up to this many numbers are formed to find a norm; beyond, only an estimate is given.
_NORM_NUMBERS = 2**20
# Third derivatives are found entry by entry, up to this many reverse passes.
_MOST_PASSES = 2**12


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What is known of a bilevel problem, near its solution; None where it is not.

    Parameters
    ----------
    strong_convexity
        μ: least eigenvalue of H = ∇²_φφ G.
    outer_smoothness
        L_F: Lipschitz constant in φ of ∇_φ F.
    hessian_lipschitz
        L_H: of H, in the spectral norm.
    cross_lipschitz
        L_B: of B = ∂_θ∇_φ G, in the spectral norm.
    outer_cross_lipschitz
        L_θF: of ∇_θ F; 0 if F does not depend on θ directly.
    """

    strong_convexity: float | None = None
    outer_smoothness: float | None = None
    hessian_lipschitz: float | None = None
    cross_lipschitz: float | None = None
    outer_cross_lipschitz: float | None = None

    def with_mu(self, mu: float | None) -> Constants:
        """Return these constants with μ filled in where it is missing."""
        return self if self.strong_convexity is not None else replace(self, strong_convexity=mu)


@dataclass(frozen=True)
class Bound:
    """An error bound with what it rests on.

    Parameters
    ----------
    value
        Bound on ‖ĝ − g‖ in the Euclidean norm, or an estimate of it.
    basis
        :attr:`~bilevel.reports.Basis.CERTIFIED`, or :attr:`~bilevel.reports.Basis.ESTIMATED`.
    """

    value: float
    basis: Basis

    @property
    def certified(self) -> bool:
        """Whether the value is proven."""
        return self.basis is Basis.CERTIFIED


def bound_hypergradient(
    lower: Problem, upper: Problem, x: torch.Tensor, q: torch.Tensor, wanted: Sequence[bool], known: Constants
) -> Bound:
    """Bound ‖ĝ − g‖ for the hypergradient at ``x`` (K, n) with adjoint ``q`` (K, n), the mean over K problems."""
    found = _complete(lower, upper, x, q, wanted, known) if known.strong_convexity is not None else None
    if found is not None:
        value = _certify(lower, upper, x, q, wanted, found)
        if value is not None and math.isfinite(value):
            return Bound(value, Basis.CERTIFIED)
    return Bound(_estimate(lower, upper, x, q, wanted), Basis.ESTIMATED)


def _certify(
    lower: Problem, upper: Problem, x: torch.Tensor, q: torch.Tensor, wanted: Sequence[bool], known: Constants
) -> float | None:
    mu, l_f, l_h = known.strong_convexity, known.outer_smoothness, known.hessian_lipschitz
    l_b, l_tf = known.cross_lipschitz, known.outer_cross_lipschitz
    assert mu is not None
    assert l_f is not None and l_h is not None and l_b is not None and l_tf is not None
    linear = lower.linearize(x, wanted)
    norm_b = _cross_norm(lower, x, wanted)
    if norm_b is None:
        return None
    v = upper.residual(x)
    # Rounding in the residuals themselves is part of what is computed, so it is part of the bound.
    eps = torch.finfo(x.dtype).eps
    hq = linear.operator.matvec(q)
    r_in = linear.residual.detach().norm(dim=-1) + 8 * eps * linear.operator.matvec(x).norm(dim=-1)
    r_lin = (v - hq).norm(dim=-1) + 8 * eps * (v.norm(dim=-1) + hq.norm(dim=-1))
    epsilon = r_in / mu
    size = q.norm(dim=-1)
    e_q = (r_lin + (l_f + l_h * size) * epsilon) / mu
    total = norm_b * e_q + l_b * epsilon * (size + e_q) + l_tf * epsilon
    rounding = 8 * eps * norm_b * size
    return float((total + rounding).mean())


def _cross_norm(problem: Problem, x: torch.Tensor, wanted: Sequence[bool]) -> torch.Tensor | None:
    """Return ‖B‖ in the Frobenius norm, (K,), from n pullbacks a problem; None if it is too large to form."""
    outer = sum(t.numel() for t, want in zip(problem.tensors, wanted, strict=True) if want)
    if problem.batch * problem.size * outer > _NORM_NUMBERS:
        return None
    linear = problem.linearize(x, wanted)
    squares = []
    for k in range(problem.batch):
        total = x.new_zeros(())
        for i in range(problem.size):
            unit = torch.zeros_like(x)
            unit[k, i] = 1.0
            total = total + sum((g**2).sum() for g in linear.pullback(unit) if g is not None)
        squares.append(total)
    return torch.stack(squares).sqrt()


def _complete(
    lower: Problem, upper: Problem, x: torch.Tensor, q: torch.Tensor, wanted: Sequence[bool], known: Constants
) -> Constants | None:
    """Fill in the constants that quadratic objectives determine, or return None where one stays unknown.

    Whether H is constant is tested at two random points on random vectors. For an objective that is analytic in φ,
    agreement there means agreement everywhere, with probability one.
    """
    if None not in (
        known.outer_smoothness, known.hessian_lipschitz, known.cross_lipschitz, known.outer_cross_lipschitz
    ):  # fmt: skip
        return known
    size, batch = lower.size, lower.batch
    if batch * size * size > _NORM_NUMBERS:
        return None
    if known.hessian_lipschitz is None:
        if not _constant_hessian(lower, x):
            return None
        known = replace(known, hessian_lipschitz=0.0)
    if known.outer_smoothness is None:
        if not _constant_hessian(upper, x):
            return None
        matrix = _objective_hessian(upper, x).dense()
        known = replace(known, outer_smoothness=float(torch.linalg.matrix_norm(matrix, 2).max()))
    if known.outer_cross_lipschitz is None:
        slope = _slope_lipschitz(upper, x, wanted)
        if slope is None:
            return None
        known = replace(known, outer_cross_lipschitz=slope)
    if known.cross_lipschitz is None:
        lipschitz = _cross_lipschitz(lower, x, wanted)
        if lipschitz is None:
            return None
        known = replace(known, cross_lipschitz=lipschitz)
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
    return None if squared is None else float(squared.sqrt())


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


def _estimate(lower: Problem, upper: Problem, x: torch.Tensor, q: torch.Tensor, wanted: Sequence[bool]) -> float:
    """Return ‖ĝ − g⁺‖ with g⁺ the hypergradient at x − H⁻¹∇G, whose own error is of second order."""
    here = lower.linearize(x, wanted)
    target = Target(relative=auto_relative(x.dtype), silent=True)
    step = solve_linear(_solver(here.operator), here.operator, here.residual.detach(), target)
    refined = x - step.x
    there = lower.linearize(refined, wanted)
    adjoint = solve_linear(_solver(there.operator), there.operator, upper.residual(refined), target, q)
    pulled_here, pulled_there = here.pullback(q), there.pullback(adjoint.x)
    slope = _slopes(upper, x, wanted)[1].detach() - _slopes(upper, refined, wanted)[1].detach()
    pulled = torch.cat(
        [(a - b).reshape(-1) for a, b in zip(pulled_here, pulled_there, strict=True) if a is not None and b is not None]
    )
    difference = (slope - pulled).norm()
    return float(difference / lower.batch)


def _solver(operator: LinearOperator) -> LinearSolver:
    return Exact() if operator.batch * operator.size**2 <= _NORM_NUMBERS else CG()
