"""How a solution is differentiated: implicitly, or through steps of its solver.

The search itself is never differentiated. Some steps are taken once more, as ordinary code in the graph of the caller, and differentiated.
Every transform and every order then works as for any torch code. k Newton steps at a solution have all derivatives up to the order 2^k − 1
without bias. Second derivatives of other steps are at least as biased as first ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import vmap

from bilevel._torch.factorisations import inverse
from bilevel._torch.reverse import vjp
from bilevel.equations.system import FixedPointSystem, System
from bilevel.errors import ArgumentError
from bilevel.setting_checks import check_number, check_steps
from bilevel.solvers._base import InnerSolver
from bilevel.solvers.anderson import Anderson
from bilevel.solvers.fixed_point import FixedPointIteration
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.judging.given_answer import GivenAnswer

__all__ = [
    "BySteps",
    "Differentiation",
    "Implicit",
    "OneStep",
    "PhantomGradient",
    "Truncated",
    "Unrolled",
    "begin_of",
    "check_differentiation",
    "solver_for",
    "step_of",
]

# A step is (x, state) ↦ (x, state), on one problem's flat x (n,), under whatever transforms surround the call.
Step = Callable[[torch.Tensor, "torch.Tensor | None"], "tuple[torch.Tensor, torch.Tensor | None]"]

# Beyond this many unknowns a Newton step that is differentiated through would hold too large a matrix.
_MOST_DENSE = 512
# So many steps at a solution have first and second derivatives without bias.
_FEWEST_NEWTON_STEPS = 2


@dataclass(frozen=True)
class Taken:
    """The steps of a search.

    Attributes
    ----------
    most
        Of a batch, the most.
    each
        This problem's own, a tensor () under the transforms that surround the call. None: ``most``.
    """

    most: int
    each: torch.Tensor | None = None

    @staticmethod
    def of(answer: torch.Tensor, counts: torch.Tensor) -> Taken:
        """Return the ``counts`` (*batch) of the problems of ``answer`` (n,), which transforms may have batched."""
        most = int(counts.max()) if counts.numel() else 1
        if counts.ndim == 0 or bool((counts == most).all()):
            return Taken(most)
        # No step at all has a derivative of zero. At a solution more steps change nothing else.
        each = torch.where(counts == 0, most, counts)
        return Taken(most, _OfProblem.apply(answer, each))


class _OfProblem(torch.autograd.Function):
    """The entry of ``values`` (*batch) that belongs to the problem of ``answer`` (n,), which transforms may have batched."""

    @staticmethod
    def forward(answer: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(answer.shape[:-1]).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], answer: torch.Tensor, values: torch.Tensor) -> Any:
        # As that of Solve, which puts each batch axis first.
        return _OfProblem.apply(answer.movedim(in_dims[0], 0), values), 0


class Differentiation:
    """How the derivative of a solution is computed: a value of ``differentiation=`` of layers and problems.

    Examples
    --------
    >>> import bilevel
    >>> bilevel.fixed_point(lambda x, a: 0.5 * x + a, differentiation=bilevel.Truncated(3)).differentiation
    Truncated(steps=3)
    """


@dataclass(frozen=True)
class Implicit(Differentiation):
    """Differentiate by the implicit function theorem: dx*/dθ = −(∂_x R)⁻¹ ∂_θ R. The default.

    Unbiased at the solution. It costs one linear solve, and its memory does not depend on the number of steps.

    References
    ----------
    Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.fixed_point(lambda x, a: 0.5 * x + a, differentiation=bilevel.Implicit())
    >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> layer(torch.tensor(0.0, dtype=torch.float64), a).backward()
    >>> round(a.grad.item(), 6)  # x* = 2 a
    2.0
    """


class BySteps(Differentiation, ABC):
    """Base of what differentiates steps of a solver."""

    @abstractmethod
    def path(self, step: Step, init: torch.Tensor, answer: torch.Tensor, taken: Taken) -> torch.Tensor:
        """Return x (n,), differentiable through ``step``.

        Parameters
        ----------
        step
            One step of the solver.
        init, answer
            Where the search began and where it ended (n,), without a graph.
        taken
            The steps that it took.
        """


@dataclass(frozen=True)
class Unrolled(BySteps):
    """Differentiate all steps of the solver: the derivative of the K-th iterate.

    The derivative belongs to the computed iterate, converged or not. It depends on where the steps begin: few steps from near the solution have
    almost no derivative. So warm starts are left out where an accuracy is asked. Memory grows as O(K n) with the number of steps.

    The solver has to be :class:`bilevel.GradientDescent` without a line search. For a fixed point it has to be
    :class:`bilevel.FixedPointIteration`, the default. An argmin or a root without a solver is solved by Newton's method, whose line search has no
    derivative. Then as many Newton steps as the search took, and at least two, are differentiated at the solution. Their derivative has no bias
    there.

    References
    ----------
    Maclaurin, Duvenaud, Adams, "Gradient-based Hyperparameter Optimization through Reversible Learning", ICML 2015; Franceschi et al.,
    "Forward and Reverse Gradient-Based Hyperparameter Optimization", ICML 2017.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.argmin(
    ...     lambda x, a: (x - a) ** 2,
    ...     solver=bilevel.GradientDescent(lr=0.25, max_steps=3),
    ...     tolerance=bilevel.Tolerance(delta=None),
    ...     differentiation=bilevel.Unrolled(),
    ... )
    >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> layer(torch.tensor(0.0, dtype=torch.float64), a).backward()
    >>> a.grad  # x₃ = (1 − 0.5³) a
    tensor(0.8750, dtype=torch.float64)
    """

    def path(self, step: Step, init: torch.Tensor, answer: torch.Tensor, taken: Taken) -> torch.Tensor:  # noqa: D102
        x, state = init, None
        for number in range(taken.most):
            moved, state = step(x, state)
            x = moved if taken.each is None else torch.where(number < taken.each, moved, x)
        return x


@dataclass(frozen=True)
class Truncated(BySteps):
    """Differentiate the last ``steps`` steps alone: taken from the solution on, which is held fixed.

    For steps that contract at the rate ρ the bias is O(ρ^steps). Memory is O(steps · n). The step is that of the solver:
    gradient descent's with its ``lr`` and momentum, a fixed point's mapping, and Newton's for any other solver. Newton's step is taken up to 512
    unknowns. At a solution one step has no bias in first derivatives, and two have none in second and third ones.

    Parameters
    ----------
    steps
        How many steps are differentiated.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Shaban, Cheng, Hatch, Boots, "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.fixed_point(lambda x, a: 0.5 * x + a, differentiation=bilevel.Truncated(3))
    >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> layer(torch.tensor(0.0, dtype=torch.float64), a).backward()
    >>> a.grad  # 1 + 0.5 + 0.25; implicit differentiation gives 2
    tensor(1.7500, dtype=torch.float64)
    """

    steps: int

    def __post_init__(self) -> None:
        check_steps("Truncated", "steps", self.steps)

    def path(self, step: Step, init: torch.Tensor, answer: torch.Tensor, taken: Taken) -> torch.Tensor:  # noqa: D102
        return _repeat(step, answer, self.steps)


@dataclass(frozen=True)
class OneStep(BySteps):
    """Differentiate one step at the solution, as if it began at a constant: no linear solve, and a bias of O(ρ) at the rate ρ.

    Of a fixed point it is the Jacobian-free gradient ∂_θ T. It is good where steps contract fast. The step is chosen as by :class:`Truncated`.
    Newton's step has no bias in first derivatives. Its second derivatives are wrong: take ``Truncated(2)`` for these.

    References
    ----------
    Bolte, Pauwels, Vaiter, "One-step differentiation of iterative algorithms", NeurIPS 2023; Fung et al., "JFB: Jacobian-Free Backpropagation for
    Implicit Networks", AAAI 2022.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.fixed_point(lambda x, a: 0.1 * torch.cos(x) + a, differentiation=bilevel.OneStep())
    >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> layer(torch.tensor(0.0, dtype=torch.float64), a).backward()
    >>> a.grad  # implicit differentiation gives 1 / (1 + 0.1 sin x) = 0.9200
    tensor(1., dtype=torch.float64)
    """

    def path(self, step: Step, init: torch.Tensor, answer: torch.Tensor, taken: Taken) -> torch.Tensor:  # noqa: D102
        return _repeat(step, answer, 1)


@dataclass(frozen=True)
class PhantomGradient(BySteps):
    """Differentiate ``steps`` damped steps at the solution: x ← (1 − λ) x + λ T(x), for equilibrium networks.

    The bias lies between that of :class:`OneStep` and none: it falls with more steps. A small λ keeps the gradient tame where T is no contraction.

    Parameters
    ----------
    steps
        How many steps are differentiated.
    damping
        λ in (0, 1]: the share of T in a step.

    Raises
    ------
    ArgumentError
        If a setting is out of its range.

    References
    ----------
    Geng, Zhang, Bai, Wang, Lin, "On Training Implicit Models", NeurIPS 2021, equation 6.

    Examples
    --------
    >>> import torch, bilevel
    >>> layer = bilevel.fixed_point(lambda x, a: 0.5 * x + a, differentiation=bilevel.PhantomGradient(steps=5, damping=0.5))
    >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    >>> layer(torch.tensor(0.0, dtype=torch.float64), a).backward()
    >>> a.grad  # implicit differentiation gives 2
    tensor(1.5254, dtype=torch.float64)
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_steps("PhantomGradient", "steps", self.steps)
        check_number("PhantomGradient", "damping", self.damping, below=1.0, at_most=True)

    def path(self, step: Step, init: torch.Tensor, answer: torch.Tensor, taken: Taken) -> torch.Tensor:  # noqa: D102
        x, state = answer, None
        for _ in range(self.steps):
            moved, state = step(x, state)
            x = x + self.damping * (moved - x)
        return x


def check_differentiation(chosen: object) -> Differentiation:
    """Return ``chosen``, or :class:`Implicit` for None; raise :class:`ArgumentError` for anything else."""
    if chosen is None:
        return Implicit()
    if not isinstance(chosen, Differentiation):
        raise ArgumentError(
            f"expected differentiation to be bilevel.Implicit(), Unrolled(), Truncated(steps), OneStep() or PhantomGradient(), got {chosen!r}; "
            "pass one of them"
        )
    return chosen


def solver_for(chosen: Differentiation, system: System, solver: InnerSolver | None) -> InnerSolver | None:
    """Return the solver whose steps can be differentiated as ``chosen`` says, or raise :class:`ArgumentError`."""
    where, mapping = system.where, isinstance(system, FixedPointSystem)
    if system.has_kinks:
        raise ArgumentError(
            f"{where}: expected differentiation=bilevel.Implicit() with proximal terms, bounds or constraints, got {chosen}; leave it "
            "out, or pass the step to bilevel.fixed_point: with a term g, x -> g.prox(x - s * slope(x), s), where slope is the gradient of "
            "the objective and s is small"
        )
    if not isinstance(chosen, Unrolled):
        return solver
    if isinstance(solver, GivenAnswer):
        raise ArgumentError(
            f"{where}: expected differentiation=Implicit() or Truncated(steps) where the solution is given, got Unrolled(), which needs the "
            "steps that led there; choose one of these two, or call the layer itself"
        )
    if solver is None:
        return FixedPointIteration() if mapping else None
    if not (system.minimizes or mapping):
        raise ArgumentError(
            f"{where}: expected no solver for differentiation=Unrolled(), as Newton steps at the solution are differentiated, got {solver.name}; "
            "leave solver out, or differentiate by Implicit() or Truncated(steps)"
        )
    plain = isinstance(solver, GradientDescent) and not solver.line_search
    if plain or isinstance(solver, FixedPointIteration):
        return solver
    if isinstance(solver, GradientDescent):
        raise ArgumentError(
            f"{where}: expected bilevel.GradientDescent without a line search for differentiation=Unrolled(), as the step lengths that a search "
            "finds have no derivative; leave line_search out and choose lr, or differentiate by Implicit() or Truncated(steps)"
        )
    own = "FixedPointIteration()" if mapping else "GradientDescent(lr=..., max_steps=...)"
    raise ArgumentError(
        f"{where}: expected solver=bilevel.{own} for differentiation=Unrolled(), which differentiates each step of it, got "
        f"{solver.name}; choose that solver, leave it out, or differentiate by Implicit() or Truncated(steps)"
    )


def begin_of(
    chosen: Differentiation, solver: InnerSolver | None, init: torch.Tensor, answer: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, Taken]:
    """Return where the steps to differentiate begin (n,), and how many :class:`Unrolled` differentiates.

    ``counts`` (*batch) are the steps that the search took.
    """
    if not isinstance(chosen, Unrolled):
        return init, Taken(1)
    taken = Taken.of(answer, counts)
    if solver is None:  # Newton's method
        return answer, Taken(max(taken.most, _FEWEST_NEWTON_STEPS))
    return init, taken


def step_of(system: System, solver: InnerSolver | None, tensors: Sequence[torch.Tensor]) -> Step:
    """Return a step of ``solver`` as a differentiable function; Newton's, if its own steps cannot be differentiated."""
    solver = solver.own if isinstance(solver, GivenAnswer) else solver
    if isinstance(solver, GradientDescent):
        lr, momentum = solver.lr, solver.momentum

        def descend(x: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            slope = system.residual(x, *tensors)
            slope = slope if state is None or not momentum else momentum * state + slope
            return x - lr * slope, slope

        return descend
    if isinstance(system, FixedPointSystem) and (solver is None or isinstance(solver, (FixedPointIteration, Anderson))):
        share = 1.0 - solver.damping if isinstance(solver, FixedPointIteration) else 1.0
        return lambda x, state: (x - share * system.residual(x, *tensors), state)
    size = system.raveler.size
    if size > _MOST_DENSE:
        raise ArgumentError(
            f"{system.where}: expected at most {_MOST_DENSE} unknowns for a differentiated step of Newton's method, got {size}; choose "
            "solver=bilevel.GradientDescent(lr=..., max_steps=...), or differentiate by Implicit()"
        )
    return lambda x, state: (_newton_step(system, x, tensors), state)


def _newton_step(system: System, x: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    residual, pull = vjp(lambda point: system.residual(point, *tensors), x)
    (matrix,) = vmap(pull)(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
    return x - inverse(matrix) @ residual  # torch differentiates its own solve wrongly under vmap of a Hessian


def _repeat(step: Step, x: torch.Tensor, times: int) -> torch.Tensor:
    state: torch.Tensor | None = None
    for _ in range(times):
        x, state = step(x, state)
    return x
