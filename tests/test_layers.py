"""Layers: what goes in and out, defaults, users' own solvers, compilation, modes."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.func import functional_call, hessian, jacrev, vmap

import bilevel
from bilevel.linear.defaults import default_linear_solver
from bilevel.operators import HessianOperator
from bilevel.solvers.defaults import default_solvers

F64 = torch.float64


def quadratic(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


def test_decorator_with_and_without_arguments_keeps_the_name() -> None:
    @bilevel.argmin
    def plain(x, a):
        """Say what it is."""
        return ((x - a) ** 2).sum()

    @bilevel.argmin(linear_solver=bilevel.CG())
    def settled(x, a):
        return ((x - a) ** 2).sum()

    assert plain.__name__ == "plain" and plain.__doc__ == "Say what it is." and "settled" in repr(settled)
    a = torch.ones(2, dtype=F64)
    torch.testing.assert_close(plain(torch.zeros(2, dtype=F64), a), settled(torch.zeros(2, dtype=F64), a))


def test_pytrees_keywords_and_other_arguments() -> None:
    seen = []

    def objective(x, pair, *, scale, labels, mode):
        seen.append(mode)
        z = torch.cat([x["w"].reshape(-1), x["b"][0].reshape(1)])
        return scale * ((z - pair[0]) ** 2).sum() + 0 * labels.sum() + pair[1]["extra"] * (z**2).sum()

    layer = bilevel.argmin(objective)
    init = {"w": torch.zeros(2, 1, dtype=F64), "b": (torch.zeros((), dtype=F64),)}
    target = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    extra = torch.tensor(1.0, dtype=F64, requires_grad=True)
    labels = torch.tensor([1, 2])
    x = layer(init, (target, {"extra": extra, "n": 3}), scale=2.0, labels=labels, mode="a string")
    assert x["w"].shape == (2, 1) and isinstance(x["b"], tuple) and seen[0] == "a string"
    torch.testing.assert_close(x["w"].detach().reshape(-1), torch.tensor([2 / 3, 4 / 3], dtype=F64))
    (x["w"].sum() + x["b"][0]).backward()
    torch.testing.assert_close(target.grad, torch.full((3,), 2 / 3, dtype=F64))
    torch.testing.assert_close(extra.grad, torch.tensor(-(2 * 6) / 9, dtype=F64))


def test_leaves_of_different_dtypes_keep_them() -> None:
    init = (torch.zeros(2, dtype=torch.float32), torch.zeros((), dtype=F64))
    x = bilevel.argmin(lambda x, a: ((x[0] - a) ** 2).sum() + (x[1] - a) ** 2)(init, torch.tensor(2.0, dtype=F64))
    assert x[0].dtype == torch.float32 and x[1].dtype == F64
    torch.testing.assert_close(x[1], torch.tensor(2.0, dtype=F64))


def test_unknowns_of_two_dtypes_are_differentiated_as_accurately_as_the_coarser_allows() -> None:
    init = {"u": torch.zeros(2), "v": torch.zeros(3, dtype=F64)}
    a = torch.tensor(0.37, dtype=F64, requires_grad=True)
    layer = bilevel.argmin(lambda p, a: ((p["u"] - a) ** 2).sum() + ((p["v"] - a * p["u"].sum()) ** 2).sum())
    x = layer(init, a)
    (slope,) = torch.autograd.grad(x["u"].sum() + x["v"].sum(), a)
    torch.testing.assert_close(slope, 2 + 12 * a.detach(), rtol=1e-5, atol=0)
    linear = bilevel.linear_solve(lambda x, a: {"u": a * x["u"] + x["v"].sum(), "v": 2 * x["v"] + 0 * x["u"].sum()})
    b = {"u": torch.ones(2), "v": torch.ones(3, dtype=F64)}
    solved = linear(b, a)
    torch.testing.assert_close(solved["u"], torch.full((2,), -0.5 / 0.37), rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(solved["u"].sum(), a)
    torch.testing.assert_close(slope, 1 / a.detach() ** 2, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support is in beta")
def test_sparse_tensors_of_coordinates_can_be_arguments() -> None:
    dense, y = torch.randn(6, 4, dtype=F64), torch.randn(6, dtype=F64)
    X = dense.to_sparse().requires_grad_(True)
    log_strength = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def ridge(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return ((torch.mv(X, w) - y) ** 2).sum() + s.exp() * (w**2).sum()

    def gradients(x: torch.Tensor, X: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad((x**3).sum(), s, create_graph=True)[0]
        second = torch.autograd.grad(first, s, retain_graph=True)[0]
        to_X = torch.autograd.grad((x**3).sum(), X)[0]
        return first.detach(), second, to_X.to_dense() if to_X.is_sparse else to_X

    free = dense.clone().requires_grad_(True)
    A = free.mT @ free + log_strength.exp() * torch.eye(4, dtype=F64)
    needs_grad = gradients(torch.linalg.solve(A, free.mT @ y), free, log_strength)
    for solver, linear_solver in ((None, None), (bilevel.LBFGS(), bilevel.CG())):
        layer = bilevel.argmin(ridge, solver=solver, linear_solver=linear_solver)
        got = gradients(layer(torch.zeros(4, dtype=F64), X, y, log_strength), X, log_strength)
        torch.testing.assert_close(got, needs_grad, rtol=1e-8, atol=1e-10)
    with pytest.raises(bilevel.DtypeError, match=r"args\[0\].*got sparse_csc.*to_sparse_coo"):
        layer(torch.zeros(4, dtype=F64), dense.to_sparse_csc(), y, log_strength)
    with pytest.raises(bilevel.DtypeError, match=r"init to be a dense tensor, got sparse_coo"):
        layer(torch.zeros(4, dtype=F64).to_sparse(), dense, y, log_strength)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_and_their_parts_work(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    layer = bilevel.argmin(lambda x, parts: sum(((x - part.sum()) ** 2).sum() for part in parts))
    with pytest.raises(bilevel.DtypeError, match=r"at args\[0\], got a nested one; pass a list of tensors"):
        layer(torch.zeros(1), nested)
    with pytest.raises(bilevel.DtypeError, match="at init, got a nested one"):
        layer(nested, torch.ones(1))
    assert torch.allclose(layer(torch.zeros(1), list(nested.unbind())), torch.tensor([2.5]))


def test_module_parameters_as_a_dict() -> None:
    torch.manual_seed(0)
    features = torch.nn.Linear(3, 2).double()
    parameters = dict(features.named_parameters())
    X, y = torch.randn(10, 3, dtype=F64), torch.randn(10, dtype=F64)

    def objective(w, parameters, X, y):
        return ((functional_call(features, parameters, (X,)) @ w - y) ** 2).sum() + (w**2).sum()

    w = bilevel.argmin(objective)(torch.zeros(2, dtype=F64), parameters, X, y)
    w.sum().backward()
    mine = features.weight.grad.clone()
    features.zero_grad()
    Z = features(X)
    torch.linalg.solve(Z.T @ Z + torch.eye(2, dtype=F64), Z.T @ y).sum().backward()
    torch.testing.assert_close(mine, features.weight.grad, atol=1e-10, rtol=1e-9)


def test_warm_start_at_the_solution_changes_nothing() -> None:
    a = torch.randn(5, dtype=F64)
    layer = bilevel.argmin(lambda x, a: ((x - a) ** 2).sum() + (x**4).sum())
    x = layer(torch.zeros(5, dtype=F64), a)
    again = layer.solve(x, a)
    assert int(again.report.iterations) == 0
    assert torch.equal(again.value, x)


@pytest.mark.parametrize("shape", [(0,), (), (1,), (1, 1), (3, 0, 2)])
def test_unusual_shapes(shape: tuple[int, ...]) -> None:
    a = torch.full(shape, 2.0, dtype=F64, requires_grad=True)
    x = bilevel.argmin(quadratic)(torch.zeros(shape, dtype=F64), a)
    assert x.shape == shape
    x.sum().backward()
    torch.testing.assert_close(a.grad, torch.ones(shape, dtype=F64))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@pytest.mark.parametrize(
    "layer",
    [
        bilevel.argmin(quadratic, lower=0.0),
        bilevel.argmin(quadratic, prox=bilevel.prox.L1(1.0)),
        bilevel.argmin(quadratic, inequality=lambda x, a: x - a),
        bilevel.root(lambda x, a: x - a),
        bilevel.least_squares(lambda x, a: x - a, upper=1.0),
    ],
    ids=str,
)
def test_no_unknowns(layer: bilevel.Layer, shape: tuple[int, ...]) -> None:
    a = torch.ones(shape, dtype=F64, requires_grad=True)
    x = layer(torch.zeros(shape, dtype=F64), a)
    assert x.shape == shape
    x.sum().backward()
    assert a.grad is not None and a.grad.shape == shape
    one = torch.tensor(1.0, dtype=F64)
    assert hessian(lambda one: layer(torch.zeros(shape, dtype=F64), a.detach() * one).sum())(one) == 0


@pytest.mark.parametrize(
    "layer",
    [
        bilevel.argmin(lambda x, a: ((x - a) ** 2).sum()),
        bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), solver=bilevel.LBFGS(), linear_solver=bilevel.CG()),
        bilevel.argmin(lambda x, a: ((x - a) ** 2).sum(), solver=bilevel.ScipyMinimize()),
        bilevel.root(lambda x, a: x - a),
        bilevel.fixed_point(lambda x, a: 0.5 * x + a),
    ],
)
def test_a_batch_of_no_problems(layer: bilevel.Layer) -> None:
    a = torch.ones(0, 2, 3, requires_grad=True)
    start = torch.zeros(2, 3)
    solution = vmap(layer.solve, in_dims=(None, 0))(start, a)
    solution.value.sum().backward()
    assert solution.value.shape == a.grad.shape == (0, 2, 3)
    assert "no problems" in str(solution.report)
    assert vmap(jacrev(lambda a: layer(start, a)))(a.detach()).shape == (0, 2, 3, 2, 3)
    assert vmap(hessian(lambda a: layer(start, a).sum()))(a.detach()).shape == (0, 2, 3, 2, 3)


def test_defaults_follow_size_and_structure() -> None:
    def chosen(make, function, n):
        layer = make(function)
        with bilevel.record() as reports:
            a = torch.ones(n, dtype=F64, requires_grad=True)
            layer(torch.zeros(n, dtype=F64), a).sum().backward()
        return [report.solver for report in reports]

    assert chosen(bilevel.argmin, quadratic, 3) == ["Newton", "Exact"]
    assert chosen(bilevel.argmin, quadratic, 2000) == ["LBFGS", "CG"]
    assert chosen(bilevel.root, lambda x, a: x + 0.1 * x.roll(1) - a, 3) == ["Newton", "Exact"]
    assert chosen(bilevel.root, lambda x, a: x + 0.1 * x.roll(1) - a, 2000) == ["Newton", "GMRES"]
    assert chosen(bilevel.fixed_point, lambda x, a: 0.5 * x.roll(1) + a, 3) == ["Anderson", "Exact"]
    assert chosen(bilevel.fixed_point, lambda x, a: 0.5 * x.roll(1) + a, 2000) == ["Anderson", "GMRES"]
    assert callable(default_solvers) and callable(default_linear_solver)


def test_a_users_own_solvers() -> None:
    # The two of the README.
    def by_scipy(objective, init, *args):
        import scipy.optimize

        def value_and_gradient(flat):
            x = torch.tensor(flat, requires_grad=True)
            value = objective(x, *args)
            return value.item(), torch.autograd.grad(value, x)[0].numpy()

        found = scipy.optimize.minimize(
            value_and_gradient, init.numpy(), jac=True, method="BFGS", options={"gtol": 1e-10}
        )
        return torch.tensor(found.x)

    def jacobi(operator, rhs):
        diagonal = operator.dense().diagonal(dim1=-2, dim2=-1)
        x = rhs / diagonal
        for _ in range(200):
            x = x + (rhs - operator.matvec(x)) / diagonal
        return x

    M = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=F64)

    def objective(x, a):
        return 0.5 * x @ M @ x - a @ x

    layer = bilevel.argmin(objective, solver=by_scipy, linear_solver=jacobi, tolerance=bilevel.Tolerance(delta=1e-8))
    a = torch.tensor([1.0, 2.0, 3.0], dtype=F64, requires_grad=True)
    with bilevel.record() as reports:
        layer(torch.zeros(3, dtype=F64), a).sum().backward()
    torch.testing.assert_close(a.grad, torch.linalg.inv(M).sum(0), atol=1e-10, rtol=1e-10)
    assert [report.solver for report in reports] == ["by_scipy", "jacobi"]
    batch = torch.stack([a.detach(), 2 * a.detach()])
    torch.testing.assert_close(
        vmap(layer, in_dims=(None, 0))(torch.zeros(3, dtype=F64), batch),
        batch @ torch.linalg.inv(M),
        atol=1e-7,
        rtol=1e-7,
    )


def test_a_wrong_user_solver_is_found_out() -> None:
    layer = bilevel.argmin(quadratic, solver=lambda objective, init, a: init + 1)
    with pytest.raises(bilevel.SolveError, match="residual is above the tolerance"):
        layer(torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64))
    layer = bilevel.argmin(quadratic, linear_solver=lambda operator, rhs: rhs)
    a = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(bilevel.SolveError, match="backward solve"):
        layer(torch.zeros(2, dtype=F64), a).sum().backward()
    with pytest.raises(bilevel.ShapeError, match="structure of init"):
        bilevel.argmin(quadratic, solver=lambda objective, init, a: {"x": init})(torch.zeros(2, dtype=F64), a.detach())
    layer = bilevel.argmin(quadratic, linear_solver=lambda operator, rhs: rhs[0])
    with pytest.raises(bilevel.ShapeError, match="one row for each"):
        layer(torch.zeros(2, dtype=F64), a).sum().backward()


def test_sixty_four_problems_of_different_conditioning_equal_a_loop() -> None:
    torch.manual_seed(0)
    batch, n = 64, 20
    Q = torch.linalg.qr(torch.randn(batch, n, n, dtype=F64))[0]
    spectra = torch.stack([torch.logspace(-k * 6 / 63, 0, n, dtype=F64) for k in range(batch)])
    A = Q @ torch.diag_embed(spectra) @ Q.mT
    b = (A @ torch.randn(batch, n, 1, dtype=F64)).squeeze(-1)

    def objective(x, A, b):
        return 0.5 * x @ A @ x - b @ x + 0.01 * (x**4).sum()

    layer = bilevel.argmin(objective)
    start = torch.zeros(n, dtype=F64)

    def value_and_gradient(solve):
        free = b.clone().requires_grad_(True)
        x = solve(free)
        return x.detach(), torch.autograd.grad((x**2).sum(), free)[0]

    with bilevel.record() as reports:
        batched = value_and_gradient(lambda b: vmap(layer, in_dims=(None, 0, 0))(start, A, b))
    looped = value_and_gradient(lambda b: torch.stack([layer(start, A[k], b[k]) for k in range(batch)]))
    for mine, reference in zip(batched, looped, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-9, rtol=1e-9)
    assert len(reports[0].status) == len(reports[1].status) == batch


def test_solve_under_vmap_returns_a_report_of_the_batch() -> None:
    layer = bilevel.argmin(quadratic)
    solution = vmap(layer.solve, in_dims=(None, 0))(torch.zeros(2, dtype=F64), torch.ones(5, 2, dtype=F64))
    assert solution.value.shape == (5, 2) and solution.report.converged.shape == (5,)
    nested = vmap(vmap(layer.solve, in_dims=(None, 0)), in_dims=(None, 0))(
        torch.zeros(2, dtype=F64), torch.ones(3, 5, 2, dtype=F64)
    )
    assert nested.report.residual_norm.shape == (3, 5) and len(nested.report.status) == 3


@pytest.mark.counts
def test_a_derivative_does_not_depend_on_who_looks_at_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps alone are meant, the product that verifies them is made for a reader of the report only."""
    made = 0
    matvec = HessianOperator.matvec

    def counted(self: HessianOperator, v: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        return matvec(self, v)

    monkeypatch.setattr(HessianOperator, "matvec", counted)
    layer = bilevel.argmin(
        lambda x, a: (x**2).sum() + (x * a).sum().cosh(), solver=bilevel.GradientDescent(0.1, 5),
        linear_solver=bilevel.CG(2), tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
    )  # fmt: skip
    a = torch.linspace(0.1, 1.0, 5, dtype=torch.float64, requires_grad=True)

    def gradient() -> torch.Tensor:
        nonlocal made
        made = 0
        return torch.autograd.grad(layer(torch.ones(5, dtype=torch.float64), a).cos().sum(), a)[0]

    unseen = gradient()
    assert made == 2
    with bilevel.record() as reports:
        seen = gradient()
    assert made == 3
    assert torch.equal(seen, unseen)
    assert reports[-1].status == bilevel.Status.BUDGET_SPENT and float(reports[-1].residual_norm) > 0


def test_layers_can_be_copied() -> None:
    a = torch.ones(2, dtype=F64)
    torch.testing.assert_close(copy.deepcopy(bilevel.argmin(quadratic))(torch.zeros(2, dtype=F64), a), a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved_without_factorisations(dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    start = torch.zeros(2, dtype=dtype)
    for layer in (
        bilevel.argmin(quadratic),
        bilevel.root(lambda x, a: x + 0.25 * x.flip(0) - 1.25 * a),
        bilevel.fixed_point(lambda x, a: 0.25 * x.flip(0) + 0.75 * a),
    ):
        x = layer(start, a)
        (gradient,) = torch.autograd.grad(x.sum(), a)
        assert x.dtype == gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), torch.ones(2), atol=0.1, rtol=0)


def test_settings_and_layers_can_be_pickled() -> None:
    import pickle

    import scipy.sparse.linalg

    settings = (
        bilevel.GradientDescent(0.1, 3), bilevel.TorchOptimizer(torch.optim.Adam, lr=0.1, max_steps=3), bilevel.LBFGS(),
        bilevel.Newton(), bilevel.Anderson(), bilevel.FixedPointIteration(), bilevel.ScipyMinimize(method="BFGS"),
        bilevel.ScipyRoot(), bilevel.CG(3), bilevel.Neumann(3), bilevel.Exact(), bilevel.GMRES(), bilevel.BiCGStab(),
        bilevel.ScipyLinear(scipy.sparse.linalg.minres, {"maxiter": 3}), bilevel.Tolerance(delta=1e-3),
    )  # fmt: skip
    assert repr(pickle.loads(pickle.dumps(settings))) == repr(settings)
    layer = pickle.loads(pickle.dumps(bilevel.argmin(quadratic)))
    torch.testing.assert_close(layer(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), torch.ones(2, dtype=F64))


def test_in_place_change_of_an_argument_between_forward_and_backward_is_caught() -> None:
    a = torch.ones(2, dtype=F64, requires_grad=True)
    scale = torch.ones(2, dtype=F64)
    x = bilevel.argmin(lambda x, a, s: (s * (x - a) ** 2).sum())(torch.zeros(2, dtype=F64), a, scale)
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_importing_has_no_effects_and_no_compiler() -> None:
    code = (
        "import sys, torch; before = torch.get_default_dtype(); import bilevel; "
        "assert torch.get_default_dtype() == before; assert 'torch._dynamo' not in sys.modules; "
        "assert not {'typer', 'matplotlib', 'sklearn', 'pandas', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _quadratic(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


@pytest.mark.parametrize(
    ("call", "write"),
    [
        (lambda f, x, A: bilevel.linear_solve(A, x), "bilevel.linear_solve(lambda x, A: A @ x)(b, A)"),
        (lambda f, x, A: bilevel.linear_solve(A), "bilevel.linear_solve(lambda x, A: A @ x)(b, A)"),
        (lambda f, x, A: bilevel.linear_solve(A[None], x[None]), "torch.func.vmap(bilevel.linear_solve("),
        (lambda f, x, A: bilevel.linear_solve(A.numpy(), x.numpy()), "(b, torch.as_tensor(A))"),
        (lambda f, x, A: bilevel.linear_solve(f, x), "bilevel.linear_solve(matvec)(rhs, *args)"),
        (lambda f, x, A: bilevel.argmin(f, x), "bilevel.argmin(objective)(init, *args)"),
        (lambda f, x, A: bilevel.argmin(f, x, A), "bilevel.argmin(objective)(init, *args)"),
        (lambda f, x, A: bilevel.argmin(x, f), "bilevel.argmin(objective)(init, *args)"),
        (lambda f, x, A: bilevel.argmin(f, x0=x), "bilevel.argmin(objective)(init, *args)"),
        (lambda f, x, A: bilevel.root(f, x), "bilevel.root(residual)(init, *args)"),
        (lambda f, x, A: bilevel.fixed_point(f, x), "bilevel.fixed_point(mapping)(init, *args)"),
        (lambda f, x, A: bilevel.argmin(f, bilevel.Newton()), "bilevel.argmin(objective, solver=Newton(...))"),
        (lambda f, x, A: bilevel.argmin(bilevel.Newton())(f), "@bilevel.argmin(solver=Newton(...))"),
        (lambda f, x, A: bilevel.root(f, bilevel.GMRES()), "bilevel.root(residual, linear_solver=GMRES(...))"),
        (lambda f, x, A: bilevel.argmin(bilevel.Tolerance())(f), "@bilevel.argmin(tolerance=Tolerance(...))"),
        (lambda f, x, A: bilevel.argmin("f"), "bilevel.argmin(f)(x, *args)"),
        (lambda f, x, A: bilevel.argmin(f)([1.0, 2.0], x), "write torch.tensor(init, dtype=torch.float64)"),
        (lambda f, x, A: bilevel.argmin(f)((1, 2), x), "write torch.tensor(init, dtype=torch.float64)"),
        (lambda f, x, A: bilevel.linear_solve(f)([1.0, 2.0], x), "write torch.tensor(rhs, dtype=torch.float64)"),
    ],
)
def test_a_first_call_that_is_none_says_what_to_write(call: Any, write: str) -> None:
    x, A = torch.ones(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    with pytest.raises(bilevel.BilevelError, match=re.escape(write)):
        call(_quadratic, x, A)


def test_what_it_says_is_what_to_write() -> None:
    b, A = torch.tensor([1.0, 4.0], dtype=torch.float64), torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64))
    x = torch.tensor([0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(bilevel.linear_solve(lambda x, A: A @ x)(b, A), x)
    torch.testing.assert_close(torch.func.vmap(bilevel.linear_solve(lambda x, A: A @ x))(b[None], A[None]), x[None])
    torch.testing.assert_close(bilevel.linear_solve(lambda x, A: A @ x)(b, torch.as_tensor(A.numpy())), x)
    torch.testing.assert_close(bilevel.argmin(_quadratic)(torch.tensor([1.0, 2.0], dtype=torch.float64), b), b)
    layer = bilevel.argmin(solver=bilevel.Newton())(_quadratic)
    torch.testing.assert_close(layer(torch.zeros_like(b), b), b)


def test_tensors_of_a_dataclass_are_named_in_the_error_and_its_remedy_works() -> None:
    @dataclasses.dataclass
    class Target:
        centre: torch.Tensor

    centre = torch.ones(2, requires_grad=True)
    with pytest.raises(bilevel.CapturedTensorError, match="such as those of a dataclass, in a dict"):
        bilevel.argmin(lambda x, target: quadratic(x, target.centre))(torch.zeros(2), Target(centre))
    x = bilevel.argmin(lambda x, target: quadratic(x, target["centre"]))(torch.zeros(2), {"centre": centre})
    x.sum().backward()
    torch.testing.assert_close(centre.grad, torch.ones(2))


def test_autocast_is_named_where_it_hides_the_solution_and_its_remedies_work() -> None:
    A = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    b, zero = torch.ones(4, requires_grad=True), torch.zeros(3)

    def ridge(x, A, b):
        return ((A @ x - b) ** 2).sum() + (x**2).sum()

    right = torch.linalg.solve(A.T @ A + torch.eye(3), A.T @ b).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(bilevel.SolveError, match="autocast evaluates the function in bfloat16") as caught:
            bilevel.argmin(ridge, solver=bilevel.Newton())(zero, A, b)
        assert "kink" not in str(caught.value)
        coarse = bilevel.argmin(ridge, tolerance=bilevel.Tolerance(delta=0.03, delta_prime=0.03))(zero, A, b)
        with torch.autocast("cpu", enabled=False):
            fine = bilevel.argmin(ridge)(zero, A, b)
    torch.testing.assert_close(coarse, right, atol=0.05, rtol=0)
    torch.testing.assert_close(fine, right)
