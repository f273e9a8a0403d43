"""The differentiation rule, in every argument, against an oracle that knows nothing of it; ``transforms/`` has the transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import bilevel

from .problems import FAMILIES, Family, arguments

F64 = torch.float64

family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@family
def test_gradcheck_in_both_modes_and_batched(family: Family) -> None:
    inputs = [t.clone().requires_grad_(True) for t in arguments()]
    assert gradcheck(family.implicit(), inputs, check_forward_ad=True, check_batched_grad=True, atol=1e-6, rtol=1e-4)


@family
def test_gradgradcheck_reverse_and_forward_over_reverse(family: Family) -> None:
    inputs = [t.clone().requires_grad_(True) for t in arguments()]
    assert gradgradcheck(
        family.implicit(), inputs, check_fwd_over_rev=True, check_batched_grad=True, atol=1e-5, rtol=1e-4
    )


TRANSFORMS = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacrev of hessian": lambda f: jacrev(hessian(f)),
}


@family
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("number", [0, 1, 2], ids=["X", "y", "s"])
def test_transforms_agree_with_the_unrolled_oracle(family: Family, name: str, number: int) -> None:
    if name == "jacrev of hessian" and number == 0:
        number = 2  # 18³ entries of a third derivative prove no more than one does
    inputs = list(arguments())

    def through(function):
        return TRANSFORMS[name](lambda t: function(*inputs[:number], t, *inputs[number + 1 :]))(inputs[number])

    torch.testing.assert_close(through(family.implicit()), through(family.reference), atol=1e-9, rtol=1e-8)


@family
@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (None, None, 0), (1, 0, 0)])
@pytest.mark.parametrize("inner", ["value", "jacrev", "jacfwd", "hessian"])
def test_vmap_equals_a_loop(family: Family, in_dims: tuple[int | None, ...], inner: str) -> None:
    size = 4
    X, y, s = arguments()
    generator = torch.Generator().manual_seed(5)

    def widen(t: torch.Tensor, dim: int | None) -> torch.Tensor:
        if dim is None:
            return t
        return torch.stack(
            [t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for _ in range(size)], dim
        )

    inputs = [widen(t, dim) for t, dim in zip((X, y, s), in_dims, strict=True)]
    f = family.implicit()
    one = f if inner == "value" else TRANSFORMS[inner](f, argnums=2)
    looped = torch.stack(
        [one(*(t if d is None else t.select(d, k) for t, d in zip(inputs, in_dims, strict=True))) for k in range(size)]
    )
    torch.testing.assert_close(vmap(one, in_dims=in_dims)(*inputs), looped, atol=1e-9, rtol=1e-9)


@family
def test_forward_over_forward_of_different_arguments_is_refused_not_zero(family: Family) -> None:
    X, y, s = arguments()
    f = family.implicit()
    with pytest.raises(bilevel.TransformError):
        jvp(lambda y: jvp(lambda s: f(X, y, s), (s,), (torch.ones_like(s),))[1], (y,), (y,))


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_dtypes_are_those_of_the_arguments(family: Family, dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_(True) for t in arguments(dtype=dtype)]
    x = family.implicit()(*inputs)
    x.sum().backward()
    assert x.dtype == dtype
    exact = [t.detach().double().requires_grad_(True) for t in inputs]
    family.reference(*exact).sum().backward()
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    for mine, reference in zip(inputs, exact, strict=True):
        assert mine.grad is not None and mine.grad.dtype == dtype
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=tolerance, rtol=tolerance)


def test_float64_data_with_a_float32_unknown() -> None:
    X, y, s = (t.requires_grad_(True) for t in arguments())
    layer = bilevel.argmin(lambda w, X, y, s: ((X @ w.double() - y) ** 2).sum() + s.exp() * (w**2).sum())
    w = layer(torch.zeros(3, dtype=torch.float32), X, y, s)
    w.sum().backward()
    assert w.dtype == torch.float32
    assert X.grad.dtype == torch.float64 and bool(torch.isfinite(X.grad).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_the_pullback_is_linear_in_tiny_and_huge_cotangents(scale: float) -> None:
    X, y, s = arguments()
    y.requires_grad_(True)
    w = FAMILIES[0].implicit()(X, y, s)
    (unit,) = torch.autograd.grad(w, y, torch.ones_like(w), retain_graph=True)
    (scaled,) = torch.autograd.grad(w, y, torch.full_like(w, scale), retain_graph=True)
    torch.testing.assert_close(scaled / scale, unit, atol=1e-12, rtol=1e-10)
    (zero,) = torch.autograd.grad(w, y, torch.zeros_like(w))
    assert bool((zero == 0).all())


def test_one_linearisation_serves_every_right_hand_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.operators import HessianOperator

    formed = []
    original = HessianOperator.dense
    monkeypatch.setattr(HessianOperator, "dense", lambda self: formed.append(self) or original(self))
    X, y, s = arguments()
    layer = FAMILIES[0].implicit(
        solver=lambda objective, init, *a: FAMILIES[0].reference(*a), linear_solver=bilevel.Exact()
    )
    y.requires_grad_(True)
    w = layer(X, y, s)
    for entry in w:
        torch.autograd.grad(entry, y, retain_graph=True)
    assert len(formed) <= 1
    formed.clear()
    jacrev(lambda y: layer(X, y, s))(y.detach())
    assert len(formed) <= 1


def test_the_forward_factorisation_serves_the_adjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.equations.problem import Problem

    formed = []
    original = Problem._dense
    monkeypatch.setattr(Problem, "_dense", lambda self, x: formed.append(x) or original(self, x))
    X, y, s = arguments()
    layer = bilevel.argmin(lambda w, X, y, s: ((X @ w - y) ** 2).sum() + s.exp() * (w**2).sum())
    free = y.clone().requires_grad_(True)
    w = vmap(layer, in_dims=(None, 0, None, None))(torch.zeros(3, dtype=X.dtype), torch.stack([X, 2 * X]), free, s)
    w.sum().backward()
    assert len(formed) == 1  # Newton's one step; the adjoint borrows its factor
    expected = sum(torch.linalg.solve(Z.T @ Z + s.exp() * torch.eye(3, dtype=X.dtype), Z.T).sum(0) for Z in (X, 2 * X))
    torch.testing.assert_close(free.grad, expected, atol=1e-13, rtol=1e-12)


@pytest.mark.counts
@pytest.mark.parametrize("solver", [bilevel.Newton(), bilevel.GradientDescent(lr=0.2, max_steps=30)])
def test_the_solver_s_last_look_is_the_adjoint_s_linearisation(monkeypatch: pytest.MonkeyPatch, solver: object) -> None:
    """A quadratic is linearised nowhere but at its solution, once; without a derivative to come, no graph is made."""
    from bilevel.equations.problem import Problem

    made = []
    original = Problem.linearize
    monkeypatch.setattr(
        Problem, "linearize", lambda self, x, needs_grad=None: made.append(x) or original(self, x, needs_grad)
    )
    budget = bilevel.Tolerance(delta=None, delta_prime=None)
    layer = bilevel.argmin(
        lambda w, a: ((w - a) ** 2).sum() + 0.5 * (w**2).sum(), solver=solver, linear_solver=bilevel.CG(3),
        tolerance=bilevel.Tolerance() if isinstance(solver, bilevel.Newton) else budget,
    )  # fmt: skip
    a = torch.arange(1.0, 4.0, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        w = layer(torch.zeros(3, dtype=torch.float64), a)
    assert not made
    w = layer(torch.zeros(3, dtype=torch.float64), a)
    assert len(made) == 1
    torch.testing.assert_close(made[0][0], w.detach())
    (slope,) = torch.autograd.grad(w.sum(), a)
    assert len(made) == 1
    torch.testing.assert_close(slope, torch.full_like(a, 2 / 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 60])
def test_a_checkpoint_around_a_layer_does_not_see_its_steps(steps: int) -> None:
    """What a solver's graphs save is its own: a checkpoint's hooks would compute the whole solve again for each of them."""
    calls = []

    def objective(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return ((w - a) ** 2).sum() + (w**4).sum()

    layer = bilevel.argmin(
        objective, solver=bilevel.GradientDescent(lr=0.05, max_steps=steps), linear_solver=bilevel.CG(),
        tolerance=bilevel.Tolerance(delta=None),
    )  # fmt: skip
    a = torch.linspace(0.5, 1.0, 3, dtype=torch.float64, requires_grad=True)
    start = torch.zeros(3, dtype=torch.float64)
    plain = torch.autograd.grad(layer(start, a).square().sum(), a)
    once = len(calls)
    calls.clear()
    w = torch.utils.checkpoint.checkpoint(lambda a: layer(start, a).square().sum(), a, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(w, a), plain)
    assert len(calls) <= 2 * once + 4


def test_a_last_look_beside_the_solution_is_not_used() -> None:
    """The last step leads where the objective is not defined: the solution is the point before it."""
    layer = bilevel.argmin(
        lambda w, a: (a * w.sqrt()).sum(), solver=bilevel.GradientDescent(lr=1.0, max_steps=1), on_failure="ignore",
        tolerance=bilevel.Tolerance(delta=None, delta_prime=None),
    )  # fmt: skip
    a = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.04, 0.09], dtype=torch.float64)
    w = layer(start, a)
    torch.testing.assert_close(w.detach(), start)
    (slope,) = torch.autograd.grad(w.sum(), a)
    # H = −a/(4 w√w) and B = 1/(2√w), so that −B/H = 2w/a.
    torch.testing.assert_close(slope, 2 * start / a.detach(), atol=1e-9, rtol=1e-9)


def test_a_borrowed_factorisation_that_does_not_fit_is_given_back() -> None:
    from bilevel.linear.exact import Exact, offer_factor
    from bilevel.operators import DenseOperator

    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    A = A @ A.mT + torch.eye(5, dtype=torch.float64)
    b = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for wrong in (A + 1e-6 * torch.eye(5), 3 * A, torch.eye(5, dtype=torch.float64).expand(2, 5, 5)):
        operator = DenseOperator(A, symmetric=True)
        offer_factor(operator, torch.linalg.cholesky(wrong))
        torch.testing.assert_close(Exact()(operator, b), torch.linalg.solve(A, b), atol=1e-12, rtol=1e-11)


def test_a_settled_proposal_was_as_accurate_as_asked() -> None:
    """What rounding leaves of a proposal may be more than was asked for, and is then judged like any other answer."""
    from bilevel.linear._base import solve_linear
    from bilevel.linear.exact import Exact, offer_factor
    from bilevel.operators import DenseOperator
    from bilevel.tolerance import Target

    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    A = A @ A.mT + torch.eye(6, dtype=torch.float64)
    b = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    b[1] = 0.0  # nothing to solve for is no reason to refuse the others
    for needs_grad, status in ((1e-10, bilevel.Status.CONVERGED), (1e-300, bilevel.Status.STAGNATED)):
        operator = DenseOperator(A, symmetric=True)
        offer_factor(operator, torch.linalg.cholesky(A), exact=True)
        outcome = solve_linear(Exact(), operator, b, Target(absolute=needs_grad, asked=True), product=operator.matvec)
        torch.testing.assert_close(outcome.x, torch.linalg.solve(A, b), atol=1e-13, rtol=1e-11)
        torch.testing.assert_close(outcome.residual_norm, (b - operator.matvec(outcome.x)).norm(dim=-1))
        torch.testing.assert_close(outcome.scale, b.norm(dim=-1))
        torch.testing.assert_close(outcome.threshold, needs_grad * b.norm(dim=-1).clamp(max=1))
        assert outcome.status.tolist() == [status, bilevel.Status.CONVERGED, status]


def test_a_proposal_that_does_not_fit_is_not_taken() -> None:
    from bilevel.linear._base import solve_linear
    from bilevel.linear.exact import Exact, offer_factor
    from bilevel.operators import DenseOperator
    from bilevel.tolerance import Target

    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    A = A @ A.mT + torch.eye(5, dtype=torch.float64)
    b = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for matrix, taken in ((A, True), (A + 1e-9 * torch.eye(5), False), (3 * A, False)):
        for size in (1.0, 1e-200, 1e200, float("nan")):
            operator, made = DenseOperator(A, symmetric=True), []

            def product(v: torch.Tensor, operator=operator, made=made) -> torch.Tensor:
                made.append(v)
                return operator.matvec(v)

            offer_factor(operator, torch.linalg.cholesky(matrix), exact=True)
            outcome = solve_linear(Exact(), operator, size * b, Target(), product=product)
            assert len(made) == (size == 1.0)  # of other sizes squares would be lost
            assert (bool(made) and torch.equal(outcome.x, made[0])) == (taken and size == 1.0)
            if size == size:
                torch.testing.assert_close(outcome.x / size, torch.linalg.solve(A, b), atol=1e-12, rtol=1e-11)
                assert bool((outcome.status == bilevel.Status.CONVERGED).all())
            else:
                assert bool((outcome.status == bilevel.Status.NOT_FINITE).all())


@pytest.mark.counts
def test_after_a_single_newton_step_the_derivative_is_one_reverse_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(6, 9, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)

    def ridge(w: torch.Tensor, t: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((X @ w - y) ** 2).sum() + (t.exp() * w**2).sum()

    def logistic(w: torch.Tensor, t: torch.Tensor, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(X @ w * y).sum() + (t.exp() * w**2).sum()

    def derivative(objective, solver, start):
        """Return the solution, the gradients by every argument, and how many reverse passes they took."""
        layer = bilevel.argmin(objective, solver=solver, tolerance=bilevel.Tolerance(delta=1e-10))
        inputs = (zero.clone().requires_grad_(), X.clone().requires_grad_(), y.clone().requires_grad_())
        w = vmap(layer, in_dims=(0, None, 0, 0))(start, *inputs)
        passes, real = [], bilevel._torch.reverse._engine_run_backward

        def counted(*args, **kwargs):
            passes.append(1)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(bilevel._torch.reverse, "_engine_run_backward", counted)
            w.backward(w.detach() ** 2)
        return w.detach(), torch.cat([tensor.grad.reshape(-1) for tensor in inputs]), len(passes)

    far = zero.expand(6, 4)
    for objective in (ridge, logistic):
        # Where the solver is not Newton's method there is nothing to propose.
        solution, reference, _ = derivative(objective, bilevel.LBFGS(), far)
        # Near its solution, one step is enough for what is not quadratic too, and its matrices are not those at the answer.
        for start in (far, solution + 1e-6):
            _, gradients, passes = derivative(objective, bilevel.Newton(), start)
            torch.testing.assert_close(gradients, reference, atol=1e-9, rtol=1e-9)
            assert (passes == 1) == (objective is ridge)


def test_batch_norm_in_the_objective_is_differentiated_rightly() -> None:
    # torch 2.13: a vjp or jvp of vmap(grad(f)) is silently wrong, here by a half and more, where f holds a batch norm whose
    # input, weight and bias are all batched, as a network's are in meta-learning. A hand-written norm is right.
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    towards = torch.randn(12, generator=generator, dtype=torch.float64)

    def of_torch(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.batch_norm(z, None, None, weight, bias, training=True)

    def by_hand(z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        centred = z - z.mean((0, 2, 3), keepdim=True)
        scaled = centred / (centred.pow(2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return scaled * weight.reshape(1, 2, 1, 1) + bias.reshape(1, 2, 1, 1)

    def with_norm(norm):
        def objective(v: torch.Tensor, images: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            # s reaches what is normalised, so that ∂_s ∇G differentiates the norm twice.
            seen = torch.nn.functional.conv2d(images + s * images**2, v[:8].reshape(2, 1, 2, 2))
            made = norm(seen, v[8:10], v[10:])
            places = torch.linspace(0, 1, 3, dtype=v.dtype)
            return (torch.nn.functional.softplus(made) ** 2 * places).mean() + ((v - s * towards) ** 2).sum()

        return objective

    layer = bilevel.argmin(with_norm(of_torch))
    s, start = torch.tensor(0.8, dtype=torch.float64), 0.5 * towards

    def batched(s: torch.Tensor) -> torch.Tensor:
        return vmap(lambda image: layer(start, image, s))(images)

    from . import oracles

    solutions = batched(s)

    def oracle(s: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                oracles.newton_argmin(with_norm(by_hand), at, image, s, steps=2)
                for at, image in zip(solutions, images, strict=True)
            ]
        )

    expected = jacrev(oracle)(s)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(batched)(s), expected, atol=1e-9, rtol=1e-8)
    free = s.clone().requires_grad_(True)
    (plain,) = torch.autograd.grad(batched(free).sum(), free, create_graph=True)
    torch.testing.assert_close(plain.detach(), expected.sum(), atol=1e-9, rtol=1e-8)
    # A second derivative of the solution takes the third of the objective. That of torch's batch norm is wrong, plainly.
    torch.testing.assert_close(jacrev(jacrev(batched))(s), jacrev(jacrev(oracle))(s), atol=1e-8, rtol=1e-7)
    (twice,) = torch.autograd.grad(plain, free)
    torch.testing.assert_close(twice, jacrev(jacrev(lambda s: oracle(s).sum()))(s), atol=1e-8, rtol=1e-7)


def test_layer_and_group_norms_are_right() -> None:
    x = torch.tensor([[0.3, -1.0, 2.0, 0.7]], dtype=torch.float64)

    def using(norm):
        layer = bilevel.argmin(lambda w, s: (norm(x * w + s * x**2) ** 3).mean() + 4 * ((w - s) ** 2).sum())
        return lambda s: layer(torch.ones(4, dtype=torch.float64), s)

    s, h = torch.tensor(0.8, dtype=torch.float64), 1e-4
    of_layer = using(lambda z: torch.nn.functional.layer_norm(z, (4,)))
    of_group = using(lambda z: torch.nn.functional.group_norm(z, 2))
    for solve in (of_layer, of_group):
        torch.testing.assert_close(jacrev(solve)(s), (solve(s + h) - solve(s - h)) / (2 * h), atol=1e-6, rtol=1e-6)
        first = jacrev(solve)
        torch.testing.assert_close(jacrev(first)(s), (first(s + h) - first(s - h)) / (2 * h), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_torch_still_gets_the_third_derivative_of_a_norm_wrong(name: str) -> None:
    # When this fails torch is mended, and norms need not be written out.
    x = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)

    def value(t: torch.Tensor) -> torch.Tensor:
        z = x + t * x**2
        if name == "batch_norm":
            return (torch.nn.functional.batch_norm(z.reshape(4, 1), None, None, training=True) ** 3).sum()
        return (torch.nn.functional.layer_norm(z, (4,)) ** 3).sum()

    t, h = torch.tensor(0.4, dtype=torch.float64), 1e-4
    second = grad(grad(value))
    numeric = (second(t + h) - second(t - h)) / (2 * h)
    assert float((grad(second)(t) - numeric).abs()) > 1e-2 * float(numeric.abs())


def test_a_quartic_is_differentiated_by_its_hessian_not_by_gauss_newton() -> None:
    # argmin (a − x)⁴ + (a − x)² is a: the derivative is 1, where Gauss–Newton of the quartic alone would say 1.5.
    layer = bilevel.argmin(lambda x, a: (a - x) ** 4 + (a - x) ** 2)
    a = torch.tensor(2.0, dtype=torch.float64)
    assert grad(lambda a: layer(torch.tensor(0.0, dtype=torch.float64), a))(a).item() == pytest.approx(1.0, abs=1e-9)


def test_a_layer_inside_an_objective() -> None:
    inner = bilevel.argmin(lambda u, x: ((u - x.sin()) ** 2).sum() + (u**4).sum())
    start = torch.zeros(2, dtype=torch.float64)

    def objective(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return ((inner(start, x) - a) ** 2).sum() + 0.5 * (x**2).sum()

    outer = bilevel.argmin(objective)
    a = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a: outer(start, a), a, atol=1e-6, rtol=1e-4)
    batch = torch.stack([a.detach(), 2 * a.detach()])
    torch.testing.assert_close(
        vmap(lambda a: outer(start, a))(batch), torch.stack([outer(start, row) for row in batch]), atol=1e-10, rtol=1e-9
    )


def written(axes: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    def norm(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred / (x.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()

    return norm


@pytest.mark.parametrize(
    ("norm", "by_hand"),
    [
        (torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False), written((0, 2))),
        (torch.nn.LayerNorm((3, 5), elementwise_affine=False), written((1, 2))),
        (torch.nn.InstanceNorm1d(3), written((2,))),
        (lambda x: torch.layer_norm(x, (5,), 2 * torch.ones(5, dtype=F64)), lambda x: 2 * written((2,))(x)),
        (lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False), written((0, 2))),
        (lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False), written((2,))),
    ],
    ids=["batch", "layer", "instance", "torch.layer_norm", "torch.batch_norm", "torch.instance_norm"],
)
def test_norms_have_right_second_derivatives_and_third_ones_in_a_root(norm: Callable, by_hand: Callable) -> None:
    # torch 2.13: third derivatives of these norms are silently wrong (pytorch/pytorch#175754, #186256).
    data = torch.randn(4, 3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))

    def derivatives(norm: Callable) -> list[torch.Tensor]:
        def objective(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return norm((data * w[:, None] + s.exp() * data**2).tanh()).tanh().sum(0).square().mean() + (w**2).sum()

        def residual(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return w + 0.1 * norm((data * w[:, None] + s * data**2).tanh()).tanh().mean((0, 2)) * s - 0.2

        start, s = torch.full((3,), 0.1, dtype=F64), torch.tensor(0.3, dtype=F64)
        argmin, root = bilevel.argmin(objective), bilevel.root(residual)

        def loss(s: torch.Tensor) -> torch.Tensor:
            return argmin(start, s).square().sum()

        free = s.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(loss(free), free, create_graph=True)
        return [
            hessian(loss)(s),
            vmap(hessian(loss))(s[None])[0],
            jvp(grad(loss), (s,), (torch.ones_like(s),))[1],
            torch.autograd.grad(slope, free)[0],
            grad(grad(grad(lambda s: root(start, s).square().sum())))(s),
        ]

    for found, expected in zip(derivatives(norm), derivatives(by_hand), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_norms_with_running_statistics_keep_them_under_every_transform() -> None:
    norm = torch.nn.BatchNorm1d(3).double().requires_grad_(False)
    norm.running_mean, norm.running_var = torch.randn(3, dtype=F64), torch.rand(3, dtype=F64) + 0.5
    norm.eval()
    data = torch.randn(4, 3, dtype=F64)
    layer = bilevel.argmin(lambda w, s: (norm(data * w) - s).tanh().square().sum() + (w**2).sum())
    s = torch.tensor(0.3, dtype=F64, requires_grad=True)
    layer(torch.zeros(3, dtype=F64), s).sum().backward()
    torch.testing.assert_close(grad(lambda s: layer(torch.zeros(3, dtype=F64), s).sum())(s.detach()), s.grad)
