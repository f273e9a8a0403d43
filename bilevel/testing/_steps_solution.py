"""What is wrong with a problem's solution: how the inner solve ends, the curvature there, what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing import _curvature
from bilevel.testing._examination import Examination, worst_of
from bilevel.testing._probes import noise
from bilevel.testing.defects import Defect
from bilevel.testing.diagnosis import Cost, Curvature, InnerSolve

__all__ = ["curve", "price", "solve", "stationary"]

_Product = Callable[[torch.Tensor], torch.Tensor]

_DENSE_ORDER = 512
# A Newton step longer than this share of x makes a hypergradient wrong by about as much.
_FAR = 1e-3
# An x so many times as long as the start has run away.
_RUN_AWAY = 1e6
_STATUSES = {
    bilevel.Status.NOT_FINITE: Defect.NOT_FINITE,
    bilevel.Status.DIVERGED: Defect.DIVERGED,
    bilevel.Status.INDEFINITE: Defect.SADDLE,
    bilevel.Status.SINGULAR: Defect.SINGULAR_SEARCH,
    bilevel.Status.KINK: Defect.KINK,
    bilevel.Status.INFEASIBLE: Defect.INFEASIBLE,
    bilevel.Status.UNBOUNDED: Defect.UNBOUNDED,
}


def solve(seen: Examination) -> None:
    """Solve with the settings given, and see how that ends."""
    layer = seen.layer(on_failure="ignore")
    begun = time.perf_counter()
    with bilevel.record() as reports, torch.no_grad():
        found = seen.subject.solve(layer, seen.subject.points)
    seconds = time.perf_counter() - begun
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(found)]
    seen.rows = seen.wide.rows(leaves)
    seen.narrow_rows = seen.narrow.rows(leaves)
    seen.scale = max((float(row.norm()) for row in seen.rows), default=0.0)
    report = [r for r in reports.forward if r.where == layer.where][-1]  # after those of layers inside
    worst = worst_of(report)
    status = bilevel.Status(int(report.status_code.reshape(-1)[worst]))
    figures = [float(t.reshape(-1)[worst]) for t in (report.residual_norm, report.threshold)]
    steps = int(report.iterations.reshape(-1)[worst])
    seen.inner = InnerSolve(report.solver, status.meaning, steps, seconds, figures[0], figures[1])
    if not status.success:
        of, (meaning, remedy) = seen.of(worst), report.words.get(status, (status.meaning, status.remedy))
        start = seen.wide.rows(pytree.tree_leaves(seen.subject.init))[worst]
        if bool((seen.rows[worst] == start).all()) and "start" not in meaning:
            of = f"{of} at the start"
        no_solution = status in (bilevel.Status.INFEASIBLE, bilevel.Status.UNBOUNDED)
        sizes = "" if no_solution else f"residual {figures[0]:.1e}, asked {figures[1]:.1e}, "
        text = f"{report.solver} {meaning}{of} ({sizes}{steps} steps)"
        defect = _STATUSES.get(status, Defect.UNCONVERGED)
        if defect is Defect.UNCONVERGED and float(seen.rows[worst].norm()) > _RUN_AWAY * (1 + float(start.norm())):
            # A solver of the user's own does not say so itself.
            defect, remedy = Defect.DIVERGED, f"{Defect.DIVERGED.remedy}; or {remedy}"
        # A random function cannot be solved: that is no second finding.
        if defect not in (Defect.UNCONVERGED, Defect.KINK) or not seen.has(Defect.STOCHASTIC):
            seen.find(defect, text, remedy)
    _reachable(seen, report)


def _reachable(seen: Examination, report: bilevel.SolveReport) -> None:
    asked = seen.subject.layer.tolerance.delta
    if not isinstance(asked, (int, float)):
        return
    for number in seen.numbers():
        threshold = float(report.threshold.reshape(-1)[number])
        floor = noise(seen.narrow, number, seen.narrow_rows[number])
        if floor > threshold:
            text = f"one unit in the last place of x moves the residual by {floor:.1e}, and {threshold:.1e} is asked"
            seen.find(Defect.UNREACHABLE_TOLERANCE, text)


def curve(seen: Examination) -> None:
    """Find the worst curvature of the batch, and name what is wrong with it."""
    symmetric = seen.subject.layer.minimizes
    found: list[tuple[int, Curvature]] = []
    for number in seen.usable():
        x = seen.rows[number]
        if not x.numel():
            continue
        if len(x) <= _DENSE_ORDER:
            matrix = seen.wide.matrix(number, x, seen.wide.points)
            if not bool(torch.isfinite(matrix).all()):
                seen.find(Defect.NOT_FINITE, f"second derivatives are not finite at the inner point{seen.of(number)}")
                continue
            seen.matrices[number] = matrix
            found.append((number, _curvature.of_matrix(matrix, symmetric=symmetric)))
        else:
            product, transposed = _products(seen, number)
            found.append((number, _curvature.of_products(product, transposed, x, symmetric=symmetric)))
    if not found:
        return
    number, curve = max(found, key=lambda pair: (pair[1].smallest < 0, pair[1].condition))
    seen.curvature = curve
    _judge(seen, number, curve, len(seen.rows[number]), symmetric)


def _products(seen: Examination, number: int) -> tuple[_Product, _Product]:
    """Return v ↦ J v and v ↦ Jᵀ v at the inner point, over retained graphs."""
    point = seen.rows[number].detach().requires_grad_(True)
    with torch.enable_grad():
        residual = seen.wide.residual(number, point, seen.wide.points)
        dummy = torch.zeros_like(residual, requires_grad=True)
        (pulled,) = torch.autograd.grad(residual, point, dummy, create_graph=True, materialize_grads=True)

    def transposed(v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(residual, point, v, retain_graph=True, materialize_grads=True)[0]

    def product(v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(pulled, dummy, v, retain_graph=True, materialize_grads=True)[0]

    return (transposed if seen.subject.layer.minimizes else product), transposed


def _judge(seen: Examination, number: int, curve: Curvature, size: int, symmetric: bool) -> None:
    of, what = seen.of(number), "eigenvalue" if symmetric else "singular value"
    largest = max(abs(curve.smallest), abs(curve.largest))
    floor = _curvature.singular_below(size, seen.wide.eps) * largest
    eps, kappa, scaled = seen.subject.eps, curve.condition, curve.condition_scaled
    if symmetric and curve.asymmetry > math.sqrt(seen.wide.eps):
        seen.find(Defect.NOT_SYMMETRIC, f"‖H − Hᵀ‖ is {curve.asymmetry:.1e} of ‖H‖{of}")
    lost = f"of {-math.log10(eps):.0f} digits a gradient loses about {math.log10(kappa) if kappa < 1e300 else 300:.0f}"
    hard = kappa > min(1e6, max(1e-3 / eps, 1e2))
    if symmetric and curve.smallest < -floor:
        text = f"the Hessian{of} has the eigenvalue {curve.smallest:.2e} (largest {curve.largest:.2e}) where the solve ended"
        seen.find(Defect.SADDLE, text)
    elif hard and scaled is not None and scaled < 0.01 * min(kappa, 1e10):
        text = f"the condition number{of} is {kappa:.1e}, and {scaled:.1e} once each unknown is scaled; {lost}"
        seen.find(Defect.BADLY_SCALED, text)
    elif abs(curve.smallest) <= floor or not largest:
        text = f"the smallest {what}{of} is {curve.smallest:.1e} beside {largest:.1e}, zero in this arithmetic"
        if not seen.has(Defect.SINGULAR_SEARCH):  # a matrix away from a solution says nothing of the solution
            seen.find(Defect.SINGULAR, text)
    elif hard:
        seen.find(Defect.ILL_CONDITIONED, f"the condition number{of} is {kappa:.1e}; {lost}")
    fit_for_symmetric = isinstance(seen.subject.layer.linear_solver, bilevel.CG)
    if not symmetric and fit_for_symmetric and curve.asymmetry > 1e-6:
        text = f"CG is given, and ‖J − Jᵀ‖ is {curve.asymmetry:.1e} of ‖J‖{of}"
        seen.find(Defect.UNFIT_LINEAR_SOLVER, text)


def stationary(seen: Examination) -> None:
    """See how far a Newton step from the point found would still go."""
    if seen.inner is None or seen.has(Defect.SINGULAR, Defect.SINGULAR_SEARCH, Defect.KINK):
        return
    farthest, about = 0.0, "is"
    starts = seen.wide.rows(pytree.tree_leaves(seen.subject.init))
    # Of a solution that is zero, the way from the start says what is small.
    sizes = [max(float(x.norm()), float((x - start).norm())) for x, start in zip(seen.rows, starts, strict=True)]
    for number, matrix in seen.matrices.items():
        x = seen.rows[number]
        residual = seen.wide.residual(number, x, seen.wide.points).detach()
        farthest = max(farthest, _share(float(torch.linalg.solve_ex(matrix, residual)[0].norm()), sizes[number]))
    if seen.matrices:
        seen.inner = replace(seen.inner, newton_step=farthest)
    elif seen.curvature is not None:
        # Without the matrix: a Newton step is at least the residual by the largest eigenvalue.
        largest, about = max(abs(seen.curvature.smallest), abs(seen.curvature.largest), 1e-300), "is at least"
        for number in seen.usable():
            residual = seen.wide.residual(number, seen.rows[number], seen.wide.points).detach()
            farthest = max(farthest, _share(float(residual.norm()) / largest, sizes[number]))
    if farthest > _FAR and not seen.has(Defect.DIVERGED, Defect.NOT_FINITE, Defect.STOCHASTIC):
        where = f"a Newton step from where {seen.inner.solver} ended"
        seen.find(Defect.UNCONVERGED, f"the inner point is not stationary: {where} {about} {farthest:.1g} of x")


def _share(step: float, size: float) -> float:
    return step / max(size, step, 1e-300)


def price(seen: Examination) -> None:
    """Time a gradient and a product."""
    usable = seen.usable()
    if not usable:
        return
    number = usable[0]
    x = seen.narrow_rows[number]
    if not x.numel():
        return
    gradient = _timed(lambda: seen.narrow.residual(number, x, seen.narrow.points))
    point = x.detach().requires_grad_(True)
    with torch.enable_grad():
        residual = seen.narrow.residual(number, point, seen.narrow.points)
    ones = torch.ones_like(residual)

    def product() -> object:
        if not residual.requires_grad:
            return None
        return torch.autograd.grad(residual, point, ones, retain_graph=True, allow_unused=True)

    n = x.numel()
    kappa = seen.curvature.condition if seen.curvature is not None else math.inf
    steps = 0.5 * math.sqrt(kappa) * math.log(2e6) if kappa < 1e30 else math.inf
    seen.cost = Cost(gradient, _timed(product), seen.wide.count * n * n, int(min(n, math.ceil(min(steps, n)))))


def _timed(run: Callable[[], object]) -> float:
    run()
    begun = time.perf_counter()
    for _ in range(3):
        run()
    return (time.perf_counter() - begun) / 3
