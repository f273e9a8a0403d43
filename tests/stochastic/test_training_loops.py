"""What real training loops do to a method: each works as without it, or is refused in one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from bilevel import stochastic
from bilevel.errors import ArgumentError, BilevelError
from bilevel.stochastic import StepOptions

SGD = partial(torch.optim.SGD, lr=0.5)
torch.manual_seed(0)
X, Y, V, W = torch.randn(24, 4), torch.randint(3, (24,)), torch.randn(24, 4), torch.randint(3, (24,))
TRAIN, VALID = (X, Y), (V, W)
SECOND_ORDER = ["SOBA", "MASOBA", "SABA", "AmIGO", "ImplicitStep", "StocBiO", "TTSA", "MRBO"]
NAMES = [*SECOND_ORDER, "F2SA", "BOME", "PZOBO"]


def network(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(**options)


def lower(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
    return (outer.sigmoid() * cross_entropy(inner(batch[0]), batch[1], reduction="none")).mean()


def upper(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
    return cross_entropy(inner(batch[0]), batch[1])


def made(name: str, model: Any = None, outer: Any = None, losses: Any = (lower, upper), **settings: Any) -> Any:
    settings = {"inner_optimizer": SGD, "outer_optimizer": SGD, **settings}
    model, outer = network() if model is None else model, torch.zeros(24) if outer is None else outer
    return getattr(stochastic, name)(losses, model, outer, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_a_step_is_that_of_its_options(name: str) -> None:
    """The caller's autocast keeps the weights that it has cast, until it ends: later evaluations of the step would see old ones."""
    ends = []
    for around in (False, True):
        method = made(name, options=StepOptions(autocast=None if around else torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in range(3):
                method.step(TRAIN, VALID)
            assert torch.is_autocast_enabled("cpu") == around
        ends.append(torch.cat([method.outer.detach(), *(p.detach().reshape(-1) for p in method.inner.parameters())]))
    assert torch.equal(*ends)


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.first, self.last = attend, nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.first(x).reshape(-1, 1, 2, 4)
        return self.last(self.attend(q, q, q).mean((1, 2)))


def written_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


class Normed(nn.Module):
    """A layer with weight normalisation, by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        self.bias = layer.bias
        self.original0 = nn.Parameter(layer.weight.detach().norm(dim=1, keepdim=True))
        self.original1 = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.original0 * self.original1 / self.original1.norm(dim=1, keepdim=True)).T + self.bias


def weight_normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))


@pytest.mark.parametrize("name", SECOND_ORDER)
@pytest.mark.parametrize(
    ("given", "written"),
    [
        (lambda: Attention(scaled_dot_product_attention), lambda: Attention(written_attention)),
        (weight_normed, Normed),
    ],
    ids=["attention", "weight norm"],
)
def test_second_derivatives_that_torch_lacks_or_has_wrong(name: str, given: Any, written: Any) -> None:
    ends = []
    for make in (given, written):
        method = made(name, make().double(), torch.zeros(24, dtype=torch.float64))
        for _ in range(4):
            method.step((X.double(), Y), (V.double(), W))
        ends.append(method.outer.detach().clone())
    torch.testing.assert_close(*ends)
    assert bool(ends[0].any())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return slope * ctx.saved_tensors[0].cos()


class ByNumpy(Once):
    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(slope.detach().numpy() * ctx.saved_tensors[0].detach().cos().numpy())


class Applies(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(self.layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_models_that_can_be_differentiated_once(name: str) -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: Applies(Once), "marked once_differentiable"),
        (lambda: Applies(ByNumpy), "no graph leads from it"),
        (lambda: torch.compile(network(), backend="aot_eager"), "before torch.compile.*backend='eager'"),
    ]
    for make, words in cases:
        method = made(name, make())
        if name in SECOND_ORDER:
            with pytest.raises(ArgumentError, match=words):
                method.step(TRAIN, VALID)
        else:
            method.step(TRAIN, VALID)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_norm_of_both_levels(name: str) -> None:
    norm = nn.BatchNorm1d(4, affine=False)
    model, outer = nn.Sequential(norm, nn.Linear(4, 3)), nn.Sequential(norm, nn.Linear(4, 1))

    def weighed(inner: Any, outer: Any, batch: Any) -> torch.Tensor:
        return (outer(batch[0])[:, 0].sigmoid() * cross_entropy(inner(batch[0]), batch[1], reduction="none")).mean()

    method = made(name, model, outer, (weighed, upper))
    for _ in range(2):
        method.step(TRAIN, VALID)
    assert model[0] is outer[0] and model[0].num_batches_tracked > 0
    method.load_state_dict(method.state_dict())


class Breaks(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", [None, "inner_optimizer", "outer_optimizer"])
def test_gradients_of_the_caller_stay(name: str, broken: str | None) -> None:
    """Also where an optimiser is interrupted. PZOBO's inner steps are made without the optimiser."""
    method = made(name, **({} if broken is None else {broken: partial(Breaks, lr=0.1)}))
    variables = [*method.inner.parameters(), method.outer]
    for variable in variables:
        variable.grad = torch.full_like(variable, 7.0)
    if broken is None:
        method.step(TRAIN, VALID)
    else:
        with pytest.raises(KeyboardInterrupt):
            method.step(TRAIN, VALID)
    assert all(bool((variable.grad == 7).all()) for variable in variables)


def with_another_model(method: Any) -> None:
    method.inner = network()


def with_another_outer(method: Any) -> None:
    method.outer = torch.ones(24)


def with_other_options(method: Any) -> None:
    method.options = StepOptions(accumulate=2)


def with_a_stranger_optimizer(method: Any) -> None:
    method.inner_optimizer = SGD(network().parameters())


def with_a_larger_group(method: Any) -> None:
    method.inner_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def converted(method: Any) -> None:
    method.inner.double()


def with_other_shapes(method: Any) -> None:
    method.inner[0].weight.data = torch.zeros(9, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_another_model, "inner to stay as it was given"),
        (with_another_outer, "outer to stay as it was given"),
        (with_other_options, "options to stay as it was given"),
        (with_a_stranger_optimizer, "it holds 0 of them and 4 others"),
        (with_a_larger_group, "it holds 4 of them and 1 others"),
        (converted, "0.weight has another shape, dtype or device"),
        (with_other_shapes, "0.weight has another shape, dtype or device"),
    ],
)
def test_changes_from_outside_between_steps(name: str, change: Callable[[Any], None], words: str) -> None:
    method = made(name)
    method.step(TRAIN, VALID)
    before = copy.deepcopy(method.inner.state_dict())
    with pytest.raises(ArgumentError, match=words):
        change(method)
        method.step(TRAIN, VALID)
    if change is not converted and change is not with_other_shapes:
        assert all(torch.equal(before[key], value) for key, value in method.inner.state_dict().items())


def test_the_remedies_for_changes_from_outside() -> None:
    method = made("ImplicitStep")
    method.inner.load_state_dict(network().state_dict())
    with torch.no_grad():
        method.outer.copy_(torch.ones(24))
    method.inner_optimizer = torch.optim.Adam(method.inner.parameters(), lr=0.01)
    method.step(TRAIN, VALID)
    assert len(method.inner_optimizer.state) == 4


def test_a_tensor_replaced_in_its_pytree() -> None:
    inner = {"w": torch.zeros(3)}
    losses = (lambda z, x, b: ((z["w"] - x) ** 2).sum(), lambda z, x, b: ((z["w"] - 1) ** 2).sum())
    method = made("SOBA", inner, torch.ones(3), losses)
    method.step(None, None)
    inner["w"] = torch.zeros(3)
    with pytest.raises(ArgumentError, match=r"\['w'\] has been replaced in its pytree"):
        method.step(None, None)
    inner["w"], inner["b"] = method._inner.tensors[0], torch.zeros(1)
    with pytest.raises(ArgumentError, match="its structure has changed"):
        method.step(None, None)


class Closing(torch.optim.SGD):
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        closure()
        super().step()


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_optimisers_that_evaluate_the_loss(level: str) -> None:
    for kind in (torch.optim.LBFGS, partial(Closing, lr=0.1)):
        with pytest.raises(ArgumentError, match=f"{level}_optimizer to move by one gradient at a time"):
            made("SOBA", **{f"{level}_optimizer": kind})


@pytest.mark.parametrize("name", NAMES)
def test_sparse_and_complex_variables(name: str) -> None:
    words = torch.randint(10, (24,))
    for sparse in (False, True):
        method = made(name, nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 3)))
        if sparse:
            with pytest.raises(BilevelError, match="make the embedding with sparse=False"):
                method.step((words, Y), (words, W))
        else:
            method.step((words, Y), (words, W))
    for level in (0, 1):
        given = [network(), nn.Linear(4, 1)]
        given[level] = nn.Sequential(nn.ParameterList([torch.ones(3, dtype=torch.complex64)]))
        with pytest.raises(BilevelError, match=r"real tensors, and 0.0 is of torch.complex64; keep torch.view_as_real"):
            made(name, *given)
