"""Implicit steps with the Gauss–Newton matrix, beside its dense formula."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

import bilevel
from bilevel import Status, Tolerance
from bilevel.errors import ArgumentError
from bilevel.stochastic import ImplicitStep, Microbatches, OutputLoss, StepOptions
from tests.stochastic.problems import Recorder

F64 = torch.float64
GAUSS_NEWTON = bilevel.GaussNewtonHessian()
EXACT = Tolerance(delta_prime=1e-12)


class Case:
    """A network with weights for its examples: G weighs cross-entropies and has a penalty with a strength, F is plain."""

    def __init__(self, dtype: torch.dtype = F64, hidden: int = 4) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(12, 3, generator=generator, dtype=F64).to(dtype)
        self.y = torch.randint(0, 3, (12,), generator=generator)
        torch.manual_seed(2)
        body = [nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 3)] if hidden else [nn.Linear(3, 3)]
        self.model = nn.Sequential(*body).to(dtype)
        self.outer = {"weights": torch.linspace(-1, 1, 12, dtype=dtype), "strength": torch.tensor(-1.0, dtype=dtype)}
        self.rows = torch.arange(12)
        self.objective = OutputLoss(
            lambda inner, outer, rows: inner(self.x[rows]),
            lambda outputs, outer, rows: self.weighed(outputs, outer, rows),
            lambda inner, outer: outer["strength"].exp() * sum((p**2).sum() for p in inner.parameters()),
        )

    def weighed(self, outputs: torch.Tensor, outer: Any, rows: torch.Tensor) -> torch.Tensor:
        losses = nn.functional.cross_entropy(outputs, self.y[rows], reduction="none")
        return (outer["weights"][rows].sigmoid() * losses).mean()

    def validation(self, inner: Any, outer: Any, rows: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(inner(self.x[rows]).flip(-1), self.y[rows])

    def method(self, *, steps: int = 0, objective: Any = None, **settings: Any) -> ImplicitStep:
        chosen = {
            "inner_optimizer": partial(torch.optim.SGD, lr=0.1),
            "outer_optimizer": Recorder,
            "linear_solver": bilevel.Exact(),
            "tolerance": EXACT,
            "hessian": GAUSS_NEWTON,
            **settings,
        }
        losses = (objective or self.objective, self.validation)
        return ImplicitStep(losses, self.model, self.outer, inner_steps=steps, **chosen)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return H, the Gauss–Newton matrix, ∇_φ F and ∂²G/∂φ∂weights, by torch.func on one flat vector."""
        names = [name for name, _ in self.model.named_parameters()]
        values = [p.detach() for p in self.model.parameters()]
        shapes, sizes = [v.shape for v in values], [v.numel() for v in values]
        flat = torch.cat([v.reshape(-1) for v in values])
        outer = {name: t.detach() for name, t in self.outer.items()}

        def outputs(w: torch.Tensor) -> torch.Tensor:
            parts = zip(names, w.split(sizes), shapes, strict=True)
            return functional_call(self.model, {n: part.reshape(s) for n, part, s in parts}, (self.x,))

        def penalty(w: torch.Tensor) -> torch.Tensor:
            return outer["strength"].exp() * (w**2).sum()

        def inner(w: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self.weighed(outputs(w), {"weights": weights}, self.rows) + penalty(w)

        weights = outer["weights"]
        H = hessian(inner)(flat, weights)
        z = outputs(flat)
        J = jacrev(outputs)(flat).reshape(z.numel(), -1)
        L = hessian(lambda z: self.weighed(z, outer, self.rows))(z).reshape(z.numel(), -1)
        M = J.T @ L @ J + hessian(penalty)(flat)
        slope = jacrev(lambda w: nn.functional.cross_entropy(outputs(w).flip(-1), self.y))(flat)
        return H, M, slope, jacrev(jacrev(inner), argnums=1)(flat, weights)


@pytest.mark.parametrize(("dtype", "close"), [(F64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_direction_is_that_of_the_dense_matrix(dtype: torch.dtype, close: float, parts: int) -> None:
    case = Case(dtype)
    H, M, slope, cross = case.dense()
    q = torch.linalg.solve(M, slope)
    assert float((H - M).norm() / H.norm()) > 0.01  # the two matrices differ here
    settings = {} if dtype is F64 else {"tolerance": Tolerance(delta_prime=1e-5)}
    method = case.method(**settings)
    batch = case.rows if parts == 1 else Microbatches(list(case.rows.split(4)))
    result = method.step(batch, case.rows)
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in method.adjoint]), q, rtol=close, atol=close)
    found = dict(zip(case.outer, method.outer_optimizer.direction, strict=True))  # type: ignore[attr-defined]
    torch.testing.assert_close(found["weights"], -cross.T @ q, rtol=close, atol=close)
    torch.testing.assert_close(result.exact_residual_norm, (H @ q - slope).norm(), rtol=10 * close, atol=close)


def test_it_is_the_hessian_where_the_outputs_are_linear() -> None:
    directions = []
    for hessian_choice in (bilevel.FullHessian(), GAUSS_NEWTON):
        case = Case(hidden=0)
        method = case.method(hessian=hessian_choice, steps=3)
        result = method.step(case.rows, case.rows)
        directions.append(method.outer_optimizer.direction)  # type: ignore[attr-defined]
    for one, other in zip(*directions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert float(result.exact_residual_norm) < 1e-10


def test_it_is_positive_definite_where_the_hessian_is_not() -> None:
    case = Case()
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter *= 4
        case.outer["strength"] -= 6
    H = case.dense()[0]
    assert float(torch.linalg.eigvalsh(H)[0]) < 0
    linear = bilevel.CG(max_steps=40)
    full = case.method(hessian=None, linear_solver=linear, tolerance=None).step(case.rows, case.rows)
    newton = case.method(linear_solver=linear, tolerance=None).step(case.rows, case.rows)
    assert full.linear_status is Status.INDEFINITE and full.exact_residual_norm is None
    assert newton.linear_status is not None and newton.linear_status.success


def test_passes_and_gradient_steps() -> None:
    case = Case()
    method = case.method(linear_solver=None, adjoint_steps=4, steps=2, warm_start=False, tolerance=None)
    method.step(case.rows, case.rows)
    # Forward: two inner steps, G, F. Reverse: as many, Bᵀ q, the map u ↦ Jᵀ u, two for each of three products, and the exact H q.
    assert method.passes == {"forward": 4, "reverse": 4 + 1 + 1 + 6 + 1}


def test_a_model_without_a_penalty_and_a_pytree() -> None:
    w, theta, x = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=F64)
    objective = OutputLoss(lambda w, theta, x: x @ w, lambda z, theta, x: 0.5 * ((z - theta) ** 2).sum())
    method = ImplicitStep((objective, lambda w, theta, x: w.sum()), w, theta, inner_steps=0, outer_optimizer=Recorder,
                          linear_solver=bilevel.Exact(), hessian=GAUSS_NEWTON, tolerance=EXACT)  # fmt: skip
    method.step(x, x)
    expected = torch.linalg.solve(x.T, torch.ones(2, dtype=F64))  # dw/dθ = x⁻¹
    torch.testing.assert_close(method.outer_optimizer.direction[0], expected)  # type: ignore[attr-defined]


def test_mistakes_are_named() -> None:
    case = Case()
    with pytest.raises(ArgumentError, match=r"expected inner_objective to be a bilevel\.stochastic\.OutputLoss"):
        case.method(objective=lambda inner, outer, rows: case.objective(inner, outer, rows))
    with pytest.raises(ArgumentError, match="expected hessian to be"):
        case.method(hessian="gauss-newton")
    with pytest.raises(ArgumentError, match="expected outputs to return a floating-point tensor, got list"):
        bad = OutputLoss(lambda inner, outer, rows: [inner(case.x)], lambda z, outer, rows: z[0].sum())
        case.method(objective=bad).step(case.rows, case.rows)
    with pytest.raises(ArgumentError, match="expected no grad_scaler"):
        case.method(options=StepOptions(grad_scaler=torch.amp.GradScaler("cpu")))
