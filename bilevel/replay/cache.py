"""Replays of a problem's evaluations, after they have been compared with the user's function.

A branch-free function that depends on its arguments alone (:mod:`bilevel.replay.purity`) is first evaluated as usual.
Then its operations are recorded (:mod:`bilevel.replay`), compared with another evaluation at other numbers, and
replayed from then on. Three things end the replays: an operation that reads numbers, a result that differs in its last
bit, and an error. The function is then evaluated as usual: slower, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from weakref import ReferenceType

import torch

from bilevel.replay.program import Program
from bilevel.replay.recorder import note

__all__ = ["ReplayCache"]

Evaluation = Callable[..., Sequence[torch.Tensor]]


@dataclass(eq=False)
class _Entry:
    """The state of one kind of evaluation."""

    program: Program | None = None
    trusted: bool = False
    given_up: bool = False
    reason: str = "not recorded yet: an evaluation is recorded, and compared with the next"


class ReplayCache:
    """The programs of one function, for arguments of one kind.

    Parameters
    ----------
    captured
        The tensors that the function reaches besides its arguments.
    vouched
        Whether the user says that the function reaches the same tensors at every call. Those that a recording finds are then
        constants of its program.
    """

    def __init__(self, captured: Sequence[torch.Tensor] = (), *, vouched: bool = False) -> None:
        self._vouched = vouched
        self._captured = tuple(ReferenceType(tensor) for tensor in captured)
        self._entries: dict[Hashable, _Entry] = {}

    @property
    def reason(self) -> str:
        """Say "recorded", or which evaluation is not replayed, and why."""
        if self.needs_grad:
            return "a tensor that the function reaches requires grad by now"
        if any(reference() is None for reference in self._captured):
            return "a tensor that the function reached no longer exists"
        waiting = [(name, entry) for name, entry in self._entries.items() if not entry.trusted]
        # Those given up first: others may only be new.
        for name, entry in sorted(waiting, key=lambda item: not item[1].given_up):
            return f"evaluation `{name[0] if isinstance(name, tuple) else name}`: {entry.reason}"
        return "recorded" if self._entries else _Entry().reason

    @property
    def needs_grad(self) -> bool:
        """Whether a tensor of unknown origin in its programs requires grad by now."""
        programs = [entry.program for entry in self._entries.values() if entry.program is not None]
        return True in [tensor.requires_grad for program in programs for tensor in program.constants]

    def program(
        self,
        name: Hashable,
        evaluation: Evaluation,
        inputs: Callable[[], Sequence[torch.Tensor]],
        late: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> tuple[Program, list[torch.Tensor]] | None:
        """Return the program of ``evaluation``, to be called with ``(*inputs, *captured)``, and the captured tensors, or None if none is verified.

        Parameters
        ----------
        name
            Tells the evaluations of a function apart.
        evaluation
            A function of ``(*inputs, *late)``.
        inputs, late
            Make its arguments of this time. For those of the second part (see :class:`bilevel.replay.Program`), any will do.
        """
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries.setdefault(name, _Entry())
        captured = [tensor for reference in self._captured if (tensor := reference()) is not None]
        if entry.given_up or len(captured) < len(self._captured):  # a captured tensor no longer exists
            return None
        if not entry.trusted:
            try:
                self._try(entry, evaluation, inputs(), captured, late())
            except Exception as error:  # whatever it is, the evaluation that follows says it in its own way
                entry.given_up, entry.program = True, None
                entry.reason = f"the recording ended with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return (entry.program, captured) if entry.trusted and entry.program is not None else None

    def _try(
        self,
        entry: _Entry,
        evaluation: Evaluation,
        inputs: Sequence[torch.Tensor],
        captured: Sequence[torch.Tensor],
        late: Sequence[torch.Tensor],
    ) -> None:
        """Note the evaluation, or compare it with what was noted before."""
        noted = entry.program is not None
        if entry.program is not None:
            expected, reason = tuple(evaluation(*inputs, *late)), ""
        else:
            expected, entry.program, reason = note(evaluation, inputs, captured, late, found=self._vouched)
        if entry.program is not None:
            reason = _difference(entry.program, (*inputs, *captured), late, expected)
        if entry.program is not None and not (reason or noted) and entry.program.constants:
            again = note(evaluation, inputs, captured, late, found=self._vouched)
            reason = again.reason
            if again.program is not None and not self._same_constants(entry.program, again.program):
                reason = "two runs read other tensors, or numbers, from outside of the arguments"
        entry.given_up, entry.trusted = bool(reason), noted and not reason
        entry.reason = reason or entry.reason
        if reason:
            entry.program = None

    def _same_constants(self, program: Program, again: Program) -> bool:
        """Return whether the constants of two recordings of one function hold for later calls."""
        if self._vouched:
            return program.finds_what_lasts(again)
        # What the code makes is made anew by another run; what a run finds somewhere may be another tensor, or number, tomorrow.
        return not program.shares_constants(again)


def _difference(
    program: Program, inputs: Sequence[torch.Tensor], late: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> str:
    """Say where ``program`` does not give exactly the ``expected`` results; "" if it does."""
    with torch.no_grad():
        begun = program.begin(*inputs)
        places = tuple(place for place, known in enumerate(begun.outputs) if known is None)
        rest = iter(begun.finish(places, *late) if places else ())
    found = [next(rest) if known is None else known for known in begun.outputs]
    wrong = [place for place, agreed in enumerate(map(_same, found, expected)) if not agreed]
    return f"the recorded program and the function disagreed at output {wrong[0]}" if wrong else ""


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_layout = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
    return same_layout and bool(((a == b) | ((a != a) & (b != b))).all())
