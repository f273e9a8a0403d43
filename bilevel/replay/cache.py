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

from bilevel.operators import LinearOperator
from bilevel.replay.program import Program
from bilevel.replay.recorder import note

__all__ = ["ReplayCache", "ReplayedOperator"]

Evaluation = Callable[..., Sequence[torch.Tensor]]


@dataclass(eq=False)
class _Entry:
    """The state of one kind of evaluation."""

    program: Program | None = None
    trusted: bool = False
    given_up: bool = False


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

    def captured(self) -> list[torch.Tensor] | None:
        """Return the tensors that the function captures, or None if one no longer exists."""
        found = [tensor for reference in self._captured if (tensor := reference()) is not None]
        return found if len(found) == len(self._captured) else None

    @property
    def constants(self) -> list[torch.Tensor]:
        """The tensors of unknown origin in its programs."""
        programs = (entry.program for entry in self._entries.values())
        return [tensor for program in programs if program is not None for tensor in program.constants]

    def program(
        self,
        name: Hashable,
        evaluation: Evaluation,
        inputs: Callable[[], Sequence[torch.Tensor]],
        late: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> Program | None:
        """Return the program of ``evaluation``, to be called with ``(*inputs, *captured)``, or None if there is no verified one.

        Parameters
        ----------
        name
            Tells the evaluations of a function apart.
        evaluation
            A function of ``(*inputs, *late)``.
        inputs, late
            Make its arguments of this time. For those of the second part (see :class:`bilevel.replay.Program`), any will do.
        """
        entry = self._entries.setdefault(name, _Entry())
        captured = self.captured()
        if captured is None or entry.given_up:
            return None
        if entry.trusted:
            return entry.program
        try:
            self._try(entry, evaluation, inputs(), captured, late())
        except Exception:  # whatever it is, the evaluation that follows says it in its own way
            entry.given_up, entry.program = True, None
        return entry.program if entry.trusted else None

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
            expected = tuple(evaluation(*inputs, *late))
        else:
            expected, entry.program = note(evaluation, inputs, captured, late, found=self._vouched)
        fits = entry.program is not None and _repeats(entry.program, (*inputs, *captured), late, expected)
        if fits and not noted and entry.program is not None and entry.program.constants:
            again = note(evaluation, inputs, captured, late, found=self._vouched)[1]
            fits = again is not None and self._same_constants(entry.program, again)
        entry.given_up, entry.trusted = not fits, noted and fits
        if not fits:
            entry.program = None

    def _same_constants(self, program: Program, again: Program) -> bool:
        """Return whether the constants of two recordings of one function hold for later calls."""
        if self._vouched:
            return program.finds_what_lasts(again)
        # What the code makes is made anew by another run; what a run finds somewhere may be another tensor, or number, tomorrow.
        return not program.shares_constants(again)


def _repeats(
    program: Program, inputs: Sequence[torch.Tensor], late: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> bool:
    """Return whether ``program`` gives exactly the ``expected`` results."""
    with torch.no_grad():
        begun = program.begin(*inputs)
        places = tuple(place for place, known in enumerate(begun.outputs) if known is None)
        rest = iter(begun.finish(places, *late) if places else ())
    found = [next(rest) if known is None else known for known in begun.outputs]
    return all(map(_same, found, expected))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_layout = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
    return same_layout and bool(((a == b) | ((a != a) & (b != b))).all())


class ReplayedOperator(LinearOperator):
    """∂R at one point, whose products are the second part of a program.

    Parameters
    ----------
    like
        (batch, n).
    transposed, forward
        v ↦ Jᵀ v and v ↦ J v.
    """

    def __init__(
        self,
        like: torch.Tensor,
        transposed: Callable[[torch.Tensor], torch.Tensor],
        forward: Callable[[torch.Tensor], torch.Tensor],
        *,
        symmetric: bool,
        expect_definite: bool,
        materialize: Callable[[], torch.Tensor],
    ) -> None:
        super().__init__(
            like.shape[0], like.shape[1], like.dtype, like.device, symmetric=symmetric,
            expect_definite=expect_definite, materialize=materialize,
        )  # fmt: skip
        self._transposed, self._forward = transposed, forward

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._forward(v)

    def rmatvec(self, v: torch.Tensor) -> torch.Tensor:
        return self._transposed(v)
