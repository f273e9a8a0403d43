"""What iMAML should compute, by dense matrices and plain loops; nothing here uses a solver or a vmap of ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call


def flat_loss(
    model: nn.Module, loss: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return one task's loss as a function of the model's parameters in one vector."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def value(flat: torch.Tensor) -> torch.Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        named = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return loss(functional_call(model, named, (x,)), y)

    return value


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    point = at.detach().requires_grad_(True)
    return torch.autograd.grad(function(point), point)[0]


def dense_hessian(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    point = at.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(point), point, create_graph=True)
    rows = [torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in gradient]
    return torch.stack(rows)


def descend(
    function: Callable[[torch.Tensor], torch.Tensor], theta: torch.Tensor, lam: float, lr: float, steps: int
) -> torch.Tensor:
    phi = theta.detach().clone()
    for _ in range(steps):
        phi = phi - lr * (slope(function, phi) + lam * (phi - theta))
    return phi


def conjugate_gradients(matrix: torch.Tensor, b: torch.Tensor, steps: int) -> torch.Tensor:
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(steps):
        product = matrix @ p
        alpha = (r @ r) / (p @ product)
        x, fresh = x + alpha * p, r - alpha * product
        p = fresh + (fresh @ fresh) / (r @ r) * p
        r = fresh
    return x


def parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
