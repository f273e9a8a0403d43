"""The state of a method: all that a run needs to go on bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from bilevel.errors import ArgumentError
from bilevel.stochastic._lists import clone

__all__ = ["load_method_state", "method_state", "overwrite"]

FORMAT = 1
"""Version of the state's layout."""


def method_state(method: Any) -> dict[str, Any]:
    """Return copies of all that a resumed run of a ``StochasticMethod`` needs."""
    state = {
        "format": FORMAT,
        "method": type(method).__name__,
        "steps": method.steps,
        "inner": clone(method._inner.tensors),
        "outer": clone(method._outer.tensors),
        "inner_buffers": method._inner.buffers(),
        "outer_buffers": method._outer.buffers(),
        "inner_optimizer": method.inner_optimizer.state_dict(),
        "outer_optimizer": method.outer_optimizer.state_dict(),
        "auxiliary": {
            name: {"tensors": one.tensors, "optimizer": one.optimizer.state_dict()}
            for name, one in method._auxiliary.items()
        },
        "average": method._average,
        "scale": method._scale.state(),
        "generator": method._generator.get_state(),
        "passes": method.passes,
        "memory": {name: getattr(method, name) for name in method._STATE},
    }
    return copy.deepcopy(state)


def load_method_state(method: Any, state: dict[str, Any]) -> None:
    """Put a state into a method of the same class and variables."""
    where = f"{method.where}.load_state_dict"
    _check(method, state, where)
    state = copy.deepcopy(state)
    try:
        method.inner_optimizer.load_state_dict(state["inner_optimizer"])
        method.outer_optimizer.load_state_dict(state["outer_optimizer"])
        for name, one in method._auxiliary.items():
            one.optimizer.load_state_dict(state["auxiliary"][name]["optimizer"])
    except (ValueError, KeyError) as error:
        raise ArgumentError(
            f"{where}: expected the states of the optimisers that the method has, and torch says: {error}; make the method with the "
            "optimisers that it had when the state was saved"
        ) from error
    overwrite(method._inner.tensors, state["inner"])
    overwrite(method._outer.tensors, state["outer"])
    for variables in (method._inner, method._outer):
        saved = state[f"{variables.what}_buffers"]
        overwrite(list(variables.buffers().values()), [saved[name] for name in variables.buffers()])
    for name, one in method._auxiliary.items():
        overwrite(one.tensors, state["auxiliary"][name]["tensors"])
    method._average = state["average"]
    method._scale.load(state["scale"])
    method._generator.set_state(state["generator"])
    method._oracle.passes = dict(state["passes"])
    method.steps = state["steps"]
    for name in method._STATE:
        setattr(method, name, state["memory"].get(name))


def _check(method: Any, state: Any, where: str) -> None:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ArgumentError(f"{where}: expected the dict that state_dict() returns, got another object; pass that dict")
    if state["method"] != type(method).__name__:
        raise ArgumentError(
            f"{where}: expected the state of {type(method).__name__}, got one of {state['method']}; load it into that method"
        )
    for variables in (method._inner, method._outer):
        what = variables.what
        mine, theirs = [tuple(t.shape) for t in variables.tensors], [tuple(t.shape) for t in state[what]]
        if mine != theirs:
            raise ArgumentError(
                f"{where}: expected {what} variables of shapes {mine}, got {theirs}; load the state of the same variables"
            )
        names, saved = sorted(variables.buffers()), sorted(state[f"{what}_buffers"])
        if names != saved:
            raise ArgumentError(
                f"{where}: expected the {what} module's buffers {names}, got {saved}; load the state of the same module"
            )
    if (state["average"] is None) != (method._average is None):
        raise ArgumentError(
            f"{where}: expected the same ema_decay setting as when the state was saved, and one has averages and the other has none; "
            "pass the same StepOptions"
        )


def overwrite(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy ``values`` into ``tensors``, in place."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
