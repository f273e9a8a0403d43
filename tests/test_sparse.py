"""Sparse tensors: their values differentiated any number of times, compressed constants, and what torch differentiates once only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.autograd.function import once_differentiable
from torch.func import grad, jvp, vmap

import bilevel
from bilevel._torch.double_backward import Repeatable
from bilevel._torch.graph_features import nodes
from bilevel._torch.once_differentiable import once_only

F64 = torch.float64
PLACES = torch.tensor([[0, 0, 1, 2, 3, 1], [0, 2, 1, 2, 3, 3]])
N = 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


VALUES, Y, X = random(6), random(N, seed=1), random(N, 3, seed=2)
ALONG, WEIGHTS = random(6, seed=3), random(N, seed=4)
ZERO = torch.zeros(N, dtype=F64)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|CSC|BSR|BSC|invariant)")
        yield


def sparse(values: torch.Tensor) -> torch.Tensor:
    return torch.sparse_coo_tensor(PLACES, values, (N, N))


def dense(values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(N, N, dtype=values.dtype).index_put((PLACES[0], PLACES[1]), values)


def close(mine: Any, expected: Any) -> None:
    torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)


Make = Callable[[torch.Tensor], torch.Tensor]
PRODUCTS = {
    "torch.sparse.mm": lambda S, x: torch.sparse.mm(S, x[:, None])[:, 0] if S.is_sparse else S @ x,
    "@": lambda S, x: S @ x,
    "torch.mv": torch.mv,
    "to_dense": lambda S, x: (S.to_dense() if S.is_sparse else S) @ x,
}


def argmin_by_values(make: Make, product: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = bilevel.argmin(lambda x, v: ((product(make(v), x) - Y) ** 2).sum() + (x**2).sum() + 0.1 * (x**4).sum())
    return lambda v: layer(ZERO, v)


def linear_by_values(make: Make, product: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = bilevel.linear_solve(lambda x, v: product(make(v), x) + 6 * x)
    return lambda v: layer(Y, v)


def root_by_values(make: Make, product: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = bilevel.root(lambda x, v: x**3 + 2 * x + 0.1 * product(make(v), x) - Y)
    return lambda v: layer(ZERO, v)


LAYERS = {"argmin": argmin_by_values, "linear_solve": linear_by_values, "root": root_by_values}


def slope(of: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return grad(lambda v: of(v) @ WEIGHTS)


def twice_in_a_graph(of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    values = VALUES.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(of(values) @ WEIGHTS, values, create_graph=True)
    return torch.autograd.grad(first @ ALONG, values)[0]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_derivatives_by_the_values_are_those_of_a_dense_matrix(layer: str, product: str) -> None:
    """Of the second order, 89 % of the size of the right one was missing, without a word."""
    mine, expected = (LAYERS[layer](make, PRODUCTS[product]) for make in (sparse, dense))
    close(slope(mine)(VALUES), slope(expected)(VALUES))
    close(twice_in_a_graph(mine), twice_in_a_graph(expected))
    close(*(grad(lambda v, of=of: slope(of)(v) @ ALONG)(VALUES) for of in (mine, expected)))
    close(*(jvp(of, (VALUES,), (ALONG,))[1] for of in (mine, expected)))


@pytest.mark.parametrize("make", [sparse, dense], ids=["sparse", "dense"])
def test_values_that_are_the_unknown(make: Make) -> None:
    def objective(u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((make(u) @ y - Y) ** 2).sum() + (u**2).sum() + 0.1 * (u**4).sum()

    layer, y = bilevel.argmin(objective), random(N, seed=6)
    of = lambda y: layer(torch.zeros(6, dtype=F64), y)
    found = of(y)
    close(grad(lambda u: objective(u, y))(found), torch.zeros(6, dtype=F64))
    first = grad(lambda y: of(y) @ ALONG)
    step, direction = 1e-5, random(N, seed=7)
    up, down = of(y + step * direction), of(y - step * direction)
    assert abs(float(first(y) @ direction - (up - down) @ ALONG / (2 * step))) < 1e-8
    second = grad(lambda y: first(y) @ direction)(y)
    expected = (first(y + step * direction) - first(y - step * direction)) @ direction / (2 * step)
    assert abs(float(second @ direction - expected)) < 1e-7


class Weighted(bilevel.BilevelProblem):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((self.make(outer) @ inner - data) ** 2).sum() + (inner**2).sum()

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((self.make(outer) @ inner) ** 2).sum()


def test_problems_by_the_values_of_a_sparse_matrix() -> None:
    mine, expected = (Weighted(make).hypergradient(VALUES, Y, init=ZERO) for make in (sparse, dense))
    close(mine.grad, expected.grad)
    close(mine.corrected_grad, expected.corrected_grad)
    assert mine.error_bound < 1e-12

    def curvature(make: Make) -> torch.Tensor:
        problem = Weighted(make)
        return grad(lambda v: grad(lambda v: problem(v, Y, init=ZERO))(v) @ ALONG)(VALUES)

    close(curvature(sparse), curvature(dense))


def test_few_values_of_a_long_unknown_have_a_right_bound() -> None:
    """There the cross derivative is made column by column, which goes through the values twice."""
    long = torch.zeros(9, dtype=F64)
    at = torch.tensor([[0, 3], [1, 2]])
    problems = []
    for is_sparse in (True, False):

        def make(v: torch.Tensor, is_sparse: bool = is_sparse) -> torch.Tensor:
            plain = torch.zeros(9, 9, dtype=F64).index_put((at[0], at[1]), v)
            return torch.sparse_coo_tensor(at, v, (9, 9)) if is_sparse else plain

        problem = Weighted(make)
        problem.tolerance = bilevel.Tolerance(delta=1e-2, delta_prime=1e-2)
        problems.append(problem.hypergradient(VALUES[:2], random(9, seed=8), init=long + 0.3))
    close(problems[0].grad, problems[1].grad)
    assert problems[0].error_bound == pytest.approx(problems[1].error_bound, rel=1e-6, abs=1e-14)


def test_a_fused_norm_of_the_arguments_alone_is_differentiated_twice() -> None:
    def curvature(norm: Callable[..., torch.Tensor]) -> torch.Tensor:
        g, v = torch.ones(3, 1, dtype=F64), random(3, N, seed=9)
        layer = bilevel.argmin(lambda x, v: ((norm(v, g) @ x - 1) ** 2).sum() + (x**2).sum())
        return grad(lambda v: (grad(lambda v: layer(ZERO, v) @ WEIGHTS)(v) ** 2).sum())(v)

    close(curvature(torch._weight_norm), curvature(lambda v, g: v * g / v.norm(dim=1, keepdim=True)))


WITHIN = {
    "duplicates": (torch.tensor([[0, 0, 1], [1, 1, 2]]), (3,), (3, 3)),
    "hybrid": (torch.tensor([[0, 2]]), (2, 3), (3, 3)),
    "a vector": (torch.tensor([[0, 2, 1]]), (3,), (4,)),
    "size left out": (torch.tensor([[0, 2, 1]]), (3,), None),
    "none at all": (torch.zeros(2, 0, dtype=torch.int64), (0,), (3, 3)),
}


@pytest.mark.parametrize("name", WITHIN)
def test_the_written_construction_is_torch_s_own(name: str) -> None:
    places, shape, size = WITHIN[name]
    values = random(*shape, seed=5).requires_grad_(True)

    def of(v: torch.Tensor) -> torch.Tensor:
        made = torch.sparse_coo_tensor(places, v) if size is None else torch.sparse_coo_tensor(places, v, size)
        return made.to_dense()

    with Repeatable():
        mine = of(values)
        close(mine, of(values.detach()))
        (mine_slope,) = torch.autograd.grad((mine**3).sum(), values)
        assert gradgradcheck(lambda v: of(v) ** 3, values)
    close(mine_slope, torch.autograd.grad((of(values) ** 3).sum(), values)[0])


def test_other_types_and_options_of_the_construction() -> None:
    values = random(6).requires_grad_(True)
    with Repeatable():
        made = torch.sparse_coo_tensor(PLACES.tolist(), values, (N, N), dtype=torch.float32)
        assert made.dtype == torch.float32
        assert torch.sparse_coo_tensor(PLACES, values.detach(), (N, N), requires_grad=True).is_leaf
        assert not torch.sparse_coo_tensor(PLACES, [1.0] * 6, (N, N)).requires_grad
        assert torch.sparse_coo_tensor((N, N)).shape == (N, N)
        with pytest.raises(RuntimeError, match="size"):  # torch's own words for what does not fit
            torch.sparse.mm(torch.sparse_coo_tensor(PLACES, values, (N, N)), X[:2])


def test_torch_s_own_construction_still_has_no_second_derivative() -> None:
    """When this fails torch has been mended, and :mod:`bilevel._torch.sparse` can go."""
    values = VALUES.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(((sparse(values) @ X) ** 2).sum(), values, create_graph=True)
    assert not first.requires_grad
    assert any(once_only(node) for node in nodes((sparse(values) @ X).sum()))


# What torch does with a sparse tensor itself, and with a dense one; each is right twice.
RIGHT_TWICE = {
    "sparse.mm": (lambda S: torch.sparse.mm(S, X), lambda D: D @ X),
    "mm": (lambda S: S @ X, lambda D: D @ X),
    "t": (lambda S: S.t() @ X, lambda D: D.T @ X),
    "from the right": (lambda S: X.T @ S, lambda D: X.T @ D),
    "addmm": (lambda S: torch.addmm(X, S, X), lambda D: X + D @ X),
    "to_dense": (lambda S: S.to_dense() ** 3, lambda D: D**3),
    "sum": (lambda S: torch.sparse.sum(S), lambda D: D.sum()),
    "times": (lambda S: (S * S).to_dense(), lambda D: D * D),
    "plus": (lambda S: (S + S).to_dense(), lambda D: D + D),
    "spspmm": (lambda S: torch.sparse.mm(S, S).to_dense(), lambda D: D @ D),
}


@pytest.mark.parametrize("name", RIGHT_TWICE)
def test_operations_on_a_sparse_leaf_are_right_twice(name: str) -> None:
    of_sparse, of_dense = RIGHT_TWICE[name]
    results = []
    for leaf, function in ((dense(VALUES).to_sparse(), of_sparse), (dense(VALUES), of_dense)):
        leaf.requires_grad_(True)
        (first,) = torch.autograd.grad((function(leaf) ** 2).sum(), leaf, create_graph=True)
        first = first.to_dense() if first.is_sparse else first
        (second,) = torch.autograd.grad((first * (dense(VALUES) != 0)).pow(2).sum(), leaf)
        results.append((second.to_dense() if second.is_sparse else second) * (dense(VALUES) != 0))
    close(*results)


def test_a_sparse_argument_made_of_values_outside_is_refused_where_it_is_wrong() -> None:
    layer = bilevel.argmin(lambda x, S: ((S @ x - Y) ** 2).sum() + (x**2).sum())
    values = VALUES.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(layer(ZERO, sparse(values)) @ WEIGHTS, values)
    within = bilevel.argmin(lambda x, v: ((sparse(v) @ x - Y) ** 2).sum() + (x**2).sum())
    close(first, torch.autograd.grad(within(ZERO, values) @ WEIGHTS, values)[0])
    with pytest.raises(bilevel.ArgumentError, match=r"torch\.sparse_coo_tensor is on the way.*inside the function"):
        torch.autograd.grad(layer(ZERO, sparse(values)) @ WEIGHTS, values, create_graph=True)
    with pytest.raises(bilevel.ArgumentError, match=r"torch\.sparse_coo_tensor is on the way"):
        grad(lambda v: grad(lambda v: layer(ZERO, sparse(v)) @ WEIGHTS)(v) @ ALONG)(VALUES)
    # The remedy.
    torch.autograd.grad(within(ZERO, values) @ WEIGHTS, values, create_graph=True)


def test_entries_of_a_sparse_tensor_made_inside_are_refused_where_they_are_wrong() -> None:
    """The backward of ``values()`` is a construction of torch's own: a third derivative goes through it."""
    layer = bilevel.argmin(lambda u: (sparse(u).coalesce().values() ** 4).sum() + ((u - VALUES) ** 2).sum())
    close(layer(torch.zeros(6, dtype=F64)).shape, torch.Size([6]))
    by = bilevel.argmin(lambda u, y: (sparse(u).coalesce().values() ** 4).sum() + ((u - y) ** 2).sum())
    plain = bilevel.argmin(lambda u, y: (u**4).sum() + ((u - y) ** 2).sum())
    # In the order of rows: a sum does not see it.
    first = [grad(lambda y, of=of: (of(torch.zeros(6, dtype=F64), y) ** 2).sum()) for of in (by, plain)]
    close(first[0](VALUES), first[1](VALUES))
    with pytest.raises(bilevel.ArgumentError, match=r"torch\.sparse_coo_tensor is on the way"):
        grad(lambda y: first[0](y) @ ALONG)(VALUES)


class _Once(torch.autograd.Function):
    """x² of a slope that torch takes for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return 2 * slope * ctx.saved_tensors[0]


TWO = torch.tensor([1.0, 2.0], dtype=F64)
ONCE: dict[str, Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "an argument of argmin": lambda f: (
        lambda t: bilevel.argmin(lambda x, t: ((x - f(t)) ** 2).sum() + (x**4).sum())(TWO, t)
    ),
    "the unknown of root": lambda f: lambda t: bilevel.root(lambda x, t: f(x) * x + x - t)(TWO, t),
    "the unknown of fixed_point": lambda f: lambda t: bilevel.fixed_point(lambda x, t: 0.1 * f(x) - 0.1 * t)(TWO, t),
    "an argument of linear_solve": lambda f: lambda t: bilevel.linear_solve(lambda x, t: (1 + f(t)) * x)(TWO, t),
}


@pytest.mark.parametrize("name", ONCE)
def test_a_function_marked_once_differentiable_is_refused_in_what_would_be_zero(name: str) -> None:
    mine, plain = ONCE[name](_Once.apply), ONCE[name](torch.square)
    close(*(vmap(grad(lambda t, of=of: of(t).sum()))(TWO.expand(3, 2)) for of in (mine, plain)))
    close(grad(lambda t: mine(t).sum())(TWO), grad(lambda t: plain(t).sum())(TWO))
    point = TWO.clone().requires_grad_(True)
    close(torch.autograd.grad(mine(point).sum(), point)[0], grad(lambda t: plain(t).sum())(TWO))
    with pytest.raises(bilevel.ArgumentError, match="_Once in it is marked once_differentiable"):
        grad(lambda t: grad(lambda t: mine(t).sum())(t).sum())(TWO)
    with pytest.raises(bilevel.ArgumentError, match="_Once in it is marked once_differentiable"):
        torch.autograd.grad(mine(point).sum(), point, create_graph=True)
    with pytest.raises(bilevel.ArgumentError, match="_Once in it is marked once_differentiable"):
        jvp(mine, (TWO,), (TWO,))


class EndsInOnce(Weighted):
    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return _Once.apply(outer).sum() + (inner**2).sum()


def test_an_outer_objective_marked_once_differentiable_is_refused_in_a_second_derivative() -> None:
    problem, values = EndsInOnce(sparse), VALUES.clone().requires_grad_(True)
    first = problem.hypergradient(VALUES, Y, init=ZERO).grad
    close(torch.autograd.grad(problem(values, Y, init=ZERO), values)[0], first)
    close(grad(lambda v: problem(v, Y, init=ZERO))(VALUES), first)
    with pytest.raises(
        bilevel.ArgumentError, match=r"outer_objective to be of .* _Once in it is marked once_differentiable"
    ):
        torch.autograd.grad(problem(values, Y, init=ZERO), values, create_graph=True)
    with pytest.raises(bilevel.ArgumentError, match="_Once in it is marked once_differentiable"):
        grad(lambda v: grad(lambda v: problem(v, Y, init=ZERO))(v) @ ALONG)(VALUES)


MATRIX = 3 * torch.eye(N, dtype=F64) + 0.3 * random(N, N, seed=10)
COMPRESSED = {"csr": MATRIX.to_sparse_csr, "csc": MATRIX.to_sparse_csc}


@pytest.mark.parametrize("layout", COMPRESSED)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_compressed_constant_is_differentiated_like_a_dense_one(layout: str, transposed: bool) -> None:
    scale = torch.tensor(1.5, dtype=F64)

    def layers(M: torch.Tensor) -> list[Callable[..., torch.Tensor]]:
        solve = bilevel.linear_solve(lambda x, s: (M.t() if transposed else M) @ x * s)
        fit = bilevel.argmin(lambda x, b, s: (((M.t() if transposed else M) @ x - b) ** 2).sum() + s * (x**4).sum())
        return [solve, lambda b, s: fit(ZERO, b, s)]

    for mine, plain in zip(layers(COMPRESSED[layout]()), layers(MATRIX), strict=True):
        found = []
        for of in (mine, plain):
            b, s = Y.clone().requires_grad_(True), scale.clone().requires_grad_(True)
            first = torch.autograd.grad(of(b, s) @ WEIGHTS, (b, s))
            second = grad(lambda s, of=of: grad(lambda s: of(Y, s) @ WEIGHTS)(s))(scale)
            pushed = jvp(lambda s, of=of: of(Y, s), (scale,), (scale,))[1]
            many = vmap(lambda b, of=of: of(b, scale))(torch.stack([Y, 2 * Y]))
            jacobian = torch.func.jacrev(lambda b, of=of: of(b, scale))(Y)
            found.append((*first, second, pushed, many, jacobian))
        close(*found)


def test_blocks_that_torch_cannot_differentiate_are_refused_in_one_sentence() -> None:
    blocks = MATRIX.to_sparse_bsr((2, 2))
    with pytest.raises(
        bilevel.DtypeError, match=r"sparse ones of coordinates, got one in compressed.*\.to_sparse_coo\(\)"
    ):
        bilevel.linear_solve(lambda x: blocks @ x)(Y)
    coordinates = blocks.to_sparse_coo()
    close(bilevel.linear_solve(lambda x: coordinates @ x)(Y), torch.linalg.solve(MATRIX, Y))


def test_numpy_and_modules_are_told_what_to_write() -> None:
    import numpy as np

    array = np.array([1.0, 2.0])
    objective = lambda x, a: ((x - a) ** 2).sum()
    for layer, args in (
        (bilevel.argmin(objective), (TWO, array)),
        (bilevel.argmin(lambda x, a: ((a["k"] * x - 1) ** 2).sum()), (TWO, {"k": array})),
        (bilevel.root(lambda x, a: x - a), (TWO, array)),
    ):
        with pytest.raises(bilevel.DtypeError, match=r"numpy array at args\[0\].*torch\.as_tensor"):
            layer(*args)
    with pytest.raises(bilevel.DtypeError, match=r"a numpy array or a function of numpy.*torch\.as_tensor"):
        bilevel.argmin(lambda x: ((x - array) ** 2).sum())(TWO)
    with pytest.raises(bilevel.DtypeError, match=r"init .*got ndarray; pass torch\.as_tensor"):
        bilevel.argmin(objective)(array, TWO)
    close(bilevel.argmin(objective)(torch.as_tensor(array) * 0, torch.as_tensor(array)), torch.as_tensor(array))
    # What is converted inside goes on working.
    close(bilevel.argmin(lambda x, a: ((x - torch.as_tensor(a)) ** 2).sum())(TWO, array), TWO)
    with pytest.raises(bilevel.DtypeError, match=r"outer_objective .* numpy array at data"):
        Numpy().hypergradient(TWO, array, init=TWO)


class Numpy(bilevel.BilevelProblem):
    def inner_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((inner - outer) ** 2).sum()

    def outer_objective(self, inner: Any, outer: Any, data: Any) -> torch.Tensor:
        return ((inner - data) ** 2).sum()


def test_a_module_is_an_unknown_as_a_dict_of_its_parameters_is() -> None:
    module = torch.nn.Linear(2, 1, dtype=F64)
    inputs, target = random(5, 2), random(5, 1, seed=1)

    def fit(w: Any, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((torch.func.functional_call(module, w, inputs) - target) ** 2).sum()

    design = torch.cat([inputs, torch.ones(5, 1, dtype=F64)], 1)
    for init in (module, {name: p.detach() for name, p in module.named_parameters()}):
        w = bilevel.argmin(fit)(init, inputs, target)
        close(torch.cat([w["weight"][0], w["bias"]]), torch.linalg.lstsq(design, target).solution[:, 0])
