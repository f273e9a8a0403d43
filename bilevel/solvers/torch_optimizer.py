"""Any optimizer of torch.optim as an inner solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.equations.problem import Problem
from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_steps
from bilevel.solvers._base import Goal, InnerSolution, InnerSolver, iterate

__all__ = ["TorchOptimizer"]

# Each new entry depends only on that entry's own gradients and on the number of steps.
_ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in (
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    )
)  # fmt: skip


@dataclass(frozen=True, init=False, repr=False)
class TorchOptimizer(InnerSolver):
    """Let an optimizer of ``torch.optim`` take the steps.

    An element-wise optimizer moves a whole batch at once, and each problem ends on its own. These are SGD, Adam, AdamW,
    RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, Rprop and ASGD. Any other, such as ``torch.optim.LBFGS``, ``Muon``
    or ``Adafactor``, would mix the problems of a batch. It takes one problem only, with parameters in the shapes of the
    unknown and a closure.

    Each step costs one gradient, or more if the optimizer calls its closure again. Memory is that of the optimizer, and
    does not depend on the number of steps. Weight decay is not a part of the objective. It leads to a point that is not
    stationary, and the report says that it has not converged.

    Parameters
    ----------
    optimizer_class
        A subclass of ``torch.optim.Optimizer``.
    max_steps
        The number of steps. Without a tolerance it is a budget, and spending it is a success.
    elementwise
        Whether ``optimizer_class`` is element-wise, for a class that is not in torch. None: only if it is one of those
        above.
    **options
        Passed to ``optimizer_class``, such as ``lr``.

    Raises
    ------
    ArgumentError
        If the class is not an optimizer, refuses its options, maximises, or would keep a graph.
        On use, for a batch with an optimizer that is not element-wise, and for a root or a fixed point, which have no objective.

    References
    ----------
    https://docs.pytorch.org/docs/stable/optim.html, and the papers named there for each class.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(
    ...     lambda x, a: ((x - a) ** 2).sum(),
    ...     solver=TorchOptimizer(torch.optim.SGD, lr=0.3, max_steps=100),
    ...     tolerance=bilevel.Tolerance(delta=1e-6),
    ... )
    >>> layer(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64))
    tensor([1.0000, 2.0000], dtype=torch.float64)
    """

    optimizer_class: type[torch.optim.Optimizer]
    max_steps: int
    elementwise: bool
    options: tuple[tuple[str, Any], ...]

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        *,
        max_steps: int,
        elementwise: bool | None = None,
        **options: Any,
    ) -> None:
        check_steps("TorchOptimizer", "max_steps", max_steps)
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise ArgumentError(
                f"TorchOptimizer: expected optimizer_class to be a subclass of torch.optim.Optimizer, got "
                f"{optimizer_class!r}; pass the class itself, such as torch.optim.Adam, and its options beside it"
            )
        for name, why in (("maximize", "seeks a maximum"), ("differentiable", "keeps a graph of every step")):
            if options.get(name):
                raise ArgumentError(
                    f"TorchOptimizer: expected an optimizer that minimises and keeps no graph, got {name}=True, which "
                    f"{why}; leave it out"
                )
        if optimizer_class is torch.optim.LBFGS:
            # Its own tolerances would end a step before ours is met.
            options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, **options}
        known = optimizer_class in _ELEMENTWISE
        object.__setattr__(self, "optimizer_class", optimizer_class)
        object.__setattr__(self, "max_steps", max_steps)
        object.__setattr__(self, "elementwise", known if elementwise is None else elementwise)
        object.__setattr__(self, "options", tuple(options.items()))
        self._make([torch.nn.Parameter(torch.zeros(1, 1))])

    @property
    def name(self) -> str:
        return f"TorchOptimizer({self.optimizer_class.__name__})"

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options)
        declared = (
            "" if self.elementwise == (self.optimizer_class in _ELEMENTWISE) else f", elementwise={self.elementwise}"
        )
        return f"TorchOptimizer({self.optimizer_class.__name__}, max_steps={self.max_steps}{declared}{options})"

    def with_max_steps(self, max_steps: int) -> TorchOptimizer:
        return TorchOptimizer(
            self.optimizer_class, max_steps=max_steps, elementwise=self.elementwise, **dict(self.options)
        )

    def solve(self, problem: Problem, init: torch.Tensor, goal: Goal) -> InnerSolution:
        if not self.elementwise and problem.batch > 1:
            name = self.optimizer_class.__name__
            remedy = (
                "take bilevel.LBFGS(), which keeps them apart"
                if self.optimizer_class is torch.optim.LBFGS
                else f"take an element-wise one such as torch.optim.Adam, or, if {name} treats every entry by itself, "
                "declare it with TorchOptimizer(..., elementwise=True)"
            )
            raise ArgumentError(
                f"{problem.where}: expected an element-wise optimizer for a batch of {problem.batch} problems, got "
                f"{name}, which would mix them; {remedy}"
            )
        value, gradient = problem.value_and_residual(init)
        shapes = [init.shape] if self.elementwise else problem.system.raveler.real_shapes
        parameters = [torch.nn.Parameter(part.clone()) for part in _split(init, shapes)]
        optimizer = self._make(parameters)
        sparse = self.optimizer_class is torch.optim.SparseAdam

        def place(target: str, flat: torch.Tensor) -> None:
            for parameter, part in zip(parameters, _split(flat, shapes), strict=True):
                if target == "data":
                    parameter.data.copy_(part)
                else:
                    parameter.grad = part.to_sparse() if sparse else part.clone()

        def read() -> torch.Tensor:
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
            return flat.reshape(init.shape)

        def step(state: _State, active: torch.Tensor) -> tuple[_State, torch.Tensor | None]:
            place("data", state.x)  # a problem that has ended does not move
            place("grad", state.residual)
            if self.elementwise:
                optimizer.step()
            else:
                optimizer.step(_closure(problem, state, read, place))
            x = read()
            value, gradient = problem.value_and_residual(x)
            return _State(x, gradient, value), None

        return iterate(_State(init, gradient, value), step, goal, self.max_steps)[0]

    def _make(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        make: Callable[..., torch.optim.Optimizer] = self.optimizer_class
        try:
            return make(parameters, **dict(self.options))
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"TorchOptimizer: expected options that {self.optimizer_class.__name__} takes, got "
                f"{dict(self.options)!r}, and it says: {error}; change them"
            ) from error


@dataclass(frozen=True, eq=False)
class _State:
    """An iterate with ∇G and G there."""

    x: torch.Tensor
    residual: torch.Tensor
    value: torch.Tensor


def _split(flat: torch.Tensor, shapes: Any) -> list[torch.Tensor]:
    parts = torch.split(flat.reshape(-1), [shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _closure(
    problem: Problem,
    state: _State,
    read: Callable[[], torch.Tensor],
    place: Callable[[str, torch.Tensor], None],
) -> Callable[[], float]:
    """Return the closure for torch's optimizers. Its first call finds the state's gradient in place."""
    fresh = [True]

    def evaluate() -> float:
        if fresh:
            fresh.clear()
            return float(state.value)
        value, gradient = problem.value_and_residual(read())
        place("grad", gradient)
        return float(value)

    return evaluate
