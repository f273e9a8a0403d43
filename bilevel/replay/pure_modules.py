"""Which modules, and methods of other objects, do the same operations at every call, given their parameters and buffers.

A module of the torch kinds below is known by its settings. The methods of a user's module, as of any object, are read
like functions (:mod:`bilevel.replay.purity`), together with the attributes that they use, if these are plain
attributes. A name that the class defines too, for example as a property, is not followed. A module with hooks,
parametrisations or its own attribute access counts as unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as _module

from bilevel.replay.pure_names import ATTRIBUTES

__all__ = ["Bound", "StatelessModule", "emptied", "kept_under", "shell_parts"]

# Their forward is a matter of settings and tensors alone.
_KINDS = frozenset({
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear, nn.Embedding, nn.Conv1d, nn.Conv2d,
    nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Softmax, nn.LogSoftmax, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.Dropout, nn.MSELoss, nn.L1Loss,
    nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.HuberLoss, nn.SmoothL1Loss, nn.PoissonNLLLoss, nn.GaussianNLLLoss,
    nn.KLDivLoss, nn.SoftMarginLoss,
})  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TABLES = ("_parameters", "_buffers", "_modules")
# What torch keeps beside settings, of which only the names matter here.
_TORCH_S = frozenset(vars(nn.Module()))
_GETATTR = nn.Module.__getattr__
# What calling a module and taking its parts goes through, as it was when this was imported.
_CALL = {
    name: getattr(nn.Module, name)
    for name in (
        "__call__",
        "_wrapped_call_impl",
        "_call_impl",
        "_slow_forward",
        "_compiled_call_impl",
        "__getattr__",
        "__getattribute__",
    )
}
# Methods without a call that a user's module may have: of all others, operators and the like, it is not known which code goes by them.
_SPECIAL = frozenset({
    "__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate__", "__annotate_func__",
    "__constants__", "__repr__", "__orig_bases__", "__parameters__", "__abstractmethods__", "__firstlineno__", "__static_attributes__", "__slots__",
    "__setstate__", "__getstate__", "__reduce__", "__annotations_cache__",
})  # fmt: skip


def _made_of(kind: type) -> tuple[tuple[Any, str, Any], ...]:
    """Return where the methods of a kind of torch's stand, with the functions that they name, and what is there."""
    bases = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    methods = {name for base in bases for name, value in vars(base).items() if isinstance(value, FunctionType)}
    named = {name for method in methods for name in getattr(kind, method).__code__.co_names}
    places: list[tuple[Any, str]] = [(kind, name) for name in methods]
    places += [(module, name) for module in (torch, F) for name in named if callable(vars(module).get(name))]
    return tuple((holder, name, getattr(holder, name)) for holder, name in sorted(places, key=lambda place: place[1]))


_KNOWN = {kind: _made_of(kind) for kind in _KINDS}


@dataclass(frozen=True, eq=False)
class StatelessModule:
    """A module without its parameters and buffers, which each call passes.

    Parameters
    ----------
    module
        The module.
    empty
        Whether all of them are passed; otherwise only those that require grad.
    """

    module: nn.Module
    empty: bool


@dataclass(frozen=True, eq=False)
class Bound:
    """A method of an object, or a function.

    Parameters
    ----------
    function, owner
        It and the object; None for a function that is no method.
    inside
        Whether the object is a part of a module whose parts and tensors are told apart already.
    """

    function: Any
    owner: Any
    inside: bool = False


def shell_parts(shell: StatelessModule) -> tuple[list[Any], list[Any]] | str:
    """Return the objects that identify calls of a module, and the functions on which it depends.

    A sentence says why if they cannot be determined.
    """
    if _module._has_any_global_hook():
        return "a hook on all modules is registered"
    objects: list[Any] = []
    named: list[Any] = []
    for part in _within(shell.module):
        own, kind = vars(part), type(part)
        if not _is_called_plainly(part):
            return f"the module {kind.__name__} has hooks, or operators or calls of its own"
        # With the names of what is in each part, the order tells where it stands.
        objects += [part, kind, own["training"], len(own["_modules"])]
        objects += [item for name, child in own["_modules"].items() for item in (name, child is None)]
        for table in ("_parameters", "_buffers"):
            objects.append(len(own[table]))
            for name, tensor in own[table].items():
                objects += [name, tensor is None]
                named += [tensor] if tensor is not None and not shell.empty and not tensor.requires_grad else []
        forward = _of_class(kind, "forward")
        if kind in _KNOWN:
            if any(getattr(holder, name, None) is not value for holder, name, value in _KNOWN[kind]):
                return f"a function that torch's module {kind.__name__} calls was replaced"
            settings = {name: value for name, value in own.items() if name not in _TORCH_S}
            if any(hasattr(kind, name) for name in settings):
                return f"the module {kind.__name__} keeps an attribute in place of one of its methods"
            for name, value in settings.items():
                named += [name, tuple(value) if type(value) is list else value]
        elif isinstance(forward, FunctionType) and not _looks_like_a_tensor(part):
            named.append(Bound(forward, part, inside=True))
        else:
            return f"the module {kind.__name__} is of a kind that is not on the list, or has attributes named like a tensor's"
    return objects, named


def _is_called_plainly(part: nn.Module) -> bool:
    """Return whether a call of a module is a call of its ``forward``, and its parts are in torch's tables."""
    own, kind = vars(part), type(part)
    if any(name not in own for name in (*_TABLES, *_HOOKS, "training")) or any(own[hooks] for hooks in _HOOKS):
        return False
    if any(getattr(kind, name, None) is not value for name, value in _CALL.items()):
        return False
    if "forward" in own or any(own.get(name) is not None for name in _CALL):
        return False
    ours = [base for base in kind.__mro__ if base not in nn.Module.__mro__ and base not in _KINDS]
    return all(name in _SPECIAL or not _is_special(name) for base in ours for name in vars(base))


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _within(module: nn.Module) -> Iterator[nn.Module]:
    """Yield ``module`` and all modules in it, each before its parts. A module in two places comes twice."""
    yield module
    for part in vars(module)["_modules"].values():
        if part is not None:
            yield from _within(part)


def _looks_like_a_tensor(part: nn.Module) -> bool:
    """Return whether a module of a user's has, beside tensors and modules, what code around may take from it as one takes it from tensors."""
    ours = (base for base in type(part).__mro__ if base not in nn.Module.__mro__)
    return any(not ATTRIBUTES.isdisjoint(table) for table in (vars(part), *map(vars, ours)))


_NOWHERE = object()


def _of_class(kind: type, name: str) -> Any:
    """Return what ``kind`` has under ``name``, as it stands there."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), _NOWHERE)


def kept_under(bound: Bound, names: Iterable[str], constants: frozenset[type]) -> list[Any] | str:
    """Return the ``names`` that a method takes from its object, each with what is found there.

    A sentence says why if one is not plainly what the object keeps, a number of its class, or another method. ``constants`` are
    the types of numbers and the like.
    """
    owner, kind = bound.owner, type(bound.owner)
    finds = getattr(kind, "__getattr__", None)
    plain: Any = object.__getattribute__
    if kind.__getattribute__ is not plain or finds not in (None, _GETATTR):
        return f"the class {kind.__name__} changes how its attributes are found"
    if type(own := getattr(owner, "__dict__", None)) is not dict:
        return f"an object of the class {kind.__name__} has no plain table of attributes"
    tables = [own[table] for table in _TABLES] if isinstance(owner, nn.Module) else []
    found: list[Any] = []
    for name in names:
        of_class = _of_class(kind, name)
        if of_class is not _NOWHERE and type(of_class) not in constants:
            if not isinstance(of_class, FunctionType) or name in own:
                return f"`{name}` of the class {kind.__name__} is no plain method or number"
            found += [name, Bound(of_class, owner, bound.inside)]
        elif name in own:
            found += [name, own[name]]
        elif of_class is not _NOWHERE:
            found += [name, of_class]
        else:
            held = [table[name] for table in tables if name in table]
            if len(held) != 1:
                return f"`{name}` of an object of the class {kind.__name__} is no plain attribute"
            found += [name] if bound.inside else [name, held[0]]
    return found


def emptied(value: Any) -> Any:
    """Return a module without its tensors; any other object unchanged."""
    return StatelessModule(value, empty=True) if isinstance(value, nn.Module) else value
