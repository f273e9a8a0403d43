"""What is special about bounds, constraints and proximal terms: a start outside of them, unknowns that they fix, repetitions, arguments lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

import bilevel
from bilevel.testing._examination import Examination
from bilevel.testing._probes import argument_mismatch
from bilevel.testing._steps_function import MISMATCH
from bilevel.testing.defects import Defect

__all__ = ["arguments", "constraints"]

# The share of the size of x by which a start may violate a constraint, and that of a gradient in which repeated constraints may differ.
_MET, _SAME = 1e-6, 1e-9
_MOST_ROWS, _MOST_NAMES = 256, 3


@dataclass(frozen=True, eq=False)
class _Rows:
    """Values (r,) and gradients (r, n) of constraints at a point, with a name for each, and which of them are equalities (r,)."""

    values: torch.Tensor
    gradients: torch.Tensor
    names: list[str]
    equal: torch.Tensor


def constraints(seen: Examination) -> None:
    """Examine the bounds and constraints at the start, and beside it."""
    if not hasattr(seen.subject.layer.structure, "constraints"):
        return
    starts = seen.wide.rows([leaf.detach() for leaf in pytree.tree_leaves(seen.subject.init)])
    for number in seen.numbers():
        made, args, kwargs = _made(seen, number, seen.wide.points)
        start = starts[number]
        lower, upper = (
            _detached(_bound(seen, getattr(made, name), args, kwargs, start)) for name in ("lower", "upper")
        )
        _fixed(seen, number, lower, upper)
        here = _rows(seen, made, start, args, kwargs)
        if not seen.has(Defect.INFEASIBLE):
            _outside(seen, number, start, lower, upper, here)
        if 0 < len(here.values) <= _MOST_ROWS:
            places = torch.arange(1.0, len(start) + 1, dtype=start.dtype, device=start.device)
            aside = start + 0.1 * (1 + start.abs()) * torch.cos(places)
            there = _rows(seen, made, aside, args, kwargs)
            _repeated(
                seen,
                number,
                *(_with_bounds(rows, x, here, lower, upper) for rows, x in ((here, start), (there, aside))),
            )


def arguments(seen: Examination) -> None:
    """See which outer tensors the problem uses, and compare derivatives of its bounds and constraints with differences."""
    subject, reference = seen.subject, seen.wide
    used = [False] * len(subject.points)
    for number in seen.usable():
        points = reference.leaves()
        parts = [
            reference.residual(number, seen.rows[number], points),
            *_parts(seen, number, seen.rows[number], points),
        ]
        if subject.problem is not None and len(seen.usable()) == reference.count:
            parts.append(reference.scalar(seen.rows, points))
        for part in parts:
            if part.requires_grad:
                slopes = torch.autograd.grad(part.sum(), points, allow_unused=True)
                used = [one or slope is not None for one, slope in zip(used, slopes, strict=True)]
        if hasattr(subject.layer.structure, "constraints") and not seen.has(Defect.STOCHASTIC):
            _compared(seen, number)
    lost = [name for name, one in zip(subject.names, used, strict=True) if not one]
    if lost and seen.usable() and not seen.has(Defect.WRONG_GRADIENT):  # which names what is detached
        seen.find(
            Defect.DISCONNECTED,
            f"no objective, bound, constraint or proximal term uses {', '.join(lost)}: the gradient is zero or None",
        )


def _compared(seen: Examination, number: int) -> None:
    def scalar(given: Sequence[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([part.reshape(-1) for part in _parts(seen, number, given[0], given[1:])])
        weights = 2 + torch.cos(torch.arange(len(flat), dtype=flat.dtype, device=flat.device))
        return (torch.where(torch.isfinite(flat), flat, 0.0) * weights).sum()

    errors = argument_mismatch(scalar, [seen.rows[number], *seen.wide.leaves()], seen.wide.eps)
    for name, error in zip(["the unknown", *seen.subject.names], errors, strict=True):
        if error > MISMATCH:
            text = f"the derivative of the bounds and constraints by {name} and differences of their values disagree by {error:.0%}"
            seen.find(Defect.WRONG_GRADIENT, text)


def _parts(seen: Examination, number: int, x: torch.Tensor, points: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the bounds and the values of constraints at ``x`` with their graphs, or the tensors in proximal terms."""
    structure: Any = seen.subject.layer.structure
    if not hasattr(structure, "constraints"):
        args, kwargs = seen.subject.case(number, points)
        given = structure.given
        return _tensors_in(given(*args, **kwargs) if callable(given) and not is_dataclass(given) else given)
    made, args, kwargs = _made(seen, number, points)
    bounds = [_bound(seen, getattr(made, name), args, kwargs, x) for name in ("lower", "upper")]
    functions = [function for function in (made.equality, made.inequality) if function is not None]
    values = [
        leaf for function in functions for leaf in pytree.tree_leaves(function(seen.wide.tree(x), *args, **kwargs))
    ]
    return [part.to(x) for part in (*bounds, *values) if part is not None] or [x[:0]]


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in a pytree of proximal terms, which are dataclasses."""
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in _tensors_in(getattr(value, field.name))]
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    leaves = pytree.tree_leaves(value)
    return [tensor for leaf in leaves if leaf is not value for tensor in _tensors_in(leaf)]


def _made(seen: Examination, number: int, points: Sequence[torch.Tensor]) -> tuple[bilevel.Constraints, Any, Any]:
    """Return the constraints of one problem, and its arguments."""
    structure: Any = seen.subject.layer.structure
    stated = structure.constraints
    args, kwargs = seen.subject.case(number, points)
    made = stated if isinstance(stated, bilevel.Constraints) else stated(*args, **kwargs)
    return bilevel.Constraints() if made is None else made, args, kwargs


def _detached(bound: torch.Tensor | None) -> torch.Tensor | None:
    return None if bound is None else bound.detach()


def _bound(seen: Examination, value: Any, args: Any, kwargs: Any, like: torch.Tensor) -> torch.Tensor | None:
    """Return a bound as a vector (n,), NaN where there is none."""
    value = value(*args, **kwargs) if callable(value) else value
    if value is None:
        return None
    tree = seen.wide.tree(like)
    leaves = pytree.tree_leaves(tree)
    single = isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.ndim == 0)
    given = [value] * len(leaves) if single or isinstance(tree, torch.Tensor) else pytree.tree_leaves(value)
    whole = [
        torch.broadcast_to(torch.as_tensor(math.nan if one is None else one).to(like), leaf.shape)
        for one, leaf in zip(given, leaves, strict=True)
    ]
    return torch.cat([part.reshape(-1) for part in whole])


def _rows(seen: Examination, stated: Any, x: torch.Tensor, args: Any, kwargs: Any) -> _Rows:
    values, gradients, names, equal = [], [], [], []
    for name, function in (("equality", stated.equality), ("inequality", stated.inequality)):
        if function is None:
            continue
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            made = function(seen.wide.tree(point), *args, **kwargs)
            parts = [(name + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(made)[0]]
            flat = torch.cat([leaf.reshape(-1) for _, leaf in parts]).to(x)
            for head, leaf in parts:
                names += [head + _index(place, leaf.shape) for place in range(leaf.numel())]
            for one in flat[:_MOST_ROWS]:
                (slope,) = torch.autograd.grad(one, point, retain_graph=True, allow_unused=True)
                gradients.append(torch.zeros_like(x) if slope is None else slope)
        values.append(flat.detach())
        equal += [name == "equality"] * len(flat)
    if not values:
        return _Rows(x[:0], x.new_zeros(0, len(x)), [], torch.zeros(0, dtype=torch.bool))
    return _Rows(torch.cat(values), torch.stack(gradients), names, torch.tensor(equal, device=x.device))


def _index(place: int, shape: torch.Size) -> str:
    position: list[str] = []
    for length in reversed(shape):
        place, at = divmod(place, length)
        position.insert(0, str(at))
    return f"[{', '.join(position)}]" if position else ""


def _fixed(seen: Examination, number: int, lower: torch.Tensor | None, upper: torch.Tensor | None) -> None:
    if lower is None or upper is None:
        return
    places = (lower == upper).nonzero().reshape(-1).tolist()
    if places:
        named = _listed([f"x[{place}]" for place in places])
        seen.find(Defect.FIXED, f"lower and upper bound of {named}{seen.of(number)} are equal, and leave one value")


def _outside(
    seen: Examination,
    number: int,
    start: torch.Tensor,
    lower: torch.Tensor | None,
    upper: torch.Tensor | None,
    rows: _Rows,
) -> None:
    """Name the constraint that the start violates most."""
    lacks: list[tuple[float, str]] = []
    for name, gap in (
        ("lower", None if lower is None else lower - start),
        ("upper", None if upper is None else start - upper),
    ):
        if gap is not None and gap.numel():
            if lower is not None and upper is not None:
                gap = torch.where(lower == upper, -math.inf, gap)
            place = int(gap.nan_to_num(-math.inf).argmax())
            lacks.append((float(gap[place].nan_to_num(-math.inf)), f"the {name} bound of x[{place}]"))
    # Starts hardly ever fulfil equalities.
    lack = torch.where(rows.equal & torch.isfinite(rows.values), 0.0, rows.values)
    if len(lack):
        if not bool(torch.isfinite(lack).all()):
            place = int((~torch.isfinite(lack)).nonzero()[0])
            seen.find(
                Defect.INFEASIBLE_START, f"{rows.names[place]}{seen.of(number)} is {float(lack[place])} at the start"
            )
            return
        lacks.append((float(lack.max()), rows.names[int(lack.argmax())]))
    most, name = max(lacks, default=(0.0, ""))
    if most > _MET * (1 + float(start.abs().max())):
        seen.find(Defect.INFEASIBLE_START, f"the start{seen.of(number)} violates {name} by {most:.2g}")


def _with_bounds(
    rows: _Rows, x: torch.Tensor, base: _Rows, lower: torch.Tensor | None, upper: torch.Tensor | None
) -> _Rows:
    """Return ``rows`` and the bounds, as inequalities, of the unknowns to which a row of ``base`` belongs alone."""
    alone = base.gradients[(base.gradients != 0).sum(1) == 1]
    places = (alone != 0).any(0).nonzero().reshape(-1).tolist()
    values, gradients, names = [rows.values], [rows.gradients], list(rows.names)
    for name, bound, sign in (("lower", lower, -1.0), ("upper", upper, 1.0)):
        for place in [] if bound is None else [at for at in places if bool(torch.isfinite(bound[at]))]:
            assert bound is not None
            values.append((sign * (x - bound))[place : place + 1])
            gradients.append(sign * torch.eye(len(x), dtype=x.dtype, device=x.device)[place : place + 1])
            names.append(f"the {name} bound of x[{place}]")
    added = rows.equal.new_zeros(len(names) - len(rows.names))
    return _Rows(torch.cat(values), torch.cat(gradients), names, torch.cat([rows.equal, added]))


def _repeated(seen: Examination, number: int, here: _Rows, there: _Rows) -> None:
    """Name two constraints that are multiples of each other at two points, or equalities of which one follows from the others."""
    count = len(here.gradients)
    unit = torch.cat([_in_units(at, count) for at in (here, there)], 1)
    usable = unit.norm(dim=1) > 0
    gap = (unit[:, None] - unit[None]).abs().amax(-1)
    # The sign of an equality does not count.
    both = here.equal[:count, None] & here.equal[None, :count]
    gap = torch.where(both, torch.minimum(gap, (unit[:, None] + unit[None]).abs().amax(-1)), gap)
    alike = (gap <= _SAME) & usable[:, None] & usable[None] & (here.equal[:count, None] == here.equal[None, :count])
    pairs = alike.triu(1).nonzero()
    if len(pairs):
        one, other = (here.names[int(place)] for place in pairs[0])
        more = f", and {len(pairs) - 1} more pairs do so" if len(pairs) > 1 else ""
        seen.find(Defect.DUPLICATED, f"{one} and {other}{seen.of(number)} state the same{more}")
        return
    of = unit[here.equal[:count]]
    if len(of) > 1:
        left, sizes, _ = torch.linalg.svd(of, full_matrices=True)
        rank = int((sizes > _SAME * sizes[0]).sum())
        if rank < len(of):
            weights = left[:, -1].tolist()
            members = [name for name, weight in zip(here.names, weights, strict=False) if abs(weight) > 1e-6]
            seen.find(Defect.DUPLICATED, f"one of {_listed(members)}{seen.of(number)} follows from the others")


def _in_units(at: _Rows, count: int) -> torch.Tensor:
    """Return gradients of unit length and the distances (count, n + 1) that go with them; zero for constraints without a gradient."""
    sizes = at.gradients.norm(dim=1, keepdim=True)
    rows = torch.cat([at.gradients, at.values[:count, None]], 1) / torch.where(sizes > 0, sizes, 1.0)
    return torch.where((sizes > 0) & torch.isfinite(rows).all(1, keepdim=True), rows, 0.0)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
