"""Optimisers of ``torch.optim`` over the variables: made, checked, mirrored, and read as preconditioners."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from bilevel.errors import ArgumentError
from bilevel.stochastic._lists import Tensors, norm

__all__ = [
    "OptimizerLike",
    "check_holds",
    "descend",
    "is_plain_sgd",
    "learning_rate",
    "made_optimizer",
    "mirrored_sgd",
    "preconditioner",
    "same_layout",
    "tie_rates",
]

OptimizerLike: TypeAlias = Optimizer | Callable[[Any], Optimizer]
"""An optimiser over the variables, its class, or a function of a list of tensors that makes one."""


def made_optimizer(given: OptimizerLike | None, tensors: Tensors, what: str, where: str, default: Any) -> Optimizer:
    """Return an optimiser over ``tensors``, made from what the caller gave, or say what cannot be used about it."""
    name = f"{what}_optimizer"
    made: Any = given
    if not isinstance(given, Optimizer):
        if given is not None and not callable(given):
            raise ArgumentError(
                f"{where}: expected {name} to be an optimiser of torch.optim, its class, or a function of the parameters that makes one, "
                f"got {given!r}; pass functools.partial(torch.optim.SGD, lr=0.1), for example"
            )
        try:
            made = (given or default)(tensors)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{where}: expected {name} to make an optimiser of a list of tensors, and it says: {error}; pass "
                "functools.partial(torch.optim.SGD, lr=0.1), for example"
            ) from error
        if not isinstance(made, Optimizer):
            raise ArgumentError(
                f"{where}: expected {name} to return a torch.optim.Optimizer, got {type(made).__name__}; return one made over the "
                "parameters"
            )
    if isinstance(made, torch.optim.SparseAdam):
        raise ArgumentError(
            f"{where}: expected {name} to take dense gradients, got SparseAdam, which takes sparse ones alone; pass torch.optim.Adam"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ArgumentError(
            f"{where}: expected {name} to move by one gradient at a time, got {type(made).__name__}, which evaluates the loss by itself; pass "
            "torch.optim.SGD or torch.optim.Adam"
        )
    check_holds(made, tensors, what, where)
    for group in made.param_groups:
        if group.get("maximize"):
            raise ArgumentError(
                f"{where}: expected {name} to minimise, got maximize=True; leave it out, and change the sign of the loss"
            )
    return made


def check_holds(optimizer: Optimizer, tensors: Sequence[torch.Tensor], what: str, where: str) -> None:
    """Raise :class:`ArgumentError` unless ``optimizer`` moves ``tensors`` and nothing else."""
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    expected = {id(tensor) for tensor in tensors}
    if held != expected:
        raise ArgumentError(
            f"{where}: expected {what}_optimizer to hold exactly the {len(expected)} tensors of {what} that require grad, and it holds "
            f"{len(held & expected)} of them and {len(held - expected)} others; make it over these tensors"
        )


def descend(
    optimizer: Optimizer,
    tensors: Tensors,
    direction: Tensors,
    max_norm: float | None,
    size: torch.Tensor | None = None,
) -> None:
    """Make one step of ``optimizer`` with ``direction``, of norm ``size``, for the gradient. What the caller has in ``.grad`` stays."""
    if max_norm is not None:
        size = norm(direction) if size is None else size
        factor = (max_norm / (size + 1e-12)).clamp(max=1.0)
        direction = [part * factor.to(part.dtype) for part in direction]
    before = [tensor.grad for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor, part in zip(tensors, direction, strict=True):
                tensor.grad = part.detach().to(tensor.dtype)
            optimizer.step()
    finally:
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient


def learning_rate(optimizer: Optimizer) -> Any:
    """Return the learning rate of the first group: a number or a tensor."""
    return _rate(optimizer.param_groups[0], optimizer)


def _rate(group: dict[str, Any], optimizer: Optimizer) -> Any:
    if "lr" not in group:
        raise ArgumentError(
            f"{type(optimizer).__name__}: expected the inner optimiser to have a learning rate named 'lr', which this method reads, and it "
            f"has {sorted(set(group) - {'params'})}; name it so, or pass the rate: adjoint_optimizer=, neumann_rate= or gap_rate=, "
            "whichever the method has"
        )
    return group["lr"]


def mirrored_sgd(optimizer: Optimizer, tensors: Tensors, mirror: Tensors) -> Optimizer:
    """Return plain gradient steps on ``mirror`` in the groups that ``optimizer`` has ``tensors`` in."""
    twin = {id(tensor): other for tensor, other in zip(tensors, mirror, strict=True)}
    groups = [
        {"params": [twin[id(tensor)] for tensor in group["params"]], "lr": _rate(group, optimizer)}
        for group in optimizer.param_groups
    ]
    return torch.optim.SGD(groups)


def tie_rates(follower: Optimizer, leader: Optimizer) -> None:
    """Give every group of ``follower`` the learning rate that ``leader`` has now."""
    if len(follower.param_groups) != len(leader.param_groups):
        raise ArgumentError(
            f"{type(leader).__name__}: expected the inner optimiser to keep its {len(follower.param_groups)} groups, and it has "
            f"{len(leader.param_groups)}; make the method anew after a change of its groups"
        )
    for mine, theirs in zip(follower.param_groups, leader.param_groups, strict=True):
        if "lr" in theirs:
            mine["lr"] = theirs["lr"]


def same_layout(optimizer: Optimizer, tensors: Tensors, mirror: Tensors) -> Optimizer:
    """Return an optimiser of the same class and settings over ``mirror``."""
    twin = {id(tensor): other for tensor, other in zip(tensors, mirror, strict=True)}
    groups = [
        {
            **{name: value for name, value in group.items() if name != "params"},
            "params": [twin[id(t)] for t in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    rate = {"lr": learning_rate(optimizer)} if "lr" in optimizer.param_groups[0] else {}
    try:
        return type(optimizer)(groups, **rate)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{type(optimizer).__name__}: expected the inner optimiser to be made from its groups alone, as a second one is needed, and it "
            f"says: {error}; pass one of torch.optim"
        ) from error


def is_plain_sgd(optimizer: Optimizer) -> bool:
    """Return whether a step is x − lr · direction and nothing else."""
    return isinstance(optimizer, torch.optim.SGD) and all(
        not group["momentum"] and not group["weight_decay"] for group in optimizer.param_groups
    )


def preconditioner(optimizer: Optimizer, tensors: Sequence[torch.Tensor], where: str) -> Tensors:
    """Return the diagonal D of a step x − D m of an adaptive optimiser, as it stands: lr / (√v̂ + ε) for Adam.

    Before the first step there are no second moments, and D is the learning rate.
    """
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    return [_diagonal(optimizer, groups[id(tensor)], tensor, where) for tensor in tensors]


def _diagonal(optimizer: Optimizer, group: dict[str, Any], tensor: torch.Tensor, where: str) -> torch.Tensor:
    state, rate = optimizer.state.get(tensor, {}), group["lr"]
    if isinstance(optimizer, torch.optim.SGD) or not state:
        return torch.full_like(tensor.detach(), float(rate))
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        corrected = moment / (
            1 - group["betas"][1] ** float(state["step"])
        )  # the count is float32: its power would be too
        return rate / (corrected.sqrt() + group["eps"])
    if isinstance(optimizer, torch.optim.RMSprop):
        return rate / (state["square_avg"].sqrt() + group["eps"])
    if isinstance(optimizer, torch.optim.Adagrad):
        return rate / (state["sum"].sqrt() + group["eps"])
    raise ArgumentError(
        f"{where}: expected an inner optimiser with a diagonal preconditioner (Adam, AdamW, RMSprop, Adagrad, SGD), got "
        f"{type(optimizer).__name__}; take one of these, or preconditioned=False"
    )
