"""Which functions need no second check, and which recorded evaluations a call may use."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from bilevel._torch.transforms import runs_plainly
from bilevel.equations.domain import leaves_domain
from bilevel.equations.problem import Problem
from bilevel.equations.system import System
from bilevel.layers.checks import drew, inspect_function
from bilevel.layers.examinations import Examinations
from bilevel.layers.randomness import GeneratorStates
from bilevel.replay import InspectionCache, Reach, ReplayCache, allowed, follow, has_plain_structure, reach

__all__ = ["Inspection", "Inspector"]


class Inspection(NamedTuple):
    """The result of a check.

    ``found`` is the value and the slope at the problem's first row; None if the function was checked before. ``replays`` are the
    recorded evaluations that the call may use, or None. ``reason`` says why there are none; it is "" if there are.
    """

    found: tuple[torch.Tensor, torch.Tensor] | None
    replays: ReplayCache | None = None
    reason: str = ""


class Inspector:
    """Check the function of a layer, and remember which functions need no second check. A copy remembers nothing.

    ``static``: the user vouches for functions whose code cannot be followed.
    """

    def __init__(self, *, static: bool = False) -> None:
        self._static = static
        self._inspected: InspectionCache[ReplayCache] = InspectionCache()
        self._aside: InspectionCache[ReplayCache] = InspectionCache()
        self.examinations = Examinations()
        self._last: ReplayCache | str = "no call was made yet"

    def __reduce__(self) -> tuple[Any, ...]:
        return _forgetful, (self._static,)

    @property
    def reason(self) -> str:
        """Why the last call was not replayed, in a sentence, or "recorded". Nothing but a developer reads it."""
        return self._last if isinstance(self._last, str) else self._last.reason

    def inspect_once(
        self, problem: Problem, x: torch.Tensor, function: Any, *, captures: bool, again: bool = False
    ) -> Inspection:
        """Check the problem at the first row of ``x`` (batch, n), unless the same check found no fault before; ``again`` forces it.

        ``function`` is what the user wrote: a function, or a tuple of functions and constants.

        The faults are properties of the function, so one problem shows them as well as all of them. If the user's ``function`` is
        branch-free and depends on its arguments alone, or the user vouches for it, one call is enough too.
        """
        inspection = self._inspect(problem, x, function, captures=captures, again=again)
        self._last = inspection.replays or inspection.reason
        return inspection

    def _inspect(self, problem: Problem, x: torch.Tensor, function: Any, *, captures: bool, again: bool) -> Inspection:
        memory = InspectionCache[ReplayCache]() if again else self._inspected
        known = _known(problem, x, function, captures, self._static)
        replays = None if isinstance(known, str) else memory.find(known.key, known.parts)
        if replays is not None and not replays.needs_grad and not isinstance(known, str):
            return _usable(replays, problem, x, known)
        reason = known if isinstance(known, str) else "the first call of a function checks it"
        if replays is not None:
            reason = replays.reason
        try:
            states, single = GeneratorStates(x.device), problem.single(0)
            found = inspect_function(single, x[:1], captures=captures)
            # The effect of random numbers may depend on tensors' values: the noise may have size zero in this call.
            if drew(states, single, x[:1]):
                reason = "the function draws random numbers"
            elif not isinstance(known, str):
                memory.keep(known.key, known.parts, known.new_replays())
        except (RuntimeError, ValueError) as error:
            if not leaves_domain(error):
                raise
            # The function has no value at the initial guess. The check sees nothing, and the solve reports it.
            found = (x.new_full((), float("nan")), torch.full_like(x[0], float("nan")))
        return Inspection(found, reason=reason)

    def reuse_inspection(
        self, problem: Problem, x: torch.Tensor, function: Any, *, captures: bool
    ) -> ReplayCache | None:
        """Return the replays of a problem that needs no check, or None.

        It was checked before, or it differs from a checked one only in its shapes; then its replays are kept aside.
        """
        known = _known(problem, x, function, captures, self._static)
        if isinstance(known, str):
            self._last = known
            return None
        replays = self._inspected.find(known.key, known.parts) or self._aside.find(known.key, known.parts)
        if replays is None:
            self._aside.keep(known.key, known.parts, replays := known.new_replays())
        if replays.needs_grad:
            self._last = replays.reason
            return None
        inspection = _usable(replays, problem, x, known)
        self._last = inspection.replays or inspection.reason
        return inspection.replays


def _forgetful(static: bool) -> Inspector:
    return Inspector(static=static)


class _Known(NamedTuple):
    """The key of a branch-free function's calls: kinds, objects by identity, and the tensors among these."""

    key: tuple[Any, ...]
    parts: tuple[Any, ...]
    captured: list[torch.Tensor]
    vouched: bool

    def new_replays(self) -> ReplayCache:
        return ReplayCache(self.captured, vouched=self.vouched)


def _known(problem: Problem, x: torch.Tensor, function: Any, captures: bool, static: bool) -> _Known | str:
    kinds, found = _kinds(problem, captures), _lasting(problem, x, function, static)
    if isinstance(found, str):
        return found
    captured = list(dict.fromkeys(filter(torch.is_tensor, found.parts)))  # a tensor is equal to none but itself
    return _Known((*kinds, *map(_kind, captured)), found.parts, captured, found.vouched)


def _usable(replays: ReplayCache, problem: Problem, x: torch.Tensor, known: _Known) -> Inspection:
    """Return an inspection with ``replays``, or with the reason why this call may not use them."""
    if not allowed():
        return Inspection(None, reason="replays are switched off: the call is inside bilevel.replaying(False)")
    if problem.system.autocast is not None:
        return Inspection(None, reason="the call is made under autocast")
    if not runs_plainly((x, *problem.tensors, *known.captured)):
        return Inspection(None, reason="a transform, mode, hook or debugger around the call sees the function run")
    return Inspection(None, replays)


def _lasting(problem: Problem, x: torch.Tensor, function: Any, static: bool) -> Reach | str:
    """Return all objects that the user's ``function`` reaches, or a sentence that says why a check of it does not hold for later calls."""
    system, unknown, given = problem.system, problem.system.raveler, problem.system.arguments
    if type(system).inspect is not System.inspect:
        return "whether a matrix is linear and symmetric depends on its numbers, and is checked at each call"
    if {*map(type, (x, *problem.tensors))} != {torch.Tensor}:
        return "an argument is of a class derived from torch.Tensor"
    if not (unknown.is_tensor or has_plain_structure(unknown.structure)):
        return "init is a pytree of other containers than tuples, lists and dicts"
    if not (given.positional or has_plain_structure(given.structure)):
        return "the arguments are pytrees of other containers than tuples, lists and dicts"
    others = follow(*given.others)
    if isinstance(others, str):
        return f"an argument: {others}"
    found = reach(function if type(function) is tuple else (function,), static=static)
    return found if isinstance(found, str) else found._replace(parts=(*found.parts, len(others), *others))


def _kinds(problem: Problem, captures: bool) -> tuple[Any, ...]:
    """Return everything that a branch-free function may depend on, besides the objects that it reaches and the numbers in tensors."""
    system, cuda = problem.system, torch.backends.cuda
    unknown, given = system.raveler, system.arguments
    return (
        captures, torch.get_default_dtype(), torch.get_default_device(), type(system),
        unknown.structure, unknown.shapes, unknown.dtypes, unknown.device, system.autocast,
        given.structure, given.is_tensor, given.is_complex, tuple([(level.size, level.batched) for level in system.levels]),
        # Which kernels torch may choose among for attention: what a graph holds depends on that.
        cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        *map(_kind, problem.tensors),
    )  # fmt: skip


def _kind(t: torch.Tensor) -> tuple[Any, ...]:
    return (t.shape, t.dtype, t.layout, t.device, t.stride() if t.layout is torch.strided else ())
