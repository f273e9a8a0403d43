"""Random cone programs with a strictly feasible point."""

from __future__ import annotations

import pytest
import torch

from bilevel import cones
from bilevel.cones import Cone

pytest.importorskip("clarabel", reason="Clarabel is an extra, and is not installed")

F64 = torch.float64
CONES: list[Cone] = [cones.Zero(1), cones.Nonnegative(3), cones.SecondOrder(3), cones.PSDTriangle(3)]


def inside(cone: Cone) -> torch.Tensor:
    """Return a vector in the interior of the cone, or zero."""
    if isinstance(cone, cones.PSDTriangle):
        return cone.vector(torch.eye(cone.side, dtype=F64))
    vector = torch.zeros(cone.rows, dtype=F64)
    if isinstance(cone, cones.Nonnegative):
        vector[:] = 1.0
    elif isinstance(cone, cones.SecondOrder):
        vector[0] = 1.0
    return vector


def random_program(
    n: int, factors: list[Cone], *batch: int, seed: int = 0, depth: float = 0.1
) -> dict[str, torch.Tensor]:
    """Return P, q, A, b (*batch, ...) of programs that have a point ``depth`` inside of the cones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, dtype=F64, generator=generator)

    m = sum(cone.rows for cone in factors)
    root, A, x = draw(n, n), draw(m, n), draw(n)
    s = torch.cat([depth * inside(cone) for cone in factors])
    return {
        "P": root @ root.mT / n + 0.5 * torch.eye(n, dtype=F64),
        "q": draw(n),
        "A": A,
        "b": (A @ x.unsqueeze(-1)).squeeze(-1) + s,
    }
