"""Looks at one problem's function at one point: whether it is finite, deterministic, connected, differentiated rightly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bilevel.testing.references import Reference, gradients

__all__ = ["Probe", "argument_mismatch", "bent", "captured_tensors", "gradient_mismatch", "noise", "probe", "state_of"]


@dataclass(frozen=True, eq=False)
class Probe:
    """One evaluation of a problem's function.

    Parameters
    ----------
    value
        What it returned, as one vector.
    residual
        R (n,), or None where the value does not depend on the unknown.
    leaves
        Tensors that require grad in its graph, besides the unknown and the arguments.
    """

    value: torch.Tensor
    residual: torch.Tensor | None
    leaves: tuple[torch.Tensor, ...]


def probe(reference: Reference, number: int, x: torch.Tensor) -> Probe:
    """Evaluate problem ``number`` at ``x`` (n,)."""
    tensors = reference.leaves()
    args, kwargs = reference.subject.case(number, tensors)
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        made = reference.subject.function(reference.tree(point), *args, **kwargs)
        flat = torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(made)])
        known = {id(point), *map(id, tensors)}
        leaves = tuple(leaf for leaf in _graph_leaves(flat) if id(leaf) not in known)
        if not _depends(flat, point):
            return Probe(flat.detach(), None, leaves)
    residual = reference.residual(number, x.detach(), tensors).detach()
    return Probe(flat.detach(), residual, leaves)


def _depends(output: torch.Tensor, point: torch.Tensor) -> bool:
    if not output.requires_grad:
        return False
    (slope,) = torch.autograd.grad(output.sum(), point, retain_graph=True, allow_unused=True)
    return slope is not None


def _graph_leaves(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that require grad in which the graph of ``output`` ends."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        pending.extend(following for following, _ in node.next_functions)


def captured_tensors(found: Sequence[torch.Tensor], function: Callable[..., Any]) -> list[str]:
    """Return a name, where one can be found, and the shape of each tensor that ``function`` reached by closure."""
    names: dict[int, str] = {}
    for head, item in _reached(function):
        if isinstance(item, torch.Tensor):
            names[id(item)] = head
        elif isinstance(item, torch.nn.Module):
            names.update({id(parameter): f"{head}.{name}" for name, parameter in item.named_parameters()})
    return [f"{names.get(id(tensor), 'a tensor')} {tuple(tensor.shape)}" for tensor in found]


def state_of(reference: Reference) -> list[int]:
    """Return the version counters of the arguments and of the buffers that the function reaches."""
    function = reference.subject.function
    modules = [item for _, item in _reached(function) if isinstance(item, torch.nn.Module)]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    tensors = [leaf for leaf in reference.subject.leaves if isinstance(leaf, torch.Tensor)]
    return [tensor._version for tensor in (*tensors, *buffers) if not tensor.is_inference()]


def _reached(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Return what ``function`` is bound to, closes over, or names as globals, by name."""
    owner = getattr(function, "__self__", None)
    found = [("self", owner)] if owner is not None else []
    if isinstance(function, torch.nn.Module):
        found.append(("the module", function))
    try:
        variables = inspect.getclosurevars(inspect.unwrap(getattr(function, "__func__", function)))
    except (TypeError, ValueError):
        return found
    return [*found, *variables.nonlocals.items(), *variables.globals.items()]


def noise(reference: Reference, number: int, x: torch.Tensor) -> float:
    """Return how much R moves when every entry of ``x`` moves by one unit in its last place."""
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x)
    perturbed = x * (1 + torch.finfo(x.dtype).eps * signs)
    here, there = (reference.residual(number, at, reference.points).detach() for at in (x, perturbed))
    return float((here - there).norm())


def gradient_mismatch(reference: Reference, number: int, x: torch.Tensor) -> tuple[float, float]:
    """Compare derivatives by autograd with differences, beside ``x``.

    Returns
    -------
    The relative error of an argmin's gradient against its values (0 for equations), and of the products with J against the
    residuals.
    """
    generator = torch.Generator().manual_seed(1)
    signs = [(torch.randint(0, 2, x.shape, generator=generator) * 2 - 1).to(x) for _ in range(2)]
    size = 1 + x.abs()
    at, direction = x + 0.05 * size * signs[0], size * signs[1]
    h = reference.eps ** (1 / 3)
    ahead, behind, here = (probe(reference, number, at + s * h * direction) for s in (1.0, -1.0, 0.0))
    if ahead.residual is None or behind.residual is None or here.residual is None:
        return 0.0, 0.0
    first = 0.0
    if reference.subject.layer.minimizes:
        slope = float(here.residual @ direction)
        rounding = 10 * reference.eps * float(here.value.abs().max()) / h
        scale = float(here.residual.norm() * direction.norm())
        first = _relative(abs(float((ahead.value - behind.value).sum()) / (2 * h) - slope), scale, rounding)
    change = (ahead.residual - behind.residual) / (2 * h)
    matrix_product = _product(reference, number, at, direction)
    rounding = 10 * reference.eps * float(here.residual.norm()) / h
    scale = float(matrix_product.norm() + change.norm())
    return first, _relative(float((change - matrix_product).norm()), scale, rounding)


def argument_mismatch(
    scalar: Callable[[Sequence[torch.Tensor]], torch.Tensor], points: Sequence[torch.Tensor], eps: float
) -> list[float]:
    """Compare derivatives of ``scalar`` with differences, beside ``points``: the relative error for each."""
    generator = torch.Generator().manual_seed(2)
    h = eps ** (1 / 3)
    moves = [_signs(point, generator) * (1 + point.detach().abs()) for point in points]
    tensors = [(point.detach() + 0.05 * move).requires_grad_() for point, move in zip(points, moves, strict=True)]
    with torch.enable_grad():
        value = scalar(tensors)
    slopes = gradients(value, tensors)
    rounding = 10 * eps * float(value.detach().abs()) / h
    errors = []
    for place, (slope, move) in enumerate(zip(slopes, moves, strict=True)):
        step = [h * move if at == place else 0.0 for at in range(len(tensors))]
        ahead, behind = (
            float(scalar([t.detach() + s * part for t, part in zip(tensors, step, strict=True)]).detach())
            for s in (1.0, -1.0)
        )
        change = (ahead - behind) / (2 * h)
        error, scale = abs(change - float((slope * move).sum())), float(slope.norm() * move.norm()) + abs(change)
        errors.append(_relative(error, scale, rounding) if math.isfinite(error) else 0.0)
    return errors


def bent(
    scalar: Callable[[Sequence[torch.Tensor]], torch.Tensor], points: Sequence[torch.Tensor], eps: float, coarse: float
) -> list[bool]:
    """Return for each of ``points``, known up to the relative ``coarse``, whether slopes of ``scalar`` on its two sides differ.

    (c(θ + hd) + c(θ − hd) − 2 c(θ)) / h is their difference along d. It falls with h where c is smooth, and stays at a kink.
    """
    generator = torch.Generator().manual_seed(3)
    fixed = [point.detach() for point in points]
    with torch.no_grad():
        here = float(scalar(fixed))
    found = []
    for place, point in enumerate(fixed):
        move = (1 + point.abs()) * torch.rand(point.shape, generator=generator, dtype=torch.float64).to(point)
        move = move * _signs(point, generator)
        bends, slope, rounding = [], 0.0, 0.0
        for h in (10 * (step := max(eps**0.375 / 10, 100 * coarse)), step):
            sides = [[*fixed[:place], point + s * h * move, *fixed[place + 1 :]] for s in (1.0, -1.0)]
            ahead, behind = (float(scalar(side).detach()) for side in sides)
            bends.append(abs(ahead + behind - 2 * here) / h)
            slope, rounding = abs(ahead - behind) / h, 1e3 * eps * max(abs(here), abs(ahead)) / h
        sure = math.isfinite(sum(bends)) and bends[1] > max(rounding, 1e-3 * slope)
        found.append(sure and bends[1] > 0.5 * bends[0])
    return found


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random signs, the same on both sides of the diagonal: a function of symmetric matrices has a derivative among these alone."""
    signs = (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
    square = like.ndim > 1 and like.shape[-1] == like.shape[-2]
    return signs.triu() + signs.triu(1).mT if square else signs


def _relative(error: float, scale: float, rounding: float) -> float:
    return 0.0 if error <= rounding or not scale else error / scale


def _product(reference: Reference, number: int, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return J v by two reverse passes."""
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        residual = reference.residual(number, point, reference.points)
        dummy = torch.zeros_like(residual, requires_grad=True)
        if not residual.requires_grad:
            return torch.zeros_like(v)
        (pulled,) = torch.autograd.grad(
            residual, point, dummy, create_graph=True, allow_unused=True, materialize_grads=True
        )
        if not pulled.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(pulled, dummy, v, allow_unused=True, materialize_grads=True)
    return product
