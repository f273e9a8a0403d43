"""What an asked accuracy of the hypergradient costs: beside a fixed tight solve, and beside the cheapest pair (δ, δ′) there is.

For each problem and inner solver, ``Tolerance(hypergradient=t, relative=True, estimates=True)`` is asked for t = 1e-1 … 1e-8. The true error
comes from a dense solve. The cheapest pair is found by exhaustive search over δ and δ′, four to a decade, with the true error known
to the search, which nobody has who wants a hypergradient. Where θ is one number, an error can change sign on the way and pass
through zero at some pair by luck, so that the search also asks that every tighter pair be as good ("lasting").

Work is counted in reverse passes, all of them: gradients, Hessian products, cross products, slopes of F, and the passes that look for
misuse. ``--certified`` lets the certificate decide instead of the estimate; the matrices that it forms are counted as the
products that would form them.

``--seconds`` compares processor time instead: a goal, with the default solvers, beside the default's full accuracy, on small and large
problems, in the first call of a problem and in later calls. Calls with and without a goal alternate.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.func import grad, hessian

import bilevel

F64 = torch.float64
ASKED = [10.0**-k for k in range(1, 9)]


class Quadratic(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        A, b, C, _ = data
        return 0.5 * (inner * (A @ inner)).sum() - ((b + C @ outer) * inner).sum()

    def outer_objective(self, inner, outer, data):
        return 0.5 * ((inner - data[3]) ** 2).sum()


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return 0.5 * ((X @ inner - y) ** 2).mean() + 0.5 * (outer.exp() * inner**2).sum()

    def outer_objective(self, inner, outer, data):
        _, _, X, y = data
        return ((X @ inner - y) ** 2).mean()


class Logistic(Ridge):
    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return torch.nn.functional.softplus(-y * (X @ inner)).mean() + 0.5 * (outer.exp() * inner**2).sum()

    def outer_objective(self, inner, outer, data):
        _, _, X, y = data
        return torch.nn.functional.softplus(-y * (X @ inner)).mean()


@dataclass
class Case:
    name: str
    kind: type[bilevel.BilevelProblem]
    outer: torch.Tensor
    data: tuple[torch.Tensor, ...]
    mu: float
    smoothness: float

    @property
    def start(self) -> torch.Tensor:
        return torch.zeros(self.data[0].shape[-1], dtype=F64)

    def solvers(self) -> dict[str, bilevel.InnerSolver]:
        found: dict[str, bilevel.InnerSolver] = {"L-BFGS": bilevel.LBFGS(20_000)}
        if self.smoothness / self.mu <= 2e3:
            found["descent"] = bilevel.GradientDescent(1 / self.smoothness, 400_000)
        return found

    def truth(self) -> torch.Tensor:
        problem, x = self.kind(), self.start
        for _ in range(60):
            step = torch.linalg.solve(
                self._hessian(problem, x), grad(problem.inner_objective)(x, self.outer, self.data)
            )
            x = x - step
        v = grad(problem.outer_objective)(x, self.outer, self.data)
        q = torch.linalg.solve(self._hessian(problem, x), v)

        def pairing(outer):
            return torch.dot(q, grad(problem.inner_objective)(x, outer, self.data))

        return -grad(pairing)(self.outer)

    def _hessian(self, problem, x):
        return hessian(problem.inner_objective)(x, self.outer, self.data)


def quadratic(kappa: float, n: int = 40, p: int = 5) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    basis = torch.linalg.qr(normal(n, n))[0]
    A = (basis * (torch.logspace(0, math.log10(kappa), n, dtype=F64) / kappa)) @ basis.T
    A, phi, C, theta = 0.5 * (A + A.T), normal(n), normal(n, p) / n**0.5, normal(p)
    return Case(f"quadratic, κ = {kappa:.0e}", Quadratic, theta, (A, A @ phi - C @ theta, C, normal(n)), 1 / kappa, 1.0)


def regression(
    name: str, kind: type[Ridge], strength: float, *, shared: bool = False, n: int = 30, m: int = 200
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    scale = torch.logspace(0, -1, n, dtype=F64)
    X, Xv, w = normal(m, n) * scale, normal(m, n) * scale, normal(n)
    y, yv = X @ w + 0.5 * normal(m), Xv @ w + 0.5 * normal(m)
    if kind is Logistic:
        y, yv = y.sign(), yv.sign()
    theta = math.log(strength) + (torch.zeros((), dtype=F64) if shared else 0.5 * normal(n))
    curvature = float(torch.linalg.matrix_norm(X, 2) ** 2) / m * (0.25 if kind is Logistic else 1)
    strengths = theta.exp()
    return Case(name, kind, theta, (X, y, Xv, yv), float(strengths.min()), curvature + float(strengths.max()))


def cases() -> list[Case]:
    return [
        quadratic(1e2),
        quadratic(1e4),
        regression("ridge, per feature", Ridge, 1e-2),
        regression("ridge, per feature, weak", Ridge, 1e-3),
        regression("logistic, per feature", Logistic, 1e-2),
        regression("logistic, per feature, weak", Logistic, 1e-3),
        regression("ridge, one strength", Ridge, 1e-2, shared=True),
    ]


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count reverse passes, and the rows of matrices formed by vmap."""
    from bilevel._torch import reverse
    from bilevel.certificates._second_derivatives import SecondDerivatives
    from bilevel.equations.problem import Problem

    plain, engine = torch.autograd.grad, reverse._engine_run_backward
    dense, cross = Problem._dense, SecondDerivatives._cross_by_vmap
    count = [0]

    def counted(function):
        def one(*args, **kwargs):
            count[0] += 1
            return function(*args, **kwargs)

        return one

    def rows(self, x):
        count[0] += self.size
        return dense(self, x)

    def cross_rows(self, *args):
        count[0] += self.lower.size
        return cross(self, *args)

    torch.autograd.grad, reverse._engine_run_backward = counted(plain), counted(engine)
    Problem._dense, SecondDerivatives._cross_by_vmap = rows, cross_rows
    try:
        yield count
    finally:
        torch.autograd.grad, reverse._engine_run_backward = plain, engine
        Problem._dense, SecondDerivatives._cross_by_vmap = dense, cross


def spent(case: Case, solver: bilevel.InnerSolver, tolerance: bilevel.Tolerance, start=None):
    problem = case.kind(solver=solver, linear_solver=bilevel.CG(), tolerance=tolerance)
    with counting() as count:
        result = problem.hypergradient(case.outer, case.data, init=case.start if start is None else start)
    return count[0], result


def search(
    case: Case, solver: bilevel.InnerSolver, truth: torch.Tensor, per_decade: int = 4
) -> list[tuple[int, int, int, float]]:
    """Return (passes, number of δ, number of δ′, relative error) of every pair; each δ is solved for once."""
    rows = []
    for i in range(12 * per_decade):
        delta = 10 ** (0.5 - i / per_decade)
        problem = case.kind(solver=solver, linear_solver=bilevel.CG(), tolerance=bilevel.Tolerance(delta, 0.5))
        with counting() as whole:
            first = problem.hypergradient(case.outer, case.data, init=case.start)
        # From the solution for this δ the inner solve takes no step: what is spent is the linear solve and what is always spent.
        inner = None
        for j in range(12 * per_decade):
            prime = 10 ** (0.5 - j / per_decade)
            passes, result = spent(case, solver, bilevel.Tolerance(delta, prime), first.inner)
            if inner is None:
                before, _ = spent(case, solver, bilevel.Tolerance(delta, 0.5), first.inner)
                inner = whole[0] - before
            error = float((result.grad - truth).norm() / truth.norm())
            rows.append((inner + passes, i, j, error))
            if prime < 1e-12 * max(1.0, float(result.adjoint.norm())):
                break
        if all(row[3] < 1e-9 for row in rows[-3:]) and rows[-1][3] < 1e-9:
            break
    return rows


def cheapest(rows: list[tuple[int, int, int, float]], asked: float, *, lasting: bool) -> float:
    good = [row for row in rows if row[3] <= asked]
    if lasting:
        good = [a for a in good if all(b[3] <= asked for b in rows if b[1] >= a[1] and b[2] >= a[2])]
    return min((row[0] for row in good), default=math.nan)


def timed(problem: Ridge, case: Case) -> float:
    begun = time.process_time()
    problem.hypergradient(case.outer, case.data, init=case.start)
    return time.process_time() - begun


def compared(case: Case, tolerance: bilevel.Tolerance, count: int, *, first: bool) -> tuple[float, float]:
    """Return the milliseconds of full accuracy, and the median ratio of a goal's time to it, in calls by the default solvers."""
    problems: list[Ridge] = []
    for _ in range(4 + count if first else 1):
        problems += [case.kind(), case.kind(tolerance=tolerance)]
    pairs = [(timed(problems[0], case), timed(problems[1], case)) for _ in range(0 if first else 4 + count)]
    if first:
        pairs = [
            (timed(plain, case), timed(goal, case)) for plain, goal in zip(problems[::2], problems[1::2], strict=True)
        ]
    pairs = pairs[4:]
    return 1e3 * statistics.median(full for full, _ in pairs), statistics.median(goal / full for full, goal in pairs)


def seconds(report: Callable[[str], None] = print) -> None:
    """Print what goals cost beside full accuracy."""
    asked = (1e-1, 1e-3, 1e-6)
    report("| problem | n | calls | full accuracy | " + " | ".join(f"goal {t:.0e}" for t in asked) + " |")
    report("|" + "---|" * (4 + len(asked)))
    small = [case for case in cases() if "weak" not in case.name]
    large = [regression(f"{kind.__name__.lower()}, large", kind, 1e-2, n=800, m=1000) for kind in (Ridge, Logistic)]
    for case in small + large:
        for first in (True, False):
            count = 20 if case in small else 3
            goals = (bilevel.Tolerance(hypergradient=t, relative=True, estimates=True) for t in asked)
            found = [compared(case, goal, count, first=first) for goal in goals]
            name = "first" if first else "later"
            cells = " | ".join(f"{ratio:.2f}" for _, ratio in found)
            report(f"| {case.name} | {len(case.start)} | {name} | {found[0][0]:.1f} ms | {cells} |")


def main(report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--certified", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.seconds:
        seconds(report)
        return
    ratios, lasting_ratios, halves, missed = [], [], [], 0
    for case in cases():
        if options.only not in case.name:
            continue
        truth = case.truth()
        for name, solver in case.solvers().items():
            fixed, tight = spent(case, solver, bilevel.Tolerance(1e-10, 1e-10))
            off = float((tight.grad - truth).norm() / truth.norm())
            rows = search(case, solver, truth)
            report(f"\n{case.name}, {name} and CG: a fixed 1e-10 solve takes {fixed} passes, relative error {off:.0e}")
            report(
                f"  {'asked':>7s} {'error':>9s} {'passes':>7s} {'of fixed':>9s} {'cheapest pair':>14s} {'ratio':>6s} {'lasting':>8s} {'ratio':>6s}"
            )
            for asked in ASKED:
                goal = bilevel.Tolerance(
                    hypergradient=asked, relative=True, estimates=not options.certified,
                    strong_convexity=case.mu if options.certified else None,
                )  # fmt: skip
                try:
                    passes, result = spent(case, solver, goal)
                except bilevel.BilevelError as error:
                    report(f"  {asked:7.0e} {error}")
                    continue
                missed_by = float((result.grad - truth).norm() / truth.norm())
                best, kept = (cheapest(rows, asked, lasting=flag) for flag in (False, True))
                missed += missed_by > asked
                ratios.append(passes / best)
                lasting_ratios.append(passes / kept)
                if asked == 1e-3:
                    halves.append(passes / fixed)
                report(
                    f"  {asked:7.0e} {missed_by:9.1e} {passes:7d} {passes / fixed:9.2f} {best:14.0f} {passes / best:6.2f} "
                    f"{kept:8.0f} {passes / kept:6.2f}{'   MISSED' if missed_by > asked else ''}"
                )  # fmt: skip
    for name, found in (("cheapest pair", ratios), ("cheapest lasting pair", lasting_ratios)):
        known = [ratio for ratio in found if math.isfinite(ratio)]
        over = sum(ratio > 1.3 for ratio in known)
        report(
            f"\nto the {name}: median {statistics.median(known):.2f}, worst {max(known):.2f}, above 1.3 in {over} of {len(known)}"
        )
    report(f"at 1e-3, of a fixed 1e-10 solve: {', '.join(f'{half:.2f}' for half in halves)}")
    report(f"goals missed: {missed} of {len(ratios)}")


if __name__ == "__main__":
    main()
