"""An iterate of the interior-point method: its start, its error, what a line search compares, and its new multipliers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel.solvers.constrained.interior_pieces import complementarity, finite_gaps, gaps, largest, least_squares, pull
from bilevel.solvers.constrained.kkt import Direction
from bilevel.solvers.constrained.program import Program

__all__ = ["State", "fresh_state", "kkt_error", "merits", "with_duals"]

# The largest factor between the barrier parameter and the product of a slack and its multiplier.
_DUAL_SPREAD = 1e10


@dataclass(frozen=True, eq=False)
class State:
    """An iterate of every problem: x (K, n), slacks (K, m), multipliers ν (K, p), λ (K, m) and those of the bounds (K, n)."""

    x: torch.Tensor
    slack: torch.Tensor
    equality: torch.Tensor
    inequality: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor


def fresh_state(
    program: Program, x: torch.Tensor, parts: torch.Tensor, rows: torch.Tensor, barrier: torch.Tensor
) -> State:
    """Return a state at ``x`` with slacks and multipliers of the ``barrier`` parameter (K,), ν by least squares.

    ``parts`` and ``rows`` are the values and the Jacobian of the program at ``x``.
    """
    barrier = barrier.unsqueeze(-1)
    _, _, c = program.split(parts)
    slack = torch.maximum(-c, barrier.sqrt().clamp_max(1e-1))
    multiplier = barrier / slack
    low, high = gaps(program, x)
    lower, upper = barrier / low, barrier / high
    gradient, jh, jc = program.split(rows)
    slope = gradient + pull(jc, multiplier) - lower + upper
    slope = torch.where(program.fixed, torch.zeros_like(slope), slope)
    equality = least_squares(torch.where(program.fixed.unsqueeze(1), 0.0, jh), slope)
    # Large multipliers show that the linearised constraints are nearly dependent. They say nothing about the
    # solution.
    equality = torch.where(equality.abs().amax(-1, keepdim=True) > 1e3, 0.0, equality) if jh.shape[1] else equality
    return State(x, slack, equality, multiplier, lower, upper)


def kkt_error(
    program: Program, state: State, parts: torch.Tensor, rows: torch.Tensor, barrier: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scaled error of the KKT conditions at ``barrier`` (K,), and the violation of the constraints."""
    gradient, jh, jc = program.split(rows)
    _, h, c = program.split(parts)
    dual = gradient + pull(jh, state.equality) + pull(jc, state.inequality) - state.lower + state.upper
    dual = torch.where(program.fixed, torch.zeros_like(dual), dual)
    low, high = gaps(program, state.x)
    products = torch.cat(
        [state.slack * state.inequality, *complementarity(state.lower, state.upper, low, high)], dim=-1
    )
    multipliers = torch.cat([state.equality, state.inequality, state.lower, state.upper], dim=-1).abs()
    size = (multipliers.sum(-1) / max(multipliers.shape[-1], 1)).clamp_min(100.0) / 100.0
    primal = largest(torch.cat([h, c + state.slack], dim=-1))
    there = torch.cat([torch.ones_like(state.slack), *finite_gaps(program)], dim=-1)
    off = torch.where(there > 0, products - barrier.unsqueeze(-1), torch.zeros_like(products))
    error = torch.maximum(torch.maximum(largest(dual) / size, primal), largest(off) / size)
    return error, primal


def merits(
    program: Program, x: torch.Tensor, slack: torch.Tensor, parts: torch.Tensor, barrier: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the violation ‖(h, c + s)‖₁ and the barrier objective, (K,) each; inf outside the domain."""
    f, h, c = program.split(parts)
    low, high = gaps(program, x)
    there_low, there_high = finite_gaps(program)
    one = torch.ones_like(low)
    logs = slack.log().sum(-1) + torch.where(there_low > 0, low, one).log().sum(-1)
    logs = logs + torch.where(there_high > 0, high, one).log().sum(-1)
    violation = h.abs().sum(-1) + (c + slack).abs().sum(-1)
    value = f - barrier * logs
    broken = ~torch.isfinite(value) | ~torch.isfinite(violation)
    return torch.where(broken, math.inf, violation), torch.where(broken, math.inf, value)


def with_duals(
    program: Program,
    state: State,
    moved: tuple[torch.Tensor, torch.Tensor],
    direction: Direction,
    alpha: torch.Tensor,
    dual: torch.Tensor,
    barrier: torch.Tensor,
) -> State:
    """Return the state at ``moved``, (x, s), with the multipliers of steps of the lengths ``alpha`` and ``dual`` (K,).

    Products of slacks and multipliers stay within a factor of the barrier parameter.
    """
    (x, slack), barrier = moved, barrier.unsqueeze(-1)
    low, high = gaps(program, x)
    there_low, there_high = finite_gaps(program)

    def near(multiplier: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        least, most = barrier / (_DUAL_SPREAD * gap), _DUAL_SPREAD * barrier / gap
        return torch.minimum(torch.maximum(multiplier, least), most)

    step = dual.unsqueeze(-1)
    return State(
        x,
        slack,
        state.equality + alpha.unsqueeze(-1) * direction.equality,
        near(state.inequality + step * direction.inequality, slack),
        there_low * near(state.lower + step * direction.lower, low),
        there_high * near(state.upper + step * direction.upper, high),
    )
