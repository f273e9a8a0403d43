"""`argmin(f, prox=g)`: values against scikit-learn and scipy, derivatives against closed forms and central differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn import linear_model, svm

import bilevel
from bilevel import Status, prox

DOUBLE = torch.float64


def data(n: int = 30, d: int = 12, seed: int = 0, dtype: torch.dtype = DOUBLE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=DOUBLE)
    w = torch.zeros(d, dtype=DOUBLE)
    w[: d // 3] = 2 * torch.randn(d // 3, generator=generator, dtype=DOUBLE)
    y = X @ w + 0.3 * torch.randn(n, generator=generator, dtype=DOUBLE)
    return X.to(dtype), y.to(dtype)


def zeros(n: int, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.zeros(n, dtype=dtype)


def least_squares(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, *strengths: torch.Tensor) -> torch.Tensor:
    return ((X @ w - y) ** 2).sum() / (2 * len(y))


lasso = bilevel.argmin(least_squares, prox=lambda X, y, s: prox.L1(s))


def differences(f: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, h: float = 1e-5) -> torch.Tensor:
    """Return the Jacobian of ``f`` (m,) by central differences (m, n)."""
    columns = []
    for i in range(at.numel()):
        e = torch.zeros_like(at).reshape(-1)
        e[i] = h
        e = e.reshape(at.shape)
        columns.append((f(at + e) - f(at - e)) / (2 * h))
    return torch.stack(columns, dim=-1)


class TestValues:
    @pytest.mark.parametrize("strength", [0.01, 0.1, 0.5, 5.0])
    def test_lasso(self, strength: float) -> None:
        X, y = data()
        solution = lasso.solve(zeros(12), X, y, torch.tensor(strength, dtype=DOUBLE))
        reference = linear_model.Lasso(alpha=strength, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(X, y)
        torch.testing.assert_close(solution.value, torch.as_tensor(reference.coef_), rtol=1e-8, atol=1e-10)
        assert solution.report.status is Status.CONVERGED
        assert ((solution.value == 0) == torch.as_tensor(reference.coef_ == 0)).all()

    def test_lasso_with_more_unknowns_than_data(self) -> None:
        X, y = data(20, 60)
        w = lasso(zeros(60), X, y, torch.tensor(0.05, dtype=DOUBLE))
        reference = linear_model.Lasso(alpha=0.05, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(X, y)
        torch.testing.assert_close(w, torch.as_tensor(reference.coef_), rtol=1e-7, atol=1e-9)

    def test_elastic_net(self) -> None:
        X, y = data()
        layer = bilevel.argmin(least_squares, prox=lambda X, y, a, b: prox.ElasticNet(a, b))
        w = layer(zeros(12), X, y, torch.tensor(0.1, dtype=DOUBLE), torch.tensor(0.05, dtype=DOUBLE))
        reference = linear_model.ElasticNet(alpha=0.15, l1_ratio=2 / 3, fit_intercept=False, tol=1e-14, max_iter=10**6)
        torch.testing.assert_close(w, torch.as_tensor(reference.fit(X, y).coef_), rtol=1e-8, atol=1e-10)

    def test_sparse_logistic_regression(self) -> None:
        X, y = data(60, 10)
        labels = y.sign()

        def loss(w: torch.Tensor, X: torch.Tensor, labels: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.softplus(-labels * (X @ w)).sum()

        layer = bilevel.argmin(loss, prox=lambda X, labels, s: prox.L1(s))
        w = layer(zeros(10), X, labels, torch.tensor(2.0, dtype=DOUBLE))
        reference = linear_model.LogisticRegression(
            l1_ratio=1.0, solver="saga", C=0.5, fit_intercept=False, tol=1e-13, max_iter=10**6
        )
        torch.testing.assert_close(w, torch.as_tensor(reference.fit(X, labels).coef_[0]), rtol=1e-6, atol=1e-8)

    def test_non_negative_least_squares(self) -> None:
        X, y = data()
        w = bilevel.argmin(least_squares, prox=prox.NonNegative())(zeros(12), X, y)
        torch.testing.assert_close(
            w, torch.as_tensor(scipy.optimize.nnls(X.numpy(), y.numpy())[0]), rtol=1e-9, atol=1e-12
        )

    def test_the_dual_of_a_support_vector_machine(self) -> None:
        X, y = data(40, 5)
        labels = y.sign()

        def dual(a: torch.Tensor, X: torch.Tensor, labels: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
            return 0.5 * ((X.T @ (labels * a)) ** 2).sum() - a.sum()

        layer = bilevel.argmin(dual, prox=lambda X, labels, C: prox.Box(0.0, C))
        a = layer(zeros(40), X, labels, torch.tensor(0.3, dtype=DOUBLE))
        reference = svm.LinearSVC(loss="hinge", C=0.3, fit_intercept=False, tol=1e-12, max_iter=10**7).fit(X, labels)
        torch.testing.assert_close(X.T @ (labels * a), torch.as_tensor(reference.coef_[0]), rtol=1e-6, atol=1e-7)


class TestDerivatives:
    def test_of_lasso_is_the_closed_form(self) -> None:
        X, y = data()
        s = torch.tensor(0.1, dtype=DOUBLE)
        w, J = lasso(zeros(12), X, y, s), torch.func.jacrev(lambda s: lasso(zeros(12), X, y, s))(s)
        S = w != 0
        want = zeros(12)
        want[S] = -len(y) * torch.linalg.solve(X[:, S].T @ X[:, S], w[S].sign())
        torch.testing.assert_close(J, want)
        torch.testing.assert_close(torch.func.jacfwd(lambda s: lasso(zeros(12), X, y, s))(s), want)
        by_y = torch.func.jacrev(lambda y: lasso(zeros(12), X, y, s))(y)
        torch.testing.assert_close(by_y[S], torch.linalg.pinv(X[:, S]))
        assert (by_y[~S] == 0).all()

    @pytest.mark.parametrize(
        ("term", "theta"),
        [
            (lambda t: prox.L1(t[0]), [0.2]),
            (lambda t: prox.L1(t), [0.2] * 6 + [0.3] * 6),
            (lambda t: prox.ElasticNet(t[0], t[1]), [0.2, 0.7]),
            (lambda t: prox.Box(t[0], t[1]), [-0.3, 0.4]),
            (lambda t: prox.NonNegative(), [1.0]),
        ],
    )
    @pytest.mark.parametrize("seed", [1, 2])
    def test_are_central_differences(self, term: Any, theta: list[float], seed: int) -> None:
        X, y = data(seed=seed)
        t = torch.tensor(theta, dtype=DOUBLE)

        def loss(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return (
                torch.nn.functional.softplus(X @ w - y).mean() + 0.1 * ((X @ w - y) ** 2).mean() + 0.01 * (w**4).sum()
            )

        layer = bilevel.argmin(loss, prox=lambda X, y, t: term(t))
        run = lambda t: layer(zeros(12), X, y, t)
        torch.testing.assert_close(torch.func.jacrev(run)(t), differences(run, t), rtol=1e-6, atol=1e-7)
        data_run = lambda y: layer(zeros(12), X, y, t)
        torch.testing.assert_close(torch.func.jacrev(data_run)(y), differences(data_run, y), rtol=1e-6, atol=1e-7)
        # Second derivatives of an outer loss.
        outer = lambda t: (run(t) ** 3).sum()
        want = differences(lambda t: torch.func.grad(outer)(t), t)
        torch.testing.assert_close(torch.func.hessian(outer)(t), want, rtol=1e-5, atol=1e-6)

    def test_of_second_order_are_those_of_the_closed_form(self) -> None:
        X, y = data()
        target = torch.linspace(-1, 1, 12, dtype=DOUBLE)
        S = lasso(zeros(12), X, y, torch.tensor(0.1, dtype=DOUBLE)).sign()
        support = S != 0

        def closed(log: torch.Tensor) -> torch.Tensor:
            A = X[:, support]
            w = torch.linalg.solve(A.T @ A, A.T @ y - len(y) * log.exp() * S[support])
            return ((zeros(12).index_put((support.nonzero()[:, 0],), w) - target) ** 2).sum()

        outer = lambda log: ((lasso(zeros(12), X, y, log.exp()) - target) ** 2).sum()
        log = torch.tensor(0.1, dtype=DOUBLE).log()
        torch.testing.assert_close(torch.func.hessian(outer)(log), torch.func.hessian(closed)(log))
        leaf = log.clone().requires_grad_()
        (first,) = torch.autograd.grad(outer(leaf), leaf, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(first, leaf)[0], torch.func.hessian(closed)(log))
        many = torch.func.vmap(torch.func.hessian(outer))(log + torch.tensor([0.0, 0.01], dtype=DOUBLE))
        torch.testing.assert_close(many[0], torch.func.hessian(closed)(log))


class TestBatches:
    def test_vmap_is_a_loop(self) -> None:
        strengths = torch.tensor([1e-4, 0.01, 0.1, 1.0, 50.0], dtype=DOUBLE, requires_grad=True)
        X, y = data()
        ys = torch.stack([y, -2 * y, y.flip(0), 100 * y, y + 1])
        target = torch.linspace(-1, 1, 12, dtype=DOUBLE)
        outer = lambda y, s: ((lasso(zeros(12), X, y, s) - target) ** 2).sum()
        both = torch.func.vmap(torch.func.grad_and_value(outer, argnums=1))
        slopes, values = both(ys, strengths.detach())
        for y, s, slope, value in zip(ys, strengths.detach(), slopes, values, strict=True):
            one, at = torch.func.grad_and_value(outer, argnums=1)(y, s)
            torch.testing.assert_close(value, at)
            torch.testing.assert_close(slope, one)
        total = torch.func.vmap(outer)(ys, strengths).sum()
        torch.testing.assert_close(torch.autograd.grad(total, strengths)[0], slopes)

    def test_of_small_supports_among_many_unknowns(self) -> None:
        X, y = data(30, 80)
        ys = torch.stack([y, 2 * y.flip(0), y - 1])
        s = torch.tensor(0.3, dtype=DOUBLE)
        many = torch.func.vmap(torch.func.jacrev(lambda y: lasso(zeros(80), X, y, s)))(ys)
        for y, J in zip(ys, many, strict=True):
            torch.testing.assert_close(J, torch.func.jacrev(lambda y: lasso(zeros(80), X, y, s))(y))

    def test_each_problem_has_its_own_status(self) -> None:
        def loss(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return 0.5 * (a * x**2).sum() - x.sum()

        layer = bilevel.argmin(loss, prox=prox.L1(0.1), on_failure="ignore")
        a = torch.tensor([1.0, -1.0, float("nan"), 1e-6, 1e6], dtype=DOUBLE)
        solution = torch.func.vmap(lambda a: layer.solve(zeros(2), a))(a)
        names = [status.name for status in solution.report.status]
        assert names == ["CONVERGED", "DIVERGED", "NOT_FINITE", "CONVERGED", "CONVERGED"]
        torch.testing.assert_close(solution.value[[0, 3, 4], 0], 0.9 / a[[0, 3, 4]])


class TestFailures:
    def test_a_strength_at_its_threshold_is_degenerate(self) -> None:
        layer = bilevel.argmin(lambda x, a: 0.5 * ((x - a) ** 2).sum(), prox=prox.L1(1.0))
        a = torch.tensor([1.0, 3.0, 0.2], dtype=DOUBLE, requires_grad=True)
        solution = layer.solve(zeros(3), a)
        assert solution.report.status is Status.CONVERGED
        assert solution.value.tolist() == [0.0, 2.0, 0.0]
        with pytest.raises(bilevel.SolveError, match="just at its threshold"):
            solution.value.sum().backward()
        # The remedy works.
        b = torch.tensor([1.001, 3.0, 0.2], dtype=DOUBLE, requires_grad=True)
        layer(zeros(3), b).sum().backward()
        assert b.grad is not None
        assert b.grad.tolist() == [1.0, 1.0, 0.0]
        # One of a batch.
        with bilevel.record() as reports:
            many = torch.stack([a.detach(), b.detach()]).requires_grad_()
            layer.on_failure = "ignore"
            torch.func.vmap(lambda a: layer(zeros(3), a))(many).sum().backward()
        assert [status.name for status in reports.backward[0].status] == ["DEGENERATE", "CONVERGED"]

    @pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
    def test_the_largest_strength_with_a_nonzero_lasso_is_degenerate(self, dtype: torch.dtype) -> None:
        X, y = data(dtype=dtype)
        largest = (X.T @ y).abs().max() / len(y)
        for factor, fine in ((1.0, False), (0.999, True), (1.001, True)):
            s = (factor * largest).requires_grad_()
            w = lasso(zeros(12, dtype), X, y, s)
            if fine:
                torch.autograd.grad(w.sum(), s)
                continue
            with pytest.raises(bilevel.SolveError, match="just at its threshold"):
                torch.autograd.grad(w.sum(), s)

    def test_an_objective_without_minimum_diverges(self) -> None:
        for term in (prox.L1(0.1), prox.NonNegative()):
            layer = bilevel.argmin(lambda x: -2 * x.sum(), prox=term)
            with pytest.raises(bilevel.SolveError, match="no minimum"):
                layer(zeros(2))

    def test_a_saddle_is_no_minimum(self) -> None:
        layer = bilevel.argmin(lambda x: (x[0] ** 2 - 1) ** 2 + (x[1] - 1) ** 2, prox=prox.Box(-2.0, 2.0))
        with pytest.raises(bilevel.SolveError, match="saddle"):
            layer(zeros(2))
        torch.testing.assert_close(layer(torch.tensor([0.1, 0.0], dtype=DOUBLE)), torch.ones(2, dtype=DOUBLE))

    def test_a_budget_is_spent_as_meant(self) -> None:
        X, y = data()
        s = torch.tensor(0.1, dtype=DOUBLE)
        layer = bilevel.argmin(
            least_squares, prox=lambda X, y, s: prox.L1(s), solver=bilevel.ProximalGradient(max_steps=3),
            tolerance=bilevel.Tolerance(delta=None),
        )  # fmt: skip
        solution = layer.solve(zeros(12), X, y, s)
        assert solution.report.status is Status.BUDGET_SPENT
        assert int(solution.report.iterations) == 3
        strict = bilevel.argmin(
            least_squares, prox=lambda X, y, s: prox.L1(s), solver=bilevel.ProximalGradient(max_steps=3, polish=False),
            tolerance=bilevel.Tolerance(delta=1e-9),
        )  # fmt: skip
        with pytest.raises(bilevel.SolveError, match="ran out of"):
            strict(zeros(12), X, y, s)

    def test_what_would_make_gradients_wrong_is_found(self) -> None:
        X, y = data()
        s = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
        with pytest.raises(bilevel.CapturedTensorError):
            bilevel.argmin(least_squares, prox=lambda X, y: prox.L1(s))(zeros(12), X, y)
        with pytest.raises(bilevel.CapturedTensorError):
            bilevel.argmin(least_squares, prox=prox.L1(s))(zeros(12), X, y)
        with pytest.raises(bilevel.StochasticObjectiveError):
            bilevel.argmin(least_squares, prox=lambda X, y: prox.L1(torch.rand(12, dtype=DOUBLE) + 1))(
                zeros(12) + 1, X, y
            )
        with pytest.raises(bilevel.CapturedTensorError):
            torch.func.grad(lambda s: bilevel.argmin(least_squares, prox=prox.L1(s))(zeros(12), X, y).sum())(s.detach())

    @pytest.mark.parametrize(
        ("term", "init", "said"),
        [
            (0.1, zeros(3), "to be a term of bilevel.prox, got float"),
            (lambda a: a, zeros(3), "to be a term of bilevel.prox, got Tensor"),
            (prox.L1(0.1), {"a": zeros(1), "b": zeros(2)}, "one term for each of the 2 tensors"),
            ({"a": prox.L1(0.1), "c": None}, {"a": zeros(1), "b": zeros(2)}, "structure of init"),
            (lambda: prox.L1(0.1), zeros(3), "a function of the layer's arguments"),
            (prox.L1(torch.ones(2)), zeros(3), "prox.L1"),
        ],
    )
    def test_bad_terms_are_refused_in_a_sentence(self, term: Any, init: Any, said: str) -> None:
        with pytest.raises((bilevel.ArgumentError, bilevel.ShapeError), match=said):
            bilevel.argmin(lambda x, a: (bilevel.ravel(x) ** 2).sum() * a, prox=term)(
                init, torch.ones((), dtype=DOUBLE)
            )

    def test_a_smooth_solver_is_refused(self) -> None:
        layer = bilevel.argmin(lambda x: (x**2).sum(), prox=prox.L1(0.1), solver=bilevel.LBFGS())
        with pytest.raises(bilevel.ArgumentError, match="ProximalGradient"):
            layer(zeros(2))


class TestAccuracy:
    def test_a_distance_is_proven_by_strong_convexity(self) -> None:
        X, y = data()
        s = torch.tensor(0.1, dtype=DOUBLE)
        exact = lasso(zeros(12), X, y, s)
        mu = float(torch.linalg.eigvalsh(X.T @ X / len(y))[0])
        for delta in (1e-1, 1e-3, 1e-6):
            layer = bilevel.argmin(
                least_squares, prox=lambda X, y, s: prox.L1(s), solver=bilevel.ProximalGradient(polish=False),
                tolerance=bilevel.Tolerance(delta=delta, strong_convexity=mu),
            )  # fmt: skip
            solution = layer.solve(zeros(12), X, y, s)
            error = float((solution.value - exact).norm())
            assert error <= float(solution.report.error_bound) <= 1.01 * delta
            assert bool(solution.report.certified)
            assert error > 0

    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
    @pytest.mark.parametrize(
        "term", [prox.L1(1.0), prox.Box(-1.0, 1.0), prox.Simplex(), prox.PSDCone(), prox.Zero()], ids=str
    )
    def test_a_start_without_a_slope_is_no_division_by_zero(self, term: prox.Term, dtype: torch.dtype) -> None:
        layer = bilevel.argmin(lambda x, v: 0.5 * ((x - v) ** 2).sum(), prox=term)
        zero = torch.zeros(2, 2, dtype=dtype)
        torch.testing.assert_close(layer(zero, zero), term.prox(zero))

    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
    def test_a_start_at_a_vertex_tells_the_curvature(self, dtype: torch.dtype) -> None:
        """There g fixes x, and the change of the slope is rounding. A step thousands of times too long makes every margin small."""
        generator = torch.Generator().manual_seed(0)
        torch.randn(30, generator=generator, dtype=DOUBLE)
        costs = torch.rand(3, 4, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_()
        row, column = (torch.randn(n, generator=generator, dtype=DOUBLE).softmax(0).to(dtype) for n in (3, 4))
        layer = bilevel.argmin(
            lambda plan, costs: (plan * costs).sum() + 0.5 * (plan**2).sum(), prox=prox.TransportPolytope(row, column)
        )
        plan = layer(torch.full((3, 4), 1 / 12, dtype=dtype), costs)
        assert (plan > 0).sum() == 6  # a vertex: so many entries are determined by the marginals
        (slope,) = torch.autograd.grad(plan[0, 0], costs)
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)

    def test_a_warm_start_needs_no_steps_and_is_as_accurate(self) -> None:
        X, y = data()
        s = torch.tensor(0.1, dtype=DOUBLE)
        w = lasso(zeros(12), X, y, s)
        again = lasso.solve(w, X, y, s)
        torch.testing.assert_close(again.value, w, rtol=1e-13, atol=1e-14)
        assert int(again.report.iterations) <= 1

    def test_plain_steps_reach_the_accuracy_too(self) -> None:
        X, y = data()
        s = torch.tensor(0.1, dtype=DOUBLE)
        for accelerated in (True, False):
            solver = bilevel.ProximalGradient(polish=False, accelerated=accelerated)
            layer = bilevel.argmin(least_squares, prox=lambda X, y, s: prox.L1(s), solver=solver)
            torch.testing.assert_close(layer(zeros(12), X, y, s), lasso(zeros(12), X, y, s), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_units_do_not_matter(self, scale: float) -> None:
        X, y = data()
        s = torch.tensor(0.1, dtype=DOUBLE)
        want = lasso(zeros(12), X, y, s)
        layer = bilevel.argmin(lambda *a: scale * least_squares(*a), prox=lambda X, y, s: prox.L1(scale * s))
        torch.testing.assert_close(layer(zeros(12), X, y, s), want, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            lasso(zeros(12), X, scale * y, scale * s), scale * want, rtol=1e-9, atol=1e-11 * scale
        )

    def test_single_precision(self) -> None:
        X, y = data(dtype=torch.float32)
        s = torch.tensor(0.1, requires_grad=True)
        w = lasso(zeros(12, torch.float32), X, y, s)
        wide = lasso(zeros(12), X.double(), y.double(), s.detach().double())
        torch.testing.assert_close(w, wide.float(), rtol=1e-4, atol=1e-5)
        (slope,) = torch.autograd.grad((w**2).sum(), s)
        want = torch.func.grad(lambda s: (lasso(zeros(12), X.double(), y.double(), s) ** 2).sum())(s.detach().double())
        torch.testing.assert_close(slope, want.float(), rtol=1e-3, atol=1e-4)


class TestForms:
    def test_a_pytree_of_terms_decorator_and_keywords(self) -> None:
        X, y = data()

        @bilevel.argmin(prox=lambda X, y, *, s: {"w": prox.L1(s), "b": None})
        def layer(v: Any, X: torch.Tensor, y: torch.Tensor, *, s: torch.Tensor) -> torch.Tensor:
            return ((X @ v["w"] + v["b"] - y) ** 2).sum() / (2 * len(y))

        s = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
        found = layer({"w": zeros(12), "b": torch.tensor(0.0, dtype=DOUBLE)}, X, y, s=s)
        reference = linear_model.Lasso(alpha=0.1, tol=1e-14, max_iter=10**6).fit(X, y)
        torch.testing.assert_close(found["w"].detach(), torch.as_tensor(reference.coef_), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(float(found["b"].detach()), float(reference.intercept_))
        (slope,) = torch.autograd.grad(found["b"], s)
        h = 1e-5
        high, low = (linear_model.Lasso(alpha=0.1 + t, tol=1e-15, max_iter=10**6).fit(X, y).intercept_ for t in (h, -h))
        np.testing.assert_allclose(float(slope), (high - low) / (2 * h), rtol=1e-5)

    def test_a_solver_of_the_users_own(self) -> None:
        X, y = data()

        def sklearn(objective: Any, init: Any, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            model = linear_model.Lasso(alpha=float(s), fit_intercept=False, tol=1e-14, max_iter=10**6)
            return torch.as_tensor(model.fit(X, y).coef_)

        s, rough = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True), bilevel.Tolerance(rtol=1e-5)
        layer = bilevel.argmin(least_squares, prox=lambda X, y, s: prox.L1(s), solver=sklearn, tolerance=rough)
        (slope,) = torch.autograd.grad(layer(zeros(12), X, y, s).sum(), s)
        (want,) = torch.autograd.grad(lasso(zeros(12), X, y, s).sum(), s)
        torch.testing.assert_close(slope, want, rtol=1e-6, atol=1e-8)
        wrong = bilevel.argmin(least_squares, prox=lambda X, y, s: prox.L1(s), solver=lambda f, x, *a: x + 1)
        with pytest.raises(bilevel.SolveError, match="residual is above"):
            wrong(zeros(12), X, y, s)

    def test_a_matrix_as_the_unknown(self) -> None:
        generator = torch.Generator().manual_seed(3)
        A = torch.randn(4, 3, generator=generator, dtype=DOUBLE)
        layer = bilevel.argmin(lambda W, A: 0.5 * ((W - A) ** 2).sum(), prox=prox.L1(0.5))
        torch.testing.assert_close(layer(torch.zeros_like(A), A), A.sign() * (A.abs() - 0.5).clamp(min=0))

    def test_the_solver_works_without_a_term(self) -> None:
        X, y = data()
        layer = bilevel.argmin(least_squares, solver=bilevel.ProximalGradient())
        torch.testing.assert_close(layer(zeros(12), X, y), torch.linalg.lstsq(X, y).solution, rtol=1e-9, atol=1e-11)


def test_what_failed_has_no_finite_derivative() -> None:
    X, y = data()
    layer = bilevel.argmin(
        least_squares, prox=lambda X, y, s: prox.L1(s), solver=bilevel.ProximalGradient(max_steps=2, polish=False),
        tolerance=bilevel.Tolerance(delta=1e-9), on_failure="nan",
    )  # fmt: skip
    s = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
    w = layer(zeros(12), X, y, s)
    assert torch.isnan(w).all()
    (slope,) = torch.autograd.grad(w.sum(), s)
    assert torch.isnan(slope)
