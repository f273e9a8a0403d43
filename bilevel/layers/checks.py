"""Checks of the user's function before it is differentiated: faults that would make gradients silently wrong."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel._torch.graph_features import nodes, reaches_another_leaf, record_graph_features
from bilevel._torch.once_differentiable import refuse_once_only
from bilevel._torch.transforms import eager, innermost, transforms_active, unhooked
from bilevel.equations.function_errors import unconnected
from bilevel.equations.problem import Problem
from bilevel.errors import BilevelError, CapturedTensorError, DtypeError, StochasticObjectiveError
from bilevel.layers.randomness import GeneratorStates, draws
from bilevel.policy import OnFailure, handle_misuse

__all__ = [
    "SideEffectCheck",
    "captured_error",
    "changed_in_place",
    "drew",
    "inspect_function",
    "refused_by_torch",
]

# The number of further pairs of evaluations that have to agree if random numbers were drawn.
_MORE_PAIRS = 12
# The words of torch's errors about compressed layouts.
_COMPRESSED = re.compile(r"Sparse ?(Csr|Csc|Bsr|Bsc)", re.IGNORECASE)


def inspect_function(problem: Problem, x: torch.Tensor, *, captures: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate twice at ``x``, with derivatives; raise on faults that make gradients wrong; return the value and the slope.

    Raises
    ------
    CapturedTensorError
        If a tensor reached through the closure requires grad (looked for if ``captures``), or belongs to
        a ``vmap`` outside.
    StochasticObjectiveError
        If two evaluations differ, or an argument is changed in place.
    ShapeError, ArgumentError
        If the function returns the wrong shapes, or what it returns does not depend on its first argument; if an objective that may be
        differentiated holds a custom Function that is marked once_differentiable.
    """
    noun = problem.system.examined
    watched = [t for t in (*problem.tensors, *buffers_of(problem.system.function)) if not t.is_inference()]
    versions, states = [t._version for t in watched], GeneratorStates(x.device)
    try:
        with refused_by_torch(problem.where, noun):
            first = _probe(problem, x, captures=captures, first=True)
    except RuntimeError as error:
        if "escaped from inside a function being vmapped" in str(error):
            raise captured_error(problem.where, noun, "belongs to a vmap outside") from error
        if _COMPRESSED.search(str(error)) and not isinstance(error, BilevelError):
            raise DtypeError(
                f"{problem.where}: expected {noun} to be of dense tensors and sparse ones of coordinates, got one in compressed rows, columns "
                f"or blocks, and torch says: {' '.join(str(error).split())}; convert it once, outside, with .to_sparse_coo() or .to_dense()"
            ) from error
        raise
    if versions != [t._version for t in watched]:
        raise changed_in_place(problem.where, noun)
    # Dropout leaves a zero input zero. Then the slopes differ, and the values do not.
    agreed = _agree(first, _probe(problem, x, captures=False), 1e3) or _agrees_beside(problem, x)
    if agreed and drew(states, problem, x):
        # Two draws of few random numbers may agree by chance, so more pairs are drawn.
        agreed = all(_agrees_beside(problem, x) for _ in range(_MORE_PAIRS))
    if not agreed:
        raise StochasticObjectiveError(
            f"{problem.where}: expected {noun} to be deterministic, and two evaluations at one point differ; switch "
            "dropout off with .eval(), or draw the noise outside and pass it as an argument"
        )
    if x.numel():
        problem.system.inspect(problem.residual, x)
    return first


def changed_in_place(where: str, noun: str) -> StochasticObjectiveError:
    """Return the error for a function that changes what it is given."""
    return StochasticObjectiveError(
        f"{where}: expected {noun} to leave its arguments and buffers as they are, and one was changed in place; write x = x + 1 "
        "for x += 1, or change x.clone(); for batch norm use batch statistics (track_running_stats=False) or .eval()"
    )


@contextmanager
def refused_by_torch(where: str, noun: str) -> Iterator[None]:
    """Give torch's refusal to change a tensor in place the words of :func:`changed_in_place`."""
    try:
        yield
    except RuntimeError as error:
        if "used in an in-place operation" in str(error):
            raise changed_in_place(where, noun) from error
        raise


def _agrees_beside(problem: Problem, x: torch.Tensor) -> bool:
    """Return whether two evaluations a little beside ``x`` agree to half the digits.

    At a solution the slope is rounding, and sums of threads or of a GPU's atomics round as they come: such an
    objective is not a random one.
    """
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (problem.size,), generator=generator) * 2 - 1).to(x)
    beside = x + 1e-2 * (1 + x.abs()) * signs
    pair = _probe(problem, beside, captures=False), _probe(problem, beside, captures=False)
    return _agree(*pair, torch.finfo(x.dtype).eps ** -0.5)


def _probe(
    problem: Problem, x: torch.Tensor, *, captures: bool, first: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        output = problem.system.lifted(problem.system.first_output)(problem.shaped(point), *problem.tensors)
        if not output.requires_grad and point.numel():
            raise unconnected(problem.where, problem.system.noun)
        if first and record_graph_features(problem.system.function, nodes(output)):
            return _probe(problem, x, captures=captures)
        if captures and problem.minimizes:
            refuse_once_only(problem.where, problem.system.noun, output)
        if not point.numel():
            return output.detach(), point.detach()
        if captures and reaches_another_leaf(output, (point,)):
            raise captured_error(problem.where, problem.system.examined, "requires grad")
        (slope,) = torch.autograd.grad(output.sum(), point, allow_unused=True, materialize_grads=True)
    return output.detach(), slope


def drew(states: GeneratorStates, problem: Problem, x: torch.Tensor) -> bool:
    """Return whether evaluations at ``x`` draw random numbers, given the states of the generators from before one."""
    return states.changed() and draws(lambda: _probe(problem, x, captures=False))


class SideEffectCheck:
    """Tells whether an evaluation of ``objective`` draws random numbers or changed a tensor in place since this was made.

    Parameters
    ----------
    where
        Of which problem it is.
    objective
        The user's function.
    trees
        Its arguments.
    evaluation
        What is evaluated in between: where random numbers were drawn by somebody, it is done once more.
    noun
        The function's name, for messages.
    """

    @eager
    def __init__(
        self,
        where: str,
        objective: Callable[..., Any],
        trees: Any,
        evaluation: Callable[[], object],
        noun: str = "outer_objective",
    ) -> None:
        leaves = [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
        watched = [*leaves, *buffers_of(objective)]
        if transforms_active():  # versions are counted in the plain tensors that they wrap
            watched = list(map(innermost, watched))
        self._where, self._noun = where, noun
        self._tensors = [tensor for tensor in watched if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._tensors]
        self._evaluation = evaluation
        self._states = GeneratorStates(leaves[0].device if leaves else torch.device("cpu"))

    @eager
    def ended(self, on_failure: OnFailure) -> bool:
        """Treat what was found as the policy says; return whether the result is to be NaN."""
        error: BilevelError | None = None
        changed = self._versions != [tensor._version for tensor in self._tensors]
        if self._draws():
            error = StochasticObjectiveError(
                f"{self._where}: expected {self._noun} to be deterministic, and it draws random numbers; switch dropout off "
                "with .eval(), or draw outside and pass what was drawn in data"
            )
        elif changed:
            error = changed_in_place(self._where, self._noun)
        return error is not None and handle_misuse(error, on_failure)

    def _draws(self) -> bool:
        if not self._states.changed():
            return False
        with unhooked():  # a checkpoint is not to count what is saved here
            return draws(self._evaluation)


def buffers_of(function: Callable[..., Any]) -> list[torch.Tensor]:
    """Return the buffers of modules that ``function`` is, is bound to, closes over or names as globals.

    Looks into the functions that it closes over, or that the module it is bound to keeps, too.
    """
    found: dict[int, torch.Tensor] = {}
    pending: list[tuple[Any, int]] = [(function, 0)]
    seen: set[int] = set()
    while pending:
        item, depth = pending.pop()
        if id(item) in seen or depth > 3:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module):
            found.update((id(buffer), buffer) for buffer in item.buffers())
            pending += [(value, depth + 1) for value in vars(item).values() if inspect.isroutine(value)]
        elif isinstance(item, functools.partial):
            pending += [(value, depth + 1) for value in (item.func, *item.args, *item.keywords.values())]
        elif inspect.isroutine(item) or item is function:
            pending.append((getattr(item, "__self__", None), depth))
            plain = inspect.unwrap(getattr(item, "__func__", item))
            cells = getattr(plain, "__closure__", None) or ()
            reachable_objects = [cell.cell_contents for cell in cells if _filled(cell)]
            code = getattr(plain, "__code__", None)
            if code is not None:
                reachable_objects += [plain.__globals__.get(name) for name in code.co_names]
            pending += [(value, depth + 1) for value in reachable_objects]
    return list(found.values())


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty cell raises
    except ValueError:
        return False
    return True


def _agree(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...], units: float) -> bool:
    """Return whether two evaluations agree to ``units`` of the last place of their largest entry."""
    for a, b in zip(first, second, strict=True):
        if a.numel() and not torch.equal(a, b):
            scale = torch.maximum(a.abs(), b.abs()).nan_to_num().max()
            if not bool(((a - b).abs().nan_to_num() <= units * torch.finfo(a.dtype).eps * scale).all()):
                return False
    return True


def captured_error(where: str, noun: str, how: str) -> CapturedTensorError:
    """Return the error for a tensor that ``noun`` reaches through its closure."""
    return CapturedTensorError(
        f"{where}: expected every tensor to differentiate to be an argument, and {noun} reaches one through its "
        f"closure that {how} and would silently receive no gradient; pass it as an argument (a module's "
        "parameters as dict(module.named_parameters()) with torch.func.functional_call; an object's tensors, such as those of a "
        "dataclass, in a dict, tuple or NamedTuple), or detach it"
    )
