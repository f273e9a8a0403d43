"""What a layer with a term refuses: the remedy of each message works when it is followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import prox
from tests.prox.test_layer import data, least_squares

DOUBLE = torch.float64
D = 8


def value_and_slope(layer: Any, init: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and the derivative of Σ x² + Σ x with respect to the strength; a pair (p, q) is x = p − q."""
    X, y = data(30, D, seed=3)
    s = torch.tensor(0.05, dtype=DOUBLE, requires_grad=True)
    made = layer(init, X, y, s)
    x = made[0] - made[1] if isinstance(made, tuple) else made
    (slope,) = torch.autograd.grad((x**2 + x).sum(), s)
    return x.detach(), slope


def zeros() -> torch.Tensor:
    return torch.zeros(D, dtype=DOUBLE)


def split(pq: tuple[torch.Tensor, torch.Tensor], X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return least_squares(pq[0] - pq[1], X, y) + s * (pq[0] + pq[1]).sum()


def l1(X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> prox.L1:
    return prox.L1(s)


@pytest.mark.parametrize(
    "constraint",
    [
        {"lower": 0.0},
        {"upper": 1.0},
        {"equality": lambda w, X, y, s: w.sum() - 1},
        {"inequality": lambda w, X, y, s: w[0] - 1},
    ],
)
def test_a_term_beside_a_constraint_is_refused(constraint: dict[str, Any]) -> None:
    with pytest.raises(
        bilevel.ArgumentError, match=rf"got prox beside {next(iter(constraint))}; write both as one term"
    ):
        bilevel.argmin(least_squares, prox=l1, **constraint)


def test_a_term_can_be_written_as_constraints() -> None:
    x, slope = value_and_slope(bilevel.argmin(split, lower=0.0), (zeros(), zeros()))
    want, reference = value_and_slope(bilevel.argmin(least_squares, prox=l1), zeros())
    torch.testing.assert_close(x, want)
    torch.testing.assert_close(slope, reference)


def test_a_term_and_a_set_can_be_one_term() -> None:
    def both(X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> prox.Custom:
        return prox.Custom(lambda v, step: prox.L1(s).prox(v, step).clamp(-0.1, 0.1))

    x, slope = value_and_slope(bilevel.argmin(least_squares, prox=both), zeros())
    want, reference = value_and_slope(bilevel.argmin(split, lower=0.0, upper=0.1), (zeros(), zeros()))
    assert bool((x.abs() == 0.1).any()) and bool((x.abs() < 0.1).any())
    torch.testing.assert_close(x, want)
    torch.testing.assert_close(slope, reference)


WAYS = [bilevel.Unrolled(), bilevel.Truncated(5), bilevel.OneStep(), bilevel.PhantomGradient(5, 0.5)]


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_other_derivatives_of_a_term_are_refused(way: Any) -> None:
    layer = bilevel.argmin(least_squares, prox=l1, differentiation=way)
    with pytest.raises(
        bilevel.ArgumentError,
        match=r"expected differentiation=bilevel.Implicit\(\).*pass the step to bilevel.fixed_point",
    ):
        value_and_slope(layer, zeros())


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_the_steps_can_be_a_fixed_point(way: Any) -> None:
    def step(w: torch.Tensor, X: torch.Tensor, y: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return prox.L1(s).prox(w - 0.3 * X.mT @ (X @ w - y) / len(y), 0.3)

    x, slope = value_and_slope(bilevel.fixed_point(step, differentiation=way), zeros())
    want, reference = value_and_slope(bilevel.argmin(least_squares, prox=l1), zeros())
    torch.testing.assert_close(x, want, rtol=1e-7, atol=1e-9)
    if way == bilevel.Unrolled():  # the others are biased, as they say
        torch.testing.assert_close(slope, reference, rtol=1e-7, atol=1e-9)
    else:
        assert bool(torch.isfinite(slope))
