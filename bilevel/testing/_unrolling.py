"""The derivative through an iteration: no implicit differentiation, and nothing of the library."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.testing.references import Adjoint, Reference, gradients, solved

__all__ = ["Unrolled", "unrolled"]

# Beyond these an unrolled iteration would take more steps than a check is worth: Newton's is unrolled instead.
_MOST_STEPS = 400
_NEWTON_STEPS = 2


@dataclass(frozen=True, eq=False)
class Unrolled:
    """Gradients through an iteration that starts at the solution.

    Parameters
    ----------
    gradients
        One for each tensor.
    method
        What was unrolled, in words.
    remainder
        The factor by which what is cut off is smaller than the whole.
    """

    gradients: list[torch.Tensor]
    method: str
    remainder: float


def unrolled(reference: Reference, rows: Sequence[torch.Tensor], adjoints: Sequence[Adjoint]) -> Unrolled:
    """Return dc/dθ through an iteration from the solution, with a graph of all of it.

    For a well-conditioned minimum the iteration is heavy-ball descent, for a contraction the mapping itself. Neither uses the
    formula under test. Otherwise it is Newton's iteration, with its second derivatives and solves.
    """
    steps, advance, method, remainder = _iteration(reference, adjoints)
    tensors = reference.leaves()
    with torch.enable_grad():
        ends = []
        for number, row in enumerate(rows):
            x, velocity = row.detach(), torch.zeros_like(row)
            for _ in range(steps):
                x, velocity = advance(number, x, velocity, tensors)
            ends.append(x)
        found = gradients(reference.scalar(ends, tensors), tensors)
    return Unrolled(found, method, remainder)


def _iteration(reference: Reference, adjoints: Sequence[Adjoint]) -> tuple[int, Callable[..., Any], str, float]:
    goal = math.log(reference.eps)
    layer = reference.subject.layer
    if layer.minimizes and all(adjoint.matrix.numel() for adjoint in adjoints):
        spectra = [torch.linalg.eigvalsh(0.5 * (a.matrix + a.matrix.mT).nan_to_num()) for a in adjoints]
        bounds = [(float(spectrum[0]), float(spectrum[-1])) for spectrum in spectra]
        if all(low > 0 for low, _ in bounds):
            rate = max((math.sqrt(h / low) - 1) / (math.sqrt(h / low) + 1) for low, h in bounds)
            steps = 2 if rate < 1e-12 else math.ceil(1.2 * goal / math.log(rate)) + 10
            if steps <= _MOST_STEPS:
                return (
                    steps,
                    _heavy_ball(reference, bounds),
                    f"{steps} steps of heavy-ball descent",
                    steps * rate**steps,
                )
    if layer.is_fixed_point:
        radius = max(_radius(adjoint.matrix) for adjoint in adjoints)
        if radius < 1:
            steps = 3 if radius < 1e-8 else math.ceil(1.1 * goal / math.log(radius)) + 5
            if steps <= _MOST_STEPS:
                return (
                    steps,
                    functools.partial(_plain, reference),
                    f"{steps} steps of the mapping",
                    steps * radius**steps,
                )
    return _NEWTON_STEPS, functools.partial(_newton, reference), f"{_NEWTON_STEPS} steps of Newton's iteration", 0.0


def _heavy_ball(reference: Reference, bounds: Sequence[tuple[float, float]]) -> Callable[..., Any]:
    def advance(number: int, x: torch.Tensor, velocity: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Any:
        # Polyak's parameters, optimal on a quadratic with these eigenvalues.
        low, high = (math.sqrt(bound) for bound in bounds[number])
        momentum = ((high - low) / (high + low)) ** 2
        moved = momentum * velocity - (2 / (high + low)) ** 2 * reference.residual(number, x, tensors)
        return x + moved, moved

    return advance


def _plain(
    reference: Reference, number: int, x: torch.Tensor, velocity: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> Any:
    return x - reference.residual(number, x, tensors), velocity


def _newton(
    reference: Reference, number: int, x: torch.Tensor, velocity: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> Any:
    point = x if x.requires_grad else x.detach().requires_grad_(True)
    residual = reference.residual(number, point, tensors)
    rows = [gradients(entry, [point], graph=True)[0] for entry in residual]
    matrix = torch.stack(rows) if rows else x.new_zeros(0, 0)
    return x - solved(matrix, residual), velocity


def _radius(matrix: torch.Tensor) -> float:
    """Return the spectral radius of ∂T = I − matrix."""
    if not matrix.numel():
        return 0.0
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return float(torch.linalg.eigvals((eye - matrix).nan_to_num()).abs().max())
