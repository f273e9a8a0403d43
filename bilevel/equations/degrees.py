"""The degree of an objective as a polynomial in φ, proven from the operations that it consists of.

Each value of a run has a degree in φ: constants 0, φ itself 1. Linear operations keep it, products add it, and all
other operations make it infinite. Degrees hold at every φ if the run does the same operations at every φ. A run that
draws random numbers proves nothing. Nor does a run in which a number of φ decides a shape or is read by Python: a
branch, ``.item()``, numpy. Nor does a run in which autograd differentiates another function than the executed one: a
custom ``Function``, ``.detach()`` or ``no_grad``, a hook, compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel._torch.transforms import innermost
from bilevel.equations.problem import Problem

__all__ = ["Degree", "degree_of"]

NONE = -math.inf
_MOST_POWER = 64


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations of torch that are linear in all floating-point arguments together; masks and indices are to be independent of φ.
_LINEAR = _names(
    """add sub rsub neg positive sum mean cumsum trace clone alias contiguous detach lift_fresh lift copy _to_copy fill
    view _unsafe_view reshape _reshape_alias as_strided select slice narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk
    unsafe_chunk unbind squeeze unsqueeze expand permute transpose t unfold diagonal diag_embed tril triu flip roll repeat cat stack
    index _unsafe_index gather index_select take where masked_fill constant_pad_nd index_add index_put index_copy scatter scatter_add
    select_scatter slice_scatter diagonal_scatter im2col col2im avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d"""
)
# Linear in each of the first two arguments.
_PRODUCTS = _names("mul mm bmm mv dot vdot _sparse_mm")
# a + b c of their first three arguments.
_FUSED = _names("addmm addmv addbmm baddbmm addr addcmul")
# b c + a: input, weight, bias.
_AFFINE = _names("convolution _convolution linear")
# A⁻¹ b of their first two arguments.
_SOLVES = _names("_linalg_solve_ex linalg_solve_triangular")
# What goes by the shape of an argument alone.
_SHAPES = _names(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_empty_strided zero"
)
# What tells Python of a tensor's form, and not of its numbers, and in which types.
_FORM = _names(
    """__get__ __len__ __setitem__ size dim ndimension stride numel nelement element_size storage_offset is_floating_point is_complex
    is_contiguous get_device is_signed is_neg is_conj is_inference is_same_size result_type"""
)
_FORMS = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout, type(None))
_READING = _names("_local_scalar_dense is_nonzero equal")
_OPEN_TAGS = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})


@dataclass(frozen=True)
class Degree:
    """The dependence of a value on φ.

    Parameters
    ----------
    whole
        The degree as a polynomial in φ; ∞ if the value is not known to be a polynomial.
    part
        The degree in φ of the part that depends on θ; −∞ if no part does.
    square
        The degree of the square, if it is known to be less than twice ``whole``. A norm is not a polynomial, and its square
        is one.
    """

    whole: float = 0.0
    part: float = NONE
    square: float = math.inf

    def plus(self, other: Degree) -> Degree:
        """Return the degree of a sum."""
        return Degree(max(self.whole, other.whole), max(self.part, other.part))

    def times(self, other: Degree) -> Degree:
        """Return the degree of a product (A + D)(A′ + D′), where D and D′ depend on θ."""
        parts = [a.whole + b.part for a, b in ((self, other), (other, self)) if b.part > NONE]
        return Degree(self.whole + other.whole, max(parts, default=NONE))

    def unknown(self) -> Degree:
        """Return the degree of an arbitrary function of such a value."""
        beyond = math.inf if self.whole > 0 else 0.0
        return Degree(beyond, beyond if self.part > NONE else NONE)


UNKNOWN = Degree(math.inf, math.inf)


def degree_of(problem: Problem, x: torch.Tensor, needs_grad: Sequence[bool]) -> Degree:
    """Return the degree of the objectives of a batch in φ, and of their part in θ: the largest of any problem's.

    Parameters
    ----------
    problem
        The objectives.
    x
        φ (K, n), the point of the run.
    needs_grad
        Which tensors make up θ.
    """
    inputs = [x.detach().clone().requires_grad_(True)]
    inputs += [t.detach().clone() if want else t.detach() for t, want in zip(problem.tensors, needs_grad, strict=True)]
    for tensor, want in zip(inputs[1:], needs_grad, strict=True):
        tensor.requires_grad_(want)
    run = DegreeMode()
    run.set_degree(inputs[0], Degree(1.0))
    for tensor, want in zip(inputs[1:], needs_grad, strict=True):
        run.set_degree(tensor, Degree(0.0, 0.0) if want else Degree())
    # Inside what the system has its function run in, so that only calls of the user's are seen.
    inside = problem.system.mode

    def mode() -> Any:
        return NestedModes(inside(), ReadWatch(run))

    system = replace(problem.system, mode=mode)
    with torch.enable_grad(), run:
        made = system.outputs(inputs[0].reshape(*system.batch_shape, problem.size), *inputs[1:])
    found = run.degree(made)
    cut = found.whole > 0 and not made.requires_grad
    return UNKNOWN if run.open or cut or any(_differs(node) for node in _nodes(made)) else found


class NestedModes:
    """Two contexts, the first outside the second."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._contexts = (outer, inner)

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *raised: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*raised)


class DegreeMode(TorchDispatchMode):
    """A ``TorchDispatchMode`` that computes the degree in φ of each operation's result from those of its arguments.

    :attr:`open` is True if the run proves nothing. Degrees are kept by storage, not by tensor: that of a storage is the largest ever written there.
    Views and in-place operations then need no special treatment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = False
        self._degrees: dict[int, Degree] = {}
        self._made: set[int] = set()
        self._kept: list[torch.Tensor] = []  # memory that is let go could be given to another tensor

    def set_degree(self, tensor: torch.Tensor, degree: Degree) -> None:
        """Set the degree of a tensor."""
        if tensor.layout is torch.strided:
            key = _memory(tensor)
            known = self._degrees.get(key)
            self._degrees[key] = degree if known is None else known.plus(degree)
            self._kept.append(tensor)

    def degree(self, tensor: torch.Tensor) -> Degree:
        """Return the degree of a tensor that is read. A tensor that no operation made is a constant."""
        if tensor.layout is not torch.strided:
            return Degree(0.0, 0.0)  # results of φ are never of such a layout here; θ may be
        known = self._degrees.get(_memory(tensor))
        if known is None and tensor.requires_grad:
            self.open = True  # made of φ, by an operation that was not seen, or of what the objective must not reach
        return known or Degree()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.open:
            return func(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        moved = [t for t in given if self.degree(t).whole > 0]
        name, in_place = func._schema.name.removeprefix("aten::"), func._schema.is_mutable
        base = name.rstrip("_") if in_place else name
        # A number of φ leaves for Python, chooses a shape, or is read as bits.
        reads = base in _READING or (base != "index" and not _OPEN_TAGS.isdisjoint(func.tags))
        reads = reads or (base == "view" and isinstance(args[1], torch.dtype))
        chosen = base == "index" and any(self.degree(t).whole > 0 for t in _tensors(args[1]))
        # What autograd does not see of φ, it does not differentiate.
        cut = not torch.is_grad_enabled() or any(t.is_floating_point() and not t.requires_grad for t in moved)
        if (moved and (reads or chosen or cut)) or torch.Tag.nondeterministic_seeded in func.tags:
            self.open = True
            return func(*args, **kwargs)
        degree = self._of(func, base, args, kwargs, given)
        made = func(*args, **kwargs)
        found = list(_tensors(made))
        if in_place:
            # A constant that was there before the run is another one in the next.
            targets = list(_changed(func, args, kwargs))
            self.open = any(_memory(t) not in self._made for t in targets) and bool(moved)
            found += targets
        for tensor in found:
            if tensor.layout is not torch.strided:
                self.open = self.open or bool(moved)
                continue
            key, here = _memory(tensor), degree if tensor.is_floating_point() else degree.unknown()
            if key not in self._degrees:
                self._made.add(key)
                self._kept.append(tensor)
                self._degrees[key] = here
            elif in_place:
                self._degrees[key] = self._degrees[key].plus(here)
        return made

    def _of(self, func: Any, base: str, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Degree:
        """Return the degree of an operation's results."""
        degrees = [self.degree(t) for t in given]
        total = Degree()
        for degree in degrees:
            total = total.plus(degree)
        if func.namespace != "aten":
            return total.unknown()
        if base in _SHAPES:
            return Degree()
        if base in _LINEAR and "reduce" not in kwargs:
            fixed = [d for t, d in zip(given, degrees, strict=True) if not t.is_floating_point()]
            if any(degree.whole > 0 for degree in fixed):
                return total.unknown()
            by_theta = any(degree.part > NONE for degree in fixed)
            return Degree(total.whole, total.whole if by_theta else total.part)
        first = [self._argument(args, place) for place in range(3)]
        if base in _PRODUCTS:
            return first[0].times(first[1])
        if base in _FUSED:
            return first[0].plus(first[1].times(first[2]))
        if base in _AFFINE:
            return first[0].times(first[1]).plus(first[2])
        if base == "div" and kwargs.get("rounding_mode") is None and first[1].whole == 0:
            return first[0].times(first[1].unknown())
        if base in _SOLVES and first[0].whole == 0:
            return first[0].unknown().times(first[1])
        if base == "lerp":
            return first[0].plus(self._argument(args, 2).times(first[0].plus(first[1])))
        if base in ("mse_loss", "var"):
            difference = first[0].plus(first[1])
            return difference.times(difference)
        if base in ("linalg_vector_norm", "norm", "abs") and self._is_root(base, args, kwargs):
            return replace(total.unknown(), square=total.times(total).whole)
        if base == "pow" and isinstance(args[1], int | float):
            return _power(first[0], args[1])
        return total.unknown()

    def _argument(self, args: Sequence[Any], place: int) -> Degree:
        value = args[place] if place < len(args) else None
        return self.degree(value) if isinstance(value, torch.Tensor) else Degree()

    @staticmethod
    def _is_root(base: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Return whether the square of the result is the sum of squares of the argument's entries."""
        order = args[1] if len(args) > 1 else kwargs.get("ord", kwargs.get("p", 2))
        return base == "abs" or order in (2, 2.0)


def _power(base: Degree, exponent: float) -> Degree:
    """Return the degree of a power: a polynomial's for a whole exponent, a norm's for an even one."""
    if exponent != int(exponent) or not 0 <= exponent <= _MOST_POWER:
        return base.unknown()
    if exponent and exponent % 2 == 0 and base.square < math.inf:
        whole = base.square * exponent / 2
        return Degree(whole, whole if base.part > NONE else NONE)
    made = Degree()
    for _ in range(int(exponent)):
        made = made.times(base)
    return made


class ReadWatch(TorchFunctionMode):
    """A mode that marks the run as open if Python reads a number that depends on φ, or interferes with autograd."""

    def __init__(self, run: DegreeMode) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = any(self._run.degree(innermost(t)).whole > 0 for t in _tensors((args, kwargs)))
        made = getattr(func, "written_out", func)(*args, **(kwargs or {}))
        name, module = getattr(func, "__name__", ""), getattr(func, "__module__", None) or ""
        leaves = [leaf for leaf in pytree.tree_leaves(made) if not isinstance(leaf, torch.Tensor)]
        harmless = not leaves or (name in _FORM and isinstance(made, _FORMS))
        self._run.open = self._run.open or (given and (not harmless or module.startswith("torch.autograd")))
        return made


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    yield from (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the arguments that an operation in place writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))


def _nodes(tensor: torch.Tensor) -> Iterator[Any]:
    """Yield the nodes of a tensor's graph."""
    met, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in met:
            met.add(node)
            yield node
            left += [before for before, _ in node.next_functions]


def _differs(node: Any) -> bool:
    """Return whether a node's derivative is user-defined or compiled."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) or "Graph" in type(node).__name__
