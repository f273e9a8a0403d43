"""Which modules, and methods of other objects, do the same operations at every call, given their parameters and buffers.

A module of torch's own kinds below is known by its settings. One of a user's is read as a function is (:mod:`bilevel._straight`): its ``forward``,
the methods that this names, and the numbers and modules that it holds. Hooks, parametrisations, lists that a user keeps in it and whatever changes
how attributes are found make a module one of which nothing is said.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules import module as _module

__all__ = ["Shell", "attributes_of", "emptied", "methods_of", "reaches", "shell_parts"]

# Their forward is a matter of settings and tensors alone.
_KNOWN = frozenset({
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear, nn.Embedding, nn.Conv1d, nn.Conv2d,
    nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Softmax, nn.LogSoftmax, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.Dropout, nn.MSELoss, nn.L1Loss,
    nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.SmoothL1Loss, nn.PoissonNLLLoss, nn.GaussianNLLLoss,
    nn.KLDivLoss, nn.SoftMarginLoss,
})  # fmt: skip
_GETATTR = nn.Module.__getattr__
# With these a module's methods reach what it holds by no name of their own.
_REACHING = frozenset({
    "parameters", "named_parameters", "buffers", "named_buffers", "children", "named_children", "modules", "named_modules", "state_dict",
    "get_parameter", "get_buffer", "get_submodule", "apply", "_apply", "__getattr__", "__getattribute__", "__call__", "_call_impl",
    "_wrapped_call_impl",
})  # fmt: skip
Names: TypeAlias = Callable[[CodeType], Iterable[str]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps beside settings, of which only the names matter here.
_TORCH_S = frozenset(vars(nn.Module()))


@dataclass(frozen=True, eq=False)
class Shell:
    """A module apart from those of its parameters and buffers that are given to it at each call.

    Parameters
    ----------
    module
        The module.
    empty
        Whether all of them are; otherwise those that require grad, as they can be used in no other way.
    """

    module: nn.Module
    empty: bool


def shell_parts(shell: Shell, names: Names) -> tuple[list[Any], list[Any]] | None:
    """Return the objects that tell calls of a module apart, and what else it goes by, which is to be straight itself.

    None if that cannot be told. ``names`` gives the names of attributes in a function's code.
    """
    if _module._has_any_global_hook():
        return None
    objects: list[Any] = []
    named: list[Any] = []
    for key, part in _within("", shell.module):
        own = vars(part)
        if any(own.get(hooks) for hooks in _HOOKS) or "forward" in own:
            return None
        objects += [key, part, type(part), part.training]
        for kind in ("_parameters", "_buffers"):
            for name, tensor in own[kind].items():
                objects += [name, tensor is None]
                named += [tensor] if tensor is not None and not shell.empty and not tensor.requires_grad else []
        known = type(part) in _KNOWN
        # What torch's own kinds keep under private names follows from the others.
        named += [value for name, value in own.items() if name not in _TORCH_S and not (known and name.startswith("_"))]
        if not known:
            if type(part).__call__ is not nn.Module.__call__:  # a compiled one
                return None
            methods = methods_of(part, "forward", names)
            if methods is None:
                return None
            named += methods
    return objects, named


def _within(key: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``module`` and all in it, with the names that they are kept under; what stands in two places twice."""
    yield key, module
    for name, part in vars(module)["_modules"].items():
        if part is not None:
            yield from _within(name, part)


def methods_of(owner: object, method: str, names: Names) -> list[Any] | None:
    """Return the ``method`` of an object's class and all that it names of that class, method by method.

    None if the class finds attributes in a way of its own, or a method makes another use of its object than to name attributes.
    """
    kind: Any = type(owner)
    if kind.__getattribute__ is not object.__getattribute__ or getattr(kind, "__getattr__", None) not in (
        None,
        _GETATTR,
    ):
        return None
    found: list[Any] = []
    pending, met = [method], set()
    while pending:
        name = pending.pop()
        # Attributes of other objects bear names of the class's own only by chance, but torch's modules have many.
        if (
            name in met
            or name in vars(owner)
            or not hasattr(kind, name)
            or getattr(nn.Module, name, None) is getattr(kind, name)
        ):
            continue
        met.add(name)
        value = getattr(kind, name)
        found.append(value)
        if isinstance(value, FunctionType):
            of_torch = (value.__module__ or "").split(".")[0] == "torch"
            if not of_torch and not _static(kind, name) and _hands_on(value.__code__):
                return None
            pending.extend(names(value.__code__))
    return found


def _static(kind: type, name: str) -> bool:
    """Return whether a class has a static method under ``name``."""
    return isinstance(next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None), staticmethod)


@lru_cache(maxsize=1024)
def _hands_on(code: CodeType) -> bool:
    """Return whether a method does anything with its object but name attributes of it: calls it, indexes it, or gives it to a function."""
    if not code.co_argcount:
        return True
    first, pending = code.co_varnames[0], [code]
    while pending:
        part = pending.pop()
        pending += [constant for constant in part.co_consts if isinstance(constant, CodeType)]
        steps = [step for step in dis.get_instructions(part) if step.opname != "CACHE"]
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            # Later versions of Python load two variables at once.
            loads = isinstance(step.argval, tuple) and first in step.argval
            if not loads and (
                step.argval != first or not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_"))
            ):
                continue
            if loads and (first in step.argval[:-1] or not step.opname.startswith("LOAD_FAST")):
                return True
            if step.opname.startswith("STORE_") or after is None or after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                return True
    return False


def reaches(code: CodeType) -> bool:
    """Return whether ``code`` may reach what a module holds by other names than its own."""
    return not _REACHING.isdisjoint(code.co_names)


def attributes_of(owner: object, methods: Iterable[Any], names: Names) -> list[Any]:
    """Return what ``owner`` itself keeps under names that ``methods`` speak of."""
    own = vars(owner)
    tables = [own] if not isinstance(owner, nn.Module) else [own, own["_parameters"], own["_buffers"], own["_modules"]]
    spoken = sorted({name for method in methods if isinstance(method, FunctionType) for name in names(method.__code__)})
    held = [table[name] for name in spoken for table in tables if name in table]
    return [Shell(value, empty=False) if isinstance(value, nn.Module) else value for value in held]


def emptied(value: Any) -> Any:
    """Return a module apart from all of its tensors, and anything else as it is."""
    return Shell(value, empty=True) if isinstance(value, nn.Module) else value
