"""What searches by projected steps share: their state, which unknowns are held at bounds, and how they end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from bilevel.errors import ArgumentError
from bilevel.reports import Status
from bilevel.solvers.constrained.program import Answer, Program

__all__ = ["ProjectedSearch", "evaluated", "search_in_bounds"]

# The largest distance to a bound that counts as on it, relative to the size of x (Bertsekas' ε).
_NEAR = 1e-3
# The growth of f or x that has no end.
_ENDLESS = 1e12


class ProjectedSearch(ABC):
    """The state of a batch of K problems with bounds alone."""

    def __init__(self, program: Program, init: torch.Tensor) -> None:
        self.program = program
        self.x = self.origin = program.inside(init)
        self.value, self.gradient = evaluated(program, self.x)
        self.first_value = self.value
        status = torch.full((len(init),), int(Status.RUNNING), dtype=torch.int64, device=init.device)
        status = torch.where((program.lower > program.upper).any(-1), int(Status.INFEASIBLE), status)
        finite = torch.isfinite(self.value) & torch.isfinite(self.gradient).all(-1)
        self.status = torch.where(finite | (status != Status.RUNNING), status, int(Status.NOT_FINITE))
        self.iterations = torch.zeros_like(self.status)

    @abstractmethod
    def step(self) -> None:
        """Take a step in each problem that runs."""

    def optimality(self) -> torch.Tensor:
        """Return the length (K,) of the largest entry of the projected gradient."""
        return (self.x - self.program.inside(self.x - self.gradient)).abs().amax(-1)

    def held(self) -> torch.Tensor:
        """Return which unknowns (K, n) bool are fixed, or at a bound with a gradient that points outwards."""
        program, x, gradient = self.program, self.x, self.gradient
        near = torch.minimum(_NEAR * (1 + x.abs().amax(-1)), self.optimality()).unsqueeze(-1)
        held = ((x <= program.lower + near) & (gradient > 0)) | ((x >= program.upper - near) & (gradient < 0))
        return held | program.fixed

    def name_lost(self, running: torch.Tensor) -> None:
        """Set the statuses of problems that met a NaN, or whose objective falls without end, among those ``running`` (K,)."""
        broken = ~torch.isfinite(self.value) | ~torch.isfinite(self.gradient).all(-1)
        self.status = torch.where(running & broken, int(Status.NOT_FINITE), self.status)
        fallen = self.value < self.first_value - _ENDLESS * (1 + self.first_value.abs())
        far = self.x.abs().amax(-1) > _ENDLESS * (1 + self.origin.abs().amax(-1))
        endless = (fallen | far) & (self.value < self.first_value)
        self.status = torch.where(running & endless, int(Status.UNBOUNDED), self.status)


def search_in_bounds(
    name: str, program: Program, smoothing: float | None, begin: Callable[[], ProjectedSearch], max_steps: int
) -> Answer:
    """Return where the search that ``begin`` makes comes to in ``max_steps`` steps; refuse constraints other than bounds."""
    if not program.only_bounds or smoothing is not None:
        raise ArgumentError(
            f"{name}: expected bounds alone, got equality, inequality or smoothing; take bilevel.InteriorPoint()"
        )
    run = begin()
    for _ in range(max_steps):
        if not bool((run.status == Status.RUNNING).any()):
            break
        run.step()
    none = run.x.new_zeros(len(run.x), 0)
    status = torch.where(run.status == Status.RUNNING, int(Status.MAX_STEPS), run.status)
    return Answer(run.x, none, none, status, run.iterations)


def evaluated(program: Program, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f (K,) and its gradient (K, n)."""
    parts, rows = program.jacobian(x)
    return parts[:, 0], rows[:, 0]
