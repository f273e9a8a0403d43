"""The state of an examination of a problem, and the findings.

A step is a function of an :class:`Examination` that adds to it. A step never stops the
others: an error that it raises becomes a finding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing._subject import Subject
from bilevel.testing.defects import Defect
from bilevel.testing.diagnosis import Advice, Cost, Curvature, Diagnosis, Finding, InnerSolve, LinearSolve, OuterTensor
from bilevel.testing.references import Reference

__all__ = ["Examination", "first_line", "widest", "worst_of"]

# Of a batch, this many problems are looked at closely.
_MOST_PROBLEMS = 8

_ERRORS = {
    bilevel.CapturedTensorError: Defect.CAPTURED_TENSOR,
    bilevel.StochasticObjectiveError: Defect.STOCHASTIC,
}


@dataclass(eq=False)
class Examination:
    """The results of the steps so far.

    Parameters
    ----------
    subject
        The layer or problem that is examined.
    findings, unexamined, inner, curvature, outer, linear, cost, deterministic
        See :class:`~bilevel.testing.Diagnosis`.
    rows, narrow_rows
        The inner solution found, a vector for each problem, in the references' dtype and in the call's.
    matrices
        The Jacobians formed, by problem.
    scale
        ‖x‖, the largest over a batch.
    """

    subject: Subject
    findings: list[Finding] = field(default_factory=list)
    unexamined: list[str] = field(default_factory=list)
    inner: InnerSolve | None = None
    curvature: Curvature | None = None
    outer: tuple[OuterTensor, ...] = ()
    linear: LinearSolve | None = None
    cost: Cost | None = None
    deterministic: bool | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    narrow_rows: list[torch.Tensor] = field(default_factory=list)
    matrices: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: float | None = None  # ‖x‖, of the solution

    def __post_init__(self) -> None:
        floating = [leaf for leaf in pytree.tree_leaves(self.subject.init) if isinstance(leaf, torch.Tensor)]
        self.narrow = Reference(self.subject, self._cotangents(), widest(floating))
        self.wide = self.narrow

    def diagnosis(self, advice: Advice | None) -> Diagnosis:
        """Return what was found."""
        subject = self.subject
        leaves = [leaf for leaf in pytree.tree_leaves(subject.init) if isinstance(leaf, torch.Tensor)]
        layer = subject.layer
        return Diagnosis(
            subject.where,
            "argmin" if layer.minimizes else "fixed_point" if layer.is_fixed_point else "root",
            sum(leaf.numel() for leaf in leaves) // max(subject.count or 1, 1),
            1 if subject.count is None else subject.count,
            str(leaves[0].dtype).removeprefix("torch.") if leaves else "none",
            tuple(self.findings), self.inner, self.curvature, self.outer, self.linear, self.cost, advice,
            self.deterministic, tuple(self.unexamined),
        )  # fmt: skip

    def attempt(self, step: Callable[[Examination], None], what: str) -> None:
        """Run one step; an error in it is a finding."""
        try:
            step(self)
        except Exception as error:  # whatever it is, it is what was to be found
            self.blame(error, what)

    def blame(self, error: Exception, what: str) -> None:
        """File what a step raised."""
        for kind, defect in _ERRORS.items():
            if isinstance(error, kind):
                self.find(defect, first_line(error))
                return
        if self.findings:
            self.unexamined.append(f"{what} ({first_line(error)})")
        else:
            self.find(Defect.UNUSABLE, f"{what} cannot be examined: {type(error).__name__}: {first_line(error)}")

    def find(self, defect: Defect, sentence: str, remedy: str | None = None) -> None:
        """File a finding, once for each defect."""
        if not self.has(defect):
            remedy = defect.remedy if remedy is None else remedy
            wider = "use float64, "
            if wider in remedy and self.subject.eps <= torch.finfo(torch.float64).eps:  # there already
                remedy = remedy.replace(wider, "")
            self.findings.append(Finding(defect, sentence, remedy))

    def replace(self, old: Defect, new: Defect, sentence: str) -> None:
        """File a finding in place of another, which is known better now."""
        self.findings = [
            Finding(new, sentence, new.remedy) if finding.defect is old else finding for finding in self.findings
        ]

    def has(self, *defects: Defect) -> bool:
        """Return whether one of these was found."""
        return any(finding.defect in defects for finding in self.findings)

    def of(self, number: int) -> str:
        """Return words that say which problem, in a batch."""
        return "" if self.subject.count is None else f" of problem {number}"

    def numbers(self) -> range:
        """Return the problems that are looked at."""
        return range(min(self.wide.count, _MOST_PROBLEMS))

    def usable(self) -> list[int]:
        """Return those of them whose solution is finite."""
        return [n for n in self.numbers() if self.rows and bool(torch.isfinite(self.rows[n]).all())]

    def layer(self, **settings: Any) -> bilevel.Layer:
        """Return the layer with other settings."""
        layer, problem = self.subject.layer, self.subject.problem
        tolerance = layer.tolerance
        if problem is not None:
            (outer, data), _ = self.subject.rebuild(self.subject.leaves)
            tolerance = problem.tolerance_of(outer, data)
        if layer.structure is not None:
            again = copy.copy(layer)
            for name, value in {"tolerance": tolerance, **settings}.items():
                setattr(again, name, value)
            return again
        make = bilevel.argmin if layer.minimizes else bilevel.fixed_point if layer.is_fixed_point else bilevel.root
        given = {"solver": layer.solver, "linear_solver": layer.linear_solver, "tolerance": tolerance, **settings}
        if isinstance(layer, bilevel.LeastSquaresLayer):
            return bilevel.least_squares(layer.function, loss=layer.loss, hessian=layer.hessian, **given)
        if isinstance(layer, bilevel.EquilibriumLayer):
            return bilevel.equilibrium(layer.objectives, **given)
        return make(layer.function, **given)

    def _cotangents(self) -> tuple[torch.Tensor, ...]:
        if self.subject.problem is not None:
            return ()
        generator = torch.Generator().manual_seed(0)
        leaves = [leaf for leaf in pytree.tree_leaves(self.subject.init) if isinstance(leaf, torch.Tensor)]
        return tuple(torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves)


def widest(leaves: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the widest dtype of ``leaves``, float64 if there are none."""
    if not leaves:
        return torch.float64
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def worst_of(report: bilevel.SolveReport) -> int:
    """Return which problem fared worst: a failed one, with the largest residual for what was asked."""
    ratio = report.residual_norm.reshape(-1).nan_to_num(nan=math.inf) / report.threshold.reshape(-1).clamp_min(1e-300)
    failed = (~report.success).reshape(-1)
    return int(torch.where(failed, ratio.clamp(min=1.0) * 1e30, ratio).argmax())


def first_line(error: Exception) -> str:
    """Return the message, shortened to one line."""
    return str(error).strip().split("\n")[0][:300]
