"""How a solution is differentiated, and answers that are there already."""

from __future__ import annotations

import pytest
import torch

import bilevel

F64 = torch.float64
A = torch.tensor([0.3, 1.2], dtype=F64)
START = torch.zeros(2, dtype=F64)


def mapping(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return 0.5 * torch.cos(x) + a


def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 4).sum() / 4 + (x**2).sum()


def slope(layer, a: torch.Tensor) -> torch.Tensor:
    return torch.func.jacrev(lambda a: layer(START, a))(a).diagonal()


def unrolled_by_hand(step, x: torch.Tensor, a: torch.Tensor, times: int) -> torch.Tensor:
    a = a.clone().requires_grad_()
    for _ in range(times):
        x = step(x, a)
    return torch.autograd.grad(x.sum(), a)[0]


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_truncated_is_the_derivative_of_the_last_steps(steps: int) -> None:
    layer = bilevel.fixed_point(mapping, differentiation=bilevel.Truncated(steps))
    answer = layer(START, A).detach()
    assert torch.allclose(slope(layer, A), unrolled_by_hand(mapping, answer, A, steps), rtol=1e-9)


def test_one_step_is_the_jacobian_free_gradient() -> None:
    layer = bilevel.fixed_point(mapping, differentiation=bilevel.OneStep())
    assert torch.equal(slope(layer, A), torch.ones(2, dtype=F64))


@pytest.mark.parametrize(("way", "right"), [(bilevel.OneStep(), 1), (bilevel.Truncated(2), 3)])
def test_the_orders_of_derivatives_that_newton_steps_have_without_bias(way, right: int) -> None:
    def orders(differentiation) -> list[float]:
        layer = bilevel.root(lambda x, a: x**3 + x - a, differentiation=differentiation)
        function, found = lambda a: layer(torch.tensor(0.5, dtype=F64), a), []
        for _ in range(3):
            function = torch.func.jacrev(function)
            found.append(function(torch.tensor(0.7, dtype=F64)).item())
        return found

    same = [abs(one - other) < 1e-9 for one, other in zip(orders(way), orders(bilevel.Implicit()), strict=True)]
    assert same == [order <= right for order in (1, 2, 3)]


@pytest.mark.parametrize(("steps", "damping"), [(1, 0.5), (5, 0.5), (4, 1.0)])
def test_phantom_gradients_are_those_of_damped_steps(steps: int, damping: float) -> None:
    layer = bilevel.fixed_point(mapping, differentiation=bilevel.PhantomGradient(steps=steps, damping=damping))
    answer = bilevel.fixed_point(mapping)(START, A).detach()
    expected = unrolled_by_hand(lambda x, a: x + damping * (mapping(x, a) - x), answer, A, steps)
    assert torch.allclose(slope(layer, A), expected, rtol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_unrolled_is_the_derivative_of_every_iterate(momentum: float) -> None:
    solver = bilevel.GradientDescent(lr=0.1, max_steps=6, momentum=momentum)
    layer = bilevel.argmin(
        objective, solver=solver, differentiation=bilevel.Unrolled(), tolerance=bilevel.Tolerance(delta=None)
    )

    def run(a: torch.Tensor) -> torch.Tensor:
        x, still = START, torch.zeros_like(START)
        for _ in range(6):
            still = momentum * still + (x - a) ** 3 + 2 * x
            x = x - 0.1 * still
        return x

    assert torch.allclose(layer(START, A), run(A), rtol=1e-12)
    assert torch.allclose(slope(layer, A), torch.func.jacrev(run)(A).diagonal(), rtol=1e-10)


@pytest.mark.parametrize(
    "way", [bilevel.Unrolled(), bilevel.Truncated(40), bilevel.PhantomGradient(steps=80, damping=0.9)], ids=str
)
def test_many_steps_of_a_contraction_agree_with_implicit_derivatives_of_both_orders_and_modes(way) -> None:
    implicit, layer = bilevel.fixed_point(mapping), bilevel.fixed_point(mapping, differentiation=way)
    batch = torch.stack([A, 2 * A])
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        ours, theirs = (transform(lambda a, f=f: f(START, a).sum()) for f in (layer, implicit))
        assert torch.allclose(ours(A), theirs(A), rtol=1e-6, atol=1e-9)
        assert torch.allclose(torch.func.vmap(ours)(batch), torch.func.vmap(theirs)(batch), rtol=1e-6, atol=1e-9)


def test_steps_can_be_differentiated_twice_in_forward_mode() -> None:
    """Torch loses nested tangents in custom Functions alone. Steps are ordinary code."""
    for layer in (
        bilevel.fixed_point(mapping, differentiation=bilevel.Truncated(4)),
        bilevel.argmin(objective, differentiation=bilevel.OneStep()),
    ):
        twice = [
            t(t(lambda a, layer=layer: layer(START, a).pow(2).sum()))(A) for t in (torch.func.jacfwd, torch.func.jacrev)
        ]
        assert torch.allclose(*twice, rtol=1e-12) and bool(twice[0].diagonal().all())


def test_a_newton_step_at_the_solution_has_no_bias_in_first_derivatives() -> None:
    for solver in (None, bilevel.LBFGS(), bilevel.Newton()):
        layer = bilevel.argmin(objective, solver=solver, differentiation=bilevel.OneStep())
        assert torch.allclose(slope(layer, A), slope(bilevel.argmin(objective), A), rtol=1e-6)


@pytest.mark.parametrize("start", [START, START + 30, A])
def test_without_a_solver_newton_steps_are_unrolled_without_bias_in_both_orders(start: torch.Tensor) -> None:
    implicit, layer = bilevel.argmin(objective), bilevel.argmin(objective, differentiation=bilevel.Unrolled())
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        ours, theirs = (transform(lambda a, f=f: f(start, a).pow(2).sum()) for f in (layer, implicit))
        assert torch.allclose(ours(A), theirs(A), rtol=1e-6, atol=1e-9)
    root = bilevel.root(lambda x, a: x - mapping(x, a), differentiation=bilevel.Unrolled())
    assert torch.allclose(slope(root, A), slope(bilevel.fixed_point(mapping), A), rtol=1e-8)


def test_a_start_at_the_solution_leaves_nothing_to_unroll_and_is_no_zero_derivative() -> None:
    layer = bilevel.fixed_point(mapping, differentiation=bilevel.Unrolled())
    answer = layer(START, A)
    with torch.no_grad():
        assert torch.equal(layer(answer, A.clone().requires_grad_()), answer)
    a = A.clone().requires_grad_()
    with pytest.raises(bilevel.ArgumentError, match="the initial guess is a solution already") as caught:
        layer(answer, a)
    assert "Truncated(steps)" in str(caught.value)
    layer.differentiation = bilevel.Truncated(40)
    assert torch.allclose(torch.autograd.grad(layer(answer, a).sum(), a)[0], slope(bilevel.fixed_point(mapping), A))


def test_what_cannot_be_unrolled_is_refused_with_a_remedy_that_works() -> None:
    layer = bilevel.argmin(objective, solver=bilevel.LBFGS(), differentiation=bilevel.Unrolled())
    with pytest.raises(bilevel.ArgumentError, match=r"GradientDescent\(lr=..., max_steps=...\)"):
        layer(START, A)
    layer.solver = bilevel.GradientDescent(lr=0.1, max_steps=200)
    assert torch.allclose(slope(layer, A), slope(bilevel.argmin(objective), A), rtol=1e-6)
    with pytest.raises(bilevel.ArgumentError, match="Implicit"):
        bilevel.argmin(objective, differentiation="unrolled")
    big = bilevel.argmin(lambda x: (x**2).sum(), differentiation=bilevel.OneStep())
    with pytest.raises(bilevel.ArgumentError, match="at most 512 unknowns"):
        big(torch.ones(513, dtype=F64))
    with pytest.raises(bilevel.ArgumentError, match="proximal terms"):
        bilevel.argmin(objective, prox=bilevel.prox.L1(0.1), differentiation=bilevel.OneStep())(START, A)


def curve(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.exp() - a, 0.5 * x + a.flip(0) ** 2])  # of which no x makes all residuals zero


PLAYERS = [
    lambda x, y, a: (x - a[0] * y) ** 4 / 4 + x**2 - x * a[1],
    lambda x, y, a: (y + a[1] * x) ** 2 + 0.5 * y**4 - a[0] * y,
]


def fit(way, **settings) -> bilevel.Layer:
    return bilevel.least_squares(curve, differentiation=way, **settings)


def duel(way, **settings):
    game, zero = bilevel.equilibrium(PLAYERS, differentiation=way, **settings), torch.zeros((), dtype=F64)
    return lambda init, a: torch.stack(game((zero, zero), a))


@pytest.mark.parametrize("make", [fit, duel])
@pytest.mark.parametrize(
    "way",
    [bilevel.OneStep(), bilevel.Truncated(2), bilevel.Unrolled(), bilevel.PhantomGradient(steps=60, damping=0.5)],
    ids=str,
)
def test_newton_steps_of_least_squares_and_games_have_no_bias(make, way) -> None:
    ours, theirs = (torch.func.jacrev(lambda a, layer=layer: layer(START, a)) for layer in (make(way), make(None)))
    assert float(theirs(A).abs().max()) > 0.1
    assert torch.allclose(ours(A), theirs(A), rtol=1e-6, atol=1e-9)
    batch = torch.stack([A, 1.5 * A])
    assert torch.allclose(torch.func.vmap(ours)(batch), torch.func.vmap(theirs)(batch), rtol=1e-6, atol=1e-9)


def test_steps_of_gradient_descent_on_least_squares_are_those_by_hand() -> None:
    solver = bilevel.GradientDescent(lr=0.1, max_steps=5)
    layer = fit(
        bilevel.Unrolled(),
        solver=solver,
        tolerance=bilevel.Tolerance(delta=None),
        loss=lambda a: bilevel.robust.Cauchy(1.0),
    )

    def run(a: torch.Tensor) -> torch.Tensor:
        x = START
        for _ in range(5):
            x = x - 0.1 * torch.func.grad(lambda x: bilevel.robust.Cauchy(1.0).cost(curve(x, a)).sum())(x)
        return x

    assert torch.allclose(layer(START, A), run(A), rtol=1e-12)
    found, h, e = torch.func.jacrev(lambda a: layer(START, a))(A), 1e-6, torch.tensor([1.0, 0.0], dtype=F64)
    assert torch.allclose(found[:, 0], (run(A + h * e) - run(A - h * e)) / (2 * h), rtol=1e-7)


def test_steps_of_least_squares_and_games_that_have_no_sense_are_refused_with_remedies_that_work() -> None:
    way, a = bilevel.OneStep(), A.clone().requires_grad_()
    with pytest.raises(bilevel.ArgumentError, match=r"expected hessian=bilevel\.FullHessian.* leave hessian or diff"):
        fit(way, hessian=bilevel.GaussNewtonHessian())(START, a)
    assert fit(None, hessian=bilevel.GaussNewtonHessian())(START, a).requires_grad
    with pytest.raises(bilevel.ArgumentError, match=r"solver=bilevel.GradientDescent.* leave it out"):
        fit(bilevel.Unrolled(), solver=bilevel.LevenbergMarquardt())(START, a)
    for refused in (fit(way, lower=0.0), duel(way, lower=0.0), duel(way, prox=bilevel.prox.L1(0.1))):
        with pytest.raises(bilevel.ArgumentError, match=r"bounds or constraints, got OneStep.* leave it out"):
            refused(START, a)
    for refused in (
        duel,
        lambda way, **settings: bilevel.root(lambda x, a: x - mapping(x, a), differentiation=way, **settings),
    ):
        with pytest.raises(bilevel.ArgumentError, match="got Newton; leave solver out, or differentiate by Implicit"):
            refused(bilevel.Unrolled(), solver=bilevel.Newton())(START, a)
        assert refused(bilevel.Truncated(1), solver=bilevel.Newton())(START, a).requires_grad


def test_a_failed_problem_is_nan_under_that_policy_and_spoils_no_other() -> None:
    layer = bilevel.fixed_point(
        lambda x, a: a * x + 1,
        solver=bilevel.FixedPointIteration(),
        differentiation=bilevel.Unrolled(),
        on_failure="nan",
    )
    found = torch.func.vmap(layer, in_dims=(None, 0))(torch.zeros((), dtype=F64), torch.tensor([0.5, 3.0], dtype=F64))
    assert found[0].isfinite() and found[1].isnan()


@pytest.mark.parametrize(
    "way", [bilevel.Unrolled(), bilevel.Truncated(3), bilevel.OneStep(), bilevel.PhantomGradient()]
)
def test_the_derivative_of_a_failed_problem_is_nan_under_that_policy(way) -> None:
    layer = bilevel.argmin(
        objective, solver=bilevel.GradientDescent(lr=5.0, max_steps=30), differentiation=way, on_failure="nan"
    )
    both = torch.stack([A, torch.zeros_like(A)])
    found = torch.func.vmap(torch.func.jacrev(lambda a: layer(START, a)))(both)
    assert bool(found[0].isnan().all())


def test_each_problem_of_a_batch_is_unrolled_for_its_own_steps() -> None:
    layer = bilevel.argmin(
        lambda x, a: ((x - a) ** 2).sum() + (x**4).sum(),
        solver=bilevel.GradientDescent(lr=0.05, max_steps=500),
        tolerance=bilevel.Tolerance(delta=1e-2),
        differentiation=bilevel.Unrolled(),
    )
    both = torch.stack([A, 0.1 * A, torch.zeros_like(A)])  # the last begins at its solution, and alone would be refused
    taken = [int(layer.solve(START, a).report.iterations) for a in both[:2]]
    assert taken[0] != taken[1]
    jacobian = torch.func.jacrev(lambda a: layer(START, a))
    for transform, dims in (
        (torch.func.vmap, 0),
        (lambda f, in_dims: torch.func.vmap(torch.func.vmap(f), in_dims=1), 1),
    ):
        given = both if dims == 0 else both[:, None]
        batched = transform(lambda a: layer(START, a), in_dims=dims)(given).reshape(3, 2)
        slopes = transform(jacobian, in_dims=dims)(given).reshape(3, 2, 2)
        for number in (0, 1):
            assert torch.allclose(batched[number], layer(START, both[number]), rtol=1e-12)
            assert torch.allclose(slopes[number], jacobian(both[number]), rtol=1e-12)
        assert bool((slopes[2].diagonal() != 0).any())


def test_a_damping_of_one_is_the_largest() -> None:
    assert bilevel.PhantomGradient(damping=1.0).damping == 1.0
    with pytest.raises(
        bilevel.ArgumentError,
        match=r"expected damping to be a number in \(0.0, 1.0\], got 1.1; write for example damping=0.5",
    ):
        bilevel.PhantomGradient(damping=1.1)


def unrolled_ridge() -> Ridge:
    return Ridge(solver=bilevel.GradientDescent(0.02, 5000), differentiation=bilevel.Unrolled())


def test_a_warm_start_does_not_shorten_what_is_unrolled() -> None:
    data, outer = ridge_data(), torch.tensor(-1.0, dtype=F64)
    exact = Ridge().hypergradient(outer, data, init=START).grad
    problem = unrolled_ridge()
    problem.hypergradient(outer + 1e-9, data, init=START)
    assert torch.allclose(problem.hypergradient(outer, data).grad, exact, rtol=1e-7)
    loose = bilevel.argmin(
        objective,
        solver=bilevel.GradientDescent(lr=0.1, max_steps=500),
        tolerance=bilevel.Tolerance(delta=1e-3),
        differentiation=bilevel.Unrolled(),
        warm_start=True,
    )
    first = slope(loose, A)
    loose(START, A * 1.001)
    a = A.clone().requires_grad_()
    (second,) = torch.autograd.grad(loose(START, a).sum(), a)
    assert torch.equal(first, second)


def test_the_gradient_check_sees_the_bias_of_one_step_and_none_of_unrolling() -> None:
    one, all_of_them = (
        bilevel.fixed_point(mapping, differentiation=way) for way in (bilevel.OneStep(), bilevel.Unrolled())
    )
    assert not bilevel.testing.check_gradients(one, (START, A)).passed
    assert bilevel.testing.check_gradients(all_of_them, (START, A), rtol=1e-9).passed


class Ridge(bilevel.BilevelProblem):
    def inner_objective(self, inner, outer, data):
        return ((data[0] @ inner - data[1]) ** 2).mean() + outer.exp() * (inner**2).sum()

    def outer_objective(self, inner, outer, data):
        return ((data[2] @ inner - data[3]) ** 2).mean()


def ridge_data() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(*shape, dtype=F64) for shape in ((12, 2), (12,), (12, 2), (12,)))


def test_problems_take_it_too_and_claim_no_bound() -> None:
    data, outer = ridge_data(), torch.tensor(-1.0, dtype=F64)
    exact = Ridge().hypergradient(outer, data, init=START)
    problem = Ridge(solver=bilevel.GradientDescent(lr=0.2, max_steps=300), differentiation=bilevel.Unrolled())
    found = problem.hypergradient(outer, data, init=START)
    assert torch.allclose(found.grad, exact.grad, rtol=1e-8)
    assert not found.certified and found.error_bound != found.error_bound
    with pytest.raises(bilevel.ArgumentError, match="goal"):
        problem.tolerance = bilevel.Tolerance(hypergradient=1e-3)
        problem.hypergradient(outer, data, init=START)


# Answers that are there already.


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_an_answer_is_differentiated_as_the_layer_s_own(dtype: torch.dtype) -> None:
    layer, a = bilevel.argmin(objective), A.to(dtype)
    answer = layer(START.to(dtype), a).detach()
    at = lambda a: layer.at(answer, a)
    own = lambda a: layer(START.to(dtype), a)
    assert torch.equal(at(a), answer)
    rtol = 1e-8 if dtype == F64 else 1e-4
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(transform(at)(a), transform(own)(a), rtol=rtol)
    assert torch.allclose(
        torch.func.hessian(lambda a: at(a).sum())(a),
        torch.func.hessian(lambda a: own(a).sum())(a),
        rtol=rtol,
        atol=rtol,
    )


def test_answers_in_a_batch_are_judged_one_by_one() -> None:
    layer = bilevel.argmin(objective, on_failure="nan")
    batch = torch.stack([A, 2 * A])
    answers = torch.func.vmap(lambda a: bilevel.argmin(objective)(START, a))(batch)
    wrong = answers.clone()
    wrong[1] += 1
    found = torch.func.vmap(layer.at)(wrong, batch)
    assert torch.equal(found[0], answers[0]) and bool(found[1].isnan().all())


def test_an_answer_that_is_none_is_refused_and_the_remedy_works() -> None:
    layer = bilevel.argmin(objective)
    with pytest.raises(bilevel.SolveError, match="is no solution") as refused:
        layer.at(START, A)
    assert "init" in str(refused.value) and "the layer's function is your solver's" in str(refused.value)
    with pytest.raises(bilevel.SolveError):
        bilevel.argmin(objective, tolerance=bilevel.Tolerance(delta=1e-8)).at(layer(START, A) + 1e-4, A)
    rough = layer(START, A).detach() + 1e-4
    assert torch.equal(layer.at(rough, A), rough)
    assert torch.allclose(bilevel.argmin(objective, tolerance=bilevel.Tolerance(delta=1.0)).at(rough, A), rough)


def test_an_answer_is_judged_where_the_function_is_infinite_at_zero() -> None:
    layer = bilevel.argmin(lambda x, a: (x * x.log() - a * x).sum())  # x = exp(a − 1), and the gradient at 0 is −inf
    a = A.clone().requires_grad_()
    exact = (A - 1).exp()
    (found,) = torch.autograd.grad(layer.at(exact * (1 + 1e-9), a).sum(), a)
    assert torch.allclose(found, exact, rtol=1e-8)
    with pytest.raises(bilevel.SolveError, match="is no solution"):
        layer.at(1.5 * exact, a)


FLAT = torch.tensor([1.0, 1e-4], dtype=torch.float64)


@pytest.mark.parametrize(
    "layer",
    [
        bilevel.argmin(lambda x, a: (FLAT * (x**4 / 4 - a * x)).sum()),
        bilevel.root(lambda x, a: FLAT * (x**3 - a)),
        bilevel.fixed_point(lambda x, a: x - FLAT * (x**3 - a)),
        bilevel.least_squares(lambda x, a: FLAT.sqrt() * (x**3 - a)),
    ],
)
def test_an_answer_that_is_wrong_in_a_flat_direction_is_refused(layer) -> None:
    a = torch.ones(2, dtype=torch.float64)
    near = torch.tensor([1.0, 1.001], dtype=torch.float64)
    found = torch.func.jacrev(lambda a: layer.at(near, a))(a)
    assert torch.allclose(found, torch.eye(2, dtype=torch.float64) / 3, rtol=5e-3)
    with pytest.raises(bilevel.SolveError, match="is no solution"):
        layer.at(torch.tensor([1.0, 3.0], dtype=torch.float64), a)


def test_an_early_answer_that_may_be_shifted_is_accepted() -> None:
    """The Hessian is singular: Newton's next step is the shortest one."""
    logits = bilevel.argmin(lambda x, a: torch.logsumexp(x, 0) - (torch.softmax(a, 0) * x).sum())
    answer = torch.tensor([1.0, 2.0, 3.001], dtype=torch.float64) + 5
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x = logits.at(answer, a)
    (found,) = torch.autograd.grad(x[2] - x[0], a)
    assert torch.allclose(found, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), atol=3e-3)


@pytest.mark.parametrize("way", [bilevel.OneStep(), bilevel.Truncated(3), bilevel.PhantomGradient(steps=2)])
def test_steps_from_an_answer_are_those_of_the_layer_s_own_solver(way) -> None:
    descent = bilevel.GradientDescent(lr=0.1, max_steps=2000)
    layers = (
        bilevel.fixed_point(mapping, differentiation=way),
        bilevel.argmin(objective, solver=descent, differentiation=way),
    )
    for layer in layers:
        answer = layer.solve(START, A).value.detach()
        at = torch.func.jacrev(lambda a, layer=layer, answer=answer: layer.at(answer, a))(A).diagonal()
        assert torch.allclose(at, slope(layer, A), rtol=1e-6)


def test_an_answer_given_has_no_steps_to_unroll() -> None:
    layer = bilevel.argmin(objective, differentiation=bilevel.Unrolled())
    with pytest.raises(bilevel.ArgumentError, match=r"expected differentiation=Implicit\(\) or Truncated"):
        layer.at(layer(START, A), A)
    searching = bilevel.argmin(
        objective, solver=bilevel.GradientDescent(0.1, 100, line_search=True), differentiation=bilevel.Unrolled()
    )
    with pytest.raises(bilevel.ArgumentError, match="without a line search"):
        searching(START, A)
    layer.differentiation = bilevel.Truncated(2)
    assert torch.allclose(layer.at(layer(START, A), A), bilevel.argmin(objective)(START, A))


def test_an_answer_is_judged_itself_whatever_was_solved_before() -> None:
    layer = bilevel.argmin(objective, warm_start=True)
    exact = bilevel.argmin(objective)
    layer(START, A)
    with pytest.raises(bilevel.SolveError, match="is no solution"):
        layer.at(START + 3, A)
    answer = exact(START, 2 * A)
    assert torch.equal(layer.at(answer, 2 * A), answer)


def test_a_hypergradient_at_an_answer() -> None:
    data, outer = ridge_data(), torch.tensor(-1.0, dtype=F64)
    exact = Ridge().hypergradient(outer, data, init=START)
    solves: list[int] = []
    problem = Ridge(solver=lambda *args: solves.append(1))
    found = problem.hypergradient(outer, data, at=exact.inner)
    assert not solves and torch.allclose(found.grad, exact.grad, rtol=1e-10)
    with pytest.raises(bilevel.SolveError, match="is no solution"):
        problem.hypergradient(outer, data, at=exact.inner + 1)


# What is done around a call.


def test_auxiliary_output_is_evaluated_at_the_solution_and_differentiable() -> None:
    layer = bilevel.argmin(lambda x, a: (objective(x, a), {"residual": x - a}), has_aux=True)
    a = A.clone().requires_grad_()
    x, aux = layer(START, a)
    assert torch.equal(aux["residual"], x - a)
    (found,) = torch.autograd.grad(aux["residual"].sum(), a)
    assert torch.allclose(found, slope(bilevel.argmin(objective), A) - 1)
    mapped = torch.func.vmap(lambda a: layer.solve(START, a))(torch.stack([A, A]))
    assert mapped.aux["residual"].shape == (2, 2)
    # A solution that is there already comes back as the layer's own does.
    again, beside = layer.at(x.detach(), a)
    assert torch.equal(again, x) and torch.equal(beside["residual"], aux["residual"])
    assert torch.allclose(torch.autograd.grad(beside["residual"].sum(), a)[0], found)
    both, batch = torch.func.vmap(layer.at)(torch.stack([x, x]).detach(), torch.stack([A, A]))
    assert torch.equal(batch["residual"], both - A) and torch.allclose(both[1], x)
    with pytest.raises(bilevel.ArgumentError, match="pair"):
        bilevel.argmin(objective, has_aux=True)(START, A)


def test_prepared_arguments_are_made_once_and_differentiated() -> None:
    calls = []

    def gram(X: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return X.T @ X, s

    layer = bilevel.argmin(lambda w, K, s: w @ K @ w + s * (w**2).sum() - w.sum(), prepare=gram)
    X = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s = torch.tensor(0.5, dtype=F64, requires_grad=True)
    layer(torch.zeros(3, dtype=F64), X, s)
    assert calls == [1]
    assert torch.autograd.gradcheck(lambda X, s: layer(torch.zeros(3, dtype=F64), X, s), (X, s))


def test_a_problem_prepares_once_a_call_with_derivatives_and_bounds() -> None:
    class Kernel(bilevel.BilevelProblem):
        made = 0

        def prepare(self, outer, data):
            self.made += 1
            distance = (data[0][:, None] - data[0][None]) ** 2
            return torch.exp(-outer.exp() * distance.sum(-1)), data[1]

        def inner_objective(self, inner, outer, data):
            return ((data[0] @ inner - data[1]) ** 2).sum() + 0.1 * (inner**2).sum()

        def outer_objective(self, inner, outer, data):
            return (data[0] @ inner).square().sum()

    data, outer, start = ridge_data()[:2], torch.tensor(-1.0, dtype=F64), torch.zeros(12, dtype=F64)
    problem = Kernel()
    found = problem.hypergradient(outer, data, init=start)
    assert problem.made == 1
    h = 1e-5
    values = [float(problem(outer + step, data, init=start)) for step in (h, -h)]
    assert float(found.grad) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)
    assert found.error_bound < 1e-6
    with pytest.raises(bilevel.ArgumentError, match="batch_dims"):
        Kernel(batch_dims=0)(outer, data, init=start)


class RandomFeatures(bilevel.BilevelProblem):
    def prepare(self, outer, data):
        return torch.cos(data @ torch.randn(2, 5, dtype=F64))

    def inner_objective(self, inner, outer, data):
        return ((data @ inner - 1) ** 2).sum() + outer.exp() * (inner**2).sum()

    def outer_objective(self, inner, outer, data):
        return (inner**2).sum()


def test_a_random_preparation_is_refused_as_its_error_bound_would_be_of_another_problem() -> None:
    data, outer, start = ridge_data()[0], torch.tensor(-1.0, dtype=F64), torch.zeros(5, dtype=F64)
    with pytest.raises(bilevel.StochasticObjectiveError, match="expected prepare to be deterministic"):
        RandomFeatures()(outer, data[:, :2], init=start)
    with pytest.raises(bilevel.StochasticObjectiveError, match="expected prepare to be deterministic"):
        RandomFeatures().hypergradient(outer, data[:, :2], init=start)
    with pytest.warns(bilevel.FailureWarning, match="prepare"):
        assert bool(torch.isfinite(RandomFeatures(on_failure="warn")(outer, data[:, :2], init=start)))
    assert bool(torch.isnan(RandomFeatures(on_failure="nan")(outer, data[:, :2], init=start)))


def test_an_error_in_a_preparation_names_the_arguments() -> None:
    layer = bilevel.argmin(objective, prepare=lambda a: a @ torch.ones(7, dtype=F64))
    with pytest.raises(bilevel.ShapeError, match=r"arguments of prepare .* args\[0\] \(2,\)"):
        layer(START, A)

    class Ridge(RandomFeatures):
        def prepare(self, outer, data):
            return data @ torch.ones(7, dtype=F64)

    with pytest.raises(bilevel.ShapeError, match=r"arguments of prepare .* data \(3, 2\)"):
        Ridge()(A[0], torch.ones(3, 2, dtype=F64), init=START)


def test_a_module_that_cannot_be_called_with_other_parameters_is_refused() -> None:
    def fit(net, x):
        return ((net(x) - 1) ** 2).sum()

    class Lazy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = torch.nn.LazyLinear(1, dtype=F64)

        def forward(self, x):
            return ((self.inside(x) - 1) ** 2).sum() + (x**2).sum()

    lazy = Lazy()
    with pytest.raises(bilevel.ArgumentError, match=r"inside\.weight has none before its first call"):
        bilevel.argmin(lazy)(START)
    with pytest.raises(bilevel.ArgumentError, match="before its first call"):
        bilevel.argmin(fit)(torch.nn.LazyLinear(1), A)
    lazy(START)
    assert bool(torch.isfinite(bilevel.argmin(lazy)(START)).all())
    parallel = torch.nn.DataParallel(lazy)
    with pytest.raises(bilevel.ArgumentError, match=r"pass its \.module"):
        bilevel.argmin(parallel)(START)


def test_a_module_is_an_objective_whose_parameters_are_differentiated() -> None:
    class Spring(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stiffness = torch.nn.Parameter(torch.tensor(2.0, dtype=F64))
            self.register_buffer("rest", torch.tensor(0.5, dtype=F64))

        def forward(self, x: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
            return (0.5 * self.stiffness * (x - self.rest) ** 2 - load * x).sum()

    spring = Spring()
    layer = bilevel.argmin(spring)
    x = layer(torch.zeros((), dtype=F64), torch.tensor(1.0, dtype=F64))
    x.backward()
    assert x.item() == pytest.approx(1.0) and spring.stiffness.grad.item() == pytest.approx(-0.25)  # −load / k²
    assert [id(parameter) for parameter in layer.function.parameters()] == [id(spring.stiffness)]
    loads = torch.tensor([1.0, 3.0], dtype=F64)
    assert torch.allclose(torch.func.vmap(layer, in_dims=(None, 0))(torch.zeros((), dtype=F64), loads), 0.5 + loads / 2)


def test_a_module_is_an_unknown_and_comes_back_solved() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1, dtype=F64)
    before = net.weight.detach().clone()
    X, y = torch.randn(10, 2, dtype=F64), torch.randn(10, 1, dtype=F64)
    fit = bilevel.argmin(
        lambda net, X, y, s: ((net(X) - y) ** 2).sum() + s * sum((p**2).sum() for p in net.parameters())
    )
    s = torch.tensor(0.7, dtype=F64, requires_grad=True)
    solved = fit(net, X, y, s)
    assert torch.equal(net.weight, before)
    with_one = torch.cat([X, torch.ones(10, 1, dtype=F64)], 1)
    expected = torch.linalg.solve(with_one.T @ with_one + s * torch.eye(3, dtype=F64), with_one.T @ y)
    assert torch.allclose(solved.weight[0], expected[:2, 0])
    assert [name for name, _ in solved.named_parameters()] == ["weight", "bias"]
    with pytest.raises(AttributeError, match=r"net\['weight'\], and the rest of the module is net.module"):
        solved.in_features  # noqa: B018
    found, reference = (torch.autograd.grad(made, s)[0] for made in (solved(X).sum(), (with_one @ expected).sum()))
    assert torch.allclose(found, reference)
    with pytest.raises(bilevel.ArgumentError, match="unfreeze"):
        fit(net.requires_grad_(False), X, y, s)


def test_a_warm_start_begins_at_the_last_solution() -> None:
    layer = bilevel.argmin(objective, solver=bilevel.LBFGS(), warm_start=True)
    far = torch.full((2,), 9.0, dtype=F64)
    first, second = (int(layer.solve(far, A).report.iterations) for _ in range(2))
    assert second < first
    assert layer(torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)).shape == (3,)
