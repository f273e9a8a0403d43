"""Complex tensors, as data, as differentiable arguments and as unknowns, against closed forms and differences.

torch's gradient of a real loss by a complex tensor z is ∂L/∂Re z + i ∂L/∂Im z. The references here are plain torch code under the same autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacrev, jvp, vmap

import bilevel
import bilevel.testing
from bilevel.pytree import Raveler

F64, C128 = torch.float64, torch.complex128
N = 6


def random(*shape: int, seed: int = 0, dtype: torch.dtype = C128) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


MASK = torch.tensor([1, 1, 0, 1, 0, 1], dtype=F64)


def mri(x: torch.Tensor, k: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Undersampled Fourier data k of a real image x, with a smoothness penalty."""
    misfit = MASK.to(x.dtype) * (torch.fft.fft(x, norm="ortho") - k)
    # Not .abs() ** 2, of which torch makes NaN in third derivatives at zero, where the mask is.
    return (torch.view_as_real(misfit) ** 2).sum() + strength * (torch.diff(x) ** 2).sum() + 0.01 * (x**2).sum()


def mri_closed(k: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    fourier = torch.fft.fft(torch.eye(N, dtype=C128), norm="ortho", dim=0)
    differences = torch.diff(torch.eye(N, dtype=F64), dim=0)
    matrix = (fourier.mH @ torch.diag(MASK).to(C128) @ fourier).real + strength * differences.T @ differences
    return torch.linalg.solve(matrix + 0.01 * torch.eye(N, dtype=F64), (fourier.mH @ (MASK * k)).real)


def least_squares(x: torch.Tensor, A: torch.Tensor, b: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return ((A @ x - b).abs() ** 2).sum() + strength * (x.abs() ** 2).sum()


def least_squares_closed(A: torch.Tensor, b: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(A.shape[1], dtype=A.dtype)
    return torch.linalg.solve(A.mH @ A + strength * eye, A.mH @ b)


STRENGTH = torch.tensor(0.3, dtype=F64)
A, B = random(7, 3, seed=1), random(7, seed=2)

# name: (the layer as a function of its tensors, the same in closed form, the tensors)
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "real image, complex data": (
        lambda k, s: bilevel.argmin(mri)(torch.zeros(N, dtype=F64), k, s), mri_closed, (random(N), STRENGTH),
    ),
    "complex argmin": (
        lambda a, b, s: bilevel.argmin(least_squares)(torch.zeros(3, dtype=C128), a, b, s), least_squares_closed,
        (A, B, STRENGTH),
    ),
    "complex root": (
        lambda a, b: bilevel.root(lambda z, a, b: a @ z - b.conj())(torch.zeros(3, dtype=C128), a, b),
        lambda a, b: torch.linalg.solve(a, b.conj()), (A[:3], B[:3]),
    ),
    "complex fixed point": (
        lambda a, b: bilevel.fixed_point(lambda z, a, b: a @ z / 9 + b)(torch.zeros(3, dtype=C128), a, b),
        lambda a, b: torch.linalg.solve(torch.eye(3, dtype=C128) - a / 9, b), (A[:3], B[:3]),
    ),
    "complex linear solve": (
        lambda a, b: bilevel.linear_solve(lambda z, a: a @ z)(b, a), torch.linalg.solve, (A[:3], B[:3]),
    ),
    "Hermitian linear solve": (
        lambda a, b: bilevel.linear_solve(lambda z, a: (a + a.mH) @ z + 9 * z, symmetric=True)(b, a),
        lambda a, b: torch.linalg.solve(a + a.mH + 9 * torch.eye(3, dtype=C128), b), (A[:3], B[:3]),
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: Any) -> tuple[Callable[..., Any], Callable[..., Any], tuple[torch.Tensor, ...]]:
    return CASES[request.param]


def close(mine: Any, expected: Any) -> None:
    torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)


def test_the_value_and_the_reverse_derivatives_of_two_orders(case: Any) -> None:
    layer, closed, given = case
    close(layer(*given), closed(*given))
    tensors = [t.clone().requires_grad_(True) for t in given]
    assert gradcheck(layer, tensors, atol=1e-6, check_batched_grad=True)
    assert gradgradcheck(layer, tensors, atol=1e-6)


def test_gradients_follow_torch_s_convention(case: Any) -> None:
    layer, closed, given = case
    weights = random(*closed(*given).shape, seed=5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x * weights).real.sum() + (x.abs() ** 4).sum()

    for _ in range(4):  # the later ones are replayed
        found = []
        for function in (layer, closed):
            tensors = [t.clone().requires_grad_(True) for t in given]
            found.append(torch.autograd.grad(loss(function(*tensors)), tensors))
        close(found[0], found[1])


def test_transforms(case: Any) -> None:
    layer, closed, given = case
    tangents = tuple(random(*t.shape, seed=7).to(t.dtype) if t.is_complex() else t * 0 + 0.5 for t in given)
    close(jvp(layer, given, tangents)[1], jvp(closed, given, tangents)[1])
    batch = torch.stack([given[0], 2 * given[0], given[0].conj()])
    rest = given[1:]
    close(vmap(lambda t: layer(t, *rest))(batch), vmap(lambda t: closed(t, *rest))(batch))

    def slope(function: Callable[..., torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        return grad(lambda t: (function(t, *rest).abs() ** 2).sum())(t)

    close(vmap(lambda t: slope(layer, t))(batch), vmap(lambda t: slope(closed, t))(batch))
    direction = tangents[0]

    def curvature(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        return grad(lambda t: (slope(function, t).conj() * direction).real.sum())(given[0])

    close(curvature(layer), curvature(closed))


def test_phase_retrieval() -> None:
    """Magnitudes of a complex signal's measurements: a nonconvex problem whose solutions share a free phase, fixed by a penalty on Im x₀."""
    truth, rows = random(3, seed=3), random(12, 3, seed=4)
    truth = truth * (truth[0].conj() / truth[0].abs())

    def objective(x: torch.Tensor, rows: torch.Tensor, intensities: torch.Tensor) -> torch.Tensor:
        return (((rows @ x).abs() ** 2 - intensities) ** 2).sum() + x[0].imag ** 2

    layer = bilevel.argmin(objective)
    start = truth + 0.05 * random(3, seed=6)
    rows.requires_grad_(True)
    intensities = ((rows.detach() @ truth).abs() ** 2).requires_grad_(True)
    x = layer(start, rows, intensities)
    close(x.detach(), truth)
    to_rows, to_intensities = torch.autograd.grad(x.real.sum(), (rows, intensities))
    step = 1e-5
    along, by = random(12, 3, seed=8), random(12, seed=9).real
    up = layer(start, rows.detach() + step * along, intensities.detach() + step * by)
    down = layer(start, rows.detach() - step * along, intensities.detach() - step * by)
    slope = (to_rows.conj() * along).real.sum() + (to_intensities * by).sum()
    assert abs(float(slope - (up - down).real.sum() / (2 * step))) < 1e-6


@pytest.mark.parametrize("solver", [
    bilevel.Newton(), bilevel.LBFGS(), bilevel.ScipyMinimize("L-BFGS-B"), bilevel.GradientDescent(lr=0.02, max_steps=3000),
    bilevel.TorchOptimizer(torch.optim.LBFGS, max_steps=60, lr=1.0), lambda objective, x, *args: least_squares_closed(*args),
], ids=["Newton", "LBFGS", "scipy", "descent", "torch LBFGS", "callable"])  # fmt: skip
def test_every_inner_solver_takes_a_complex_unknown(solver: Any) -> None:
    layer = bilevel.argmin(least_squares, solver=solver, tolerance=bilevel.Tolerance(delta=1e-5), on_failure="ignore")
    x = layer(torch.zeros(3, dtype=C128), A, B, STRENGTH)
    torch.testing.assert_close(x, least_squares_closed(A, B, STRENGTH), atol=1e-4, rtol=0)


def test_iterative_linear_solvers() -> None:
    hermitian = A.mH @ A
    for linear, symmetric in ((bilevel.CG(), True), (bilevel.GMRES(), False), (bilevel.BiCGStab(), False)):
        layer = bilevel.linear_solve(lambda z, a: a @ z, symmetric=symmetric, linear_solver=linear)
        close(layer(B[:3], hermitian), torch.linalg.solve(hermitian, B[:3]))


def test_single_precision() -> None:
    given = tuple(
        t.to(torch.complex64 if t.is_complex() else torch.float32).requires_grad_(True) for t in (A, B, STRENGTH)
    )
    x = bilevel.argmin(least_squares)(torch.zeros(3, dtype=torch.complex64), *given)
    assert x.dtype == torch.complex64
    gradients = torch.autograd.grad((x.abs() ** 2).sum(), given)
    exact = [t.clone().requires_grad_(True) for t in (A, B, STRENGTH)]
    expected = torch.autograd.grad((least_squares_closed(*exact).abs() ** 2).sum(), exact)
    for mine, right, t in zip(gradients, expected, given, strict=True):
        assert mine.dtype == t.dtype
        torch.testing.assert_close(mine.to(right.dtype), right, atol=1e-5, rtol=1e-5)


def test_views_conjugates_and_odd_places_in_memory() -> None:
    layer, plain = bilevel.argmin(least_squares), least_squares_closed
    start = torch.zeros(3, dtype=C128)
    for a in (A.conj(), A.mH.contiguous().mH, random(22, seed=3)[1:].reshape(7, 3), random(3, 7, seed=4).T):
        close(layer(start.conj(), a, B, STRENGTH), plain(a, B, STRENGTH))
    # A real leaf of one number stands before the complex one.
    both = bilevel.argmin(lambda p, a, b, s: least_squares(p["z"], a, b, s) + (p["a"] - s) ** 2)
    found = both({"a": torch.zeros((), dtype=F64), "z": start}, A, B, STRENGTH)
    close((found["z"], found["a"]), (plain(A, B, STRENGTH), STRENGTH))


def test_a_complex_scalar_and_an_empty_unknown() -> None:
    layer = bilevel.argmin(lambda z, a: (z - a).abs() ** 2 + (z.abs() ** 2) / 2)
    a = torch.tensor(3 - 2j, dtype=C128, requires_grad=True)
    z = layer(torch.zeros((), dtype=C128), a)
    close(z.detach(), a.detach() / 1.5)
    close(torch.autograd.grad(z.imag, a)[0], torch.tensor(1j / 1.5, dtype=C128))
    assert layer_of_none().shape == (0,)


def layer_of_none() -> torch.Tensor:
    return bilevel.argmin(lambda z, a: (z.abs() ** 2).sum())(torch.zeros(0, dtype=C128), B)


def test_replays_tell_complex_tensors_from_pairs() -> None:
    """Taken apart, both are the same numbers in the same shape."""
    layer = bilevel.argmin(lambda x, k: ((x - k.abs().sum()) ** 2).sum())
    start, pairs = torch.zeros(2, dtype=F64), torch.view_as_real(B)
    for _ in range(5):
        close(layer(start, B), B.abs().sum().expand(2))
    for _ in range(5):
        close(layer(start, pairs), pairs.abs().sum().expand(2))


def test_ravel_counts_a_complex_number_as_two() -> None:
    tree = {"z": B[:2], "x": torch.ones(1, dtype=torch.float32)}
    flat = bilevel.ravel(tree)
    assert flat.dtype == F64
    close(flat[:4], torch.view_as_real(B[:2]).reshape(-1))
    raveler = Raveler.of(tree, "here")
    back = raveler.unravel(raveler.ravel(tree))
    assert back["z"].dtype == C128
    assert back["x"].dtype == torch.float32
    close(back["z"], tree["z"])
    assert raveler.in_dtype(torch.float32).dtypes == (torch.complex64, torch.float32)
    layer = bilevel.argmin(lambda z, b: (bilevel.ravel(z) ** 2).sum() + ((z - b).abs() ** 2).sum())
    close(layer(torch.zeros(7, dtype=C128), B), B / 2)


class Retrieval(bilevel.BilevelProblem):
    """A gain g and a strength, both learned; complex signal, data and gain."""

    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        rows, y, _ = data
        misfit = (rows @ inner - y * outer["gain"]).abs() ** 2
        return misfit.sum() + outer["strength"].exp() * (inner.abs() ** 2).sum() + 0.1 * (inner.abs() ** 4).sum()

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((inner - data[2]).abs() ** 2).sum() + 0.01 * (outer["gain"].abs() ** 2).sum()


OUTER = {"gain": torch.tensor([1 + 0.5j], dtype=C128), "strength": torch.tensor(0.1, dtype=F64)}
DATA = (random(8, 3, seed=11), random(8, seed=12), random(3, seed=13))
START = torch.zeros(3, dtype=C128)


def by_differences() -> tuple[torch.Tensor, torch.Tensor]:
    step, found = 1e-5, []

    def value(gain: complex, strength: float) -> float:
        outer = {"gain": OUTER["gain"] + gain, "strength": OUTER["strength"] + strength}
        return float(Retrieval()(outer, DATA, init=START))

    for along in ((1, 0), (1j, 0), (0, 1)):
        up, down = (value(sign * step * along[0], sign * step * along[1]) for sign in (1, -1))
        found.append((up - down) / (2 * step))
    return torch.tensor([complex(found[0], found[1])], dtype=C128), torch.tensor(found[2], dtype=F64)


def test_hypergradients_and_their_bounds() -> None:
    gain, strength = by_differences()
    result = Retrieval().hypergradient(OUTER, DATA, init=START)
    for gradient in (result.grad, result.corrected_grad, result.refined().grad):
        assert gradient["gain"].dtype == C128
        torch.testing.assert_close(gradient["gain"], gain, atol=1e-8, rtol=0)
        torch.testing.assert_close(gradient["strength"], strength, atol=1e-8, rtol=0)
    assert result.inner.dtype == result.adjoint.dtype == C128
    assert result.error_bound < 1e-12
    assert "gradient" in str(result)
    loose = Retrieval(tolerance=bilevel.Tolerance(delta=1e-2)).hypergradient(OUTER, DATA, init=START)
    error = max(float((loose.grad[name] - result.grad[name]).abs().max()) for name in OUTER)
    assert error <= loose.error_bound < 1.0


def test_goals_batches_and_calls_of_a_complex_problem() -> None:
    expected = Retrieval().hypergradient(OUTER, DATA, init=START).grad
    goal = bilevel.Tolerance(hypergradient=1e-6, estimates=True)
    met = Retrieval(tolerance=goal).hypergradient(OUTER, DATA, init=START).grad
    torch.testing.assert_close(met["gain"], expected["gain"], atol=1e-6, rtol=0)
    outer = {name: tensor.clone().requires_grad_(True) for name, tensor in OUTER.items()}
    Retrieval(tolerance=goal)(outer, DATA, init=START).backward()
    torch.testing.assert_close(outer["gain"].grad, expected["gain"], atol=1e-6, rtol=0)
    rows, y, target = DATA
    many = (rows, torch.stack([y, 2 * y, y.conj()]), target)
    batched = Retrieval(batch_dims=(None, 0, None)).hypergradient(OUTER, many, init=START.expand(3, 3).clone()).grad
    each = [Retrieval().hypergradient(OUTER, (rows, one, target), init=START).grad["gain"] for one in many[1]]
    close(batched["gain"], sum(each) / 3)


@pytest.mark.parametrize(
    "optimizer", [None, bilevel.MAID(), lambda p: torch.optim.Adam(p, lr=0.1)], ids=["HOAG", "MAID", "Adam"]
)
def test_minimising_over_a_complex_tensor(optimizer: Any) -> None:
    problem = (
        Retrieval()
        if not isinstance(optimizer, bilevel.MAID)
        else Retrieval(tolerance=bilevel.Tolerance(descent=0.5, estimates=True))
    )
    result = bilevel.minimize(problem, OUTER, DATA, init=START, optimizer=optimizer, max_steps=40, on_failure="stop")
    assert result.outer["gain"].dtype == C128
    gradient = Retrieval().hypergradient(result.outer, DATA, init=START).grad
    first = Retrieval().hypergradient(OUTER, DATA, init=START).grad
    assert float(gradient["gain"].abs()) < 0.2 * float(first["gain"].abs())
    again = bilevel.minimize(
        problem, OUTER, DATA, init=START, optimizer=optimizer, max_steps=42, on_failure="stop", resume=result.state
    )
    assert again.outer["gain"].dtype == C128


def test_second_derivatives_of_a_problem_s_loss() -> None:
    def curvature(gain: torch.Tensor) -> torch.Tensor:
        def slope(gain: torch.Tensor) -> torch.Tensor:
            return grad(lambda g: Retrieval()({**OUTER, "gain": g}, DATA, init=START))(gain)

        return grad(lambda g: slope(g).real.sum())(gain)

    def slopes(gain: torch.Tensor) -> torch.Tensor:
        return Retrieval().hypergradient({**OUTER, "gain": gain}, DATA, init=START).grad["gain"].real.sum()

    step, gain = 1e-5, OUTER["gain"]
    expected = [(slopes(gain + step * unit) - slopes(gain - step * unit)) / (2 * step) for unit in (1, 1j)]
    close_to = torch.complex(expected[0], expected[1]).reshape(1)
    torch.testing.assert_close(curvature(gain), close_to, atol=1e-7, rtol=0)


def test_jacobians_by_vectorised_reverse_passes() -> None:
    layer = bilevel.argmin(mri)
    pairs = torch.view_as_real(random(N))  # torch's jacrev wants real inputs
    found = jacrev(lambda k: layer(torch.zeros(N, dtype=F64), torch.view_as_complex(k), STRENGTH))(pairs)
    close(found, jacrev(lambda k: mri_closed(torch.view_as_complex(k), STRENGTH))(pairs))


def test_what_is_not_real_where_it_has_to_be_is_refused() -> None:
    real, complex_ = torch.zeros(3, dtype=F64), B[:3]
    with pytest.raises(
        bilevel.DtypeError, match=r"objective to return a floating-point scalar.*complex128.*return \.real"
    ):
        bilevel.argmin(lambda x, b: ((x - b) ** 2).sum())(real, complex_)
    with pytest.raises(bilevel.DtypeError, match=r"residual to return a real tensor at init.*make init complex"):
        bilevel.root(lambda x, b: x - b)(real, complex_)
    with pytest.raises(bilevel.DtypeError, match=r"mapping to return a real tensor at init\['a'\]"):
        bilevel.fixed_point(lambda x, b: {"a": x["a"] / 2 + b})({"a": real}, complex_)
    # The remedies.
    close(bilevel.argmin(lambda x, b: ((x - b).abs() ** 2).sum())(real, complex_), complex_.real)
    close(bilevel.root(lambda x, b: x - b)(real.to(C128), complex_), complex_)
    close(bilevel.root(lambda x, b: (x - b).real)(real, complex_), complex_.real)
    with pytest.raises(bilevel.ArgumentError, match="expected a symmetric matrix"):  # symmetric, and not Hermitian
        bilevel.linear_solve(lambda z, a: (a + a.T) @ z, symmetric=True)(complex_, A[:3])


def test_checks_of_gradients_say_how_to_check_a_complex_problem() -> None:
    given = (A, B.clone().requires_grad_(True), STRENGTH)
    layer = bilevel.argmin(least_squares)
    with pytest.raises(
        bilevel.ArgumentError, match=r"real start.*torch\.view_as_real of it, and call torch\.view_as_complex"
    ):
        bilevel.testing.check_gradients(layer, (torch.zeros(3, dtype=C128), *given))

    def of_pairs(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return least_squares(torch.view_as_complex(x), a, torch.view_as_complex(b), s)

    pairs = torch.view_as_real(B).clone().requires_grad_(True)
    assert bilevel.testing.check_gradients(
        bilevel.argmin(of_pairs), (torch.zeros(3, 2, dtype=F64), A, pairs, STRENGTH)
    ).passed
