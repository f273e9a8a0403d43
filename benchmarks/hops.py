"""How many files of the library a call visits, and how often it goes from one to another.

A hop is a call of a function in another file of the package, or the return from one. Few files and few hops make a call easy to follow. Run
``python benchmarks/hops.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import bilevel

PACKAGE = os.path.dirname(bilevel.__file__) + os.sep
F64 = torch.float64


def hops(call: Callable[[], object]) -> tuple[int, int]:
    """Return the files of the package that ``call`` visits, and the changes from one to another."""
    visited: list[str] = []

    def watch(frame: Any, event: str, arg: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE) and (not visited or visited[-1] != name):
            visited.append(name)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(set(visited)), max(0, len(visited) - 1)


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        X, y, _, _ = data
        return ((X @ inner - y) ** 2).sum() + outer.exp() * (inner**2).sum()

    def outer_objective(self, inner, outer, data):
        _, _, X, y = data
        return ((X @ inner - y) ** 2).mean()


def layer_calls() -> tuple[Callable[[], object], Callable[[], object]]:
    layer = bilevel.argmin(lambda w, X, y, s: ((X @ w - y) ** 2).sum() + s * (w**2).sum())
    X, y, s = (
        torch.randn(10, 3, dtype=F64),
        torch.randn(10, dtype=F64),
        torch.tensor(1.0, dtype=F64, requires_grad=True),
    )
    start = torch.zeros(3, dtype=F64)
    for _ in range(4):
        layer(start, X, y, s).sum().backward()
    made = layer(start, X, y, s).sum()
    return lambda: layer(start, X, y, s), made.backward


def problem_calls() -> dict[str, Callable[[], object]]:
    data = tuple(torch.randn(*shape, dtype=F64) for shape in ((10, 3), (10,), (10, 3), (10,)))
    outer, start = torch.tensor(0.0, dtype=F64), torch.zeros(3, dtype=F64)
    goals = [bilevel.Tolerance(hypergradient=1e-6, estimates=flag) for flag in (True, True, False)]
    plain, again, first, proven = Ridge(), *(Ridge(tolerance=goal) for goal in goals)
    for _ in range(4):
        plain.hypergradient(outer, data, init=start)
        again.hypergradient(outer, data, init=start)
    return {
        "hypergradient(), again": lambda: plain.hypergradient(outer, data, init=start),
        "  with an estimated goal, again": lambda: again.hypergradient(outer, data, init=start),
        "  with an estimated goal, first call": lambda: first.hypergradient(outer, data, init=start),
        "  with a proven goal, first call": lambda: proven.hypergradient(outer, data, init=start),
    }


def meta_call() -> Callable[[], object]:
    model = torch.nn.Linear(2, 1, dtype=F64)
    learner = bilevel.IMAML(model, torch.nn.functional.mse_loss, lam=2.0)
    tasks = tuple(torch.randn(4, 5, width, dtype=F64) for width in (2, 1, 2, 1))
    for _ in range(4):
        learner(tasks).backward()
    return lambda: learner(tasks).backward()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    call, backward = layer_calls()
    ways = {
        "a layer's call, warm": call,
        "its backward": backward,
        **problem_calls(),
        "IMAML, a step": meta_call(),
    }
    print(f"{'':42s}{'files':>6s}{'hops':>6s}")
    for name, way in ways.items():
        files, changes = hops(way)
        print(f"{name:42s}{files:6d}{changes:6d}")


if __name__ == "__main__":
    main()
