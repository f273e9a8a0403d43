"""Quadratic programs by Clarabel, an interior-point solver for sparse problems, and a polish with the factors of the derivative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel.errors import ArgumentError
from bilevel.optional_packages import import_optional
from bilevel.quadratic_programs._dense import solve_solvable
from bilevel.quadratic_programs._kkt import Factor, Sizes
from bilevel.quadratic_programs._matrices import Entries, Pattern
from bilevel.quadratic_programs._program import Found, Program
from bilevel.quadratic_programs._rays import infeasibility_rays, unboundedness_rays
from bilevel.quadratic_programs._rule import Structure
from bilevel.quadratic_programs._sparse_kkt import OneFactor, SparseFactor
from bilevel.quadratic_programs._sparse_program import SparseProgram
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_steps

__all__ = ["Clarabel"]

_STATUS = {
    "Solved": Status.CONVERGED,
    "AlmostSolved": Status.STAGNATED,
    "PrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.MAX_STEPS,
}
_FLIPS, _SINGLE_FLIPS = 2, 30
# Sizes within this factor of one are left as they are.
_MODERATE = 1e3
_SMALL = 400  # unknowns and rows up to which rays are searched for by the dense method
_LET_PASS = 1e-6  # the relative residual of a point without polish that counts as solved


@dataclass(frozen=True, kw_only=True)
class Clarabel:
    """Clarabel (Goulart and Chen 2024), for large sparse programs and cone programs: one problem after another.

    It needs ``pip install '.[qp]'`` in a clone.

    A polish on the active set follows, with the factors that the derivative uses. Where the active set is not clear, the answer is
    Clarabel's own.

    Parameters
    ----------
    max_steps
        Interior-point steps.
    tolerance
        Clarabel's absolute and relative tolerances of feasibility and of the gap.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    P. J. Goulart, Y. Chen, "Clarabel: An interior-point solver for conic programs with quadratic objectives", 2024.

    Examples
    --------
    >>> Clarabel(max_steps=100)
    Clarabel(max_steps=100, tolerance=1e-08)
    """

    max_steps: int = 200
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        check_steps("Clarabel", "max_steps", self.max_steps)
        check_number("Clarabel", "tolerance", self.tolerance)

    @property
    def name(self) -> str:
        """The name in reports."""
        return "Clarabel"

    def solve(self, structure: Structure, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Found:
        """Return what was found of each problem of a batch with one axis, in float64."""
        clarabel = _clarabel()
        if structure.smoothing:
            raise ArgumentError(
                "`quadratic_program`: expected dense Q, A and G with smoothing, got sparse ones or solver=Clarabel(); "
                "pass .to_dense() matrices, which bilevel.Mehrotra() solves"
            )
        if tensors[1].device.type != "cpu":
            raise ArgumentError(
                f"`quadratic_program`: expected tensors on the CPU for Clarabel, got {tensors[1].device}; move them with .cpu()"
            )
        points = [self._one(clarabel, program) for program in _programs(structure, tensors)]
        return _found(structure.sizes, points)

    def factor(
        self,
        structure: Structure,
        matrices: Sequence[torch.Tensor],
        damping: torch.Tensor | None,
        active: torch.Tensor,
    ) -> Factor:
        """Return the factorised KKT matrix."""
        patterns = (structure.Q, structure.A, structure.G)
        each = [
            tuple(_csr(p, values[i], structure.sizes) for p, values in zip(patterns, matrices, strict=True))
            for i in range(len(active))
        ]
        return SparseFactor(structure.sizes, [(Q, A, G) for Q, A, G in each], active.numpy())

    def _one(self, clarabel: Any, program: SparseProgram) -> _Point:
        blank = _Point.blank(program)
        if not program.finite:
            return blank.ended(Status.NOT_FINITE)
        if not program.convex:
            return blank.ended(Status.INDEFINITE)
        if program.empty.any():
            blank.certificate[program.sizes.n + program.sizes.p :] = program.empty
            return blank.ended(Status.INFEASIBLE)
        P, A, b = program.stacked()
        cones = [clarabel.ZeroConeT(program.equations), clarabel.NonnegativeConeT(len(b) - program.equations)]
        unit, cost = _units(P, program.q, b)
        answer = self.answer(clarabel, P * (unit * unit * cost), program.q * (unit * cost), A, b / unit, cones)
        status = _STATUS.get(str(answer.status), Status.STAGNATED)
        x, z, s = np.array(answer.x) * unit, np.array(answer.z) / (unit * cost), np.array(answer.s) * unit
        point, slack = program.point_of(x, z, s)
        blank.steps = int(answer.iterations)
        if status in (Status.INFEASIBLE, Status.UNBOUNDED):
            return _with_ray(program, blank, point, status)
        found = _polished(program, blank, point, slack, status)
        return (
            found
            if found.status is Status.CONVERGED or program.sizes.n + program.sizes.m > _SMALL
            else _refuted(program, found)
        )

    def answer(self, clarabel: Any, P: Any, q: np.ndarray, A: Any, b: np.ndarray, cones: Sequence[Any]) -> Any:
        """Return the answer of the module ``clarabel`` to min ½ xᵀPx + qᵀx, A x + s = b, with s in ``cones``. P is upper triangular."""
        settings = clarabel.DefaultSettings()
        settings.verbose, settings.max_iter = False, self.max_steps
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = self.tolerance
        settings.presolve_enable = False  # infinite sides are left out before
        return clarabel.DefaultSolver(P, q, A, b, cones, settings).solve()


def _units(P: Any, q: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return a unit of x and a factor of the objective with which its numbers are moderate. Clarabel's tolerances are absolute."""
    unit = _power_of_two(np.abs(b).max(initial=0.0))
    slope, curvature = np.abs(q).max(initial=0.0) * unit, np.abs(P.data).max(initial=0.0) * unit * unit
    return unit, 1 / _power_of_two(max(slope, curvature))


def _power_of_two(size: float) -> float:
    return 1.0 if 1 / _MODERATE <= size <= _MODERATE or not size > 0 else float(2.0 ** np.round(np.log2(size)))


def _clarabel() -> Any:
    remedy = "run pip install '.[qp]' in a clone of bilevel, or pass dense tensors"
    return import_optional("clarabel", "`quadratic_program` of sparse tensors", remedy)


def _csr(pattern: Pattern, values: torch.Tensor, sizes: Sizes) -> Any:
    import scipy.sparse as sp

    array = values.numpy()
    if isinstance(pattern, Entries):
        return sp.coo_matrix((array, (pattern.rows.numpy(), pattern.columns.numpy())), shape=pattern.shape).tocsr()
    return sp.csr_matrix(array.reshape(-1, sizes.n))


def _programs(structure: Structure, tensors: Sequence[torch.Tensor]) -> list[SparseProgram]:
    Q, q, A, b, G, h, lower, upper = tensors
    made = []
    for i in range(len(q)):
        matrices = (_csr(p, t[i], structure.sizes) for p, t in ((structure.Q, Q), (structure.A, A), (structure.G, G)))
        vectors = (t[i].numpy() for t in (q, b, h, lower, upper))
        made.append(SparseProgram(structure.sizes, *matrices, *vectors))
    return made


@dataclass(eq=False)
class _Point:
    """The solution of one problem; see :class:`Found`."""

    point: np.ndarray
    active: np.ndarray
    weak: np.ndarray
    status: Status
    steps: int
    residual: float
    certificate: np.ndarray
    factor: OneFactor | None = None

    @classmethod
    def blank(cls, program: SparseProgram) -> _Point:
        length, rows = sum(program.sizes.parts), sum(program.sizes.rows)
        marks = np.zeros(rows, dtype=bool)
        return cls(np.full(length, np.nan), marks, marks, Status.RUNNING, 0, float("nan"), np.zeros(length))

    def ended(self, status: Status) -> _Point:
        self.status = status
        return self


def _with_ray(program: SparseProgram, blank: _Point, point: np.ndarray, status: Status) -> _Point:
    ray, value = program.ray(point, status is Status.INFEASIBLE)
    if value < 0:
        blank.certificate = program.shortened(ray / -value) if status is Status.INFEASIBLE else ray / -value
        return blank.ended(status)
    return blank.ended(Status.STAGNATED)


def _refuted(program: SparseProgram, found: _Point) -> _Point:
    """Return what the dense search for rays finds of a small program that Clarabel could not decide."""
    arrays = (program.Q.toarray(), program.q, program.A.toarray(), program.b, program.G.toarray(), program.h)
    tensors = [torch.from_numpy(np.array(v)).unsqueeze(0) for v in (*arrays, program.lower, program.upper)]
    dense = Program.of(tensors, torch.float64)
    for rays_of, status in ((infeasibility_rays, Status.INFEASIBLE), (unboundedness_rays, Status.UNBOUNDED)):
        ray, proven = rays_of(dense, solve_solvable)
        if bool(proven[0]):
            found.certificate = ray[0].numpy()
            return found.ended(status)
    return found


def _polished(program: SparseProgram, blank: _Point, point: np.ndarray, slack: np.ndarray, status: Status) -> _Point:
    """Return the solution on the active set that Clarabel's answer shows, or that answer where none fits."""
    active = program.tight(point, slack)
    blank.point, blank.active = program.on(point, active), active
    blank.residual = program.lack(blank.point, active)
    seen: set[bytes] = set()
    for count in range(_FLIPS + _SINGLE_FLIPS):
        factor = OneFactor(program.sizes, program.Q, program.A, program.G, active)
        trial = program.on(point, active)
        for _ in range(3):
            trial = trial - factor.solve(program.residual(trial, active))
            if program.lack(trial, active) <= 1e-14:
                break
        trial = program.on(trial, active)
        good, flipped, weak = program.verdict(trial, active)
        if good:
            blank.point, blank.active, blank.weak, blank.factor = program.clipped(trial), active, weak, factor
            blank.residual = program.lack(blank.point, active)
            return blank.ended(Status.CONVERGED)
        if (flipped == active).all():
            break
        seen.add(active.tobytes())
        if count + 1 >= _FLIPS or flipped.tobytes() in seen:
            # Where many change at once the sets go round in a circle. One at a time they do so rarely.
            worst = program.worst(trial, active, flipped)
            flipped = active.copy()
            flipped[worst] = ~flipped[worst]
            if flipped.tobytes() in seen:
                break
        active = flipped
    blank.weak = program.unclear(blank.point)
    solved = status is Status.CONVERGED and blank.residual <= _LET_PASS
    return blank.ended(status if solved or status is not Status.CONVERGED else Status.STAGNATED)


def _found(sizes: Sizes, points: Sequence[_Point]) -> Found:
    def stacked(arrays: list[np.ndarray], width: int) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0, width, dtype=torch.float64)

    length, rows = sum(sizes.parts), sum(sizes.rows)
    numbers = torch.tensor([[int(one.status), one.steps] for one in points], dtype=torch.int64).reshape(-1, 2)
    factor = None
    if points and all(one.factor is not None for one in points):
        factor = SparseFactor.of(
            sizes, [one.factor for one in points if one.factor is not None], np.stack([one.active for one in points])
        )
    residual = torch.tensor([one.residual for one in points], dtype=torch.float64)
    return Found(
        stacked([one.point for one in points], length), stacked([one.active for one in points], rows).bool(),
        stacked([one.weak for one in points], rows).bool(), numbers[:, 0].clone(), numbers[:, 1].clone(), residual,
        torch.full_like(residual, _LET_PASS), stacked([one.certificate for one in points], length), factor,
    )  # fmt: skip
