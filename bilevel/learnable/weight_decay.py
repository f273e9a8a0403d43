"""Weight decay for each layer, each tensor or each entry of a model."""

from __future__ import annotations

import torch
from torch import nn

import bilevel
from bilevel.learnable._base import Learnable, Loss, number, require_module

__all__ = ["WeightDecay"]


class WeightDecay(Learnable):
    """Learn weight decays: G = mean_i ℓ_i + ½ Σ_p e^{θ_p} ‖φ_p‖², with one θ_p for each tensor p of a model.

    :meth:`for_layers` lets the tensors of one layer share a decay, and :meth:`for_entries` gives each entry of each tensor its own. Tensors
    that do not require grad have none.

    Parameters
    ----------
    model
        Whose parameters are to decay; the parameters of this module have their dtypes and devices.
    initial
        The decay at first.
    loss
        See :class:`Learnable`.

    Raises
    ------
    ArgumentError
        If the model has no parameter that requires grad, or ``initial`` is not positive.

    References
    ----------
    Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation", AISTATS 2020, Section 5.

    Examples
    --------
    >>> import torch
    >>> from bilevel.learnable import WeightDecay
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> decay = WeightDecay.for_layers(model, initial=0.01)
    >>> len(decay.logarithms), {name: round(value.item(), 3) for name, value in decay().items()}
    (2, {'0.weight': 0.01, '0.bias': 0.01, '2.weight': 0.01, '2.bias': 0.01})
    >>> sum(p.numel() for p in WeightDecay.for_entries(model).parameters())  # as many as the model has
    23
    """

    def __init__(self, model: nn.Module, *, initial: float = 1e-3, loss: Loss | None = None) -> None:
        super().__init__(loss=loss)
        self._make(model, {name: torch.Size() for name in _moving(model)}, list(_moving(model)), initial)

    @classmethod
    def for_layers(cls, model: nn.Module, *, initial: float = 1e-3, loss: Loss | None = None) -> WeightDecay:
        """Return one decay for each layer, such as a linear layer's weight and bias together."""
        made = cls(model, initial=initial, loss=loss)
        names = list(_moving(model))
        layers = [name.rpartition(".")[0] for name in names]
        made._make(model, dict.fromkeys(layers, torch.Size()), layers, initial)
        return made

    @classmethod
    def for_entries(cls, model: nn.Module, *, initial: float = 1e-3, loss: Loss | None = None) -> WeightDecay:
        """Return one decay for each number in the model."""
        made = cls(model, initial=initial, loss=loss)
        made._make(model, {name: p.shape for name, p in _moving(model).items()}, list(_moving(model)), initial)
        return made

    def _make(self, model: nn.Module, shapes: dict[str, torch.Size], owners: list[str], initial: float) -> None:
        number("WeightDecay", "initial", initial)
        moving = _moving(model)
        if not moving:
            raise bilevel.ArgumentError(
                "WeightDecay: expected the model to have a parameter that requires grad, and it has none; unfreeze one"
            )
        self._shapes = {name: p.shape for name, p in moving.items()}
        places = {owner: place for place, owner in enumerate(shapes)}
        self._places = [places[owner] for owner in owners]
        like = list(moving.values())
        self.logarithms = nn.ParameterList(
            like[self._places.index(place)].detach().new_full(shape, initial).log()
            for place, shape in enumerate(shapes.values())
        )

    def forward(self) -> dict[str, torch.Tensor]:
        """Return the decay of each parameter by name, of shape () or that of the parameter."""
        return {name: self.logarithms[place].exp() for name, place in zip(self._shapes, self._places, strict=True)}

    def penalty(self, model: nn.Module) -> torch.Tensor:
        """Return ½ Σ_p e^{θ_p} ‖φ_p‖², of shape ()."""
        moving = _moving(model)
        if {name: p.shape for name, p in moving.items()} != self._shapes:
            raise bilevel.ShapeError(
                f"WeightDecay: expected the parameters that the decays were made for, {_listed(self._shapes)}, got "
                f"{_listed({name: p.shape for name, p in moving.items()})}; make WeightDecay(model) of the model that is trained"
            )
        return 0.5 * torch.stack([(decay * moving[name] ** 2).sum() for name, decay in self().items()]).sum()


def _moving(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in require_module("WeightDecay", "model", model).named_parameters() if p.requires_grad}


def _listed(shapes: dict[str, torch.Size]) -> str:
    first = ", ".join(f"{name} {tuple(shape)}" for name, shape in list(shapes.items())[:4])
    return first + (", ..." if len(shapes) > 4 else "")
