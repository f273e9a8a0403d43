"""A solution and its derivative found without the library, from the equation itself and dense solves in float64.

The user's own function is taken one problem at a time, under ordinary autograd: no solver, operator or rule of the
library, no ``vmap``, and the widest dtype that the function accepts. :mod:`~bilevel.testing._unrolling` and
:mod:`~bilevel.testing._differences` find the derivative in two other ways from here. All of it costs what such things cost (n
reverse passes for a matrix), which suits checks and not training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing._sound import sound
from bilevel.testing._subject import Subject

__all__ = ["Adjoint", "Reference", "gradients", "solved"]

# Of Newton's iteration: far more than it needs from a solution that a solver returned.
_MOST_NEWTON_STEPS = 40
# Vectors from which the norm of a matrix known by its products is found.
_MOST_PROBES = 24


@dataclass(frozen=True, eq=False)
class Adjoint:
    """The dense solve at one point, of one problem.

    Parameters
    ----------
    matrix
        J = ∂_x R (n, n).
    rhs
        v (n,), the outer gradient or cotangent.
    q
        J⁻ᵀ v (n,).
    """

    matrix: torch.Tensor
    rhs: torch.Tensor
    q: torch.Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """A subject in the widest dtype, as the equation R(x, θ) = 0 and the scalar c(x, θ) that is differentiated.

    Parameters
    ----------
    subject
        What is examined, its tensors converted.
    cotangents
        For a layer, the weights of c = Σ ⟨cotangent, x⟩, one for each leaf; for a problem none: c is the outer loss.
    dtype
        Of the arithmetic here.
    """

    subject: Subject
    cotangents: tuple[torch.Tensor, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """K, 1 for a single problem."""
        return 1 if self.subject.count is None else self.subject.count

    @property
    def eps(self) -> float:
        """The rounding of the arithmetic here."""
        return float(torch.finfo(self.dtype).eps)

    @property
    def points(self) -> tuple[torch.Tensor, ...]:
        """θ."""
        return self.subject.points

    @staticmethod
    def of(subject: Subject, cotangents: Sequence[torch.Tensor]) -> Reference:
        """Return the reference in float64, or in the dtype given where the user's function takes no other."""
        converted = subject.to(torch.float64)
        wide = Reference(converted, tuple(cotangents), torch.float64)
        try:
            rows = wide.rows(pytree.tree_leaves(converted.init))
            wide.residual(0, rows[0], converted.points)
            wide.scalar(rows, converted.points)
        except (RuntimeError, TypeError, ValueError):
            dtypes = [leaf.dtype for leaf in pytree.tree_leaves(subject.init)]
            narrow = functools.reduce(torch.promote_types, dtypes)
            return Reference(subject, tuple(cotangents), narrow)
        return wide

    def leaves(self) -> list[torch.Tensor]:
        """Return θ as leaves to differentiate."""
        return [point.detach().clone().requires_grad_(True) for point in self.points]

    # The unknown as vectors.

    def rows(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return each problem's unknowns, cotangents or outputs as one vector (n,)."""
        joined = [leaf.to(self.dtype) for leaf in leaves]
        if self.subject.count is None:
            return [torch.cat([leaf.reshape(-1) for leaf in joined])]
        return [torch.cat([leaf[k].reshape(-1) for leaf in joined]) for k in range(self.count)]

    def tree(self, flat: torch.Tensor) -> Any:
        """Return one problem's vector (n,) as the user's pytree."""
        leaves, structure = pytree.tree_flatten(self.subject.start(0))
        parts = torch.split(flat, [leaf.numel() for leaf in leaves])
        return pytree.tree_unflatten(
            [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)], structure
        )

    # The equation and the scalar.

    def residual(self, number: int, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return R(x, θ) (n,) of one problem with its graph: ∇G, the residual, or x − T(x)."""
        args, kwargs = self.subject.case(number, tensors)
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_(True)
            with sound():
                value = self.subject.function(self.tree(point), *args, **kwargs)
            if self.subject.layer.minimizes:
                _scalar(value, f"{self.subject.where}: expected the objective")
                (gradient,) = torch.autograd.grad(
                    value, point, create_graph=True, allow_unused=True, materialize_grads=True
                )
                return gradient
            flat = torch.cat([leaf.reshape(-1).to(self.dtype) for leaf in pytree.tree_leaves(value)])
            return point - flat if self.subject.layer.is_fixed_point else flat

    def scalar(self, rows: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return c: the outer loss, its mean over a batch, or Σ ⟨cotangent, x⟩."""
        problem = self.subject.problem
        if problem is None:
            return torch.stack(
                [(row * weight).sum() for row, weight in zip(rows, self.rows(self.cotangents), strict=True)]
            ).sum()
        losses = []
        for number, row in enumerate(rows):
            (outer, data), _ = self.subject.case(number, tensors)
            with sound():
                losses.append(problem.outer_objective(self.tree(row), outer, data))
            _scalar(losses[-1], f"{self.subject.where}: expected outer_objective")
        return torch.stack(losses).mean()

    def matrix(self, number: int, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return ∂_x R (n, n) of one problem, row by row."""
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            residual = self.residual(number, point, tensors)
            rows = [gradients(entry, [point], keep=True)[0] for entry in residual]
        return torch.stack(rows) if rows else x.new_zeros(0, 0)

    def pullback(self, number: int, x: torch.Tensor, tensors: Sequence[torch.Tensor], q: torch.Tensor) -> Any:
        """Return (∂_θ R)ᵀ q, one for each tensor."""
        return gradients((self.residual(number, x.detach(), tensors) * q).sum(), tensors)

    # The solution.

    def polished(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """Return the solution that Newton's iteration reaches from ``x`` (n,), as exact as the dtype allows."""
        best, least = x, math.inf
        for _ in range(_MOST_NEWTON_STEPS):
            residual = self.residual(number, x, self.points).detach()
            size = float(residual.norm())
            if not math.isfinite(size) or size >= least:
                break
            best, least = x, size
            step = solved(self.matrix(number, x, self.points), residual)
            if not bool(torch.isfinite(step).all()):
                break
            x = x - step
        return best

    def _outer_gradients(self, rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return ∂c/∂x for each row, and the direct ∂c/∂θ for each tensor."""
        free, tensors = [row.detach().requires_grad_(True) for row in rows], self.leaves()
        with torch.enable_grad():
            found = gradients(self.scalar(free, tensors), [*free, *tensors])
        return found[: len(free)], found[len(free) :]

    def _adjoint(self, number: int, rows: Sequence[torch.Tensor], rhs: torch.Tensor) -> Adjoint:
        matrix = self.matrix(number, rows[number], self.points)
        return Adjoint(matrix, rhs, solved(matrix.mT, rhs))

    def dense(self, rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Adjoint]]:
        """Return dc/dθ = ∂_θ c − (∂_θ R)ᵀ J⁻ᵀ ∂_x c at ``rows`` for each tensor, the direct parts, and the adjoints."""
        slopes, direct = self._outer_gradients(rows)
        total = [part.clone() for part in direct]
        adjoints = []
        for number, row in enumerate(rows):
            adjoint = self._adjoint(number, rows, slopes[number])
            tensors = self.leaves()
            for place, pulled in enumerate(self.pullback(number, row, tensors, adjoint.q)):
                total[place] = total[place] - pulled.detach()
            adjoints.append(adjoint)
        return total, direct, adjoints

    def dense_tangents(
        self, rows: Sequence[torch.Tensor], place: int, direction: torch.Tensor, adjoints: Sequence[Adjoint]
    ) -> list[torch.Tensor]:
        """Return −J⁻¹ ∂_θR·d for each problem (n,), along ``direction`` of one tensor."""
        tangents = []
        for number, row in enumerate(rows):
            tensors = self.leaves()
            with torch.enable_grad():
                residual = self.residual(number, row.detach(), tensors)
                # The transpose of the pullback, which is linear in its cotangent: a forward product from two reverse ones.
                dummy = torch.zeros_like(residual, requires_grad=True)
                (pulled,) = gradients((residual * dummy).sum(), [tensors[place]], graph=True)
                (pushed,) = gradients((pulled * direction).sum(), [dummy])
            tangents.append(-solved(adjoints[number].matrix, pushed))
        return tangents

    def cross_norms(self, number: int, x: torch.Tensor, adjoint: Adjoint) -> list[tuple[float, float]]:
        """Return the Frobenius norms of (∂_θ R)ᵀ and (∂_θ R)ᵀ J⁻ᵀ for each tensor.

        Exact for small n, otherwise from as many random signs z: the mean of ‖A z‖² is ‖A‖².
        """
        n = len(x)
        if n <= _MOST_PROBES:
            probes, weight = torch.eye(n, dtype=x.dtype, device=x.device), 1.0
        else:
            generator = torch.Generator().manual_seed(0)
            probes = (torch.randint(0, 2, (_MOST_PROBES, n), generator=generator) * 2 - 1).to(x)
            weight = 1.0 / _MOST_PROBES
        carried = solved(adjoint.matrix.mT, probes.mT).mT
        tensors = self.leaves()
        residual = self.residual(number, x.detach(), tensors)
        sums = [[0.0, 0.0] for _ in tensors]
        for probe, through in zip(probes, carried, strict=True):
            for which, vector in enumerate((probe, through)):
                for place, pulled in enumerate(gradients((residual * vector).sum(), tensors, keep=True)):
                    sums[place][which] += weight * float((pulled.to(x.dtype) ** 2).sum())
        return [(math.sqrt(plain), math.sqrt(through)) for plain, through in sums]


def _scalar(value: Any, expected: str) -> None:
    if not isinstance(value, torch.Tensor) or value.ndim:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise bilevel.ShapeError(
            f"{expected} to return a scalar tensor of shape (), got {got}; reduce it, for example with .mean()"
        )


def gradients(
    output: torch.Tensor, inputs: Sequence[torch.Tensor], *, keep: bool = False, graph: bool = False
) -> list[torch.Tensor]:
    """Return gradients, zero where no graph leads."""
    if not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            output, list(inputs), retain_graph=keep or graph, create_graph=graph, allow_unused=True,
            materialize_grads=True,
        )
    )  # fmt: skip


def solved(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Solve, with infinities or NaN where the matrix is singular and no error."""
    if not rhs.numel():
        return torch.zeros_like(rhs)
    return torch.linalg.solve_ex(matrix, rhs)[0]
