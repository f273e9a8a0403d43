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
        "torch_generators": method._random_numbers().recorded,
        "passes": method.passes,
        "memory": {name: getattr(method, name) for name in method._STATE},
    }
    return copy.deepcopy(state)


def load_method_state(method: Any, state: dict[str, Any]) -> None:
    """Put a state into a method of the same class and variables."""
    where = f"{method.where}.load_state_dict"
    _check(method, state, where)
    state = copy.deepcopy(state)
    before = method_state(method)
    try:
        _put_optimizers(method, state)
        _put(method, state)
    except Exception as error:
        _put_optimizers(method, before)
        _put(method, before)
        what = (
            "expected the states of the optimisers that the method has, and torch says"
            if isinstance(error, _OptimizerError)
            else "expected a state as state_dict() returns it, and an entry cannot be used"
        )
        raise ArgumentError(
            f"{where}: {what}: {error}; make the method with the optimisers that it had when the state was saved, and pass the state unchanged"
        ) from error


class _OptimizerError(Exception):
    """The state of an optimiser is another one's."""


def _put_optimizers(method: Any, state: dict[str, Any]) -> None:
    pairs = [
        (method.inner_optimizer, state["inner_optimizer"]),
        (method.outer_optimizer, state["outer_optimizer"]),
        *((one.optimizer, state["auxiliary"][name]["optimizer"]) for name, one in method._auxiliary.items()),
    ]
    for optimizer, saved in pairs:
        try:
            optimizer.load_state_dict(saved)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _OptimizerError(str(error)) from error
        for group in optimizer.param_groups:
            missing = sorted(set(optimizer.defaults) - set(group))
            if missing:
                raise _OptimizerError(f"{type(optimizer).__name__} has the settings {missing}, and its state has not")


def _put(method: Any, state: dict[str, Any]) -> None:
    overwrite(method._inner.tensors, state["inner"])
    overwrite(method._outer.tensors, state["outer"])
    for variables in (method._inner, method._outer):
        saved = state[f"{variables.what}_buffers"]
        overwrite(list(variables.buffers().values()), [saved[name] for name in variables.buffers()])
    for name, one in method._auxiliary.items():
        overwrite(one.tensors, state["auxiliary"][name]["tensors"])
    method._average = state.get("average")
    method._scale.load(state["scale"])
    method._generator.set_state(state["generator"])
    method._random_numbers().restore(state["torch_generators"])
    method._oracle.passes = {kind: int(state["passes"][kind]) for kind in ("forward", "reverse")}
    method.steps = state["steps"]
    for name in method._STATE:
        if name in state["memory"]:
            setattr(method, name, state["memory"][name])


_ENTRIES = {"method": str, "steps": int, "inner": list, "outer": list, "inner_buffers": dict, "outer_buffers": dict, "inner_optimizer": dict,
            "outer_optimizer": dict, "auxiliary": dict, "scale": dict, "generator": torch.Tensor,
            "torch_generators": list, "passes": dict, "memory": dict}  # fmt: skip


def _check(method: Any, state: Any, where: str) -> None:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ArgumentError(f"{where}: expected the dict that state_dict() returns, got another object; pass that dict")
    for name, kind in _ENTRIES.items():
        if not isinstance(state.get(name), kind):
            got = f"{type(state[name]).__name__} in its place" if name in state else "a dict without it"
            raise ArgumentError(
                f"{where}: expected the dict that state_dict() returns, with {name!r}, got {got}; pass that dict unchanged"
            )
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
        dtypes, saved_dtypes = [t.dtype for t in variables.tensors], [t.dtype for t in state[what]]
        if dtypes != saved_dtypes:
            raise ArgumentError(
                f"{where}: expected {what} variables of {dtypes}, got {saved_dtypes}; convert the variables before the method is made"
            )
        names, saved = sorted(variables.buffers()), sorted(state[f"{what}_buffers"])
        if names != saved:
            raise ArgumentError(
                f"{where}: expected the {what} module's buffers {names}, got {saved}; load the state of the same module"
            )
    if (state.get("average") is None) != (method._average is None):
        raise ArgumentError(
            f"{where}: expected the same ema_decay setting as when the state was saved, and one has averages and the other has none; "
            "pass the same StepOptions"
        )


def overwrite(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy ``values`` into ``tensors``, in place."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
