"""The degree of an objective in φ: proven by the operations of a run, or not at all."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from bilevel.equations.degrees import degree_of
from bilevel.equations.problem import Problem
from bilevel.equations.system import ArgminSystem
from bilevel.pytree import Raveler, flatten_arguments

F64 = torch.float64
X = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0], [-1.0, 0.2, 0.7], [2.0, 1.0, -1.0]], dtype=F64)
y = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=F64)
linear = torch.nn.Linear(3, 2).double().requires_grad_(False)
NONE = -math.inf


class Square(torch.autograd.Function):
    """x², whose derivative somebody wrote."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * ctx.saved_tensors[0] * cotangent


def degree(function, batch: int = 0, dtype: torch.dtype = F64) -> tuple[float, float]:
    """Return the degrees of ``function`` of (φ, θ), of 3 numbers each, and of its part in θ."""
    tensors, arguments = flatten_arguments((torch.tensor([1.2, 1.5, 2.0], dtype=dtype),), {})
    system = ArgminSystem("test", function, Raveler.of(torch.zeros(3, dtype=dtype), "test"), arguments)
    if batch:
        system = system.lift(batch, (False,))
    x = 0.5 + torch.arange(3 * max(1, batch), dtype=dtype).reshape(-1, 3) / 7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on a number that is read of a tensor with a graph
        found = degree_of(Problem.of(system, tensors), x, (True,))
    return found.whole, found.part


def accumulated(x, o):
    total = x.sum() * 0
    total += (x**2).sum()
    total += o.sum()
    return total


def multiplied_in_place(x, o):
    made = x.clone()
    made.mul_(x)
    made.add_(o)
    return made.sum()


def one_by_one(x, o):
    return sum(x[i] ** 2 for i in range(len(x))) / x.numel() + x.new_zeros(x.shape).sum() + torch.ones_like(x) @ x


POLYNOMIALS = {
    "ridge": (lambda x, o: ((X @ x - y) ** 2).sum() + o.exp().sum() * (x**2).sum(), 2, 2),
    "quadratic form": (lambda x, o: x @ torch.diag(o) @ x, 2, 2),
    "einsum": (lambda x, o: torch.einsum("i,ij,j->", x, torch.diag(o), x), 2, 2),
    "mse of a layer": (lambda x, o: F.mse_loss(F.linear(x, X, o[0] * y), y), 2, 1),
    "module": (lambda x, o: linear(x * o).square().sum(), 2, 2),
    "norm squared": (lambda x, o: (x - o).norm() ** 2, 2, 2),
    "abs squared": (lambda x, o: (x - o).abs().pow(2).sum(), 2, 2),
    "cubic": (lambda x, o: (x**3).sum() + o @ x, 3, 1),
    "affine": (lambda x, o: (X @ x).sum() + o @ x, 1, 1),
    "over θ": (lambda x, o: ((x / o) ** 2).sum(), 2, 2),
    "system of θ": (lambda x, o: torch.linalg.solve(torch.diag(o), x).square().sum(), 2, 2),
    "convolution": (lambda x, o: F.conv1d(x.view(1, 1, 3), o.view(1, 1, 3), padding=1).square().sum(), 2, 2),
    "chosen by data": (lambda x, o: torch.where(torch.arange(3) > 1, x, o).square().sum(), 2, 1),
    "index": (lambda x, o: x[torch.tensor([0, 2])].square().sum(), 2, NONE),
    "stacked": (lambda x, o: torch.stack([x[0] * o[0], x[1] ** 2, torch.cat([x, o]).sum()]).sum(), 2, 1),
    "accumulated": (accumulated, 2, 0),
    "in place": (multiplied_in_place, 2, 0),
    "shapes": (one_by_one, 2, NONE),
    "numbers of data": (lambda x, o: (x**2).sum() * float(X.sum()), 2, NONE),
    "float32 inside": (lambda x, o: (x.float().double() ** 2).sum(), 2, NONE),
    "logistic with ridge": (lambda x, o: F.softplus(X @ x).mean() + o.sum() * (x**2).sum(), math.inf, 2),
    "log-sum-exp with a linear term": (lambda x, o: x.logsumexp(0) + o @ x, math.inf, 1),
}


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(POLYNOMIALS))
def test_polynomials_have_their_degree(name, batch):
    function, whole, part = POLYNOMIALS[name]
    assert degree(function, batch) == (whole, part)


@pytest.mark.parametrize("name", ["ridge", "norm squared", "quadratic form"])
def test_degrees_do_not_depend_on_the_dtype(name):
    function, whole, part = POLYNOMIALS[name]
    assert degree(lambda x, o: function(x.double(), o.double()), dtype=torch.float32) == (whole, part)


def without_graph(x, o):
    with torch.no_grad():
        twice = 2 * x
    return (twice * x).sum() + (x**2).sum()


def hooked(x, o):
    made = x * 1
    made.register_hook(lambda cotangent: 2 * cotangent)
    return (made**2).sum()


def caught(x, o):
    try:
        if x.detach().tolist()[0] > 0:
            return (x**2).sum()
    finally:
        pass
    return (2 * x**2).sum()


def replaced(x, o):
    made = x * 1
    made.data = torch.ones(3, dtype=F64)
    return (made**3).sum()


UNKNOWN = {
    "hinge": lambda x, o: torch.relu(1 - x).square().sum(),
    "huber": lambda x, o: F.huber_loss(x, o),
    "sigmoid": lambda x, o: torch.sigmoid(50 * (x - 1)).sum(),
    "exponential": lambda x, o: x.exp().sum(),
    "absolute value": lambda x, o: x.abs().sum(),
    "norm": lambda x, o: (x - o).norm(),
    "norm cubed": lambda x, o: (x - o).norm() ** 3,
    "chosen by φ": lambda x, o: torch.where(x > 1, x, o).square().sum(),
    "mask of φ": lambda x, o: (x * (x > 0)).square().sum(),
    "sorted": lambda x, o: (x.sort().values[0] ** 2).sum(),
    "largest": lambda x, o: x.max() ** 2,
    "reciprocal": lambda x, o: (o / x).sum(),
    "rounded": lambda x, o: (x.long().double() * x).sum(),
    "stopped": lambda x, o: (x.detach() * x).sum() + (x**2).sum(),
    "random": lambda x, o: (x * torch.rand(3, dtype=F64)).sum(),
    "custom": lambda x, o: Square.apply(x - o).sum(),
    "no graph": without_graph,
}
READ = {
    "branch": lambda x, o: (x**2).sum() if float(x.sum()) > 0 else (2 * x**2).sum(),
    "branch off the graph": lambda x, o: (x**2).sum() if bool(x.detach().sum() > 0) else (2 * x**2).sum(),
    "list": lambda x, o: (x**2).sum() * x.tolist()[0],
    "numpy": lambda x, o: (x**2).sum() * float(x.detach().numpy()[0]),
    "data": lambda x, o: (x.data * x).sum(),
    "place of the largest": lambda x, o: (x[int(x.argmax())] ** 2).sum(),
    "number of positive ones": lambda x, o: (x**2).sum() * len(x[x > 0]),
    "hook": hooked,
    "data replaced": replaced,
    "caught": caught,
}


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_what_is_no_polynomial_proves_nothing(name, batch):
    assert degree(UNKNOWN[name], batch)[0] == math.inf


@pytest.mark.parametrize("batch", [0, 1])  # more at once vmap refuses
@pytest.mark.parametrize("name", sorted(READ))
def test_what_reads_a_number_of_the_unknown_proves_nothing(name, batch):
    assert degree(READ[name], batch) == (math.inf, math.inf)


def test_values_of_a_batch_count_each():
    # No problem is quadratic unless all are: one program stands for all.
    def mixed(x, o):
        return torch.where(X[:3, 0] > 0, x**2, x**4).sum()

    assert degree(mixed, 2)[0] == 4
