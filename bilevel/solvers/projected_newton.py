"""Projected Newton for bounds: dense for small matrices, by conjugate gradients for large ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.solvers.constrained.program import Answer, ConstrainedSolver, Program
from bilevel.solvers.parts.projected import ProjectedSearch, evaluated, search_in_bounds
from bilevel.solvers.parts.shifted import shifted_cholesky

__all__ = ["DENSE_LIMIT", "ProjectedNewton"]

DENSE_LIMIT = 512
_MAX_STEPS = 250
_ARMIJO, _MOST_TRIALS = 1e-4, 40
# The search has converged when the next step is this share of x.
_SMALL_STEP = 1e-11
# A step that is solved more exactly than to this share of the gradient costs more products than the next step saves.
_MOST_PRODUCTS, _LEAST_FORCING = 500, 1e-3


@dataclass(frozen=True)
class ProjectedNewton(ConstrainedSolver):
    """Newton's method on the free unknowns, with a search along the projection of the step onto the bounds.

    An unknown is fixed if it is at a bound (or within ε of it) and the gradient points outwards. Fixed unknowns move along
    the negative gradient, free ones along the Newton step of their own Hessian. The step is x(α) = P(x + α d), with α
    halved until the objective falls enough. Near a nondegenerate solution the active set is identified in finitely many
    steps.

    *Small problems* (n ≤ 512): the Hessians are factorised by Cholesky, shifted where not positive definite. *Large problems*: conjugate
    gradients that stop early, or at negative curvature. Cost: a gradient and n (small) or some (large) Hessian products a step.

    Parameters
    ----------
    max_steps
        The largest number of steps; None: 250.

    Raises
    ------
    ArgumentError
        If ``max_steps`` is not a positive integer; on use, if there are constraints other than bounds.

    References
    ----------
    Bertsekas, "Projected Newton methods for optimization problems with simple constraints", SIAM Journal on Control and Optimization 20, 1982;
    Lin & Moré, "Newton's method for large bound-constrained optimization problems", SIAM Journal on Optimization 9, 1999.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), lower=0.0, solver=ProjectedNewton())
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([-1.0, 2.0], dtype=torch.float64))
    tensor([0., 2.], dtype=torch.float64)
    """

    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_steps("ProjectedNewton", "max_steps", self.max_steps, optional=True)

    def solve_program(self, program: Program, init: torch.Tensor, smoothing: float | None) -> Answer:
        steps = _MAX_STEPS if self.max_steps is None else self.max_steps
        return search_in_bounds(self.name, program, smoothing, lambda: _Run(program, init), steps)


class _Run(ProjectedSearch):
    def __init__(self, program: Program, init: torch.Tensor) -> None:
        super().__init__(program, init)
        self.shift = torch.zeros_like(self.value)

    def step(self) -> None:
        program, x, gradient = self.program, self.x, self.gradient
        running = self.status == Status.RUNNING
        size = 1 + x.abs().amax(-1)
        held = self.held()
        direction = self._direction(held)
        # Fixed unknowns move along the gradient, scaled by the curvature of the free ones.
        trial, alpha, accepted = x, torch.ones_like(self.value), torch.zeros_like(running)
        promised = -(gradient * direction * ~held).sum(-1)
        noise = 10 * torch.finfo(x.dtype).eps * self.value.abs()
        for _ in range(_MOST_TRIALS):
            moved = program.inside(x + alpha.unsqueeze(-1) * direction)
            value = program.parts(moved)[:, 0]
            decrease = alpha * promised + (gradient * (x - moved) * held).sum(-1)
            fresh = (value <= self.value - _ARMIJO * decrease + noise) & ~accepted
            trial = torch.where(fresh.unsqueeze(-1), moved, trial)
            accepted = accepted | fresh
            if bool((accepted | ~running).all()):
                break
            alpha = torch.where(accepted, alpha, 0.5 * alpha)
        self._end(running, accepted, trial, size)

    def _end(self, running: torch.Tensor, accepted: torch.Tensor, trial: torch.Tensor, size: torch.Tensor) -> None:
        step = (trial - self.x).abs().amax(-1)
        small = (step <= _SMALL_STEP * size) | ~accepted
        self.iterations = self.iterations + running
        moved = running & accepted
        self.x = torch.where(moved.unsqueeze(-1), trial, self.x)
        self.value, self.gradient = evaluated(self.program, self.x)
        self.status = torch.where(running & small, int(Status.CONVERGED), self.status)
        self.name_lost(running)

    def _direction(self, held: torch.Tensor) -> torch.Tensor:
        program, x, gradient = self.program, self.x, self.gradient
        free = (~held).to(x)
        if program.size <= DENSE_LIMIT:
            hessian = program.hessian(x, torch.ones_like(x[:, :1]))
            diagonal = hessian.diagonal(dim1=-2, dim2=-1).abs()
            masked = 0.5 * (hessian + hessian.mT) * free.unsqueeze(1) * free.unsqueeze(2)
            # A flat objective has no curvature for a scale. Its slope gives a scale with long but finite steps.
            unit = torch.maximum(diagonal.amax(-1), gradient.abs().amax(-1) / (1e3 * (1 + x.abs().amax(-1))))
            factor, self.shift = shifted_cholesky(masked + torch.diag_embed(1 - free), self.shift, unit)
            step = -torch.cholesky_solve((gradient * free).unsqueeze(-1), factor).squeeze(-1)
            scale = diagonal.clamp_min(1e-12 * diagonal.amax(-1, keepdim=True)).clamp_min(1e-300)
        else:
            step, curvature = _conjugate_gradients(lambda v: free * program.product(x, free * v), gradient * free)
            scale = curvature.unsqueeze(-1).clamp_min(1e-300)
        outwards = torch.where(program.fixed, torch.zeros_like(x), -gradient / scale)
        return torch.where(held, outwards, step * free)


def _conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor], gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return −H⁻¹g (K, n), truncated, and the curvature along −g (K,). At a curvature that is not positive, the last iterate is returned."""
    x, residual = torch.zeros_like(gradient), -gradient
    direction, square = residual, (residual**2).sum(-1)
    first = square.sqrt()
    needs_grad = first * torch.minimum(torch.full_like(first, 0.1), first.sqrt() * 1e-3).clamp_min(_LEAST_FORCING)
    open_ = square > 0
    first_curvature = torch.ones_like(first)
    for count in range(_MOST_PRODUCTS):
        pushed = product(direction)
        curvature = (direction * pushed).sum(-1)
        if count == 0:
            first_curvature = curvature.abs() / square.clamp_min(1e-300)
        convex = curvature > 1e-14 * (direction**2).sum(-1) * first_curvature
        if count == 0:
            x = torch.where(
                (open_ & ~convex).unsqueeze(-1), -gradient / first_curvature.clamp_min(1.0).unsqueeze(-1), x
            )
        open_ = open_ & convex
        alpha = torch.where(open_, square / curvature.where(open_, torch.ones_like(curvature)), 0.0)
        x = x + alpha.unsqueeze(-1) * direction
        residual = residual - alpha.unsqueeze(-1) * pushed
        fresh = (residual**2).sum(-1)
        open_ = open_ & (fresh.sqrt() > needs_grad)
        if not bool(open_.any()):
            break
        ratio = fresh / square.clamp_min(math.ldexp(1.0, -1000))
        direction, square = residual + ratio.unsqueeze(-1) * direction, fresh
    return x, first_curvature
