"""The examination behind a diagnosis: one step after another, none of which may stop the others."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing import _curvature
from bilevel.testing._advice import advise
from bilevel.testing._probes import Probe, captured_tensors, gradient_mismatch, noise, probe, state_of
from bilevel.testing._subject import Subject
from bilevel.testing.diagnosis import (
    Cost,
    Curvature,
    Defect,
    Diagnosis,
    Finding,
    InnerSolve,
    LinearSolve,
    OuterTensor,
)
from bilevel.testing.references import Reference

__all__ = ["Examination"]

_Product = Callable[[torch.Tensor], torch.Tensor]

_DENSE_ORDER = 512
# Of a batch, this many problems are looked at closely.
_MOST_PROBLEMS = 8
# A Newton step longer than this share of x makes a hypergradient wrong by about as much.
_FAR = 1e-3
# Derivatives and differences that disagree by more than this are not of the same function.
_MISMATCH = 1e-3
# What an inaccurate linear solve may leave of the right-hand side.
_LEFT = 1e-2

_ERRORS = {
    bilevel.CapturedTensorError: Defect.CAPTURED_TENSOR,
    bilevel.StochasticObjectiveError: Defect.STOCHASTIC,
}
_STATUSES = {
    bilevel.Status.NOT_FINITE: Defect.NOT_FINITE,
    bilevel.Status.DIVERGED: Defect.DIVERGED,
    bilevel.Status.INDEFINITE: Defect.SADDLE,
    bilevel.Status.SINGULAR: Defect.SINGULAR,
}


@dataclass(eq=False)
class Examination:
    """What is known so far of a subject; each step adds to it."""

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
    matrices: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: float | None = None  # ‖x‖, of the solution

    def run(self) -> Diagnosis:
        """Examine everything and say what was found."""
        subject = self.subject
        cotangents = self._cotangents()
        self.narrow = Reference(subject, cotangents, _coarsest(subject))
        self.wide = self.narrow
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step, what in (
                (self._prepare, "the function in float64"),
                (self._dtypes, "the dtypes"),
                (self._function, "the function"),
                (self._misuse, "what the library refuses"),
                (self._solve, "the inner solve"),
                (self._derivatives, "the function's derivatives"),
                (self._curve, "the curvature"),
                (self._stationary, "whether the inner point is stationary"),
                (self._tensors, "the outer tensors"),
                (self._linear_solve, "the linear solve"),
                (self._price, "the cost"),
            ):
                self._try(step, what)
                if self._has(Defect.UNUSABLE, Defect.INNER_DISCONNECTED):
                    self.unexamined.append("what depends on it")
                    break
        advice = advise(self) if self.rows and not self._has(Defect.UNUSABLE, Defect.NOT_FINITE) else None
        leaves = pytree.tree_leaves(subject.init)
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

    # Book-keeping.

    def _try(self, step: Callable[[], None], what: str) -> None:
        try:
            step()
        except Exception as error:  # whatever it is, it is what was to be found
            self._blame(error, what)

    def _blame(self, error: Exception, what: str) -> None:
        for kind, defect in _ERRORS.items():
            if isinstance(error, kind):
                self._find(defect, _first_line(error))
                return
        if self.findings:
            self.unexamined.append(f"{what} ({_first_line(error)})")
        else:
            self._find(Defect.UNUSABLE, f"{what} cannot be examined: {type(error).__name__}: {_first_line(error)}")

    def _find(self, defect: Defect, sentence: str, remedy: str | None = None) -> None:
        if not self._has(defect):
            self.findings.append(Finding(defect, sentence, defect.remedy if remedy is None else remedy))

    def _has(self, *defects: Defect) -> bool:
        return any(finding.defect in defects for finding in self.findings)

    def _cotangents(self) -> tuple[torch.Tensor, ...]:
        if self.subject.problem is not None:
            return ()
        generator = torch.Generator().manual_seed(0)
        leaves = [leaf for leaf in pytree.tree_leaves(self.subject.init) if isinstance(leaf, torch.Tensor)]
        return tuple(torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves)

    def _numbers(self) -> range:
        return range(min(self.wide.count, _MOST_PROBLEMS))

    def _layer(self, **settings: Any) -> bilevel.Layer:
        """Return the layer with other settings."""
        layer, problem = self.subject.layer, self.subject.problem
        tolerance = layer.tolerance
        if problem is not None:
            (outer, data), _ = self.subject.rebuild(self.subject.leaves)
            tolerance = problem.tolerance_of(outer, data)
        make = bilevel.argmin if layer.minimizes else bilevel.fixed_point if layer.is_fixed_point else bilevel.root
        given = {"solver": layer.solver, "linear_solver": layer.linear_solver, "tolerance": tolerance, **settings}
        return make(layer.function, **given)

    # The steps.

    def _prepare(self) -> None:
        for leaf in pytree.tree_leaves(self.subject.init):
            if not isinstance(leaf, torch.Tensor) or not leaf.dtype.is_floating_point:
                got = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                self._find(
                    Defect.UNUSABLE, f"the unknown has to be floating-point tensors, and one is {got}", "convert it"
                )
        self.wide = Reference.of(self.subject, self.narrow.cotangents)

    def _dtypes(self) -> None:
        tensors = [*pytree.tree_leaves(self.subject.init), *self.subject.leaves]
        dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}
        named = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        if any(torch.finfo(dtype).bits < 32 for dtype in dtypes):
            self._find(
                Defect.LOW_PRECISION, f"tensors of {', '.join(named)}: 2 to 3 digits, of which a solve leaves none"
            )
        elif len(dtypes) > 1:
            self._find(Defect.MIXED_DTYPES, f"tensors of {' and '.join(named)}")

    def _function(self) -> None:
        subject, narrow = self.subject, self.narrow
        before = state_of(narrow)
        starts = narrow.rows(pytree.tree_leaves(subject.init))
        for number in self._numbers():
            x = starts[number]
            here = probe(narrow, number, x)
            self._finite(here, number)
            if here.residual is None and x.numel():
                self._find(
                    Defect.INNER_DISCONNECTED, "no graph leads from what the function returns to its first argument"
                )
            if here.leaves:
                what = ", ".join(captured_tensors(here.leaves, subject.function))
                self._find(Defect.CAPTURED_TENSOR, f"the inner function reaches {what}, which would get no gradient")
            # Dropout leaves a zero alone: look beside the start.
            beside = x + 0.01 * (1 + x.abs())
            pair = [probe(narrow, number, beside) for _ in range(2)]
            same = _agree(pair[0], pair[1])
            self.deterministic = same and self.deterministic is not False
        if self.deterministic is False:
            self._find(Defect.STOCHASTIC, "two evaluations of the inner function at one point differ")
        if state_of(narrow) != before:
            self._find(Defect.CHANGES_STATE, "evaluating the inner function changes an argument or a buffer in place")

    def _finite(self, here: Probe, number: int) -> None:
        if not bool(torch.isfinite(here.value).all()):
            self._find(Defect.NOT_FINITE, f"the inner function is not finite at the start{self._of(number)}")
        elif here.residual is not None and not bool(torch.isfinite(here.residual).all()):
            self._find(Defect.NOT_FINITE, f"the inner function's gradient is not finite at the start{self._of(number)}")

    def _of(self, number: int) -> str:
        return "" if self.subject.count is None else f" of problem {number}"

    def _misuse(self) -> None:
        """Let the library refuse what it would refuse, with a solver that does nothing."""
        if self._has(Defect.NOT_FINITE):
            return
        idle = self._layer(
            solver=lambda function, init, *args, **kwargs: init,
            tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
            on_failure="raise",
        )
        leaves = [point.clone().requires_grad_(True) for point in self.subject.points]
        try:
            with torch.enable_grad():
                self.subject.solve(idle, leaves)
        except bilevel.SolveError:
            return
        except bilevel.StochasticObjectiveError as error:
            changed = self.deterministic is not False
            self._find(Defect.CHANGES_STATE if changed else Defect.STOCHASTIC, _first_line(error))

    def _solve(self) -> None:
        layer = self._layer(on_failure="ignore")
        begun = time.perf_counter()
        with bilevel.record() as reports, torch.no_grad():
            found = self.subject.solve(layer, self.subject.points)
        seconds = time.perf_counter() - begun
        leaves = [leaf.detach() for leaf in pytree.tree_leaves(found)]
        self.rows = self.wide.rows(leaves)
        self.narrow_rows = self.narrow.rows(leaves)
        self.scale = max((float(row.norm()) for row in self.rows), default=0.0)
        report = next(r for r in reports.forward if r.where == layer.where)
        worst = _worst(report)
        status = bilevel.Status(int(report.status_code.reshape(-1)[worst]))
        figures = [float(t.reshape(-1)[worst]) for t in (report.residual_norm, report.threshold)]
        steps = int(report.iterations.reshape(-1)[worst])
        self.inner = InnerSolve(report.solver, status.meaning, steps, seconds, figures[0], figures[1])
        if status is bilevel.Status.SINGULAR or not status.success:
            of = self._of(worst)
            text = f"{report.solver} {status.meaning}{of} (residual {figures[0]:.1e}, asked {figures[1]:.1e}, {steps} steps)"
            defect = _STATUSES.get(status, Defect.UNCONVERGED)
            # A random function cannot be solved: that is no second finding.
            if defect is not Defect.UNCONVERGED or not self._has(Defect.STOCHASTIC):
                self._find(defect, text, None if defect is Defect.SADDLE else status.remedy)
        self._reachable(report)

    def _reachable(self, report: bilevel.SolveReport) -> None:
        asked = self.subject.layer.tolerance.delta
        if not isinstance(asked, (int, float)):
            return
        for number in self._numbers():
            threshold = float(report.threshold.reshape(-1)[number])
            floor = noise(self.narrow, number, self.narrow_rows[number])
            if floor > threshold:
                text = (
                    f"one unit in the last place of x moves the residual by {floor:.1e}, and {threshold:.1e} is asked"
                )
                self._find(Defect.UNREACHABLE_TOLERANCE, text)

    def _usable(self) -> list[int]:
        return [n for n in self._numbers() if self.rows and bool(torch.isfinite(self.rows[n]).all())]

    def _derivatives(self) -> None:
        if self._has(Defect.STOCHASTIC, Defect.INNER_DISCONNECTED):
            return
        for number in self._usable()[:2]:
            first, second = gradient_mismatch(self.wide, number, self.rows[number])
            if first > _MISMATCH:
                text = f"the gradient by autograd and differences of the values disagree by {first:.0%}"
                self._find(Defect.WRONG_GRADIENT, text)
            elif second > _MISMATCH:
                text = f"second derivatives by autograd and differences of the first disagree by {second:.0%}"
                if not self.subject.layer.minimizes:
                    text = f"derivatives by autograd and differences of the residual disagree by {second:.0%}"
                self._find(Defect.WRONG_GRADIENT, text)

    def _curve(self) -> None:
        """Find the worst curvature of the batch, and name what is wrong with it."""
        symmetric = self.subject.layer.minimizes
        found: list[tuple[int, Curvature]] = []
        for number in self._usable():
            x = self.rows[number]
            if not x.numel():
                continue
            if len(x) <= _DENSE_ORDER:
                matrix = self.wide.matrix(number, x, self.wide.points)
                if not bool(torch.isfinite(matrix).all()):
                    self._find(
                        Defect.NOT_FINITE, f"second derivatives are not finite at the inner point{self._of(number)}"
                    )
                    continue
                self.matrices[number] = matrix
                found.append((number, _curvature.of_matrix(matrix, symmetric=symmetric)))
            else:
                product, transposed = self._products(number)
                found.append((number, _curvature.of_products(product, transposed, x, symmetric=symmetric)))
        if not found:
            return
        number, curve = max(found, key=lambda pair: (pair[1].smallest < 0, pair[1].condition))
        self.curvature = curve
        self._judge(number, curve, len(self.rows[number]), symmetric)

    def _products(self, number: int) -> tuple[_Product, _Product]:
        """Return v ↦ J v and v ↦ Jᵀ v at the inner point, over retained graphs."""
        point = self.rows[number].detach().requires_grad_(True)
        with torch.enable_grad():
            residual = self.wide.residual(number, point, self.wide.points)
            dummy = torch.zeros_like(residual, requires_grad=True)
            (pulled,) = torch.autograd.grad(residual, point, dummy, create_graph=True, materialize_grads=True)

        def transposed(v: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(residual, point, v, retain_graph=True, materialize_grads=True)[0]

        def product(v: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(pulled, dummy, v, retain_graph=True, materialize_grads=True)[0]

        return (transposed if self.subject.layer.minimizes else product), transposed

    def _judge(self, number: int, curve: Curvature, size: int, symmetric: bool) -> None:
        of, what = self._of(number), "eigenvalue" if symmetric else "singular value"
        largest = max(abs(curve.smallest), abs(curve.largest))
        floor = _curvature.singular_below(size, self.wide.eps) * largest
        eps, kappa, scaled = self.subject.eps, curve.condition, curve.condition_scaled
        if symmetric and curve.asymmetry > math.sqrt(self.wide.eps):
            self._find(Defect.NOT_SYMMETRIC, f"‖H − Hᵀ‖ is {curve.asymmetry:.1e} of ‖H‖{of}")
        lost = (
            f"of {-math.log10(eps):.0f} digits a gradient loses about {math.log10(kappa) if kappa < 1e300 else 300:.0f}"
        )
        hard = kappa > min(1e6, max(1e-3 / eps, 1e2))
        if symmetric and curve.smallest < -floor:
            text = f"the Hessian{of} has the eigenvalue {curve.smallest:.2e} (largest {curve.largest:.2e}): no minimum"
            self._find(Defect.SADDLE, text)
        elif hard and scaled is not None and scaled < 0.01 * min(kappa, 1e10):
            text = f"the condition number{of} is {kappa:.1e}, and {scaled:.1e} once each unknown is scaled; {lost}"
            self._find(Defect.BADLY_SCALED, text)
        elif abs(curve.smallest) <= floor or not largest:
            text = f"the smallest {what}{of} is {curve.smallest:.1e} beside {largest:.1e}, zero in this arithmetic"
            self._find(Defect.SINGULAR, text)
        elif hard:
            self._find(Defect.ILL_CONDITIONED, f"the condition number{of} is {kappa:.1e}; {lost}")
        fit_for_symmetric = isinstance(self.subject.layer.linear_solver, bilevel.CG)
        if not symmetric and fit_for_symmetric and curve.asymmetry > 1e-6:
            text = f"CG is given, and ‖J − Jᵀ‖ is {curve.asymmetry:.1e} of ‖J‖{of}"
            self._find(Defect.UNFIT_LINEAR_SOLVER, text)

    def _stationary(self) -> None:
        if self.inner is None or self._has(Defect.SINGULAR):
            return
        farthest = 0.0
        for number, matrix in self.matrices.items():
            x = self.rows[number]
            residual = self.wide.residual(number, x, self.wide.points).detach()
            step = torch.linalg.solve_ex(matrix, residual)[0]
            size = max(float(x.norm()), float(step.norm()), 1e-300)
            farthest = max(farthest, float(step.norm()) / size)
        if self.matrices:
            self.inner = replace(self.inner, newton_step=farthest)
        if farthest > _FAR and not self._has(Defect.DIVERGED, Defect.NOT_FINITE, Defect.STOCHASTIC):
            text = f"the inner point is not stationary: a Newton step from where {self.inner.solver} ended is {farthest:.1g} of x"
            self._find(Defect.UNCONVERGED, text)

    def _tensors(self) -> None:
        """See which tensors are connected, and the norms of their gradients where the matrices were formed."""
        subject, reference = self.subject, self.wide
        if not self.rows:
            return
        rows, leaves = [row.detach().requires_grad_(True) for row in self.rows], reference.leaves()
        with torch.enable_grad():
            value = reference.scalar(rows, leaves)
        slopes = _maybe(value, [*rows, *leaves])
        through, direct = slopes[: len(rows)], slopes[len(rows) :]
        if subject.problem is not None and all(slope is None for slope in through):
            self._find(Defect.OUTER_IGNORES_INNER, "no graph leads from the outer loss to the inner solution")
        inner_use, totals = [False] * len(leaves), list(direct)
        solved = True
        for number in self._usable():
            tensors = reference.leaves()
            residual = reference.residual(number, self.rows[number], tensors)
            rhs, matrix = through[number], self.matrices.get(number)
            q = None if rhs is None or matrix is None else torch.linalg.solve_ex(matrix.mT, rhs)[0]
            solved &= q is not None or rhs is None
            weight = torch.ones_like(residual) if q is None else q
            for place, pulled in enumerate(_maybe((residual * weight).sum(), tensors)):
                inner_use[place] |= pulled is not None
                before = totals[place]
                if pulled is not None and q is not None:
                    totals[place] = -pulled if before is None else before - pulled
        complete = solved and len(self._usable()) == reference.count
        self.outer = tuple(
            OuterTensor(
                name, tuple(leaf.shape), used, part is not None,
                (0.0 if total is None else float(total.norm())) if complete else None,
            )
            for name, leaf, used, part, total in zip(subject.names, leaves, inner_use, direct, totals, strict=True)
        )  # fmt: skip
        self._judge_tensors(totals if complete else [None] * len(leaves), leaves)

    def _judge_tensors(self, totals: Sequence[torch.Tensor | None], leaves: Sequence[torch.Tensor]) -> None:
        lost = [t.name for t in self.outer if not t.in_inner and not t.in_outer]
        if lost:
            self._find(Defect.DISCONNECTED, f"neither objective uses {', '.join(lost)}: the gradient is zero or None")
        zero = [
            tensor.name
            for tensor, total, leaf in zip(self.outer, totals, leaves, strict=True)
            if tensor.name not in lost and total is not None and leaf.numel() and not bool((total != 0).any())
        ]
        if zero and not self._has(Defect.OUTER_IGNORES_INNER):
            self._find(Defect.ZERO_GRADIENT, f"the gradient of {', '.join(zero)} is exactly zero")

    def _linear_solve(self) -> None:
        """Differentiate with the settings given, and see what the linear solve left."""
        if not self._usable() or self._has(Defect.OUTER_IGNORES_INNER, Defect.NOT_FINITE, Defect.STOCHASTIC):
            return
        layer = self._layer(on_failure="ignore", solver=self._return_found(), tolerance=self._silent())
        leaves = [point.detach().clone().requires_grad_(True) for point in self.subject.points]
        weights = self._weights()
        with bilevel.record() as reports, torch.enable_grad():
            outputs = pytree.tree_leaves(self.subject.solve(layer, leaves))
            if not any(output.requires_grad for output in outputs):
                return
            begun = time.perf_counter()
            torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
            seconds = time.perf_counter() - begun
        own = [report for report in reports.backward if report.where == layer.where]
        if not own:
            return
        report = own[-1]
        left = report.residual_norm.reshape(-1) / report.scale.reshape(-1).clamp_min(1e-300)
        worst = int(left.nan_to_num(nan=math.inf).argmax())
        status = bilevel.Status(int(report.status_code.reshape(-1)[_worst(report)]))
        relative = float(left[worst])
        products = int(report.iterations.reshape(-1)[worst])
        self.linear = LinearSolve(report.solver, status.meaning, products, seconds, relative)
        named = self._has(Defect.SADDLE, Defect.SINGULAR, Defect.UNFIT_LINEAR_SOLVER, Defect.UNCONVERGED)
        if (not status.success or not relative <= _LEFT) and not named:
            text = f"{report.solver} {status.meaning} and leaves {relative:.1e} of the right-hand side"
            self._find(Defect.LINEAR_SOLVE, text)

    def _return_found(self) -> Callable[..., Any]:
        """Return an inner solver that knows the answers, in the order of the batch."""
        leaves = pytree.tree_leaves(self.subject.init)
        narrow = [row.to(leaf_dtype(leaves)) for row in self.narrow_rows]
        answers = iter([self.narrow.tree(row) for row in narrow])
        return lambda function, init, *args, **kwargs: next(answers)

    def _silent(self) -> bilevel.Tolerance:
        given = self._layer().tolerance
        return replace(given, delta=None)

    def _weights(self) -> list[torch.Tensor]:
        """Return the cotangents of the solution's leaves: the outer loss's slope, or random ones."""
        if self.subject.problem is None:
            return list(self.narrow.cotangents)
        leaves = pytree.tree_leaves(self.subject.init)
        rows = [row.detach().requires_grad_(True) for row in self.narrow_rows]
        with torch.enable_grad():
            slopes = _maybe(self.narrow.scalar(rows, self.narrow.points), rows)
        trees = [
            self.narrow.tree(torch.zeros_like(row) if slope is None else slope)
            for row, slope in zip(rows, slopes, strict=True)
        ]
        if self.subject.count is None:
            made = pytree.tree_leaves(trees[0])
        else:
            made = pytree.tree_leaves(pytree.tree_map(lambda *parts: torch.stack(parts), *trees))
        return [part.to(leaf.dtype) for part, leaf in zip(made, leaves, strict=True)]

    def _price(self) -> None:
        usable = self._usable()
        if not usable:
            return
        number = usable[0]
        x = self.narrow_rows[number]
        if not x.numel():
            return
        gradient = _timed(lambda: self.narrow.residual(number, x, self.narrow.points))
        point = x.detach().requires_grad_(True)
        with torch.enable_grad():
            residual = self.narrow.residual(number, point, self.narrow.points)
        ones = torch.ones_like(residual)

        def product() -> object:
            if not residual.requires_grad:
                return None
            return torch.autograd.grad(residual, point, ones, retain_graph=True, allow_unused=True)

        n = x.numel()
        kappa = self.curvature.condition if self.curvature is not None else math.inf
        steps = 0.5 * math.sqrt(kappa) * math.log(2e6) if kappa < 1e30 else math.inf
        self.cost = Cost(gradient, _timed(product), self.wide.count * n * n, int(min(n, math.ceil(min(steps, n)))))


def leaf_dtype(leaves: Sequence[torch.Tensor]) -> torch.dtype:
    """Return the widest dtype of ``leaves``."""
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def _coarsest(subject: Subject) -> torch.dtype:
    floating = [leaf for leaf in pytree.tree_leaves(subject.init) if isinstance(leaf, torch.Tensor)]
    return leaf_dtype(floating) if floating else torch.float64


def _maybe(output: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return gradients, None where no graph leads to."""
    if not output.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(output, list(inputs), allow_unused=True))


def _agree(first: Probe, second: Probe) -> bool:
    pairs = [(first.value, second.value)]
    if first.residual is not None and second.residual is not None:
        pairs.append((first.residual, second.residual))
    for a, b in pairs:
        scale = float(torch.maximum(a.abs(), b.abs()).nan_to_num().max()) if a.numel() else 0.0
        bound = torch.finfo(a.dtype).eps ** 0.5 * scale
        if a.numel() and not bool(((a - b).abs().nan_to_num() <= bound).all()):
            return False
    return True


def _worst(report: bilevel.SolveReport) -> int:
    """Return which problem fared worst: a failed one, with the largest residual for what was asked."""
    ratio = report.residual_norm.reshape(-1).nan_to_num(nan=math.inf) / report.threshold.reshape(-1).clamp_min(1e-300)
    failed = (~report.success).reshape(-1)
    return int(torch.where(failed, ratio.clamp(min=1.0) * 1e30, ratio).argmax())


def _timed(run: Callable[[], object]) -> float:
    run()
    begun = time.perf_counter()
    for _ in range(3):
        run()
    return (time.perf_counter() - begun) / 3


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
