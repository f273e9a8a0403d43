"""What importing the package and the first calls of a process bring in: each costs time that every program pays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import bilevel

BEGIN = """
import sys, torch
before = set(sys.modules)
import bilevel

def brought(*names):
    new = set(sys.modules) - before
    return sorted(name for name in names if any(module == name or module.startswith(name + ".") for module in new))

HEAVY = "scipy", "sympy", "torch._dynamo", "sklearn", "matplotlib"
LATER = "bilevel.testing", "bilevel.meta", "bilevel.hyperopt", "bilevel.stochastic", "bilevel.cleaning", "bilevel.learnable"
start, a = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])

def objective(x, a):
    return ((x - a) ** 2).sum() + (x**4).sum()
"""
CALLS = {
    "the import": "",
    "argmin, again and again": """
layer = bilevel.argmin(objective)
for _ in range(4):
    layer(start, a.clone().requires_grad_()).sum().backward()
""",
    "argmin without a factorisation": """
layer = bilevel.argmin(objective, solver=bilevel.LBFGS(), linear_solver=bilevel.CG())
for _ in range(4):
    layer(start, a.clone().requires_grad_()).sum().backward()
""",
    "a second derivative": """
b = a.clone().requires_grad_()
(slope,) = torch.autograd.grad(bilevel.argmin(objective)(start, b).sum(), b, create_graph=True)
slope.square().sum().backward()
""",
    "a batch": "torch.vmap(bilevel.argmin(objective))(start.expand(2, 3), a.expand(2, 3).clone().requires_grad_()).sum().backward()",
    "equations": """
bilevel.root(lambda x, a: x**3 + x - a)(start, a.clone().requires_grad_()).sum().backward()
bilevel.fixed_point(lambda x, a: x.cos() * a / 4)(start, a.clone().requires_grad_()).sum().backward()
bilevel.linear_solve(lambda x, a: a * x)(a, a.clone().requires_grad_()).sum().backward()
""",
    "a hypergradient": """
class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        return objective(inner, outer)

    def outer_objective(self, inner, outer, data):
        return ((inner - data) ** 2).sum()

problem = Ridge()
for _ in range(3):
    problem.hypergradient(a, a + 1, init=start)
    problem(a.clone().requires_grad_(), a + 1, init=start).backward()
""",
}


def run(code: str) -> str:
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_neither_scipy_nor_torch_s_compiler_comes_with() -> None:
    # One process for all: what a call brings stays, and the first call that is named has brought it.
    every = [f"{calls}\nprint({name!r}, brought(*HEAVY, *LATER))" for name, calls in CALLS.items()]
    assert run("\n".join([BEGIN, *every])).splitlines() == [f"{name} []" for name in CALLS]


def test_scipy_comes_with_its_solvers_and_not_with_their_first_solve() -> None:
    for solver in ("ScipyMinimize('BFGS')", "ScipyRoot()"):
        assert run(f"{BEGIN}\nbilevel.{solver}\nprint(brought('scipy.optimize'))") == "['scipy.optimize']"


def test_applications_are_there_when_they_are_asked_for() -> None:
    assert run("from bilevel import testing, IMAML, HyperparameterOptimization as H; print(IMAML.__name__, H.__name__)")
    assert run("import bilevel; print(bilevel.testing.__name__, bilevel.IMAML.__name__)") == "bilevel.testing IMAML"
    assert run("from bilevel import *; print(IMAML.__name__, testing.__name__)") == "IMAML bilevel.testing"
    assert set(bilevel.__all__) <= set(dir(bilevel))
    with pytest.raises(AttributeError, match="has no attribute 'argmim'"):
        bilevel.argmim  # noqa: B018
