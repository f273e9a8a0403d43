"""Losses whose derivative exists at solutions with a weakly active constraint get it; others are refused, and so are second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, vmap

import bilevel
from bilevel import Status

F64 = torch.float64
Loss = Callable[[torch.Tensor], torch.Tensor]


def tensor(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


H = tensor(2, 1, 1, 2).reshape(2, 2)


def distance(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return ((x - a) ** 2).sum()


def coupled(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return 0.5 * x @ H @ x - a @ H @ x


def plane(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return x.sum() - 1


# The objective, the constraints, arguments at which one constraint is weakly active, a loss, and whether its derivative exists.
CASES: dict[str, tuple[Any, dict[str, Any], torch.Tensor, Loss, bool]] = {
    "along a bound": (distance, {"lower": 0.0}, tensor(0, 2), lambda x: x[1], True),
    "flat across a bound": (distance, {"lower": 0.0}, tensor(0, 2), lambda x: x[0] ** 2 + x[1], True),
    "across a bound": (distance, {"lower": 0.0}, tensor(0, 2), lambda x: x.sum(), False),
    "across an upper bound": (distance, {"upper": 0.0}, tensor(0, 2), lambda x: x.sum(), False),
    "coupled, orthogonal": (coupled, {"lower": 0.0}, tensor(0, 2), lambda x: (H @ x)[1], True),
    "coupled": (coupled, {"lower": 0.0}, tensor(0, 2), lambda x: x[1], False),
    "along a plane": (distance, {"inequality": plane}, tensor(0.25, 0.75), lambda x: x[0] - x[1], True),
    "across a plane": (distance, {"inequality": plane}, tensor(0.25, 0.75), lambda x: x[0], False),
    "along a circle": (
        distance, {"inequality": lambda x, a: (x**2).sum() - 25}, tensor(3, 4), lambda x: 4 * x[0] - 3 * x[1], True,
    ),
    "a moving bound": (lambda x, a: (x**2).sum(), {"lower": lambda a: a}, tensor(0, 2), lambda x: x[1], True),
    "across a moving bound": (lambda x, a: (x**2).sum(), {"lower": lambda a: a}, tensor(0, 2), lambda x: x[0], False),
}  # fmt: skip
ZERO = torch.zeros(2, dtype=F64)


def slopes(layer: bilevel.Layer, loss: Loss, a: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Return the differences of the loss to the right and to the left, (2, n)."""
    with torch.no_grad():
        here = loss(layer(ZERO, a))
        rows = [[(loss(layer(ZERO, a + s * e)) - here) / s for e in torch.eye(2, dtype=F64)] for s in (step, -step)]
    return torch.tensor(rows, dtype=F64)


@pytest.mark.parametrize("name", CASES)
def test_a_derivative_is_given_where_both_sides_agree(name: str) -> None:
    objective, constraints, a, loss, exists = CASES[name]
    layer = bilevel.argmin(objective, **constraints)
    right, left = slopes(layer, loss, a)
    assert torch.allclose(right, left, atol=1e-5) == exists  # else this test is wrong
    ways = {
        "backward": lambda a: torch.autograd.grad(loss(layer(ZERO, b := a.clone().requires_grad_())), b)[0],
        "kept graph": lambda a: torch.autograd.grad(
            loss(layer(ZERO, b := a.clone().requires_grad_())), b, create_graph=True
        )[0].detach(),
        "grad": grad(lambda a: loss(layer(ZERO, a))),
        "a batch": lambda a: vmap(grad(lambda a: loss(layer(ZERO, a))))(torch.stack([a + 0.1, a]))[1],
    }
    for way in ways.values():
        if exists:
            torch.testing.assert_close(way(a), 0.5 * (right + left), rtol=1e-5, atol=1e-5)
            continue
        with pytest.raises(bilevel.SolveError, match="active with multiplier 0") as caught:
            way(a)
        assert Status.DEGENERATE in caught.value.report.status_code.reshape(-1).tolist()


@pytest.mark.parametrize("name", ["flat across a bound", "along a plane", "coupled, orthogonal"])
def test_second_derivatives_stay_refused(name: str) -> None:
    """Of x₀² = max(a₀, 0)² the first derivative exists and the second does not."""
    objective, constraints, a, loss, _ = CASES[name]
    layer = bilevel.argmin(objective, **constraints)
    with pytest.raises(bilevel.SolveError, match="active with multiplier 0"):
        hessian(lambda a: loss(layer(ZERO, a)))(a)
    a = a.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(layer(ZERO, a)), a, create_graph=True)
    with pytest.raises(bilevel.SolveError, match="active with multiplier 0"):
        first.sum().backward()


def test_multipliers_of_a_weakly_active_constraint_stay_refused() -> None:
    a = tensor(0.25, 0.75).requires_grad_()
    solution = bilevel.argmin(distance, inequality=plane).solve(ZERO, a)
    with pytest.raises(bilevel.SolveError, match="active with multiplier 0"):
        solution.multipliers.inequality.backward(retain_graph=True)
    a = tensor(0, 2).requires_grad_()
    solution = bilevel.argmin(distance, lower=0.0).solve(ZERO, a)
    with pytest.raises(bilevel.SolveError, match="active with multiplier 0"):
        solution.multipliers.lower.sum().backward()


def test_float32_is_told_apart_too() -> None:
    layer = bilevel.argmin(distance, lower=0.0)
    a = torch.tensor([0.0, 2.0], requires_grad=True)
    layer(torch.zeros(2), a)[1].backward()
    torch.testing.assert_close(a.grad, torch.tensor([0.0, 1.0]))
    with pytest.raises(bilevel.SolveError, match="active with multiplier 0"):
        layer(torch.zeros(2), a).sum().backward()
