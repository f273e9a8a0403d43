"""The bounds and constraints of a layer, from which each call makes a constrained system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel.equations.structured import Structure, StructuredSystem, flat_raveler
from bilevel.equations.system import System
from bilevel.errors import ArgumentError, BilevelError, DtypeError, ShapeError
from bilevel.layers.constrained import ConstrainedSystem
from bilevel.layers.constraints import Constraints, flatten_values
from bilevel.pytree import Raveler

__all__ = ["ConstraintStructure"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ConstraintStructure(Structure):
    """The bounds and constraints of a layer.

    Parameters
    ----------
    constraints
        The constraints, or a function of the layer's arguments that returns them.
    written
        Returns what the user wrote, where that is not what is given.
    """

    constraints: Constraints | Callable[..., Constraints | None]
    written: Callable[[], Any] | None = None

    @property
    def functions(self) -> tuple[Any, ...]:
        """The bounds and constraints that the user wrote."""
        if not isinstance(self.constraints, Constraints):
            return (self.constraints if self.written is None else self.written(),)
        return tuple(getattr(self.constraints, name) for name in self.constraints.present)

    def attach(
        self, ordinary: System, init: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> tuple[StructuredSystem, torch.Tensor]:
        """Return the constrained system of a call and where its search begins, (n + p + m,); the multipliers begin at zero."""
        stated = self.constraints
        if not isinstance(stated, Constraints):
            args, kwargs = ordinary.arguments.rebuild(tensors)
            stated = stated(*args, **kwargs) or Constraints()
            if not isinstance(stated, Constraints):
                raise ArgumentError(
                    f"{ordinary.where}: expected inner_constraints to return bilevel.Constraints(...), got {type(stated).__name__}; return one"
                )
        shapes = {
            name: _structure_of(ordinary, getattr(stated, name), name, init, tensors)
            for name in ("equality", "inequality")
        }
        more = sum(0 if known is None else known.size for known in shapes.values())
        system = ConstrainedSystem(
            where=ordinary.where,
            function=ordinary.function,
            raveler=flat_raveler(ordinary.raveler.size + more, ordinary.raveler),
            arguments=ordinary.arguments,
            levels=ordinary.levels,
            autocast=ordinary.autocast,
            mode=ordinary.mode,
            ordinary=ordinary,
            constraints=self.constraints,
            smoothing=stated.smoothing,
            **shapes,
        )
        # Multipliers of zero are inactive; those of the central path are positive.
        first = 0.0 if stated.smoothing is None else 1.0
        start = torch.cat([init, torch.full((more,), first, dtype=init.dtype, device=init.device)]) if more else init
        with torch.no_grad():
            system.bounds(init, *tensors)  # so that what is wrong with them is said outside of the solve
        return system, start


def _structure_of(
    ordinary: System,
    function: Callable[..., Any] | None,
    name: str,
    init: torch.Tensor,
    tensors: Sequence[torch.Tensor],
) -> Raveler | None:
    """Return the structure of a constraint's values, from a first call."""
    if function is None:
        return None
    system = replace(ordinary, function=function)
    try:
        with torch.no_grad():
            made = system.call(init, *tensors)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, BilevelError) or "randomness" in str(error):
            raise
        if "dtype" in str(error) or "scalar type" in str(error):
            dtype = str(init.dtype).removeprefix("torch.")
            raise DtypeError(
                f"{ordinary.where}: expected the tensors that {name} reaches to have the dtype of init, {dtype}, and torch says: "
                f"{' '.join(str(error).split())}; pass them as arguments of the layer, or convert them or init, for example with .double()"
            ) from error
        raise ShapeError(
            f"{ordinary.where}: expected {name} to be a function of (x, *args, **kwargs) that works at init, and it says: "
            f"{' '.join(str(error).split())}; give it the parameters of the objective, and shapes that fit"
        ) from error
    return flatten_values(made, ordinary.where, name)
