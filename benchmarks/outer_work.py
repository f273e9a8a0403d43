"""How much inner work tuning takes until the outer gradient is small, for fixed, scheduled and adaptive accuracies.

Breast cancer and digits, five folds as one batch, log-strengths tuned by the same steps (HOAG's adaptive step size, or
MAID's line search) from the same start. Work is counted in reverse passes (gradients and products, of the five folds together) up to
the first point at which the *true* ‖g‖, computed apart by factorisation, is at or below the target. The norm that a loop itself
sees says little when it is solved loosely.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

import bilevel
from bilevel.hyperopt.data import load_bundled
from bilevel.hyperopt.linear_models import FOLD_DIMS
from bilevel.hyperopt.splits import model_for, split

POLICIES = {
    "fixed 1e-10": (bilevel.HOAG(), bilevel.Tolerance(1e-10, 1e-10)),
    "fixed 1e-8": (bilevel.HOAG(), bilevel.Tolerance(1e-8, 1e-8)),
    "fixed 1e-6": (bilevel.HOAG(), bilevel.Tolerance(1e-6, 1e-6)),
    "HOAG's exponential": (bilevel.HOAG(), bilevel.ExponentialSchedule()),
    "HOAG's quadratic": (bilevel.HOAG(), bilevel.QuadraticSchedule()),
    "HOAG's cubic": (bilevel.HOAG(), bilevel.CubicSchedule()),
    "descent, HOAG": (bilevel.HOAG(), bilevel.Tolerance(descent=0.5, estimates=True)),
    "descent, MAID": (bilevel.MAID(), bilevel.Tolerance(descent=0.5, estimates=True)),
}


def set_up(name: str, shared: bool, begin: float, solver, linear_solver):
    dataset = load_bundled(name)
    splits = split(dataset)
    model = model_for(dataset)
    theta = torch.full(() if shared else (model.features,), begin, dtype=torch.float64)
    problem = bilevel.HyperparameterOptimization(
        model.training_objective, model.validation_loss, theta, model.initial(5), batch_dims=FOLD_DIMS,
        solver=solver, linear_solver=linear_solver,
    )  # fmt: skip
    return problem, theta, splits.cross_validation()


def work(name: str, shared: bool, begin: float, method, tolerance, target: float, max_steps: int) -> tuple[int, str]:
    problem, theta, data = set_up(name, shared, begin, bilevel.LBFGS(20_000), bilevel.CG())
    judge, _, _ = set_up(name, shared, begin, bilevel.Newton(), bilevel.Exact())
    judge.tolerance = bilevel.Tolerance(1e-11, 1e-9)
    if isinstance(tolerance, bilevel.Tolerance) and tolerance.has_goal:
        # As minimize itself would with gradient_tolerance=target, which would end loose schedules before the true norm is there.
        tolerance = replace(tolerance, stationary=target)
    plain, count, seen, counted = torch.autograd.grad, [0], [], [True]

    def one(*args, **kwargs):
        count[0] += counted[0]
        return plain(*args, **kwargs)

    def look(run: bilevel.OuterRun) -> bool:
        counted[0] = False
        true = bilevel.BilevelProblem.hypergradient(judge, run.outer, data).grad
        counted[0] = True
        seen.append((float(true.norm()), float((true - run.gradient).norm())))
        return seen[-1][0] <= target

    torch.autograd.grad, began = one, time.perf_counter()
    try:
        result = bilevel.minimize(
            problem, theta, data, optimizer=method, tolerance=tolerance, max_steps=max_steps, callback=look,
            on_failure="stop",
        )  # fmt: skip
    finally:
        torch.autograd.grad = plain
    reached = result.status is bilevel.OuterStatus.STOPPED
    last = result.history[-1]
    return count[0], (
        f"{last.number - 1:6d} {last.evaluations:6d} {seen[-1][0]:9.1e} {result.value:10.6f} "
        f"{time.perf_counter() - began:7.1f}  {'reached' if reached else 'NOT REACHED: ' + result.status.name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="*", default=["breast_cancer", "digits"])
    parser.add_argument("--penalty", nargs="*", default=["shared", "feature"], choices=["shared", "feature"])
    parser.add_argument("--target", type=float, default=None, help="the norm to reach")
    parser.add_argument("--begin", type=float, default=-3.0, help="the log-strengths to begin from")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets = {("breast_cancer", "feature"): 3e-4, ("digits", "feature"): 3e-3}
    for name in options.data:
        for penalty in options.penalty:
            target = options.target or targets.get((name, penalty), 1e-4)
            print(f"\n{name}, penalty {penalty}, from {options.begin:g}: until ‖g‖ ≤ {target:g}", flush=True)
            print(
                f"  {'':20s} {'passes':>8s} {'share':>6s} {'steps':>6s} {'tried':>6s} {'true ‖g‖':>9s} {'value':>10s} {'seconds':>7s}"
            )
            first = 0  # the shares are of what the policy named first takes
            for policy in options.policies:
                method, tolerance = POLICIES[policy]
                passes, found = work(
                    name, penalty == "shared", options.begin, method, tolerance, target, options.max_steps
                )  # fmt: skip
                first = first or passes
                print(f"  {policy:20s} {passes:8d} {passes / first:6.2f} {found}", flush=True)


if __name__ == "__main__":
    main()
