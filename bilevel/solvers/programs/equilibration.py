"""Ruiz's equilibration (2001) of quadratic programs, with a scale of the objective and a unit of the unknowns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bilevel.solvers.programs.dense_program import DenseProgram, Iterate, ProgramBatch, largest

__all__ = ["Scales", "equilibrated"]


@dataclass(frozen=True, eq=False)
class Scales(ProgramBatch):
    """The scales (B, ...) that convert a scaled iterate to one of the given program.

    s·z is that of the scaled program times ``product``.
    """

    x: torch.Tensor
    y: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor
    product: torch.Tensor

    def scaled(self, point: Iterate) -> Iterate:
        return replace(point, x=point.x / self.x, y=point.y / self.y, s=point.s / self.s, z=point.z / self.z)

    def unscaled(self, point: Iterate) -> Iterate:
        tight = point.z > point.s
        return replace(
            point, x=point.x * self.x, y=point.y * self.y, s=point.s * self.s, z=point.z * self.z, tight=tight
        )  # fmt: skip


def equilibrated(program: DenseProgram, passes: int = 2) -> tuple[DenseProgram, Scales]:
    """Return the program scaled so that the columns of its KKT matrix have norm near one, and the scales that convert back."""
    Q, rows = program.Q, torch.cat([program.A, program.rows.general], -2)
    n, p, m = Q.shape[-1], program.A.shape[-2], program.rows.general.shape[-2]
    columns, lengths = Q.new_ones(len(Q), n), Q.new_ones(len(Q), p + m)
    curvatures, slopes = Q.abs(), rows.abs()
    for _ in range(passes):
        height = curvatures.amax(-1)
        if p + m:
            height = torch.maximum(height, slopes.amax(-2))
            row = _inverse_root(slopes.amax(-1))
            lengths = lengths * row
            slopes.mul_(row.unsqueeze(-1))
        step = _inverse_root(height)
        columns = columns * step
        curvatures.mul_(step.unsqueeze(-1)).mul_(step.unsqueeze(-2))
        slopes.mul_(step.unsqueeze(-2))
    Q = Q * columns.unsqueeze(-1) * columns.unsqueeze(-2)
    A, G = (rows * lengths.unsqueeze(-1) * columns.unsqueeze(-2)).split([p, m], -2)
    equations, general = lengths.split([p, m], -1)
    sides = [general]
    sides += [1 / columns] * (program.rows.below is not None) + [1 / columns] * (program.rows.above is not None)
    inequalities, inside = torch.cat(sides, -1), replace(program.rows, general=G)
    q, b, d, there = program.q * columns, program.b * equations, program.d * inequalities, inside.present()
    largest_of_Q = curvatures.amax(-1)
    unit = _unit(largest_of_Q.amax(-1), q, b, d, there)
    q, b, d = q / unit, b / unit, torch.where(there | (d <= 0), d / unit, 1.0)
    size = torch.maximum(largest_of_Q.mean(-1), q.abs().amax(-1)).unsqueeze(-1)
    cost = torch.where(size > 0, 1 / size.clamp_min(1e-30), torch.ones_like(size))
    scaled = DenseProgram(Q * cost.unsqueeze(-1), q * cost, A, b, inside, d)
    weight = unit / cost
    return scaled, Scales(columns * unit, equations * weight, unit / inequalities, inequalities * weight, unit * weight)


def _unit(
    curvature: torch.Tensor, q: torch.Tensor, b: torch.Tensor, d: torch.Tensor, there: torch.Tensor
) -> torch.Tensor:
    """Return a possible size (B, 1) of the unknowns if it is below one."""
    free = torch.where(curvature > 0, largest(q) / curvature.clamp_min(1e-300), 0.0)
    unit = torch.maximum(free, largest(b, torch.where(there, d, 0.0)))
    return torch.where(unit > 0, unit, torch.ones_like(unit)).clamp(1e-100, 1.0).unsqueeze(-1)


def _inverse_root(norm: torch.Tensor) -> torch.Tensor:
    return torch.where(norm > 0, norm.clamp_min(1e-30).rsqrt(), torch.ones_like(norm))
