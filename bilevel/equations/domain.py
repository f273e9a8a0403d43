"""Points at which a user's function has no value because a torch operation raises there. Only that problem becomes NaN.

A line search tries points outside the domain of an objective. A logarithm answers NaN there, and a shorter step follows. A Cholesky
factorisation raises instead, for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from bilevel._torch.factorisations import LinAlgError
from bilevel.errors import ArgumentError, BilevelError

__all__ = ["defined", "leaves_domain", "no_value", "row_by_row"]


class Batch(Protocol):
    """A batch of problems that can be taken one by one."""

    @property
    def batch(self) -> int: ...

    def single(self, number: int) -> Any: ...


# The words with which torch's distributions refuse a parameter or a value.
_CONSTRAINT = "to satisfy the constraint"


def leaves_domain(error: BaseException) -> bool:
    """Return whether ``error`` means that a function has no value: a failed factorisation, or a refused parameter of a distribution."""
    if isinstance(error, BilevelError):
        return False
    return isinstance(error, LinAlgError) or (isinstance(error, ValueError) and _CONSTRAINT in str(error))


def no_value(where: str, noun: str, error: Exception) -> ArgumentError:
    """Return the error for a derivative at a point that lies outside the domain."""
    return ArgumentError(
        f"{where}: expected {noun} to have a value at each solution that is differentiated, and torch says: {' '.join(str(error).split())}; "
        "leave the problem whose solve failed out of the batch"
    )


@contextmanager
def defined(where: str, noun: str) -> Iterator[None]:
    """Raise the error of :func:`no_value` if a function has no value at a point of a derivative."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not leaves_domain(error):
            raise
        raise no_value(where, noun, error) from error


def row_by_row(
    problem: Batch,
    x: torch.Tensor,
    evaluate: Callable[[Any, torch.Tensor], Sequence[torch.Tensor]],
    shapes: Sequence[tuple[int, ...]],
) -> list[torch.Tensor]:
    """Return ``evaluate`` of each problem as a batch, with NaN for a problem that leaves the domain.

    Parameters
    ----------
    problem, x
        The batch of problems, and their points (batch, n).
    evaluate
        A function of a batch of one problem and its point (1, n). Its results have a leading axis of one.
    shapes
        The shapes of the results of ``evaluate``, without that axis.
    """
    rows: list[Sequence[torch.Tensor]] = []
    for number in range(problem.batch):
        try:
            # A batch of one problem has failed already.
            rows.append(() if problem.batch == 1 else evaluate(problem.single(number), x[number : number + 1]))
        except (RuntimeError, ValueError) as error:
            if not leaves_domain(error):
                raise
            rows.append(())
    nothing = [x.new_full((1, *shape), float("nan")) for shape in shapes]
    return [torch.cat([row[place] if row else nothing[place] for row in rows]) for place in range(len(shapes))]
