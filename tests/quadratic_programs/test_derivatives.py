"""Derivatives of quadratic programs: finite differences, closed forms, every order, mode and transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

import bilevel
from bilevel import quadratic_program
from tests.quadratic_programs.programs import F64, random_program


def required(data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in data.values())


@pytest.mark.parametrize("smoothing", [None, 0.1])
@pytest.mark.parametrize("sizes", [(4, 0, 0), (4, 1, 0), (4, 0, 5), (4, 1, 5)])
def test_gradcheck(sizes: tuple[int, int, int], smoothing: float | None) -> None:
    data = random_program(*sizes, 2)
    check = lambda *args: quadratic_program(*args, smoothing=smoothing)
    assert gradcheck(check, required(data), check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("name", ["Q", "q", "A", "b", "G", "h", "lower", "upper"])
def test_gradcheck_of_each_argument(name: str) -> None:
    data = random_program(4, 1, 3)
    check = lambda value: quadratic_program(**{**data, name: value})
    assert gradcheck(check, (data[name].clone().requires_grad_(),), check_forward_ad=True)


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_gradgradcheck(smoothing: float | None) -> None:
    data = random_program(4, 1, 5)
    check = lambda *args: quadratic_program(*args, smoothing=smoothing)
    assert gradgradcheck(check, required(data), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_multipliers_are_differentiable(smoothing: float | None) -> None:
    data = random_program(4, 1, 5)
    check = lambda *args: tuple(quadratic_program.solve(*args, smoothing=smoothing).multipliers)
    assert gradcheck(check, required(data), check_forward_ad=True, fast_mode=True)


def test_third_order() -> None:
    data = random_program(3, 1, 3)
    Q, others = data.pop("Q"), data

    def f(t: torch.Tensor) -> torch.Tensor:
        return quadratic_program(Q * torch.exp(t), **others).pow(3).sum()

    t, step = torch.tensor(0.1, dtype=F64), 1e-4
    third = jacrev(jacrev(jacrev(f)))(t)
    second = hessian(f)
    torch.testing.assert_close(third, (second(t + step) - second(t - step)) / (2 * step), rtol=1e-5, atol=1e-5)


def test_every_mode_gives_the_same_jacobians() -> None:
    data = random_program(4, 1, 5, 3)
    names = list(data)
    everything = tuple(range(len(names)))
    reverse = vmap(jacrev(lambda *args: quadratic_program(*args), everything))(*data.values())
    forward = vmap(jacfwd(lambda *args: quadratic_program(*args), everything))(*data.values())
    loop = [
        jacrev(lambda *args: quadratic_program(*args), everything)(*(t[i] for t in data.values())) for i in range(3)
    ]
    for k in everything:
        torch.testing.assert_close(reverse[k], forward[k], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(reverse[k], torch.stack([one[k] for one in loop]), rtol=1e-10, atol=1e-11)
    assert any(float(one.abs().max()) > 0.1 for one in reverse)


@pytest.mark.parametrize("order", [(jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd)])
def test_second_derivatives_under_vmap(order: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
    outer, inner = order
    data = random_program(3, 1, 4, 3)

    def f(G: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        Q, q, A, b, h, lower, upper = args
        return quadratic_program(Q, q, A, b, G, h, lower, upper).square().sum()

    args = [data[name] for name in ("G", "Q", "q", "A", "b", "h", "lower", "upper")]
    batched = vmap(outer(inner(f)))(*args)
    step = 1e-5
    for i in range(3):
        one = [t[i] for t in args]
        direction = torch.randn_like(one[0])
        ahead, behind = (jacrev(f)(one[0] + s * direction, *one[1:]) for s in (step, -step))
        product = torch.einsum("abcd,cd->ab", batched[i], direction)
        torch.testing.assert_close(product, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
    assert batched.abs().max() > 1e-3


def test_vmap_over_one_argument_and_nested_vmap() -> None:
    data = random_program(4, 1, 5)
    qs = torch.randn(2, 3, 4, dtype=F64)
    others = {name: t for name, t in data.items() if name != "q"}
    found = vmap(vmap(lambda q: quadratic_program(q=q, **others)))(qs)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], quadratic_program(q=qs[i, j], **others), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, quadratic_program(q=qs, **others), rtol=1e-12, atol=1e-12)


def test_shared_arguments_get_the_sum_of_the_gradients() -> None:
    data = random_program(4, 1, 5)
    qs = torch.randn(3, 4, dtype=F64)
    one = data["G"].clone().requires_grad_()
    quadratic_program(**{**data, "q": qs, "G": one}).sum().backward()
    parts = []
    for q in qs:
        own = data["G"].clone().requires_grad_()
        quadratic_program(**{**data, "q": q, "G": own}).sum().backward()
        parts.append(own.grad)
    torch.testing.assert_close(one.grad, sum(parts), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("x0", [[0.2, 0.3, 0.4], [2.0, 0.1, -1.0], [5.0, 0.0, 0.0], [-1.0, -2.5, -3.0]])
def test_projection_onto_the_simplex(x0: list[float]) -> None:
    """The Jacobian is I − 11ᵀ/k on the support of the projection, by sorting (Duchi et al. 2008)."""
    point = torch.tensor(x0, dtype=F64)
    project = lambda v: quadratic_program(torch.eye(3, dtype=F64), -v, torch.ones(1, 3, dtype=F64), 1.0, lower=0.0)
    ordered = point.sort(descending=True).values
    sums = (ordered.cumsum(0) - 1) / torch.arange(1, 4)
    level = sums[(ordered > sums).nonzero()[-1]]
    expected = (point - level).clamp_min(0)
    torch.testing.assert_close(project(point), expected, rtol=1e-12, atol=1e-12)
    support = (expected > 0).to(F64)
    jacobian = torch.diag(support) - support.outer(support) / support.sum()
    torch.testing.assert_close(jacrev(project)(point), jacobian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacfwd(project)(point), jacobian, rtol=1e-12, atol=1e-12)


def test_projection_onto_a_box_and_a_half_space() -> None:
    eye, point = torch.eye(3, dtype=F64), torch.tensor([2.0, 0.3, -4.0], dtype=F64)
    box = lambda v: quadratic_program(eye, -v, lower=-1.0, upper=1.0)
    assert torch.equal(box(point), point.clamp(-1, 1))
    assert torch.equal(jacrev(box)(point), torch.diag(torch.tensor([0.0, 1.0, 0.0], dtype=F64)))
    normal = torch.tensor([[1.0, 2.0, 2.0]], dtype=F64)
    half = lambda v: quadratic_program(eye, -v, G=normal, h=-6.0)
    expected = point - normal[0] * ((normal[0] @ point + 6) / 9).clamp_min(0)
    torch.testing.assert_close(half(point), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacrev(half)(point + 1), eye - normal.T @ normal / 9, rtol=1e-12, atol=1e-12)


def test_a_linear_program_moves_with_its_vertex() -> None:
    G = torch.tensor([[1.0, 2.0], [3.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=F64)
    c, h = torch.tensor([-1.0, -1.0], dtype=F64), torch.tensor([4.0, 6.0, 0.0, 0.0], dtype=F64)
    none = torch.zeros(2, 2, dtype=F64)
    vertex = lambda c, h: quadratic_program(none, c, G=G, h=h)
    torch.testing.assert_close(vertex(c, h), torch.linalg.solve(G[:2], h[:2]))
    by_h = jacrev(vertex, 1)(c, h)
    torch.testing.assert_close(by_h[:, :2], torch.linalg.inv(G[:2]))
    assert (by_h[:, 2:] == 0).all() and (jacrev(vertex, 0)(c, h) == 0).all()


def test_fixed_unknowns_follow_their_bounds() -> None:
    data = random_program(4, 1, 0, bounds=False)

    def f(v: torch.Tensor) -> torch.Tensor:
        lower = torch.cat([v, v.new_full((3,), -torch.inf)])
        upper = torch.cat([v, v.new_full((3,), torch.inf)])
        return quadratic_program(**data, lower=lower, upper=upper)

    v, step = torch.tensor([0.3], dtype=F64), 1e-5
    difference = (f(v + step) - f(v - step)) / (2 * step)
    torch.testing.assert_close(jacrev(f)(v)[:, 0], difference, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(jacfwd(f)(v)[:, 0], difference, rtol=1e-8, atol=1e-8)


def test_redundant_equations_have_a_derivative() -> None:
    data = random_program(4, 1, 0, bounds=False)
    single, double = data["b"].clone().requires_grad_(), data["b"].clone().requires_grad_()
    quadratic_program(data["Q"], data["q"], data["A"], single)[0].backward()
    rows, sides = torch.cat([data["A"], 2 * data["A"]]), torch.cat([double, 2 * double])
    with bilevel.record() as reports:
        quadratic_program(data["Q"], data["q"], rows, sides)[0].backward()
    torch.testing.assert_close(double.grad, single.grad, rtol=1e-9, atol=1e-10)
    assert reports.backward[0].status is bilevel.Status.MINIMUM_NORM


@pytest.mark.parametrize("smoothing", [1e-4, 1e-3, 1e-2])
def test_smoothing_near_a_vertex_of_many_rows_converges(smoothing: float) -> None:
    # Many rows nearly meet in one point. A product s·z that fell far below its target ended the search in 3 % of them.
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(200, 8, 2, generator=generator, dtype=torch.float64)
    G = rows / rows.norm(dim=-1, keepdim=True)
    near = (G @ torch.full((2,), 0.3, dtype=torch.float64)).abs()
    h = torch.where(torch.arange(8) < 4, 0.5, near) + 0.01 * torch.rand(
        200, 8, generator=generator, dtype=torch.float64
    )
    z = 3 * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    solution = quadratic_program.solve(torch.eye(2, dtype=torch.float64), -z, G=G, h=h, smoothing=smoothing)
    multipliers, slack = solution.multipliers.inequality, h - (G @ solution.value.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(slack * multipliers, torch.full_like(slack, smoothing), rtol=1e-5, atol=0)
    stationary = solution.value - z + (multipliers.unsqueeze(-2) @ G).squeeze(-2)
    torch.testing.assert_close(stationary, torch.zeros_like(z), rtol=0, atol=1e-7)


def test_smoothing_tends_to_the_solution() -> None:
    data = random_program(5, 1, 6)
    q = data.pop("q")
    exact, jacobian = quadratic_program(q=q, **data), jacrev(lambda v: quadratic_program(q=v, **data))(q)
    errors = []
    for smoothing in (1e-3, 1e-5):
        smooth = lambda v: quadratic_program(q=v, **data, smoothing=smoothing)
        errors.append((float((smooth(q) - exact).abs().max()), float((jacrev(smooth)(q) - jacobian).abs().max())))
    assert errors[1][0] < 0.05 * errors[0][0] and errors[1][1] < 0.05 * errors[0][1]
    solution = quadratic_program.solve(q=q, **data, smoothing=1e-3)
    slack = data["h"] - data["G"] @ solution.value
    torch.testing.assert_close(slack * solution.multipliers.inequality, torch.full_like(slack, 1e-3), rtol=1e-9, atol=0)


def test_float32_derivatives() -> None:
    data = random_program(6, 2, 8)
    wide = required(data)
    narrow = tuple(t.detach().float().requires_grad_() for t in wide)
    quadratic_program(*wide).sum().backward()
    quadratic_program(*narrow).sum().backward()
    for one, other in zip(narrow, wide, strict=True):
        assert one.grad is not None and one.grad.dtype == torch.float32
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2e-4, atol=2e-4)


def test_forward_and_backward_share_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    from bilevel.quadratic_programs import _kkt

    data = random_program(5, 1, 0, bounds=False)
    q = data["q"].requires_grad_()
    count = []
    original = _kkt.KKTFactor._factorise
    monkeypatch.setattr(_kkt.KKTFactor, "_factorise", lambda self, matrix: (count.append(1), original(self, matrix))[1])
    x = quadratic_program(**data)
    for _ in range(3):
        x.sum().backward(retain_graph=True)
    assert len(count) == 1
    assert q.grad is not None


def test_forward_over_forward_is_refused() -> None:
    data = random_program(3, 0, 2)
    q = data.pop("q")
    with pytest.raises(bilevel.TransformError, match="hessian"):
        jacfwd(jacfwd(lambda v: quadratic_program(q=v, **data)))(q)


@pytest.mark.parametrize("angle", [1e-6, 1e-8, 1e-10])
def test_a_vertex_between_nearly_parallel_edges_does_not_move_with_the_cost(angle: float) -> None:
    G = torch.tensor([[1.0, 1.0], [1.0, 1.0 + angle]], dtype=F64)
    Q, h, q = torch.zeros(2, 2, dtype=F64), G.sum(1), -0.75 * G.sum(0)
    by_cost, by_side = jacrev(lambda q, h: quadratic_program(Q, q, G=G, h=h), (0, 1))(q, h)
    assert float(by_cost.abs().max()) < 1e-6
    inverse = torch.tensor([[1.0 + angle, -1.0], [-1.0, 1.0]], dtype=F64) / (G[1, 1] - 1.0)
    torch.testing.assert_close(by_side, inverse, rtol=1e-5, atol=0.0)
