"""check_gradients passes what is right, for every kind of target, and fails what is wrong, by user or library."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bilevel
from bilevel.equations.linearization import Linearization
from bilevel.operators import FunctionOperator, JacobianOperator
from bilevel.testing import GradientCheck, Verdict, assert_gradients, check_gradients, diagnose

from .. import oracles

F64, F32 = torch.float64, torch.float32


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def ridge(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return ((X @ w - y) ** 2).sum() + (strength * w**2).sum()


def coupled(x: torch.Tensor, a: torch.Tensor, *, gain: torch.Tensor) -> torch.Tensor:
    skew = torch.triu(torch.ones(len(x), len(x), dtype=x.dtype), 1)
    return x + gain * torch.tanh((skew - 2 * skew.mT) @ x) - a


class Tuning(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        X, y = data
        return ((X @ inner["w"] + inner["b"] - y) ** 2).mean() + (outer["log"].exp() * inner["w"] ** 2).sum()

    def outer_objective(self, inner, outer, data):
        X, y = data
        return ((X @ inner["w"] + inner["b"] - 0.8 * y) ** 2).mean() + 0.01 * (outer["log"] ** 2).sum()


def failed(check: GradientCheck) -> set[tuple[str, str, str]]:
    return {(c.argument, c.derivative, c.reference) for c in check.comparisons if c.verdict is Verdict.FAILED}


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_layer_against_the_closed_form(dtype: torch.dtype) -> None:
    X, y, strength = draw(6, 3, dtype=dtype), draw(6, seed=1, dtype=dtype), torch.tensor(0.7, dtype=dtype)
    check = check_gradients(bilevel.argmin(ridge), (torch.zeros(3, dtype=dtype), X, y, strength), seed=3)
    assert check.passed and not failed(check), str(check)
    assert [c.argument for c in check.comparisons][::4] == ["X", "y", "strength"]
    # The references themselves, held to a closed form that none of them uses.
    leaves = [t.double().clone().requires_grad_(True) for t in (X, y, strength)]
    cotangent = torch.randn(3, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)
    exact = torch.autograd.grad(oracles.ridge(*leaves), leaves, cotangent.double())
    for method in ("dense", "unrolled"):
        for name, expected in zip(("X", "y", "strength"), exact, strict=True):
            torch.testing.assert_close(check.gradients[method][name], expected, atol=1e-10, rtol=1e-10)
    assert all(check.gradients["reverse"][name].dtype == dtype for name in ("X", "y", "strength"))


@pytest.mark.parametrize("dtype", [F64, F32])
def test_tolerances_are_derived_and_tight(dtype: torch.dtype) -> None:
    args = (
        torch.zeros(3, dtype=dtype),
        draw(6, 3, dtype=dtype),
        draw(6, seed=1, dtype=dtype),
        torch.tensor(0.7, dtype=dtype),
    )
    check = check_gradients(bilevel.argmin(ridge), args)
    for comparison in check.comparisons:
        assert comparison.held_to == comparison.allowance.total
        assert comparison.held_to <= (1e-2 if dtype == F32 else 1e-6) * comparison.size
        assert comparison.error <= comparison.held_to
    assert {c.allowance.largest for c in check.comparisons if c.reference == "differences"} == {
        "step" if dtype == F64 else "rounding"
    }


def test_a_root_with_keyword_arguments() -> None:
    layer = bilevel.root(coupled)
    check = check_gradients(layer, (torch.zeros(3, dtype=F64), draw(3)), {"gain": torch.tensor(0.4, dtype=F64)})
    assert check.passed, str(check)
    assert {c.argument for c in check.comparisons} == {"a", "gain"}
    assert "Newton" in check.notes[0]


def test_a_contraction_is_unrolled_by_its_own_iteration() -> None:
    layer = bilevel.fixed_point(lambda x, a: 0.5 * torch.cos(x) + a)
    check = check_gradients(layer, (torch.zeros(2, dtype=F64), draw(2)))
    assert check.passed and "steps of the mapping" in check.notes[0], str(check)


def test_pytrees_and_what_is_not_differentiated() -> None:
    def objective(x, settings, targets):
        assert settings["power"] == 2
        fit = (x["w"][targets["rows"]] - targets["values"]) ** settings["power"]
        return fit.sum() + settings["strength"] * (x["w"] ** 2).sum() + (x["b"] - x["w"].sum()) ** 2

    x = {"w": torch.zeros(3, dtype=F64), "b": torch.zeros((), dtype=F64)}
    settings = {"power": 2, "strength": torch.tensor(0.5, dtype=F64)}
    targets = {"rows": torch.tensor([0, 2]), "values": draw(2)}
    check = check_gradients(bilevel.argmin(objective), (x, settings, targets))
    assert check.passed, str(check)
    assert {c.argument for c in check.comparisons} == {"settings['strength']", "targets['values']"}
    # As with gradcheck, tensors that require grad are those meant, if there are any.
    settings["strength"].requires_grad_(True)
    chosen = check_gradients(bilevel.argmin(objective), (x, settings, targets))
    assert {c.argument for c in chosen.comparisons} == {"settings['strength']"}


def test_a_batch_of_calls() -> None:
    args = (torch.zeros(3, dtype=F64), draw(6, 2, 3), draw(6, seed=1), torch.tensor([0.3, 0.7], dtype=F64))
    check = check_gradients(bilevel.argmin(ridge), args, in_dims=(None, 1, None, 0))
    assert check.passed, str(check)
    starts = torch.zeros(2, 3, dtype=F64)
    assert_gradients(bilevel.argmin(ridge), (starts, *args[1:]), in_dims=(0, 1, None, 0))


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("batched", [False, True])
def test_a_bilevel_problem(batched: bool, dtype: torch.dtype) -> None:
    count = (2,) if batched else ()
    data = draw(*count, 8, 2, dtype=dtype), draw(8, seed=1, dtype=dtype)
    init = {"w": torch.zeros((*count, 2), dtype=dtype), "b": torch.zeros(count, dtype=dtype)}
    problem = Tuning(batch_dims=(0, None) if batched else None)
    outer = {"log": torch.tensor([-1.0, 0.5], dtype=dtype), "unused": 3}
    problem(outer, data, init=init)
    check = check_gradients(problem, (outer, data), init=init)
    assert check.passed, str(check)
    assert {c.argument for c in check.comparisons} == {"outer['log']"}


@pytest.mark.parametrize("learned", [False, True])
def test_applications_that_own_their_outer_variables(learned: bool) -> None:
    X, y = draw(8, 2), draw(8, seed=1)
    tuning = bilevel.HyperparameterOptimization(
        lambda w, log, data: ((data[0] @ w - data[1]) ** 2).sum() + (log.exp() * w**2).sum(),
        lambda w, data: ((data[0] @ w - 0.5 * data[1]) ** 2).mean(),
        torch.zeros(2, dtype=F64),
        torch.zeros(2, dtype=F64),
    )
    assert_gradients(tuning, ((X, y),))
    torch.manual_seed(0)
    learner = bilevel.IMAML(
        torch.nn.Linear(2, 1).double(), torch.nn.functional.mse_loss, 1.5, bilevel.Newton(), bilevel.CG(),
        bilevel.Tolerance(), learn_lam=learned,
    )  # fmt: skip
    batch = draw(2, 4, 2), draw(2, 4, 1, seed=1), draw(2, 4, 2, seed=2), draw(2, 4, 1, seed=3)
    check = check_gradients(learner, (batch,))
    assert check.passed, str(check)
    assert {c.argument for c in check.comparisons} >= {"outer['parameters']['weight']", "outer['lam']"}


def test_an_inexact_solve_is_told_from_a_wrong_rule() -> None:
    # Ten steps of descent: the derivative at that point is right, and how far it is from the exact one is accounted for.
    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2).sum() + 0.5 * ((x - a[0]) ** 4).sum(),
        solver=bilevel.GradientDescent(0.05, 10),
        tolerance=bilevel.Tolerance(delta=None),
    )
    check = check_gradients(layer, (torch.zeros(2, dtype=F64), draw(2)))
    assert not failed(check), str(check)
    dense = next(c for c in check.comparisons if c.reference == "dense")
    unrolled = next(c for c in check.comparisons if c.reference == "unrolled")
    assert dense.allowance.inner == 0 and dense.error < 1e-12
    assert unrolled.allowance.largest == "inner" and unrolled.error > 1e-9
    assert check.solution_error > 1e-9


def test_what_proves_nothing_does_not_pass() -> None:
    layer = bilevel.argmin(
        ridge, linear_solver=bilevel.Neumann(1), tolerance=bilevel.Tolerance(delta_prime=None), on_failure="ignore"
    )
    check = check_gradients(layer, (torch.zeros(3, dtype=F64), draw(6, 3), draw(6), torch.tensor(0.7, dtype=F64)))
    assert not check.passed
    assert Verdict.INCONCLUSIVE in {c.verdict for c in check.comparisons}
    assert "prove nothing" in str(check)


def test_the_callers_own_tolerance() -> None:
    layer = bilevel.argmin(
        ridge, linear_solver=lambda operator, rhs: 1.01 * torch.linalg.solve(operator.dense(), rhs), on_failure="ignore"
    )
    args = (torch.zeros(3, dtype=F64), draw(6, 3), draw(6), torch.tensor(0.7, dtype=F64))
    assert check_gradients(layer, args, rtol=0.02).passed
    check = check_gradients(layer, args, rtol=0.005)
    assert len(failed(check)) == len(check.comparisons)
    with pytest.raises(AssertionError, match=r"(?s)argument +derivative.*WRONG"):
        assert_gradients(layer, args, rtol=0.005)


def test_a_layer_inside_the_objective() -> None:
    inside = bilevel.argmin(lambda u, x: ((u - x.sin()) ** 2).sum() + (u**4).sum())
    start = torch.zeros(2, dtype=F64)
    outside = bilevel.argmin(lambda x, a: ((inside(start, x) - a) ** 2).sum() + 0.5 * (x**2).sum())
    assert_gradients(outside, (start, draw(2)))


def test_empty_and_scalar_arguments() -> None:
    layer = bilevel.argmin(lambda x, a, none: ((x - a) ** 2).sum() + none.sum())
    check = check_gradients(
        layer, (torch.zeros((), dtype=F64), torch.tensor(2.0, dtype=F64), torch.zeros(0, 2, dtype=F64))
    )
    assert check.passed, str(check)
    nothing = check_gradients(
        layer, (torch.zeros(0, dtype=F64), torch.tensor(2.0, dtype=F64), torch.zeros(1, dtype=F64))
    )
    assert nothing.passed, str(nothing)


def test_an_argument_that_is_not_used_has_the_gradient_zero() -> None:
    layer = bilevel.argmin(lambda x, a, unused: ((x - a) ** 2).sum())
    check = check_gradients(layer, (torch.zeros(2, dtype=F64), draw(2), draw(3)))
    assert check.passed, str(check)
    assert bool((check.gradients["reverse"]["unused"] == 0).all())


def test_a_function_that_takes_no_float64_is_checked_in_its_own_dtype() -> None:
    weights = draw(3, 3, dtype=F32)
    layer = bilevel.argmin(lambda x, a: ((weights @ x - a) ** 2).sum() + (x**2).sum())
    check = check_gradients(layer, (torch.zeros(3, dtype=F32), draw(3, dtype=F32)))
    assert check.dtypes == ("float32", "float32") and "no float64" in check.notes[-1]
    assert not failed(check), str(check)


# Faults of the user's and of the library's: each is found.


def test_a_detached_argument_is_found_by_differences() -> None:
    layer = bilevel.argmin(lambda x, a, b: ((x - a.detach() * b) ** 2).sum())
    check = check_gradients(layer, (torch.zeros(2, dtype=F64), draw(2), draw(2, seed=1)))
    assert failed(check) == {("a", "reverse", "differences")}


def scaled_pullback(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Linearization.pullback
    monkeypatch.setattr(
        Linearization, "pullback", lambda self, q: [None if g is None else 1.005 * g for g in original(self, q)]
    )


def dropped_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (JacobianOperator, FunctionOperator):
        monkeypatch.setattr(kind, "T", property(lambda self: self))


def wrong_sign_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel import implicit

    original = implicit._push
    monkeypatch.setattr(implicit, "_push", lambda *args: -original(*args))


def lost_batch_member(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Linearization.pullback
    monkeypatch.setattr(Linearization, "pullback", lambda self, q: original(self, torch.cat([q[:-1], 0 * q[-1:]])))


@pytest.mark.parametrize(
    ("fault", "derivative"),
    [
        (scaled_pullback, "reverse"), (dropped_transpose, "reverse"), (wrong_sign_forward, "forward"),
        (lost_batch_member, "reverse"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [F64, F32])
def test_faults_of_the_rule_are_found(
    fault: Callable[[pytest.MonkeyPatch], None], derivative: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = bilevel.root(lambda x, a, gain: coupled(x, a, gain=gain), linear_solver=bilevel.GMRES())
    args: tuple[Any, ...] = (
        torch.zeros(3, dtype=dtype), draw(2, 3, dtype=dtype), torch.tensor(0.4, dtype=dtype)
    )  # fmt: skip
    assert check_gradients(layer, args, in_dims=(None, 0, None)).passed
    fault(monkeypatch)
    check = check_gradients(layer, args, in_dims=(None, 0, None))
    assert {d for _, d, _ in failed(check)} == {derivative}, str(check)


# What is refused.


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("a layer or a bilevel problem", lambda: check_gradients(ridge, (draw(3),))),
        (r"pass args=\(init, \*args\)", lambda: check_gradients(bilevel.argmin(ridge), ())),
        (r"pass \(outer, data\)", lambda: check_gradients(Tuning(), (draw(3),))),
        ("init to be given", lambda: check_gradients(Tuning(), ({"log": draw(2)}, (draw(8, 2), draw(8))))),
        ("batch_dims", lambda: check_gradients(Tuning(), ({}, ()), in_dims=0)),
        ("rtol > 0", lambda: check_gradients(bilevel.argmin(ridge), (draw(3), draw(6, 3), draw(6), draw(3)), rtol=-1.0)),
        ("0 < step < 1", lambda: check_gradients(bilevel.argmin(ridge), (draw(3), draw(6, 3), draw(6), draw(3)), step=2.0)),
        ("one for each of the 2 args", lambda: check_gradients(bilevel.argmin(ridge), (draw(3), draw(6)), in_dims=(0,))),
        ("to have one length", lambda: check_gradients(bilevel.argmin(ridge), (draw(2), draw(3)), in_dims=(0, 0))),
        ("got none", lambda: check_gradients(bilevel.argmin(lambda x: (x**2).sum()), (draw(2),))),
        ("at most 512 unknowns", lambda: check_gradients(bilevel.argmin(lambda x, a: ((x - a) ** 2).sum()), (torch.zeros(600), torch.ones(())))),
    ],
)  # fmt: skip
def test_misuse_names_the_remedy(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(bilevel.ArgumentError, match=message):
        call()


def test_failed_solves_raise_as_they_do_in_a_call() -> None:
    layer = bilevel.argmin(lambda x, a: -((x - a) ** 2).sum())
    with pytest.raises(bilevel.SolveError):
        check_gradients(layer, (torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)))


def test_checks_need_no_hypothesis_and_strategies_come_when_asked() -> None:
    code = (
        "import sys, bilevel\n"
        "sys.modules['hypothesis'] = None\n"
        "bilevel.testing.check_gradients, bilevel.testing.diagnose\n"
        "try:\n    bilevel.testing.strategies\n"
        "except ImportError:\n    print('refused')\n"
        "del sys.modules['hypothesis']\n"
        "print(callable(bilevel.testing.strategies.problems))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "True"]


class Attentive(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("kind", ["weight norm", "attention"])
def test_what_torch_differentiates_once_only_does_not_accuse_a_layer(kind):
    """References that took torch's own second derivatives would be wrong, or none."""
    torch.manual_seed(0)
    module = Attentive() if kind == "attention" else torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 1))
    module, X = module.double(), torch.randn(2, 3, 2, dtype=torch.float64)
    init = {name: p.detach() for name, p in module.named_parameters()}

    class Problem(bilevel.BilevelProblem):
        def inner_objective(self, inner, outer, data):
            misfit = torch.func.functional_call(module, inner, (X,)) - 1
            return misfit.square().mean() + outer * (bilevel.ravel(inner) - 0.5).square().sum()

        def outer_objective(self, inner, outer, data):
            return torch.func.functional_call(module, inner, (X,)).square().mean()

    outer = torch.tensor(1.0, dtype=torch.float64)
    check = check_gradients(Problem(), (outer, None), init=init)
    assert check.passed, str(check)
    assert diagnose(Problem(), outer, None, init=init).healthy


@pytest.mark.parametrize(
    "settings", [{"prox": bilevel.prox.L1(0.5)}, {"lower": 0.0}, {"equality": lambda x, a: x.sum() - 1}]
)
def test_structure_that_the_references_do_not_know_is_refused(settings: dict[str, Any]) -> None:
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), **settings)
    init, a = draw(3), draw(3, seed=1)
    with pytest.raises(bilevel.ArgumentError, match="without proximal terms, bounds or constraints"):
        check_gradients(layer, (init, a))
    assert torch.autograd.gradcheck(lambda a: layer(init, a), a.requires_grad_())  # the remedy
