"""The cross-validation loss as a function of the strengths: K folds solved and differentiated as one batch."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

import bilevel
from bilevel.hyperopt.linear_models import FOLD_DIMS, LinearModel, Parameters
from bilevel.hyperopt.outcome import OuterStep
from bilevel.hyperopt.problem import HyperparameterOptimization
from bilevel.hyperopt.splits import Splits

__all__ = ["TOLERANCE", "Folds", "tolerance_at"]

TOLERANCE = bilevel.Tolerance(delta=1e-10, delta_prime=1e-10)
"""Residuals of the two solves. The weakest strength makes condition numbers near 1e6, where the default, all
that float64 holds, is at times out of reach."""


def tolerance_at(log_strength: float) -> bilevel.Tolerance:
    """Return :data:`TOLERANCE`, or the accuracy that float64 allows if the weakest log-strength is ``log_strength``.

    With more features than rows, validation rows have a part outside the span of the training rows. There the penalty e^θ
    is the only curvature, and the adjoint has length e^−θ. Rounding in H q then leaves a residual of some eps ‖H‖ e^−θ. It
    lies in the span of the training rows, where the curvature is large. Its effect on q is small, and on Bᵀq, with B =
    diag(e^θ β), smaller still.

    Examples
    --------
    >>> import math
    >>> tolerance_at(math.log(1e-2)) == TOLERANCE, f"{tolerance_at(math.log(1e-6)).delta_prime:.0e}"
    (True, '1e-06')
    """
    return replace(TOLERANCE, delta_prime=max(1e-10, min(1.0, 1e-12 * math.exp(-log_strength))))


class Folds:
    """The cross-validation loss as a function of θ, with its hypergradient and its cost."""

    def __init__(self, model: LinearModel, splits: Splits, theta: torch.Tensor, stage: str) -> None:
        self.model, self.stage, self.folds = model, stage, len(splits.folds)
        self.data = splits.cross_validation()
        self.watch = splits.part(splits.watch)
        self.problem = HyperparameterOptimization(
            model.training_objective,
            model.validation_loss,
            theta,
            model.initial(self.folds),
            batch_dims=FOLD_DIMS,
            # The problems are convex and warm: a few steps each, by factorisation or Hessian-free as size has it.
            solver=bilevel.Newton(),
            tolerance=TOLERANCE,
        )
        self.evaluations = 0
        self.solves = 0
        self._began = time.perf_counter()
        self.watch_losses = torch.zeros(0)

    @property
    def seconds(self) -> float:
        """Wall time since the stage began, whatever it was spent on."""
        return time.perf_counter() - self._began

    @property
    def theta(self) -> torch.nn.Parameter:
        """The problem's log-strengths θ."""
        theta: torch.nn.Parameter
        (theta,) = self.problem.parameters()
        return theta

    def move_to(self, theta: float) -> None:
        """Set the shared log-strength."""
        with torch.no_grad():
            self.theta.fill_(theta)

    def evaluate(self) -> tuple[OuterStep, torch.Tensor]:
        """Solve and differentiate the K problems; return the step and the hypergradient."""
        self.problem.tolerance = tolerance_at(float(self.theta.detach().min()))
        self.solves += self.folds
        result = self.problem.hypergradient(self.data)
        gradient = result.grad
        self.watch_losses = self._rowwise_watch_losses(result.inner)
        step = OuterStep(
            stage=self.stage,
            number=self.evaluations,
            log_strengths=tuple(self.theta.detach().reshape(-1).tolist()),
            cv_loss=float(result.value),
            watch_loss=float(self.watch_losses.mean()),
            corrected_cv_loss=float(result.corrected_value),
            gradient_norm=float(gradient.norm()),
            inner_residual=float(result.report.residual_norm.max()),
            inner_steps=int(result.report.forward.iterations.max()),
            adjoint_steps=int(result.report.backward.iterations.max()),
            error_bound=None,
            certified=False,
            inner_solves=self.solves,
            seconds=self.seconds,
        )
        self.evaluations += 1
        return step, gradient

    def bounded(self, step: OuterStep) -> OuterStep:
        """Return ``step`` with the bound of its hypergradient's error. It costs as much as several steps."""
        with torch.no_grad():
            self.theta.copy_(torch.tensor(step.log_strengths, dtype=torch.float64).reshape(self.theta.shape))
        self.problem.tolerance = tolerance_at(min(step.log_strengths))
        try:
            result = self.problem.hypergradient(self.data)
        except bilevel.SolveError:  # it is warm from another point than the step was
            return step
        bound = float(torch.as_tensor(result.error_bound).max())
        return replace(
            step,
            error_bound=bound if math.isfinite(bound) else None,
            certified=bool(torch.as_tensor(result.certified).all()),
        )

    def _rowwise_watch_losses(self, inner: Parameters) -> torch.Tensor:
        inputs, targets = self.watch

        def losses(parameters: Parameters) -> torch.Tensor:
            return self.model.losses(self.model.scores(parameters, inputs), targets)

        with torch.no_grad():
            return self.model.metric_scale * torch.func.vmap(losses)(inner).mean(0)  # (watch rows,)
