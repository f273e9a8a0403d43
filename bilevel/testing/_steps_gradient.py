"""What is wrong on the way to the gradient: tensors that are not connected, and the linear solve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing._examination import Examination, widest, worst_of
from bilevel.testing._probes import argument_mismatch, bent
from bilevel.testing._steps_function import MISMATCH
from bilevel.testing.defects import Defect
from bilevel.testing.diagnosis import LinearSolve, OuterTensor
from bilevel.testing.references import gradients

__all__ = ["linear_solve", "one_sided", "outer_loss", "tensors", "whole"]

# What an inaccurate linear solve may leave of the right-hand side.
_LEFT = 1e-2


def one_sided(seen: Examination) -> None:
    """Take a gradient of a problem with proximal terms or constraints, and see how its linear solve ends."""
    if seen.has(Defect.INFEASIBLE, Defect.UNBOUNDED, Defect.UNCONVERGED, Defect.DIVERGED):  # there is no derivative
        return
    layer = seen.layer(on_failure="ignore")
    points = tuple(point.detach().clone().requires_grad_(point.is_floating_point()) for point in seen.subject.points)
    with bilevel.record() as reports, torch.enable_grad():
        leaves = [leaf for leaf in pytree.tree_leaves(seen.subject.solve(layer, points)) if leaf.requires_grad]
        if not leaves:
            return
        wanted = [point for point in points if point.requires_grad]
        torch.autograd.grad([leaf.sum() for leaf in leaves], wanted, allow_unused=True)
    for report in reports.backward:
        worst = worst_of(report)
        status = bilevel.Status(int(report.status_code.reshape(-1)[worst]))
        if status.success:
            continue
        meaning, remedy = report.words.get(status, (status.meaning, status.remedy))
        defect = Defect.DEGENERATE if status is bilevel.Status.DEGENERATE else Defect.LINEAR_SOLVE
        seen.find(defect, f"{report.solver} {meaning}{seen.of(worst)}", remedy)


def outer_loss(seen: Examination) -> None:
    """Evaluate the outer loss twice at the inner solution, and compare its derivatives with differences."""
    subject, reference = seen.subject, seen.wide
    rows, leaves = [row.detach().requires_grad_(True) for row in seen.rows], reference.leaves()
    if subject.problem is None or len(seen.usable()) < reference.count:
        return
    values = [reference.scalar(rows, leaves) for _ in range(2)]
    first, second = (float(value.detach()) for value in values)
    if not math.isfinite(first):
        seen.find(Defect.NOT_FINITE, f"the outer loss is {first} at the inner solution")
    elif not all(bool(torch.isfinite(slope).all()) for slope in gradients(values[0], [*rows, *leaves])):
        seen.find(Defect.NOT_FINITE, "the outer loss's gradient is not finite at the inner solution")
    elif first != second:
        seen.find(Defect.STOCHASTIC, "two evaluations of the outer loss at one point differ")
    else:
        errors = argument_mismatch(
            lambda given: reference.scalar(given[: len(rows)], given[len(rows) :]), [*rows, *leaves], reference.eps
        )
        for name, error in zip([*["the inner solution"] * len(rows), *subject.names], errors, strict=True):
            if error > MISMATCH:
                text = f"the outer loss's derivative by {name} and differences of its values disagree by {error:.0%}"
                seen.find(Defect.WRONG_GRADIENT, text)
        _outer_kinks(seen)


def _outer_kinks(seen: Examination) -> None:
    """See whether the outer loss has other slopes on one side of the inner solution, or of an outer tensor, than on the other."""
    reference, count = seen.wide, len(seen.rows)
    found = bent(
        lambda given: reference.scalar(given[:count], given[count:]),
        [*seen.rows, *reference.points],
        reference.eps,
        seen.subject.eps,
    )
    for name, kink in zip([*["the inner solution"] * count, *seen.subject.names], found, strict=True):
        if kink:
            text = f"the outer loss has a kink at {name}: its slopes on the two sides differ, and autograd takes one or neither"
            seen.find(
                Defect.DEGENERATE,
                text,
                "change the outer tensors a little, or smooth the kink, for example |x| as sqrt(x² + ε²)",
            )


def whole(seen: Examination) -> None:
    """Differentiate as a user would where nothing was found, so that whatever the library refuses is a finding."""
    if seen.findings:
        return
    subject = seen.subject
    if subject.problem is not None:
        (outer, data), _ = subject.rebuild(subject.leaves)
        bilevel.BilevelProblem.hypergradient(subject.problem, outer, data, init=subject.init)
        return
    points = [point.detach().clone().requires_grad_() for point in subject.points]
    with torch.enable_grad():
        made = pytree.tree_leaves(subject.solve(seen.layer(on_failure="raise"), points))
        leaves = [leaf for leaf in made if leaf.requires_grad]
        if leaves:
            torch.autograd.grad([leaf.sum() for leaf in leaves], points, allow_unused=True)


def tensors(seen: Examination) -> None:
    """See which tensors are connected, and the norms of their gradients where the matrices were formed."""
    subject, reference = seen.subject, seen.wide
    if not seen.rows:
        return
    rows, leaves = [row.detach().requires_grad_(True) for row in seen.rows], reference.leaves()
    with torch.enable_grad():
        value = reference.scalar(rows, leaves)
    slopes = _maybe(value, [*rows, *leaves])
    through, direct = slopes[: len(rows)], slopes[len(rows) :]
    if subject.problem is not None and all(slope is None for slope in through):
        seen.find(Defect.OUTER_IGNORES_INNER, "no graph leads from the outer loss to the inner solution")
    inner_use, totals = [False] * len(leaves), list(direct)
    solved = True
    for number in seen.usable():
        points = reference.leaves()
        residual = reference.residual(number, seen.rows[number], points)
        rhs, matrix = through[number], seen.matrices.get(number)
        q = None if rhs is None or matrix is None else torch.linalg.solve_ex(matrix.mT, rhs)[0]
        solved &= q is not None or rhs is None
        weight = torch.ones_like(residual) if q is None else q
        for place, pulled in enumerate(_maybe((residual * weight).sum(), points)):
            inner_use[place] |= pulled is not None
            before = totals[place]
            if pulled is not None and q is not None:
                totals[place] = -pulled if before is None else before - pulled
    complete = solved and len(seen.usable()) == reference.count
    seen.outer = tuple(
        OuterTensor(
            name, tuple(leaf.shape), used, part is not None,
            (0.0 if total is None else float(total.norm())) if complete else None,
        )
        for name, leaf, used, part, total in zip(subject.names, leaves, inner_use, direct, totals, strict=True)
    )  # fmt: skip
    _judge_tensors(seen, totals if complete else [None] * len(leaves), leaves)


def _judge_tensors(seen: Examination, totals: Sequence[torch.Tensor | None], leaves: Sequence[torch.Tensor]) -> None:
    lost = [t.name for t in seen.outer if not t.in_inner and not t.in_outer]
    if lost:
        seen.find(Defect.DISCONNECTED, f"neither objective uses {', '.join(lost)}: the gradient is zero or None")
    zero = [
        tensor.name
        for tensor, total, leaf in zip(seen.outer, totals, leaves, strict=True)
        if tensor.name not in lost and total is not None and leaf.numel() and not bool((total != 0).any())
    ]
    # At a stationary point by symmetry or by convention, or with a singular matrix, the gradient means nothing.
    if zero and not seen.has(
        Defect.OUTER_IGNORES_INNER, Defect.KINK, Defect.DEGENERATE, Defect.SADDLE, Defect.SINGULAR
    ):
        seen.find(Defect.ZERO_GRADIENT, f"the gradient of {', '.join(zero)} is exactly zero")


def linear_solve(seen: Examination) -> None:
    """Differentiate with the settings given, and see what the linear solve left."""
    if not seen.usable() or seen.has(Defect.OUTER_IGNORES_INNER, Defect.NOT_FINITE, Defect.STOCHASTIC):
        return
    report, seconds = _backward(seen)
    if report is None:
        return
    left = report.residual_norm.reshape(-1) / report.scale.reshape(-1).clamp_min(1e-300)
    worst = int(left.nan_to_num(nan=math.inf).argmax())
    status = bilevel.Status(int(report.status_code.reshape(-1)[worst_of(report)]))
    relative = float(left[worst])
    products = int(report.iterations.reshape(-1)[worst])
    seen.linear = LinearSolve(report.solver, status.meaning, products, seconds, relative)
    if seen.has(Defect.SINGULAR) and seen.curvature is not None and seen.curvature.exact:
        _free_directions(seen)
    named = seen.has(
        Defect.SADDLE,
        Defect.KINK,
        Defect.SINGULAR,
        Defect.SINGULAR_SEARCH,
        Defect.UNFIT_LINEAR_SOLVER,
        Defect.UNCONVERGED,
    )
    if (not status.success or not relative <= _LEFT) and not named:
        text = f"{report.solver} {status.meaning} and leaves {relative:.1e} of the right-hand side"
        seen.find(Defect.LINEAR_SOLVE, text)


def _backward(seen: Examination, **settings: Any) -> tuple[bilevel.SolveReport | None, float]:
    """Return the report of the derivative's linear solve and its seconds; None if there was none."""
    layer = seen.layer(on_failure="ignore", solver=_return_found(seen), tolerance=_silent(seen), **settings)
    leaves = [point.detach().clone().requires_grad_(True) for point in seen.subject.points]
    weights = _weights(seen)
    with bilevel.record() as reports, torch.enable_grad():
        outputs = pytree.tree_leaves(seen.subject.solve(layer, leaves))
        if not any(output.requires_grad for output in outputs):
            return None, 0.0
        begun = time.perf_counter()
        torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
        seconds = time.perf_counter() - begun
    own = [report for report in reports.backward if report.where == layer.where]
    return (own[-1] if own else None), seconds


def _free_directions(seen: Examination) -> None:
    """See whether the outcome depends on the directions in which the solution is not unique: only Exact decides it for sure."""
    report, _ = _backward(seen, linear_solver=bilevel.Exact())
    if report is None or not bool(report.converged.all()):
        return
    if bool((report.status_code == bilevel.Status.MINIMUM_NORM).any()):
        what = "outer loss" if seen.subject.problem is not None else "result"
        text = (
            f"the solution is free in some directions, as under a symmetry, and the {what} does not change along them"
        )
        seen.replace(Defect.SINGULAR, Defect.MINIMUM_NORM, text)


def _return_found(seen: Examination) -> Callable[..., Any]:
    """Return an inner solver that knows the answers, in the order of the batch."""
    leaves = pytree.tree_leaves(seen.subject.init)
    narrow = [row.to(widest(leaves)) for row in seen.narrow_rows]
    answers = iter([seen.narrow.tree(row) for row in narrow])
    return lambda function, init, *args, **kwargs: next(answers)


def _silent(seen: Examination) -> bilevel.Tolerance:
    given = seen.layer().tolerance
    return replace(given, delta=None)


def _weights(seen: Examination) -> list[torch.Tensor]:
    """Return the cotangents of the solution's leaves: the outer loss's slope, or random ones."""
    if seen.subject.problem is None:
        return list(seen.narrow.cotangents)
    leaves = pytree.tree_leaves(seen.subject.init)
    rows = [row.detach().requires_grad_(True) for row in seen.narrow_rows]
    with torch.enable_grad():
        slopes = _maybe(seen.narrow.scalar(rows, seen.narrow.points), rows)
    trees = [
        seen.narrow.tree(torch.zeros_like(row) if slope is None else slope)
        for row, slope in zip(rows, slopes, strict=True)
    ]
    if seen.subject.count is None:
        made = pytree.tree_leaves(trees[0])
    else:
        made = pytree.tree_leaves(pytree.tree_map(lambda *parts: torch.stack(parts), *trees))
    return [part.to(leaf.dtype) for part, leaf in zip(made, leaves, strict=True)]


def _maybe(output: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return gradients, None where no graph leads to."""
    if not output.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(output, list(inputs), allow_unused=True))
