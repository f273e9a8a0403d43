"""What the tests of the zoo share: references that import no solver of the library, and one check of a layer at its default settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, jacrev
from torch.utils import _pytree as pytree

import bilevel

F32, F64 = torch.float32, torch.float64
DTYPES = (F64, F32)

# Relative accuracy of a solution that is called a success, from the issue; a gradient may be off by ten times that.
ACCURACY = {F64: 1e-5, F32: 2e-3}

Function = Callable[..., Any]


def as_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """Return the pytree with its floating-point tensors in ``dtype``."""
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, tree
    )


def flat(tree: Any) -> torch.Tensor:
    """Return the leaves of the pytree as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def like(vector: torch.Tensor, tree: Any) -> Any:
    """Return ``vector`` (n,) as a pytree of the structure and shapes of ``tree``."""
    leaves, spec = pytree.tree_flatten(tree)
    parts = vector.split([leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)], spec)


def equations(layer: Function, function: Function, init: Any) -> Function:
    """Return R(x, *args) for a flat x (n,), whose root the layer is to find."""

    def residual(x: torch.Tensor, *args: Any) -> torch.Tensor:
        if layer is bilevel.argmin:
            return grad(lambda point: function(like(point, init), *args))(x)
        value = flat(function(like(x, init), *args))
        return x - value if layer is bilevel.fixed_point else value

    return residual


def polish(residual: Function, near: torch.Tensor, *args: Any, steps: int = 60) -> torch.Tensor:
    """Return the root of ``residual`` beside ``near`` (n,): damped Newton in float64, checked by the length of its last step."""
    x, step = near.double(), torch.zeros_like(near.double())
    for _ in range(steps):
        value = residual(x, *args)
        step = torch.linalg.solve(jacrev(residual)(x, *args), value)
        size = 1.0
        while size > 1e-6 and not bool(residual(x - size * step, *args).norm() <= value.norm()):
            size /= 2
        x = x - size * step
        if bool((step.abs() <= 1e-14 * (1e-300 + x.abs())).all()):
            break
    assert bool((step.abs() <= 1e-9 * (x.abs() + 1e-9)).all()), "the reference did not converge"
    return x


def reference_gradients(
    residual: Function, x: torch.Tensor, args: tuple[Any, ...], weights: torch.Tensor
) -> list[torch.Tensor]:
    """Return the gradient of ``weights @ x*(args)`` by each floating-point tensor in ``args``, by a dense solve in float64."""
    leaves, spec = pytree.tree_flatten(args)
    adjoint = torch.linalg.solve(jacrev(residual)(x, *args).mT, weights)
    watched = [isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves]
    leaves = [leaf.clone().requires_grad_() if watch else leaf for leaf, watch in zip(leaves, watched, strict=True)]
    outcome = adjoint @ residual(x, *pytree.tree_unflatten(leaves, spec))
    tensors = [leaf for leaf, watch in zip(leaves, watched, strict=True) if watch]
    slopes = torch.autograd.grad(outcome, tensors, allow_unused=True)
    return [-slope if slope is not None else torch.zeros_like(of) for slope, of in zip(slopes, tensors, strict=True)]


def check(
    layer: Function,
    function: Function,
    init: Any,
    *args: Any,
    solution: Any,
    dtype: torch.dtype = F64,
    scale: float | torch.Tensor = 1e-3,
    accuracy: float | None = None,
    weights: torch.Tensor | None = None,
    differentiated: bool = True,
    several: bool = False,
) -> Any:
    """Solve at the default settings and compare x and its gradient by every argument with the reference.

    An unknown may be off by ``accuracy`` of max(|x*|, ``scale``). ``solution`` is close to x*, in float64, and is
    polished by Newton's method unless the Jacobian is singular there or ``differentiated`` is False. Of a function with ``several``
    minima near each other the one beside the answer is right.
    """
    needs_grad = ACCURACY[dtype] if accuracy is None else accuracy
    init, args = as_dtype(init, dtype), as_dtype(args, dtype)
    wide = as_dtype(args, F64)
    exact = flat(as_dtype(solution, F64))
    residual = equations(layer, function, as_dtype(init, F64))
    if differentiated and not several:
        exact = polish(residual, exact, *wide)
    leaves, spec = pytree.tree_flatten(args)
    leaves = [
        leaf.clone().requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
        for leaf in leaves
    ]
    found = layer(function).solve(init, *pytree.tree_unflatten(leaves, spec))
    assert bool(found.report.success.all()), found.report.message
    assert pytree.tree_structure(found.value) == pytree.tree_structure(init)
    x = flat(found.value)
    if several:
        assert float((x.detach().double() - exact).abs().max()) <= scale
        exact = polish(residual, x.detach(), *wide)
    error = (x.detach().double() - exact).abs() / torch.clamp(exact.abs(), min=torch.as_tensor(scale, dtype=F64))
    assert float(error.max()) <= needs_grad, (
        f"{x.tolist()} is off by {float(error.max()):.2g}, {exact.tolist()} is right"
    )
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if differentiated and tensors:
        weights = 1 + torch.arange(len(x), dtype=F64) / len(x) if weights is None else weights
        slopes = torch.autograd.grad(x @ weights.to(dtype), tensors, allow_unused=True)
        flow = float(torch.linalg.solve(jacrev(residual)(exact, *wide).mT, weights).norm())
        for slope, right in zip(slopes, reference_gradients(residual, exact, wide, weights), strict=True):
            mine = torch.zeros_like(right) if slope is None else slope.double()
            size = float(right.abs().max())
            if (
                size <= 1e-9 * flow
            ):  # zero but for rounding, where x* is zero: measured by what an error of x makes of it
                size = flow * float(torch.as_tensor(scale).max())
            off = float((mine - right).abs().max()) / size
            assert off <= 10 * needs_grad, f"the gradient is off by {off:.2g}"
    return found


def refused(call: Callable[[], Any], *statuses: bilevel.Status) -> bilevel.SolveError:
    """Check that ``call`` raises a SolveError with one of ``statuses`` (any that is no success, if none are given)."""
    with pytest.raises(bilevel.SolveError) as caught:
        call()
    report = caught.value.report
    assert not bool(report.success.all())
    met = {bilevel.Status(int(code)) for code in report.status_code.reshape(-1)}
    if statuses:
        assert met & set(statuses), f"{met} is none of {statuses}: {report.message}"
    return caught.value
