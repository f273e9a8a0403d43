"""A path to an equilibrium of a game with bounds or terms: the conditions of a family of games, from one that is solved to the given one.

With F = (∇_{x_i} f_i), the sum g of the players' terms and bounds, and an origin x⁰, the family is

    0 ∈ t (F(x) + ∂g(x)) + (1 − t) (x − x⁰) / s,      0 ≤ t ≤ 1

Its one solution at t = 0 is x⁰ or the nearest point of the players' sets. Those at t = 1 are the equilibria, for every s > 0. For bounded sets a
connected set of solutions leads from t = 0 to t = 1 (Browder). For a monotone F, as of a zero-sum game, t rises along it.

The family is the root of H(x, t) = x − prox_{t s g}(t (x − s F(x)) + (1 − t) x⁰), which has kinks where the support of a solution changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.equations.equilibrium import EquilibriumSystem, SlopeSystem
from bilevel.equations.problem import Problem
from bilevel.equations.structured import flat_raveler
from bilevel.equations.system import Level, RootSystem

__all__ = ["path_problem"]


@dataclass(frozen=True, eq=False, kw_only=True)
class _PathSystem(RootSystem):
    """(H(x, t), t) of z = (x, t) (n + 1,); the tensors are those of ``game``, then x⁰ (n,) and s ()."""

    game: EquilibriumSystem

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        *own, origin, scale = tensors
        x, t = flat[:-1], flat[-1]
        lower, upper = self.game.bounds(x, *own)
        inside = torch.minimum(torch.maximum(x, lower), upper)
        moved = t * (inside - scale * self.game.slopes(inside, *own)) + (1 - t) * origin
        # A term may divide by its step.
        step = (t * scale).clamp_min(torch.finfo(t.dtype).tiny ** 0.5)
        return torch.cat([x - self.game.landed(moved, lower, upper, *own, step=step), flat[-1:]])


def path_problem(problem: Problem, origin: torch.Tensor) -> tuple[Problem, torch.Tensor]:
    """Return the family of a ``problem`` as equations in z = (x, t), and their solution (batch, n + 1) at t = 0.

    s is chosen so that F, and what F changes by over a step of unit length, are about as large as x − x⁰.
    """
    system = problem.system
    assert isinstance(system, EquilibriumSystem)
    linear = Problem(system.as_a(SlopeSystem), problem.tensors).linearize_dense(origin)
    size = (linear.residual.abs() / (1 + origin.abs())).amax(-1)
    size = torch.maximum(size, linear.operator.dense().abs().sum(-1).amax(-1))
    scale = torch.where((size > 0) & torch.isfinite(size), 1 / size, torch.ones_like(size))
    levels = tuple(Level(level.size, (*level.batched, True, True)) for level in system.levels)
    family = _PathSystem(
        system.where, system.function, flat_raveler(problem.size + 1, system.raveler), system.arguments, levels, system.autocast,
        system.mode, game=replace(system, levels=()),
    )  # fmt: skip
    made = Problem(family, [*problem.tensors, problem.shaped(origin), scale.reshape(problem.batch_shape)])
    start = torch.cat([origin, torch.zeros_like(origin[:, :1])], dim=-1)
    return made, start - torch.cat([made.residual(start)[:, :-1], torch.zeros_like(origin[:, :1])], dim=-1)
