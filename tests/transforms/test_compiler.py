"""What torch's compiler refuses inside a transform with no layer there, and what works in place of it with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad

import bilevel

from .rows import NEITHER_LEAF_NOR_VIEW, compiled
from .test_matrix import SHOWN

# As in test_matrix.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
T = torch.tensor([0.3, 0.8], dtype=torch.float64)


def total(x: torch.Tensor) -> torch.Tensor:
    return (x * x).sum()


@torch.compiler.disable
def outside(t: torch.Tensor) -> torch.Tensor:
    return t.sin()


def compiled_function(t: torch.Tensor) -> torch.Tensor:
    inner = compiled(total, "eager")
    return grad(lambda t: inner(2 * t))(t)


def compiled_caller(t: torch.Tensor) -> torch.Tensor:
    return compiled(grad(lambda t: total(outside(t))), "eager")(t)


@pytest.mark.skipif(
    not torch.__version__.startswith(SHOWN), reason="other versions of the compiler take in more or less"
)
@pytest.mark.parametrize("run", [compiled_function, compiled_caller])
def test_torch_alone_refuses_what_is_neither_leaf_nor_view(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(NEITHER_LEAF_NOR_VIEW.error, match=NEITHER_LEAF_NOR_VIEW.match):
        run(T)


def first(x: Any, y: Any, t: torch.Tensor) -> torch.Tensor:
    return x**2 + x * y / 2 - x * t[0]


def second(x: Any, y: Any, t: torch.Tensor) -> torch.Tensor:
    return y**2 + x * y / 2 - y * t[1]


# x = A⁻¹ t, with A = [[2, 1/2], [1/2, 2]].
GRADIENT = torch.linalg.inv(torch.tensor([[2, 0.5], [0.5, 2]], dtype=torch.float64)).sum(0)
START = (torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))


def test_the_objectives_of_players_may_be_compiled() -> None:
    game = bilevel.equilibrium([compiled(first, "eager"), torch.compile(second, backend="eager")])
    torch.testing.assert_close(grad(lambda t: sum(game(START, t)))(T), GRADIENT)


def test_a_gradient_through_an_equilibrium_may_be_compiled_in_one_function() -> None:
    game = bilevel.equilibrium([first, second])
    torch.testing.assert_close(compiled(grad(lambda t: sum(game(START, t))), "eager")(T), GRADIENT)


def layer_of_cubes(t: torch.Tensor) -> torch.Tensor:
    return bilevel.argmin(lambda x, t: (x**4 / 4 + x**2 / 2 - x * t).sum())(torch.zeros(2, dtype=t.dtype), t)


def program_with_a_bound(t: torch.Tensor) -> torch.Tensor:
    return bilevel.quadratic_program(torch.eye(2, dtype=t.dtype), -t, lower=0.0)


TRACERS = [
    lambda solve: torch.func.linearize(solve, T),
    lambda solve: torch.fx.experimental.proxy_tensor.make_fx(solve)(T),
    lambda solve: torch.jit.trace(solve, T),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trace", TRACERS, ids=["linearize", "make_fx", "jit"])
@pytest.mark.parametrize("solve", [layer_of_cubes, program_with_a_bound])
def test_tracers_are_refused_with_a_remedy_that_works(
    trace: Callable[[Any], Any], solve: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with pytest.raises(bilevel.TransformError, match="expected values around a solve, got a tracer"):
        trace(solve)
    jacobian = torch.func.vmap(lambda v: torch.func.jvp(solve, (T,), (v,))[1])(torch.eye(2, dtype=torch.float64))
    x = solve(T)
    slopes = 1 / (3 * x**2 + 1) if solve is layer_of_cubes else torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(jacobian, torch.diag(slopes))
