"""Rectangular linear systems A(θ) x ≈ b: the least-squares solution of minimum norm, x = A⁺ b, behind symmetric systems.

With N = AᵀA, N x = Aᵀ b. Differentiating that gives all derivatives where A has full column rank. Where A has full row rank, those of x = Aᵀ y
with A Aᵀ y = b are taken. Where the rank is neither, and constant, those of x = N w with N² w = Aᵀ b: that system has solutions, and keeps having
them when it is differentiated, and x does not depend on which of them w is. All are the derivative of Golub & Pereyra, "The differentiation of
pseudo-inverses and nonlinear least squares problems whose variables separate", SIAM J. Numer. Anal. 10, 1973, equation 4.12.
Where an argument changes the rank, x has no derivative.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._torch.reverse import vjp
from bilevel.equations.problem import Problem
from bilevel.equations.system import LinearSystem
from bilevel.errors import ShapeError
from bilevel.operators._rectangular import Rectangular
from bilevel.pytree import Raveler

__all__ = ["NormalSystem", "SquaredSystem", "WideSystem", "rectangular"]


@dataclass(frozen=True, eq=False)
class NormalSystem(LinearSystem):
    """N x = AᵀA x, for a matvec x ↦ A x from the unknown's pytree to that of the right-hand side.

    Parameters
    ----------
    image
        The structure of the right-hand side.
    """

    image: Raveler | None = None

    symmetric = True

    def forward(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return one problem's A x (m,)."""
        assert self.image is not None
        made = self.call(flat, *tensors)
        paths, structure = pytree.tree_flatten_with_path(made)
        expected = [tuple(shape) for shape in self.image.shapes]
        got = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for _, leaf in paths]
        if structure != self.image.structure or got != expected:
            raise ShapeError(
                f"{self.where}: expected matvec to map the unknown to the pytree of rhs, of shapes {expected}, got {got}; return A x in the shape of "
                "rhs, and give the unknown's own shape by unknown="
            )
        return self.image.ravel(made)

    def transposed(self, u: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return one problem's Aᵀ u (n,)."""
        zero = u.new_zeros(self.raveler.size, dtype=self.raveler.dtype)
        found: torch.Tensor = vjp(lambda x: self.forward(x, *tensors), zero)[1](u)[0]
        return found

    def normal(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return one problem's AᵀA x (n,)."""
        image, pull = vjp(lambda x: self.forward(x, *tensors), flat)
        found: torch.Tensor = pull(image)[0]
        return found

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.normal(flat, *tensors)


class SquaredSystem(NormalSystem):
    """N² w."""

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.normal(self.normal(flat, *tensors), *tensors)


class WideSystem(NormalSystem):
    """A Aᵀ y: its unknown is of the shape of the right-hand side, and ``image`` that of A's unknown."""

    def forward(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.tall().transposed(flat, *tensors)

    def transposed(self, u: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return self.tall().forward(u, *tensors)

    def normal(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        tall = self.tall()
        return tall.forward(tall.transposed(flat, *tensors), *tensors)

    def tall(self) -> NormalSystem:
        """Return the system with A in the place of Aᵀ."""
        assert self.image is not None
        kept = {item.name: getattr(self, item.name) for item in fields(self)}
        return NormalSystem(**{**kept, "raveler": self.image, "image": self.raveler})


def rectangular(problem: Problem) -> Rectangular:
    """Return A of the problems' :class:`NormalSystem`."""
    system = problem.system
    assert isinstance(system, NormalSystem) and system.image is not None
    batch, m, n = problem.batch, system.image.size, system.raveler.size
    shape = system.batch_shape

    def apply(one: Any, vectors: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            made: torch.Tensor = system.lifted(one)(vectors.reshape(*shape, vectors.shape[-1]), *problem.tensors)
        return made.detach().reshape(batch, -1)

    def columns(flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return vmap(lambda unit: system.forward(unit, *tensors), out_dims=-1)(torch.diag(flat))

    def dense() -> torch.Tensor:
        units = torch.ones(batch, n, dtype=system.raveler.dtype, device=system.raveler.device)
        try:
            return apply(columns, units).reshape(batch, m, n)
        except RuntimeError:  # something in the function cannot be batched
            rows = [apply(system.forward, unit.expand(batch, n)) for unit in torch.diag(units[0])]
            return torch.stack(rows, -1)

    return Rectangular(batch, m, n, lambda v: apply(system.forward, v), lambda u: apply(system.transposed, u), dense)
