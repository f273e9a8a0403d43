"""The outer loop: it moves θ, warm-starts both solves, and sets their accuracy by a policy.

The run itself is in :mod:`bilevel.outer.run`, the methods that choose a step are in :mod:`bilevel.outer.methods`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch

from bilevel.errors import ArgumentError
from bilevel.outer.methods import HOAG, OuterMethod, TorchOuter
from bilevel.outer.result import OuterResult
from bilevel.outer.run import OuterRun, Policy, follow
from bilevel.problems.problem import BilevelProblem
from bilevel.setting_checks import check_number, check_steps

__all__ = ["OuterRun", "minimize"]

OuterTree = TypeVar("OuterTree")


def minimize(
    problem: BilevelProblem,
    outer: OuterTree,
    data: Any,
    *,
    optimizer: OuterMethod | Callable[..., torch.optim.Optimizer] | None = None,
    tolerance: Policy | None = None,
    max_steps: int = 100,
    gradient_tolerance: float = 0.0,
    init: Any = None,
    callback: Callable[[OuterRun], Any] | Sequence[Callable[[OuterRun], Any]] | None = None,
    bounds: bool = False,
    on_failure: Literal["raise", "stop"] = "raise",
    resume: dict[str, Any] | None = None,
) -> OuterResult[OuterTree]:
    """Minimise F(φ*(θ), θ) over θ.

    Parameters
    ----------
    problem
        The problem. Its warm starts are used.
    outer
        The initial θ: a tensor or a pytree. Leaves that are neither floating-point nor complex tensors stay as they are.
        Parameters of the problem itself, such as ``tuning.outer`` of a :class:`HyperparameterOptimization`, are set to each
        point, and hold the last one at the end. Other tensors are not changed.
    data
        As for :meth:`BilevelProblem.hypergradient`.
    optimizer
        The outer method: :class:`HOAG` (the default), :class:`MAID`, or a function of a list of parameters that returns a
        ``torch.optim`` optimiser, such as ``lambda parameters: torch.optim.Adam(parameters, lr=0.1)``.
    tolerance
        A :class:`Tolerance` for all steps, or a function of the number of the step, counted from 1, such as
        :class:`ExponentialSchedule`. None: the problem's own. ``Tolerance(descent=0.5)`` asks for a descent direction, and
        no more.
    max_steps
        The largest number of steps in θ.
    gradient_tolerance
        The loop ends when ‖ĝ‖, plus its error bound if one is known, is at most this. Goals relative to the gradient stop
        there too: see ``stationary`` of :class:`Tolerance`.
    init
        The initial guess of the first inner solve.
    callback
        A function of the :class:`OuterRun`, or a sequence of them, called at every point. The loop ends if one returns
        True. A callback that changes tensors of the run in place is refused.
    bounds
        Whether the error bound of every hypergradient is computed. A goal computes it in any case.
    on_failure
        The policy for a failed solve and for a value that is not finite, if a shorter step does not help: ``"raise"``, or
        ``"stop"`` with a status. HOAG and MAID shorten a step on which a solve fails.
    resume
        The ``state`` of a result, or of a run in a callback. The loop continues from it, bit for bit as if it had not
        stopped.

    Returns
    -------
    OuterResult
        The last point. After ``KeyboardInterrupt`` its status is ``INTERRUPTED``.

    Raises
    ------
    SolveError
        If a solve failed under ``on_failure="raise"``.
    ArgumentError
        If a setting cannot be used.

    Examples
    --------
    >>> import torch, bilevel
    >>> class Ridge(bilevel.BilevelProblem):
    ...     def inner_objective(self, inner, outer, data):
    ...         return ((inner - data) ** 2).sum() + outer.exp() * (inner**2).sum()
    ...     def outer_objective(self, inner, outer, data):
    ...         return ((inner - 0.8 * data) ** 2).sum()
    >>> data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> result = bilevel.minimize(
    ...     Ridge(), torch.zeros((), dtype=torch.float64), data, init=torch.zeros_like(data), gradient_tolerance=1e-6
    ... )
    >>> round(result.outer.exp().item(), 4), result.status.name  # 1 / (1 + e^θ) = 0.8
    (0.25, 'CONVERGED')
    """
    check_steps("minimize", "max_steps", max_steps, least=0)
    check_number("minimize", "gradient_tolerance", gradient_tolerance, closed=True)
    if on_failure not in ("raise", "stop"):
        raise ArgumentError(
            f"minimize: expected on_failure to be 'raise' or 'stop', got {on_failure!r}; 'stop' ends the run with a status"
        )
    if not isinstance(problem, BilevelProblem):
        raise ArgumentError(f"minimize: expected problem to be a bilevel.BilevelProblem, got {problem!r}; subclass it")
    method = _as_method(optimizer)
    callbacks = [callback] if callable(callback) else [] if callback is None else callback
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ArgumentError(
            f"minimize: expected callback to be a function of the run, or a list of functions, got {callback!r}; pass for example lambda run: "
            "print(run.value)"
        )
    run = OuterRun(problem, outer, data, method, tolerance, gradient_tolerance, bounds, init)
    with _kept(problem, "tolerance"):
        return follow(run, max_steps, gradient_tolerance, list(callbacks), on_failure, resume)


def _as_method(optimizer: OuterMethod | Callable[..., torch.optim.Optimizer] | None) -> OuterMethod:
    if optimizer is None:
        return HOAG()
    if isinstance(optimizer, OuterMethod):
        return optimizer
    if callable(optimizer) and not isinstance(optimizer, type):
        return TorchOuter(optimizer)
    raise ArgumentError(
        f"minimize: expected optimizer to be HOAG(), MAID(), or a function of a list of parameters that returns a torch.optim "
        f"optimiser, got {optimizer!r}; write for example lambda parameters: torch.optim.Adam(parameters, lr=0.1)"
    )


@contextlib.contextmanager
def _kept(problem: BilevelProblem, name: str) -> Iterator[None]:
    before = getattr(problem, name)
    try:
        yield
    finally:
        setattr(problem, name, before)
