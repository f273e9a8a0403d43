"""What each safety costs: the processor time of a call as it is, beside the same call without the safety.

A safety is switched off by replacing a private function of the library inside this script. No user can do that, and nobody should: the point is to
know the price. Each round times a call as it is and without one safety, in turn, and the table shows the median of what the safety adds, in parts of
the call without it. All problems are small, in float64: the prices are those of small operations. On large problems they vanish, except the
first check of a function (two gradients of one problem) and the checks of a solve (a few gradients or products).

Run ``python benchmarks/safety_costs.py --rounds 60``. The first row switches nothing off: it is the noise.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from hops import Ridge
from timing import rounds

import bilevel
import bilevel.layers.call as layer_call
import bilevel.layers.checks as layer_checks
import bilevel.linear._base as linear_base
import bilevel.problems.hypergradient as hypergradient
import bilevel.problems.problem as problems
import bilevel.solvers.judging.judge as inner_judge
import bilevel.solvers.newton as newton
from bilevel.solvers.judging.trials import Trial

F64 = torch.float64
ROUNDS = rounds(60)


# The safeties, each with what stands in its place.


def no_look(problem, x, *, captures):
    return x.new_zeros(()), torch.zeros_like(x[0])


def trusting(solver, problem, goal, meant=None):
    """Take the solver's word for the status, with no estimate of the error and no look for saddles and kinks."""
    found = inner_judge._with_residual(problem, solver.solve(problem, goal.init, goal))
    norm = inner_judge.length(found.residual)
    return Trial(
        found.x, found.status, found.iterations, found.residual, norm, goal.threshold, found.value, found.factor,
        settled=True,
    )  # fmt: skip


def unverified(solver, operator, rhs, product, target):
    """Take the factorisation's word for the adjoint."""
    x = solver.propose(operator, rhs)
    if x is None:
        return None, None
    norm = torch.linalg.vector_norm(rhs, dim=-1)
    done = torch.zeros(operator.batch, dtype=torch.int64)
    outcome = linear_base.LinearOutcome(
        x, done, done, torch.zeros_like(rhs), torch.zeros_like(norm), torch.zeros_like(norm), norm, linear_base.Basis.RESIDUAL, norm
    )  # fmt: skip
    return linear_base.LinearSolution(x, done, done, outcome.residual), outcome


def losses_alone(problem, inner, outer, data, on_failure):
    return problem.numbering.each(problem.outer_objective)(inner, outer, data)


@contextmanager
def kept_settings() -> Iterator[None]:
    """Make the settings of a problem's call once, so that later changes of a setting, and its warm start, do not count."""
    made: dict[int, Any] = {}
    plain = problems.BilevelProblem._settings_of

    def settings_of(self, *args, **kwargs):
        if id(self) not in made:
            made[id(self)] = plain(self, *args, **kwargs)
        return made[id(self)]

    with patch.object(problems.BilevelProblem, "_settings_of", settings_of):
        yield


@contextmanager
def patched(*places: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, instead in places:
            stack.enter_context(patch.object(owner, name, instead))
        yield


LAYERS, PROBLEMS = ("quadratic", "logistic"), ("hypergradient", "loss")
# Each safety with the calls that have it, and what switches it off.
SAFETIES: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
    "nothing: the noise of this table": (("first call", *LAYERS, *PROBLEMS), nullcontext),
    "the check of the function: random, captures, changes": (
        ("first call",), lambda: patched((layer_checks, "inspect_function", no_look)),
    ),
    "the watch for random numbers during a solve": (
        (*LAYERS, *PROBLEMS), lambda: patched((layer_call, "CheckAfter", lambda *a: nullcontext())),
    ),
    "the judge: error of x, saddles, kinks": (
        ("first call", *LAYERS, *PROBLEMS),
        lambda: patched(
            (inner_judge, "_attempt", trusting), (newton, "error_left", lambda state, lone: state.x),
            (newton, "is_slow", lambda state, error: state.definite),
        ),
    ),
    "  of these, the look for saddles and kinks": (
        ("first call", *LAYERS, *PROBLEMS),
        lambda: patched(
            (newton, "is_slow", lambda state, error: torch.zeros_like(state.definite)),
            (inner_judge, "doubtful_directions", lambda *a: []),
            (inner_judge, "name_stationary", lambda problem, solution, status, *a: status),
        ),
    ),
    "the check of the adjoint's residual": (
        (*LAYERS, *PROBLEMS), lambda: patched((linear_base, "_proposed", unverified)),
    ),
    "R in the derivative beside R in the call": (
        (*LAYERS, *PROBLEMS), lambda: patched((layer_call.SolveCall, "compare", lambda *a: None)),
    ),
    "the check of F: random, changes, captures, what leads to θ": (
        PROBLEMS,
        lambda: patched(
            (problems, "outer_losses", losses_alone), (hypergradient, "outer_losses", losses_alone),
            (hypergradient, "check_captures", lambda *a: False),
            (problems, "check_dependence", lambda *a: False),
        ),
    ),
    "the snapshot of a problem's settings": (PROBLEMS, kept_settings),
}  # fmt: skip


# The calls. A contestant is made anew for every safety, so that no replay is of another function.


def quadratic() -> Callable[[], None]:
    torch.manual_seed(0)
    M = torch.randn(5, 5, dtype=F64)
    A, start = M @ M.T + torch.eye(5, dtype=F64), torch.zeros(5, dtype=F64)
    layer = bilevel.argmin(lambda x, A, b: 0.5 * (x * (A @ x)).sum() - (b * x).sum())

    def run() -> None:
        b = torch.ones(5, dtype=F64, requires_grad=True)
        layer(start, A, b).sum().backward()

    return run


def logistic_layer() -> bilevel.Layer:
    return bilevel.argmin(lambda w, s, X, y: torch.nn.functional.softplus(-y * (X @ w)).sum() + s * (w**2).sum())


def logistic(*, first: bool = False) -> Callable[[], None]:
    torch.manual_seed(0)
    X, y = torch.randn(20, 4, dtype=F64), torch.randn(20, dtype=F64).sign()
    start, kept = torch.zeros(4, dtype=F64), logistic_layer()

    def run() -> None:
        s = torch.tensor(1.0, dtype=F64, requires_grad=True)
        layer = logistic_layer() if first else kept
        layer(start, s, X, y).backward(torch.ones(4, dtype=F64))

    return run


def ridge(*, loss: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    data = tuple(torch.randn(*shape, dtype=F64) for shape in ((10, 3), (10,), (10, 3), (10,)))
    problem, start, outer = Ridge(), torch.zeros(3, dtype=F64), torch.zeros((), dtype=F64)

    def run() -> None:
        if loss:
            problem(outer.clone().requires_grad_(True), data, init=start).backward()
        else:
            problem.hypergradient(outer, data, init=start)

    return run


CALLS: dict[str, Callable[[], Callable[[], None]]] = {
    "first call": lambda: logistic(first=True),
    "quadratic": quadratic,
    "logistic": logistic,
    "hypergradient": lambda: ridge(loss=False),
    "loss": lambda: ridge(loss=True),
}


def meta(**solvers: Any) -> Callable[[], None]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, dtype=F64)
    learner = bilevel.IMAML(model, torch.nn.functional.mse_loss, lam=2.0, **solvers)
    tasks = tuple(torch.randn(4, 5, width, dtype=F64) for width in (2, 1, 2, 1))
    return lambda: learner(tasks).backward()


def timed(run: Callable[[], None], repeat: int) -> float:
    begin = time.process_time()
    for _ in range(repeat):
        run()
    return time.process_time() - begin


def price(make: Callable[[], Callable[[], None]], without: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of a call, and what the safety adds to it, in parts of the call without it."""
    safe, bare, repeat = make(), make(), 2
    pairs = []
    for turn in range(-3, ROUNDS):
        one = timed(safe, repeat) if turn % 2 else None
        with without():
            other = timed(bare, repeat)
        one = timed(safe, repeat) if one is None else one
        if turn >= 0:
            pairs.append((one, other))
    return statistics.median(a for a, _ in pairs) / repeat, statistics.median(a / b - 1 for a, b in pairs)


def main() -> None:
    gc.disable()
    print(f"| what a safety adds | {' | '.join(CALLS)} |")
    print("|" + "---|" * (1 + len(CALLS)))
    whole: dict[str, float] = {}
    for name, (concerned, without) in SAFETIES.items():
        cells = []
        for call, make in CALLS.items():
            if call not in concerned:
                cells.append("")
                continue
            whole[call], added = price(make, without)
            cells.append(f"{added:+.2f}")
            gc.collect()
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"| the whole call | {' | '.join(f'{1e3 * seconds:.1f} ms' for seconds in whole.values())} |")
    fixed = {"solver": bilevel.GradientDescent(lr=0.1, max_steps=16), "linear_solver": bilevel.CG(max_steps=5)}
    runs = {"default": meta(), "fixed": meta(**fixed)}
    ratios = [timed(runs["default"], 2) / timed(runs["fixed"], 2) for _ in range(ROUNDS)]
    added = statistics.median(ratios[3:]) - 1
    print(f"\nIMAML, a linear model, 4 tasks: a line search and damping, beside the paper's fixed steps: {added:+.2f}")


if __name__ == "__main__":
    main()
