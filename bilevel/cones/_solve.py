"""The solution of cone programs: Clarabel, one problem after another, then Newton steps on the conditions of optimality for all together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bilevel._torch.factorisations import pinv, solve
from bilevel.cones._conditions import Conditions, Numbers
from bilevel.cones._sparse import SparseJacobian
from bilevel.equations.problem import Problem
from bilevel.optional_packages import import_optional
from bilevel.quadratic_programs._clarabel import Clarabel
from bilevel.quadratic_programs._fewest import fewest
from bilevel.quadratic_programs._sparse_program import is_convex
from bilevel.reports import Status

__all__ = ["Found", "solve_cones"]

_STATUS = {
    "Solved": Status.CONVERGED,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.MAX_STEPS,
}
_PROVEN = 1e-6  # the relative lack of a ray's conditions up to which it counts as a proof
_POLISHED = 1e-8  # the relative lack of the conditions of optimality of a point that counts as exact
_EXACT = 1e-15
_STEPS = 25  # Newton steps of a polish
_PATH_STEPS = 200  # and of the way from the solution to a point of the central path
_HALVINGS, _PATH_HALVINGS = 4, 30
_KINK = 1e-9  # the relative size of an edge that counts as zero


@dataclass(eq=False)
class Found:
    """The solutions of a batch of programs.

    Parameters
    ----------
    z
        (B, n + m): x and v = s − y; NaN where there is no solution.
    status, iterations
        (B,).
    residual
        R (B, n + m).
    lack
        (B,): the largest relative lack of a condition of optimality.
    kink
        (B,): a row of a factor of K that v is at a kink of, −1 for none.
    certificate
        (B, n + m): a ray that proves that there is no solution, else zero.
    jacobians
        The factorised Jacobians at z of sparse problems.
    """

    z: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor
    lack: torch.Tensor
    kink: torch.Tensor
    certificate: torch.Tensor
    jacobians: list[SparseJacobian] | None = None


@dataclass(eq=False)
class _Point:
    """Clarabel's answer to one problem."""

    z: np.ndarray
    certificate: np.ndarray
    status: Status
    steps: int = 0


def solve_cones(conditions: Conditions, problem: Problem, solver: Clarabel) -> Found:
    """Return what was found of the batch ``problem`` of ``conditions``."""
    clarabel = _module()
    each = [problem.single(i).tensors for i in range(problem.batch)]
    numbers = [conditions.numbers(tensors) for tensors in each]
    points = [_answer(clarabel, conditions, one, solver) for one in numbers]
    status = torch.tensor([int(point.status) for point in points])
    first = torch.from_numpy(np.stack([point.z for point in points]))
    solvable = torch.isfinite(first).all(-1)
    start = torch.where(solvable.unsqueeze(-1), first, 0.0)
    equations = _Equations(conditions, numbers, each)
    z, residual = _polished(equations, start)
    lack, scales = _lack(equations, z, residual)
    # What has no exact solution of the equations, as at a kink where R is not regular, keeps Clarabel's answer.
    exact = lack <= _POLISHED
    trusted = (status == Status.CONVERGED) & (conditions.product.smoothing == 0)
    z = torch.where((exact | ~trusted).unsqueeze(-1), z, start)
    status = torch.where(solvable & exact, int(Status.CONVERGED), status)
    failed = solvable & ~exact & ~trusted & (status == Status.CONVERGED)
    status = torch.where(failed, int(Status.STAGNATED), status)
    z = torch.where(solvable.unsqueeze(-1), z, float("nan"))
    kink = _kinks(conditions, z, lack, scales) if not conditions.product.smoothing else torch.full_like(status, -1)
    steps = torch.tensor([point.steps for point in points])
    certificate = torch.from_numpy(np.stack([point.certificate for point in points]))
    factors = equations.sparse(z.nan_to_num()) if conditions.sparse else None
    return Found(z, status, steps, residual, lack, kink, certificate, factors)


def _module() -> Any:
    return import_optional("clarabel", "`cone_program`", "run pip install '.[qp]' in a clone of bilevel")


def _answer(clarabel: Any, conditions: Conditions, numbers: Numbers, solver: Clarabel) -> _Point:
    n, m = conditions.unknowns, conditions.product.size
    blank = _Point(np.full(n + m, np.nan), np.zeros(n + m), Status.NOT_FINITE)
    if not numbers.finite:
        return blank
    if not is_convex(numbers.P):
        blank.status = Status.INDEFINITE
        return blank
    import scipy.sparse as sp

    upper = sp.triu(numbers.P, format="csc")
    cones = conditions.product.of_clarabel(clarabel)
    answer = solver.answer(clarabel, upper, numbers.q, numbers.A, numbers.b, cones)
    x, y, s = (np.array(part, dtype=float) for part in (answer.x, answer.z, answer.s))
    blank.steps = int(answer.iterations)
    blank.status = _STATUS.get(str(answer.status), Status.STAGNATED)
    if blank.status in (Status.INFEASIBLE, Status.UNBOUNDED):
        blank.certificate, proven = _ray(conditions, numbers, x, y, blank.status)
        blank.status = blank.status if proven else Status.STAGNATED
        if blank.status is Status.INFEASIBLE:
            blank.certificate = _shortened(conditions, numbers, blank.certificate)
        return blank
    blank.z = np.concatenate([x, s - y])
    return blank


def _ray(
    conditions: Conditions, numbers: Numbers, x: np.ndarray, y: np.ndarray, status: Status
) -> tuple[np.ndarray, bool]:
    """Return the ray (n + m,) with the value −1, and whether it is a proof."""
    infeasible = status is Status.INFEASIBLE
    value = float(numbers.b @ y if infeasible else numbers.q @ x)
    if not value < 0:
        return np.zeros(len(x) + len(y)), False
    x, y = (0 * x, y / -value) if infeasible else (x / -value, 0 * y)
    # y lies in the dual cone if Π(−y) = 0, and −A d in K if Π does not move it.
    inward = torch.from_numpy(-y if infeasible else -numbers.A @ x)
    moved = conditions.product.onto(inward)
    outside = moved if infeasible else moved - inward
    size = max(np.abs(x).max(), np.abs(y).max(initial=0.0))
    held = numbers.A.T @ y if infeasible else numbers.P @ x
    lack = max(np.abs(held).max(), float(outside.abs().max()) if outside.numel() else 0.0)
    entries = max(np.abs(matrix.data).max(initial=1.0) for matrix in (numbers.P, numbers.A))
    return np.concatenate([x, y]), bool(lack <= _PROVEN * size * entries)


def _shortened(conditions: Conditions, numbers: Numbers, ray: np.ndarray) -> np.ndarray:
    """Return the proof ``ray`` (n + m,) of infeasibility with the multipliers of few factors of K, each a multiple of what it was."""
    n, y = conditions.unknowns, ray[conditions.unknowns :]
    owner = np.array(conditions.product.owners())
    spread = np.zeros((len(y), int(owner.max()) + 1))
    spread[np.arange(len(y)), owner] = y
    weights = fewest(numbers.A.T @ spread, numbers.b @ spread)
    return ray if weights is None else np.concatenate([ray[:n], spread @ weights])


class _Equations:
    """R of a batch, and Newton's steps J⁻¹ R, dense or sparse."""

    def __init__(self, conditions: Conditions, numbers: list[Numbers], each: list[list[torch.Tensor]]) -> None:
        self.conditions, self.numbers = conditions, numbers
        self.tensors = [torch.stack(values) for values in zip(*each, strict=True)]

    def residual(self, z: torch.Tensor) -> torch.Tensor:
        """Return R (B, n + m)."""
        return self.conditions(z, *self.tensors)

    def sparse(self, z: torch.Tensor) -> list[SparseJacobian]:
        """Return the factorised J of each problem."""
        blocks = list(self.conditions.product.jacobian(z[:, self.conditions.unknowns :]))
        return [SparseJacobian(one, [(block[i], rows) for block, rows in blocks]) for i, one in enumerate(self.numbers)]

    def step(self, z: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return J⁻¹ R (B, n + m), of minimum norm where J is singular."""
        n = self.conditions.unknowns
        if self.conditions.sparse:
            each = [one.solve(left.numpy()) for one, left in zip(self.sparse(z), residual, strict=True)]
            return torch.from_numpy(np.stack(each))
        P, _, A, _ = self.tensors
        m = self.conditions.product.size
        D = z.new_zeros(len(z), m, m)
        for block, rows in self.conditions.product.jacobian(z[:, n:]):
            D[:, rows.unsqueeze(-1), rows.unsqueeze(-2)] = block
        eye = torch.eye(m, dtype=z.dtype)
        upper, lower = torch.cat([P, A.mT @ (D - eye)], -1), torch.cat([A, D], -1)
        J = torch.cat([upper, lower], -2)
        step = solve(J, residual.unsqueeze(-1)).squeeze(-1)
        lost = ~(step.abs().amax(-1) < 1e8 * (1 + z.abs().amax(-1)))
        if bool(lost.any()):
            least = (pinv(J[lost], rtol=1e-11) @ residual[lost].unsqueeze(-1)).squeeze(-1)
            step = step.index_put((lost,), least)
        return step


def _polished(equations: _Equations, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z (B, n + m) and R after Newton's steps, each as long as it lowers ‖R‖."""
    residual = equations.residual(z)
    path = equations.conditions.product.smoothing > 0
    for _ in range(_PATH_STEPS if path else _STEPS):
        norm = residual.norm(dim=-1)
        open_ = norm > _EXACT * (1 + _lack(equations, z, residual)[1].amax(-1))
        if not bool(open_.any()):
            break
        step = equations.step(z, residual)
        open_ = open_ & torch.isfinite(step).all(-1)
        length = 1.0
        for _ in range(_PATH_HALVINGS if path else _HALVINGS):
            trial = z - length * step
            there = equations.residual(trial)
            better = open_ & (there.norm(dim=-1) < (1 - 0.1 * length) * norm)
            z, residual = (
                torch.where(better.unsqueeze(-1), trial, z),
                torch.where(better.unsqueeze(-1), there, residual),
            )
            open_ = open_ & ~better
            if not bool(open_.any()):
                break
            length *= 0.5
        if bool((residual.norm(dim=-1) == norm).all()):
            break
    return z, residual


def _lack(equations: _Equations, z: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest relative lack of a condition (B,), and the scales (B, 2) of multipliers and of slacks."""
    n = equations.conditions.unknowns
    s = equations.conditions.product.project(z[:, n:])
    y = s - z[:, n:]
    scales = torch.tensor(
        [one.scales(*(part[i].numpy() for part in (z[:, :n], s, y))) for i, one in enumerate(equations.numbers)],
        dtype=z.dtype,
    )
    below = residual[:, n:].abs().amax(-1) if residual.shape[-1] > n else torch.zeros(len(z), dtype=z.dtype)
    left = torch.stack([residual[:, :n].abs().amax(-1), below], -1)
    return (left / (1 + scales)).amax(-1), scales


def _kinks(conditions: Conditions, z: torch.Tensor, lack: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    # v is no more exact than the conditions are fulfilled.
    least = torch.where(lack <= _POLISHED, torch.clamp(100 * lack, min=_KINK), 1e-3)
    dual, primal = (least.unsqueeze(-1) * (1e-300 + scales)).unbind(-1)
    v = z[:, conditions.unknowns :].nan_to_num(nan=1.0)
    return conditions.product.kinks(v, primal, dual)
