"""Independent references for ``defaults.py``: damped Newton, plain iteration and the implicit gradient, batched, in float64.

Nothing here imports the library. All functions take (z, θ, *data) with a leading batch axis K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
Function = Callable[..., Tensor]


def residual(kind: str, function: Function, z: Tensor, *args: Tensor) -> Tensor:
    """Return R (K, n): the gradient of an objective, a residual, or z − T(z), with its graph if z requires grad."""
    if kind == "argmin":
        with torch.enable_grad():
            at = z if z.requires_grad else z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(function(at, *args).sum(), at, create_graph=at is z, materialize_grads=True)
        return slope
    value = function(z, *args)
    return z - value if kind == "fixed_point" else value


def linearized(kind: str, function: Function, z: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Return R (K, n) and its Jacobian (K, n, n)."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        value = residual(kind, function, z, *args)
        rows = []
        for i in range(z.shape[-1]):
            if value.requires_grad:
                (row,) = torch.autograd.grad(value[:, i].sum(), z, retain_graph=True, materialize_grads=True)
            else:
                row = torch.zeros_like(z)
            rows.append(row)
    return value.detach(), torch.stack(rows, 1)


def newton_step(kind: str, value: Tensor, jacobian: Tensor) -> Tensor:
    """Return the step: for an argmin with every curvature taken positive, so that it descends."""
    if kind == "argmin":
        fine = torch.isfinite(jacobian).all(-1).all(-1)[:, None, None]
        symmetric = torch.where(fine, 0.5 * (jacobian + jacobian.mT), torch.eye(jacobian.shape[-1]).to(jacobian))
        curvature, vectors = torch.linalg.eigh(symmetric)
        least = 1e-14 * curvature.abs().amax(-1, keepdim=True) + 1e-300
        inverse = 1 / torch.maximum(curvature.abs(), least)
        return -(vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ value.unsqueeze(-1)))).squeeze(-1)
    step, info = torch.linalg.solve_ex(jacobian, value.unsqueeze(-1))
    broken = (info != 0)[:, None] | ~torch.isfinite(step.squeeze(-1)).all(-1, keepdim=True)
    return torch.where(broken, -value, -step.squeeze(-1))


def newton(kind: str, function: Function, start: Tensor, *args: Tensor, steps: int = 300) -> tuple[Tensor, Tensor]:
    """Return z (K, n) of damped Newton and whether it converged: the last step is 1e-9 of z, and of an argmin H is definite."""
    z, active = start.clone(), torch.ones(len(start), dtype=torch.bool)

    def merit(at: Tensor, value: Tensor | None = None) -> Tensor:
        if kind == "argmin":
            return torch.nan_to_num(function(at, *args), nan=torch.inf)
        value = residual(kind, function, at, *args) if value is None else value
        return torch.nan_to_num(value.norm(dim=-1), nan=torch.inf)

    for _ in range(steps):
        value, jacobian = linearized(kind, function, z, *args)
        step = newton_step(kind, value, jacobian)
        tiny = (step.abs() <= 1e-13 * (1 + z.abs())).all(-1) | ~torch.isfinite(step).all(-1)
        active = active & ~tiny
        if not bool(active.any()):
            break
        before = merit(z, None if kind == "argmin" else value)
        decrease = (value * step).sum(-1) if kind == "argmin" else -before
        size = torch.ones(len(z), 1, dtype=z.dtype)
        for _ in range(60):
            # What rounding does to the merit excuses a step near the solution.
            after = merit(z + size * step)
            enough = after <= before + 1e-4 * size[:, 0] * decrease + 1e-13 * before.abs()
            if bool((enough | ~active).all()):
                break
            size = torch.where((enough | ~active)[:, None], size, 0.5 * size)
        active = active & enough
        z = torch.where(active[:, None], z + size * step, z)
    return z, converged(kind, function, z, *args)


def converged(kind: str, function: Function, z: Tensor, *args: Tensor) -> Tensor:
    """Return, per problem, whether Newton's step at z is below 1e-9 of z, and H definite beyond rounding, once scaled, for an argmin."""
    value, jacobian = linearized(kind, function, z, *args)
    fine = torch.isfinite(value).all(-1) & torch.isfinite(jacobian).all(-1).all(-1) & torch.isfinite(z).all(-1)
    jacobian = torch.where(fine[:, None, None], jacobian, torch.eye(z.shape[-1]).to(z))
    step, info = torch.linalg.solve_ex(jacobian, value.unsqueeze(-1))
    small = (step.squeeze(-1).abs() <= 1e-9 * (z.abs() + 1e-2)).all(-1) & (info == 0)
    if kind == "argmin":
        unit = jacobian.diagonal(dim1=-2, dim2=-1).abs().rsqrt()
        unit = torch.where(torch.isfinite(unit), unit, torch.zeros_like(unit))
        scaled = unit.unsqueeze(-1) * (0.5 * (jacobian + jacobian.mT)) * unit.unsqueeze(-2)
        small &= torch.linalg.eigvalsh(scaled)[:, 0] > 1e-10
    return fine & small


def polished(kind: str, function: Function, near: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solution that full Newton steps from ``near`` lead to, and whether they do."""
    z = near.clone()
    for _ in range(40):
        value, jacobian = linearized(kind, function, z, *args)
        step, info = torch.linalg.solve_ex(jacobian, value.unsqueeze(-1))
        usable = (info == 0)[:, None] & torch.isfinite(step.squeeze(-1))
        step = torch.where(usable, step.squeeze(-1), torch.zeros_like(z))
        z = z - step
        if bool(
            (step.abs() <= 1e-13 * (z.abs() + 1e-3)).all()
        ):  # and so at rounding, as the last step squared the error
            break
    return z, converged(kind, function, z, *args)


def plain(function: Function, start: Tensor, *args: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return z (K, n) of plain iteration, and whether it stands still to 1e-12."""
    z = start.clone()
    with torch.no_grad():
        for k in range(steps):
            new = function(z, *args)
            if k % 20 == 0 and bool(((new - z).abs() <= 1e-12 * (1 + new.abs())).all()):
                break
            z = new
        still = ((function(z, *args) - z).abs() <= 1e-11 * (1 + z.abs())).all(-1)
    return z, still & torch.isfinite(z).all(-1)


def implicit_gradient(
    kind: str, function: Function, z: Tensor, theta: Tensor, *data: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient (K, p) of weights·z*(θ), −R_θᵀ (∂R)⁻ᵀ weights, and its size (K,) with nothing cancelled."""
    _, jacobian = linearized(kind, function, z, theta, *data)
    adjoint = torch.linalg.solve(jacobian.mT, weights.unsqueeze(-1)).squeeze(-1)
    theta = theta.detach().requires_grad_()
    z = z.detach().requires_grad_()
    value = residual(kind, function, z, theta, *data)
    slopes, size = torch.zeros_like(theta), torch.zeros_like(theta)
    for i in range(z.shape[-1]):
        if value.requires_grad:
            (row,) = torch.autograd.grad(value[:, i].sum(), theta, retain_graph=True, materialize_grads=True)
            slopes, size = slopes - adjoint[:, i : i + 1] * row, size + (adjoint[:, i : i + 1] * row).abs()
    return slopes.detach(), size.norm(dim=-1)
