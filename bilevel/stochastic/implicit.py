"""The warm-started implicit step: any inner optimiser, then one linear solve."""

from __future__ import annotations

from typing import Any

import torch

from bilevel.errors import ArgumentError
from bilevel.layers.least_squares import FullHessian, GaussNewtonHessian, check_hessian
from bilevel.linear._base import LinearSolverLike, as_linear_solver, solve_linear
from bilevel.linear.kept import Kept
from bilevel.operators import FunctionOperator
from bilevel.reports import Status
from bilevel.setting_checks import check_steps
from bilevel.stochastic._adjoint import AdjointMethod
from bilevel.stochastic._batches import BatchSource
from bilevel.stochastic._gauss_newton import GaussNewtonLinearization, OutputLoss
from bilevel.stochastic._lists import Tensors, norm, subtract, subtract_from
from bilevel.stochastic._method import Directions, Problem
from bilevel.stochastic._optimizers import preconditioner
from bilevel.stochastic._oracle import Linearization
from bilevel.tolerance import Tolerance

__all__ = ["ImplicitStep"]


class ImplicitStep(AdjointMethod):
    """T steps of any inner optimiser, H q = ∇_φ F solved from the last q, and one outer step along ∇_θ F − Bᵀ q.

    T + 2 forward and T + 3 reverse passes, and one reverse pass for each product with H. Memory does not depend on T.

    Parameters
    ----------
    problem, inner, outer
        See :class:`~bilevel.stochastic.AdjointMethod`.
    inner_steps
        T.
    linear_solver
        A linear solver of the library, such as ``bilevel.CG(max_steps=10)`` or ``bilevel.Neumann(terms=10, step=0.1)``, or a function
        (operator, rhs) ↦ x on vectors (1, n). ``bilevel.CG(max_steps=5, preconditioner=bilevel.Kept(bilevel.Kronecker.like(model)))`` keeps
        a preconditioner from step to step. None: ``adjoint_steps`` gradient steps on ½ qᵀH q − qᵀ∇_φ F.
    adjoint_steps
        Only without ``linear_solver``.
    warm_start
        Begin from the last q, and not from zero.
    preconditioned
        Let D be the preconditioner of the inner optimiser: lr/(√v̂ + ε) of Adam, AdamW, RMSprop or Adagrad. Gradient steps become
        q ← q − D (H q − ∇_φ F); a linear solver solves D^½ H D^½ y = D^½ ∇_φ F, q = D^½ y. With one gradient step and without
        ``warm_start``, q = D ∇_φ F, as in SAMA, which in addition differentiates D itself and is first order by a difference quotient.
    hessian
        The matrix H: :class:`bilevel.FullHessian` by default. :class:`bilevel.GaussNewtonHessian` takes the Gauss–Newton matrix, for an
        ``inner_objective`` that is an :class:`OutputLoss`. It is positive semidefinite where the Hessian of a network is not, and biased:
        ``exact_residual_norm`` of the result is what the exact H leaves of the system. A product takes two reverse passes then, and a step two more.
    tolerance
        Of the linear solve; None: as accurate as the solver's budget allows.
    **settings
        The optimisers and options of :class:`~bilevel.stochastic.AdjointMethod`.

    Raises
    ------
    ArgumentError
        If a setting is out of its range; with ``preconditioned`` if the inner optimiser has no diagonal preconditioner; with the
        Gauss–Newton matrix if the inner objective is no :class:`OutputLoss`.

    References
    ----------
    Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016; Lorraine, Vicol, Duvenaud, "Optimizing millions of
    hyperparameters by implicit differentiation", AISTATS 2020; Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing, "Making scalable
    meta learning practical" (SAMA), NeurIPS 2023, Section 3.

    Examples
    --------
    >>> import functools, torch
    >>> from bilevel.stochastic import ImplicitStep
    >>> losses = (  # the minimiser of the inner loss is w = θ; the outer loss is least at w = 1
    ...     lambda w, theta, data: 0.5 * ((w - theta) ** 2).sum(),
    ...     lambda w, theta, data: 0.5 * ((w - data) ** 2).sum(),
    ... )
    >>> sgd, w, theta = functools.partial(torch.optim.SGD, lr=0.2), torch.zeros(2), torch.zeros(2)
    >>> method = ImplicitStep(losses, w, theta, inner_optimizer=sgd, outer_optimizer=sgd)
    >>> for _ in range(200):
    ...     result = method.step(None, torch.ones(2))
    >>> [round(number, 2) for number in theta.tolist()]
    [1.0, 1.0]
    """

    _STATE = ("_preconditioner_state",)

    def __init__(
        self,
        problem: Problem,
        inner: Any,
        outer: Any,
        *,
        inner_steps: int = 5,
        linear_solver: LinearSolverLike | None = None,
        adjoint_steps: int = 5,
        warm_start: bool = True,
        preconditioned: bool = False,
        hessian: FullHessian | GaussNewtonHessian | None = None,
        tolerance: Tolerance | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(problem, inner, outer, **settings)
        self._output_loss = self._checked_hessian(hessian)
        check_steps(self.where, "inner_steps", inner_steps, least=0)
        check_steps(self.where, "adjoint_steps", adjoint_steps)
        self.inner_steps, self.adjoint_steps = inner_steps, adjoint_steps
        self.linear_solver = None if linear_solver is None else as_linear_solver(linear_solver)
        self.warm_start, self.preconditioned = warm_start, preconditioned
        self.tolerance = Tolerance() if tolerance is None else tolerance
        if not isinstance(self.tolerance, Tolerance):
            raise ArgumentError(
                f"{self.where}: expected tolerance to be a bilevel.Tolerance, got {tolerance!r}; pass bilevel.Tolerance(delta_prime=...)"
            )

    def _directions(self, inner: BatchSource, outer: BatchSource) -> Directions:
        self._inner_steps(inner, self.inner_steps)
        lower = self._linearized(inner.draw())
        upper = self._oracle.outer_gradients(outer.draw())
        self._require_finite("gradient", lower.gradient, upper.inner)
        size = lower.norm_of_gradient()
        if not self.warm_start:
            for tensor in self.adjoint:
                tensor.zero_()
        if self.linear_solver is None:
            residual, status = self._by_gradient_steps(lower, upper.inner), None
        else:
            residual, status = self._by_linear_solver(lower, upper.inner)
        exact = None
        if isinstance(lower, GaussNewtonLinearization):
            exact = norm(subtract_from(lower.exact_hessian(self.adjoint), upper.inner))
        return Directions(
            outer=subtract(upper.outer, lower.cross(self.adjoint)),
            inner_loss=lower.loss,
            outer_loss=upper.loss,
            inner_gradient_norm=size,
            adjoint_residual_norm=residual,
            exact_residual_norm=exact,
            linear_status=status,
        )

    def _linearized(self, batch: Any) -> Linearization:
        if self._output_loss is None:
            return self._oracle.linearize(batch)
        return GaussNewtonLinearization(self._oracle, batch, None, self._output_loss)

    def _checked_hessian(self, hessian: Any) -> OutputLoss | None:
        """Return the objective whose Gauss–Newton matrix is taken; None for the Hessian."""
        check_hessian(self.where, hessian)
        if not isinstance(hessian, GaussNewtonHessian):
            return None
        objective = self._oracle.objective("inner_objective")
        if not isinstance(objective, OutputLoss):
            raise ArgumentError(
                f"{self.where}: expected inner_objective to be a bilevel.stochastic.OutputLoss with hessian=bilevel.GaussNewtonHessian(), got "
                f"{objective!r}; write OutputLoss(outputs, loss, penalty), which tells the model's outputs from the loss"
            )
        if self._scale.enabled:
            raise ArgumentError(
                f"{self.where}: expected no grad_scaler with hessian=bilevel.GaussNewtonHessian(), got one; use autocast=torch.bfloat16, which "
                "needs none"
            )
        return objective

    def _by_gradient_steps(self, lower: Linearization, rhs: Tensors) -> torch.Tensor:
        diagonal = self._preconditioner() if self.preconditioned else None
        size = self._gradient_step(lower, rhs, diagonal, cold=not self.warm_start)
        for _ in range(self.adjoint_steps - 1):
            size = self._gradient_step(lower, rhs, diagonal)
        return size

    def _gradient_step(
        self, lower: Linearization, rhs: Tensors, diagonal: Tensors | None, *, cold: bool = False
    ) -> torch.Tensor:
        """Let q make one step, and return ‖H q − b‖ before it. The residual itself is freed: the next product needs its room."""
        residual = [-b for b in rhs] if cold else subtract_from(lower.hessian(self.adjoint), rhs)  # H 0 needs no pass
        if diagonal is None:
            self._move("adjoint", residual)
        else:
            self._require_finite("adjoint direction", residual)
            for q, d, r in zip(self.adjoint, diagonal, residual, strict=True):
                q.sub_(d * r)
        return norm(residual)

    def _by_linear_solver(self, lower: Linearization, rhs: Tensors) -> tuple[torch.Tensor, Status]:
        assert self.linear_solver is not None
        roots = [d.sqrt() for d in self._preconditioner()] if self.preconditioned else None
        b = _flat(rhs if roots is None else [s * part for s, part in zip(roots, rhs, strict=True)])

        def product(v: torch.Tensor) -> torch.Tensor:
            parts = self._parts(v)
            if roots is not None:
                parts = [s * part for s, part in zip(roots, parts, strict=True)]
            found = lower.hessian(parts)
            if roots is not None:
                found = [s * part for s, part in zip(roots, found, strict=True)]
            return _flat(found)

        start = self.adjoint if roots is None else [q / s for q, s in zip(self.adjoint, roots, strict=True)]
        operator = FunctionOperator(product, b, symmetric=True)
        warm = _flat(start) if self.warm_start and self.steps else None
        outcome = solve_linear(self.linear_solver, operator, b, self.tolerance.linear(b.dtype), warm)
        found = self._parts(outcome.x)
        self._require_finite("solution of the linear system", found)
        if roots is not None:
            found = [s * part for s, part in zip(roots, found, strict=True)]
        for q, part in zip(self.adjoint, found, strict=True):
            q.copy_(part)
        return outcome.residual_norm.squeeze(0), Status(int(outcome.status))

    @property
    def _kept(self) -> Kept | None:
        kept = getattr(self.linear_solver, "preconditioner", None)
        return kept if isinstance(kept, Kept) else None

    @property
    def _preconditioner_state(self) -> dict[str, Any]:
        return {} if self._kept is None else self._kept.state_dict()

    @_preconditioner_state.setter
    def _preconditioner_state(self, state: dict[str, Any] | None) -> None:
        if self._kept is not None:
            self._kept.load_state_dict(state or {})

    def _preconditioner(self) -> Tensors:
        return preconditioner(self.inner_optimizer, self._inner.tensors, self.where)

    def _parts(self, flat: torch.Tensor) -> Tensors:
        """Return a vector (1, n) in the shapes of the inner variables."""
        sizes = [tensor.numel() for tensor in self.adjoint]
        parts = flat.squeeze(0).split(sizes)
        return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, self.adjoint, strict=True)]


def _flat(tensors: Tensors) -> torch.Tensor:
    """Return tensors as one vector (1, n) of their widest dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]).unsqueeze(0)
