"""Checkpoints and saved-tensor hooks: around a layer of each kind, and inside its function, with hooks around the caller too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import grad, hessian
from torch.utils.checkpoint import checkpoint

import bilevel

from .transforms.problems import F64, KINDS, STRUCTURED, Column, Solve
from .transforms.rows import scalar

COLUMNS = [Column(kind, batched, F64) for kind in (*KINDS, *STRUCTURED) for batched in (False, True)]
kind = pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
CALLERS: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "hooks": lambda: saved_tensors_hooks(lambda saved: saved.numpy(force=True).copy(), torch.from_numpy),
    "save_on_cpu": save_on_cpu,
}


def derivatives(around: str, solve: Solve, start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradient, and the Hessian times ones, of a loss that is computed with hooks ``around`` it."""
    t = t.clone().requires_grad_(True)
    if around == "checkpoint":
        loss = scalar(checkpoint(lambda t: solve(start, t, X), t, use_reentrant=False))
    else:
        with CALLERS[around]():
            loss = scalar(solve(start, t, X))
    (first,) = torch.autograd.grad(loss, t, create_graph=True)
    return [first.detach(), torch.autograd.grad(first.sum(), t)[0]]


def reference(column: Column, start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> list[torch.Tensor]:
    def loss(t: torch.Tensor) -> torch.Tensor:
        return scalar(column.oracle(start, t, X))

    return [grad(loss)(t), hessian(loss)(t).sum(0)]


@kind
@pytest.mark.parametrize("around", [*CALLERS, "checkpoint"])
def test_around_a_layer_both_derivatives_are_right(column: Column, around: str) -> None:
    found = derivatives(around, column.solve(), *column.inputs())
    torch.testing.assert_close(found, reference(column, *column.inputs()), rtol=1e-8, atol=1e-9)


@kind
@pytest.mark.parametrize("around", [*CALLERS, "checkpoint"])
def test_inside_a_function_a_second_derivative_is_right_or_refused(column: Column, around: str) -> None:
    solve = column.solve(lambda *inputs: checkpoint(column.kind.function, *inputs, use_reentrant=False))
    if column.kind.name in ("quadratic_program", "cone_program"):
        if column.batched:
            return  # the caller's own vmap of a checkpoint
        # It has no function that the library calls: the caller's graph alone holds the checkpoint.
        found = derivatives(around, solve, *column.inputs())
        torch.testing.assert_close(found, reference(column, *column.inputs()), rtol=1e-8, atol=1e-9)
        return
    with pytest.raises(bilevel.TransformError, match="put the checkpoint around the call of the layer"):
        derivatives(around, solve, *column.inputs())


@pytest.mark.parametrize("around", [*CALLERS, "checkpoint"])
@pytest.mark.parametrize("column", [c for c in COLUMNS if c.kind.name in ("argmin", "root") and not c.batched])
def test_inside_a_function_a_first_derivative_is_right(column: Column, around: str) -> None:
    start, t, X = column.inputs()
    t = t.clone().requires_grad_(True)
    solve = column.solve(lambda *inputs: checkpoint(column.kind.function, *inputs, use_reentrant=False))
    if around == "checkpoint":
        loss = scalar(checkpoint(lambda t: solve(start, t, X), t, use_reentrant=False))
    else:
        with CALLERS[around]():
            loss = scalar(solve(start, t, X))
    loss.backward()
    torch.testing.assert_close(t.grad, reference(column, *column.inputs())[0], rtol=1e-8, atol=1e-9)


class Problem(bilevel.BilevelProblem):
    def inner_objective(self, inner: torch.Tensor, outer: torch.Tensor, data: Any, /) -> torch.Tensor:
        return ((inner - outer) ** 2).sum() + outer.exp().sum() * (inner**2).sum() + (inner**4).sum()

    def outer_objective(self, inner: torch.Tensor, outer: torch.Tensor, data: Any, /) -> torch.Tensor:
        return (inner.sin() * outer).sum()


@pytest.mark.parametrize("around", [*CALLERS, "checkpoint"])
def test_around_a_problem_and_a_rectangular_system_gradients_are_those_without(around: str) -> None:
    A = torch.tensor([[1.0, 0.2], [0.1, 2.0], [0.5, -0.3]], dtype=F64)
    system = bilevel.linear_solve(lambda x, t: A @ (x * t.exp()), unknown=torch.zeros(2, dtype=F64))
    right = torch.tensor([1.0, -1.0, 2.0], dtype=F64)
    doors: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: Problem()(t, (), init=torch.zeros(2, dtype=F64)),
        lambda t: system(right, t),
    ]
    for door in doors:
        both = [
            derivatives(way, lambda start, t, X, door=door: door(t), A, torch.tensor([0.3, 0.8], dtype=F64), A)
            for way in ("nothing", around)
        ]
        torch.testing.assert_close(both[0], both[1], rtol=1e-9, atol=1e-10)
