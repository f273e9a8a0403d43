"""Least squares as an argmin whose residuals are known: G(x, θ) = ½ ‖r(x, θ)‖², or Σ c(r_i) of a robust loss c.

R = ∇_x G = Jᵀ c′(r), and ∂_x R = Jᵀ c″(r) J + Σ c′(r_i) ∇²r_i is the full Hessian: derivatives are those of any argmin. Solvers that know
residuals (:class:`bilevel.LevenbergMarquardt`) take r and J from here, in shapes (batch, m) and (batch, m, n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from bilevel._torch.double_backward import Repeatable
from bilevel._torch.norms import WrittenNorms
from bilevel._torch.reverse import vjp
from bilevel.equations.problem import Problem
from bilevel.equations.system import ArgminSystem, RootSystem
from bilevel.errors import ArgumentError, BilevelError, ShapeError
from bilevel.operators import JacobianOperator
from bilevel.pytree import moves
from bilevel.robust import RobustLoss

__all__ = [
    "GaussNewtonSystem",
    "LeastSquaresSystem",
    "Loss",
    "Products",
    "has_residuals",
    "residual_count",
    "residual_products",
    "residual_vector",
    "weighted_jacobian",
]

Loss = RobustLoss | Callable[..., RobustLoss]
"""A loss, or a function of a layer's (*args, **kwargs) that returns one."""


@dataclass(frozen=True, eq=False)
class LeastSquaresSystem(ArgminSystem):
    """G = ½ ‖r‖², or Σ c(r_i) with a robust loss c.

    Parameters
    ----------
    loss
        c, or a function of the layer's arguments that returns it; None for ½ r².
    """

    loss: Loss | None = None

    noun = "residual"
    label = "least_squares"

    def residuals(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return one problem's residuals (m,) in the dtype of the unknown, differentiable; a complex one counts as two."""
        return residual_vector(self.call(flat, *tensors), self.where).to(flat.dtype)

    def output(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        residuals, loss = self.residuals(flat, *tensors), self.loss_of(tensors)
        return 0.5 * (residuals * residuals).sum() if loss is None else loss.cost(residuals).sum()

    def loss_of(self, tensors: Sequence[torch.Tensor]) -> RobustLoss | None:
        """Return the loss that this call's arguments give."""
        if self.loss is None or isinstance(self.loss, RobustLoss):
            return self.loss
        args, kwargs = self.arguments.rebuild(tensors)
        made = self.loss(*args, **kwargs)
        if not isinstance(made, RobustLoss):
            raise ArgumentError(
                f"{self.where}: expected loss to return a bilevel.robust.RobustLoss, got {type(made).__name__}; return one, such as "
                "bilevel.robust.Huber(delta)"
            )
        return made

    def slopes(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Return one problem's c′(r) (m,), differentiable; r itself of plain least squares."""
        residuals, loss = self.residuals(flat, *tensors), self.loss_of(tensors)
        return residuals if loss is None else loss.slope(residuals)


class GaussNewtonSystem(LeastSquaresSystem):
    """The same R with the Gauss–Newton matrix Jᵀ c″(r) J in the place of its Jacobian: for derivatives that are asked for by name.

    J is taken at a copy of x that nothing differentiates. The derivative by θ is complete.
    """

    def full(self) -> LeastSquaresSystem:
        """Return the system with its own Hessian."""
        return LeastSquaresSystem(**{item.name: getattr(self, item.name) for item in fields(self)})

    def _gradient(self, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        _, pull = vjp(lambda point: self.residuals(point, *tensors), flat.detach())
        found: torch.Tensor = pull(self.slopes(flat, *tensors))[0]
        return found

    def residual(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        with WrittenNorms(), Repeatable():
            found: torch.Tensor = self.lifted(self._gradient)(x, *tensors)
        return found

    def residual_and_value(self, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._gradient(flat, *tensors), self.output(flat, *tensors)

    def plain_values(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *, graph: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.outputs(x, *tensors), self.residual(x, *tensors)


def residual_vector(made: Any, where: str) -> torch.Tensor:
    """Return the tensors of the pytree ``made``, which a user's function returned, as one vector (m,); a complex number counts as two."""
    leaves = pytree.tree_leaves(made)
    wrong = next((leaf for leaf in leaves if not moves(leaf)), None)
    if wrong is not None or not leaves:
        got = f"{tuple(wrong.shape)} {wrong.dtype}" if isinstance(wrong, torch.Tensor) else type(wrong).__name__
        raise ShapeError(
            f"{where}: expected residual to return floating-point or complex tensors, got {got if leaves else 'none'}; return a tensor of "
            "any shape, or a pytree of them, whose squares are summed"
        )
    # Not torch.view_as_real: its gradient has to begin at an even place in memory, and a part of a whole may not.
    parts = [torch.cat([t.real.reshape(-1), t.imag.reshape(-1)]) if t.is_complex() else t.reshape(-1) for t in leaves]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def has_residuals(problem: Problem) -> bool:
    """Return whether the problem is one of least squares, or of equations, whose least squares are those of their residual."""
    return isinstance(problem.system, (LeastSquaresSystem, RootSystem))


def refuse_objective(problem: Problem, solver: str) -> None:
    """Raise :class:`ArgumentError` unless the problem has residuals for ``solver``."""
    if not has_residuals(problem):
        raise ArgumentError(
            f"{problem.where}: expected a least-squares problem for {solver}, got an objective; write bilevel.least_squares(residual), where the "
            "objective is ½‖residual‖², or take Newton() or LBFGS()"
        )


def residual_count(problem: Problem, x: torch.Tensor) -> int:
    """Return m, the number of residuals of each problem."""
    if isinstance(problem.system, LeastSquaresSystem):
        return _evaluate(problem, "residuals", _residuals, x)[0].shape[-1]
    return problem.size


def weighted_jacobian(
    problem: Problem, x: torch.Tensor, *, by_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the values G (batch,), and r̃ (batch, m) and J̃ (batch, m, n) with ∇G = J̃ᵀ r̃ and the model J̃ᵀ J̃ of the Hessian.

    Of plain least squares they are r and J; a robust loss weights both (:meth:`RobustLoss.weighted`).

    Parameters
    ----------
    problem
        The problems.
    x
        (batch, n).
    by_rows
        Whether J is made of m reverse passes, and not of n over the graph of one, which a function that can be differentiated once alone has not.
    """
    if not by_rows:
        try:
            return _jacobian(problem, x, by_rows=False)
        except (RuntimeError, NotImplementedError) as error:  # an operation that can be differentiated once alone
            if isinstance(error, BilevelError):
                raise
    return _jacobian(problem, x, by_rows=True)


@dataclass(frozen=True, eq=False)
class Products:
    """The values G (batch,), r̃ (batch, m) and products with J̃, as of :func:`weighted_jacobian`.

    ``matvec`` maps v (batch, n) to J̃ v (batch, m), ``rmatvec`` maps u (batch, m) to J̃ᵀ u (batch, n).
    """

    value: torch.Tensor
    residual: torch.Tensor
    matvec: Callable[[torch.Tensor], torch.Tensor]
    rmatvec: Callable[[torch.Tensor], torch.Tensor]


def residual_products(problem: Problem, x: torch.Tensor) -> Products:
    """Return r̃ and the products with J̃ at ``x`` (batch, n), of one retained graph."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        residuals = problem.system.lifted(partial(_one_residual, problem.system))(
            problem.shaped(point), *problem.tensors
        )
        residuals = residuals.reshape(len(x), -1)  # (batch, m)
    jacobian = JacobianOperator(residuals, point)
    plain = residuals.detach()
    system = problem.system
    if not isinstance(system, LeastSquaresSystem) or system.loss is None:
        return Products(0.5 * (plain * plain).sum(-1), plain, jacobian.matvec, jacobian.rmatvec)
    shaped = plain.reshape(*problem.system.batch_shape, -1)
    with torch.no_grad():
        cost, root, weighted = (t.detach() for t in system.lifted(partial(_weights, system))(shaped, *problem.tensors))
    root, weighted = root.reshape(plain.shape), weighted.reshape(plain.shape)
    return Products(
        cost.reshape(len(x)), weighted, lambda v: root * jacobian.matvec(v), lambda u: jacobian.rmatvec(root * u)
    )


def _one_residual(system: Any, flat: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = (system.residuals if isinstance(system, LeastSquaresSystem) else system.output)(
        flat, *tensors
    )
    return found


def _weights(system: LeastSquaresSystem, residuals: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    loss = system.loss_of(tensors)
    assert loss is not None
    return loss.cost(residuals).sum(), *loss.weighted(residuals)


def _evaluate(problem: Problem, name: Any, one: Callable[..., Any], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return ``one`` of each problem, or a replay of it."""

    def evaluation(x: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            made = problem.system.lifted(partial(one, problem.system))(problem.shaped(x), *tensors)
        return [t.detach().reshape(len(x), *t.shape[len(problem.system.batch_shape) :]) for t in made]

    return problem.evaluate(name, evaluation, x)


def _residuals(system: Any, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
    return (_one_residual(system, flat, *tensors),)


def _jacobian(problem: Problem, x: torch.Tensor, *, by_rows: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = _evaluate(problem, ("jacobian", by_rows), partial(_rows if by_rows else _columns), x)
    value, residuals, matrix = made
    return value, residuals, matrix


def _rows(system: Any, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return one problem's G (), r̃ (m,) and J̃ (m, n), by reverse passes."""
    made: Any = vjp(lambda point: _one_residual(system, point, *tensors), flat)
    residuals, pull = made
    units = torch.eye(residuals.shape[0], dtype=residuals.dtype, device=residuals.device)
    (matrix,) = vmap(pull)(units)
    return _weighted(system, residuals, matrix, tensors)


def _columns(system: Any, flat: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the same by n passes over a reverse pass, whose transpose is J."""
    made: Any = vjp(lambda point: _one_residual(system, point, *tensors), flat)
    residuals, pull = made
    # Not by forward mode, of which evaluations cannot be replayed, and which not all of torch's operations have.
    _, push = vjp(lambda u: pull(u)[0], torch.zeros_like(residuals))
    units = torch.eye(flat.shape[0], dtype=flat.dtype, device=flat.device)
    (columns,) = vmap(push)(units)  # (n, m)
    return _weighted(system, residuals, columns.mT, tensors)


def _weighted(
    system: Any, residuals: torch.Tensor, matrix: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    loss = system.loss_of(tensors) if isinstance(system, LeastSquaresSystem) else None
    if loss is None:
        return 0.5 * (residuals * residuals).sum(), residuals, matrix
    root, weighted = loss.weighted(residuals)
    return loss.cost(residuals).sum(), weighted, root.unsqueeze(-1) * matrix
