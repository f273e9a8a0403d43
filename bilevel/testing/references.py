"""Derivatives of a solution found without the library: dense, unrolled, and by finite differences, in float64.

Each takes the user's own function, one problem at a time, under ordinary autograd: no solver, operator or rule of the
library, no ``vmap``, and the dtype of the widest arithmetic that the function accepts. They cost what such things cost
(n reverse passes for a matrix, hundreds of steps for an unrolled descent), which suits checks and not training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.testing._subject import Subject

__all__ = ["Adjoint", "Differences", "Reference", "Unrolled"]

# Of Newton's iteration: far more than it needs from a solution that a solver returned.
_MOST_NEWTON_STEPS = 40
_MOST_CHORD_STEPS = 60
# Beyond these an unrolled iteration would take more steps than a check is worth: Newton's is unrolled instead.
_MOST_UNROLLED_STEPS = 400
_NEWTON_UNROLLS = 2
# A tensor of up to this many entries is differenced entry by entry, a larger one in as many random directions.
_MOST_DIRECTIONS = 12
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


@dataclass(frozen=True, eq=False)
class Differences:
    """Directional derivatives of one tensor by central differences.

    Parameters
    ----------
    directions
        (m, *shape).
    derivatives
        (m,), extrapolated from two steps.
    errors
        (m,), how far they may be off: the change by extrapolation, rounding, and what is left of the solves.
    step
        The largest step, for the table.
    """

    directions: torch.Tensor
    derivatives: torch.Tensor
    errors: torch.Tensor
    step: float


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
            value = self.subject.function(self.tree(point), *args, **kwargs)
            if self.subject.layer.minimizes:
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
            losses.append(problem.outer_objective(self.tree(row), outer, data))
        return torch.stack(losses).mean()

    def matrix(self, number: int, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return ∂_x R (n, n) of one problem, row by row."""
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            residual = self.residual(number, point, tensors)
            rows = [_gradients(entry, [point], keep=True)[0] for entry in residual]
        return torch.stack(rows) if rows else x.new_zeros(0, 0)

    def pullback(self, number: int, x: torch.Tensor, tensors: Sequence[torch.Tensor], q: torch.Tensor) -> Any:
        """Return (∂_θ R)ᵀ q, one for each tensor."""
        return _gradients((self.residual(number, x.detach(), tensors) * q).sum(), tensors)

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
            step = _solved(self.matrix(number, x, self.points), residual)
            if not bool(torch.isfinite(step).all()):
                break
            x = x - step
        return best

    def _outer_gradients(self, rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return ∂c/∂x for each row, and the direct ∂c/∂θ for each tensor."""
        free, tensors = [row.detach().requires_grad_(True) for row in rows], self.leaves()
        with torch.enable_grad():
            gradients = _gradients(self.scalar(free, tensors), [*free, *tensors])
        return gradients[: len(free)], gradients[len(free) :]

    def _adjoint(self, number: int, rows: Sequence[torch.Tensor], rhs: torch.Tensor) -> Adjoint:
        matrix = self.matrix(number, rows[number], self.points)
        return Adjoint(matrix, rhs, _solved(matrix.mT, rhs))

    def dense(self, rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Adjoint]]:
        """Return dc/dθ = ∂_θ c − (∂_θ R)ᵀ J⁻ᵀ ∂_x c at ``rows`` for each tensor, the direct parts, and the adjoints."""
        slopes, direct = self._outer_gradients(rows)
        total = [part.clone() for part in direct]
        adjoints = []
        for number, row in enumerate(rows):
            adjoint = self._adjoint(number, rows, slopes[number])
            tensors = self.leaves()
            for place, pulled in enumerate(self.pullback(number, row, tensors, adjoint.q)):
                total[place] = total[place] - pulled
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
                (pulled,) = _gradients((residual * dummy).sum(), [tensors[place]], graph=True)
                (pushed,) = _gradients((pulled * direction).sum(), [dummy])
            tangents.append(-_solved(adjoints[number].matrix, pushed))
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
        solved = _solved(adjoint.matrix.mT, probes.mT).mT
        tensors = self.leaves()
        residual = self.residual(number, x.detach(), tensors)
        sums = [[0.0, 0.0] for _ in tensors]
        for probe, through in zip(probes, solved, strict=True):
            for which, vector in enumerate((probe, through)):
                for place, pulled in enumerate(_gradients((residual * vector).sum(), tensors, keep=True)):
                    sums[place][which] += weight * float((pulled.to(x.dtype) ** 2).sum())
        return [(math.sqrt(plain), math.sqrt(through)) for plain, through in sums]

    # The same by other ways.

    def unrolled(self, rows: Sequence[torch.Tensor], adjoints: Sequence[Adjoint]) -> Unrolled:
        """Return dc/dθ through an iteration from the solution, with a graph of all of it.

        A well-conditioned minimum is approached by heavy-ball descent, a contraction by its own iteration: neither knows the
        formula that is under test. Elsewhere Newton's iteration is unrolled, second derivatives and solves included.
        """
        steps, advance, method, remainder = self._iteration(adjoints)
        tensors = self.leaves()
        with torch.enable_grad():
            ends = []
            for number, row in enumerate(rows):
                x, velocity = row.detach(), torch.zeros_like(row)
                for _ in range(steps):
                    x, velocity = advance(number, x, velocity, tensors)
                ends.append(x)
            gradients = _gradients(self.scalar(ends, tensors), tensors)
        return Unrolled(gradients, method, remainder)

    def _iteration(self, adjoints: Sequence[Adjoint]) -> tuple[int, Callable[..., Any], str, float]:
        goal = math.log(self.eps)
        layer = self.subject.layer
        if layer.minimizes and all(adjoint.matrix.numel() for adjoint in adjoints):
            spectra = [torch.linalg.eigvalsh(0.5 * (a.matrix + a.matrix.mT).nan_to_num()) for a in adjoints]
            bounds = [(float(spectrum[0]), float(spectrum[-1])) for spectrum in spectra]
            if all(low > 0 for low, _ in bounds):
                rate = max((math.sqrt(h / low) - 1) / (math.sqrt(h / low) + 1) for low, h in bounds)
                steps = 2 if rate < 1e-12 else math.ceil(1.2 * goal / math.log(rate)) + 10
                if steps <= _MOST_UNROLLED_STEPS:
                    return steps, self._heavy_ball(bounds), f"{steps} steps of heavy-ball descent", steps * rate**steps
        if layer.is_fixed_point:
            radius = max(_radius(adjoint.matrix) for adjoint in adjoints)
            if radius < 1:
                steps = 3 if radius < 1e-8 else math.ceil(1.1 * goal / math.log(radius)) + 5
                if steps <= _MOST_UNROLLED_STEPS:
                    return steps, self._plain, f"{steps} steps of the mapping", steps * radius**steps
        return _NEWTON_UNROLLS, self._newton, f"{_NEWTON_UNROLLS} steps of Newton's iteration", 0.0

    def _heavy_ball(self, bounds: Sequence[tuple[float, float]]) -> Callable[..., Any]:
        def advance(number: int, x: torch.Tensor, velocity: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Any:
            # Polyak's parameters, optimal on a quadratic with these eigenvalues.
            low, high = (math.sqrt(bound) for bound in bounds[number])
            momentum = ((high - low) / (high + low)) ** 2
            moved = momentum * velocity - (2 / (high + low)) ** 2 * self.residual(number, x, tensors)
            return x + moved, moved

        return advance

    def _plain(self, number: int, x: torch.Tensor, velocity: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Any:
        return x - self.residual(number, x, tensors), velocity

    def _newton(self, number: int, x: torch.Tensor, velocity: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Any:
        point = x if x.requires_grad else x.detach().requires_grad_(True)
        residual = self.residual(number, point, tensors)
        rows = [_gradients(entry, [point], graph=True)[0] for entry in residual]
        matrix = torch.stack(rows) if rows else x.new_zeros(0, 0)
        return x - _solved(matrix, residual), velocity

    def differences(
        self,
        place: int,
        rows: Sequence[torch.Tensor],
        adjoints: Sequence[Adjoint],
        generator: torch.Generator,
        step: float | None,
    ) -> Differences:
        """Return derivatives of c along directions of one tensor, from solutions at four displaced θ for each.

        Central differences with steps h and h/2, extrapolated: the error is O(h⁴), and the change by extrapolation says how
        large it may be. The displaced problems are solved by a chord iteration with the matrix at the solution.
        """
        point = self.points[place]
        directions = _directions(point, generator)
        relative = self.eps**0.2 if step is None else step
        factors = [torch.linalg.lu_factor_ex(adjoint.matrix)[:2] for adjoint in adjoints]
        derivatives, errors = [], []
        for direction in directions:
            pairs = []
            for h in (relative, relative / 2):
                ahead, left = self._displaced(place, h * direction, rows, factors)
                behind, right = self._displaced(place, -h * direction, rows, factors)
                noise = 8 * self.eps * max(abs(ahead), abs(behind)) + self._unsolved(left, right, adjoints)
                pairs.append(((ahead - behind) / (2 * h), noise / h))
            (coarse, _), (fine, noise) = pairs
            extrapolated = (4 * fine - coarse) / 3
            derivatives.append(extrapolated)
            errors.append(abs(extrapolated - fine) + 3 * noise)
        made = torch.tensor([derivatives, errors], dtype=self.dtype, device=point.device)
        return Differences(directions, made[0], made[1], relative)

    def _displaced(
        self, place: int, change: torch.Tensor, rows: Sequence[torch.Tensor], factors: Sequence[Any]
    ) -> tuple[float, list[float]]:
        """Return c at the solution for a displaced tensor, and the last step of each problem's iteration."""
        tensors = [point + change if at == place else point for at, point in enumerate(self.points)]
        ends, last = [], []
        for number, row in enumerate(rows):
            x, size = row.detach(), math.inf
            for _ in range(_MOST_CHORD_STEPS):
                residual = self.residual(number, x, tensors).detach()
                move = torch.linalg.lu_solve(*factors[number], residual.unsqueeze(-1)).squeeze(-1)
                reached = float(move.norm())
                if not reached < size:  # no more progress, or NaN
                    break
                x, size = x - move, reached
            ends.append(x)
            last.append(size if x.numel() else 0.0)
        with torch.no_grad():
            return float(self.scalar(ends, tensors)), last

    @staticmethod
    def _unsolved(left: Sequence[float], right: Sequence[float], adjoints: Sequence[Adjoint]) -> float:
        return sum(float(adjoint.rhs.norm()) * max(a, b) for a, b, adjoint in zip(left, right, adjoints, strict=True))


def _gradients(
    output: torch.Tensor, inputs: Sequence[torch.Tensor], *, keep: bool = False, graph: bool = False
) -> list[torch.Tensor]:
    if not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            output, list(inputs), retain_graph=keep or graph, create_graph=graph, allow_unused=True,
            materialize_grads=True,
        )
    )  # fmt: skip


def _solved(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """Solve, with infinities or NaN where the matrix is singular and no error."""
    if not rhs.numel():
        return torch.zeros_like(rhs)
    return torch.linalg.solve_ex(matrix, rhs)[0]


def _radius(matrix: torch.Tensor) -> float:
    """Return the spectral radius of ∂T = I − matrix."""
    if not matrix.numel():
        return 0.0
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return float(torch.linalg.eigvals((eye - matrix).nan_to_num()).abs().max())


def _directions(point: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return directions (m, *shape) for a tensor: each entry by itself, or random signs for many, as large as they are."""
    size = point.numel()
    largest = point.abs().max() if size else point.new_ones(())
    largest = largest if float(largest) > 0 else torch.ones_like(largest)
    scale = torch.clamp(point.abs(), min=1e-3 * float(largest)).reshape(-1)
    if size <= _MOST_DIRECTIONS:
        chosen = torch.diag(scale)
    else:
        signs = torch.randint(0, 2, (_MOST_DIRECTIONS, size), generator=generator).to(scale) * 2 - 1
        chosen = signs * scale
    return chosen.reshape(len(chosen), *point.shape)
