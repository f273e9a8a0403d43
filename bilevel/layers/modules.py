"""Modules in layers: as the function, whose parameters are then θ, and as the unknown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from bilevel.errors import ArgumentError

__all__ = ["STATE", "FunctionalModule", "ModuleFunction", "check_module"]

# The keyword under which a layer hands a module's tensors to its function.
STATE = "module_state"


def check_module(module: torch.nn.Module, where: str) -> None:
    """Raise :class:`ArgumentError` for a module that cannot be called with other parameters than its own."""
    lazy = [name for name, p in (*module.named_parameters(), *module.named_buffers()) if is_lazy(p)]
    if lazy:
        raise ArgumentError(
            f"{where}: expected a module whose parameters have shapes, got one whose {lazy[0]} has none before its first call; call the "
            "module once with data, before the layer"
        )
    for part in module.modules():
        if isinstance(part, (torch.jit.ScriptModule, torch.nn.DataParallel)):
            own = "its .module" if isinstance(part, torch.nn.DataParallel) else "the module as it was before torch.jit"
            raise ArgumentError(
                f"{where}: expected a module that can be called with other parameters, got a {type(part).__name__}, which torch cannot call so; "
                f"pass {own}"
            )


class FunctionalModule(dict[str, torch.Tensor]):
    """A module with other parameters than its own. Objectives receive it and layers return it where the unknown is a module.

    It is called like the module, it has the module's ``parameters()`` and ``named_parameters()``, and it is the dict of its parameters:
    ``net["0.weight"]``. As a pytree its leaves are the parameters, so that it can be differentiated, mapped and batched.

    Parameters
    ----------
    module
        The module. It is not changed.
    parameters
        A floating-point tensor for each parameter that requires grad, by name, in the shape of the parameter.

    Examples
    --------
    >>> import torch, bilevel
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> fit = bilevel.argmin(lambda net, x, y, s: ((net(x) - y) ** 2).sum() + s * (net["weight"] ** 2).sum())
    >>> s = torch.tensor(1.0, requires_grad=True)
    >>> net = fit(model, torch.ones(1, 1), 2 * torch.ones(1, 1), s)
    >>> round(net(torch.ones(1, 1)).item(), 4)  # 2 / (1 + s)
    1.0
    """

    def __init__(self, module: torch.nn.Module, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__(parameters)
        self.module = module

    def parameters(self) -> Iterator[torch.Tensor]:
        """Return the parameters, as ``torch.nn.Module.parameters`` does."""
        return iter(self.values())

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the parameters with their names, as ``torch.nn.Module.named_parameters`` does."""
        return iter(self.items())

    def __getattr__(self, name: str) -> torch.Tensor:
        """Return the parameter ``name``: ``net.weight`` is ``net["weight"]``."""
        if name in self:
            return self[name]
        raise AttributeError(
            f"a {type(self).__name__} has no attribute {name!r}; its parameters are items, for example net[{next(iter(self), 'weight')!r}], "
            "and the rest of the module is net.module"
        )

    @staticmethod
    def of(init: Any, where: str) -> Any:
        """Return a module at its own parameters, cut from any graph, and any other initial guess as it is."""
        if not isinstance(init, torch.nn.Module):
            return init
        check_module(init, where)
        own = {name: p.detach() for name, p in init.named_parameters() if p.requires_grad}
        if not own:
            raise ArgumentError(
                f"{where}: expected the module given as init to have a parameter that requires grad, and it has none; unfreeze one"
            )
        return FunctionalModule(init, own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with these parameters."""
        return torch.func.functional_call(self.module, dict(self), args, kwargs)

    def __repr__(self) -> str:
        return f"FunctionalModule({type(self.module).__name__}, {sorted(self)})"


pytree.register_pytree_node(
    FunctionalModule,
    lambda made: (list(made.values()), (made.module, tuple(made))),
    lambda leaves, context: FunctionalModule(context[0], dict(zip(context[1], leaves, strict=True))),
    serialized_type_name="bilevel.FunctionalModule",
    flatten_with_keys_fn=lambda made: (
        [(pytree.MappingKey(name), leaf) for name, leaf in made.items()],
        (made.module, tuple(made)),
    ),
)


class ModuleFunction:
    """A module's forward as a function of its tensors too, which a layer hands to it under :data:`STATE`."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.__name__ = type(module).__name__

    def state(self) -> dict[str, torch.Tensor]:
        """Return the module's parameters and buffers, which derivatives go to."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the module's parameters, for an optimiser: ``torch.optim.Adam(layer.function.parameters())``."""
        return self.module.parameters()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        state = kwargs.pop(STATE)
        return torch.func.functional_call(self.module, state, args, kwargs)
