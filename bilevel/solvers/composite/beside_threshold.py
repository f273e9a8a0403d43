"""Whether a point at a threshold of proximal terms is a minimum: a term at its threshold lets an unknown leave its kink or bound."""

from __future__ import annotations

import torch

from bilevel.solvers.composite.problem import Composite, Iterate
from bilevel.solvers.constrained.critical import critical_directions, lowered

__all__ = ["falls_beside_threshold"]

_MOST_UNKNOWNS, _MOST_PROBLEMS = 512, 64
# An unknown is at its threshold if a push of this share of its forces moves it.
_PUSH = 1e-7
_ROUNDING = 16.0


def falls_beside_threshold(composite: Composite, at: Iterate, these: torch.Tensor) -> torch.Tensor:
    """Return where f + g falls from ``at`` along critical directions, among ``these`` (batch,) problems, for terms that are sums over entries."""
    x = at.x
    if not composite.entrywise or x.shape[-1] > _MOST_UNKNOWNS or not bool(these.any()):
        return torch.zeros_like(these)
    assert composite.value is not None and composite.convexity is not None
    value_of = composite.value
    free, step = composite.known_free(x), at.step.unsqueeze(-1)
    forces = torch.maximum(x.abs(), step * at.slope.abs()).amax(-1, keepdim=True)
    push = _PUSH * torch.where(forces > 0, forces, 1.0)
    moved = [composite.prox(x - step * at.slope + sign * push, at.step) - x for sign in (1.0, -1.0)]
    upwards, downwards = ~free & (moved[0] > 0.1 * push), ~free & (moved[1] < -0.1 * push)
    hessian = composite.objective.linearize_dense(x).operator.dense() + torch.diag_embed(composite.convexity(x))
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    directions: list[list[torch.Tensor]] = [[] for _ in x]
    for k in (these & (upwards | downwards).any(-1)).nonzero().reshape(-1).tolist()[:_MOST_PROBLEMS]:
        held = ~(free[k] | upwards[k] | downwards[k])
        directions[k] = critical_directions(hessian[k], eye[held], torch.cat([-eye[upwards[k]], eye[downwards[k]]]))
    least = torch.full_like(at.step, torch.finfo(x.dtype).tiny ** 0.5)

    def evaluate(point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        point = composite.prox(point, least)  # into the domain of g
        value = composite.objective.value(point) + value_of(point)
        terms = value.abs() + (at.slope * point).abs().sum(-1)
        return point, value, _ROUNDING * torch.finfo(x.dtype).eps * terms

    return lowered(evaluate, x, directions)[1]
