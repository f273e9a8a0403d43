"""The columns of the matrix: one small problem of each kind, alone and as a batch, in two dtypes, each with an oracle.

Every problem is a function of (start, θ, data) with θ (2,) and data (2, 2). Its oracle is Newton's method with residual and
Jacobian written out by hand, in float64: nothing of the library is in it, nor anything that the transforms act on but sums,
products and elementary functions. A batch shares θ and start, and has three data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.func import vmap

import bilevel

F64, F32 = torch.float64, torch.float32
Solve = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
EYE = torch.eye(2, dtype=F64)
# Each Newton step at the solution makes at least one more order of derivatives exact; before that, these converge in six.
STEPS = 10


def objective(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    # No number times a tensor of shape (): torch's jvp of a grad makes float64 of that, whatever the dtype.
    return (((X @ x - t) ** 2 + t[0].exp() * x**2) / 2 + x**4 / 4).sum()


def slope_and_hessian(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slope = X.mT @ (X @ x - t) + t[0].exp() * x + x**3
    return slope, X.mT @ X + t[0].exp() * EYE + 3 * x**2 * EYE


def equations(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return x + 0.5 * torch.tanh(X @ x) + t[0].exp() * x**3 - X @ t


def equations_and_jacobian(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bend = (1 - torch.tanh(X @ x) ** 2).unsqueeze(-1) * X
    return equations(x, t, X), EYE + 0.5 * bend + 3 * t[0].exp() * x**2 * EYE


def mapping(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return t[0].cos() * (0.4 * torch.tanh(X @ x + t)) + t.flip(0)


def mapping_and_jacobian(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bend = (1 - torch.tanh(X @ x + t) ** 2).unsqueeze(-1) * X
    return x - mapping(x, t, X), EYE - 0.4 * t[0].cos() * bend


def product(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return X @ x + t.exp() * x


def right_hand_side(t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return t.cos() + X[0]


def linear(function: Callable[..., torch.Tensor], **settings: Any) -> Solve:
    layer = bilevel.linear_solve(function, **settings)
    return lambda start, t, X: layer(right_hand_side(t, X), t, X)


def solved(A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return A⁻¹ b by Cramer's rule, for torch 2.13's linalg.solve is wrong in vmap of jacfwd."""
    (a00, a01), (a10, a11) = A
    determinant = a00 * a11 - a01 * a10
    return torch.stack([a11 * b[0] - a01 * b[1], a00 * b[1] - a10 * b[0]]) / determinant


def newton(made: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Solve:
    """Return the oracle of one problem, from what makes its residual and Jacobian."""

    def solve(start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(2, dtype=F64)
        for _ in range(STEPS):
            residual, jacobian = made(x, t, X)
            x = x - solved(jacobian, residual)
        return x

    return solve


def shrunk(function: Callable[..., torch.Tensor], **settings: Any) -> Solve:
    return bilevel.argmin(function, prox=lambda t, X: bilevel.prox.L1(t.exp() / 4), **settings)


def bounded(function: Callable[..., torch.Tensor], **settings: Any) -> Solve:
    return bilevel.argmin(function, lower=lambda t, X: t.sin() / 2, **settings)


def constrained(function: Callable[..., torch.Tensor], **settings: Any) -> Solve:
    return bilevel.argmin(function, equality=lambda x, t, X: (x * t.exp()).sum() - X.sum() / 2, **settings)


def residuals(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return torch.cat([X @ x - t, t[0].exp() * x.sin(), x**2 / 2])


def residuals_and_hessian(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = (2 * t[0]).exp()
    slope = X.mT @ (X @ x - t) + square * x.sin() * x.cos() + x**3 / 2
    return slope, X.mT @ X + (square * (2 * x).cos() + 3 * x**2 / 2) * EYE


def game(function: Callable[..., torch.Tensor], **settings: Any) -> Solve:
    """Two players, of whom each has half of the objective beside what the other's move costs him."""
    layer = bilevel.equilibrium(
        [lambda x, y, t, X, i=i: function(torch.stack([x, y]), t, X)[i] for i in (0, 1)], **settings
    )
    return lambda start, t, X: torch.stack(layer((start[0], start[1]), t, X))


def payoffs(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return t[0].exp() * x**2 + x**4 / 4 + x * (X @ x.flip(0)) - x * t.cos()


def payoffs_and_jacobian(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (a, b), (c, d) = X
    slope = 2 * t[0].exp() * x + x**3 + torch.stack([a * x[1] + 2 * b * x[0], 2 * c * x[1] + d * x[0]]) - t.cos()
    zero = torch.zeros_like(a)
    cross = torch.stack([torch.stack([2 * b, a]), torch.stack([d, 2 * c])])
    return slope, (2 * t[0].exp() + 3 * x**2) * EYE + cross + zero


def program(function: Callable[..., torch.Tensor], **settings: Any) -> Solve:
    """A quadratic program with one row that is active and one that is not."""

    def solve(start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        Q, q, G, h = function(t, X)
        return bilevel.quadratic_program(Q, q, G=G, h=h, **settings)

    return solve


def program_data(t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, ...]:
    # Sums of vectors, and no operation of two numbers: torch fails in those of an empty batch.
    first, second = EYE.to(X)
    Q = X.mT @ X + (t * first).sum(0, keepdim=True).exp() * EYE.to(X)
    h = torch.stack([second / 2, first]) @ t + 5 * second
    return Q, -t.exp(), torch.stack([t.cos(), -torch.ones_like(t)]), h


def program_oracle(start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    Q, q, G, h = program_data(t, X)
    x = solved(Q, -q)
    direction = solved(Q, G[0])
    return x - direction * ((G[0] @ x - h[0]) / (G[0] @ direction))


def cone_program(function: Callable[..., torch.Tensor], **settings: Any) -> Solve:
    """The same program by its cone."""
    pytest.importorskip("clarabel", reason="Clarabel is an extra, and is not installed")

    def solve(start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        return bilevel.cone_program(*function(t, X), [bilevel.cones.Nonnegative(2)], **settings)

    return solve


def with_signs(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual where the second unknown is zero and the first positive."""
    slope, hessian = slope_and_hessian(x, t, X)
    return _fixed(slope + t.exp() / 4, hessian, x[1])


def at_the_bound(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual where the second unknown is at its bound."""
    slope, hessian = slope_and_hessian(x, t, X)
    return _fixed(slope, hessian, x[1] - t[1].sin() / 2)


def _fixed(slope: torch.Tensor, hessian: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    zero = torch.zeros_like(second)
    rows = [torch.stack([hessian[0, 0], hessian[0, 1]]), torch.stack([zero, zero + 1])]
    return torch.stack([slope[0], second]), torch.stack(rows)


def on_the_plane(x: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual on the plane ⟨a, x⟩ = b: what a lacks of orthogonality to the slope, and ⟨a, x⟩ − b."""
    a, across = t.exp(), torch.stack([-t[1].exp(), t[0].exp()])
    slope, hessian = slope_and_hessian(x, t, X)
    return torch.stack([(a * x).sum() - X.sum() / 2, (across * slope).sum()]), torch.stack(
        [a, (across.unsqueeze(-1) * hessian).sum(0)]
    )


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Parameters
    ----------
    name
        That of the layer.
    function
        The user's function of (x, θ, data).
    make
        function, **settings ↦ a solve of one problem by the library.
    oracle
        The same without the library.
    has_start
        Whether there is a start to be given.
    """

    name: str
    function: Callable[..., torch.Tensor]
    make: Callable[..., Solve]
    oracle: Solve
    has_start: bool = True


KINDS = (
    Kind("argmin", objective, bilevel.argmin, newton(slope_and_hessian)),
    Kind("root", equations, bilevel.root, newton(equations_and_jacobian)),
    Kind("fixed_point", mapping, bilevel.fixed_point, newton(mapping_and_jacobian)),
    Kind(
        "linear_solve", product, linear,
        lambda start, t, X: solved(X + t.exp() * EYE, right_hand_side(t, X)), has_start=False,
    ),
)  # fmt: skip
# One dtype of each suffices: the rule that differentiates them is that of the kinds above.
STRUCTURED = (
    Kind("argmin with prox", objective, shrunk, newton(with_signs)),
    Kind("argmin with bounds", objective, bounded, newton(at_the_bound)),
    Kind("argmin with equality", objective, constrained, newton(on_the_plane)),
    Kind("least_squares", residuals, bilevel.least_squares, newton(residuals_and_hessian)),
    Kind("equilibrium", payoffs, game, newton(payoffs_and_jacobian)),
    Kind("quadratic_program", program_data, program, program_oracle, has_start=False),
    Kind("cone_program", program_data, cone_program, program_oracle, has_start=False),
)


@dataclass(frozen=True)
class Column:
    """A kind of problem, alone or as a batch, in one dtype."""

    kind: Kind
    batched: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.kind.name}, {'batch' if self.batched else 'single'}, {str(self.dtype).removeprefix('torch.')}"

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return start (2,), θ (2,) and data (2, 2) or (3, 2, 2), in this column's dtype if not in another."""
        generator = torch.Generator().manual_seed(3)
        data = torch.tensor([[0.9, -0.5], [0.7, 0.4]], dtype=F64)
        if self.batched:
            data = data + 0.2 * torch.randn(3, 2, 2, generator=generator, dtype=F64)
        # Rounded to float32, so that both dtypes have the same problem.
        values = (torch.tensor([0.1, 0.2], dtype=F64), torch.tensor([0.3, 0.8], dtype=F64), data)
        start, t, X = (value.float().to(dtype or self.dtype) for value in values)
        return start, t, X

    def solve(self, function: Callable[..., torch.Tensor] | None = None, **settings: object) -> Solve:
        """Return the solve by the library, of ``function`` in place of the kind's own if given."""
        one = self.kind.make(self.kind.function if function is None else function, **settings)
        return vmap(one, in_dims=(None, None, 0)) if self.batched else one

    def oracle(self, start: torch.Tensor, t: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Solve without the library, one problem of the batch after the other."""
        if not self.batched:
            return self.kind.oracle(start, t, X)
        return torch.stack([self.kind.oracle(start, t, one) for one in X])


COLUMNS = tuple(
    Column(kind, batched, dtype) for kind in KINDS for batched in (False, True) for dtype in (F64, F32)
) + tuple(Column(kind, batched, F64) for kind in STRUCTURED for batched in (False, True))
