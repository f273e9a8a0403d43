"""Settings that every stochastic method has, and what a step returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.setting_checks import check_number, check_seed, check_steps

__all__ = ["NonFinite", "StepOptions", "StepResult"]

NonFinite = Literal["raise", "skip", "ignore"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOptions:
    """How a step is computed and applied, whatever the method.

    Parameters
    ----------
    max_norm, inner_max_norm, adjoint_max_norm
        Clip the outer, inner and adjoint directions to this Euclidean norm; None: do not.
    ema_decay
        Keep the moving averages a ← d·a + (1 − d)·value of the inner and outer variables, for ``method.averaged()``.
    on_nonfinite
        What to do where a direction is not finite: ``"raise"`` a :class:`bilevel.errors.NonFiniteError`, ``"skip"`` the update, or
        ``"ignore"``. The first two read one number from the device in each update.
    autocast
        Evaluate both objectives under ``torch.autocast`` with this dtype.
    grad_scaler
        A ``torch.amp.GradScaler``, for float16: losses are multiplied by its scale, derivatives divided. An update that overflows is
        skipped and the scale reduced, whatever ``on_nonfinite`` says.
    accumulate
        Split every batch along its first axis into so many parts, evaluated one after the other.
    process_group
        Of processes that hold the same variables and different batches: losses and derivatives are averaged over them. None: the
        default group, where ``torch.distributed`` is initialised.
    seed
        Of the method's own random numbers. The same in every process.
    callback
        A function of the :class:`StepResult`, or several, called at the end of each step, skipped ones included. It is called in every process.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    Examples
    --------
    >>> from bilevel.stochastic import StepOptions
    >>> StepOptions(max_norm=1.0, accumulate=4).accumulate
    4
    """

    max_norm: float | None = None
    inner_max_norm: float | None = None
    adjoint_max_norm: float | None = None
    ema_decay: float | None = None
    on_nonfinite: NonFinite = "raise"
    autocast: torch.dtype | None = None
    grad_scaler: torch.amp.GradScaler | None = None
    accumulate: int = 1
    process_group: Any = None
    seed: int = 0
    callback: Callable[[StepResult], Any] | Sequence[Callable[[StepResult], Any]] = ()

    def __post_init__(self) -> None:
        for name in ("max_norm", "inner_max_norm", "adjoint_max_norm"):
            if getattr(self, name) is not None:
                check_number("StepOptions", name, getattr(self, name))
        if self.ema_decay is not None:
            check_number("StepOptions", "ema_decay", self.ema_decay, below=1.0)
        if self.on_nonfinite not in ("raise", "skip", "ignore"):
            raise ArgumentError(
                f"StepOptions: expected on_nonfinite to be 'raise', 'skip' or 'ignore', got {self.on_nonfinite!r}; 'skip' leaves such a step out"
            )
        if self.autocast not in (None, torch.float16, torch.bfloat16):
            raise ArgumentError(
                f"StepOptions: expected autocast to be torch.bfloat16, torch.float16 or None, got {self.autocast!r}; pass one of them"
            )
        if self.grad_scaler is not None and not isinstance(self.grad_scaler, torch.amp.GradScaler):
            raise ArgumentError(
                f"StepOptions: expected grad_scaler to be a torch.amp.GradScaler or None, got {self.grad_scaler!r}; pass "
                "torch.amp.GradScaler(device)"
            )
        check_steps("StepOptions", "accumulate", self.accumulate)
        check_seed("StepOptions", self.seed)
        if not callable(self.callback) and not (
            isinstance(self.callback, Sequence) and all(callable(call) for call in self.callback)
        ):
            raise ArgumentError(
                f"StepOptions: expected callback to be a function of a StepResult, or a list of functions, got {self.callback!r}; pass that"
            )


@dataclass(frozen=True, eq=False)
class StepResult:
    """The losses and norms of a step, before its last update. Tensors are detached and stay on their device.

    Parameters
    ----------
    inner_loss, outer_loss
        G and F on the last batches evaluated, of shape (). NaN where the step was skipped.
    hypergradient_norm
        Of the outer direction before clipping, of shape ().
    inner_gradient_norm
        Of the last inner direction before clipping, of shape ().
    adjoint_residual_norm
        ‖H q − ∇_φ F‖ on the last batch, of shape (), where the method has an adjoint q.
    exact_residual_norm
        ‖H q − ∇_φ F‖ with the exact Hessian, of shape (), where the method solved with another matrix in its place. Divided by ‖∇_φ F‖,
        it tells the bias.
    linear_status
        How the linear solve ended, where the method has one.
    step
        The number of steps made, this one included.
    skipped
        Whether an update was not finite and was left out.

    Examples
    --------
    >>> import torch, bilevel
    >>> w, theta = torch.zeros(2), torch.ones(2)
    >>> losses = (
    ...     lambda w, theta, data: ((w - theta) ** 2).mean(),
    ...     lambda w, theta, data: ((w - 3) ** 2).mean(),
    ... )
    >>> result = bilevel.stochastic.SOBA(losses, w, theta).step(None, None)
    >>> result.step, result.inner_loss.item(), result.outer_loss.item()
    (1, 1.0, 9.0)
    """

    inner_loss: torch.Tensor
    outer_loss: torch.Tensor
    hypergradient_norm: torch.Tensor
    inner_gradient_norm: torch.Tensor
    adjoint_residual_norm: torch.Tensor | None = None
    exact_residual_norm: torch.Tensor | None = None
    linear_status: Status | None = None
    step: int = 0
    skipped: bool = False
